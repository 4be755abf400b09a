"""Geode as a whole: the rule of the design page, sentence by sentence."""

from __future__ import annotations

import json
from math import inf, isfinite, nan
from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold.kernel.config import GeodeConfig
from manifold.kernel.geode.features import Static
from manifold.kernel.geode.geode import Choice, Geode, refusal
from manifold.kernel.geode.messages import Decision, Demand, LoadReport
from manifold.vm.kid import Kid, kid_of

PROGRAM = kid_of(b"program")
RATE = 1e9  # gas per second of a slot
WORK = Demand(work_gas=1e8)  # 100 ms of it


def kid(number: int) -> Kid:
    return kid_of(b"node %d" % number)


def cluster(*statics: Static, seed: int = 0, config: GeodeConfig | None = None) -> Geode:
    geode = Geode(kid(0), config or GeodeConfig(), Random(seed))
    for number, static in enumerate(statics):
        name = f"{static.compute:g}"
        assert geode.node_up(kid(number), f"node-{number:02}", name, static, 0.0)
        load = LoadReport(slots=static.cores, gas_per_s=RATE * static.compute)
        assert geode.report(kid(number), load, 0.0)
    return geode


def equal(count: int, **options: object) -> Geode:
    config = GeodeConfig(**options)  # type: ignore[arg-type]
    return cluster(*[Static(latency_ms=0.0)] * count, config=config)


# --- hard constraints -------------------------------------------------------------------------

statics = st.builds(
    Static,
    cores=st.integers(1, 4),
    compute=st.sampled_from([0.25, 0.5, 1.0]),
    memory_bytes=st.sampled_from([1 << 28, 1 << 30]),
    gpu=st.booleans(),
    arch=st.sampled_from(["x86_64", "aarch64"]),
    labels=st.sampled_from([(), ("ssd",), ("ssd", "camera")]),
)
demands = st.builds(
    Demand,
    work_gas=st.floats(0, 1e12),
    node_class=st.sampled_from(["", "0.5"]),
    needs_gpu=st.booleans(),
    arch=st.sampled_from(["", "x86_64"]),
    memory_bytes=st.sampled_from([0, 1 << 29]),
    cores=st.integers(0, 3),
    labels=st.sampled_from([(), ("camera",)]),
    compute=st.floats(0, 1),
)
loads = st.builds(
    LoadReport,
    queued_gas=st.floats(0, 1e12),
    slots=st.integers(1, 4),
    credits=st.integers(0, 3),
    free_memory_bytes=st.sampled_from([0, 1 << 29, 1 << 30]),
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(statics, loads), min_size=1, max_size=12),
    st.lists(demands, min_size=1, max_size=4),
    st.sampled_from(["geode", "seed"]),
    st.integers(0, 9),
)
def test_the_filter_is_never_violated(
    nodes: list[tuple[Static, LoadReport]], wanted: list[Demand], name: str, seed: int
) -> None:
    geode = cluster(*[each for each, _ in nodes], seed=seed, config=GeodeConfig(metric=name))
    for number, (_, load) in enumerate(nodes):
        assert geode.report(kid(number), load, 5.0)
    for task, demand in enumerate(wanted):
        choice = geode.choose(demand, 10.0, f"t{task}")
        decision = choice.decision()
        fit = [
            number
            for number, (static, load) in enumerate(nodes)
            if fits(demand, static, load, geode, number)
        ]
        assert {each.kid for each in decision.candidates} == {kid(number) for number in fit}
        assert (choice.winner is None) == (not fit)
        assert choice.winner is None or choice.winner in {kid(number) for number in fit}
        assert len(decision.refused) + decision.refused_more == len(nodes) - len(fit)
        if choice.winner is not None:
            geode.dispatched(choice.winner, demand.work_gas, 10.0)


def fits(demand: Demand, static: Static, load: LoadReport, geode: Geode, number: int) -> bool:
    """The hard constraints, written out once more."""
    node = geode.node(kid(number))
    assert node is not None
    return (
        demand.node_class in ("", f"{static.compute:g}")
        and (static.gpu or not demand.needs_gpu)
        and demand.arch in ("", static.arch)
        and demand.cores <= load.slots
        and set(demand.labels) <= set(static.labels)
        and load.free_memory_bytes >= demand.memory_bytes
        and load.credits > node.flights
    )


