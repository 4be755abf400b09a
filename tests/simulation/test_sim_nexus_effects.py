"""Effects of programs over whole clusters: each once, whoever runs a position, and however late."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from manifold.kernel.nexus import marks as marks_module
from manifold.kernel.nexus import proposer as proposer_module
from manifold.kernel.nexus import values
from manifold.kernel.nexus.marks import Book, Job
from manifold.kernel.nexus.rounds import Operation
from manifold.kernel.nexus.values import Effect, Result, Rewrite, Value, change
from manifold.tools.simulator.nexus_effects import schedule

Patch = pytest.MonkeyPatch
Plant = Callable[[Patch], None]


@pytest.mark.parametrize("block", range(12))
def test_each_effect_counts_once_under_all_faults_and_late_runs_are_refused(block: int) -> None:
    answered = 0
    for seed in range(2_000_000 + block * 40, 2_000_000 + block * 40 + 40):
        outcome = schedule(seed)
        assert not outcome.failures, (seed, outcome.failures)
        answered += outcome.answered
    assert answered > 40 * 20


def test_the_same_seed_is_the_same_schedule_of_programs() -> None:
    assert schedule(5).digest == schedule(5).digest != schedule(6).digest


def prunes_marks_before_they_are_settled(patch: Patch) -> None:
    mark = Book.mark

    def forgets(self: Book, name: str, position: int, k: int, found: Any) -> None:
        mark(self, name, position, k, found)
        effects = self._opened(name).effects
        while len(effects) > 1:
            del effects[next(iter(effects))]
            self._count -= 1

    patch.setattr(Book, "mark", forgets)


def applies_effects_of_jobs_that_are_not_admitted(patch: Patch) -> None:
    def admits(self: Book, name: str) -> bool:
        self._jobs.setdefault(name, Job(name))
        return True

    patch.setattr(Book, "admits", admits)


def applies_replays_of_what_is_settled(patch: Patch) -> None:
    patch.setattr(Book, "counted", lambda self, name, position: False)


def loses_marks_when_voters_change(patch: Patch) -> None:
    """What is written again for new voters is what clients see of a register."""

    def bare(value: Value, wanted: list[Any], ballot: Any) -> Any:
        new, results = change(value, wanted, ballot)
        if any(isinstance(each.change, Rewrite) for each in wanted) and new.marks is not None:
            new = Value(new.version, new.stamp, new.data, new.ring)
        return new, results

    patch.setattr(proposer_module, "change", bare)


def takes_a_failed_propose_for_an_effect(patch: Patch) -> None:
    mark = values._mark

    def counts(wanted: Any, version: int, data: Any, book: Book) -> tuple[Result, Any]:
        result, data_after = mark(wanted, version, data, book)
        if result.status == "no":
            found = result.data if isinstance(result.data, int | float) else None
            book.mark(wanted.job, wanted.position, wanted.k, found)
        return result, data_after

    patch.setattr(values, "_mark", counts)


def admits_a_job_that_was_dismissed(patch: Patch) -> None:
    patch.setattr(marks_module, "GONE_BITS", 0)
    patch.setattr(Book, "dismiss", _forget)


def _forget(self: Book, name: str) -> None:
    if name in self._jobs:
        self._count -= len(self._opened(name).effects)
        self._ranges -= len(self._opened(name).settled)
        del self._jobs[name], self._open[name]
        self._changed = True


def knows_effects_by_their_operation(patch: Patch) -> None:
    """As the ring does: a replay asks under another name."""
    wanted = Operation.wanted

    def named(self: Operation) -> Any:
        each = wanted(self)
        if not isinstance(each.change, Effect):
            return each
        wish = each.change
        k = int(each.op[1:])
        changed = Effect(wish.job, wish.position, k, wish.wish, wish.settled)
        return values.Wanted(each.op, changed, each.base, each.rebase)

    patch.setattr(Operation, "wanted", named)


def collects_registers_that_a_job_may_write(patch: Patch) -> None:
    """A tombstone by its data alone: the admission is collected with it."""
    patch.setattr(Value, "dead", property(lambda self: self.data is None))
    patch.setattr(Book, "jobs", 0)


def tells_a_replay_what_is_there_now(patch: Patch) -> None:
    found = Book.found

    def present(self: Book, name: str, position: int, k: int) -> Any:
        first = found(self, name, position, k)
        return None if first is None else first + 1

    patch.setattr(Book, "found", present)


MUTANTS: list[tuple[Plant, int]] = [
    (prunes_marks_before_they_are_settled, 40),
    (applies_effects_of_jobs_that_are_not_admitted, 40),
    (applies_replays_of_what_is_settled, 60),
    (loses_marks_when_voters_change, 60),
    (takes_a_failed_propose_for_an_effect, 40),
    (admits_a_job_that_was_dismissed, 40),
    (knows_effects_by_their_operation, 40),
    (collects_registers_that_a_job_may_write, 100),
    (tells_a_replay_what_is_there_now, 40),
]


def schedules_until_caught(most: int, begin: int = 0) -> int:
    for seed in range(begin, begin + most):
        if schedule(seed).failures:
            return seed - begin + 1
    return 0


@pytest.mark.parametrize(("plant", "most"), MUTANTS, ids=[plant.__name__ for plant, _ in MUTANTS])
def test_each_planted_bug_of_effects_is_caught(plant: Plant, most: int, monkeypatch: Patch) -> None:
    plant(monkeypatch)
    assert schedules_until_caught(most), f"{plant.__name__} survived"
