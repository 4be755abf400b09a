"""The interpreter proper; see the package."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence

from manifold.vm.errors import Exhausted, ManifoldError
from manifold.vm.runtime.cells import Value, check_arguments, initial_cells, placed, trap
from manifold.vm.runtime.globals import Access, Globals, required
from manifold.vm.runtime.outcome import OUTPUT_BYTES_MAX, OnSleep, OnYield, Outcome, Stopped
from manifold.vm.runtime.results import float_best, from_entries
from manifold.vm.syntax.isa import Fault, Immediate
from manifold.vm.valid import CALL_DEPTH_MAX, Verified
from manifold.vm.valid.gas import clearing

DYNAMIC_STACK_MAX = 65_536  # values, where no verifier has bounded the stack


class _FaultError(Exception):
    """The instruction cannot be carried out."""

    def __init__(self, reason: Fault | str) -> None:
        super().__init__(reason)
        self.reason = reason


class _RefusedError(Exception):
    """Who has the globals could not carry out the instruction."""

    def __init__(self, error: ManifoldError) -> None:
        super().__init__(error)
        self.error = error


def run(
    verified: Verified,
    reduce: str,
    lo: int,
    hi: int,
    *,
    gas: int,
    on_yield: OnYield,
    on_sleep: OnSleep,
    arguments: Sequence[Value] = (),
    on_global: Globals | None = None,
) -> Outcome:
    """Runs every index of `[lo, hi)`, or the range program once."""
    program = verified.program
    tank = _Tank(gas, on_yield)
    given = check_arguments(verified, arguments)
    access = required(program, on_global)
    starts = [(lo, hi)] if program.kind == "range" else [(i, i + 1) for i in range(lo, hi)]
    entries = []
    room = OUTPUT_BYTES_MAX // 8 if reduce == "collect" else None
    for start, end in starts:
        cells = initial_cells(verified, start, end, given)
        index = _Index(verified, start, end, cells, tank, on_sleep, access, room)
        entries.append(index.run())
        if room is not None:
            room -= len(entries[-1])
    flat, json = program.kind == "range", program.dialect == "json"
    return Outcome(from_entries(reduce, entries, json=json, flat=flat), tank.used)


class _Tank:
    """Gas: what has been granted, what has been used."""

    def __init__(self, granted: int, on_yield: OnYield) -> None:
        self.granted, self.used, self.on_yield = granted, 0, on_yield

    def charge(self, cost: int, index: int) -> None:
        self.used += cost
        while cost and self.used > self.granted:
            more = self.on_yield(self.used)
            if more <= 0:
                raise Stopped(self.used, index)
            self.granted += more


class _Index:
    """One index (or one range) while it runs."""

    def __init__(
        self,
        verified: Verified,
        start: int,
        end: int,
        cells: list[Value],
        tank: _Tank,
        on_sleep: OnSleep,
        access: Access | None,
        room: int | None,
    ) -> None:
        self.verified, self.program = verified, verified.program
        self.json = self.program.dialect == "json"
        self.start, self.end, self.room = start, end, room
        self.cells, self.tank, self.on_sleep, self.world = cells, tank, on_sleep, access
        self.arrays: list[list[Value]] = [
            [0.0 if each.type == "f64" else 0] * each.length for each in self.program.arrays
        ]
        self.stack: list[Value] = []
        self.results: list[Value] = []
        self.returns: list[int] = []
        self.headers: dict[int, int] = {}
        for flow in verified.flows:
            self.headers.update(flow.plan.headers)
        self.at: int | None = self.program.entry

    def run(self) -> list[Value]:
        """From the entry to HALT; the values emitted."""
        main = self.verified.main
        self.tank.charge((main.plan.entry if main else 0) + clearing(self.program), self.start)
        while (at := self.at) is not None:
            spec = self.program.instructions[at].spec
            cost = self.headers.get(at, 0) if main else spec.gas
            self.tank.charge(cost, self.start)
            self.at = at + 1
            try:
                self.step(at, spec.name)
            except _FaultError as fault:
                raise trap(
                    self.program, at, fault.reason, self.cells, self.start, self.results
                ) from None
            except _RefusedError as refused:
                raise placed(
                    refused.error, self.program, at, self.cells, self.start, self.results
                ) from refused.error
        return self.results

    def step(self, at: int, name: str) -> None:
        spec = self.program.instructions[at].spec
        operand = self.program.instructions[at].operand
        if spec.name == "CALL":
            self.call(int(operand or 0))
            return
        takes, _ = spec.stack_of(json=self.json)
        if len(self.stack) < len(takes):
            raise _FaultError("stack underflow")
        taken = self.stack[len(self.stack) - len(takes) :]
        del self.stack[len(self.stack) - len(takes) :]
        if name in ("POP", "DUP", "SWAP", "OVER", "ROT3"):
            self.stack += [taken[int(letter) - 1] for letter in spec.left]
        elif name in BINARY:
            self.stack.append(BINARY[name](*promote(*taken)))
        elif name in UNARY:
            self.stack.append(UNARY[name](taken[0]))
        elif spec.immediate is Immediate.LABEL:
            if self.jumps(name, taken):
                self.at = int(operand or 0)
        elif name in ("DIV", "MOD", "FDIV", "SQRT"):
            self.stack.append(self.divide(name, taken))
        elif name == "RET":
            self.at = self.returns.pop()
        elif name == "HALT":
            self.at = None
        elif spec.immediate is Immediate.GLOBAL:
            self.stack += self.reach(name, int(operand or 0), taken)
        elif name in ("UNKNOWN", "RAISE"):
            raise _FaultError(Fault.UNKNOWN if name == "UNKNOWN" else Fault.RAISED)
        else:
            self.access(name, operand, taken)
        if self.verified.dynamic and len(self.stack) > DYNAMIC_STACK_MAX:
            raise _FaultError(f"the stack grew beyond {DYNAMIC_STACK_MAX} values")

    def jumps(self, name: str, taken: list[Value]) -> bool:
        if name == "JMP":
            return True
        if name == "LOOP":
            one: Value = 1.0 if self.verified.cells[0] == "f" else 1
            self.cells[0] = self.number(self.cells[0] + one)
            end: Value = float(self.end) if isinstance(one, float) else self.end
            return self.cells[0] < end
        return (taken[0] == 0) == (name == "JZ")

    def number(self, value: Value) -> Value:
        return wrap(value) if isinstance(value, int) else value

    def call(self, function: int) -> None:
        if len(self.returns) >= CALL_DEPTH_MAX:
            raise _FaultError(Fault.DEPTH)
        assert self.at is not None
        self.returns.append(self.at)
        self.at = self.program.functions[function].entry
        self.tank.charge(self.verified.functions[function].plan.entry, self.start)

    def divide(self, name: str, taken: list[Value]) -> Value:
        """DIV MOD FDIV SQRT, which differ between the dialects."""
        if name == "SQRT":
            value = float(taken[0])
            if self.json and value < 0:
                raise _FaultError(Fault.ROOT)
            return math.sqrt(value) if value >= 0 else math.nan
        left, right = promote(*taken)
        if right == 0:
            raise _FaultError(Fault.DIVISION)
        if name == "FDIV" or (self.json and name == "DIV"):
            return float_quotient(float(left), float(right))
        value = left // right if name == "DIV" else left % right
        return self.number(value)

    def access(self, name: str, operand: int | float | None, taken: list[Value]) -> None:
        """Constants, cells, arrays, results, the world."""
        number = int(operand) if isinstance(operand, int) else 0
        match name:
            case "PUSH":
                assert operand is not None
                self.stack.append(operand)
            case "LOAD":
                self.stack.append(self.cells[number])
            case "STORE":
                self.cells[number] = taken[0]
            case "LEN":
                self.stack.append(len(self.arrays[number]))
            case "LOADI":
                self.stack.append(self.arrays[number][self.element(number, taken[0])])
            case "STOREI":
                at = self.element(number, taken[1])
                is_float = self.program.arrays[number].type == "f64"
                self.arrays[number][at] = float(taken[0]) if is_float else taken[0]
            case "EMIT" | "PRINT":
                self.results.append(taken[0])
                if self.room is not None and len(self.results) > self.room:
                    raise Exhausted(f"More than {OUTPUT_BYTES_MAX} bytes of results in one run.")
            case "SLEEP":
                self.on_sleep(float(operand or 0.0))
            case "GET_START" | "GET_END":
                bound = self.start if name == "GET_START" else self.end
                self.stack.append(float(bound) if self.json else bound)
            case _:
                raise AssertionError(f"{name} has passed the verifier")

    def reach(self, name: str, number: int, taken: list[Value]) -> list[Value]:
        assert self.world is not None
        try:
            return self.world.carry_out(name, self.start, number, taken)
        except Stopped:
            raise
        except ManifoldError as error:
            raise _RefusedError(error) from error

    def element(self, array: int, index: Value) -> int:
        if not 0 <= index < len(self.arrays[array]):
            raise _FaultError(Fault.BOUNDS)
        return int(index)


def wrap(value: int) -> int:
    """Modulo 2^64, as a signed number."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def promote(left: Value, right: Value) -> tuple[Value, Value]:
    """Two values of one type: f64 if either is."""
    if isinstance(left, float) or isinstance(right, float):
        return float(left), float(right)
    return left, right


