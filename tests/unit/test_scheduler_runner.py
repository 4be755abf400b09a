"""The runner: go-back-N over blocks, admission, time slices, shrinking."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold.kernel.config import SchedulerConfig
from manifold.kernel.effects import Effect, Notify, Send
from manifold.kernel.process.messages import Fault
from manifold.kernel.scheduler import runner as module
from manifold.kernel.scheduler.messages import (
    ATTEMPT_BITS,
    AbortRun,
    AssignShard,
    DropShard,
    JobSpec,
    LimitRun,
    NeedProgram,
    Rejected,
    Report,
    ReportAck,
    Shrink,
    Shrunk,
    StartRun,
)
from manifold.kernel.scheduler.runner import Runner
from manifold.vm.kid import kid_of
from manifold.vm.runtime.results import Partial

ME, OWNER, OTHER = kid_of(b"me"), kid_of(b"owner"), kid_of(b"other")
IR = b"a program"
SPEC = JobSpec(kid_of(IR), 0, 400, "count")
JOB, JOB2 = "J-0000000000000001", "J-0000000000000002"


def runner_of(slots: int = 1, **config: Any) -> Runner:
    return Runner(ME, SchedulerConfig(**config), slots)


def assignment(shard: int = 0, attempt: int = 1, first: int = 0, last: int = 100, **more: Any) -> (
    AssignShard
):  # fmt: skip
    message = AssignShard(JOB, shard, attempt, SPEC, first, last, IR)
    return msgspec.structs.replace(message, **more)


def sent(effects: Sequence[Effect], kind: type) -> list[Any]:
    return [e.message for e in effects if isinstance(e, Send) and isinstance(e.message, kind)]


def told(effects: Sequence[Effect], kind: type) -> list[Any]:
    return [e.event for e in effects if isinstance(e, Notify) and isinstance(e.event, kind)]


def results(first: int, count: int) -> tuple[Partial, ...]:
    return tuple(Partial(block) for block in range(first, first + count))


def numbers(report: Report) -> list[int]:
    return [each.emitted for each in report.results if isinstance(each, Partial)]


def started(runner: Runner, *messages: AssignShard, now_ms: float = 0.0) -> list[StartRun]:
    found = []
    for message in messages or (assignment(),):
        found += told(runner.receive(OWNER, message, now_ms), StartRun)
    return found


def test_an_assignment_starts_a_run_where_a_slot_is_free() -> None:
    runner = runner_of()
    (run,) = started(runner)
    assert (run.worker, run.first, run.last, run.ir) == (0, 0, 100, IR)
    assert runner.load().free_slots == 0


def test_an_assignment_that_comes_twice_starts_once_and_is_answered_with_where_it_stands() -> None:
    runner = runner_of()
    started(runner)
    again = runner.receive(OWNER, assignment(), 1.0)
    assert not told(again, StartRun) and len(sent(again, Report)) == 1


def test_a_newer_attempt_replaces_an_older_one_and_never_the_other_way_round() -> None:
    runner = runner_of()
    (old,) = started(runner)
    effects = runner.receive(OWNER, assignment(attempt=2, first=10), 1.0)
    assert [abort.run for abort in told(effects, AbortRun)] == [old.run]
    assert [run.first for run in told(effects, StartRun)] == [10]
    assert runner.receive(OWNER, assignment(attempt=1), 2.0) == []


def test_a_late_copy_of_an_assignment_does_not_begin_again_what_is_over() -> None:
    runner = runner_of()
    started(runner)
    runner.receive(OWNER, DropShard(JOB, 0, 1), 1.0)
    assert runner.receive(OWNER, assignment(), 2.0) == []
    assert runner.held == 0


def test_two_owners_of_one_job_do_not_disturb_each_other() -> None:
    runner = runner_of(slots=2)
    (one,) = started(runner)
    (two,) = told(runner.receive(OTHER, assignment(attempt=1, first=50), 1.0), StartRun)
    effects = runner.run_blocks(two.worker, two.run, 50, results(50, 2), 1.0, 1.0, 2.0)
    assert [e.to for e in effects if isinstance(e, Send)] == [OTHER]
    runner.receive(OTHER, DropShard(JOB, 0, 1), 3.0)
    assert [attempt.owner for attempt in runner.attempts()] == [OWNER]
    assert runner.run_blocks(one.worker, one.run, 0, results(0, 1), 1.0, 1.0, 4.0)


def test_a_program_that_is_not_here_is_asked_for_and_kept() -> None:
    runner = runner_of(slots=2)
    assert sent(runner.receive(OWNER, assignment(ir=b""), 0.0), NeedProgram)
    assert runner.held == 0
    assert started(runner)
    assert told(runner.receive(OWNER, assignment(shard=1, ir=b""), 1.0), StartRun)


def test_a_program_with_another_kid_than_claimed_is_the_jobs_fault() -> None:
    runner = runner_of()
    effects = runner.receive(OWNER, assignment(ir=b"another"), 0.0)
    (report,) = sent(effects, Report)
    assert report.fault.code == "invalid_program" and not told(effects, StartRun)


def test_what_does_not_fit_is_rejected_and_nothing_of_it_stays() -> None:
    runner = runner_of(queue=2)
    started(runner, *(assignment(shard=n) for n in range(3)))
    (rejected,) = sent(runner.receive(OWNER, assignment(shard=9), 1.0), Rejected)
    assert rejected.retry_ms > 0 and runner.held == 3
    runner.cordoned = True
    runner.receive(OWNER, DropShard(JOB, 0, 1), 2.0)
    assert sent(runner.receive(OWNER, assignment(shard=9, attempt=2), 3.0), Rejected)


def test_what_waits_is_weighed_by_what_its_program_took_here_before() -> None:
    runner = runner_of()
    (run,) = started(runner, assignment(last=10))
    runner.run_blocks(0, run.run, 0, results(0, 10), 1000.0, 10.0, 10.0)
    started(runner, assignment(shard=1, attempt=2, last=50), now_ms=11.0)
    assert runner.load().queued_gas == pytest.approx(50 * 100.0)
    runner.receive(OWNER, DropShard(JOB, 0, 1), 12.0)
    runner.receive(OWNER, DropShard(JOB, 1, 2), 12.0)
    assert runner.load().queued_gas == 0.0


def test_results_stay_until_they_are_acknowledged_and_what_is_lost_is_sent_again() -> None:
    runner = runner_of()
    (run,) = started(runner)
    (one,) = sent(runner.run_blocks(0, run.run, 0, results(0, 3), 1.0, 1.0, 20.0), Report)
    (two,) = sent(runner.run_blocks(0, run.run, 3, results(3, 2), 1.0, 1.0, 80.0), Report)
    assert (numbers(one), numbers(two)) == ([0, 1, 2], [3, 4])
    runner.receive(OWNER, ReportAck(JOB, 0, 1, 2), 90.0)
    late = [effect for ms in range(100, 800, 100) for effect in runner.tick(ms)]
    again = next(report for report in sent(late, Report) if report.results)
    assert (again.first, numbers(again)) == (2, [2, 3, 4])


def test_a_gap_that_the_owner_tells_of_is_repaired_at_once() -> None:
    runner = runner_of()
    (run,) = started(runner)
    runner.run_blocks(0, run.run, 0, results(0, 3), 1.0, 1.0, 20.0)
    runner.run_blocks(0, run.run, 3, results(3, 2), 1.0, 1.0, 80.0)
    (again,) = sent(runner.receive(OWNER, ReportAck(JOB, 0, 1, 0, True), 85.0), Report)
    assert numbers(again) == [0, 1, 2, 3, 4]
    assert not runner.receive(OWNER, ReportAck(JOB, 0, 1, 0, True), 86.0), "its repair is under way"


def test_acknowledgements_in_any_order_and_number_only_go_forward() -> None:
    runner = runner_of()
    (run,) = started(runner)
    runner.run_blocks(0, run.run, 0, results(0, 9), 1.0, 1.0, 20.0)
    for counted in (5, 2, 5, 9, 4):
        runner.receive(OWNER, ReportAck(JOB, 0, 1, counted), 30.0)
    (attempt,) = runner.attempts()
    assert (attempt.base, len(attempt.results), attempt.flying_bytes) == (9, 0, 0)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_every_block_arrives_whatever_is_lost_doubled_or_overtaken(data: st.DataObject) -> None:
    """The owner's end is modelled: it counts what continues its prefix, and acknowledges."""
    runner = runner_of()
    (run,) = started(runner, assignment(last=40))
    counted, computed, now_ms = 0, 0, 0.0
    network: list[Any] = []
    for _ in range(400):
        now_ms += data.draw(st.sampled_from([1.0, 30.0, 110.0]))
        effects = runner.tick(now_ms)
        if computed < 40 and data.draw(st.booleans()):
            fresh = min(data.draw(st.integers(1, 7)), 40 - computed)
            made = results(computed, fresh)
            effects += runner.run_blocks(0, run.run, computed, made, 1.0, 1.0, now_ms)
            computed += fresh
            if computed == 40:
                effects += runner.run_ended(0, run.run, None, now_ms)
        network += [m for m in sent(effects, Report) if data.draw(st.integers(0, 3))]
        while data.draw(st.booleans()) and network:
            message = network.pop(data.draw(st.integers(0, len(network) - 1)))
            if data.draw(st.integers(0, 5)) == 0:
                network.append(message)
            if isinstance(message, Report):
                fit = numbers(message)[max(0, counted - message.first) :]
                missing = message.first > counted
                counted += 0 if missing else len(fit)
                network.append(ReportAck(JOB, 0, 1, counted, missing))
            else:
                effects = runner.receive(OWNER, message, now_ms)
                network += sent(effects, Report)
        if not runner.held:
            break
    for _ in range(60):  # nothing is lost any more
        now_ms += 100.0
        for report in sent(runner.tick(now_ms), Report):
            if report.first <= counted:
                counted = max(counted, report.first + len(report.results))
            if computed == 40 or report.results:
                ack = ReportAck(JOB, 0, 1, counted, report.first > counted)
                for more in sent(runner.receive(OWNER, ack, now_ms), Report):
                    counted = max(counted, more.first + len(more.results))
    if computed == 40:
        assert counted == 40