def test_a_node_may_be_named_or_excluded() -> None:
    geode = equal(4)
    for _ in range(20):
        assert geode.choose(Demand(1.0, node="node-02"), 1.0, "a").winner == kid(2)
        assert geode.choose(Demand(1.0, node=kid(3)), 1.0, "b").winner == kid(3)
        rest = Demand(1.0, exclude=(kid(0), kid(1), kid(2)))
        assert geode.choose(rest, 1.0, "c").winner == kid(3)


def test_a_node_that_is_down_gets_nothing() -> None:
    geode = equal(2)
    geode.node_down(kid(1))
    assert geode.choose(WORK, 1.0, "a").winner == kid(0)
    geode.node_down(kid(0))
    choice = geode.choose(WORK, 1.0, "b")
    assert choice.winner is None and "no node may take it" in choice.decision().text()


def test_credits_are_used_up_by_own_dispatches_and_come_back_with_the_next_report() -> None:
    geode = equal(1)
    geode.report(kid(0), LoadReport(credits=2), 1.0)
    node = geode.node(kid(0))
    assert node is not None
    for left in (2, 1):
        assert node.credits == left
        assert geode.choose(WORK, 1.0, "a").winner == kid(0)
        geode.dispatched(kid(0), 1.0, 1.0)
    assert node.credits == 0
    assert geode.choose(WORK, 1.0, "b").winner is None
    geode.report(kid(0), LoadReport(credits=1), 2.0)
    assert geode.choose(WORK, 2.0, "c").winner == kid(0)


@settings(deadline=None)
@given(st.integers(0, 5), st.lists(st.sampled_from("dce"), max_size=30))
def test_credits_stay_between_0_and_the_grant(grant: int, steps: list[str]) -> None:
    geode = equal(1)
    geode.report(kid(0), LoadReport(credits=grant), 0.0)
    node = geode.node(kid(0))
    assert node is not None
    for step in steps:
        if step == "d":
            geode.dispatched(kid(0), 1.0, 1.0)
        else:
            geode.completed(kid(0), 1.0, 1.0, ended=step == "e")
        assert 0 <= node.credits <= grant
        geode.choose(WORK, 1.0, "t")


# --- own dispatches and age -------------------------------------------------------------------


def test_own_dispatches_since_the_report_count_and_the_report_replaces_them() -> None:
    geode = equal(1)
    geode.report(kid(0), LoadReport(queued_gas=50.0), 0.0)
    geode.dispatched(kid(0), 10.0, 1.0)
    geode.dispatched(kid(0), 10.0, 1.0)
    assert geode.queue_gas(kid(0), 1.0) == 70.0
    geode.completed(kid(0), 10.0, 1.0)
    assert geode.queue_gas(kid(0), 1.0) == 60.0
    geode.report(kid(0), LoadReport(queued_gas=35.0), 2.0)
    assert geode.queue_gas(kid(0), 2.0) == 35.0


def test_work_on_its_way_when_the_report_was_written_is_not_forgotten() -> None:
    geode = equal(1)
    geode.dispatched(kid(0), 40.0, 1.0)
    geode.report(kid(0), LoadReport(queued_gas=0.0), 1.1)
    assert geode.queue_gas(kid(0), 1.1) == 40.0


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.floats(0, 1e12)), max_size=40), st.data())
def test_the_own_dispatch_correction_returns_to_exactly_zero_at_idle(
    tasks: list[tuple[int, float]], data: st.DataObject
) -> None:
    geode = equal(3)
    for node, work in tasks:
        geode.dispatched(kid(node), work, 1.0)
        if data.draw(st.booleans()):
            geode.report(kid(node), LoadReport(), 1.0)
    for node, work in data.draw(st.permutations(tasks)):
        geode.completed(kid(node), work, 2.0)
    for node in range(3):
        assert geode.in_flight_gas(kid(node)) == 0.0
        geode.report(kid(node), LoadReport(), 3.0)
        assert geode.queue_gas(kid(node), 3.0) == 0.0