def float_quotient(left: float, right: float) -> float:
    """IEEE division; the divisor is not zero."""
    return left / right


def _either(
    of_ints: Callable[[int, int], int], of_floats: Callable[[float, float], float]
) -> Callable[[Value, Value], Value]:
    def apply(left: Value, right: Value) -> Value:
        if isinstance(left, int) and isinstance(right, int):
            return wrap(of_ints(left, right))
        return of_floats(float(left), float(right))

    return apply


def _flag(test: Callable[[Value, Value], bool]) -> Callable[[Value, Value], Value]:
    return lambda left, right: int(test(left, right))


def _bits(of_ints: Callable[[int, int], int]) -> Callable[[Value, Value], Value]:
    return lambda left, right: wrap(of_ints(int(left), int(right)))


def _checked(of_ints: Callable[[int, int], int]) -> Callable[[Value, Value], Value]:
    def apply(left: Value, right: Value) -> Value:
        exact = of_ints(int(left), int(right))
        if exact != wrap(exact):
            raise _FaultError(Fault.OVERFLOW)
        return exact

    return apply


def _floor(value: Value) -> Value:
    if isinstance(value, int) or value - value != 0:
        return value
    return math.copysign(float(math.floor(value)), value)


def _to_int(value: Value) -> int:
    if isinstance(value, float) and not -(2.0**63) <= value < 2.0**63:
        raise _FaultError(Fault.CONVERSION)
    return int(value)


