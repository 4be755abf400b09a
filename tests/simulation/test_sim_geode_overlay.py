"""The overlay simulated at smaller sizes: no task is ever lost, and few hops suffice."""

from __future__ import annotations

from dataclasses import replace

import pytest

from manifold.kernel.config import GeodeConfig
from manifold.kernel.geode.messages import Demand
from manifold.tools.bench.overlay import Overlay, expected_hops, run, study


@pytest.mark.parametrize("seed", range(12))
def test_no_task_is_lost(seed: int) -> None:
    outcome = study(300, 400, seed)
    assert outcome.lost == 0 and outcome.executed == 400
    assert outcome.p99_hops <= 2 * GeodeConfig().hops


def test_few_hops_find_a_good_place_and_the_same_seed_gives_the_same_run() -> None:
    one = study(500, 500, 0)
    assert one == study(500, 500, 0)
    assert one.mean_hops <= expected_hops(500)
    assert one.cost_ratio < 2.0


@pytest.mark.parametrize("seed", range(3))
def test_a_rare_machine_is_found_or_the_task_comes_back(seed: int) -> None:
    overlay = Overlay(300, seed)
    for number, machine in enumerate(overlay.everyone):
        machine.static = replace(machine.static, gpu=number % 60 == 0)
    demand = Demand(1e8, needs_gpu=True)
    for origin in overlay.everyone[::10]:
        found, hops, retries = overlay.settle(demand, origin)
        assert found is not None and found.static.gpu
        assert hops <= (retries + 1) * overlay.config.hops


def test_the_benchmark_returns_figures_with_goals() -> None:
    hops, lost = run(quick=True)
    assert hops.met and lost.met and lost.value == 0.0
