"""Expressions of a kernel as instructions.

Interface: `NumberWriter` is the base of writer.py's `Writer`. `expression(node)` leaves the value,
or the values, of a checked expression on the stack; `jump_if(node, label, sense)` goes to the label
if the truth of the condition is `sense`.
Python's meaning is kept exactly: see docs/python.md. An int that would be no i64 is a fault, unless
the kernel wraps; the check is left out where ranges.py shows that it cannot fail, and below a mask
(`(a * b + c) & mask`), where only the low bits count.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from manifold.vm.python.code import Code, Label
from manifold.vm.python.constants import Number
from manifold.vm.python.expressions import RING
from manifold.vm.python.kinds import Checked
from manifold.vm.python.ranges import EXACT, Ranges, fits
from manifold.vm.syntax.program import I64_MAX, I64_MIN

_NAME: dict[type[ast.AST], str] = {
    **{ast.Add: "ADD", ast.Sub: "SUB", ast.Mult: "MUL", ast.FloorDiv: "DIV", ast.Mod: "MOD"},
    **{ast.BitAnd: "AND", ast.BitOr: "OR", ast.BitXor: "XOR"},
    **{ast.Eq: "EQ", ast.NotEq: "NE", ast.Lt: "LT", ast.LtE: "LE", ast.Gt: "GT", ast.GtE: "GE"},
}
_COMMUTES = (ast.Add, ast.Mult, ast.BitAnd, ast.BitOr, ast.BitXor)
_MIRROR = {"EQ": "EQ", "NE": "NE", "LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE"}
_OF_SMALLER = {"EQ": 0, "NE": 1, "LT": 1, "LE": 1, "GT": 0, "GE": 0}  # what `smaller op larger` is
_ROUNDER = 2.0**52  # adding it to a smaller float rounds that to a whole number, halves to even


def wrapped(value: int) -> int:
    """Modulo 2^64, as a signed number."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


@dataclass
class Frame:
    """A kernel being written: the whole program's, one copied into another, or a function's."""

    checked: Checked
    cells: dict[str, int]
    line: int  # where it is called, if its own lines are of another file
    leave: Label | None = None  # where a copied kernel's return goes
    is_main: bool = False
    ranges: Ranges = field(init=False)
    loops: list[tuple[Label, Label]] = field(default_factory=list)  # continue, break
    declared: set[str] = field(default_factory=set)  # arrays that have been made

    def __post_init__(self) -> None:
        self.ranges = Ranges(self.checked)


