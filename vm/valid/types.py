"""Type inference: which value is an i64 and which an f64.

Interface: make nodes (`fixed`, `join`), say what must agree (`flows`), then `solve()`.
A value is a node. A node is an f64 as soon as one of the nodes it joins is; everything else is an
i64. That is the least solution, found by one search over the edges: linear time. Afterwards
`disagreement()` names the first place where an i64 flows into something that is an f64.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Flowing:
    """`source` flows into `into`; `at` is the instruction that makes it flow, `what` names it."""

    source: int
    into: int
    at: int
    what: str


class Types:
    """The graph of values."""

    def __init__(self) -> None:
        self._is_float = bytearray()
        self._uses: dict[int, list[int]] = {}
        self._flowing: list[Flowing] = []
        self._order: dict[int, int] = {}  # node -> when the search reached it

    def fixed(self, is_float: bool) -> int:
        """A value whose type is known."""
        self._is_float.append(is_float)
        return len(self._is_float) - 1

    def join(self, *sources: int) -> int:
        """A value that is an f64 if any of `sources` is."""
        node = self.fixed(False)
        for source in sources:
            self._uses.setdefault(source, []).append(node)
        return node

    def flows(self, source: int, into: int, at: int, what: str) -> None:
        """`source` becomes `into` (a cell, a slot at a join): the two types must be the same."""
        if source != into:
            self._uses.setdefault(source, []).append(into)
            self._flowing.append(Flowing(source, into, at, what))

    def solve(self) -> None:
        """Finds every f64."""
        work = deque(node for node, is_float in enumerate(self._is_float) if is_float)
        for node in work:
            self._order[node] = len(self._order)
        while work:
            for use in self._uses.get(work.popleft(), ()):
                if not self._is_float[use]:
                    self._is_float[use] = True
                    self._order[use] = len(self._order)
                    work.append(use)

    def letter(self, node: int) -> str:
        return "f" if self._is_float[node] else "i"

    def disagreement(self) -> tuple[Flowing, Flowing | None] | None:
        """An i64 that flows into an f64, and something that made it one. The earliest found."""
        wrong = [
            each
            for each in self._flowing
            if self._is_float[each.into] and not self._is_float[each.source]
        ]
        if not wrong:
            return None
        first = min(wrong, key=lambda each: (self._order[each.into], each.at))
        other = next(
            (e for e in self._flowing if e.into == first.into and self._is_float[e.source]), None
        )
        return first, other


def names(letters: str) -> str:
    """`if` as `( i64 f64 )`, bottom of the stack first."""
    words = ["i64" if letter == "i" else "f64" for letter in letters]
    return " ".join(["(", *words, ")"])
