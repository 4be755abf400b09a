"""The ledger, driven by a machine of rules against a model that knows which blocks are done."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from manifold.kernel.scheduler import blocks
from manifold.kernel.scheduler.ledger import Job, Shard
from manifold.kernel.scheduler.messages import JobSpec
from manifold.vm.kid import kid_of
from manifold.vm.runtime.results import Partial

NODES = [kid_of(b"node %d" % n) for n in range(3)]


def job_of(total: int) -> Job:
    spec = JobSpec(kid_of(b"program"), 0, total, "count")
    count = blocks.count(spec)
    return Job("J-0000000000000000", spec, b"", 0.0, count, [None] * count)


class LedgerMachine(RuleBasedStateMachine):
    """Owners' moves, in any order; results carry their block's number."""

    @initialize(total=st.integers(1, 1500))
    def begin(self, total: int) -> None:
        self.job = job_of(total)
        self.job.cut(0, self.job.blocks)
        self.attempts = 0
        self.seen: set[int] = set()
        self.now_ms = 0.0

    def pick(self, number: int, *, assigned: bool) -> Shard | None:
        fitting = [s for s in self.job.shards.values() if (s.node is not None) == assigned]
        return fitting[number % len(fitting)] if fitting else None

    @rule(number=st.integers(0, 9), node=st.sampled_from(NODES))
    def assign(self, number: int, node: str) -> None:
        shard = self.pick(number, assigned=False)
        if shard is not None:
            self.attempts += 1
            self.job.assign(shard, kid_of(node.encode()), self.attempts, self.now_ms)
            assert shard.attempt == self.attempts and shard.first == shard.counted

    @rule(number=st.integers(0, 9), back=st.integers(0, 5), length=st.integers(0, 40))
    def count(self, number: int, back: int, length: int) -> None:
        """A report that begins up to five blocks before what is counted, or behind a gap."""
        shard = self.pick(number, assigned=True)
        if shard is None:
            return
        first = max(0, shard.counted - back) if back < 4 else shard.counted + back
        said = range(first, first + length)
        before, at, owed = self.job.counted, shard.counted, shard.owed
        fresh = self.job.count(shard, first, [Partial(block) for block in said])
        expected = [b for b in said if at <= b < at + owed] if first <= at else []
        assert [result.emitted for result in fresh if isinstance(result, Partial)] == expected
        assert self.job.counted == before + len(expected)
        assert not self.seen.intersection(expected), "L1"
        self.seen.update(expected)

    @rule(number=st.integers(0, 9), boundary=st.integers(0, 600))
    def shrink(self, number: int, boundary: int) -> None:
        shard = self.pick(number, assigned=True)
        if shard is None:
            return
        last = shard.last
        rest = self.job.shrink(shard, boundary)
        if rest is not None:
            assert (rest.first, rest.last) == (max(boundary, shard.counted), last)
            assert rest.node is None and rest.number in self.job.pending

    @rule(number=st.integers(0, 9))
    def release(self, number: int) -> None:
        shard = self.pick(number, assigned=True)
        if shard is not None:
            node = shard.node
            self.job.release(shard)
            assert shard.node is None and shard.avoid == node

    @precondition(lambda self: hasattr(self, "job") and self.job.counted == self.job.blocks)
    @rule()
    def done(self) -> None:
        assert not self.job.shards and not self.job.pending
        assert self.job.done == blocks.total(self.job.spec)
        for block, result in enumerate(self.job.results):
            assert isinstance(result, Partial) and result.emitted == block

    @invariant()
    def balances(self) -> None:
        if hasattr(self, "job"):
            self.job.check()
            pending = [s.number for s in self.job.shards.values() if s.node is None]
            assert sorted(self.job.pending) == sorted(pending)
            done = sum(
                high - low for low, high in (blocks.positions(self.job.spec, b) for b in self.seen)
            )
            assert self.job.done == done


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_an_attempt_number_is_not_used_again() -> None:
    job = job_of(4)
    shard = job.cut(0, 4)
    job.assign(shard, NODES[0], 7, 0.0)
    job.release(shard)
    with pytest.raises(AssertionError, match="L4"):
        job.assign(shard, NODES[1], 7, 0.0)


def test_a_broken_ledger_is_noticed() -> None:
    job = job_of(10)
    shard = job.cut(0, 10)
    shard.last = 8
    with pytest.raises(AssertionError, match="8 of 10"):
        job.check()
    shard.last = 10
    job.results[3] = Partial()
    with pytest.raises(AssertionError, match="L1"):
        job.check()


def test_a_shard_that_gave_less_than_was_asked_is_not_asked_again_at_once() -> None:
    job = job_of(10)
    shard = job.cut(0, 10)
    job.assign(shard, NODES[0], 1, 0.0)
    shard.shrinking = 4
    assert job.shrink(shard, 10) is None
    assert shard.refused_at == shard.counted and shard.shrinking == -1


def test_the_speed_follows_gas_over_busy_time_and_overtaken_reports_do_not_count() -> None:
    job = job_of(10)
    shard = job.cut(0, 10)
    job.assign(shard, NODES[0], 1, 1000.0)
    shard.gauge(100.0, 50.0, 1060.0)
    assert shard.speed == 2.0
    shard.gauge(300.0, 150.0, 1160.0)
    assert shard.speed == pytest.approx(2.0)
    shard.gauge(200.0, 100.0, 1170.0)
    assert shard.gauged_gas == 300.0
    for step in range(1, 9):  # five times slower
        shard.gauge(300.0 + 20.0 * step, 150.0 + 50.0 * step, 1160.0 + 50.0 * step)
    assert 0.4 < shard.speed < 0.7