def test_a_part_done_leaves_the_task_in_flight() -> None:
    geode = equal(1)
    geode.dispatched(kid(0), 100.0, 0.0)
    geode.completed(kid(0), 60.0, 1.0, ended=False)
    assert geode.in_flight_gas(kid(0)) == 40.0
    geode.completed(kid(0), 40.0, 2.0)
    assert geode.in_flight_gas(kid(0)) == 0.0


def test_a_duplicate_result_is_counted_and_ignored() -> None:
    geode = equal(1)
    geode.dispatched(kid(0), 5.0, 0.0)
    geode.completed(kid(0), 5.0, 1.0)
    geode.completed(kid(0), 5.0, 1.0)
    geode.completed(kid(9), 5.0, 1.0)
    assert geode.strays == 2 and geode.queue_gas(kid(0), 1.0) == 0.0


def test_a_load_older_than_two_seconds_shrinks_to_the_class_mean() -> None:
    geode = equal(3)
    for node, queued in enumerate((0.0, 0.0, 3e12)):
        geode.report(kid(node), LoadReport(queued_gas=queued), 0.0)
    assert geode.queue_gas(kid(2), 2000.0) == 3e12
    trust = 2.718281828459045**-2
    expected = trust * 3e12 + (1 - trust) * 1e12
    assert geode.queue_gas(kid(2), 4000.0) == pytest.approx(expected)
    assert geode.queue_gas(kid(0), 60_000.0) == pytest.approx(1e12)


def test_what_was_seen_before_the_queue_turned_over_shrinks_too() -> None:
    geode = equal(3)
    for node, queued in enumerate((0.0, 0.0, 3e8)):  # 300 ms of work, 400 ms with the task
        geode.report(kid(node), LoadReport(queued_gas=queued), 0.0)
    fresh = {each.kid: each for each in geode.candidates(WORK, 350.0)}
    stale = {each.kid: each for each in geode.candidates(WORK, 1900.0)}
    assert fresh[kid(2)].queued_gas == 3e8
    assert stale[kid(2)].queued_gas == pytest.approx(1e8, rel=0.05)


def test_new_figures_of_a_node_keep_what_is_in_flight() -> None:
    geode = equal(1)
    geode.dispatched(kid(0), 5.0, 0.0)
    assert geode.node_up(kid(0), "node-00", "1", Static(cores=2), 1.0)
    assert geode.in_flight_gas(kid(0)) == 5.0
    geode.completed(kid(0), 5.0, 1.0)
    assert geode.in_flight_gas(kid(0)) == 0.0


# --- figures from elsewhere -------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [nan, inf, -inf, -1.0, 1e300])
def test_figures_that_make_no_sense_are_counted_and_change_nothing(wrong: float) -> None:
    geode = equal(2)
    before = geode.candidates(WORK, 1.0)
    assert not geode.report(kid(0), LoadReport(queued_gas=wrong), 0.0)
    assert not geode.report(kid(0), LoadReport(gas_per_s=wrong), 0.0)
    assert not geode.report(kid(0), LoadReport(slots=0), 0.0)
    geode.dispatched(kid(0), wrong, 0.0)
    geode.observed(kid(0), "1", PROGRAM, wrong, 0.0)
    geode.learn_gas_per_index(PROGRAM, "1", wrong)
    assert geode.refused_inputs == 6
    assert geode.candidates(WORK, 1.0) == before
    assert geode.gas_per_index(PROGRAM, "1") is None


def test_a_node_with_nonsense_figures_is_not_used() -> None:
    geode = equal(1)
    assert not geode.node_up(kid(1), "bad", "1", Static(compute=nan), 0.0)
    assert geode.nodes() == (kid(0),) and geode.refused_inputs == 1


def test_what_travels_is_checked_when_it_is_decoded() -> None:
    report = LoadReport(1.0, 2, 1)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(report), type=LoadReport) == report
    bad = msgspec.msgpack.encode(LoadReport(-1.0))
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(bad, type=LoadReport)
    bad = msgspec.msgpack.encode(Demand(compute=1.5))
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(bad, type=Demand)