def test_large_results_go_in_parts_and_within_a_window() -> None:
    runner = runner_of()
    (run,) = started(runner)
    large = tuple(Partial(1, values=bytes(1 << 20)) for _ in range(12))
    reports = sent(runner.run_blocks(0, run.run, 0, large, 1.0, 1.0, 20.0), Report)
    for ms in range(100, 500, 100):
        reports += sent(runner.tick(ms), Report)
    size = sum(len(r.values) for report in reports for r in report.results)
    assert size <= module.WINDOW_BYTES + module.REPORT_BYTES_MAX
    assert all(len(report.results) <= 2 for report in reports)
    got = 0
    pending = reports
    while pending:
        report = pending.pop(0)
        got = max(got, report.first + len(report.results))
        pending += sent(runner.receive(OWNER, ReportAck(JOB, 0, 1, got), 600.0 + got * 60), Report)
    assert got == 12


def test_resends_to_an_owner_that_does_not_answer_become_rarer() -> None:
    runner = runner_of()
    (run,) = started(runner)
    runner.run_blocks(0, run.run, 0, results(0, 3), 1.0, 1.0, 20.0)
    times = [
        ms
        for ms in range(100, 20_000, 100)
        if any(report.results for report in sent(runner.tick(ms), Report))
    ]
    assert len(times) <= 6
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert gaps == sorted(gaps)


