"""The pure part of a node: membership, geode, scheduler, Nexus and registry put together.

Interface rules: one `Machine` for the driver (`node.py`) and for the simulator alike: an event in,
a list of effects out. Messages a subsystem sends to its own node never leave it: they are
delivered here, in order, or by the driver where they wait for a `Persist`. What membership notices
is passed to the others here, and so is what they `Ask` of Nexus and what it answers.
Invariants: H1 of all timers that subsystems ask for, the earliest is the one asked of the driver,
and no other is asked before it has come: a call that finds nothing due costs less than a new timer;
H2 a `Persist` holds back only what its own subsystem put after it in the same event, as a `Held`,
and no timer: an `AbortRun` that follows from news would else come after what later events ask for;
H3 who has left assigns nothing more: nobody would take it back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from random import Random
from types import MappingProxyType
from typing import Any, get_args

import msgspec

from manifold.kernel.config import Config
from manifold.kernel.effects import Effect, Held, Notify, Persist, Reply, Send, SetTimer
from manifold.kernel.geode.features import Static
from manifold.kernel.geode.geode import Geode
from manifold.kernel.membership import messages as membership_messages
from manifold.kernel.membership.messages import Me, MemberChanged, State
from manifold.kernel.membership.protocol import Membership
from manifold.kernel.nexus import messages as nexus_messages
from manifold.kernel.nexus.ask import Ask
from manifold.kernel.nexus.leases import LeaseLost
from manifold.kernel.nexus.messages import Changed, Unwatch
from manifold.kernel.nexus.protocol import Nexus
from manifold.kernel.nexus.rejoin import Rejoin, Step
from manifold.kernel.process.messages import Fault, GlobalCall, Result
from manifold.kernel.registry.messages import REGISTRAR_KEY
from manifold.kernel.registry.protocol import Registry
from manifold.kernel.scheduler import messages as scheduler_messages
from manifold.kernel.scheduler.globalcalls import GlobalCalls
from manifold.kernel.scheduler.protocol import Request, Scheduler
from manifold.vm.kid import Kid

_SUBSYSTEM: dict[type, str] = {
    kind: name
    for name, union in (
        ("membership", membership_messages.Message),
        ("scheduler", scheduler_messages.Message),
        ("nexus", nexus_messages.Message),
    )
    for kind in get_args(union)
}
REQUESTS: frozenset[type] = frozenset(get_args(Request))
NEXUS_REQUESTS: frozenset[type] = frozenset(get_args(nexus_messages.Request))
DELIVERIES_MAX = 100_000  # of one event to ourselves: more than that is a loop, a bug of ours
_NOTHING: Mapping[str, bytes] = MappingProxyType({})


class Core:
    """See the module.

    `durable`: the records of Nexus that were persisted before, by name. `rejoin`: how far this node
    is with joining the voters anew, "" where it has not lost its disk. `outbox`: the records of the
    scheduler's outbox, by name. `slots`: tasks at a time, 0 for one on each core.
    """

    def __init__(
        self,
        me: Me,
        config: Config,
        random: Random,
        *,
        incarnation: int,
        seeds: Sequence[str],
        known: Sequence[membership_messages.Update] = (),
        durable: Mapping[str, bytes] = _NOTHING,
        rejoin: Step = "",
        outbox: Mapping[str, bytes] = _NOTHING,
        slots: int = 0,
    ) -> None:
        self.me = me
        self._outbox = outbox
        self.membership = Membership(
            me, config.membership, random, incarnation=incarnation, seeds=seeds, known=known
        )
        self.geode = Geode(me.kid, config.geode, random)
        self.scheduler = Scheduler(
            me.kid, config.scheduler, self.geode, slots or me.cores, me.boot, me.memory_bytes
        )
        self.nexus = Nexus(me.kid, me.boot, durable, Random(random.getrandbits(64)))
        self.scheduler.owner.queue.reach.seen = self._sees_voters
        self._boots: dict[Kid, int] = {}
        self._asked: dict[int, tuple[str, Ask]] = {}  # what subsystems wait for, by handle
        self._handle = 0
        self.globals = GlobalCalls(me.kid, me.boot, self.scheduler.runner)
        self.rejoin = Rejoin(me.kid, self.nexus, rejoin)
        self.registry = Registry(me, Random(random.getrandbits(64)))
        self._voters_known = False
        self._left = False
        self._askers: dict[str, Callable[[int, Any, float], list[Effect]]] = {
            "scheduler": self._to_scheduler,
            "globals": self.globals.answered,
            "registry": self.registry.answered,
            "rejoin": self.rejoin.answered,
        }
        self._ticks = {
            "membership": self.membership.tick,
            "scheduler": self._tick_scheduler,
            "nexus": self.nexus.tick,
            "globals": self.globals.tick,
            "registry": self.registry.tick,
            "rejoin": self.rejoin.tick,
        }
        self._due = dict.fromkeys(self._ticks, float("inf"))
        self._armed_ms = float("inf")  # the driver will call then

    # The simulator's mutants put another scheduler's parts in: so both are looked up each time.

    def _to_scheduler(self, token: int, message: Any, now_ms: float) -> list[Effect]:
        return self.scheduler.answered(token, message, now_ms)

    def _tick_scheduler(self, now_ms: float) -> list[Effect]:
        return self.scheduler.tick(now_ms)

    def relabel(self, labels: tuple[str, ...], now_ms: float) -> list[Effect]:
        """This node has other labels from now on."""
        self.me = replace(self.me, labels=labels)
        effects = self.membership.relabel(labels, now_ms)
        me = self.me
        self.geode.node_up(me.kid, me.alias, me.node_class, _static(me.meta), now_ms)
        return self._close("membership", effects, now_ms)

    # -- events -------------------------------------------------------------------------------

    def start(self, now_ms: float) -> list[Effect]:
        self.geode.node_up(
            self.me.kid, self.me.alias, self.me.node_class, _static(self.me.meta), now_ms
        )
        begun = [
            ("membership", self.membership.start(now_ms)),
            ("nexus", self.nexus.start(now_ms)),
            ("registry", self.registry.start(now_ms)),
            ("scheduler", self.scheduler.start(self._outbox, now_ms)),
        ]
        self._outbox = _NOTHING
        return self._deliver(begun, now_ms)

    def _sees_voters(self) -> bool:
        """Whether a majority of the voters is alive, as far as membership knows; or there are none
        that anybody knows of."""
        config = self.nexus.config
        if config is None:
            return True
        return config.quorum([kid for kid in config.kids() if self.geode.node(kid) is not None])

    def receive(self, source: Kid, message: Any, now_ms: float) -> list[Effect]:
        name, effects = self._route(source, message, now_ms)
        return self._close(name, effects, now_ms)

    def _route(self, source: Kid, message: Any, now_ms: float) -> tuple[str, list[Effect]]:
        match _SUBSYSTEM.get(type(message)):
            case "nexus":
                return "nexus", self.nexus.receive(source, message, now_ms)
            case "scheduler":
                return "scheduler", self.scheduler.receive(source, message, now_ms)
            case "membership":
                return "membership", self.membership.receive(source, message, now_ms)
            case _:
                return "scheduler", []

    def request(
        self, client: str, message: Request, now_ms: float
    ) -> tuple[msgspec.Struct, list[Effect]]:
        """Serve a client; raises `ManifoldError` to refuse."""
        answer, effects = self.scheduler.request(client, message, now_ms)
        return answer, self._close("scheduler", effects, now_ms)

    def consult(self, handle: int, message: Any, now_ms: float) -> list[Effect]:
        """A client asks Nexus; answered by `Reply(handle, …)`, where `handle` is above 0."""
        assert handle > 0, "the others are our own"
        return self._close("nexus", self.nexus.request(handle, message, now_ms), now_ms)

    def tick(self, now_ms: float) -> list[Effect]:
        lists: list[tuple[str, list[Effect]]] = []
        self._armed_ms = float("inf")
        for name, tick in self._ticks.items():
            if now_ms >= self._due[name]:
                self._due[name] = float("inf")
                lists.append((name, tick(now_ms)))
        return self._deliver(lists, now_ms)

    def process_ended(self, kid: Kid, boot: int, now_ms: float) -> list[Effect]:
        """The supervisor of this host saw that node's process end."""
        return self._close("membership", self.membership.process_ended(kid, boot, now_ms), now_ms)

    def loop_lag(self, lag_ms: float, now_ms: float) -> None:
        self.membership.loop_lag(lag_ms, now_ms)

    def drain(self, now_ms: float) -> list[Effect]:
        """Before `leave`: nothing more is taken on; see `drained`."""
        return self._close("scheduler", self.scheduler.drain(now_ms), now_ms)

    @property
    def drained(self) -> bool:
        return self.scheduler.drained

    def leave(self, now_ms: float) -> list[Effect]:
        self._left = True
        left = [
            ("registry", self.registry.leave(now_ms)),
            ("membership", self.membership.leave(now_ms)),
        ]
        return self._deliver(left, now_ms)

    def run_blocks(
        self,
        slot: int,
        run: int,
        first: int,
        results: Sequence[Result],
        gas: float,
        busy_ms: float,
        now_ms: float,
    ) -> list[Effect]:
        done = self.scheduler.run_blocks(slot, run, first, results, gas, busy_ms, now_ms)
        return self._close("scheduler", done, now_ms)

    def run_limited(self, slot: int, run: int, last: int, now_ms: float) -> list[Effect]:
        return self._close("scheduler", self.scheduler.run_limited(slot, run, last, now_ms), now_ms)

    def run_ended(self, slot: int, run: int, fault: Fault | None, now_ms: float) -> list[Effect]:
        return self._close("scheduler", self.scheduler.run_ended(slot, run, fault, now_ms), now_ms)

    def run_moved(self, slot: int, run: int, to: int, now_ms: float) -> list[Effect]:
        return self._close("scheduler", self.scheduler.run_moved(slot, run, to, now_ms), now_ms)

    def watcher_gone(self, handle: int, now_ms: float) -> list[Effect]:
        """Nobody waits for what `consult` was asked with this handle any more."""
        return self._close("nexus", self.nexus.client_gone(handle, now_ms), now_ms)

    def voter_stopped(self, why: str, now_ms: float) -> list[Effect]:
        """What Nexus persists is refused by the disk: this node votes no more."""
        return self._close("nexus", self.nexus.storage_failed(now_ms, why), now_ms)

    def global_call(self, slot: int, call: GlobalCall, now_ms: float) -> list[Effect]:
        """A worker's program asks for a global; answered by `Notify(GlobalAnswer(…))`."""
        return self._close("globals", self.globals.call(slot, call, now_ms), now_ms)

    def client_gone(self, client: str, now_ms: float) -> list[Effect]:
        return self._close("scheduler", self.scheduler.client_gone(client, now_ms), now_ms)

    def run_lost(self, slot: int, run: int, reason: str, now_ms: float) -> list[Effect]:
        return self._close("scheduler", self.scheduler.run_lost(slot, run, reason, now_ms), now_ms)

    # -- effects ------------------------------------------------------------------------------

    def _close(self, name: str, effects: list[Effect], now_ms: float) -> list[Effect]:
        return self._deliver([(name, effects)], now_ms)

    def _deliver(self, lists: list[tuple[str, list[Effect]]], now_ms: float) -> list[Effect]:
        """Carry out what concerns only this node; the rest is the driver's."""
        outward: list[Effect] = []
        queue = deque(lists)
        rounds = 0
        while queue:
            rounds += 1
            assert rounds < DELIVERIES_MAX, "subsystems keep sending to each other"
            owner, effects = queue.popleft()
            if self._left and owner == "scheduler":
                continue  # H3
            for at, effect in enumerate(effects):
                if isinstance(effect, Persist):
                    then: list[Effect] = []
                    for later in effects[at + 1 :]:
                        if isinstance(later, Send) or not self._inside(owner, later, queue, now_ms):
                            then.append(later)
                    outward.append(Held(effect, tuple(then)))  # H2
                    break
                if not self._inside(owner, effect, queue, now_ms):
                    outward.append(effect)
            if not self._voters_known and self.nexus.config is not None:
                self._voters_known = True
                queue.append(("scheduler", self.scheduler.nexus_known(now_ms)))
                queue.append(("registry", self.registry.nexus_known(now_ms)))
                queue.append(("rejoin", self.rejoin.nexus_known(now_ms)))
        due_ms = min(self._due.values())
        if due_ms < self._armed_ms:
            self._armed_ms = due_ms
            outward.append(SetTimer(due_ms))  # H1
        return outward

    def _inside(
        self, owner: str, effect: Effect, queue: deque[tuple[str, list[Effect]]], now_ms: float
    ) -> bool:
        """Carry out an effect that concerns only this node; False: it is (also) the driver's."""
        match effect:
            case SetTimer(at_ms=at_ms):
                self._due[owner] = at_ms
            case Send(to=to, message=message) if to == self.me.kid:
                queue.append(self._route(self.me.kid, message, now_ms))
            case Notify(event=MemberChanged() as change):
                queue.append(("registry", self.registry.member_changed(change, now_ms)))
                queue.extend(self._changed(change, now_ms))
                return False
            case Notify(event=LeaseLost(key=key, fence=fence)):
                if key == REGISTRAR_KEY:
                    queue.append(("registry", self.registry.lease_lost(fence, now_ms)))
            case Notify(event=Ask() as ask):
                queue.append(("nexus", self._ask(owner, ask, now_ms)))
            case Reply(request=handle, message=message) if handle < 0:
                queue.extend(self._answered(handle, message, now_ms))
            case _:
                return False
        return True

    # -- what subsystems ask of Nexus ---------------------------------------------------------

    def _ask(self, owner: str, ask: Ask, now_ms: float) -> list[Effect]:
        if isinstance(ask.request, Unwatch):
            for handle, (by, asked) in list(self._asked.items()):
                if by == owner and asked.token == ask.token:
                    del self._asked[handle]
                    return self.nexus.request(handle, ask.request, now_ms)
            return []
        self._handle -= 1
        self._asked[self._handle] = (owner, ask)
        return self.nexus.request(self._handle, ask.request, now_ms)

    def _answered(self, handle: int, message: Any, now_ms: float) -> list[tuple[str, list[Effect]]]:
        owner, ask = self._asked.get(handle, ("", None))
        if ask is None:
            return []
        if not isinstance(message, Changed):
            del self._asked[handle]
        answered = self._askers[owner]
        return [(owner, answered(ask.token, message, now_ms))]

    def _changed(self, change: MemberChanged, now_ms: float) -> list[tuple[str, list[Effect]]]:
        """A member joined, restarted or died: the others want to know."""
        member = change.member
        if member.kid == self.me.kid:
            return []
        if member.state in (State.DEAD, State.LEFT):
            self._boots.pop(member.kid, None)
            return self._down(member.kid, member.boot, now_ms)
        lists: list[tuple[str, list[Effect]]] = []
        known = self._boots.get(member.kid)
        if known is not None and known != member.boot:  # it died and came back between two news
            lists += self._down(member.kid, known, now_ms)
        if known != member.boot and member.meta.alias:
            self._boots[member.kid] = member.boot
            meta = member.meta
            self.geode.node_up(member.kid, meta.alias, meta.node_class, _static(meta), now_ms)
            lists.append(("scheduler", self.scheduler.node_up(member.kid, now_ms)))
            lists.append(("nexus", self.nexus.node_up(member.kid, now_ms)))
        elif member.meta.alias:  # perhaps it has other labels
            meta = member.meta
            self.geode.node_up(member.kid, meta.alias, meta.node_class, _static(meta), now_ms)
        return lists

    def _down(self, kid: Kid, boot: int, now_ms: float) -> list[tuple[str, list[Effect]]]:
        self.geode.node_down(kid)
        return [
            ("scheduler", self.scheduler.node_down(kid, boot, now_ms)),
            ("nexus", self.nexus.node_down(kid, now_ms)),
        ]


def _static(meta: membership_messages.Meta) -> Static:
    return Static(
        cores=meta.cores,
        compute=meta.compute,
        memory_bytes=meta.memory_bytes,
        bandwidth_bps=meta.bandwidth_bps,
        latency_ms=meta.latency_ms,
        gpu=meta.gpu,
        arch=meta.arch,
        labels=meta.labels,
    )
