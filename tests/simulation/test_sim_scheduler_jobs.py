"""Jobs on whole simulated clusters, from seeds; then planted bugs, each of which must be caught."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest

from manifold.kernel.effects import Effect, Notify, Send
from manifold.kernel.geode import geode
from manifold.kernel.scheduler import protocol
from manifold.kernel.scheduler.ledger import Job, Shard
from manifold.kernel.scheduler.messages import (
    AbortRun,
    DropShard,
    JobSpec,
    Report,
    ReportAck,
    Shrunk,
)
from manifold.kernel.scheduler.owner import Owner
from manifold.kernel.scheduler.runner import Attempt, Runner
from manifold.tools.simulator.clients import Task
from manifold.tools.simulator.faults import Faults, parse
from manifold.tools.simulator.jobs import Exact, composite, factory
from manifold.tools.simulator.observed import Observed
from manifold.tools.simulator.run import Report as Outcome
from manifold.tools.simulator.run import build, settle, simulate
from manifold.tools.simulator.workers import CORE_GAS_PER_S, Program
from manifold.tools.simulator.world import World
from manifold.vm.kid import Kid, kid_of

SIZES = (2, 3, 5, 8)
HARD = {
    "none": "none",
    "light": "light",
    "heavy": "heavy",
    "crashes": "heavy,crash=40,down=50:3000",
    "stops": "none,pause=60,stop=2000:9000",
    "loss": "none,drop=0.2,dup=0.1,reorder=0.2,delay=0.2:200",
    "cuts": "none,cut=60,partition=20,broken=200:6000",
}


@pytest.mark.parametrize("faults", HARD)
@pytest.mark.parametrize("block", range(4))
def test_results_are_exact_under_faults_and_every_job_ends_after_healing(
    faults: str, block: int
) -> None:
    for seed in range(block * 12, block * 12 + 12):
        core = faults != "none" and seed % 4 == 3
        report = simulate(seed, SIZES[seed % 4], HARD[faults], None, composite, core=core)
        assert not report.failures, report.text()


def test_without_faults_nothing_is_tried_again_and_nothing_is_computed_in_vain() -> None:
    for seed in range(6):
        world, made = build(seed, 8, Faults(), composite)
        world.start_all()
        made.workload(world)
        world.run(made.duration_ms)
        assert settle(world, made.checkers, world.nodes, []) is not None
        tasks = exact_of(made.checkers).clients.tasks
        assert tasks and all(t.status is not None and t.status.retries == 0 for t in tasks)


SCRIPT = """
from manifold.tools.simulator.jobs import composite
from manifold.tools.simulator.run import simulate
print([simulate(seed, 5, faults, 6000.0, composite).digest
       for seed in range(3) for faults in ("none", "heavy")])
