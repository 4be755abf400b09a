"""Placement simulated: the ten percent rule, and that geode does not herd on an old view."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from manifold.tools.bench import placement
from manifold.tools.bench.placement import (
    POLICIES,
    REALISABLE,
    Case,
    GeodePolicy,
    SeedArgmin,
    cases,
    fill,
    simulate,
    study,
)

MARGIN = 1.15  # 10 % and the noise of a few short runs
CASES = {case.name: (suite, replace(case, tasks=1200)) for suite, case in cases()}


@pytest.mark.parametrize("name", list(CASES))
def test_geode_is_within_ten_percent_of_the_best_realisable_policy(name: str) -> None:
    rivals = {each: POLICIES[each] for each in ("geode", *REALISABLE)}
    cell = study(2, [CASES[name]], rivals)[0]
    assert cell.ratio() < MARGIN, placement.table([cell])


@pytest.mark.parametrize("every", [1, 100])
def test_suite_a_spreads_unequal_weights_over_unequal_nodes(every: int) -> None:
    variance = {
        name: sum(fill(every, make, seed).mean for seed in range(12)) / 12
        for name, make in POLICIES.items()
    }
    best = min(variance[name] for name in REALISABLE)
    assert variance["geode"] < MARGIN * best
    assert variance["geode"] < 0.5 < variance["seed argmin"]


def test_on_a_stale_view_the_seeds_metric_herds_and_geode_does_not() -> None:
    """Ten dispatchers, one report, then 200 tasks each decides alone."""
    case = Case("herd", (10.0,) * 10, 1.0, 0.5, 1, 1)
    spread = {}
    for name, make in (("seed", SeedArgmin), ("geode", GeodePolicy)):
        placed = Counter[int]()
        for dispatcher in range(10):
            policy = make(case, Random(dispatcher))
            for node in range(10):
                policy.report(node, 0.1 * node, 10.0, 0.0)
            for task in range(20):
                node = policy.pick(1.0, 0, 1.5 + 0.001 * task)
                policy.sent(node, 1.0, 1.5 + 0.001 * task)
                placed[node] += 1
        spread[name] = max(placed.values())
    assert spread["seed"] == 200
    assert spread["geode"] < 45


def test_own_dispatches_are_what_keeps_a_stale_view_usable() -> None:
    case = replace(CASES["unequal T=1"][1], dispatchers=2)
    corrected = simulate(case, GeodePolicy, 1).p99
    assert corrected * 1.1 < simulate(case, placement.NoCorrection, 1).p99


def test_every_task_ends_and_the_same_seed_gives_the_same_run() -> None:
    case = CASES["T=0.2"][1]
    one, two = placement.World(case, GeodePolicy, 3), placement.World(case, GeodePolicy, 3)
    assert one.run() == two.run()
    one.advance(1e9 if not case.stale_s else max(one.free_s))
    assert all(left == 0.0 for left in one.queued)
    for policy in one.policies:
        assert isinstance(policy, GeodePolicy)
        assert all(policy.geode.in_flight_gas(kid) == 0.0 for kid in policy.kids)
        assert policy.geode.strays == 0 and policy.geode.refused_inputs == 0


def test_the_benchmark_returns_figures_with_goals(monkeypatch: pytest.MonkeyPatch) -> None:
    rivals = {each: POLICIES[each] for each in ("geode", *REALISABLE)}
    monkeypatch.setattr(
        placement,
        "quick_cells",
        lambda: study(2, [CASES["equal T=0"], CASES["unequal T=0"]], rivals),
    )
    figures = placement.run(quick=True)
    assert [figure.goal for figure in figures] == [1.10, 0.999]
    assert all(0 < figure.value < 2 for figure in figures)
    assert "unequal T=0: geode" in figures[0].raw
