"""Geode's metric and coordinates: the sentences of the design page, and hypothesis for the rest."""

from __future__ import annotations

from math import exp, inf, isfinite, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifold.kernel.config import GeodeConfig
from manifold.kernel.geode import metric
from manifold.kernel.geode.features import Features, Static, scale
from manifold.kernel.geode.messages import Demand

CONFIG = GeodeConfig()
unit = st.floats(0, 1)
gas = st.floats(0, 1e18)
points = st.builds(Features, unit, unit, unit, unit)
wishes = st.builds(Demand, compute=unit, memory=unit, bandwidth=unit)


@given(points, wishes)
def test_only_shortfall_is_distance(here: Features, demand: Demand) -> None:
    distance = metric.shortfall(demand, here, CONFIG)
    enough = (
        here.compute >= demand.compute
        and here.memory >= demand.memory
        and here.bandwidth >= demand.bandwidth
    )
    assert distance >= 0 and isfinite(distance)
    if enough:
        assert distance == 0.0


@given(points, wishes, unit)
def test_a_better_node_is_never_farther(here: Features, demand: Demand, more: float) -> None:
    better = Features(min(1.0, here.compute + more), here.memory, here.bandwidth, here.latency)
    assert metric.shortfall(demand, better, CONFIG) <= metric.shortfall(demand, here, CONFIG)


def test_the_distance_is_the_minkowski_sum_of_the_design_page() -> None:
    demand = Demand(compute=0.9, memory=0.8, bandwidth=0.1)
    here = Features(compute=0.5, memory=0.5, bandwidth=0.6)
    expected = (1.0 * 0.4**3 + 0.5 * 0.3**3) ** (1 / 3)
    assert metric.shortfall(demand, here, CONFIG) == pytest.approx(expected)


@given(gas, gas, gas, st.integers(1, 256), st.floats(1e-3, 1e12), st.floats(0, 1e4))
def test_the_predicted_finish_is_finite_and_never_falls_with_load_or_work(
    queued: float, work: float, more: float, slots: int, rate: float, fixed: float
) -> None:
    now = metric.finish_s(queued, work, slots, rate, fixed)
    assert isfinite(now) and now >= fixed
    slack = 1e-9 * now
    assert metric.finish_s(queued + more, work, slots, rate, fixed) >= now - slack
    assert metric.finish_s(queued, work + more, slots, rate, fixed) >= now - slack


def test_with_one_slot_the_cost_is_that_of_the_design_page() -> None:
    penalty = metric.penalty(0.3, 2.0)
    cost = metric.finish_s(700.0, 300.0, 1, 100.0 / penalty, 0.25)
    assert cost == pytest.approx((700 + 300) / 100 * exp(2.0 * 0.3) + 0.25)


def test_a_task_on_a_node_with_a_free_slot_does_not_wait() -> None:
    assert metric.finish_s(3 * 100.0, 100.0, 4, 50.0, 0.0) == 2.0
    assert metric.finish_s(4 * 100.0, 100.0, 4, 50.0, 0.0) == pytest.approx(2.5)


@given(st.floats(0, 1e300), st.floats(0, 1e300), st.floats(1e-3, 256))
def test_no_exponent_overflows(distance: float, load: float, capacity: float) -> None:
    assert metric.penalty(distance, 20.0) <= exp(50)
    assert isfinite(metric.seed_cost(min(distance, 10.0), load, capacity))


def test_the_seeds_distance_punishes_surplus_and_at_an_exact_match_no_load_repels() -> None:
    demand = Demand(compute=0.5, memory=0.5, bandwidth=0.5)
    above, exact = Features(0.9, 0.5, 0.5, 0.0), Features(0.5, 0.5, 0.5, 0.0)
    assert metric.seed_distance(demand, above, CONFIG) == pytest.approx(0.4)
    assert metric.shortfall(demand, above, CONFIG) == 0.0
    assert metric.seed_cost(metric.seed_distance(demand, exact, CONFIG), 1e9, 1.0) == 0.0


@given(st.integers(1, 256), st.floats(0.01, 1), st.integers(1, 1 << 60), st.floats(1, 1e15))
def test_coordinates_lie_between_0_and_1(
    cores: int, share: float, memory: int, bandwidth: float
) -> None:
    here = Features.from_meta(cores, share, memory, bandwidth, 0.2)
    for axis in (here.compute, here.memory, here.bandwidth, here.latency):
        assert 0.0 <= axis <= 1.0


def test_scales_are_logarithmic() -> None:
    assert scale(1.0, 1.0, 100.0) == 0.0
    assert scale(10.0, 1.0, 100.0) == pytest.approx(0.5)
    assert scale(1e9, 1.0, 100.0) == 1.0


@pytest.mark.parametrize("wrong", [nan, inf, -1.0])
def test_a_figure_that_is_no_quantity_is_no_coordinate(wrong: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        scale(wrong, 1.0, 100.0)
    assert not Static(compute=wrong).sane
    assert not Static(bandwidth_bps=wrong).sane
    assert not Static(latency_ms=wrong).sane