"""


def test_a_seed_gives_one_digest_under_every_hash_seed() -> None:
    seen = []
    for hash_seed in ("0", "1", "4711"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", SCRIPT]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        seen.append(done.stdout)
    assert seen[0] and len(set(seen)) == 1


# -- one job, by hand -----------------------------------------------------------------------------


def exact_of(checkers: Sequence[Any]) -> Exact:
    return next(checker for checker in checkers if isinstance(checker, Exact))


def long_job(world: World, checkers: Sequence[Any], seconds: float, home: int = 0) -> Task:
    """A float sum that takes one core of the reference machine so long."""
    program = Program("floats", seconds * CORE_GAS_PER_S / 2000, 1)
    spec = JobSpec(kid_of(program.ir), 0, 2000, "sum")
    task = Task("J-00000000000000ff", spec, program.ir, home)
    exact_of(checkers).clients.submit(task)
    return task


def cluster(seed: int, nodes: int, core: type[Observed] = Observed) -> tuple[World, Sequence[Any]]:
    """A quiet cluster that has met; its submitting node 2 is a server."""
    world, made = build(seed, nodes, Faults(), factory(core=core))
    world.start_all()
    world.run(2000.0)
    return world, made.checkers


def retries_of_an_owner_that_sleeps(core: type[Observed], seed: int) -> int:
    world, checkers = cluster(seed, 5, core)
    task = long_job(world, checkers, 12.0)
    world.run(1000.0)
    world.pause(world.nodes[0], 4000.0)
    failures: list[str] = []
    assert settle(world, checkers, world.nodes, failures) is not None, failures
    assert task.ended == "done" and task.status is not None
    return task.status.retries


def test_an_owner_that_slept_does_not_hold_the_others_for_silent() -> None:
    assert [retries_of_an_owner_that_sleeps(Observed, seed) for seed in range(4)] == [0] * 4


def retries_for_one_that_is_silent(core: type[Observed]) -> int:
    """A node is stopped for so long that SWIM has not buried it yet."""
    world, checkers = cluster(4, 5, core)
    task = long_job(world, checkers, 12.0)
    world.run(1000.0)
    world.pause(world.nodes[2], 60_000.0)
    world.run(2600.0)
    assert task.status is not None
    retries = task.status.retries
    if retries:
        assert world.run_until(lambda: bool(task.ended), 20_000.0) is not None
        assert task.ended == "done"
    return retries


def test_an_assignee_that_is_silent_loses_its_shards_after_two_seconds() -> None:
    assert retries_for_one_that_is_silent(Observed) >= 1


def test_the_client_of_a_dead_owner_gets_its_result_from_another_node() -> None:
    world, checkers = cluster(5, 5)
    task = long_job(world, checkers, 8.0)
    world.run(700.0)
    world.crash(world.nodes[0])
    assert world.run_until(lambda: bool(task.ended), 30_000.0) is not None
    assert task.ended == "done" and task.submits == 2 and task.home != 0
    world.start(world.nodes[0])
    assert settle(world, checkers, world.nodes, []) is not None


def test_a_job_submitted_again_to_an_owner_that_restarted_is_not_mixed_up_with_its_first_life() -> (
    None
):
    for seed in range(12):
        world, checkers = cluster(seed, 3)
        task = long_job(world, checkers, 6.0)
        world.run(600.0 + 50.0 * seed)
        world.crash(world.nodes[0])
        world.run(100.0)
        world.start(world.nodes[0])
        failures: list[str] = []
        assert settle(world, checkers, world.nodes, failures) is not None, failures
        assert task.ended == "done"
        for checker in checkers:
            assert not checker.failures


# -- planted bugs ---------------------------------------------------------------------------------


class CountsFencedAttempts(Owner):
    """Takes any attempt of a shard for the present one."""

    def receive(self, source: Kid, message: Any, now_ms: float) -> list[Effect]:
        job = self.jobs.get(message.job)
        shard = job.shards.get(message.shard) if job is not None else None
        if isinstance(message, Report) and shard is not None and shard.node is not None:
            message = msgspec.structs.replace(message, attempt=shard.attempt, lost="")
            source = shard.node
        return super().receive(source, message, now_ms)


class CountsRepetitionsAgain(Owner):
    """Counts from where it is, wherever the report began."""

    def _report(self, job: Job, shard: Shard, report: Report, now_ms: float) -> list[Effect]:
        report = msgspec.structs.replace(report, first=shard.counted)
        return super()._report(job, shard, report, now_ms)


class ForgetsItsBoot(Owner):
    """Begins to number attempts anew in each process."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments[:3])


class LosesTheRestOfAShrunkShard(Owner):
    def receive(self, source: Kid, message: Any, now_ms: float) -> list[Effect]:
        job = self.jobs.get(message.job)
        before = job.next_shard if job is not None else 0
        effects = super().receive(source, message, now_ms)
        if isinstance(message, Shrunk) and job is not None and job.next_shard > before:
            job.shards.pop(before, None)
        return effects


class AcknowledgesBeforeItCounts(Owner):
    """Says it has what a report said, though what came before that is missing."""

    def _report(self, job: Job, shard: Shard, report: Report, now_ms: float) -> list[Effect]:
        effects = super()._report(job, shard, report, now_ms)
        end = report.first + len(report.results)
        return [
            Send(e.to, msgspec.structs.replace(e.message, counted=end, missing=False))
            if isinstance(e, Send) and isinstance(e.message, ReportAck) and report.results
            else e
            for e in effects
        ]


class TakesItsOwnSleepForTheirSilence(Owner):
    def tick(self, now_ms: float) -> list[Effect]:
        self._ticked_ms = now_ms  # never late
        return super().tick(now_ms)


class LosesReleasedShards(Owner):
    def _take_back(self, job: Job, shard: Shard, now_ms: float) -> None:
        super()._take_back(job, shard, now_ms)
        job.pending.remove(shard.number)


class NeverGivesUpOnTheSilent(Owner):
    def _tick_job(self, job: Job, now_ms: float) -> list[Effect]:
        for shard in job.shards.values():
            shard.heard_ms = now_ms
        return super()._tick_job(job, now_ms)


class LeavesCancelledShardsRunning(Owner):
    """Says nothing to the runners, at the end and afterwards."""

    def request(self, client: str, message: Any, now_ms: float) -> Any:
        answer, effects = super().request(client, message, now_ms)
        return answer, _without(effects, DropShard)

    def receive(self, source: Kid, message: Any, now_ms: float) -> list[Effect]:
        return _without(super().receive(source, message, now_ms), DropShard)


class AssignsToTheNextNode(Owner):
    """O2: sends a shard where nobody looked whether it may go."""

    def _assignment(self, job: Job, shard: Shard) -> Effect:
        effect = super()._assignment(job, shard)
        assert isinstance(effect, Send) and shard.node is not None
        nodes = self.geode.nodes()
        shard.node = nodes[(nodes.index(shard.node) + 1) % len(nodes)]
        self.peers.left(Kid(effect.to))
        self.peers.took(shard.node)
        return Send(shard.node, effect.message)


