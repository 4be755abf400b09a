"""The benchmark of the simulator of Nexus: every seed once, and a failing one stops it."""

from __future__ import annotations

import pytest

from manifold.tools.bench import sim_nexus
from manifold.tools.simulator import nexus
from manifold.tools.simulator.nexus import Outcome, Summary


def test_rounds_run_seeds_that_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def run(seed: int, schedules: int) -> Summary:
        seeds.extend(range(seed, seed + schedules))
        wall_s = 4.0 if len(seeds) == schedules else 2.0  # the first round was disturbed
        return Summary(schedules=schedules, events=schedules, wall_s=wall_s)

    monkeypatch.setattr(nexus, "run", run)
    (figure,) = sim_nexus.run(quick=True)
    total = sim_nexus.ROUNDS * sim_nexus.SCHEDULES_QUICK
    assert seeds == list(range(1, total + 1))
    assert figure.raw["seeds"] == f"1 to {total}"
    assert figure.value == sim_nexus.SCHEDULES_QUICK / 2.0
    assert figure.raw["slowest round /s"] == sim_nexus.SCHEDULES_QUICK / 4.0


def test_a_failing_schedule_is_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = Outcome(17)
    failed.failures.append("two values of one ballot")

    def run(seed: int, schedules: int) -> Summary:
        return Summary(schedules=1, wall_s=1.0, failed=failed)

    monkeypatch.setattr(nexus, "run", run)
    with pytest.raises(AssertionError, match="seed 17"):
        sim_nexus.run(quick=True)