def test_an_owner_that_never_answers_is_given_up() -> None:
    runner = runner_of()
    started(runner)
    effects = [effect for ms in range(0, 32_000, 500) for effect in runner.tick(ms)]
    assert runner.held == 0 and told(effects, AbortRun)


def test_the_death_of_an_owners_process_ends_what_that_process_assigned_and_no_more() -> None:
    runner = runner_of(slots=2)
    first, second = 1 << ATTEMPT_BITS | 5, 2 << ATTEMPT_BITS | 1
    started(runner, assignment(attempt=first), assignment(shard=1, attempt=second))
    effects = runner.drop_owner(OWNER, 1, 10.0)
    assert len(told(effects, AbortRun)) == 1
    assert [attempt.attempt for attempt in runner.attempts()] == [second]


def test_runs_that_others_wait_for_yield_after_their_quantum_and_go_on_later() -> None:
    runner = runner_of()
    (run,) = started(runner)
    started(runner, assignment(shard=1, last=5))
    assert not told(runner.tick(90.0), LimitRun)
    (limit,) = told(runner.tick(110.0), LimitRun)
    assert (limit.run, limit.last) == (run.run, 0)
    assert not told(runner.tick(120.0), LimitRun), "once is enough"
    assert not sent(runner.run_limited(0, run.run, 7, 121.0), Shrunk), "nobody asked for blocks"
    runner.run_blocks(0, run.run, 0, results(0, 7), 1.0, 1.0, 122.0)
    (second,) = told(runner.run_ended(0, run.run, None, 123.0), StartRun)
    assert (second.first, second.last) == (0, 5)
    runner.run_blocks(0, second.run, 0, results(0, 5), 1.0, 1.0, 130.0)
    (again,) = told(runner.run_ended(0, second.run, None, 131.0), StartRun)
    assert (again.first, again.last) == (7, 100)