extreme = st.sampled_from([0.0, 1e-300, 1e-6, 1e-3, 1.0, 1e9, 1e24, 1e300, inf, nan, -1.0])


@settings(deadline=None, max_examples=300)
@given(extreme, extreme, extreme, extreme, extreme, st.sampled_from([0.0, 1e24]))
def test_nobody_stops_a_node_by_what_it_reports(
    compute: float, bandwidth: float, latency: float, queued: float, rate: float, work: float
) -> None:
    geode = equal(1)
    static = Static(compute=compute, bandwidth_bps=bandwidth, latency_ms=latency)
    geode.node_up(kid(1), "node-01", "x", static, 0.0)
    geode.report(kid(1), LoadReport(queued_gas=queued, gas_per_s=rate), 0.0)
    geode.rtt(kid(1), latency)
    for _ in range(6):
        geode.observed(kid(1), "x", PROGRAM, rate, 0.0)
    demand = Demand(work, PROGRAM, compute=1.0, input_bytes=1 << 60)
    for now_ms in (0.0, 1e6):
        assert all(isfinite(each.cost) for each in geode.candidates(demand, now_ms))
        assert geode.choose(demand, now_ms, "t").winner is not None


# --- what was learned -------------------------------------------------------------------------


def test_five_observations_replace_geometry() -> None:
    geode = cluster(Static(compute=0.25, latency_ms=0.0))
    demand = Demand(1e8, PROGRAM, compute=1.0)
    for count in range(6):
        seen = geode.candidates(demand, 1.0)[0]
        assert seen.learned == (count >= 5)
        assert (seen.distance > 0) == (count < 5)
        geode.observed(kid(0), "0.25", PROGRAM, 3e8, 1.0)
    assert seen.slot_gas_per_s == pytest.approx(3e8)


def test_what_a_class_learned_holds_for_a_node_of_it_that_is_new() -> None:
    geode = equal(2)
    for _ in range(5):
        geode.observed(kid(0), "1", PROGRAM, 2e8, 1.0)
    rates = {each.kid: each for each in geode.candidates(Demand(1e8, PROGRAM), 1.0)}
    assert rates[kid(1)].learned and rates[kid(1)].slot_gas_per_s == pytest.approx(2e8)


def test_an_unmeasured_class_is_put_on_the_scale_of_the_measured_one() -> None:
    geode = cluster(Static(compute=1.0), Static(compute=0.5))
    for _ in range(5):
        geode.observed(kid(0), "1", PROGRAM, 2e8, 1.0)
    rates = {each.kid: each for each in geode.candidates(Demand(1e8, PROGRAM), 1.0)}
    assert rates[kid(1)].slot_gas_per_s == pytest.approx(1e8) and not rates[kid(1)].learned


def test_rates_are_an_ewma_of_weight_0_3() -> None:
    geode = equal(1)
    for _ in range(5):
        geode.observed(kid(0), "1", PROGRAM, 1e9, 1.0)
    geode.observed(kid(0), "1", PROGRAM, 2e9, 1.0)
    seen = geode.candidates(Demand(1e8, PROGRAM), 1000.0)[0]
    assert seen.slot_gas_per_s == pytest.approx(1.3e9)


def test_gas_per_index_is_kept_by_program_and_class_and_guessed_from_other_classes() -> None:
    geode = equal(1)
    assert geode.gas_per_index(PROGRAM, "slow") is None
    geode.learn_gas_per_index(PROGRAM, "fast", 100.0)
    assert geode.gas_per_index(PROGRAM, "slow") == 100.0
    geode.learn_gas_per_index(PROGRAM, "slow", 200.0)
    assert geode.gas_per_index(PROGRAM, "slow") == 200.0
    assert geode.gas_per_index(kid_of(b"other"), "slow") is None


# --- the choice -------------------------------------------------------------------------------


def test_with_a_fresh_view_the_least_predicted_finish_wins() -> None:
    geode = cluster(*[Static(compute=share) for share in (1.0, 0.5, 0.25)])
    geode.report(kid(0), LoadReport(queued_gas=4e8, gas_per_s=1e9), 10.0)
    for node in (1, 2):
        geode.report(kid(node), LoadReport(gas_per_s=1e9 / 2**node), 10.0)
    assert [each.kid for each in geode.candidates(WORK, 10.0)] == [kid(1), kid(2), kid(0)]
    for task in range(30):
        assert geode.choose(WORK, 10.0, f"{task}").winner == kid(1)