BINARY: dict[str, Callable[[Value, Value], Value]] = {
    "ADD": _either(operator.add, operator.add),
    "SUB": _either(operator.sub, operator.sub),
    "MUL": _either(operator.mul, operator.mul),
    "ADDO": _checked(operator.add),
    "SUBO": _checked(operator.sub),
    "MULO": _checked(operator.mul),
    "MIN": _either(min, lambda left, right: float_best("min", left, right)),
    "MAX": _either(max, lambda left, right: float_best("max", left, right)),
    "EQ": _flag(operator.eq),
    "NE": _flag(operator.ne),
    "LT": _flag(operator.lt),
    "LE": _flag(operator.le),
    "GT": _flag(operator.gt),
    "GE": _flag(operator.ge),
    "AND": _bits(operator.and_),
    "OR": _bits(operator.or_),
    "XOR": _bits(operator.xor),
    "SHL": _bits(lambda left, right: left << (right % 64)),
    "SHR": _bits(lambda left, right: left >> (right % 64)),
    "SHRU": _bits(lambda left, right: (left % (1 << 64)) >> (right % 64)),
}

UNARY: dict[str, Callable[[Value], Value]] = {
    "NEG": lambda value: wrap(-value) if isinstance(value, int) else -value,
    "ABS": lambda value: wrap(abs(value)) if isinstance(value, int) else abs(value),
    "FLOOR": _floor,
    "NOT": lambda value: ~int(value),
    "FLOAT": float,
    "INT": _to_int,
}
