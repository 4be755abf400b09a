"""The pure part of a node: membership, geode and scheduler put together.

Interface rules: one `Machine` for the driver (`node.py`) and for the simulator alike: an event in,
a list of effects out. Messages a subsystem sends to its own node never leave it: they are
delivered here, in order. What membership notices is passed to geode and the scheduler here.
Invariants: H1 of all timers that subsystems ask for, the earliest is the one asked of the driver;
H2 a `Persist` holds back only what its own subsystem put after it: a timer, or an `AbortRun` that
follows from news, would else come after what later events ask for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from random import Random
from typing import Any, get_args

import msgspec

from manifold.kernel.config import Config
from manifold.kernel.effects import Effect, Notify, Persist, Send, SetTimer
from manifold.kernel.geode.features import Static
from manifold.kernel.geode.geode import Geode
from manifold.kernel.membership import messages as membership_messages
from manifold.kernel.membership.messages import Me, MemberChanged, State
from manifold.kernel.membership.protocol import Membership
from manifold.kernel.process.messages import Fault, Result
from manifold.kernel.scheduler import messages as scheduler_messages
from manifold.kernel.scheduler.protocol import Request, Scheduler
from manifold.vm.kid import Kid

_MEMBERSHIP = get_args(membership_messages.Message)
_SCHEDULER = get_args(scheduler_messages.Message)
REQUESTS: tuple[type, ...] = get_args(Request)
DELIVERIES_MAX = 100_000  # of one event to ourselves: more than that is a loop, a bug of ours


class Core:
    """See the module."""

    def __init__(
        self,
        me: Me,
        config: Config,
        random: Random,
        *,
        incarnation: int,
        seeds: Sequence[str],
        known: Sequence[membership_messages.Update] = (),
    ) -> None:
        self.me = me
        self.membership = Membership(
            me, config.membership, random, incarnation=incarnation, seeds=seeds, known=known
        )
        self.geode = Geode(me.kid, config.geode, random)
        self.scheduler = Scheduler(
            me.kid, config.scheduler, self.geode, me.cores, me.boot, me.memory_bytes
        )
        self._boots: dict[Kid, int] = {}
        self._due = {"membership": float("inf"), "scheduler": float("inf")}

    # -- events -------------------------------------------------------------------------------

    def start(self, now_ms: float) -> list[Effect]:
        self.geode.node_up(
            self.me.kid, self.me.alias, self.me.node_class, _static(self.me.meta), now_ms
        )
        return self._close("membership", self.membership.start(now_ms), now_ms)

    def receive(self, source: Kid, message: Any, now_ms: float) -> list[Effect]:
        name, effects = self._route(source, message, now_ms)
        return self._close(name, effects, now_ms)

    def _route(self, source: Kid, message: Any, now_ms: float) -> tuple[str, list[Effect]]:
        if isinstance(message, _MEMBERSHIP):
            return "membership", self.membership.receive(source, message, now_ms)
        if isinstance(message, _SCHEDULER):
            return "scheduler", self.scheduler.receive(source, message, now_ms)
        return "scheduler", []

    def request(
        self, client: str, message: Request, now_ms: float
    ) -> tuple[msgspec.Struct, list[Effect]]:
        """Serve a client; raises `ManifoldError` to refuse."""
        answer, effects = self.scheduler.request(client, message, now_ms)
        return answer, self._close("scheduler", effects, now_ms)

    def tick(self, now_ms: float) -> list[Effect]:
        effects: list[tuple[str, Effect]] = []
        if now_ms >= self._due["membership"]:
            self._due["membership"] = float("inf")
            effects += _by("membership", self.membership.tick(now_ms))
        if now_ms >= self._due["scheduler"]:
            self._due["scheduler"] = float("inf")
            effects += _by("scheduler", self.scheduler.tick(now_ms))
        return self._deliver(effects, now_ms)

    def process_ended(self, kid: Kid, boot: int, now_ms: float) -> list[Effect]:
        """The supervisor of this host saw that node's process end."""
        return self._close("membership", self.membership.process_ended(kid, boot, now_ms), now_ms)

    def loop_lag(self, lag_ms: float, now_ms: float) -> None:
        self.membership.loop_lag(lag_ms, now_ms)

    def leave(self, now_ms: float) -> list[Effect]:
        return self._close("membership", self.membership.leave(now_ms), now_ms)

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

    def client_gone(self, client: str, now_ms: float) -> list[Effect]:
        return self._close("scheduler", self.scheduler.client_gone(client, now_ms), now_ms)

    def run_lost(self, slot: int, run: int, reason: str, now_ms: float) -> list[Effect]:
        return self._close("scheduler", self.scheduler.run_lost(slot, run, reason, now_ms), now_ms)

    # -- effects ------------------------------------------------------------------------------

    def _close(self, name: str, effects: list[Effect], now_ms: float) -> list[Effect]:
        return self._deliver(_by(name, effects), now_ms)

    def _deliver(self, effects: list[tuple[str, Effect]], now_ms: float) -> list[Effect]:
        """Carry out what concerns only this node; the rest is the driver's."""
        outward: list[Effect] = []
        held: list[Effect] = []  # a Persist, and what depends on it
        persists = ""
        queue = deque(effects)
        rounds = 0
        while queue:
            rounds += 1
            assert rounds < DELIVERIES_MAX, "subsystems keep sending to each other"
            owner, effect = queue.popleft()
            match effect:
                case SetTimer(at_ms=at_ms):
                    self._due[owner] = at_ms
                case Send(to=to, message=message) if to == self.me.kid:
                    queue.extend(_by(*self._route(self.me.kid, message, now_ms)))
                case Notify(event=MemberChanged() as change):
                    outward.append(effect)
                    queue.extend(_by("scheduler", self._changed(change, now_ms)))
                case Persist():
                    persists = owner
                    held.append(effect)
                case _:
                    (held if owner == persists else outward).append(effect)  # H2
        due_ms = min(self._due.values())
        if due_ms != float("inf"):
            outward.append(SetTimer(due_ms))  # H1
        return outward + held

    def _changed(self, change: MemberChanged, now_ms: float) -> list[Effect]:
        """A member joined, restarted or died: geode and the scheduler want to know."""
        member = change.member
        if member.kid == self.me.kid:
            return []
        effects: list[Effect] = []
        if member.state in (State.DEAD, State.LEFT):
            self._boots.pop(member.kid, None)
            self.geode.node_down(member.kid)
            return self.scheduler.node_down(member.kid, member.boot, now_ms)
        known = self._boots.get(member.kid)
        if known is not None and known != member.boot:  # it died and came back between two news
            self.geode.node_down(member.kid)
            effects += self.scheduler.node_down(member.kid, known, now_ms)
        if known != member.boot and member.meta.alias:
            self._boots[member.kid] = member.boot
            meta = member.meta
            self.geode.node_up(member.kid, meta.alias, meta.node_class, _static(meta), now_ms)
            effects += self.scheduler.node_up(member.kid, now_ms)
        return effects


def _by(name: str, effects: list[Effect]) -> list[tuple[str, Effect]]:
    return [(name, effect) for effect in effects]


def _static(meta: membership_messages.Meta) -> Static:
    return Static(
        cores=meta.cores,
        compute=meta.compute,
        memory_bytes=meta.memory_bytes,
        bandwidth_bps=meta.bandwidth_bps,
        latency_ms=meta.latency_ms,
        gpu=meta.gpu,
        arch=meta.arch,
    )