class ThrowsAwayWhatItSent(Runner):
    """R2: forgets results before they are counted."""

    def _report(self, attempt: Attempt, now_ms: float) -> Effect:
        effect = super()._report(attempt, now_ms)
        while attempt.base < attempt.sent:
            attempt.results.popleft()
            attempt.base += 1
        return effect


class IgnoresDropShard(Runner):
    def receive(self, source: Kid, message: Any, now_ms: float) -> list[Effect]:
        if isinstance(message, DropShard):
            return []
        return super().receive(source, message, now_ms)


class NeverSendsAgain(Runner):
    def _rewind(self, attempt: Attempt, now_ms: float) -> Effect:
        attempt.rewound_ms = now_ms
        return self._report(attempt, now_ms)


class GivesASlotAwayTwice(Runner):
    """R1: starts the next run without ending the present one."""

    def _drop(self, attempt: Attempt, now_ms: float) -> list[Effect]:
        effects = super()._drop(attempt, now_ms)
        return [e for e in effects if not (isinstance(e, Notify) and isinstance(e.event, AbortRun))]


class GivesUpWhatItComputes(Runner):
    """R5: says it will stop, and computes on."""

    def _shrunk(self, attempt: Attempt, last: int) -> Effect:
        effect = super()._shrunk(attempt, last)
        assert isinstance(effect, Send)
        less = max(attempt.base, attempt.last - 3)
        return Send(effect.to, msgspec.structs.replace(effect.message, last=less))


def _without(effects: list[Effect], kind: type) -> list[Effect]:
    return [e for e in effects if not (isinstance(e, Send) and isinstance(e.message, kind))]


def core_with(part: type[Owner] | type[Runner]) -> type[Observed]:
    """A core with a mutant in it."""

    class Mutant(Observed):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            scheduler = self.scheduler
            if issubclass(part, Owner):
                owner = scheduler.owner
                scheduler.owner = part(owner.me, owner.config, owner.geode, self.me.boot)
            else:
                runner = scheduler.runner
                scheduler.runner = part(runner.me, runner.config, runner.slots)

    return Mutant


def caught(core: type[Observed], seeds: int, faults: str) -> str:
    """What was said about the first seed that shows the bug; "" where none does."""
    for seed in range(seeds):
        try:
            report: Outcome = simulate(seed, SIZES[seed % 4], faults, None, factory(core=core))
        except AssertionError as broken:
            return f"assertion {broken}"
        if report.failures:
            return report.failures[0]
    return ""


@pytest.mark.parametrize(
    ("part", "faults"),
    [
        (CountsFencedAttempts, "stops"),
        (CountsRepetitionsAgain, "loss"),
        (ForgetsItsBoot, "crashes"),
        (LosesTheRestOfAShrunkShard, "none"),
        (AcknowledgesBeforeItCounts, "loss"),
        (LosesReleasedShards, "heavy"),
        (LeavesCancelledShardsRunning, "light"),
        (AssignsToTheNextNode, "none"),
        (ThrowsAwayWhatItSent, "loss"),
        (IgnoresDropShard, "light"),
        (NeverSendsAgain, "loss"),
        (GivesASlotAwayTwice, "light"),
        (GivesUpWhatItComputes, "none"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_planted_bug_is_caught(part: type[Owner] | type[Runner], faults: str) -> None:
    assert caught(core_with(part), 60, HARD[faults])


def asks_nobody_for_labels(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(geode, "unmet", lambda node, demand: "")
    patch.setattr(protocol, "unmet", lambda node, demand: "")


def believes_what_its_owner_knows_of_its_labels(patch: pytest.MonkeyPatch) -> None:
    """A node that has other labels since it started again runs what went to the former ones."""
    patch.setattr(protocol, "unmet", lambda node, demand: "")


@pytest.mark.parametrize(
    ("plant", "faults"),
    [(asks_nobody_for_labels, "none"), (believes_what_its_owner_knows_of_its_labels, "crashes")],
)
def test_a_shard_on_a_node_without_its_label_is_caught(
    plant: Callable[[pytest.MonkeyPatch], None], faults: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    assert "runs what wants" in caught(Observed, 60, HARD[faults])


def test_an_owner_that_takes_its_own_sleep_for_their_silence_is_caught() -> None:
    mutant = core_with(TakesItsOwnSleepForTheirSilence)
    assert any(retries_of_an_owner_that_sleeps(mutant, seed) for seed in range(40))


def test_an_owner_that_never_gives_up_on_the_silent_is_caught() -> None:
    assert retries_for_one_that_is_silent(core_with(NeverGivesUpOnTheSilent)) == 0


def test_the_faults_used_here_are_well_formed() -> None:
    check: Callable[[str], Faults] = parse
    assert all(check(text).text() for text in HARD.values())
