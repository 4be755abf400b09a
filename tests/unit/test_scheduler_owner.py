"""The owner: jobs in, assignments out, results counted once; everything bounded."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import msgspec
import pytest

from manifold.kernel.config import GeodeConfig, SchedulerConfig
from manifold.kernel.effects import Effect, Notify, Persist, Send, SetTimer
from manifold.kernel.errors import Busy, NotFound, Refused, Unavailable
from manifold.kernel.geode.features import Static
from manifold.kernel.geode.geode import Geode
from manifold.kernel.geode.messages import Demand, LoadReport
from manifold.kernel.process.messages import Fault
from manifold.kernel.scheduler import owner as module
from manifold.kernel.scheduler import peers as peers_module
from manifold.kernel.scheduler import shelf as shelf_module
from manifold.kernel.scheduler.messages import (
    AssignShard,
    DropShard,
    FetchResult,
    JobList,
    JobSpec,
    JobStatus,
    KillJob,
    ListJobs,
    NeedProgram,
    Rejected,
    Report,
    ReportAck,
    ResultPart,
    Shrink,
    Shrunk,
    SubmitJob,
    WatchJob,
)
from manifold.kernel.scheduler.owner import Owner
from manifold.kernel.scheduler.protocol import Scheduler
from manifold.vm.kid import Kid, kid_of
from manifold.vm.runtime.results import Partial

NODES = [kid_of(b"node %d" % n) for n in range(8)]
ME = NODES[0]
IR = b"a program"
PROGRAM = kid_of(IR)
GAS = 1e7  # of an index: 10 ms on a slot


class Desk:
    """An owner, its geode, a clock, and what it sent last."""

    def __init__(self, nodes: int = 4, known: bool = True, **config: Any) -> None:
        self.geode = Geode(ME, GeodeConfig(), Random(1))
        for number in range(nodes):
            self.geode.node_up(NODES[number], f"n-{number}", "c", Static(latency_ms=0.3), 0.0)
        self.owner = Owner(ME, SchedulerConfig(**config), self.geode, 1)
        self.now_ms = 1000.0
        self.jobs = 0
        self.sent: list[Send] = []
        if known:
            self.geode.learn_gas_per_index(PROGRAM, "c", GAS)

    def take(self, effects: Sequence[Effect]) -> list[Send]:
        self.sent = [effect for effect in effects if isinstance(effect, Send)]
        return self.sent

    def submit(self, count: int = 1, client: str = "C-1", job: str = "", **spec: Any) -> JobStatus:
        self.jobs += 1
        name = job or f"J-{self.jobs:016x}"
        fields: dict[str, Any] = {"program": PROGRAM, "lo": 0, "hi": count, "reduce": "count"}
        wanted = JobSpec(**(fields | spec))
        answer, effects = self.owner.submit(client, SubmitJob(name, wanted, IR), self.now_ms)
        self.take(effects)
        assert isinstance(answer, JobStatus)
        return answer

    def assigned(self) -> list[tuple[Kid, AssignShard]]:
        return [(Kid(s.to), s.message) for s in self.sent if isinstance(s.message, AssignShard)]

    def of(self, kind: type) -> list[Any]:
        return [send.message for send in self.sent if isinstance(send.message, kind)]

    def report(
        self, node: Kid, given: AssignShard, first: int, count: int, **more: Any
    ) -> list[Send]:
        done = count + first - given.first
        made = tuple(Partial(1) for _ in range(count))
        report = Report(
            given.job, given.shard, given.attempt, first, made, True, GAS * done, 10.0 * done,
            LoadReport(),
        )  # fmt: skip
        message = msgspec.structs.replace(report, **more)
        return self.take(self.owner.receive(node, message, self.now_ms))

    def finish(self) -> None:
        """Everybody computes what was assigned last, and what follows from it."""
        work = self.assigned()
        while work:
            node, given = work.pop(0)
            self.now_ms += 5.0
            self.report(node, given, given.first, given.last - given.first, running=False)
            work += self.assigned()

    def tick(self, ms: float = 50.0) -> list[Send]:
        self.now_ms += ms
        return self.take(self.owner.tick(self.now_ms))

    def pass_ms(self, ms: float) -> list[Send]:
        every: list[Send] = []
        for _ in range(int(ms / 50)):
            every += self.tick()
        self.sent = every
        return every


def name(number: int) -> str:
    return f"J-{number:016x}"


# -- clients --------------------------------------------------------------------------------------


def test_a_job_of_one_index_is_one_assignment_and_one_status() -> None:
    desk = Desk()
    assert desk.submit().state == "running"
    ((node, given),) = desk.assigned()
    sent = desk.report(node, given, 0, 1)
    assert [type(send.message) for send in sent] == [ReportAck, JobStatus]
    status = sent[1].message
    assert isinstance(status, JobStatus) and status.state == "done" and sent[1].to == "C-1"
    assert status.results is not None and status.results[0] == Partial(1)


def test_work_under_a_grain_stays_at_home_where_a_slot_is_free_and_spreads_where_none_is() -> None:
    desk = Desk()
    homes = []
    for _ in range(4):
        desk.submit()
        homes.append(desk.assigned()[0][0])
    assert homes[0] == ME and len(set(homes)) == 4
    (decision,) = [desk.geode.why(f"{name(1)}/0.1")]
    assert decision is not None and decision.winner == ME and "round trip" in decision.note


def test_a_job_submitted_twice_runs_once() -> None:
    desk = Desk()
    desk.submit(job=name(7))
    assert len(desk.assigned()) == 1
    again = desk.submit(job=name(7), client="C-2")
    assert again.state == "running" and not desk.sent
    given = desk.owner.jobs[name(7)].shards[0]
    assert given.node is not None
    message = AssignShard(name(7), 0, given.attempt, JobSpec(PROGRAM, 0, 1, "count"), 0, 1)
    desk.report(given.node, message, 0, 1)
    assert {send.to for send in desk.sent if isinstance(send.message, JobStatus)} == {"C-1", "C-2"}
    assert desk.submit(job=name(7)).state == "done"


def test_an_empty_job_is_done_at_once() -> None:
    assert Desk().submit(0).state == "done"


def test_what_makes_no_sense_is_refused_with_what_to_do() -> None:
    desk = Desk(jobs=1)
    with pytest.raises(Refused, match="ends before"):
        desk.submit(lo=5, hi=4)
    with pytest.raises(Refused, match="tasks of their own"):
        desk.submit(1, indices=(4,))
    with pytest.raises(Refused, match="KID"):
        desk.submit(1, program=kid_of(b"another"))
    with pytest.raises(Refused, match="at most"):
        desk.submit(1 << 17, isolate=True)
    with pytest.raises(Unavailable, match="No node may run this job: n-0: no GPU"):
        desk.submit(1, demand=Demand(needs_gpu=True))
    desk.submit(1)
    with pytest.raises(Busy):
        desk.submit(1)
    with pytest.raises(NotFound):
        desk.owner.request("C-1", WatchJob(name(99)), 0.0)


def test_a_job_waits_where_all_who_could_run_it_have_no_credit() -> None:
    desk = Desk(nodes=2)
    full = LoadReport(credits=0)
    for node in NODES[:2]:
        desk.geode.report(node, full, desk.now_ms)
        desk.owner.peers.load(node, full, desk.now_ms)
    assert desk.submit().state == "running" and not desk.assigned()
    desk.pass_ms(900.0)
    assert not desk.assigned()
    desk.pass_ms(400.0)
    assert len(desk.assigned()) == 1, "E2: after a time they are tried again"


def test_a_killed_job_drops_its_shards_and_its_late_reports() -> None:
    desk = Desk()
    desk.submit(400)
    work = desk.assigned()
    answer, effects = desk.owner.request("C-1", KillJob(name(1)), desk.now_ms)
    assert isinstance(answer, JobStatus) and answer.state == "cancelled"
    desk.take(effects)
    assert len(desk.of(DropShard)) == len(work) > 1
    assert desk.of(JobStatus)[0].state == "cancelled"
    node, given = work[0]
    assert [type(s.message) for s in desk.report(node, given, given.first, 1)] == [DropShard]
    assert not desk.owner.peers.live()


def test_a_job_that_takes_too_long_fails_and_says_so() -> None:
    desk = Desk()
    desk.submit(4, timeout_ms=500.0)
    desk.pass_ms(600.0)
    (status,) = desk.of(JobStatus)
    assert status.state == "failed" and status.fault.code == "exhausted"
    assert "timeout" in status.fault.message and desk.of(DropShard)


def test_a_job_whose_last_possible_node_died_fails_after_a_while() -> None:
    desk = Desk(nodes=2)
    desk.submit(4, demand=Demand(node="n-1"))
    desk.geode.node_down(NODES[1])
    desk.take(desk.owner.node_down(NODES[1], desk.now_ms))
    desk.pass_ms(29_000.0)
    assert not desk.of(JobStatus)
    desk.pass_ms(2000.0)
    (status,) = desk.of(JobStatus)
    assert status.fault.code == "unavailable"


def test_a_shard_that_is_lost_too_often_fails_its_job() -> None:
    desk = Desk(attempts=3)
    desk.submit()
    for _ in range(3):
        ((node, given),) = desk.assigned()
        desk.report(node, given, 0, 0, lost="its worker died")
    (status,) = desk.of(JobStatus)
    assert status.state == "failed" and status.fault.code == "exhausted"
    assert "lost 3 times" in status.fault.message and status.retries == 3


def test_a_fault_ends_the_job_and_names_the_node() -> None:
    desk = Desk()
    desk.submit(400)
    (node, given), *others = desk.assigned()
    fault = Fault("trap", "It divides by zero.", index=3)
    sent = desk.report(node, given, given.first, 1, fault=fault)
    (status,) = desk.of(JobStatus)
    assert status.state == "failed"
    assert status.fault.node == desk.geode.node(node).alias  # type: ignore[union-attr]
    assert {send.to for send in sent if isinstance(send.message, DropShard)} == {
        other for other, _ in others
    } | {node}


def test_progress_is_pushed_now_and_then_and_the_end_once() -> None:
    desk = Desk(progress_ms=200.0)
    desk.submit(400)
    node, given = desk.assigned()[0]
    pushed = []
    for block in range(20):
        desk.now_ms += 20.0
        desk.report(node, given, given.first + block, 1)
        pushed += [status.done for status in desk.of(JobStatus)]
    assert 1 <= len(pushed) <= 3 and pushed == sorted(pushed)


def test_watchers_are_bounded_and_forgotten_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WATCHERS_MAX", 3)
    desk = Desk()
    desk.submit(1, client="C-0")
    work = desk.assigned()
    for client in range(1, 9):
        desk.owner.request(f"C-{client}", WatchJob(name(1)), desk.now_ms)
    sent = desk.report(*work[0], 0, 1)
    assert [s.to for s in sent if isinstance(s.message, JobStatus)] == ["C-6", "C-7", "C-8"]
    assert not desk.owner.shelf.jobs[name(1)].watchers


# -- retention ------------------------------------------------------------------------------------


def test_ended_jobs_are_bounded_and_forgotten_after_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shelf_module, "ENDED_MAX", 5)
    desk = Desk(retain_ms=10_000.0)
    for _ in range(9):
        desk.submit()
        desk.finish()
    answer, _ = desk.owner.request("C-1", ListJobs(), desk.now_ms)
    assert isinstance(answer, JobList) and [job.job for job in answer.jobs] == [
        name(n) for n in range(5, 10)
    ]
    assert desk.owner.shelf.held_bytes == 5 * Partial(1).nbytes
    desk.tick(11_000.0)
    assert not desk.owner.shelf.jobs and desk.owner.shelf.held_bytes == 0


def test_results_held_are_bounded_the_oldest_go_first_and_what_is_too_large_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shelf_module, "RESULT_BYTES_MAX", 4000)
    desk = Desk()
    for _ in range(3):
        desk.submit(1, reduce="collect")
        ((node, given),) = desk.assigned()
        desk.report(node, given, 0, 0, results=(Partial(1, values=bytes(1500)),))
    assert list(desk.owner.shelf.jobs) == [name(2), name(3)]
    desk.submit(1, reduce="collect")
    ((node, given),) = desk.assigned()
    desk.report(node, given, 0, 0, results=(Partial(1, values=bytes(5000)),))
    (status,) = desk.of(JobStatus)
    assert status.state == "failed" and "larger than this node holds" in status.fault.message
    assert desk.owner.shelf.held_bytes == 0, "a job that failed holds nothing"


def test_large_results_are_fetched_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manifold.kernel.scheduler.outcome.INLINE_BYTES_MAX", 1000)
    monkeypatch.setattr("manifold.kernel.scheduler.outcome.PART_BYTES_MAX", 2000)
    desk = Desk(nodes=1)
    desk.submit(10, reduce="collect")
    ((node, given),) = desk.assigned()
    made = tuple(Partial(n, values=bytes(800)) for n in range(10))
    desk.report(node, given, 0, 0, results=made, gas=GAS)
    (status,) = desk.of(JobStatus)
    assert status.results is None and status.parts == 10
    found: list[Any] = []
    while len(found) < status.parts:
        part, _ = desk.owner.request("C-1", FetchResult(name(1), len(found)), desk.now_ms)
        assert isinstance(part, ResultPart) and 1 <= len(part.results) <= 2
        found += part.results
    assert tuple(found) == made


# -- runners --------------------------------------------------------------------------------------


def test_a_program_of_unknown_cost_is_probed_with_one_block_first() -> None:
    desk = Desk(known=False)
    desk.submit(4000)
    ((node, given),) = desk.assigned()
    assert (given.first, given.last) == (0, 1)
    desk.report(node, given, 0, 1, gas=1e8, busy_ms=100.0)
    pieces = desk.assigned()
    assert len(pieces) == 4
    assert (pieces[0][1].first, pieces[-1][1].last) == (1, 500)


def test_a_probe_that_takes_longer_than_a_grain_holds_nobody_up() -> None:
    desk = Desk(known=False)
    desk.submit(4000)
    assert desk.owner.wake_ms == desk.now_ms + 20.0
    desk.tick(20.0)
    assert desk.assigned()[-1][1].last == 500


def test_the_program_travels_once_to_each_node() -> None:
    desk = Desk()
    carried: dict[Kid, int] = {}
    for _ in range(3):
        desk.submit(400)
        work = desk.assigned()
        for node, given in work:
            carried[node] = carried.get(node, 0) + bool(given.ir)
        desk.finish()
    assert carried == dict.fromkeys(NODES[:4], 1)


def test_a_runner_that_lacks_the_program_is_sent_it() -> None:
    desk = Desk()
    desk.submit(400)
    desk.finish()
    desk.submit(400)
    node, given = desk.assigned()[0]
    assert not given.ir
    need = NeedProgram(given.job, given.shard, given.attempt)
    desk.take(desk.owner.receive(node, need, desk.now_ms))
    ((to, again),) = desk.assigned()
    assert to == node and again.ir == IR and again.attempt == given.attempt


def test_an_assignment_nobody_answered_is_sent_again_with_the_program() -> None:
    desk = Desk()
    desk.submit(1, demand=Demand(node="n-1"))
    ((_, given),) = desk.assigned()
    desk.pass_ms(500.0)
    ((node, again),) = desk.assigned()
    assert node == NODES[1] and again == given and again.ir == IR
    desk.report(node, given, 0, 0)
    desk.pass_ms(1000.0)
    assert not desk.assigned(), "it has said that it has it"


def test_a_silent_assignee_loses_its_shard_to_another_and_is_left_alone_for_a_while() -> None:
    desk = Desk()
    desk.submit()
    ((node, given),) = desk.assigned()
    desk.report(node, given, 0, 0)
    desk.pass_ms(1900.0)
    assert not desk.assigned()
    desk.pass_ms(300.0)
    ((other, again),) = desk.assigned()
    assert other != node and again.attempt > given.attempt and again.tries == 2
    assert [type(s.message) for s in desk.report(node, given, 0, 1)] == [DropShard]
    assert desk.owner.jobs[name(1)].counted == 0, "O1"


def test_a_node_that_stalled_is_tried_again_after_a_time() -> None:
    desk = Desk(nodes=2)
    desk.owner.peers.stall(NODES[1], desk.now_ms)
    desk.submit(1, demand=Demand(node="n-1"))
    assert not desk.assigned()
    desk.pass_ms(peers_module.STALL_MS - 200.0)
    assert not desk.assigned()
    desk.pass_ms(400.0)
    assert [node for node, _ in desk.assigned()] == [NODES[1]]


def test_an_owner_that_slept_gives_the_others_its_sleep_back() -> None:
    desk = Desk()
    desk.submit(400)
    desk.pass_ms(500.0)
    desk.tick(10_000.0)
    assert desk.owner.jobs[name(1)].retries == 0
    assert all(given.tries == 1 for _, given in desk.assigned()), "sent again, not anew"
    desk.pass_ms(2200.0)
    assert desk.owner.jobs[name(1)].retries > 0, "but not for ever"


def test_the_death_of_a_node_moves_its_shards_at_once() -> None:
    desk = Desk()
    desk.submit(400)
    work = desk.assigned()
    node, given = work[1]
    desk.geode.node_down(node)
    desk.take(desk.owner.node_down(node, desk.now_ms))
    job = desk.owner.jobs[name(1)]
    job.check()
    assert job.retries == 1
    assert all(shard.node != node for shard in job.shards.values())
    assert given.last - given.first == sum(
        s.owed for s in job.shards.values() if s.number == given.shard
    )


def test_a_rejected_shard_goes_elsewhere_and_it_is_no_failed_attempt() -> None:
    desk = Desk(attempts=1)
    desk.submit()
    ((node, given),) = desk.assigned()
    refusal = Rejected(given.job, given.shard, given.attempt, 100.0)
    desk.take(desk.owner.receive(node, refusal, desk.now_ms))
    desk.pass_ms(200.0)
    ((other, again),) = desk.assigned()
    assert other != node and again.attempt > given.attempt
    assert desk.owner.jobs[name(1)].retries == 0


def test_a_report_behind_a_gap_is_not_counted_and_the_gap_is_told() -> None:
    desk = Desk()
    desk.submit(400)
    node, given = desk.assigned()[0]
    desk.report(node, given, given.first + 3, 2)
    (ack,) = desk.of(ReportAck)
    assert ack.missing and ack.counted == given.first
    desk.report(node, given, given.first, 5)
    (ack,) = desk.of(ReportAck)
    assert not ack.missing and ack.counted == given.first + 5


def test_an_idle_slot_takes_from_the_shard_that_would_take_longest() -> None:
    desk = Desk(nodes=2)
    desk.submit(400)
    (one, first), (two, second) = desk.assigned()
    desk.now_ms += 2000.0
    desk.report(two, second, second.first, 20)
    desk.report(one, first, first.first, first.last - first.first, running=False)
    (shrink,) = desk.of(Shrink)
    assert shrink.shard == second.shard and second.first + 20 < shrink.last < second.last
    answer = Shrunk(shrink.job, shrink.shard, shrink.attempt, shrink.last)
    desk.take(desk.owner.receive(two, answer, desk.now_ms))
    ((thief, rest),) = desk.assigned()
    assert thief == one and (rest.first, rest.last) == (shrink.last, second.last)
    desk.owner.jobs[name(1)].check()


def test_a_shrink_that_took_everything_ends_the_attempt() -> None:
    desk = Desk(nodes=2)
    desk.submit(400)
    node, given = desk.assigned()[0]
    answer = Shrunk(given.job, given.shard, given.attempt, given.first)
    desk.take(desk.owner.receive(node, answer, desk.now_ms))
    assert desk.of(DropShard)
    desk.owner.jobs[name(1)].check()


def test_attempt_numbers_grow_over_jobs_and_processes() -> None:
    desk = Desk()
    seen = []
    for _ in range(3):
        desk.submit(400)
        seen += [given.attempt for _, given in desk.assigned()]
        desk.finish()
    later = Owner(ME, SchedulerConfig(), desk.geode, 2)
    wanted = SubmitJob(name(1), JobSpec(PROGRAM, 0, 1, "count"), IR)
    desk.take(later.submit("C-1", wanted, desk.now_ms)[1])
    ((_, given),) = desk.assigned()
    assert len(set(seen)) == len(seen) and given.attempt > max(seen)


def test_nothing_is_in_flight_when_all_is_done() -> None:
    desk = Desk()
    for count in (1, 400, 50, 3000):
        desk.submit(count)
        desk.finish()
    assert not desk.owner.jobs and not desk.owner.peers.live()
    for kid in desk.geode.nodes():
        node = desk.geode.node(kid)
        assert node is not None and node.flights == 0 and node.flight_gas == 0.0


def test_jobs_that_wait_get_the_slots_that_come_free_in_their_order() -> None:
    desk = Desk(nodes=1)
    full = LoadReport(credits=0)
    running = desk.submit(1)
    ((node, given),) = desk.assigned()
    desk.owner.peers.load(ME, full, desk.now_ms)
    for _ in range(3):
        desk.submit(1)
        assert not desk.assigned()
    desk.report(node, given, 0, 1)
    assert [work.job for _, work in desk.assigned()] == [name(2), name(3)]
    assert running.job == name(1)


# -- put together ---------------------------------------------------------------------------------


def test_a_schedulers_every_call_ends_with_the_timer_that_is_due() -> None:
    geode = Geode(ME, GeodeConfig(), Random(1))
    geode.node_up(ME, "here", "c", Static(), 0.0)
    scheduler = Scheduler(ME, SchedulerConfig(), geode, 1, 1)
    spec = JobSpec(PROGRAM, 0, 1, "count")
    _, effects = scheduler.request("C-1", SubmitJob(name(1), spec, IR), 1000.0)
    assert effects[-1] == SetTimer(1050.0)
    assert any(isinstance(effect, Notify) for effect in effects)
    assert not any(isinstance(effect, Persist) for effect in effects)


def test_a_timer_of_a_probe_is_asked_for() -> None:
    geode = Geode(ME, GeodeConfig(), Random(1))
    geode.node_up(ME, "here", "c", Static(), 0.0)
    scheduler = Scheduler(ME, SchedulerConfig(), geode, 1, 1)
    spec = JobSpec(PROGRAM, 0, 5000, "count")
    _, effects = scheduler.request("C-1", SubmitJob(name(1), spec, IR), 1000.0)
    assert effects[-1] == SetTimer(1020.0)
