"""The registry: node aliases, and the ring of those who hold data and duties, agreed by Nexus.

Interface: `start` once, `nexus_known` when the node knows of voters, then `member_changed`,
`answered`, `lease_lost` and `tick`; each returns effects in order. It asks Nexus by
`Notify(Ask(token, request))` and is answered by `answered(token, answer, now_ms)`. To be read at
any time, without effect: `epoch ring place alias_of kid_of`; empty and 0 until Nexus has told.
What it tells the node: `registry.messages.Event`.

Every node watches both registers. One of them, the registrar, holds the lease `cluster/registrar`
and makes the registers say what membership says: level-triggered, from what it finds, for all
nodes together; so 16 nodes that join cost two writes, and a node does nothing for its own alias.
Nobody contends for the lease without something to do: the first living node in the rendezvous
order of the lease at once, the k-th after k times `patience_ms` in which nobody else did it.

Invariants, those of records.py (C), view.py (V), plan.py (D), cell.py (B), and:
  G1  the epoch that a node reports only grows, and its ring is what was chosen for that epoch;
  G2  a write expects the version it was made from, and carries a fence that is at least that
      version's: a registrar whose lease is over cannot overwrite what a later one wrote;
  G3  while nothing changes nobody asks Nexus anything but the lease's renewals and the watches';
  G4  a node that was stopped acts on nothing that fell due meanwhile (V1).
Sources: Burrows, "Chubby" (2006) for the sequencer; Thaler and Ravishankar (1998) for the ring.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from manifold.kernel.effects import Effect, Notify, SetTimer
from manifold.kernel.errors import ProtocolError
from manifold.kernel.membership.messages import Me, Member, MemberChanged, State
from manifold.kernel.nexus.ask import Ask
from manifold.kernel.nexus.messages import Acquire, Answer, Changed, Operate, Request, Resign, Watch
from manifold.kernel.registry import plan
from manifold.kernel.registry.cell import Cell
from manifold.kernel.registry.messages import (
    ALIASES_KEY,
    REGISTRAR_KEY,
    RINGS_KEY,
    AliasTaken,
    Event,
    Fence,
    Forgot,
    RegistryFull,
    RingChanged,
    Timing,
    Unreadable,
)
from manifold.kernel.registry.placing import order
from manifold.kernel.registry.records import (
    Aliases,
    Rings,
    decode_aliases,
    decode_rings,
    encode_aliases,
    encode_rings,
)
from manifold.kernel.registry.view import View
from manifold.vm.kid import Kid

CONTENDERS_MAX = 5  # in line for the lease: more would only poll, where the voters are down
BACKOFF_DOUBLINGS_MAX = 4
PLACED_MAX = 4096  # answers of `place` remembered, at some 300 B: 1.2 MB
FORGETTING_MAX = 64
LATE_PART = 0.5  # of `settle_ms`: a timer later than that was not served, we were stopped
STRIDE_PART = 0.1  # of `retire_ms`: one wait is not longer, so that little is lost by one stop
HELD_PART = 0.8  # of a lease: Nexus relies on it no longer
NONCE_BITS = 30
_RINGS_TOKEN, _ALIASES_TOKEN, _FIRST_TOKEN = 1, 2, 16
_NEVER_MS = float("inf")


class Registry:
    """See the module."""

    def __init__(self, me: Me, random: Random, timing: Timing | None = None) -> None:
        self.me = me
        self.timing = timing or Timing()
        self.view = View()
        self._random = random
        nothing, nobody = Rings(), Aliases()
        self._rings = Cell(RINGS_KEY, nothing, nothing, encode_rings, decode_rings)
        self._aliases = Cell(ALIASES_KEY, nobody, nobody, encode_aliases, decode_aliases)
        self._shown = nothing  # the latest epoch; G1
        self._alias_of: dict[Kid, str] = {}
        self._placed: dict[tuple[str, int, str], tuple[Kid, ...]] = {}
        self._rival: tuple[str, Kid] | None = None
        self._watching: dict[int, float] = {}  # tokens, and when to ask again
        self._held: Fence | None = None
        self._lease_token = 0
        self._lease_tries = 0
        self._contend_ms = float("-inf")
        self._overdue_ms: float | None = None  # since when there is something to do
        self._rested_ms: float | None = None
        self._forgetting: dict[Kid, float] = {}
        self._leaving = False
        self._told_full = False
        self._name = f"r.{me.kid[2:18]}.{me.boot}.{random.getrandbits(NONCE_BITS):x}"
        self._token = _FIRST_TOKEN
        self._look_ms = _NEVER_MS
        self._armed_ms = _NEVER_MS
        self._last_ms = 0.0
        self._running = False
        self._out: list[Effect] = []

    # -- events -----------------------------------------------------------------------------------

    def start(self, now_ms: float) -> list[Effect]:
        assert not self._running, "a machine starts once"
        self._running = True
        self._last_ms = now_ms
        me = self.me
        myself = Member(me.kid, me.boot, 0, State.ALIVE, me.meta, now_ms, 0.0)
        self.view.changed(myself, now_ms)
        return self._close()

    def nexus_known(self, now_ms: float) -> list[Effect]:
        """There are voters: watch the registers. Further calls do nothing."""
        self._enter(now_ms)
        if not self._watching:
            self._watching = dict.fromkeys((_RINGS_TOKEN, _ALIASES_TOKEN), now_ms)
            self._watch(now_ms)
        return self._close()

    def member_changed(self, change: MemberChanged, now_ms: float) -> list[Effect]:
        self._enter(now_ms)
        if change.member.kid != self.me.kid:
            self.view.changed(change.member, now_ms)
            self._soon(now_ms + self.timing.look_ms)
        return self._close()

    def answered(
        self, token: int, message: Answer | Changed | object, now_ms: float
    ) -> list[Effect]:
        self._enter(now_ms)
        match message:
            case Changed(version=version, data=data) if token == _RINGS_TOKEN:
                self._told(self._rings, version, data, now_ms)
            case Changed(version=version, data=data) if token == _ALIASES_TOKEN:
                self._told(self._aliases, version, data, now_ms)
            case Answer() if token in self._watching:  # there were too many watches
                self._watching[token] = now_ms + self.timing.retry_most_ms
                self._soon(self._watching[token])
            case Answer() if token == self._lease_token:
                self._acquired(message, now_ms)
            case Answer() if token == self._rings.token:
                self._written(self._rings, message, now_ms)
            case Answer() if token == self._aliases.token:
                self._written(self._aliases, message, now_ms)
            case _:
                pass  # of a Resign
        return self._close()

    def lease_lost(self, fence: Fence, now_ms: float) -> list[Effect]:
        """Nexus told `LeaseLost` of `cluster/registrar`. A hint: G2 does not depend on it."""
        self._enter(now_ms)
        if self._held == fence:
            self._held = None
            self._soon(now_ms + self.timing.look_ms)
        return self._close()

    def forget(self, kid: Kid, now_ms: float) -> list[Effect]:
        """Take a node that will not come back out of ring and aliases; `Forgot` tells how it went.

        Any node does that, without the lease; the fence that is there stays.
        """
        self._enter(now_ms)
        if kid not in self._forgetting and len(self._forgetting) >= FORGETTING_MAX:
            self._notify(Forgot(kid, False, "Too many are being forgotten: try again later."))
        else:
            self._forgetting[kid] = now_ms + self.timing.forget_ms
            self._look(now_ms)
        return self._close()

    def leave(self, now_ms: float) -> list[Effect]:
        """This node leaves in good order: another one may be registrar at once."""
        self._enter(now_ms)
        self._leaving = True
        self._resign()
        return self._close()

    def tick(self, now_ms: float) -> list[Effect]:
        self._enter(now_ms)
        if now_ms >= self._look_ms:
            self._look_ms = _NEVER_MS
            self._watch(now_ms)
            self._look(now_ms)
        return self._close(ticked=True)

    # -- what others read -------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """0: nothing is known yet."""
        return self._shown.epoch

    @property
    def rings(self) -> Rings:
        """The whole of the latest epoch that is known here; `rings.fence[1]` wrote it."""
        return self._shown

    @property
    def registrar(self) -> bool:
        """Whether this node believes to hold the lease."""
        return self._held is not None

    def ring(self, node_class: str = "") -> tuple[Kid, ...]:
        """The members, by KID: all, those of a class, or `gpu`."""
        return self._shown.ring(node_class)

    def place(self, key: str, replicas: int, node_class: str = "") -> tuple[Kid, ...]:
        """The members that `key` belongs to, the first one first; as many as there are."""
        placed = self._placed.get((key, replicas, node_class))
        if placed is None:
            members = self._shown.members
            weights = [(kid, members[kid].weight) for kid in self.ring(node_class)]
            placed = tuple(order(key, weights)[:replicas])
            if len(self._placed) >= PLACED_MAX:
                del self._placed[next(iter(self._placed))]
            self._placed[(key, replicas, node_class)] = placed
        return placed

    def alias_of(self, kid: Kid) -> str | None:
        return self._alias_of.get(kid)

    def kid_of(self, alias: str) -> Kid | None:
        owner = self._aliases.value.owners.get(alias)
        return owner.kid if owner is not None else None

    # -- the registers ----------------------------------------------------------------------------

    def _watch(self, now_ms: float) -> None:
        for token, cell in ((_RINGS_TOKEN, self._rings), (_ALIASES_TOKEN, self._aliases)):
            at_ms = self._watching.get(token, _NEVER_MS)
            if now_ms >= at_ms:
                self._watching[token] = _NEVER_MS
                self._ask(token, Watch(cell.key))
            elif at_ms != _NEVER_MS:
                self._soon(at_ms)

    def _told(
        self, cell: Cell[Rings] | Cell[Aliases], version: int, data: object, now_ms: float
    ) -> None:
        try:
            if not cell.told(version, data):
                return
        except ProtocolError as fault:
            self._notify(Unreadable(cell.key, str(fault)))
            return
        self._overdue_ms = None  # somebody does what there is to do
        self._lease_tries = 0
        self._show(cell.value, now_ms)
        self._look(now_ms)

    def _show(self, value: Rings | Aliases, now_ms: float) -> None:
        """A value that was chosen: take it over for those who read."""
        if isinstance(value, Aliases):
            owners = self._aliases.value.owners  # a later one may have been told meanwhile
            self._alias_of = {owner.kid: alias for alias, owner in owners.items()}
            self._find_rival()
        elif value.epoch > self._shown.epoch:  # G1
            before, self._shown = self._shown.members, value
            self._placed.clear()
            joined = tuple(kid for kid, kind in value.members.items() if before.get(kid) != kind)
            left = tuple(kid for kid, kind in before.items() if value.members.get(kid) != kind)
            self._notify(RingChanged(value.epoch, joined, left))
        for kid in (*self._rings.value.members, *self._alias_of):
            self.view.expect(kid, now_ms)
        if self._fenced(value):
            self._resign()

    def _find_rival(self) -> None:
        owner = self._aliases.value.owners.get(self.me.alias)
        rival = None
        if owner is not None and owner.kid != self.me.kid:
            rival = (self.me.alias, owner.kid)
        if rival is not None and rival != self._rival:
            self._notify(AliasTaken(*rival))
        self._rival = rival

    def _submit(self, due: Sequence[plan.Step], now_ms: float) -> None:
        """Do the steps of both registers that are not being written already."""
        for cell in (self._rings, self._aliases):
            if not cell.writable:
                continue  # the answer, or the watch, looks again
            if now_ms < cell.retry_ms:
                self._soon(cell.retry_ms)
                continue
            assert not self._fenced(cell.value), "G2"
            self._write(cell, due, self._held if self._held is not None else cell.value.fence)

    def _write(
        self, cell: Cell[Rings] | Cell[Aliases], due: Sequence[plan.Step], fence: Fence
    ) -> None:
        token = self._next_token()
        if isinstance(cell.value, Rings):
            epoch = max(cell.value.epoch, self.epoch) + 1
            rings = plan.rings_after(cell.value, due, self.view, epoch, fence)
            if rings is cell.value:
                return
            change = self._rings.write(rings, token)
        else:
            aliases = plan.aliases_after(cell.value, due, self.epoch, fence)
            if aliases is cell.value:
                return
            change = self._aliases.write(aliases, token)
        op = f"{self._name}.{token}"
        self._ask(token, Operate(op, cell.key, change, self.timing.operate_ms))

    def _written(self, cell: Cell[Rings] | Cell[Aliases], answer: Answer, now_ms: float) -> None:
        cell.token = 0
        if answer.status == "ok":
            self._show(cell.written(), now_ms)
            self._look(now_ms)
        elif answer.status == "no":
            self._told(cell, answer.version, answer.data, now_ms)
            self._soon(now_ms + self.timing.look_ms)
        else:
            # Not done, or nobody knows: what was read is still what a write has to expect.
            cell.tries += 1
            wait_ms = self.timing.retry_ms * 2 ** min(cell.tries - 1, 2 * BACKOFF_DOUBLINGS_MAX)
            jitter = 0.5 + self._random.random()
            cell.retry_ms = now_ms + min(wait_ms, self.timing.retry_most_ms) * jitter
            self._soon(cell.retry_ms)

    # -- what there is to do ----------------------------------------------------------------------

    def _look(self, now_ms: float) -> None:
        """Compare, and act if it is time and our turn."""
        ready = self._rings.sound and self._aliases.sound
        self._end_forgetting(ready, now_ms)
        if not ready:
            return
        rings, aliases = self._rings.value, self._aliases.value
        keep = {**dict.fromkeys(rings.members), **self._alias_of}
        self.view.prune(keep, now_ms - self.timing.retire_ms)
        found = plan.steps(rings, aliases, self.view, self._forgetting, self.timing)
        at_ms = plan.when(found, now_ms, self.timing)
        if found:  # there is a timer as long as somebody waits: it shows that we were stopped
            stride_ms = max(self.timing.look_ms, STRIDE_PART * self.timing.retire_ms)
            self._soon(now_ms + stride_ms)
        if at_ms > now_ms:
            self._overdue_ms = None
            if found:
                self._soon(at_ms)
            self._rest(now_ms)
            return
        self._rested_ms = None
        due = [step for step in found if step.at_ms <= now_ms]
        if self._held is None:
            at_once = [step for step in due if step.at_ms == plan.AT_ONCE_MS]
            if len(at_once) < len(due):
                self._contend(now_ms)
            due = at_once
        if due:
            self._submit(due, now_ms)

    def _end_forgetting(self, ready: bool, now_ms: float) -> None:
        for kid, until_ms in list(self._forgetting.items()):
            seen = self.view.nodes.get(kid)
            why = ""
            if seen is not None and seen.alive:
                why = "It is alive: stop it first."
            elif ready and kid not in self._rings.value.members and kid not in self._alias_of:
                pass
            elif now_ms >= until_ms:
                why = "The voters did not answer in time: try again when a majority is up."
            else:
                self._soon(until_ms)
                continue
            del self._forgetting[kid]
            self._notify(Forgot(kid, not why, why))

    # -- the lease --------------------------------------------------------------------------------

    def _contend(self, now_ms: float) -> None:
        """There is something to do and we may not: ask for the lease, if it is our turn."""
        if self._overdue_ms is None:
            self._overdue_ms = now_ms
        if self._lease_token or self._leaving:
            return
        line = order(REGISTRAR_KEY, [(kid, 0) for kid in self.view.alive()])[:CONTENDERS_MAX]
        if self.me.kid not in line:
            return
        turn_ms = self._overdue_ms + line.index(self.me.kid) * self.timing.patience_ms
        at_ms = max(turn_ms, self._contend_ms)
        if now_ms < at_ms:
            self._soon(at_ms)
            return
        self._lease_token = self._next_token()
        timing = self.timing
        self._ask(
            self._lease_token,
            Acquire(REGISTRAR_KEY, self.me.kid, timing.lease_ms, timing.acquire_ms),
        )

    def _acquired(self, answer: Answer, now_ms: float) -> None:
        self._lease_token = 0
        if answer.status == "ok" and answer.fence is not None:
            self._held, self._lease_tries = answer.fence, 0
            late = self._fenced(self._rings.value) or self._fenced(self._aliases.value)
            if self._leaving or late:
                self._resign()
        else:
            doublings = min(self._lease_tries, BACKOFF_DOUBLINGS_MAX)
            self._lease_tries += 1
            wait_ms = self.timing.patience_ms * 2**doublings
            self._contend_ms = now_ms + wait_ms * (0.5 + self._random.random())
        self._look(now_ms)

    def _fenced(self, value: Rings | Aliases) -> bool:
        """Whether a later registrar than this one has written it (G2)."""
        return self._held is not None and value.fence > self._held

    def _rest(self, now_ms: float) -> None:
        """Nothing to do: tell once if that is for want of room; give the lease back in time."""
        if self._held is None:
            return
        if not self._told_full and plan.full(self._rings.value, self._aliases.value, self.view):
            self._told_full = True
            members, owners = self._rings.value.members, self._aliases.value.owners
            self._notify(RegistryFull(len(members), len(owners)))
        if self._rested_ms is None:
            self._rested_ms = now_ms
        until_ms = self._rested_ms + self.timing.idle_ms
        if now_ms >= until_ms:
            self._resign()
        else:
            self._soon(until_ms)

    def _resign(self) -> None:
        if self._held is not None:
            self._held = None
            self._ask(self._next_token(), Resign(REGISTRAR_KEY, self.me.kid))

    # -- time and effects -------------------------------------------------------------------------

    def _enter(self, now_ms: float) -> None:
        last_ms, self._last_ms = self._last_ms, now_ms
        if now_ms - self._armed_ms <= LATE_PART * self.timing.settle_ms:
            return
        # Stopped at some moment since the last event, or the clock jumped: none of it counts.
        self._armed_ms = now_ms
        self.view.late(now_ms - last_ms)  # G4
        self._overdue_ms = None
        if now_ms - last_ms >= HELD_PART * self.timing.lease_ms:
            self._resign()

    def _soon(self, at_ms: float) -> None:
        self._look_ms = min(self._look_ms, at_ms)

    def _next_token(self) -> int:
        self._token += 1
        return self._token

    def _ask(self, token: int, request: Request) -> None:
        self._out.append(Notify(Ask(token, request)))

    def _notify(self, event: Event) -> None:
        self._out.append(Notify(event))

    def _close(self, *, ticked: bool = False) -> list[Effect]:
        out, self._out = self._out, []
        if self._look_ms != _NEVER_MS and (ticked or self._look_ms != self._armed_ms):
            out.append(SetTimer(self._look_ms))
            self._armed_ms = self._look_ms
        elif self._look_ms == _NEVER_MS:
            self._armed_ms = _NEVER_MS
        return out