def test_a_shrink_is_answered_with_where_the_worker_really_stops() -> None:
    runner = runner_of()
    (run,) = started(runner)
    effects = runner.receive(OWNER, Shrink(JOB, 0, 1, 50), 1.0)
    assert not sent(effects, Shrunk)
    assert [limit.last for limit in told(effects, LimitRun)] == [50]
    (shrunk,) = sent(runner.run_limited(0, run.run, 62, 2.0), Shrunk)
    assert shrunk.last == 62


def test_a_shrink_of_one_that_waits_is_answered_at_once() -> None:
    runner = runner_of()
    started(runner, assignment(), assignment(shard=1))
    (shrunk,) = sent(runner.receive(OWNER, Shrink(JOB, 1, 1, 50), 1.0), Shrunk)
    assert shrunk.last == 50
    (again,) = sent(runner.receive(OWNER, Shrink(JOB, 1, 1, 80), 1.0), Shrunk)
    assert again.last == 50, "what was given up stays given up"


def test_a_shrink_that_meets_the_end_of_a_run_is_answered_all_the_same() -> None:
    runner = runner_of()
    (run,) = started(runner)
    runner.receive(OWNER, Shrink(JOB, 0, 1, 50), 1.0)
    runner.run_blocks(0, run.run, 0, results(0, 50), 1.0, 1.0, 2.0)
    (shrunk,) = sent(runner.run_ended(0, run.run, None, 3.0), Shrunk)
    assert shrunk.last == 50


def test_a_shrink_that_meets_a_yield_gives_no_more_away_than_was_asked() -> None:
    runner = runner_of()
    (run,) = started(runner)
    started(runner, assignment(shard=1))
    assert told(runner.tick(110.0), LimitRun)
    runner.receive(OWNER, Shrink(JOB, 0, 1, 50), 111.0)
    (shrunk,) = sent(runner.run_limited(0, run.run, 4, 112.0), Shrunk)
    assert shrunk.last == 50
    assert runner.run_limited(0, run.run, 4, 113.0) == []


def test_a_shrink_of_what_is_not_here_is_not_answered() -> None:
    runner = runner_of()
    assert runner.receive(OWNER, Shrink(JOB, 0, 1, 50), 1.0) == []
    started(runner)
    assert runner.receive(OWNER, Shrink(JOB, 0, 2, 50), 1.0) == []
    assert runner.receive(OTHER, Shrink(JOB, 0, 1, 50), 1.0) == []


def test_a_lost_worker_is_told_once_all_it_computed_has_been() -> None:
    runner = runner_of()
    (run,) = started(runner)
    runner.run_blocks(0, run.run, 0, results(0, 3), 1.0, 1.0, 20.0)
    (report,) = sent(runner.run_lost(0, run.run, "it was killed", 30.0), Report)
    assert report.lost == "it was killed" and not report.running
    assert runner.run_lost(0, run.run, "again", 31.0) == []


