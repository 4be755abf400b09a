"""Calls in the scheduler: arguments travel with their blocks, and calls end with their client."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import msgspec
import pytest

from manifold.kernel.config import GeodeConfig, SchedulerConfig
from manifold.kernel.effects import Effect, Notify, Send
from manifold.kernel.errors import Busy, Refused
from manifold.kernel.geode.features import Static
from manifold.kernel.geode.geode import Geode
from manifold.kernel.geode.messages import LoadReport
from manifold.kernel.process.messages import Result, Session, Value
from manifold.kernel.scheduler import admission
from manifold.kernel.scheduler import shelf as shelf_module
from manifold.kernel.scheduler.messages import (
    AssignShard,
    DropShard,
    JobSpec,
    JobStatus,
    Report,
    ReportAck,
    Shrink,
    StartRun,
    SubmitJob,
)
from manifold.kernel.scheduler.owner import Owner
from manifold.kernel.scheduler.runner import Runner
from manifold.kernel.tasks.messages import Parcel
from manifold.vm.kid import Kid, kid_of

NODES = [kid_of(b"node %d" % n) for n in range(4)]
ME = NODES[0]
CODE = b"a function"
SESSION = Session("S-" + "0" * 16, "C-" + "0" * 16)
NAME = "J-0000000000000001"


def parcels(count: int) -> tuple[Parcel, ...]:
    return tuple(Parcel(b"%d" % number) for number in range(count))


def submission(count: int, name: str = NAME, detach: bool = False, **spec: Any) -> SubmitJob:
    fields: dict[str, Any] = {"kind": "python", "session": SESSION, "isolate": True}
    wanted = JobSpec(kid_of(CODE), 0, count, "collect", **(fields | spec))
    return SubmitJob(name, wanted, CODE, True, parcels(count), detach)


def owner_of(nodes: int = 4) -> Owner:
    geode = Geode(ME, GeodeConfig(), Random(1))
    for number in range(nodes):
        geode.node_up(NODES[number], f"n-{number}", "c", Static(latency_ms=0.3), 0.0)
    return Owner(ME, SchedulerConfig(), geode, 1)


def assigned(effects: Sequence[Effect]) -> list[tuple[Kid, AssignShard]]:
    return [
        (Kid(e.to), e.message)
        for e in effects
        if isinstance(e, Send) and isinstance(e.message, AssignShard)
    ]


def report(given: AssignShard, results: Sequence[Result], **more: Any) -> Report:
    made = Report(
        given.job, given.shard, given.attempt, given.first, tuple(results), True, 1e6, 1.0,
        LoadReport(),
    )  # fmt: skip
    return msgspec.structs.replace(made, **more)


def value(number: int) -> Value:
    return Value(Parcel(b"%d" % number))


# -- the owner ------------------------------------------------------------------------------------


def test_each_shard_carries_the_arguments_of_its_own_blocks() -> None:
    owner = owner_of()
    owner.geode.learn_gas_per_index(kid_of(CODE), "c", 1e9)
    _, effects = owner.submit("C-1", submission(40), 0.0)
    shards = assigned(effects)
    assert len(shards) > 1
    for _, shard in shards:
        assert shard.parcels == parcels(40)[shard.first : shard.last]


def test_what_a_lost_node_owed_is_assigned_again_with_the_arguments_of_the_rest() -> None:
    owner = owner_of()
    ((node, given),) = assigned(owner.submit("C-1", submission(10, serial=True), 0.0)[1])
    owner.receive(node, report(given, [value(0), value(1), value(2)]), 5.0)
    again = assigned(owner.receive(node, report(given, [], lost="it fell"), 6.0))
    assert [(shard.first, shard.parcels) for _, shard in again] == [(3, parcels(10)[3:])]


def test_a_serial_job_goes_whole_to_one_place_and_is_never_split() -> None:
    owner = owner_of()
    owner.geode.learn_gas_per_index(kid_of(CODE), "c", 1e12)
    shards = assigned(owner.submit("C-1", submission(100, serial=True), 0.0)[1])
    assert [(shard.first, shard.last) for _, shard in shards] == [(0, 100)]
    for now_ms in range(50, 1000, 50):
        effects = owner.tick(float(now_ms))
        owner.peers.heard(shards[0][0])
        assert not [e for e in effects if isinstance(e, Send) and isinstance(e.message, Shrink)]


def test_a_client_that_is_gone_takes_its_jobs_with_it_but_not_those_it_detached() -> None:
    owner = owner_of()
    given = assigned(owner.submit("C-1", submission(1), 0.0)[1])
    owner.submit("C-1", submission(1, "J-0000000000000002", detach=True), 0.0)
    owner.submit("C-2", submission(1, "J-0000000000000003"), 0.0)
    effects = owner.client_gone("C-1", 1.0)
    assert list(owner.jobs) == ["J-0000000000000002", "J-0000000000000003"]
    drops = [(e.to, e.message) for e in effects if isinstance(e, Send)]
    assert (given[0][0], DropShard(NAME, given[0][1].shard, given[0][1].attempt)) in drops
    status, _ = owner.submit("C-3", submission(1), 2.0)
    assert isinstance(status, JobStatus) and status.state == "cancelled"


def test_arguments_count_as_held_until_the_job_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = owner_of()
    ((node, given),) = assigned(owner.submit("C-1", submission(1), 0.0)[1])
    assert owner.shelf.held_bytes == parcels(1)[0].nbytes
    monkeypatch.setattr(shelf_module, "RESULT_BYTES_MAX", owner.shelf.held_bytes)
    with pytest.raises(Busy, match="arguments"):
        owner.submit("C-1", submission(1, "J-0000000000000002"), 0.0)
    assert list(owner.jobs) == [NAME]
    monkeypatch.undo()
    owner.receive(node, report(given, [value(0)], running=False), 5.0)
    assert owner.shelf.jobs[NAME].parcels == ()
    assert owner.shelf.held_bytes == value(0).nbytes


def test_results_of_ended_jobs_give_way_before_half_of_a_small_nodes_memory_is_taken() -> None:
    owner = owner_of()
    owner.shelf.memory_bytes = 2 * 300_000
    large = Value(Parcel(b"x" * 100_000))
    for number in range(1, 6):
        message = submission(1, f"J-{number:016x}")
        ((node, given),) = assigned(owner.submit("C-1", message, float(number))[1])
        owner.receive(node, report(given, [large], running=False), float(number))
    assert [owner.shelf.jobs[name].state for name in owner.shelf.jobs] == ["done"] * 2
    assert owner.shelf.held_bytes <= 300_000


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"parcels": ()}, "needs a session and arguments"),
        ({"parcels": parcels(3)}, "3 parcels for 2 indices"),
        ({"spec": {"session": None}}, "needs a session"),
        ({"spec": {"isolate": False}}, "one for an index"),
        ({"spec": {"kind": "entangle"}}, "Only calls and WASI programs"),
        ({"ir": b"another"}, "KID"),
    ],
)
def test_a_submission_that_makes_no_sense_is_refused(change: dict[str, Any], why: str) -> None:
    message = submission(2)
    if "spec" in change:
        change = {"spec": msgspec.structs.replace(message.spec, **change["spec"])}
    with pytest.raises(Refused, match=why):
        owner_of().submit("C-1", msgspec.structs.replace(message, **change), 0.0)


def test_too_many_bytes_of_arguments_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "PARCELS_BYTES_MAX", 100)
    with pytest.raises(Refused, match="take more than 100 bytes"):
        owner_of().submit("C-1", submission(2), 0.0)


# -- the runner -----------------------------------------------------------------------------------


def runner_of(slots: int) -> Runner:
    return Runner(ME, SchedulerConfig(), slots)


def assignment(shard: int, count: int = 4) -> AssignShard:
    spec = submission(count).spec
    return AssignShard(NAME, shard, 1 + shard, spec, 0, count, CODE, parcels=parcels(count))


def started(effects: Sequence[Effect]) -> list[StartRun]:
    return [e.event for e in effects if isinstance(e, Notify) and isinstance(e.event, StartRun)]


def test_a_run_that_goes_on_later_is_given_the_arguments_of_what_is_left() -> None:
    runner = runner_of(1)
    (run,) = started(runner.receive(ME, assignment(0), 0.0))
    assert run.parcels == parcels(4)
    runner.run_blocks(0, run.run, 0, [value(0)], 1.0, 1.0, 1.0)
    (again,) = started(runner.run_ended(0, run.run, None, 2.0))  # its process died after one
    assert (again.first, again.parcels) == (1, parcels(4)[1:])


def test_a_call_that_waits_beyond_the_slots_makes_room_for_another_and_still_ends() -> None:
    runner = runner_of(1)
    (first,) = started(runner.receive(ME, assignment(0, 1), 0.0))
    assert not started(runner.receive(ME, assignment(1, 1), 0.0))
    (second,) = started(runner.run_moved(0, first.run, 1, 1.0))
    assert second.worker == 0
    assert runner.load().free_slots == 0
    runner.run_blocks(0, second.run, 0, [value(2)], 1.0, 1.0, 2.0)
    runner.run_ended(0, second.run, None, 2.0)
    assert runner.load().free_slots == 1  # the one that waits takes none
    effects = runner.run_blocks(1, first.run, 0, [value(1)], 1.0, 1.0, 3.0)
    (told,) = [e.message for e in effects if isinstance(e, Send) and isinstance(e.message, Report)]
    assert told.results == (value(1),)
    runner.run_ended(1, first.run, None, 3.0)
    for shard in (0, 1):
        runner.receive(ME, ReportAck(NAME, shard, 1 + shard, 1), 4.0)
    assert runner.held == 0


def test_a_run_that_is_over_is_not_moved() -> None:
    runner = runner_of(1)
    (run,) = started(runner.receive(ME, assignment(0), 0.0))
    runner.receive(ME, DropShard(NAME, 0, 1), 1.0)
    assert runner.run_moved(0, run.run, 1, 2.0) == []
