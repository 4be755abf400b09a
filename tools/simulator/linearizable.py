"""Whether a history of a key-value store could have happened one operation at a time.

Interface: `check` takes what clients saw, `Operation`s in any order, and returns None where every
key's operations can be placed on one line that keeps real time and explains every result. Else it
returns a `Violation`, whose text is for people, or an `Undecided`, which is one too: that search
went past its bound, and nobody may take it for a pass. A key is a register of its own: absent
(None), an integer or bytes. An operation without an end may have taken effect at any time after it
began, or never; its result is not looked at.

    kind    argument          result                      effect
    read    ()                the value, None if absent
    write   (value,)          None                        becomes value
    cas     (expected, new)   whether it was expected     becomes new, where it was expected
    add     (n,)              the new value               adds; absent counts as 0
    delete  ()                whether there was a value   becomes absent
    create  (value,)          whether it was absent       becomes value, where it was absent

`None` as an expected or a new value is absence. An add to bytes is refused: None, no effect.
Invariants: L1 a history is refused only when no order exists: each shortcut below keeps at least
one order if there is any. L2 the same history gives the same answer, whatever its order. L3 equal
times count as overlapping. Shortcuts and why they are sound:
  - what needs the present value first, then the earliest end: only an order of trying;
  - of those that may come next, one that fits and can never change the value, by its kind and
    result, is taken at once: any order stays one when it is moved to the front. A write of the
    value that is there already is *not* such a one: it may be needed later;
  - of equal operations of unknown fate the one that began first goes first;
  - an operation of unknown fate is placed only where it changes the value, and not right before
    one that overwrites unseen: leaving it out would be the same.
Source: Wing and Gong, Testing and Verifying Concurrent Objects (1993); Lowe, Testing for
Linearizability (2017), the memory of (placed, value).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["read", "write", "cas", "add", "delete", "create"]
Value = int | bytes | None

# About 20 us and 300 bytes each: 4 s and 60 MB a key before a search is given up.
CONFIGURATIONS_MAX = 200_000
SHOWN_MAX = 12  # operations of a prefix that a text shows, the last ones


@dataclass(frozen=True, slots=True)
class Operation:
    """What one client asked of one key, and what it was told; `ended_ms` None: nothing."""

    client: str
    key: str
    kind: Kind
    argument: tuple[Value, ...]
    result: Value | bool
    begun_ms: float
    ended_ms: float | None

    def __post_init__(self) -> None:
        assert self.ended_ms is None or self.begun_ms <= self.ended_ms, "time goes forward"
        arity = {"read": 0, "write": 1, "cas": 2, "add": 1, "delete": 0, "create": 1}
        assert len(self.argument) == arity[self.kind], f"arguments of {self.kind}"

    def __str__(self) -> str:
        words = f"{self.kind}({', '.join(map(repr, self.argument))})"
        if self.ended_ms is None:
            return f"{self.client}: {words} -> unknown   from {self.begun_ms:g} ms"
        return f"{self.client}: {words} -> {self.result!r}   {self.begun_ms:g}-{self.ended_ms:g} ms"


@dataclass(frozen=True, slots=True)
class Violation:
    """No order explains `key`: after `prefix`, the longest found, none of `stuck` can be next."""

    key: str
    prefix: tuple[Operation, ...]
    value: Value
    stuck: tuple[Operation, ...]
    configurations: int

    def verdict(self) -> str:
        return f"The history of key {self.key!r} is not linearizable."

    def __str__(self) -> str:
        hidden = max(0, len(self.prefix) - SHOWN_MAX)
        lines = [self.verdict(), f"The longest order found ({len(self.prefix)} operations):"]
        lines += [f"  ... {hidden} before these"] if hidden else []
        lines += [f"  {each}" for each in self.prefix[hidden:]]
        value = "absent" if self.value is None else repr(self.value)
        lines += [f"leaves the key {value}. One of these must come next, and none can:"]
        lines += [f"  {each}" for each in self.stuck]
        return "\n".join(lines)


class Undecided(Violation):
    """The search was given up: the history may be linearizable or not. Never a pass."""

    __slots__ = ()

    def verdict(self) -> str:
        return (
            f"Undecided: {self.configurations} configurations of key {self.key!r} were tried. "
            "Use fewer operations a key, or fewer of unknown fate."
        )


def check(
    history: Sequence[Operation], *, configurations_max: int = CONFIGURATIONS_MAX
) -> Violation | None:
    """None where each key's operations are linearizable; a definite violation before a doubtful."""
    by_key: dict[str, list[Operation]] = {}
    for operation in history:
        by_key.setdefault(operation.key, []).append(operation)
    undecided: Violation | None = None
    for key in sorted(by_key):
        found = _Search(key, by_key[key]).run(configurations_max)
        if isinstance(found, Undecided):
            undecided = undecided or found
        elif found is not None:
            return found
    return undecided


def apply(operation: Operation, value: Value) -> tuple[Value | bool, Value]:
    """The result and the next value of an operation on a register that holds `value`."""
    match operation.kind:
        case "read":
            return value, value
        case "write":
            return None, operation.argument[0]
        case "cas":
            expected, new = operation.argument
            return (True, new) if value == expected else (False, value)
        case "add":
            if isinstance(value, bytes):
                return None, value
            (number,) = operation.argument
            assert isinstance(number, int), "only a number can be added"
            return (value or 0) + number, (value or 0) + number
        case "delete":
            return value is not None, None
        case "create":
            return (True, operation.argument[0]) if value is None else (False, value)