def test_a_process_that_is_lost_takes_no_run_with_it_but_its_own() -> None:
    runner = runner_of()
    (run,) = started(runner)
    assert runner.run_lost(0, run.run - 1, "an idle one of the same slot", 1.0) == []
    assert runner.load().free_slots == 0


def test_what_an_ended_run_still_says_is_ignored() -> None:
    runner = runner_of()
    (run,) = started(runner)
    runner.receive(OWNER, DropShard(JOB, 0, 1), 1.0)
    assert runner.run_blocks(0, run.run, 0, results(0, 3), 1.0, 1.0, 2.0) == []
    assert runner.run_ended(0, run.run, None, 3.0) == []


def test_a_fault_is_told_after_everything_that_came_before_it() -> None:
    runner = runner_of()
    (run,) = started(runner)
    runner.run_blocks(0, run.run, 0, results(0, 3), 1.0, 1.0, 20.0)
    runner.run_blocks(0, run.run, 3, results(3, 1), 1.0, 1.0, 25.0)
    effects = runner.run_ended(0, run.run, Fault("trap", "It trapped."), 30.0)
    (report,) = sent(effects, Report)
    assert report.fault is not None and (report.first, numbers(report)) == (3, [3])


def test_gas_and_time_are_told_as_sums_so_that_a_lost_report_loses_nothing() -> None:
    runner = runner_of()
    (run,) = started(runner)
    (one,) = sent(runner.run_blocks(0, run.run, 0, results(0, 1), 70.0, 7.0, 20.0), Report)
    runner.run_blocks(0, run.run, 1, (), 10.0, 3.0, 30.0)
    (two,) = sent(runner.run_blocks(0, run.run, 1, results(1, 1), 20.0, 2.0, 90.0), Report)
    assert (one.gas, one.busy_ms) == (70.0, 7.0)
    assert (two.gas, two.busy_ms) == (100.0, 12.0)


def test_memory_of_what_is_over_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OVER_MAX", 10)
    runner = runner_of()
    for shard in range(50):
        started(runner, assignment(shard=shard))
        runner.receive(OWNER, DropShard(JOB, shard, 1), 1.0)
    assert len(runner._over) == 10 and runner.held == 0


def test_programs_kept_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROGRAMS_MAX", 3)
    runner = runner_of()
    for number in range(9):
        ir = b"program %d" % number
        spec = msgspec.structs.replace(SPEC, program=kid_of(ir))
        started(runner, assignment(shard=number, spec=spec, ir=ir))
    assert len(runner._programs) == 3


def test_a_runner_that_drains_gives_back_what_waits_and_finishes_the_block_it_is_at() -> None:
    runner = runner_of()
    (run,) = started(runner)
    runner.receive(OWNER, assignment(1), 1.0)
    runner.run_blocks(run.worker, run.run, 0, results(0, 3), 3e6, 3.0, 2.0)
    effects = runner.drain()
    assert [(back.shard, back.last) for back in sent(effects, Shrunk)] == [(1, 0)]
    assert [limit.last for limit in told(effects, LimitRun)] == [3]
    assert runner.load().credits == 0
    (shrunk,) = sent(runner.run_limited(run.worker, run.run, 4, 3.0), Shrunk)
    assert (shrunk.shard, shrunk.last) == (0, 4), "the fourth is being computed"
    runner.run_blocks(run.worker, run.run, 3, results(3, 1), 1e6, 1.0, 4.0)
    effects = runner.run_ended(run.worker, run.run, None, 5.0)
    assert not told(effects, StartRun)
    runner.receive(OWNER, DropShard(JOB, 1, 1), 6.0)
    assert runner.held == 1, "not all results are counted"
    runner.receive(OWNER, ReportAck(JOB, 0, 1, 4), 6.0)
    assert runner.held == 0


def test_a_runner_that_drains_refuses_with_the_load_that_says_so() -> None:
    runner = runner_of()
    runner.drain()
    (refusal,) = sent(runner.receive(OWNER, assignment(), 1.0), Rejected)
    assert refusal.load is not None and refusal.load.credits == 0
