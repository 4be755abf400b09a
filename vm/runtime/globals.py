"""Globals: registers that the whole cluster agrees on, as a running program reaches them.

Interface: `Globals` is what a run is given, and does the work: the worker's asks its node, another
may be a dict. It raises a ManifoldError where it cannot. `Access(program, provider)` is one run's;
both back ends call `carry_out`, so that they cannot differ.
Invariants:
  A1  `k` counts the writes of an index that took place, in program order, from 0: STORE, ADD, and
      PROPOSE where it found what was expected. (index, k) is the same in every run of that index
      that sees the same registers, so that who remembers it can do each write once;
  A2  a program gets and gives values of the declared type, i64 or f64, bit by bit (NaN has one
      spelling); a register that holds anything else is a Trap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from manifold.vm.errors import InvalidProgram, Trap
from manifold.vm.syntax.isa import Immediate
from manifold.vm.syntax.program import I64_MAX, I64_MIN, Global, Program, Type

Value = int | float


class Globals(Protocol):
    """Who reads and writes registers; `index` is a range program's start. Absent is 0 (or 0.0)."""

    def load(self, index: int, name: str, type: Type) -> Value: ...

    def store(self, index: int, k: int, name: str, value: Value) -> None: ...

    def propose(
        self, index: int, k: int, name: str, expected: Value, new: Value
    ) -> tuple[Value, bool]:
        """What it held, and whether it was `expected`, so that it holds `new` now."""

    def add(self, index: int, k: int, name: str, value: Value) -> Value:
        """What it held before."""


class Access:
    """See the module."""

    def __init__(self, program: Program, provider: Globals) -> None:
        self._program, self._provider = program, provider
        self._index: int | None = None
        self._k = 0
        self._loaded: dict[int, Value] = {}  # by this index, for the JSON dialect's PROPOSE

    def carry_out(self, name: str, index: int, number: int, taken: Sequence[Value]) -> list[Value]:
        """Instruction `name` on global `number`: what it leaves on the stack."""
        if index != self._index:
            self._index, self._k = index, 0
            self._loaded.clear()
        declared = self._program.globals[number]
        given = [_as_declared(declared, value) for value in taken]
        if name == "LOAD_GLOBAL":
            found = self._provider.load(index, *declared)
            self._loaded[number] = _checked(declared, found)
            return [self._loaded[number]]
        if name == "PROPOSE_GLOBAL":
            return self._propose(index, number, given)
        if name == "STORE_GLOBAL":
            self._provider.store(index, self._k, declared.name, given[0])
            self._k += 1
            return []
        assert name == "ADD_GLOBAL"
        before = self._provider.add(index, self._k, declared.name, given[0])
        self._k += 1
        return [_checked(declared, before)]

    def _propose(self, index: int, number: int, given: list[Value]) -> list[Value]:
        declared, json = self._program.globals[number], self._program.dialect == "json"
        if json:
            given = [self._loaded.get(number, 0.0), *given]
        found, done = self._provider.propose(index, self._k, declared.name, *given)
        self._k += done
        return [float(done)] if json else [_checked(declared, found), int(done)]


def _as_declared(declared: Global, value: Value) -> Value:
    if declared.type == "i64":
        return value
    return math.nan if value != value else float(value)


def _checked(declared: Global, value: Value) -> Value:
    """A2, of what a register holds."""
    if declared.type == "f64" and isinstance(value, float):
        return math.nan if value != value else value
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if declared.type == "i64" and is_whole and I64_MIN <= value <= I64_MAX:
        return value
    holds = {int: "an i64", float: "an f64"}.get(type(value), "something else")
    raise Trap(
        f"the global {declared.name} holds {holds}, but the program declares it {declared.type}",
        f"Declare it as it is, or set it anew: manifold set /globals/{declared.name} "
        f"{'0' if declared.type == 'i64' else '0.0'}.",
    )


def required(program: Program, provider: Globals | None) -> Access | None:
    """What a run of `program` needs; InvalidProgram if it needs globals and nobody has them."""
    if not program.globals or "globals" not in program.capabilities:
        return None
    if provider is not None:
        return Access(program, provider)
    code = program.instructions
    at = next(at for at, e in enumerate(code) if e.spec.immediate is Immediate.GLOBAL)
    raise InvalidProgram(
        f"{program.filename or program.kid}, line {code[at].line}, {program.text_of(at)}: the "
        "program uses globals, and here are none.",
        "Run it on a cluster, which has them: manifold up.",
        line=code[at].line,
        instruction=program.text_of(at),
    )