def _explains(told: Value | bool, result: Value | bool) -> bool:
    return told == result and type(told) is type(result)  # True is not 1


def _never_changes(operation: Operation) -> bool:
    """Whether an operation with that result leaves every value as it was."""
    match operation.kind:
        case "read":
            return True
        case "cas" | "delete" | "create" if operation.result is False:
            return True
        case "cas":
            return operation.argument[0] == operation.argument[1]
        case "add":
            return operation.result is None
        case _:
            return False


Move = tuple[int, Operation, Value, bool]  # its bit, itself, the value after it, hope
Frame = tuple[int, Value, Iterator[Move]]  # what is placed, the value, what is left to try


class _Search:
    """One key. `placed` is a mask: bit i is a completed operation, the bits above the unknown.

    `hope`: the last one placed is of unknown fate, and the next must be one that sees its effect.
    """

    def __init__(self, key: str, operations: Sequence[Operation]) -> None:
        done = [each for each in operations if each.ended_ms is not None]
        lost = [each for each in operations if each.ended_ms is None and each.kind != "read"]
        self.key = key
        self.completed = sorted(done, key=_order)
        self.unknown = sorted(lost, key=_order)
        self.ends = [
            math.inf if each.ended_ms is None else each.ended_ms for each in self.completed
        ]
        self.silent = [_never_changes(each) for each in self.completed]
        self.all_completed = (1 << len(self.completed)) - 1
        self.twins = self._twins()

    def _twins(self) -> list[int]:
        """For each unknown the bit of the equal one that began before it, or 0."""
        last: dict[tuple[Kind, tuple[Value, ...]], int] = {}
        twins = []
        for index, each in enumerate(self.unknown):
            twins.append(last.get((each.kind, each.argument), 0))
            last[each.kind, each.argument] = 1 << (len(self.completed) + index)
        return twins

    def run(self, configurations_max: int) -> Violation | None:
        """A depth-first search without recursion; `path` is how the top of the stack came about."""
        if not self.completed:
            return None
        seen: set[tuple[int, Value, bool]] = set()
        path: list[Operation] = []
        best: tuple[int, int, Value, tuple[Operation, ...]] = (0, 0, None, ())
        stack: list[Frame] = [(0, None, iter(self.moves(0, None, False)))]
        while stack:
            placed, _, moves = stack[-1]
            move = next(moves, None)
            if move is None:
                stack.pop()
                del path[-1:]  # the first frame has none
                continue
            bit, operation, value, hope = move
            placed |= bit
            if (placed, value, hope) in seen:
                continue
            if placed & self.all_completed == self.all_completed:
                return None
            if len(seen) >= configurations_max:
                return self.verdict(Undecided, best, len(seen))
            seen.add((placed, value, hope))
            path.append(operation)
            stack.append((placed, value, iter(self.moves(placed, value, hope))))
            count = (placed & self.all_completed).bit_count()
            if count > best[0]:
                best = (count, placed, value, tuple(path))
        return self.verdict(Violation, best, len(seen))

    def moves(self, placed: int, value: Value, hope: bool) -> list[Move]:
        """What may come next and fits, in the order of trying."""
        indices = self.candidates(placed)
        found: list[Move] = []
        for index in indices:
            operation = self.completed[index]
            told, after = apply(operation, value)
            if (hope and operation.kind == "write") or not _explains(told, operation.result):
                continue
            move = (1 << index, operation, after, False)
            if self.silent[index]:
                return [move]
            found.append(move)
        found.sort(
            key=lambda move: move[1].kind == "write"
        )  # what needs this value, while it is here
        horizon = min(self.ends[index] for index in indices)
        return found + self.unknown_moves(placed, value, hope, horizon)

    def candidates(self, placed: int) -> list[int]:
        """The completed ones that no other unplaced one must precede, earliest end first."""
        horizon = math.inf
        found = []
        first = (~placed & (placed + 1)).bit_length() - 1  # the lowest that is not placed
        for index in range(first, len(self.completed)):
            if self.completed[index].begun_ms > horizon:
                break
            if not placed >> index & 1:
                found.append(index)
                horizon = min(horizon, self.ends[index])
        return sorted(found, key=self.ends.__getitem__)

    def unknown_moves(self, placed: int, value: Value, hope: bool, horizon: float) -> list[Move]:
        found: list[Move] = []
        for index, operation in enumerate(self.unknown):
            if operation.begun_ms > horizon:
                break
            bit = 1 << (len(self.completed) + index)
            twin = self.twins[index]
            if placed & bit or (twin and not placed & twin):
                continue
            if hope and operation.kind in ("write", "delete"):
                continue
            _, after = apply(operation, value)
            if after != value:
                found.append((bit, operation, after, True))
        return found

    def verdict(
        self,
        kind: type[Violation],
        best: tuple[int, int, Value, tuple[Operation, ...]],
        tried: int,
    ) -> Violation:
        _, placed, value, prefix = best
        stuck = tuple(self.completed[index] for index in self.candidates(placed))
        return kind(self.key, prefix, value, stuck, tried)


def _order(operation: Operation) -> tuple[float, float, str, str, str, str]:
    """A total order, so that the answer does not depend on how the history was collected."""
    ended = math.inf if operation.ended_ms is None else operation.ended_ms
    words = (operation.client, operation.kind, repr(operation.argument), repr(operation.result))
    return (operation.begun_ms, ended, *words)