def test_an_old_view_is_not_trusted_to_name_the_best() -> None:
    geode = equal(16)
    geode.report(kid(3), LoadReport(queued_gas=1.0), 0.0)
    winners = {geode.choose(WORK, 60_000.0, f"{task}").winner for task in range(200)}
    assert len(winners) > 8


def test_draws_are_weighted_by_capacity() -> None:
    geode = cluster(*[Static(compute=1.0)] * 2, *[Static(compute=0.01)] * 14)
    hits = sum(geode.choose(WORK, 60_000.0, f"{i}").winner in (kid(0), kid(1)) for i in range(200))
    assert hits > 150


def test_missing_input_and_the_round_trip_cost_time() -> None:
    geode = cluster(*[Static(bandwidth_bps=8e6, latency_ms=0.0)] * 2)
    demand = Demand(1e6, input_bytes=1_000_000, held_by=(kid(1),))
    cost = {each.kid: each.finish_ms for each in geode.candidates(demand, 0.0)}
    assert cost[kid(1)] == pytest.approx(1.0)
    assert cost[kid(0)] == pytest.approx(1.0)  # own input is on the spot
    apart = {
        each.kid: each.finish_ms for each in geode.candidates(Demand(1e6, input_bytes=10**6), 0.0)
    }
    assert apart[kid(1)] == pytest.approx(1001.0)
    for _ in range(60):
        geode.rtt(kid(1), 7.0)
    assert geode.candidates(demand, 0.0)[1].finish_ms == pytest.approx(8.0)


def test_the_same_seed_gives_the_same_choices() -> None:
    def play(seed: int) -> list[Kid | None]:
        random = Random(seed)
        geode = cluster(*[Static(compute=0.1 * (1 + i)) for i in range(40)], seed=seed)
        winners = []
        for task in range(200):
            winner = geode.choose(WORK, 3.0 * task, f"{task}").winner
            assert winner is not None
            geode.dispatched(winner, WORK.work_gas, 3.0 * task)
            if random.random() < 0.3:
                geode.report(winner, LoadReport(queued_gas=random.random() * 1e9), 3.0 * task)
            winners.append(winner)
        return winners

    assert play(7) == play(7)
    assert play(7) != play(8)


def test_with_the_seeds_metric_one_of_the_three_best_is_taken() -> None:
    geode = cluster(
        *[Static(compute=share) for share in (1.0, 0.8, 0.6, 0.4, 0.2)],
        config=GeodeConfig(metric="seed"),
    )
    demand = Demand(1e8, compute=1.0)
    winners = {geode.choose(demand, 0.0, f"{task}").winner for task in range(100)}
    assert winners == {kid(0), kid(1), kid(2)}


def test_more_than_a_few_candidates_are_sampled_not_listed() -> None:
    geode = equal(100)
    decision = geode.choose(WORK, 10_000.0, "a").decision()
    assert len(decision.candidates) == 2 and decision.candidates_more == 98
    assert all(each.sampled for each in decision.candidates)


def test_the_cost_is_finite_whatever_is_asked() -> None:
    geode = cluster(Static(compute=0.01), config=GeodeConfig(beta=20.0, weight_compute=100.0))
    seen = geode.candidates(Demand(1e24, compute=1.0), 1e12)[0]
    assert isfinite(seen.cost) and isfinite(seen.finish_ms) and seen.slot_gas_per_s > 0


# --- why --------------------------------------------------------------------------------------


def decided() -> tuple[Geode, Choice]:
    geode = cluster(Static(gpu=True), Static(compute=0.5, gpu=True), Static())
    return geode, geode.choose(Demand(1e8, needs_gpu=True), 100.0, "task-7")


