"""The scheduler of one node: owner of the jobs submitted here, runner of shards assigned here.

Interface rules: `request` answers clients (and raises `ManifoldError` to refuse), `receive` takes
what nodes say, the `run_…` events what workers did. Every call returns effects and
ends with the `SetTimer` that is due. Pure: see `owner.py`, `runner.py`, `ledger.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from manifold.kernel.config import SchedulerConfig
from manifold.kernel.effects import Effect, Send, SetTimer
from manifold.kernel.errors import NotFound
from manifold.kernel.geode.geode import Geode, unmet
from manifold.kernel.geode.routing import Action
from manifold.kernel.process.messages import Fault, Result
from manifold.kernel.scheduler.messages import (
    AssignShard,
    DropShard,
    FetchResult,
    KillJob,
    ListJobs,
    NeedProgram,
    Rejected,
    Report,
    ReportAck,
    Shrink,
    Shrunk,
    Stored,
    SubmitJob,
    WatchJob,
    WhyAnswer,
    WhyTask,
)
from manifold.kernel.scheduler.owner import TICK_MS, Owner
from manifold.kernel.scheduler.queueing import TICK_MS as QUEUE_TICK_MS
from manifold.kernel.scheduler.runner import Runner
from manifold.vm.kid import Kid

RUNNER_TICK_MS = 100.0  # half of the default progress interval
RETAIN_TICK_MS = 60_000.0
WHY_MAX = 256  # decisions in one answer

Request = SubmitJob | WatchJob | KillJob | FetchResult | ListJobs | WhyTask


class Scheduler:
    """See the module."""

    def __init__(
        self,
        me: Kid,
        config: SchedulerConfig,
        geode: Geode,
        slots: int,
        boot: int = 0,
        memory_bytes: int = 0,
    ) -> None:
        self.geode = geode
        self.owner = Owner(me, config, geode, boot)
        self.owner.shelf.memory_bytes = memory_bytes
        self.runner = Runner(me, config, slots)
        self._owner_due_ms = float("inf")
        self._runner_due_ms = float("inf")

    def start(self, outbox: Mapping[str, bytes], now_ms: float) -> list[Effect]:
        """`outbox`: what a former process of this node has left of it on the disk."""
        self.owner.queue.load(outbox, now_ms)
        return self._close([], now_ms)

    def request(
        self, client: str, message: Request, now_ms: float
    ) -> tuple[msgspec.Struct, list[Effect]]:
        """The answer to a client's request, and the effects of serving it."""
        if isinstance(message, WhyTask):
            return self._why(message.task), []
        if isinstance(message, SubmitJob):
            # Our own load is known now: it need not age like what others told us.
            self.owner.peers.load(self.owner.me, self.runner.load(), now_ms)
            answer, effects = self.owner.submit(client, message, now_ms)
        else:
            answer, effects = self.owner.request(client, message, now_ms)
        return answer, self._close(effects, now_ms)

    def receive(self, source: Kid, message: Any, now_ms: float) -> list[Effect]:
        match message:
            case Stored():
                mine = source == self.owner.me
                done = self.owner.queue.stored(message, now_ms) if mine else []
                return self._close(done, now_ms)
            case Report() | Shrunk() | Rejected() | NeedProgram():
                return self._close(self.owner.receive(source, message, now_ms), now_ms)
            case AssignShard() if self._misplaced(source, message):
                retry_ms = self.owner.config.backlog_ms
                identity = (message.job, message.shard, message.attempt)
                refused = Rejected(*identity, retry_ms)
                return self._close([Send(source, refused)], now_ms)
            case AssignShard() if self.geode.routes and not self.runner.holds(source, message):
                sent_on = self._sent_on(source, message, now_ms)
                effects = sent_on or self.runner.receive(source, message, now_ms)
                return self._close(effects, now_ms)
            case AssignShard() | Shrink() | DropShard() | ReportAck():
                return self._close(self.runner.receive(source, message, now_ms), now_ms)
            case _:
                return []  # an answer to a question nobody asks any more

    def _misplaced(self, owner: Kid, message: AssignShard) -> bool:
        """Whether its owner takes us for what we are not, or are not any more: its news is old."""
        own = self.geode.node(self.owner.me)
        wrong = own is not None and unmet(own, message.spec.demand) != ""
        return wrong and not self.runner.holds(owner, message)

    def _sent_on(self, owner: Kid, message: AssignShard, now_ms: float) -> list[Effect]:
        """Above `full_view` nodes: one greedy hop, where a link of ours finishes it sooner."""
        self.owner.peers.load(self.owner.me, self.runner.load(), now_ms)
        spec = message.spec
        wanted = msgspec.structs.replace(
            spec.demand, work_gas=message.work_gas, program=spec.program
        )
        path = (*message.path, self.owner.me)
        hop = self.geode.next_hop(wanted, now_ms, len(message.path), path)
        if hop.action is not Action.FORWARD:
            return []
        identity = (message.job, message.shard, message.attempt)
        return [Send(owner, Rejected(*identity, 0.0, hop.to))]

    def tick(self, now_ms: float) -> list[Effect]:
        effects: list[Effect] = []
        if now_ms >= self._owner_due_ms:
            self._owner_due_ms = float("inf")
            effects += self.owner.tick(now_ms)
        if now_ms >= self._runner_due_ms:
            self._runner_due_ms = float("inf")
            effects += self.runner.tick(now_ms)
        return self._close(effects, now_ms)

    def _close(self, effects: list[Effect], now_ms: float) -> list[Effect]:
        """Add what happened and the timer that is due."""
        if self.owner.events:
            effects += self.owner.take_events()
        keeper_due_ms = self.owner.keeper.due_ms
        if self.owner.jobs or keeper_due_ms <= now_ms:
            self._owner_due_ms = min(self._owner_due_ms, now_ms + TICK_MS, self.owner.wake_ms)
        elif keeper_due_ms != float("inf"):
            self._owner_due_ms = min(self._owner_due_ms, keeper_due_ms)
        if self.owner.queue.waiting:
            self._owner_due_ms = min(self._owner_due_ms, now_ms + QUEUE_TICK_MS)
        if self.owner.shelf.jobs:
            self._owner_due_ms = min(self._owner_due_ms, now_ms + RETAIN_TICK_MS)
        if self.runner.busy:
            self._runner_due_ms = min(self._runner_due_ms, now_ms + RUNNER_TICK_MS)
        due_ms = min(self._owner_due_ms, self._runner_due_ms)
        if due_ms != float("inf"):
            effects.append(SetTimer(due_ms))
        return effects

    # -- leaving ------------------------------------------------------------------------------

    def drain(self, now_ms: float) -> list[Effect]:
        """This node is to leave: run nothing more here, record what it owns."""
        effects = self.runner.drain()
        self.owner.keeper.hurry()
        self.owner.peers.load(self.owner.me, self.runner.load(), now_ms)
        return self._close([*effects, *self.owner.tick(now_ms)], now_ms)

    @property
    def drained(self) -> bool:
        """Whether nothing is lost when this node leaves now."""
        return not self.runner.held and self.owner.keeper.safe

    # -- Nexus --------------------------------------------------------------------------------

    def nexus_known(self, now_ms: float) -> list[Effect]:
        """There are voters."""
        return self._close(self.owner.keeper.nexus_known(now_ms), now_ms)

    def answered(self, token: int, message: Any, now_ms: float) -> list[Effect]:
        """Nexus answers what was asked of it."""
        return self._close(self.owner.keeper.answered(token, message, now_ms), now_ms)

    # -- who is there -------------------------------------------------------------------------

    def node_up(self, node: Kid, now_ms: float) -> list[Effect]:
        return self._close(self.owner.node_up(node, now_ms), now_ms)

    def node_down(self, node: Kid, boot: int, now_ms: float) -> list[Effect]:
        """Process `boot` of `node` is dead; a later one may have spoken to us already."""
        effects = self.owner.node_down(node, now_ms)
        effects += self.runner.drop_owner(node, boot, now_ms)
        return self._close(effects, now_ms)

    # -- workers ------------------------------------------------------------------------------

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
        done = self.runner.run_blocks(slot, run, first, results, gas, busy_ms, now_ms)
        return self._close(done, now_ms)

    def run_limited(self, slot: int, run: int, last: int, now_ms: float) -> list[Effect]:
        return self._close(self.runner.run_limited(slot, run, last, now_ms), now_ms)

    def run_ended(self, slot: int, run: int, fault: Fault | None, now_ms: float) -> list[Effect]:
        return self._close(self.runner.run_ended(slot, run, fault, now_ms), now_ms)

    def run_moved(self, slot: int, run: int, to: int, now_ms: float) -> list[Effect]:
        return self._close(self.runner.run_moved(slot, run, to, now_ms), now_ms)

    def client_gone(self, client: str, now_ms: float) -> list[Effect]:
        return self._close(self.owner.client_gone(client, now_ms), now_ms)

    def run_lost(self, slot: int, run: int, reason: str, now_ms: float) -> list[Effect]:
        return self._close(self.runner.run_lost(slot, run, reason, now_ms), now_ms)

    def _why(self, task: str) -> WhyAnswer:
        exact = self.geode.why(task)
        if exact is not None:
            return WhyAnswer((exact,))
        names = [
            name
            for name in self.geode.decisions(self.geode.config.decisions)
            if name.startswith((task + "/", task + "."))
        ]
        found = [self.geode.why(name) for name in reversed(names[:WHY_MAX])]
        if not found:
            raise NotFound(
                f"No decision about {task} is remembered here.",
                "`manifold jobs` lists jobs; ask the node that owns it.",
            )
        return WhyAnswer(tuple(decision for decision in found if decision is not None))
