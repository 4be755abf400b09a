"""A job whose owner dies is taken over where it was: exact, under faults, and not begun afresh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from manifold.kernel.nexus.messages import Initialise
from manifold.kernel.scheduler.messages import JobEvent, JobSpec
from manifold.tools.simulator.clients import Task
from manifold.tools.simulator.faults import Faults, parse
from manifold.tools.simulator.jobs import Exact, composite
from manifold.tools.simulator.run import build, settle
from manifold.tools.simulator.workers import CORE_GAS_PER_S, Program
from manifold.tools.simulator.world import World
from manifold.vm.kid import kid_of

NODES = 6
INDICES = 400
SECONDS = 24.0  # of one core: some four seconds of this cluster


def cluster(seed: int, faults: str) -> tuple[World, Sequence[Any]]:
    plan = parse(faults) if faults else Faults()
    world, made = build(seed, NODES, plan, composite)
    world.start_all()
    kids = tuple(str(node.kid) for node in world.nodes[:3])
    world.run(1500.0)
    world.call(world.nodes[0], lambda core, now: core.consult(1, Initialise(kids), now))
    world.run(1500.0)
    return world, made.checkers


def long_job(world: World, checkers: Sequence[Any], home: int) -> Task:
    program = Program("floats", SECONDS * CORE_GAS_PER_S / INDICES, 1)
    spec = JobSpec(kid_of(program.ir), 0, INDICES, "sum")
    task = Task("J-0000000000000001", spec, program.ir, home)
    next(each for each in checkers if isinstance(each, Exact)).clients.submit(task)
    return task


def an_owner_dies(seed: int, faults: str) -> tuple[Task, list[JobEvent], list[str]]:
    """What became of the job, what was told of takeovers, and what the checkers found."""
    world, checkers = cluster(seed, faults)
    events: list[JobEvent] = []
    world.on_notify.setdefault(JobEvent, []).append(
        lambda node, event: events.append(event) if event.what == "taken over" else None
    )
    owner = world.nodes[4]  # no voter
    task = long_job(world, checkers, 4)
    if faults:
        world.break_things()
    world.run(2000.0)
    if owner.up:
        world.crash(owner)
        world.restart(owner, 15_000.0)
    world.run(10_000.0)
    world.heal(None)
    failures: list[str] = []
    settle(world, checkers, world.nodes, failures)
    found = [failure for checker in checkers for failure in checker.failures]
    return task, events, failures + found


@pytest.mark.parametrize("seed", range(8))
def test_a_job_goes_on_where_its_owner_left_it(seed: int) -> None:
    task, events, failures = an_owner_dies(seed, "")
    assert not failures
    assert task.ended == "done"
    (event,) = events
    counted = int(event.detail.split()[0])
    assert counted > INDICES // 10, event.detail


@pytest.mark.parametrize("seed", range(16))
def test_it_ends_exactly_whatever_else_goes_wrong(seed: int) -> None:
    task, _, failures = an_owner_dies(seed, "light" if seed % 2 else "heavy")
    assert not failures
    assert task.ended == "done" or "exhausted" in str(task.status)


def test_what_is_told_to_be_settled_is_in_the_record() -> None:
    """K2, from outside: after a takeover every settled position is counted."""
    world, checkers = cluster(3, "")
    long_job(world, checkers, 4)
    world.run(2000.0)
    owner = world.nodes[4].machine.scheduler.owner
    guard = owner.keeper.guards["J-0000000000000001"]
    saved = [block for first, last in guard.saved for block in range(first, last)]
    assert saved
    world.crash(world.nodes[4])
    world.run(6000.0)
    heirs = [n for n in world.nodes if n.up and n.machine.scheduler.owner.jobs]
    (heir,) = heirs
    job = heir.machine.scheduler.owner.jobs["J-0000000000000001"]
    assert all(job.results[block] is not None for block in saved)
