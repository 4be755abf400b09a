"""`manifold sim`: what it prints, what it exits with, and how balanced a simulated job is."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from random import Random
from statistics import mean
from typing import Any

import pytest
from click.testing import CliRunner, Result

from manifold.kernel.effects import Effect, Send
from manifold.kernel.errors import ConfigError
from manifold.kernel.membership.messages import Me
from manifold.kernel.scheduler.ledger import Job, Shard
from manifold.kernel.scheduler.messages import (
    AssignShard,
    DropShard,
    JobSpec,
    NeedProgram,
    Rejected,
    Shrink,
    Shrunk,
)
from manifold.kernel.scheduler.owner import Owner
from manifold.tools.simulator import jobs, workers
from manifold.tools.simulator.clients import Task
from manifold.tools.simulator.faults import Faults
from manifold.tools.simulator.jobs import Exact, composite
from manifold.tools.simulator.observed import Observed
from manifold.tools.simulator.protocols import Factory
from manifold.tools.simulator.run import build, simulate
from manifold.tools.simulator.verbs import sim
from manifold.tools.simulator.workers import Program
from manifold.tools.simulator.world import Node
from manifold.vm.kid import Kid, kid_of
from manifold.vm.runtime.results import Partial


def run(line: str) -> Result:
    return CliRunner().invoke(sim, shlex.split(line), standalone_mode=False)


def test_a_run_prints_what_was_checked_and_returns_0() -> None:
    result = run("--seed 2 --nodes 4 --faults light --duration 4")
    assert result.return_value == 0
    assert result.output.startswith("seed 2: 4 nodes, faults light\n")
    assert "checked: results are exact" in result.output
    assert "checked: after healing every view is what really runs" in result.output


def test_the_same_seed_gives_the_same_digest_and_json_is_one_object_a_run() -> None:
    lines = [
        json.loads(line)
        for _ in range(2)
        for line in run("--seed 5 --runs 2 --nodes 3 --duration 3 --json").output.splitlines()
    ]
    assert [line["seed"] for line in lines] == [5, 6, 5, 6]
    assert lines[0]["digest"] == lines[2]["digest"] != lines[1]["digest"]


def test_several_runs_are_summed_up() -> None:
    assert run("--runs 3 --nodes 2 --faults none --duration 2").output == "3 runs, 0 failed\n"


def test_faults_that_are_not_understood_are_refused() -> None:
    result = run("--faults sunshine")
    assert isinstance(result.exception, ConfigError)


class Forgetful(Owner):
    """Loses what it takes back."""

    def _take_back(self, job: Job, shard: Shard, now_ms: float) -> None:
        super()._take_back(job, shard, now_ms)
        job.pending.remove(shard.number)


class Broken(Owner):
    def tick(self, now_ms: float) -> list[Effect]:
        raise AssertionError("planted")


def made_with(part: type[Owner]) -> Factory:
    class Mutant(Observed):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            owner = self.scheduler.owner
            self.scheduler.owner = part(owner.me, owner.config, owner.geode, self.me.boot)

    return lambda roster: composite(roster, None, Mutant)


def test_a_failure_returns_1_and_prints_the_command_that_repeats_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jobs, "composite", made_with(Forgetful))
    for seed in range(30):
        result = run(f"--seed {seed} --nodes 5 --faults heavy --duration 8 --core")
        if result.return_value:
            break
    assert result.return_value == 1 and "FAILED: " in result.output
    last = result.output.splitlines()[-1]
    assert last == (
        f"reproduce with: manifold sim --seed {seed} --nodes 5 --faults heavy --duration 8 --core"
    )
    again = run(last.removeprefix("reproduce with: manifold sim "))
    assert again.return_value == 1


def test_a_nodes_own_assertion_is_not_caught_and_the_command_is_printed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jobs, "composite", made_with(Broken))
    result = run("--seed 1 --nodes 3 --faults none")
    assert isinstance(result.exception, AssertionError)
    assert "reproduce with: manifold sim --seed 1 --nodes 3 --faults none" in result.stderr


def test_a_large_cluster_starts_warm_and_runs_jobs_over_its_links() -> None:
    report = simulate(1, 300, "light", 2500.0, composite)
    assert not report.failures, report.text()


# -- how long a job takes, against what is possible -----------------------------------------------

CLASSES = (
    [("server", 2, 1.0)] * 2 + [("jetson", 2, 0.6)] * 2 + [("rpi5", 1, 0.5)] * 4
    + [("rpi4", 1, 0.25)] * 8
)  # fmt: skip
CONTROL = (AssignShard, Shrink, Shrunk, DropShard, Rejected, NeedProgram)
INDICES = 100_000
SLOWED_AT = 0.2  # of the ideal time


def machine_of(index: int, kid: Kid, boot: int) -> Me:
    name, cores, compute = CLASSES[index]
    address = f"sim://{index}"
    alias = f"{name}-{index:02}"
    return Me(kid, boot, alias, name, (address,), cores, compute, 1 << 30, 1e9, 0.3)


def makespan(seed: int, ideal_s: float, *, slowed: bool) -> tuple[float, int]:
    """Time over the ideal, for a program that is new to the cluster, and control messages."""
    world, made = build(seed, 16, Faults(delay=(0.2, 1.0)), composite)
    exact = next(checker for checker in made.checkers if isinstance(checker, Exact))
    speeds = [exact.workers.speeds[n] * CLASSES[n][1] for n in range(16)]
    world.start_all()
    world.run(2000.0)
    counts: Counter[type] = Counter()

    def sent(node: Node, send: Send) -> None:
        counts[type(send.message)] += isinstance(send.message, CONTROL)

    world.on_send.append(sent)
    program = Program("ints", ideal_s * sum(speeds) / INDICES, seed)
    spec = JobSpec(kid_of(program.ir), 0, INDICES, "count")
    task = Task("J-0000000000000001", spec, program.ir, 0)
    exact.clients.submit(task)
    ideal_ms = 1000.0 * ideal_s
    if slowed:
        victim = Random(seed).randrange(1, 16)
        slow = 0.2
        world.at(ideal_ms * SLOWED_AT, exact.workers.factors.__setitem__, victim, slow)
        left = sum(speeds) - (1 - slow) * speeds[victim]
        ideal_ms *= SLOWED_AT + (1 - SLOWED_AT) * sum(speeds) / left
    assert world.run_until(lambda: bool(task.ended), 20_000.0, 20.0) is not None
    assert task.ended == "done"
    return (task.ended_ms - task.begun_ms) / ideal_ms, sum(counts.values())


@pytest.mark.parametrize(
    ("slowed", "most", "messages"), [(False, 1.08, 72), (True, 1.16, 76)], ids=["even", "slowed"]
)
def test_sixteen_unequal_nodes_finish_a_second_of_work_nearly_together(
    monkeypatch: pytest.MonkeyPatch, slowed: bool, most: float, messages: int
) -> None:
    """Measured: 1.07 and 1.11 with about 60 control messages (design: 1.07, 1.14 and 72)."""
    monkeypatch.setattr(jobs, "machine_of", machine_of)
    monkeypatch.setattr(workers, "block_result", lambda *arguments: Partial(1))
    runs = [makespan(seed, 1.0, slowed=slowed) for seed in range(8)]
    assert mean(ratio for ratio, _ in runs) <= most
    assert mean(count for _, count in runs) <= messages