def test_why_tells_candidates_refusals_winner_runner_up_and_in_the_end_the_regret() -> None:
    geode, choice = decided()
    decision = geode.why("task-7")
    assert decision is not None and decision == choice.decision()
    assert {each.alias for each in decision.candidates} == {"node-00", "node-01"}
    assert decision.winner == kid(0) and decision.runner_up == kid(1)
    assert [(each.alias, each.reason) for each in decision.refused] == [("node-02", "no GPU")]
    assert geode.refusals(Demand(needs_gpu=True), 100.0) == (("node-02", "no GPU"),)
    assert decision.candidates[0].age_ms == 100.0 and decision.regret_ms is None
    geode.ended("task-7", 1000.0)
    ended = geode.why("task-7")
    assert ended is not None
    second = ended.candidate(kid(1))
    assert second is not None
    assert ended.actual_ms == 1000.0
    assert ended.regret_ms == pytest.approx(1000.0 - second.finish_ms)
    for words in ("node-00", "runner-up node-01", "refused node-02: no GPU", "regret"):
        assert words in ended.text()


def test_a_decision_travels_and_prints_as_json() -> None:
    _, choice = decided()
    decision = choice.decision()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(decision), type=Decision) == decision
    plain = json.loads(json.dumps(decision.to_dict()))
    assert plain["task"] == "task-7" and plain["candidates"][0]["alias"] == "node-00"
    assert plain["refused"] == [{"alias": "node-02", "reason": "no GPU"}]


def test_the_ring_of_decisions_is_bounded_and_forgets_the_oldest() -> None:
    geode = equal(3, decisions=10)
    for task in range(25):
        geode.choose(WORK, 1.0, f"{task}")
    assert geode.why("14") is None and geode.why("15") is not None
    assert geode.decisions(3) == ("24", "23", "22") and len(geode.decisions(99)) == 10


def test_mitosis_keeps_its_own_decisions() -> None:
    geode = equal(3)
    decision = geode.record("job/3", WORK, kid(2), 5.0, note="shard 3 of 16")
    assert decision.winner == kid(2) and decision.runner_up in (kid(0), kid(1))
    assert geode.why("job/3") == decision and "shard 3 of 16" in decision.text()


def test_a_refusal_names_the_first_constraint_that_is_missed() -> None:
    node = cluster(Static(arch="aarch64")).node(kid(0))
    assert node is not None
    assert refusal(node, Demand(arch="x86_64")) == "architecture aarch64, not x86_64"
    assert refusal(node, Demand(cores=2)) == "1 cores, 2 needed"
    assert refusal(node, Demand(labels=("ssd",))) == "lacks the label ssd"
    assert refusal(node, Demand()) is None


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        ("site=a", None), ("site", None), ("!site=b", None), ("!ssd", None), ("cam", None),
        ("arch=aarch64", None), ("gpu", None), ("class=1", None),
        ("site=b", "has site=a, not site=b"), ("rack=r1", "lacks the label rack=r1"),
        ("!site", "has the label site"), ("!cam", "has the label cam"),
        ("cam=front", "lacks the label cam=front"), ("class=2", "has class=1, not class=2"),
        ("!gpu", "has the label gpu"),
    ],
)  # fmt: skip
def test_a_wish_is_met_by_labels_and_by_what_a_node_is(wish: str, reason: str | None) -> None:
    geode = cluster(Static(arch="aarch64", gpu=True, labels=("cam", "site=a")))
    node = geode.node(kid(0))
    assert node is not None and node.node_class == "1"
    assert refusal(node, Demand(labels=(wish,))) == reason
    assert refusal(node, Demand(labels=("cam", wish))) == reason
    assert (geode.choose(Demand(labels=(wish,)), 1.0, "t").winner is None) == (reason is not None)


def test_a_node_that_tells_other_labels_is_chosen_by_those() -> None:
    geode = cluster(Static(labels=("site=a",)), Static(labels=("site=b",)))
    wish = Demand(work_gas=1.0, labels=("site=b",))
    assert geode.choose(wish, 1.0, "before").winner == kid(1)
    for number, site in enumerate("ba"):
        geode.node_up(kid(number), f"node-{number:02}", "1", Static(labels=(f"site={site}",)), 2.0)
    assert geode.choose(wish, 2.0, "after").winner == kid(0)
