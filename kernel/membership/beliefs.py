"""What one node believes of the others, what it says of itself, and the news it passes on.

The first half of the machine in protocol.py, which adds time: probes, exchanges, verdicts. Here
lie the merge of beliefs (table.py), the timers of suspicions, refutation, and gossip.

Invariants: M1, M3 and M6 of protocol.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

import msgspec

from manifold.kernel.config import MembershipConfig
from manifold.kernel.effects import Effect, Notify, Send
from manifold.kernel.membership import suspicion as timers
from manifold.kernel.membership.dissemination import News, retransmits
from manifold.kernel.membership.joining import Seeds
from manifold.kernel.membership.messages import (
    COUNTER_MAX,
    PACKET_UPDATES_BYTES,
    Gossip,
    Me,
    Member,
    MemberChanged,
    Refuted,
    State,
    Superseded,
    Update,
)
from manifold.kernel.membership.probing import Health, Ring
from manifold.kernel.membership.suspicion import Suspicion
from manifold.kernel.membership.table import Record, Table
from manifold.vm.kid import Kid

FORCED_BYTES = 100  # an accusation without description: 36 + 2 * 9 + 1 + 36 + 4, rounded up
LIMITER_MAX = 1024  # nodes remembered by "not again so soon"; then all are forgotten
ENDED_ESCALATIONS = 8  # times a report is repeated against later incarnations: then it was wrong
FRESH_PART = 0.25  # fresh news may leave this part of the gossip interval after the last round
JITTER_PART = 0.125  # and is spread over this part of it


class Beliefs:
    """The state that merging needs; `_out` collects the effects of the call under way."""

    def __init__(
        self,
        me: Me,
        config: MembershipConfig,
        random: Random,
        *,
        incarnation: int,
        seeds: Sequence[str],
    ) -> None:
        self.me = me
        self.config = config
        self.health = Health()
        self.state = State.ALIVE
        self.incarnation = incarnation + 1  # above all that a former process may have told
        self._meta = me.meta
        self._random = random
        self._table = Table()
        self._ring = Ring()
        self._news = News()
        self._seeds = Seeds(seeds, me.addresses)
        self._suspicions: dict[Kid, Suspicion] = {}
        self._limiter: dict[tuple[str, str], float] = {}
        self._ended: dict[Kid, tuple[int, int]] = {}  # kid -> (boot, escalations left)
        self._running = False
        self._superseded = False
        self._since_ms = 0.0
        self._gossiped_ms = -math.inf
        self._gossip_due_ms = math.inf
        self._members: tuple[Member, ...] | None = None
        self._out: list[Effect] = []

    def _nodes(self) -> int:
        return self._table.live + 1

    def _seldom(self, what: str, kid: str, now_ms: float) -> bool:
        """At most once per probe interval for each (what, kid)."""
        key = (what, kid)
        if now_ms - self._limiter.get(key, -math.inf) < self.config.probe_ms:
            return False
        if len(self._limiter) >= LIMITER_MAX:
            self._limiter.clear()
        self._limiter[key] = now_ms
        assert len(self._limiter) <= LIMITER_MAX, "M6"
        return True

    def _myself(self) -> Update:
        meta = self._meta if self.state == State.ALIVE else None
        return Update(self.me.kid, self.me.boot, self.incarnation, self.state, "", meta)

    def _apply_all(
        self,
        updates: tuple[Update, ...],
        now_ms: float,
        *,
        source: Kid | None = None,
        quiet: bool = False,
    ) -> None:
        """Merge what `source` told; where it is None, it gets our whole table anyway."""
        for update in updates:
            self._apply(update, now_ms, quiet=quiet)
            if source is not None and update.state in (State.SUSPECT, State.DEAD):
                self._correct(source, update, now_ms)

    def _correct(self, source: Kid, update: Update, now_ms: float) -> None:
        """Who still tells an accusation that was refuted has missed the refutation: tell it so."""
        if update.kid == self.me.kid:
            known, refuted = self._myself(), self.state == State.ALIVE
        else:
            record = self._table.get(update.kid)
            if record is None or record.meta is None:
                return
            known, refuted = record.update(), record.state == State.ALIVE
        later = (known.boot, known.incarnation) > (update.boot, update.incarnation)
        if refuted and later and self._seldom(f"correct {update.kid}", source, now_ms):
            self._out.append(Send(source, Gossip(self.me.boot, (known,))))

    def _apply(self, update: Update, now_ms: float, *, quiet: bool = False) -> None:
        """Merge one belief (M3), and pass on what was news."""
        if update.kid == self.me.kid:
            self._about_me(update, now_ms)
            return
        row = self._table.get(update.kid)
        if row is not None and row.meta is not None and row.state != State.SUSPECT:
            same = row.incarnation == update.incarnation and row.boot == update.boot
            if same and row.state == update.state:
                return  # The common case: heard before.
        meta = row.meta if row is not None else None
        shown = meta is not None
        boot = row.boot if row is not None else -1
        record, previous, grew = self._table.merge(update, now_ms)
        if record is None:
            return
        if grew:
            self._grown(record, update.by, now_ms, quiet=quiet)
        elif update.state == State.SUSPECT and record.state == State.SUSPECT:
            self._confirm(record, update, now_ms)
        elif record.state > update.state and record.state != State.ALIVE:
            # Who tells this does not know of the accusation: tell it again (memberlist#311).
            self._retell(record.update(self._accuser(record)), now_ms)
        before = previous if shown else None
        told = (boot, before, meta)  # to the rest of the node
        if record.meta is not None and told != (record.boot, record.state, record.meta):
            self._members = None
            self._out.append(Notify(MemberChanged(record.member(), before)))
        elif grew:
            self._members = None
        if self._ended:
            self._repeat_end(record, now_ms)

    def _grown(self, record: Record, by: str, now_ms: float, *, quiet: bool) -> None:
        self._suspicions.pop(record.kid, None)
        if record.state == State.SUSPECT:
            nodes = self._nodes()
            due_ms = now_ms + timers.timeout_ms(self.config, nodes, 0)
            accused = Suspicion(now_ms, due_ms)
            accused.confirm(by or "unknown", self.config, nodes)
            self._suspicions[record.kid] = accused
        if record.live:
            self._ring.add(record.kid, self._random)
        elif self._table.live == 0:
            self._seeds.start(now_ms + self.config.probe_ms * self._random.random())
        if not quiet:
            self._tell(record.update(by), now_ms)
        elif len(self._news) and self._gossip_due_ms == math.inf:
            self._gossip_due_ms = now_ms  # News had waited for somebody to tell it to.

    def _confirm(self, record: Record, update: Update, now_ms: float) -> None:
        suspicion = self._suspicions.get(record.kid)
        same = (update.boot, update.incarnation) == (record.boot, record.incarnation)
        if suspicion is None or not same:
            return
        if suspicion.confirm(update.by, self.config, self._nodes()):
            self._tell(record.update(update.by), now_ms)

    def _accuser(self, record: Record) -> str:
        suspicion = self._suspicions.get(record.kid)
        return suspicion.accusers[0] if suspicion and suspicion.accusers[0] != "unknown" else ""

    def _repeat_end(self, record: Record, now_ms: float) -> None:
        """A process whose end we saw may have refuted just before: its end still holds."""
        boot, left = self._ended.get(record.kid, (-1, 0))
        if record.boot == boot and record.live and left > 0:
            self._ended[record.kid] = (boot, left - 1)
            dead = Update(record.kid, boot, record.incarnation, State.DEAD, self.me.kid)
            self._apply(dead, now_ms)

    def _about_me(self, update: Update, now_ms: float) -> None:
        """Refute what is said of us, unless it is true."""
        me = self.me
        if update.boot > me.boot:
            if not self._superseded:
                self._superseded = True
                self._running = False
                self._out.append(Notify(Superseded(update.boot)))
            return
        if self.state != State.ALIVE:
            return
        current = update.boot == me.boot and update.incarnation >= self.incarnation
        accused = current and update.state != State.ALIVE
        if accused or (current and update.incarnation > self.incarnation):
            before = self.incarnation
            self.incarnation = min(COUNTER_MAX, update.incarnation + 1)
            assert self.incarnation > before, "M1"
            self._members = None
            if accused:
                self.health.add(1)
                self._out.append(Notify(Refuted(self.incarnation, update.by)))
            self._tell(self._myself(), now_ms)
        elif update.state != State.ALIVE or update.boot < me.boot:
            self._retell(self._myself(), now_ms)

    # Gossip.

    def _tell(self, update: Update, now_ms: float) -> None:
        """Queue news; a round leaves soon, spread a little so that not all speak at once."""
        self._news.put(update)
        gossip_ms = self.config.gossip_ms
        soon_ms = now_ms + gossip_ms * JITTER_PART * self._random.random()
        due_ms = max(soon_ms, self._gossiped_ms + gossip_ms * FRESH_PART)
        self._gossip_due_ms = min(self._gossip_due_ms, due_ms)

    def _retell(self, update: Update, now_ms: float) -> None:
        if update.kid not in self._news and self._seldom("retell", update.kid, now_ms):
            self._tell(update, now_ms)

    def _gossip_step(self, now_ms: float) -> None:
        if now_ms < self._gossip_due_ms:
            return
        self._gossip_due_ms = math.inf
        dead_since_ms = now_ms - self.config.dead_gossip_ms
        targets = self._table.draw(
            self._random, self.config.gossip_nodes, dead_since_ms=dead_since_ms
        )
        if not targets or not len(self._news):
            return  # Nobody to tell: it waits for the next news, which the next node will be.
        self._gossiped_ms = now_ms
        news = self._take(len(targets))
        for record in targets:
            about = self._about(record, record.boot)
            self._out.append(Send(record.kid, Gossip(self.me.boot, (*about, *news))))
        if len(self._news):
            self._gossip_due_ms = now_ms + self.config.gossip_ms

    def _take(self, copies: int) -> tuple[Update, ...]:
        limit = retransmits(self.config.retransmit_factor, self._nodes())
        return self._news.take(PACKET_UPDATES_BYTES - FORCED_BYTES, copies, limit)

    def _packet(self, kid: Kid, boot: int) -> tuple[Update, ...]:
        """What to piggy-back on a message to `kid`: first of all what is held against it."""
        record = self._table.get(kid)
        about = self._about(record, boot) if record is not None else ()
        return (*about, *self._take(1)) if len(self._news) else about

    def _about(self, record: Record, boot: int) -> tuple[Update, ...]:
        """Lifeguard's buddy system, widened: who is held for suspect, dead or old hears so."""
        if record.boot > boot or record.state in (State.SUSPECT, State.DEAD):
            return (msgspec.structs.replace(record.update(self._accuser(record)), meta=None),)
        return ()
