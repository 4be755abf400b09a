"""The kernel's core as the simulator hosts it: what goes in and out of its scheduler is looked at.

Nothing is changed. What is found goes to the `Audit` that all nodes of a world share; `jobs.py`
says what J2 to J7 mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from manifold.kernel.core import Core
from manifold.kernel.effects import Effect, Send
from manifold.kernel.membership import messages as membership_messages
from manifold.kernel.scheduler import blocks
from manifold.kernel.scheduler.ledger import Job, Shard
from manifold.kernel.scheduler.messages import AssignShard, Report, ReportAck, Shrunk
from manifold.kernel.scheduler.owner import WATCHERS_MAX
from manifold.kernel.scheduler.runner import ATTEMPTS_MAX, Attempt
from manifold.vm.kid import Kid, short

RETRIES_MAX = 400  # of one job: a shard has 20 attempts, and few are lost more than thrice
FAILURES_MAX = 20
Key = tuple[Kid, str, int, int]  # owner, job, shard, attempt
_MEMBERSHIP = get_args(membership_messages.Message)


@dataclass(frozen=True, slots=True)
class Before:
    """An owner's job before it takes a report; `current`: the report's attempt is the one."""

    job: Job
    counted: int
    done: int
    shard: Shard | None
    shard_counted: int
    current: bool


@dataclass(slots=True)
class Audit:
    """What was assigned and counted, from where: shared by all `Observed` cores of a world."""

    failures: list[str] = field(default_factory=list)
    counted: int = 0
    fenced: int = 0  # reports with results that came too late to count
    _blocks: dict[tuple[Kid, int, str], tuple[Job, set[int]]] = field(default_factory=dict)
    _attempts: dict[Key, tuple[Kid, int]] = field(default_factory=dict)
    _given_up: dict[Key, int] = field(default_factory=dict)  # from this block on
    _acknowledged: dict[tuple[Key, int], int] = field(default_factory=dict)  # heard by process

    def fail(self, what: str) -> None:
        if len(self.failures) < FAILURES_MAX:
            self.failures.append(what)

    def assigned(self, owner: Kid, runner: Kid, message: AssignShard) -> None:
        """J3."""
        key = (owner, message.job, message.shard, message.attempt)
        first = self._attempts.setdefault(key, (runner, message.first))
        if first != (runner, message.first):
            self.fail(f"J3 {key} was {first} and is {(runner, message.first)}")

    def shrunk(self, owner: Kid, message: Shrunk) -> None:
        key = (owner, message.job, message.shard, message.attempt)
        self._given_up[key] = min(message.last, self._given_up.get(key, message.last))

    def reported(self, owner: Kid, message: Report) -> None:
        """J7."""
        key = (owner, message.job, message.shard, message.attempt)
        end = message.first + len(message.results)
        if message.results and end > self._given_up.get(key, end):
            self.fail(f"J7 {key} gave up {self._given_up[key]} and computed up to {end}")

    def acknowledged(self, owner: Kid, boot: int, message: ReportAck) -> None:
        """What process `boot` of the runner was told is safe."""
        key = ((owner, message.job, message.shard, message.attempt), boot)
        self._acknowledged[key] = max(message.counted, self._acknowledged.get(key, 0))

    def keeps(self, attempt: Attempt, boot: int) -> None:
        """J7."""
        key = (attempt.owner, attempt.job, attempt.shard, attempt.attempt)
        safe = max(self._attempts[key][1], self._acknowledged.get((key, boot), 0))
        if attempt.base > safe:
            self.fail(f"J7 {key} forgot results before {attempt.base}, safe are those to {safe}")

    def acks(self, shard: Shard | None, effects: Sequence[Effect]) -> None:
        """J7, of what an owner answers to one report."""
        for effect in effects:
            if isinstance(effect, Send) and isinstance(effect.message, ReportAck):
                said = effect.message.counted
                if shard is None or said > shard.counted:
                    self.fail(f"J7 {effect.message} was sent; counted is less")

    def took(self, process: tuple[Kid, int], before: Before, source: Kid, report: Report) -> None:
        """J2, of one report: what it counted."""
        job = before.job
        fresh = range(before.shard_counted, before.shard_counted + job.counted - before.counted)
        name = f"{report.job}/{report.shard}.{report.attempt} of {short(source)}"
        if not before.current:
            self.fenced += bool(report.results)
            if fresh:
                self.fail(f"J2 {name}: counted {len(fresh)} blocks of a fenced attempt")
            return
        then, known = self._blocks.get((*process, report.job)) or (None, set[int]())
        # A job that was taken over begins with what was kept of it; so it may come back to a
        # process that had lost it to another owner.
        if then is not job:
            every = {at for at, result in enumerate(job.results) if result is not None}
            known = every.difference(fresh)
            self._blocks[(*process, report.job)] = (job, known)
        if known.intersection(fresh):
            self.fail(f"J2 {name}: blocks {fresh} are counted already")
        said = range(report.first, report.first + len(report.results))
        if fresh and (fresh[0] not in said or fresh[-1] not in said):
            self.fail(f"J2 {name}: counted {fresh}, said were {said}")
        known.update(fresh)
        self.counted += len(fresh)
        indices = sum(high - low for low, high in (blocks.positions(job.spec, b) for b in fresh))
        if job.done - before.done != indices or job.counted != len(known):
            self.fail(f"J2 {name}: {job.counted} counted ({job.done}), {len(known)} came")


class Observed(Core):
    """The kernel's core; what goes in and out of its scheduler is looked at, nothing is changed."""

    audit: Audit

    def _route(self, source: Kid, message: Any, now_ms: float) -> tuple[str, list[Effect]]:
        before = self._before(source, message) if isinstance(message, Report) else None
        match message:
            case AssignShard():
                self.audit.assigned(source, self.me.kid, message)
            case ReportAck():
                self.audit.acknowledged(source, self.me.boot, message)
            case Shrunk() if self._is_current(source, message):
                self.audit.shrunk(self.me.kid, message)
            case Report() if self._is_current(source, message):
                self.audit.reported(self.me.kid, message)
        routed = super()._route(source, message, now_ms)
        if before is not None:
            self.audit.took((self.me.kid, self.me.boot), before, source, message)
            self.audit.acks(before.shard, routed[1])
        if not isinstance(message, _MEMBERSHIP):
            self._look(getattr(message, "job", ""))
        return routed

    def request(self, client: str, message: Any, now_ms: float) -> tuple[Any, list[Effect]]:
        answer, effects = super().request(client, message, now_ms)
        self._look(getattr(message, "job", ""))
        return answer, effects

    def tick(self, now_ms: float) -> list[Effect]:
        effects = super().tick(now_ms)
        for job in self.scheduler.owner.jobs:
            self._look(job)
        return effects

    def _is_current(self, source: Kid, message: Report | Shrunk) -> bool:
        """Of a fenced attempt a former process of its runner may still be heard."""
        job = self.scheduler.owner.jobs.get(message.job)
        shard = job.shards.get(message.shard) if job is not None else None
        return shard is not None and shard.node == source and shard.attempt == message.attempt

    def _before(self, source: Kid, report: Report) -> Before | None:
        job = self.scheduler.owner.jobs.get(report.job)
        if job is None:
            return None
        shard = job.shards.get(report.shard)
        current = self._is_current(source, report)
        counted = shard.counted if shard is not None else 0
        return Before(job, job.counted, job.done, shard, counted, current)

    def _look(self, name: str) -> None:
        """J4."""
        owner, runner = self.scheduler.owner, self.scheduler.runner
        job = owner.jobs.get(name)
        if job is not None and not owner.keeper.waits(name):
            broken = job.broken()
            if broken:
                self.audit.fail(f"J4 {name}: {broken}")
            if job.retries > RETRIES_MAX or len(job.watchers) > WATCHERS_MAX:
                self.audit.fail(f"J4 {name}: {job.retries} retries, {len(job.watchers)} watchers")
        for attempt in runner.attempts():
            self.audit.keeps(attempt, self.me.boot)
        attempts = runner.held
        if attempts > ATTEMPTS_MAX or len(owner.jobs) > owner.config.jobs:
            self.audit.fail(f"J4 {self.me.alias}: {attempts} attempts, {len(owner.jobs)} jobs")


def left_over(core: Core) -> str:
    """J6: what an idle node still holds; "" where it is clean."""
    owner, runner, geode = core.scheduler.owner, core.scheduler.runner, core.geode
    # What no living node may run waits for such a node, and costs nothing (owner.NOBODY_MS).
    left = [job.job for job in owner.jobs.values() if job.starved_since_ms < 0]
    if left:
        return f"{len(left)} jobs run: {left[0]}"
    if runner.held or runner.running() or runner.waiting() or runner.load().queued_gas:
        return f"{runner.held} attempts are held, {runner.load().queued_gas} gas queued"
    if owner.queue.outbox.entries:
        return f"{len(owner.queue.outbox.entries)} jobs are queued"
    if owner.peers.live():
        return f"live shards: {owner.peers.live()}"
    for kid in geode.nodes():
        node = geode.node(kid)
        if node is not None and (node.flights or node.flight_gas):
            return f"in flight to {node.alias}: {node.flights} tasks, {node.flight_gas} gas"
    return ""