class NumberWriter:
    """See the module."""

    def __init__(self, code: Code, frame: Frame) -> None:
        self.code, self.frame = code, frame
        self.lent: list[tuple[int, str]] = []  # cells in use for what has no name

    # -- small things ------------------------------------------------------------------------

    @contextmanager
    def cells(self, letters: str) -> Iterator[list[int]]:
        """Cells to keep values in for a while."""
        lent = [(self.code.cell(letter), letter) for letter in letters]
        self.lent += lent
        yield [cell for cell, _ in lent]
        for each in lent:
            self.lent.remove(each)
            self.code.free(*each)

    def type(self, node: ast.AST) -> str:
        return self.frame.checked.types[node]

    def constant(self, node: ast.AST) -> Number | None:
        return self.frame.checked.constants.get(node)

    @property
    def wraps(self) -> bool:
        return self.frame.checked.wrap

    def ops(self, *parts: str | tuple[str, int | float]) -> None:
        """Instructions, those with an operand as pairs."""
        for part in parts:
            if isinstance(part, str):
                self.code.op(part)
            else:
                self.code.op(*part)

    def raise_unless(self, name: str, text: str) -> None:
        """A fault unless the value on top makes the jump `name` go."""
        fine = self.code.label()
        self.code.op(name, fine)
        self.code.raise_fault(text)
        self.code.mark(fine)

    def touch(self, node: ast.AST) -> None:
        """What is written from now on belongs to the line of `node`."""
        source = self.frame.checked.source
        self.code.line = self.frame.line or source.line(node)

    # -- expressions -------------------------------------------------------------------------

    def expression(self, node: ast.AST, *, ring: bool = False) -> None:
        """`ring`: only the value modulo 2^64 is wanted."""
        value = self.constant(node)
        if value is not None:
            self.code.push(value if isinstance(value, float) else wrapped(int(value)))
            return
        match node:
            case ast.Name():
                self.code.op("LOAD", self.frame.cells[node.id])
            case ast.BinOp():
                self.binary(node, ring)
            case ast.UnaryOp():
                self.unary(node, ring)
            case ast.BoolOp():
                self.either(node)
            case ast.IfExp():
                self.choice(node)
            case ast.Compare():
                self.compare(node)
            case ast.Attribute() | ast.Subscript() if node in self.frame.checked.touched:
                self.touch(node)
                self.code.of_global("LOAD_GLOBAL", self.frame.checked.touched[node])
            case ast.Subscript():
                self.code.op("LOADI", self.element(node))
            case ast.Call():
                self.call(node)
            case _:
                raise AssertionError(f"{type(node).__name__} has passed the checker")

    def call(self, node: ast.Call) -> None:
        """writer.py's: it knows other kernels."""
        raise AssertionError("overridden")

    def as_float(self, node: ast.AST) -> None:
        """A number, as a float."""
        value = self.constant(node)
        if value is None:
            self.expression(node)
            if self.type(node) != "f":
                self.code.op("FLOAT")
            return
        try:
            self.code.push(float(value))
        except OverflowError:
            self.code.push(0.0)
            self.code.raise_fault("int too large to convert to float")

    def element(self, node: ast.Subscript) -> int:
        """Leaves the index of an element, counted from the front; the number of its array."""
        assert isinstance(node.value, ast.Name)
        name = node.value.id
        length = self.frame.checked.arrays[name].length
        at = self.constant(node.slice)
        if at is not None:
            self.code.push(wrapped(int(at) + length if at < 0 else int(at)))
        else:
            self.expression(node.slice)
            if self.frame.ranges.of(node.slice)[0] < 0:  # a negative index counts from the end
                self.ops("DUP", ("PUSH", 63), "SHR", ("PUSH", length), "AND", "ADD")
        return self.array(name)

    def array(self, name: str) -> int:
        """writer.py's."""
        raise AssertionError("overridden")

    # -- operators ---------------------------------------------------------------------------

    def binary(self, node: ast.BinOp, ring: bool) -> None:
        self.touch(node)
        op, kind = node.op, self.type(node)
        if isinstance(op, ast.Pow):
            self.power(node.left, node.right)
        elif isinstance(op, ast.Div):
            self.true_divide(node)
        elif isinstance(op, (ast.LShift, ast.RShift)):
            self.shift(node)
        elif kind == "f":
            self.as_float(node.left)
            self.as_float(node.right)
            self.code.op(_NAME[type(op)])
        else:
            inner = ring and isinstance(op, RING)
            sides = [node.left, node.right]
            if self.constant(node.left) is not None and isinstance(op, _COMMUTES):
                sides.reverse()  # the compiler looks for constants on the right
            for side, other in zip(sides, reversed(sides), strict=True):
                self.expression(side, ring=inner or self.masks(node, other))
            if isinstance(op, ast.FloorDiv):
                self.floor_divide(node)
            else:
                name = _NAME[type(op)]
                checks = isinstance(op, (ast.Add, ast.Sub, ast.Mult)) and not inner
                self.code.op(name + "O" if checks and not self.is_safe(node) else name)

    def masks(self, node: ast.BinOp, other: ast.expr) -> bool:
        """Whether only the low bits of the operand beside `other` count; as the checker says."""
        value = self.constant(other)
        if not isinstance(value, int):
            return False
        if isinstance(node.op, ast.BitAnd):
            return 0 <= value <= I64_MAX
        is_power = 0 < value <= 1 << 62 and value & (value - 1) == 0
        return isinstance(node.op, ast.Mod) and other is node.right and is_power

    def is_safe(self, node: ast.BinOp) -> bool:
        """Whether an int operator needs no check."""
        return self.wraps or fits(self.frame.ranges.exact(node))

    def floor_divide(self, node: ast.BinOp) -> None:
        """Both are on the stack. Only the least i64 by -1 is no i64."""
        ranges = self.frame.ranges
        low, high = ranges.of(node.right)
        if self.wraps or ranges.of(node.left)[0] > I64_MIN or not low <= -1 <= high:
            self.code.op("DIV")
            return
        with self.cells("i") as (divisor,):
            fine = self.code.label()
            self.ops("DUP", ("STORE", divisor), "DIV", "DUP", ("PUSH", I64_MIN), "NE")
            self.ops(("JNZ", fine), ("LOAD", divisor), ("PUSH", -1), "NE", ("JNZ", fine))
            self.code.raise_fault("int overflow")
            self.code.mark(fine)

    def true_divide(self, node: ast.BinOp) -> None:
        """Ints are divided as floats, which is exact only where both are."""
        is_whole = "f" not in self.type(node.left) + self.type(node.right)
        for each in (node.left, node.right):
            low, high = self.frame.ranges.of(each)
            if not is_whole or (low >= -EXACT and high < EXACT):
                self.as_float(each)
                continue
            self.expression(each)
            self.ops("DUP", ("PUSH", EXACT), "ADD", ("PUSH", 54), "SHRU")
            self.raise_unless("JZ", "int beyond 2**53 in a true division")
            self.code.op("FLOAT")
        self.code.op("FDIV")

    def shift(self, node: ast.BinOp) -> None:
        left, right = node.left, node.right
        low, high = self.frame.ranges.of(right)
        if isinstance(node.op, ast.RShift):
            self.expression(left)
            self.expression(right)
            if low < 0:
                self.code.op("DUP")
                self.ops(("PUSH", 0), "LT")
                self.raise_unless("JZ", "negative shift count")
            if high > 63:
                self.ops(("PUSH", 63), "MIN")
            self.code.op("SHR")
        elif low == high and 0 <= low <= 62:
            self.expression(left)
            self.code.push(1 << low)
            ends = [each << low for each in self.frame.ranges.of(left)]
            safe = self.wraps or fits((min(ends), max(ends)))
            self.code.op("MUL" if safe else "MULO")
        else:
            self.shift_left(left, right)

    def shift_left(self, left: ast.expr, right: ast.expr) -> None:
        """By a number that is only known when it runs."""
        with self.cells("ii") as (value, count):
            far, zero, end = self.code.label(), self.code.label(), self.code.label()
            self.expression(left)
            self.expression(right)
            self.ops(("STORE", count), ("STORE", value), ("LOAD", count), ("PUSH", 0), "LT")
            self.raise_unless("JZ", "negative shift count")
            self.ops(("LOAD", count), ("PUSH", 63), "GT", ("JNZ", far))
            self.ops(("LOAD", value), ("LOAD", count), "SHL")
            if not self.wraps:
                self.ops("DUP", ("LOAD", count), "SHR", ("LOAD", value), "EQ")
                self.raise_unless("JNZ", "int overflow")
            self.code.op("JMP", end)
            self.code.mark(far)
            if not self.wraps:
                self.ops(("LOAD", value), ("JZ", zero))
                self.code.raise_fault("int overflow")
            self.code.mark(zero)
            self.code.push(0)
            self.code.mark(end)

    def power(self, base: ast.expr, exponent: ast.expr) -> None:
        """Of ints: by squaring, from the front where the exponent is known."""
        times = "MUL" if self.wraps else "MULO"
        known = self.constant(exponent)
        self.expression(base)
        if known is not None:
            if known == 0:
                self.ops("POP", ("PUSH", 1))
                return
            with self.cells("i") as (kept,):
                self.ops("DUP", ("STORE", kept))
                for bit in f"{int(known):b}"[1:]:
                    self.ops("DUP", times)
                    if bit == "1":
                        self.ops(("LOAD", kept), times)
            return
        with self.cells("iii") as (square, left, result):
            again, even, end = self.code.label(), self.code.label(), self.code.label()
            self.code.op("STORE", square)
            self.expression(exponent)
            self.ops("DUP", ("STORE", left), ("PUSH", 0), "LT")
            self.raise_unless("JZ", "negative power of an int")
            self.ops(("PUSH", 1), ("STORE", result))
            self.code.mark(again)
            self.ops(("LOAD", left), ("PUSH", 1), "AND", ("JZ", even))
            self.ops(("LOAD", result), ("LOAD", square), times, ("STORE", result))
            self.code.mark(even)
            self.ops(("LOAD", left), ("PUSH", 1), "SHR", "DUP", ("STORE", left), ("JZ", end))
            self.ops(("LOAD", square), "DUP", times, ("STORE", square), ("JMP", again))
            self.code.mark(end)
            self.code.op("LOAD", result)

    def unary(self, node: ast.UnaryOp, ring: bool) -> None:
        operand = node.operand
        match node.op:
            case ast.Not() if isinstance(operand, (ast.BoolOp, ast.UnaryOp)):
                self.flag(node)
            case ast.Not():
                self.expression(operand)
                self.ops(("PUSH", 0), "EQ")
            case ast.UAdd():
                self.expression(operand, ring=ring)
            case ast.Invert():
                self.expression(operand, ring=ring)
                self.code.op("NOT")
            case _:
                least = self.frame.ranges.of(operand)[0]
                if ring or self.wraps or self.type(operand) == "f" or least > I64_MIN:
                    self.expression(operand, ring=ring)
                    self.code.op("NEG")
                else:
                    self.code.push(0)
                    self.expression(operand)
                    self.code.op("SUBO")

    # -- truth -------------------------------------------------------------------------------

    def either(self, node: ast.BoolOp) -> None:
        """`and` and `or` as values: the first that decides."""
        jump, end = "JZ" if isinstance(node.op, ast.And) else "JNZ", self.code.label()
        for each in node.values[:-1]:
            self.expression(each)
            self.ops("DUP", (jump, end), "POP")
        self.expression(node.values[-1])
        self.code.mark(end)

    def choice(self, node: ast.IfExp) -> None:
        other, end = self.code.label(), self.code.label()
        self.jump_if(node.test, other, False)
        self.expression(node.body)
        self.code.op("JMP", end)
        self.code.mark(other)
        self.expression(node.orelse)
        self.code.mark(end)

    def flag(self, node: ast.AST) -> None:
        """A condition as 1 or 0."""
        no, end = self.code.label(), self.code.label()
        self.jump_if(node, no, False)
        self.ops(("PUSH", 1), ("JMP", end))
        self.code.mark(no)
        self.code.push(0)
        self.code.mark(end)

    def jump_if(self, node: ast.AST, label: Label, sense: bool) -> None:
        value = self.constant(node)
        if value is not None:
            if bool(value) is sense:
                self.code.op("JMP", label)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            self.jump_if(node.operand, label, not sense)
        elif isinstance(node, ast.BoolOp):
            decides = isinstance(node.op, ast.Or)  # which truth of one decides the whole
            past = self.code.label()
            for each in node.values[:-1]:
                self.jump_if(each, label if decides is sense else past, decides)
            self.jump_if(node.values[-1], label, sense)
            self.code.mark(past)
        elif isinstance(node, ast.Compare) and len(node.ops) > 1 and not sense:
            self.chain(node, label)
            self.code.op("JZ", label)
        else:
            self.expression(node)
            self.code.op("JNZ" if sense else "JZ", label)

    def compare(self, node: ast.Compare) -> None:
        if len(node.ops) == 1:
            self.expression(node.left)
            self.expression(node.comparators[0])
            self.order(node.ops[0], node.left, node.comparators[0])
            return
        no, end = self.code.label(), self.code.label()
        self.chain(node, no)
        self.code.op("JMP", end)
        self.code.mark(no)
        self.code.push(0)
        self.code.mark(end)

    def chain(self, node: ast.Compare, no: Label) -> None:
        """`a < b < c`: goes to `no`, or leaves the flag of the last comparison."""
        left = node.left
        self.expression(left)
        for op, right in zip(node.ops[:-1], node.comparators[:-1], strict=True):
            with self.cells(self.type(right)) as (kept,):
                self.expression(right)
                self.ops("DUP", ("STORE", kept))
                self.order(op, left, right)
                self.ops(("JZ", no), ("LOAD", kept))
            left = right
        self.expression(node.comparators[-1])
        self.order(node.ops[-1], left, node.comparators[-1])

    def order(self, op: ast.AST, left: ast.AST, right: ast.AST) -> None:
        """Compares the two on top; an int with a float exactly."""
        name, kinds = _NAME[type(op)], self.type(left) + self.type(right)
        if "f" not in kinds or kinds == "ff":
            self.code.op(name)
            return
        low, high = self.frame.ranges.of(right if kinds[0] == "f" else left)
        if low >= -EXACT and high <= EXACT:
            self.code.op(name)
            return
        with self.cells("if") as (whole, real):
            if kinds[0] == "f":
                name = _MIRROR[name]
                self.ops(("STORE", whole), ("STORE", real))
            else:
                self.ops(("STORE", real), ("STORE", whole))
            self.exact_order(name, whole, real)

    def exact_order(self, name: str, whole: int, real: int) -> None:
        """Rounding keeps the order, so only where the rounded int equals the float is more to do:
        the float is whole then, and an i64 unless it is 2^63."""
        unequal, above, end = self.code.label(), self.code.label(), self.code.label()
        self.ops(("LOAD", whole), "FLOAT", ("LOAD", real), "EQ", ("JZ", unequal))
        self.ops(("LOAD", real), ("PUSH", 2.0**63), "EQ", ("JNZ", above))
        self.ops(("LOAD", whole), ("LOAD", real), "INT", name, ("JMP", end))
        self.code.mark(above)
        self.ops(("PUSH", _OF_SMALLER[name]), ("JMP", end))
        self.code.mark(unequal)
        self.ops(("LOAD", whole), "FLOAT", ("LOAD", real), name)
        self.code.mark(end)

    # -- built-in functions ------------------------------------------------------------------

    def builtin(self, name: str, node: ast.Call) -> None:
        self.touch(node)
        first = node.args[0]
        if name == "len":
            assert isinstance(first, ast.Name)
            self.code.push(self.frame.checked.arrays[first.id].length)
        elif name in ("min", "max"):
            self.best(name, node)
        elif name == "pow":
            self.power(*node.args)
        elif name == "divmod":
            self.divide_both(node)
        elif name in ("math.sqrt", "math.fabs", "math.isnan", "math.isinf", "math.isfinite"):
            self.as_float(first)
            _OF_FLOAT[name](self)
        else:
            self.expression(first)
            _OF_NUMBER[name](self, first)

    def best(self, name: str, node: ast.Call) -> None:
        """Of floats as Python does it: a later one counts only if it is better."""
        first, *others = node.args
        self.expression(first)
        if self.type(node) != "f":
            for each in others:
                self.expression(each)
                self.code.op(name.upper())
            return
        for each in others:
            with self.cells("ff") as (kept, other):
                keep, end = self.code.label(), self.code.label()
                self.code.op("STORE", kept)
                self.expression(each)
                self.ops("DUP", ("STORE", other), ("LOAD", kept))
                self.ops("LT" if name == "min" else "GT", ("JZ", keep))
                self.ops(("LOAD", other), ("JMP", end))
                self.code.mark(keep)
                self.code.op("LOAD", kept)
                self.code.mark(end)

    def divide_both(self, node: ast.Call) -> None:
        left, right = node.args
        if self.type(node) == "ff":
            with self.cells("ff") as (a, b):
                self.as_float(left)
                self.as_float(right)
                self.ops(("STORE", b), ("STORE", a), ("LOAD", a), ("LOAD", b), "DIV")
                self.ops(("LOAD", a), ("LOAD", b), "MOD")
            return
        with self.cells("ii") as (a, b):
            self.expression(left)
            self.expression(right)
            self.ops(("STORE", b), ("STORE", a), ("LOAD", a), ("LOAD", b))
            self.floor_divide(ast.BinOp(left, ast.FloorDiv(), right))
            self.ops(("LOAD", a), ("LOAD", b), "MOD")

    def magnitude(self, node: ast.AST) -> None:
        if self.type(node) == "f" or self.wraps or self.frame.ranges.of(node)[0] > I64_MIN:
            self.code.op("ABS")
        else:
            self.ops("DUP", ("PUSH", 0), "SWAP", "SUBO", "MAX")

    def to_float(self, node: ast.AST) -> None:
        if self.type(node) != "f":
            self.code.op("FLOAT")

    def to_bool(self, node: ast.AST) -> None:
        if self.type(node) != "b":
            self.ops(("PUSH", 0), "NE")

    def truncate(self, node: ast.AST) -> None:
        if self.type(node) == "f":
            self.code.op("INT")

    def floor(self, node: ast.AST) -> None:
        if self.type(node) == "f":
            self.ops("FLOOR", "INT")

    def ceiling(self, node: ast.AST) -> None:
        if self.type(node) == "f":
            self.ops("NEG", "FLOOR", "NEG", "INT")

    def round(self, node: ast.AST) -> None:
        """Halves to even."""
        if self.type(node) != "f":
            return
        with self.cells("f") as (x,):
            large, below, end = self.code.label(), self.code.label(), self.code.label()
            self.ops("DUP", ("STORE", x), "ABS", ("PUSH", _ROUNDER), "LT", ("JZ", large))
            self.ops(("LOAD", x), ("PUSH", 0.0), "LT", ("JNZ", below))
            self.ops(("LOAD", x), ("PUSH", _ROUNDER), "ADD", ("PUSH", _ROUNDER), "SUB")
            self.code.op("JMP", end)
            self.code.mark(below)
            self.ops(("LOAD", x), ("PUSH", _ROUNDER), "SUB", ("PUSH", _ROUNDER), "ADD")
            self.code.op("JMP", end)
            self.code.mark(large)
            self.code.op("LOAD", x)
            self.code.mark(end)
            self.code.op("INT")

    def root(self) -> None:
        self.ops("DUP", ("PUSH", 0.0), "LT")
        self.raise_unless("JZ", "math domain error")
        self.code.op("SQRT")


_OF_FLOAT: dict[str, Callable[[NumberWriter], None]] = {
    "math.sqrt": NumberWriter.root,
    "math.fabs": lambda writer: writer.ops("ABS"),
    "math.isnan": lambda writer: writer.ops("DUP", "NE"),
    "math.isinf": lambda writer: writer.ops("ABS", ("PUSH", math.inf), "EQ"),
    "math.isfinite": lambda writer: writer.ops("DUP", "SUB", ("PUSH", 0.0), "EQ"),
}

_OF_NUMBER: dict[str, Callable[[NumberWriter, ast.AST], None]] = {
    "abs": NumberWriter.magnitude,
    "int": NumberWriter.truncate,
    "float": NumberWriter.to_float,
    "bool": NumberWriter.to_bool,
    "round": NumberWriter.round,
    "math.floor": NumberWriter.floor,
    "math.ceil": NumberWriter.ceiling,
    "math.trunc": NumberWriter.truncate,
}
