"""Programs whose positions write registers: runs, replays, late ones, and whether each counts once.

Interface: `schedule(seed, machine) -> Outcome` as in nexus.py; as many as one likes by
`python -m manifold.tools.simulator.nexus_effects SEED SCHEDULES`. A job has blocks
of positions; a position makes a few effects one after the other, each known by (job, position, k).
A block is run by whoever its owner asks, more than once: side by side, again later, or by somebody
who sleeps until the job is over. A run asks any node, again and again, until it is told. The owner
counts a block when one run of it has come to its end, tells the registers so by `settled`, and
dismisses the job when all are counted; then the sleepers go on, and late `Admit`s arrive.

Judged from outside, beside all that nexus_checks.py judges:
  J1  no mark comes into the chain of chosen values twice;
  J2  a register ends with what all effects make of it, each once: its data where they add up, and
      its version in any case;
  J3  all runs are told the same of one effect;
  J4  with each effect as one operation, from its first request to its first answer, and ordinary
      clients beside them, the history of each register is linearizable;
  J5  who comes late is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from manifold.kernel.nexus.messages import Operate
from manifold.kernel.nexus.protocol import Nexus
from manifold.kernel.nexus.values import (
    COUNTED,
    FENCED,
    Add,
    Admit,
    Delete,
    Dismiss,
    Effect,
    Get,
    Put,
    Value,
)
from manifold.kernel.nexus.values import Propose as Swap
from manifold.tools.simulator.linearizable import Operation
from manifold.tools.simulator.nexus import (
    PATIENCE_MS,
    REQUEST_MS,
    SETTLE_MS,
    STEP_MS,
    Client,
    Harness,
    Machine,
    Outcome,
    Plan,
    draw,
)
from manifold.tools.simulator.schedules import schedules

QUARTER = 4  # floats here are quarters, exact in binary; the checker knows integers only
SUM, COUNT, LAST, REAL = "sum", "count", "last", "real"
KINDS = (SUM, COUNT, LAST, REAL)  # of registers, and how programs write them
MIXED = "count.mixed"  # ordinary clients add to it as well
BACK_OFF_MS = 15.0
LATE_MS = 80.0
Step = tuple[str, int]  # the register, and what to add or put


@dataclass(frozen=True, slots=True)
class Program:
    """What the positions of a job do: the same whoever runs it."""

    job: str
    blocks: int
    positions: int  # of a block
    keys: tuple[str, ...]
    seed: int

    def steps(self, position: int) -> list[Step]:
        random = Random(f"{self.seed} {self.job} {position}")
        count = random.choice((1, 1, 2))
        return [(random.choice(self.keys), random.randint(1, 9)) for _ in range(count)]

    def block(self, number: int) -> range:
        return range(number * self.positions, (number + 1) * self.positions)


@dataclass(slots=True)
class Seen:
    """One effect as runs have seen it: from the first request to the first answer."""

    key: str
    adds: int
    begun_ms: float
    ended_ms: float | None = None
    found: int | float | None = None


class Owner:
    """One job: asks for runs, counts blocks."""

    def __init__(self, harness: Effects, program: Program) -> None:
        self.harness = harness
        self.program = program
        self.counted: dict[int, None] = {}
        self.seen: dict[tuple[int, int], Seen] = {}
        self.sleepers: list[Callable[[], None]] = []
        self.late = 0  # requests under way after the end
        self.admitted = self.over = False
        self._left = len(program.keys)

    def start(self) -> None:
        for key in self.program.keys:
            self.harness.insist(key, Admit(self.program.job), self._admitted)

    def _admitted(self, _answer: Any) -> None:
        self._left -= 1
        if self._left:
            return
        random = self.harness.random
        self.admitted = True
        for block in range(self.program.blocks):
            for _ in range(random.choice((1, 2, 2))):
                self.harness.world.at(random.random() * LATE_MS, self.run, block, True)
        if self.harness.healed:
            self.run_what_is_left()

    def run(self, block: int, sleeps: bool) -> None:
        Run(self, block, sleeps).next()

    def run_what_is_left(self) -> None:
        for block in range(self.program.blocks):
            if block not in self.counted and self.admitted:
                self.run(block, False)

    def finished(self, block: int) -> None:
        if block in self.counted:
            return
        self.counted[block] = None
        if len(self.counted) == self.program.blocks:
            self._left = len(self.program.keys)
            for key in self.program.keys:
                self.harness.insist(key, Dismiss(self.program.job), self._dismissed)

    def _dismissed(self, _answer: Any) -> None:
        self._left -= 1
        if self._left:
            return
        self.over = True
        held = {each.key: None for each in self.seen.values() if each.ended_ms is not None}
        for key in held:  # copies that lay somewhere; what held nothing may be collected by now
            self.late += 1
            self.harness.insist(key, Admit(self.program.job), self._admitted_late)
        for wake in self.sleepers:
            wake()

    def _admitted_late(self, answer: Any) -> None:
        self.late -= 1
        if (answer.status, answer.why) != ("refused", FENCED):
            self.harness.observer.fail(f"J5 {self.program.job} is admitted again: {answer}")

    def settled(self) -> tuple[tuple[int, int], ...]:
        """What is counted, as a run may have heard of it: all, some, in pieces."""
        random = self.harness.random
        blocks = [self.program.block(each) for each in self.counted]
        if random.random() < 0.3:
            blocks = blocks[: random.randint(0, len(blocks))]
        return tuple((block.start, block.stop) for block in blocks)


class Run:
    """One run of a block. `k` counts the successful writes of the present position."""

    def __init__(self, owner: Owner, block: int, sleeps: bool) -> None:
        self._owner = owner
        self._harness = owner.harness
        self._block = block
        self._places = list(owner.program.block(block))
        self._steps: list[Step] = []
        self._position = -1
        self._k = 0
        self._expected: int = owner.harness.random.choice((0, 0, 3))
        self._asleep_at = -1  # the position at which it falls asleep until the job is over
        if sleeps and owner.harness.random.random() < 0.3:
            self._asleep_at = owner.harness.random.choice(self._places)

    def next(self) -> None:
        """The next effect, the next position, or the end."""
        while not self._steps:
            if not self._places:
                self._owner.finished(self._block)
                return
            self._position, self._k = self._places.pop(0), 0
            self._steps = self._owner.program.steps(self._position)
        if self._position == self._asleep_at and not self._owner.over:
            self._asleep_at = -1
            self._owner.sleepers.append(self._effect)
            return
        pause_ms = self._harness.random.choice((0.0, 0.0, 1.0, LATE_MS))
        self._harness.world.at(pause_ms * self._harness.random.random(), self._effect)

    def _effect(self) -> None:
        key, number = self._steps[0]
        kind = key.partition(".")[0]
        wish: Put | Swap | Add
        if kind == COUNT:
            wish = Swap(self._expected, self._expected + 1)
        elif kind == LAST:
            wish = Put(number)
        else:
            wish = Add(number / QUARTER) if kind == REAL else Add(number)
        owner = self._owner
        change = Effect(owner.program.job, self._position, self._k, wish, owner.settled())
        if not owner.over:
            adds = 1 if kind == COUNT else number
            seen = Seen(key, adds, self._harness.world.now_ms)
            owner.seen.setdefault((self._position, self._k), seen)
        owner.late += owner.over
        late = owner.over
        self._harness.insist(key, change, lambda answer: self._told(answer, late))

    def _told(self, answer: Any, late: bool) -> None:
        self._owner.late -= late
        if answer.status == "refused" and answer.why in (COUNTED, FENCED):
            if answer.why == FENCED and not self._owner.counted:
                self._harness.observer.fail("J5 an effect is refused before anything is counted")
            return  # the run is stale
        if late:
            self._harness.observer.fail(f"J5 {self._owner.program.job} is over, and told {answer}")
        elif answer.status == "no":
            assert isinstance(answer.data, int), answer
            self._expected = answer.data
            self._effect()
        elif answer.status == "ok":
            self._applied(answer)
            self._steps.pop(0)
            self._k += 1
            self.next()
        else:
            self._harness.observer.fail(f"J3 an effect is told {answer}")

    def _applied(self, answer: Any) -> None:
        seen = self._owner.seen[(self._position, self._k)]
        if seen.ended_ms is None:
            seen.ended_ms, seen.found = self._harness.world.now_ms, answer.data
        elif seen.found != answer.data:
            name = (self._owner.program.job, self._position, self._k)
            self._harness.observer.fail(f"J3 {name} is told {seen.found}, then {answer.data}")


class Adder(Client):
    """An ordinary client beside them."""

    def _choose(self, random: Random) -> tuple[str, tuple[int | None, ...], Any]:
        if random.random() < 0.4:
            return "read", (), Get()
        return "add", (1,), Add(1)


class Effects(Harness):
    """One schedule."""

    def __init__(self, seed: int, machine: Machine = Nexus, plan: Plan | None = None) -> None:
        super().__init__(seed, machine, plan or drawn(seed))
        random = Random(f"effects {seed}")
        count = random.choice((1, 1, 2))
        keys = tuple(random.sample(KINDS, random.choice((1, 2, 2))))
        if self.plan.keys:
            keys = (*keys, MIXED)
        self.healed = False
        self._deletes = random.random() < 0.25
        self.owners = [
            Owner(
                self,
                Program(f"job{n}", random.choice((1, 2, 3)), random.choice((1, 1, 2)), keys, seed),
            )
            for n in range(count)
        ]
        self._ops = 0

    def insist(self, key: str, change: Any, told: Callable[[Any], None]) -> None:
        """Ask until it is told, whomever, each time under another name."""
        done = False

        def ask() -> None:
            if done:
                return
            up = [node for node in (self._core if self.healed else self.world.nodes) if node.up]
            if up:
                self._ops += 1
                wish = Operate(f"e{self._ops}", key, change, REQUEST_MS)
                self.ask(self.random.choice(up), wish, answered)
            self.world.at(PATIENCE_MS * (0.2 + self.random.random()), ask)

        def answered(_handle: int, answer: Any) -> None:
            nonlocal done
            if done:
                return  # a copy of it
            if answer.status in ("maybe", "unavailable", "busy"):
                self.outcome.maybes += 1
                self.world.at(BACK_OFF_MS * self.random.random(), ask)
                return
            done = True
            self.outcome.answered += 1
            told(answer)

        ask()

    # -- the course of a schedule -----------------------------------------------------------------

    def run(self) -> Outcome:
        self.begin()
        world, plan = self.world, self.plan
        world.break_things()
        for owner in self.owners:
            world.at(self.random.random() * 50.0, owner.start)
        self.clients = [Adder(self, n, plan.operations if plan.keys else 0) for n in range(2)]
        for client in self.clients:
            world.at(self.random.random() * 30.0, client.next)
        for _ in range(plan.changes):
            world.at(self.random.random() * plan.duration_ms, self._change)
        world.run(plan.duration_ms)
        self._heal()
        self.healed = True
        self._settle()
        for owner in self.owners:
            owner.run_what_is_left()
        if world.run_until(self._done, SETTLE_MS, STEP_MS) is None:
            counted = [(len(each.counted), each.over, each.late) for each in self.owners]
            self.observer.fail(f"jobs did not come to their end: {counted}")
        else:
            self._judge_values()
            if self._deletes:
                self._delete()
        self._effects_as_operations()
        return self.end()

    def _delete(self) -> None:
        """What comes after all that, to a register that is not there any more, is refused too."""
        told: list[Any] = []
        owner = self.owners[-1]
        for key in owner.program.keys[:-1]:
            late = Effect(owner.program.job, 0, 0, Put(0))
            again: Any = lambda _answer, key=key, late=late: self.insist(key, late, told.append)  # noqa: E731
            self.insist(key, Delete(), again)
        done = self.world.run_until(
            lambda: len(told) == len(owner.program.keys) - 1, SETTLE_MS, STEP_MS
        )
        if done is None or any(each.why != FENCED for each in told):
            self.observer.fail(f"J5 after deletion: {told}")

    def _done(self) -> bool:
        return all(owner.over and not owner.late for owner in self.owners)

    # -- what is judged ---------------------------------------------------------------------------

    def _judge_values(self) -> None:
        for key in self.owners[0].program.keys:
            chain = [value for _, value in sorted(self.observer.chosen[key].items())]
            self._judge_marks(key, chain)
            if key == MIXED:
                continue
            seen = [each for owner in self.owners for each in owner.seen.values()]
            mine = [each for each in seen if each.key == key and each.ended_ms is not None]
            # What came before only admits jobs; it may have been collected, and counted on.
            first = [place for place, value in enumerate(chain) if value.data is not None][:1]
            applied = chain[-1].version - chain[first[0] - 1].version if first else 0
            if applied != len(mine):
                self.observer.fail(f"J2 {applied} effects on {key}, and {len(mine)} were told")
            total = sum(each.adds for each in mine)
            wanted = {SUM: total, COUNT: len(mine), REAL: total / QUARTER}.get(key)
            if wanted is not None and mine and chain[-1].data != wanted:
                self.observer.fail(f"J2 {key} ends with {chain[-1].data!r}, not with {wanted}")

    def _judge_marks(self, key: str, chain: list[Value]) -> None:
        """J1: what has come and gone does not come again."""
        came: dict[tuple[str, int, int], None] = {}
        before: dict[tuple[str, int, int], None] = {}
        for value in chain:
            jobs = value.marks.jobs if value.marks is not None else ()
            now = {(job.job, at, k): None for job in jobs for at, k, _ in job.effects}
            for name in now:
                if name not in before and name in came:
                    self.observer.fail(f"J1 {name} is applied to {key} again")
            came |= now
            before = now

    def _effects_as_operations(self) -> None:
        """J4: an absent register counts as zero, so each history begins with a zero."""
        for key in (*self.owners[0].program.keys,):
            zero = Operation("zero", key, "write", (0,), None, 0.0, 0.0)
            self.history.append(zero)
        self.history = [
            replace(each, result=0) if each.kind == "read" and each.result is None else each
            for each in self.history
        ]
        for owner in self.owners:
            for (position, k), seen in owner.seen.items():
                if seen.key != LAST:
                    self.history.append(self._operation(owner, position, k, seen))

    def _operation(self, owner: Owner, position: int, k: int, seen: Seen) -> Operation:
        scale = QUARTER if seen.key == REAL else 1
        found = None if seen.found is None else int(seen.found * scale) + seen.adds
        client = f"{owner.program.job}.{position}.{k}"
        return Operation(client, seen.key, "add", (seen.adds,), found, seen.begun_ms, seen.ended_ms)


def drawn(seed: int) -> Plan:
    """As in nexus.py, without deletions; half of them with ordinary clients beside the runs."""
    plan = draw(seed)
    mixed = Random(f"mixed {seed}").random() < 0.5
    return replace(plan, deletes=0.0, keys=(MIXED,) if mixed else (), operations=3)


def schedule(seed: int, machine: Machine = Nexus, plan: Plan | None = None) -> Outcome:
    """One schedule of programs; a mutant of `machine` must be caught by some."""
    return Effects(seed, machine, plan).run()


def main(arguments: Sequence[str]) -> int:
    """`python -m manifold.tools.simulator.nexus_effects SEED SCHEDULES`."""
    return schedules(schedule, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
