"""The pure core of a node: three subsystems as one machine."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from manifold.kernel.config import Config
from manifold.kernel.core import Core
from manifold.kernel.effects import Effect, Notify, Send, SetTimer
from manifold.kernel.errors import NotFound, Refused
from manifold.kernel.membership.messages import Me, Member, MemberChanged, State
from manifold.kernel.process.messages import Fault
from manifold.kernel.scheduler.messages import (
    AssignShard,
    JobSpec,
    JobStatus,
    KillJob,
    ListJobs,
    StartRun,
    SubmitJob,
    WhyTask,
)
from manifold.vm.kid import Kid, kid_of
from manifold.vm.runtime.results import Partial

ME = kid_of(b"me")
OTHER = kid_of(b"other")
IR = b"a program"
JOB = "J-0123456789abcdef"


def core(cores: int = 1) -> Core:
    me = Me(ME, 1, "me-01", "server", ("ipc:///run/me",), cores, 1.0, 1 << 30, 1e9, 0.2)
    made = Core(me, Config(), Random(1), incarnation=0, seeds=())
    made.start(0.0)
    return made


def submission(lo: int = 0, hi: int = 1, **more: Any) -> SubmitJob:
    return SubmitJob(JOB, JobSpec(kid_of(IR), lo, hi, "sum", **more), IR)


def of(kind: type, effects: list[Effect]) -> list[Any]:
    """Messages sent, or events notified, of one type."""
    found: list[Any] = [e.message for e in effects if isinstance(e, Send)]
    found += [e.event for e in effects if isinstance(e, Notify)]
    return [each for each in found if isinstance(each, kind)]


def joined(boot: int = 1, state: State = State.ALIVE) -> Notify:
    member = Member(OTHER, boot, 1, state, _meta(), 0.0, None)
    return Notify(MemberChanged(member, None))


def _meta() -> Any:
    return Me(OTHER, 1, "other-01", "server", ("ipc:///run/other",), 2, 1.0, 1 << 30, 1e9, 0.2).meta


def test_a_job_of_one_block_never_leaves_its_node() -> None:
    node = core()
    _, effects = node.request("C-1", submission(), 1.0)
    assert not of(AssignShard, effects)
    (start,) = of(StartRun, effects)
    assert (start.first, start.last) == (0, 1)


def test_the_result_reaches_the_client_and_nothing_is_left() -> None:
    node = core()
    _, effects = node.request("C-1", submission(), 1.0)
    (start,) = of(StartRun, effects)
    done = node.run_blocks(start.worker, start.run, 0, [Partial(1, sum_low=42)], 10.0, 1.0, 2.0)
    (status,) = of(JobStatus, done)
    assert status.state == "done"
    assert status.results == (Partial(1, sum_low=42),)
    node.run_ended(start.worker, start.run, None, 3.0)
    assert not node.scheduler.runner.busy
    assert not node.scheduler.owner.jobs


def test_a_fault_fails_the_job_and_names_the_node() -> None:
    node = core()
    _, effects = node.request("C-1", submission(), 1.0)
    (start,) = of(StartRun, effects)
    ended = node.run_ended(start.worker, start.run, Fault("trap", "Division by zero."), 2.0)
    (status,) = of(JobStatus, ended)
    assert status.state == "failed"
    assert status.fault.node == "me-01"


def test_a_member_that_joins_is_a_candidate_and_one_that_died_is_not() -> None:
    node = core()
    node._deliver([("membership", [joined()])], 1.0)
    assert OTHER in node.geode.nodes()
    node._deliver([("membership", [joined(state=State.DEAD)])], 2.0)
    assert OTHER not in node.geode.nodes()


def test_a_member_with_a_new_boot_loses_what_its_old_process_owed() -> None:
    node = core()
    node._deliver([("membership", [joined(boot=1)])], 1.0)
    _, effects = node.request("C-1", submission(hi=1000), 2.0)
    later = effects + node.tick(60.0)
    assert any(e.to == OTHER for e in later if isinstance(e, Send))
    again = node._deliver([("membership", [joined(boot=2)])], 70.0)
    retried = [e for e in again if isinstance(e, Send) and isinstance(e.message, AssignShard)]
    assert all(assign.message.attempt > 1 for assign in retried)
    assert node.scheduler.owner.jobs[JOB].retries >= 1


def test_the_earliest_timer_is_the_one_asked_of_the_driver() -> None:
    node = core()
    _, effects = node.request("C-1", submission(hi=1000), 1.0)
    timers = [effect.at_ms for effect in effects if isinstance(effect, SetTimer)]
    assert timers[-1] == min(node._due.values())


def test_a_question_about_an_unknown_job_is_refused_with_what_to_do() -> None:
    node = core()
    with pytest.raises(NotFound, match="no job"):
        node.request("C-1", KillJob(JOB), 1.0)
    with pytest.raises(NotFound, match="No decision"):
        node.request("C-1", WhyTask(JOB), 1.0)
    jobs, _ = node.request("C-1", ListJobs(), 1.0)
    assert jobs.jobs == ()  # type: ignore[attr-defined]


def test_a_program_that_is_not_what_it_claims_is_refused() -> None:
    node = core()
    spec = JobSpec(Kid("K-" + "0" * 32), 0, 1, "sum")
    with pytest.raises(Refused, match="KID"):
        node.request("C-1", SubmitJob(JOB, spec, IR), 1.0)
