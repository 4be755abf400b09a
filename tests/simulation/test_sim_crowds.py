"""More jobs write a global than it takes at a time: each waits for its turn, and has its effects.

Six nodes, whose globals take three jobs at a time. Every node is given jobs that add one to a
global for each of their indices and may write a second one; nodes crash that have no vote. Judged
from outside: every job ends `done`, and each global holds what its jobs have added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest

from manifold.kernel.effects import Effect
from manifold.kernel.nexus import marks
from manifold.kernel.nexus.marks import Book
from manifold.kernel.nexus.messages import ClientChange, Dismiss
from manifold.kernel.scheduler import keeper, takeover
from manifold.kernel.scheduler.crowds import Crowds
from manifold.kernel.scheduler.keeper import Keeper
from manifold.kernel.scheduler.messages import JobEvent, JobSpec
from manifold.tools.simulator.outbox import NODES, VOTERS, Schedule, Submission
from manifold.tools.simulator.workers import Program
from manifold.tools.simulator.world import Node
from manifold.vm.kid import kid_of

Patch = pytest.MonkeyPatch
Plant = Callable[[Patch], None]
PLACES = 3  # of a global
JOBS = 24
GLOBALS = ("a", "b")
GAS = 2e7
SPREAD_MS = 2_000.0
SETTLE_MS, STEP_MS = 120_000.0, 500.0
SEEDS = 24


class Crowd(Schedule):
    """See the module."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.submissions = [self._writer(number) for number in range(JOBS)]
        self.waited = 0

    def _writer(self, number: int) -> Submission:
        program = Program("ints", GAS, number)
        names = self.random.sample(GLOBALS, self.random.randint(1, 2))
        count = self.random.randint(1, 4)
        spec = JobSpec(kid_of(program.ir), 0, count, "sum", effects=tuple(names))
        return Submission(f"J-{number:016x}", spec, program.ir, False)

    def crowd(self) -> list[str]:
        """What was found."""
        world, random = self.world, self.random
        self.meet()
        for submission in self.submissions:
            world.at(random.uniform(0, SPREAD_MS), self._submit, submission, self._home(), ())
        for _ in range(random.randint(0, 3)):
            victim = random.choice(world.nodes[VOTERS:])
            world.at(random.uniform(0.5, 4.0) * SPREAD_MS, self._crash, victim)
        world.run(4.0 * SPREAD_MS)
        world.heal(None)
        if world.run_until(lambda: not self._open(), SETTLE_MS, STEP_MS) is None:
            self._fail(f"not within {SETTLE_MS:g} ms: {self._open()}")
        self._count()
        return self.outcome.failures

    def _home(self) -> Node:
        return self.random.choice(self.world.nodes[:NODES])

    def _happened(self, node: Node, event: JobEvent) -> None:
        super()._happened(node, event)
        self.waited += event.what == "waits"
        if event.what == "failed":
            self._fail(f"{event.job} has failed")

    def _count(self) -> None:
        """What was never answered may have been lost with its node; what was may not."""
        for name in GLOBALS:
            sure = most = 0
            for each in self.submissions:
                if each.spec.effects[0] == name:
                    most += each.spec.hi
                    sure += each.spec.hi if self.ended.get(each.job) == "done" else 0
            value = self._value(f"globals/{name}")
            if value != sure:
                self._fail(f"{name} holds {value}, and {sure} of {most} were added")


@pytest.fixture(autouse=True)
def few_places(monkeypatch: Patch) -> None:
    monkeypatch.setattr(marks, "JOBS_MAX", PLACES)


def never_dismisses(patch: Patch) -> None:
    """As if each owner died after the end of its job was recorded."""
    until = Keeper._until_ok

    def forgetful(self: Keeper, key: str, change: ClientChange) -> list[Effect]:
        return [] if isinstance(change, Dismiss) else until(self, key, change)

    patch.setattr(Keeper, "_until_ok", forgetful)


@pytest.mark.parametrize("left", [False, True], ids=["dismissed", "left behind"])
def test_every_job_has_its_turn_whatever_crashes(left: bool, monkeypatch: Patch) -> None:
    if left:
        never_dismisses(monkeypatch)
    waited = taken_over = 0
    for seed in range(SEEDS):
        crowd = Crowd(seed)
        assert not crowd.crowd(), (seed, crowd.outcome.failures)
        assert sum(state == "done" for state in crowd.ended.values()) > JOBS // 2
        waited += crowd.waited
        taken_over += crowd.outcome.taken_over
    assert waited > SEEDS
    assert taken_over


def pushes_out_the_oldest(patch: Patch) -> None:
    admit = Book.admit

    def rude(self: Book, name: str) -> Literal["ok", "refused", "busy"]:
        if admit(self, name) == "busy":
            self.dismiss(self.names[0])
        return admit(self, name)

    patch.setattr(Book, "admit", rude)


def looks_at_nobody(patch: Patch) -> None:
    def own(self: Crowds, name: str, jobs: Sequence[str]) -> str:
        crowd: Any = self._of[name]
        return str(crowd.asks.job.job)

    never_dismisses(patch)
    patch.setattr(Crowds, "suspect", own)


def looks_at_the_oldest_alone(patch: Patch) -> None:
    """And the oldest waits for the others."""
    never_dismisses(patch)
    patch.setattr(Crowds, "suspect", lambda self, name, jobs: jobs[0])


def asks_in_the_order_of_the_program(patch: Patch) -> None:
    for module in (keeper, takeover):
        patch.setattr(module, "admissions", lambda job: list(job.spec.effects))


def dismisses_whoever_it_looks_at(patch: Patch) -> None:
    """Whether its record says that it is over, or not."""
    patch.setattr(keeper, "over", lambda record: True)


MUTANTS = [
    pushes_out_the_oldest,
    looks_at_nobody,
    looks_at_the_oldest_alone,
    asks_in_the_order_of_the_program,
    dismisses_whoever_it_looks_at,
]


@pytest.mark.parametrize("plant", MUTANTS, ids=lambda plant: plant.__name__)
def test_each_planted_bug_is_caught(plant: Plant, monkeypatch: Patch) -> None:
    plant(monkeypatch)
    assert any(Crowd(seed).crowd() for seed in range(SEEDS)), f"{plant.__name__} survived"
