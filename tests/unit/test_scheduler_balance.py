"""Mitosis and lazy splitting: what is cut, for whom, and when it is worth it."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold.kernel.config import GeodeConfig
from manifold.kernel.geode.features import Static
from manifold.kernel.geode.geode import Geode, Ranked
from manifold.kernel.geode.messages import Demand
from manifold.kernel.scheduler import balance, blocks
from manifold.kernel.scheduler.ledger import Job, Shard
from manifold.kernel.scheduler.messages import JobSpec
from manifold.vm.kid import Kid, kid_of

NODES = [kid_of(b"node %d" % n) for n in range(24)]
ME = NODES[0]
GRAIN_MS = 20.0
GAS_PER_MS = 1e6  # of a slot with compute 1.0, before anything was measured


def ranking(*computes: float, cores: int = 1) -> list[Ranked]:
    """Nodes 0, 1, … with slots of these speeds, in cores of the reference machine."""
    geode = Geode(ME, GeodeConfig(), Random(1))
    for kid, compute in zip(NODES, computes, strict=False):
        static = Static(cores=cores, compute=compute, latency_ms=0.3)
        geode.node_up(kid, f"n-{kid[2:6]}", "c", static, 0.0)
    return geode.ranked(Demand(work_gas=1e6), 0.0)


def job_of(count: int) -> Job:
    spec = JobSpec(kid_of(b"program"), 0, count, "count")
    assert blocks.count(spec) == count
    return Job("J-0000000000000000", spec, b"", 0.0, count, [None] * count)


def running(
    job: Job, first: int, last: int, node: Kid, *, done: int = 0, ms_per_block: float = 10.0
) -> Shard:
    """A shard that has computed `done` blocks at a steady speed until now, and told it."""
    shard = job.cut(first, last)
    job.assign(shard, node, 1 + first, 0.0)
    shard.acknowledged = True
    now_ms = done * ms_per_block
    job.count(shard, first, [object()] * done)  # type: ignore[list-item]
    gas = done * BLOCK_GAS
    job.gas, job.measured = job.gas + gas, job.measured + done
    if done:
        shard.gauge(gas, now_ms, now_ms)
    return shard


BLOCK_GAS = 10 * GAS_PER_MS  # 10 ms on a slot of 1.0


# -- the start ------------------------------------------------------------------------------------


@given(
    owed=st.integers(1, 512),
    rates=st.lists(st.floats(0.05, 4.0), min_size=1, max_size=24),
    gas=st.one_of(st.none(), st.floats(1.0, 1e12)),
)
def test_a_proportional_start_covers_the_shard_exactly_and_in_order(
    owed: int, rates: list[float], gas: float | None
) -> None:
    job = job_of(owed)
    shard = job.cut(0, owed)
    slots = sorted(
        [(NODES[n], rate * 1e9) for n, rate in enumerate(rates)], key=lambda slot: -slot[1]
    )
    pieces = balance.proportional(shard, slots, gas, GRAIN_MS, ME)
    at = 0
    for _, first, last in pieces:
        assert first == at and last > first
        at = last
    assert at == owed
    assert len(pieces) <= len(slots)


def test_pieces_are_in_proportion_to_the_rates() -> None:
    job = job_of(400)
    slots = [(NODES[0], 3e9), (NODES[1], 1e9)]
    pieces = balance.proportional(job.cut(0, 400), slots, 1e9, GRAIN_MS, NODES[2])
    assert pieces == [(NODES[0], 0, 300), (NODES[1], 300, 400)]


@given(owed=st.integers(1, 300), block_ms=st.floats(0.01, 50.0))
def test_no_more_slots_are_used_than_keep_each_piece_above_the_grain(
    owed: int, block_ms: float
) -> None:
    slots = [(kid, 1e9) for kid in NODES[1:]]
    job = job_of(owed)
    pieces = balance.proportional(job.cut(0, owed), slots, block_ms * 1e6, GRAIN_MS, ME)
    assert len(pieces) == 1 or owed * block_ms / len(pieces) >= GRAIN_MS * 0.999


def test_what_one_slot_does_in_a_grain_stays_at_home() -> None:
    job = job_of(100)
    slots = [(NODES[1], 4e9), (ME, 1e9)]
    assert balance.proportional(job.cut(0, 100), slots, 1e3, GRAIN_MS, ME) == [(ME, 0, 100)]


def test_no_slots_take_nothing() -> None:
    assert balance.proportional(job_of(9).cut(0, 9), [], 1e6, GRAIN_MS, ME) == []


def test_a_busy_slot_counts_half_and_a_free_one_whole() -> None:
    (node,) = ranking(1.0, cores=2)
    slots = balance.slots([node], {node.kid: 1})
    assert [rate / node.slot_gas_per_s for _, rate in slots] == [1.0, 0.5]


# -- one shard ------------------------------------------------------------------------------------


def test_an_idle_slot_is_chosen_by_when_it_would_be_done() -> None:
    ranked = ranking(0.25, 1.0, 0.5)
    assert balance.idle_node(ranked, {}, 1e9, ME) == NODES[1]
    assert balance.idle_node(ranked, {NODES[1]: 1}, 1e9, ME) == ME, "half as fast is as good"
    assert balance.idle_node(ranked, {NODES[1]: 1, ME: 1}, 1e9, ME) == NODES[2]
    assert balance.idle_node(ranked, {kid: 1 for kid in NODES}, 1e9, ME) is None


def test_a_short_shard_does_not_travel_for_a_little_speed() -> None:
    ranked = ranking(0.6, 1.0)
    assert balance.idle_node(ranked, {}, 1e9, ME) == ME


# -- lazy splitting -------------------------------------------------------------------------------


def steals(job: Job, ranked: list[Ranked], busy: dict[Kid, int], now_ms: float) -> list[
    tuple[Shard, int]
]:  # fmt: skip
    return balance.steals(job, ranked, busy, BLOCK_GAS, GRAIN_MS, now_ms)


def test_an_idle_slot_as_fast_takes_half_of_what_is_left() -> None:
    job = job_of(100)
    victim = running(job, 0, 100, NODES[1], done=20)
    ((shard, last),) = steals(job, ranking(1.0, 1.0), {NODES[1]: 1}, 200.0)
    assert shard is victim
    assert 58 <= last <= 62


def test_a_faster_thief_takes_more() -> None:
    job = job_of(100)
    running(job, 0, 100, NODES[1], done=20, ms_per_block=10.0)
    ((_, last),) = steals(job, ranking(3.0, 1.0), {NODES[1]: 1}, 200.0)
    assert 37 <= last <= 42


def test_nothing_is_stolen_for_less_than_a_grain() -> None:
    job = job_of(100)
    running(job, 0, 100, NODES[1], done=97)
    assert steals(job, ranking(1.0, 1.0), {NODES[1]: 1}, 970.0) == []


def test_nothing_is_stolen_for_less_than_a_fiftieth_of_the_time_the_job_took() -> None:
    job = job_of(500)
    running(job, 0, 500, NODES[1], done=488)  # 120 ms left of 5 s: half of it saves 60
    assert len(steals(job, ranking(1.0, 1.0), {NODES[1]: 1}, 4880.0)) == 0
    job.started_ms = 4000.0
    assert len(steals(job, ranking(1.0, 1.0), {NODES[1]: 1}, 4880.0)) == 1


@settings(max_examples=60)
@given(
    idle=st.integers(0, 6),
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=8),
    done=st.integers(0, 1),
    shrinking=st.integers(0, 3),
)
def test_never_more_steals_than_idle_slots_and_none_of_a_block_that_has_begun(
    idle: int, lengths: list[int], done: int, shrinking: int
) -> None:
    job = job_of(sum(lengths))
    at = 0
    shards = []
    for number, length in enumerate(lengths):
        shards.append(running(job, at, at + length, NODES[10 + number], done=done))
        at += length
    for shard in shards[:shrinking]:
        shard.shrinking = shard.last - 1
    ranked = ranking(*[1.0] * 18)
    busy = {kid: 1 for kid in NODES[idle:]}
    found = steals(job, ranked, busy, 10.0 * done)
    outstanding = min(shrinking, len(shards))
    assert len(found) <= max(idle - outstanding, 0 if outstanding or idle else 1)
    assert len({shard.number for shard, _ in found}) == len(found)
    for shard, last in found:
        assert shard.shrinking < 0 and shard.counted < last < shard.last


def test_a_shard_that_was_only_just_assigned_is_left_alone() -> None:
    job = job_of(100)
    running(job, 0, 100, NODES[1]).acknowledged = False
    assert steals(job, ranking(1.0, 1.0), {NODES[1]: 1}, 9.0) == []
    assert steals(job, ranking(1.0, 1.0), {NODES[1]: 1}, 11.0)


def test_without_any_idea_of_a_blocks_cost_nothing_is_stolen() -> None:
    job = job_of(100)
    running(job, 0, 100, NODES[1])
    assert balance.steals(job, ranking(1.0, 1.0), {NODES[1]: 1}, None, GRAIN_MS, 300.0) == []


def test_a_straggler_sheds_what_it_will_not_come_to_though_nobody_is_idle() -> None:
    job = job_of(200)
    running(job, 0, 100, NODES[1], done=50)
    slow = running(job, 100, 200, NODES[2], done=1, ms_per_block=500.0)
    ((shard, last),) = steals(job, ranking(1.0, 1.0, 1.0), {kid: 1 for kid in NODES}, 500.0)
    assert shard is slow
    assert slow.counted < last <= slow.counted + 5


def test_a_straggler_whose_blocks_are_short_waits_for_a_slot_that_is_idle() -> None:
    job = job_of(200)
    running(job, 0, 100, NODES[1], done=50)
    running(job, 100, 200, NODES[2], done=10, ms_per_block=50.0)
    ranked = ranking(1.0, 1.0, 1.0)
    assert steals(job, ranked, {kid: 1 for kid in NODES}, 500.0) == []
    assert steals(job, ranked, {kid: 1 for kid in NODES[1:]}, 500.0)


def test_shards_that_end_together_are_left_alone() -> None:
    job = job_of(200)
    running(job, 0, 100, NODES[1], done=50)
    running(job, 100, 200, NODES[2], done=45)
    assert steals(job, ranking(1.0, 1.0, 1.0), {kid: 1 for kid in NODES}, 500.0) == []


def test_a_demand_that_excludes_more_than_one_keeps_them_all() -> None:
    geode = Geode(ME, GeodeConfig(), Random(1))
    spec = JobSpec(kid_of(b"p"), 0, 9, "sum", demand=Demand(exclude=(NODES[3],), node_class="c"))
    job = Job("J-0000000000000000", spec, b"", 0.0, 9, [None] * 9)
    wanted = balance.demand(geode, job, 3, NODES[4])
    assert wanted.exclude == (NODES[3], NODES[4]) and wanted.node_class == "c"
    assert balance.demand(geode, job, 3).exclude == (NODES[3],)


def test_a_job_is_possible_where_a_node_is_only_busy_and_not_where_none_fits() -> None:
    geode = Geode(ME, GeodeConfig(), Random(1))
    geode.node_up(ME, "here", "c", Static(), 0.0)
    assert balance.capable(geode, Demand())
    assert not balance.capable(geode, Demand(needs_gpu=True))
    assert balance.reasons(geode, Demand(needs_gpu=True), 0.0) == "here: no GPU"


def test_of_a_label_that_nobody_has_it_is_said_what_there_is() -> None:
    geode = Geode(ME, GeodeConfig(), Random(1))

    def why(*wishes: str) -> str:
        return balance.reasons(geode, Demand(labels=wishes), 0.0)

    assert why("site=c") == "no node is alive"
    geode.node_up(ME, "here", "c", Static(labels=("site=a", "ssd")), 0.0)
    geode.node_up(NODES[1], "there", "c", Static(labels=("site=b",)), 0.0)
    assert why("site=c") == "none has site=c; there is site=a, site=b"
    assert why("rack") == "none has rack; no node has a label rack"
    assert why("!site") == "every node has site; there is site=a, site=b"
    assert why("site=b", "ssd") == "here: has site=a, not site=b; there: lacks the label ssd"


@pytest.mark.parametrize("quiet_ms", [100.0, 350.0])
def test_a_shard_that_is_quiet_for_a_moment_is_taken_to_go_on(quiet_ms: float) -> None:
    job = job_of(100)
    shard = running(job, 0, 100, NODES[1], done=20)
    victim = balance.Victim(shard, ranking(1.0, 1.0)[1], BLOCK_GAS, 200.0 + quiet_ms)
    assert victim.left_ms == pytest.approx(800.0 - quiet_ms, rel=0.02)
    assert victim.takeable == 80 - int(quiet_ms / 10) - 1
