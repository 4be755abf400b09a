"""What a minority has queued runs once after healing, whatever crashes; planted bugs are caught."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from manifold.kernel.effects import Effect, Held, Persist
from manifold.kernel.scheduler.keeper import Keeper
from manifold.kernel.scheduler.ledger import Job
from manifold.kernel.scheduler.messages import JobStatus
from manifold.kernel.scheduler.outbox import Entry, Outbox
from manifold.kernel.scheduler.owner import Owner
from manifold.kernel.scheduler.queueing import Queue
from manifold.kernel.scheduler.takeover import Takeover
from manifold.tools.simulator.outbox import schedule

Patch = pytest.MonkeyPatch
Plant = Callable[[Patch], None]
BLOCK = 25


@pytest.mark.parametrize("block", range(8))
def test_everything_queued_runs_once_whatever_crashes(block: int) -> None:
    queued = crashes = 0
    for seed in range(block * BLOCK, (block + 1) * BLOCK):
        outcome = schedule(seed)
        assert not outcome.failures, (seed, outcome.failures)
        queued += outcome.queued
        crashes += outcome.crashes
    assert queued > BLOCK
    assert crashes > BLOCK


def test_the_same_seed_is_the_same_schedule_of_submissions() -> None:
    assert schedule(5).digest == schedule(5).digest != schedule(6).digest


def acknowledges_what_is_not_on_the_disk(patch: Patch) -> None:
    write = Outbox._write

    def elsewhere(self: Outbox, entry: Entry, then: Sequence[Effect]) -> Held:
        held = write(self, entry, then)
        return Held(Persist("nowhere", held.persist.record), held.then)

    patch.setattr(Outbox, "_write", elsewhere)


def leaves_the_outbox_before_it_is_recorded(patch: Patch) -> None:
    look = Takeover.look

    def hasty(self: Takeover, job: str) -> list[Effect]:
        held = self._owner.queue.holds(job)
        return [*look(self, job), *(self._owner.queue.leave(job) if held else [])]

    patch.setattr(Takeover, "look", hasty)


def cancels_in_memory_alone(patch: Patch) -> None:
    cancel = Queue.cancel

    def forgetful(self: Queue, job: Job, now_ms: float) -> tuple[JobStatus, list[Effect]]:
        status, (held, *_) = cancel(self, job, now_ms)
        assert isinstance(held, Held)
        return status, list(held.then)

    patch.setattr(Queue, "cancel", forgetful)


def forgets_who_may_have_it_queued(patch: Patch) -> None:
    patch.setattr(Keeper, "_origins", lambda self, guard: ())


def assigns_what_is_not_admitted(patch: Patch) -> None:
    adopt = Owner.adopt

    def eager(self: Owner, job: Job, new: bool, now_ms: float) -> list[Effect]:
        job.held = False
        return adopt(self, job, new, now_ms)

    patch.setattr(Owner, "adopt", eager)


MUTANTS: list[tuple[Plant, int]] = [
    (acknowledges_what_is_not_on_the_disk, 40),
    (leaves_the_outbox_before_it_is_recorded, 200),
    (cancels_in_memory_alone, 200),
    (forgets_who_may_have_it_queued, 400),
    (assigns_what_is_not_admitted, 400),
]


def schedules_until_caught(most: int) -> int:
    for seed in range(most):
        if schedule(seed).failures:
            return seed + 1
    return 0


@pytest.mark.parametrize(("plant", "most"), MUTANTS, ids=[plant.__name__ for plant, _ in MUTANTS])
def test_each_planted_bug_of_the_outbox_is_caught(
    plant: Plant, most: int, monkeypatch: Patch
) -> None:
    plant(monkeypatch)
    assert schedules_until_caught(most), f"{plant.__name__} survived"
