"""The registry over whole clusters: agreement under faults, healing, and what it costs."""

from __future__ import annotations

from dataclasses import replace

from manifold.kernel.registry.messages import Timing
from manifold.tools.simulator.registry import Duel, quiet, rough, schedule

SEEDS = 40
ROUGH_SEEDS = 15
DUELS = 12


def test_nodes_agree_on_ring_and_aliases_whatever_goes_wrong_and_on_the_core_after_healing() -> (
    None
):
    epochs = 0
    for seed in range(SEEDS):
        figures = schedule(seed)
        assert not figures.failures, (seed, figures.failures)
        epochs += figures.epochs
    assert epochs > 2 * SEEDS, "hardly anything happened"


def test_nothing_is_lost_where_registrars_stop_and_clocks_jump() -> None:
    for seed in range(ROUGH_SEEDS):
        figures = schedule(seed, drawn=rough)
        assert not figures.failures, (seed, figures.failures)


def test_two_registrars_who_believe_different_things_do_no_harm() -> None:
    twice = 0
    for seed in range(DUELS):
        figures = Duel(seed).play()
        assert not figures.failures, (seed, figures.failures)
        twice += bool(figures.twice)
    assert twice > 2, "leases ought to end early where clocks jump"


def test_a_seed_is_a_schedule() -> None:
    assert schedule(5).digest == schedule(5).digest


def test_sixteen_nodes_that_start_cost_one_lease_two_writes_and_a_watch_of_each_register() -> None:
    cost = quiet(16, rest_ms=20_000.0)
    assert cost.asked == {"Watch": 32, "Acquire": 1, "Operate": 2} and cost.epochs == 1
    assert cost.ready_ms < 3000.0
    assert cost.messages_s < 100.0, "two polls in 5 s a node, and the renewals"
    assert cost.records_s < 4.0, "the renewals of one lease at three voters"


def test_a_registrar_that_resigns_leaves_nothing_but_the_polls_of_watches() -> None:
    cost = quiet(16, timing=replace(Timing(), idle_ms=2000.0), rest_ms=20_000.0)
    assert cost.records_s < 0.5 and cost.epochs == 1
