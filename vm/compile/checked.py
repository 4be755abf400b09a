"""i64 arithmetic that faults where the result is no i64: ADDO, SUBO, MULO.

Interface: `CheckedWriter` adds `checked` to the arithmetic; function.py uses it.
Where one operand is a constant, the check is that the other one lies in the range for which the
result fits: one comparison. `x MULO a ADDO b`, both constants, takes one comparison in all; which
of the two failed is found out in the cold block.
"""

from __future__ import annotations

from collections.abc import Callable

from manifold.vm.compile.arithmetic import ArithmeticWriter
from manifold.vm.compile.stack import Entry
from manifold.vm.syntax.isa import Fault
from manifold.vm.syntax.program import I64_MAX, I64_MIN, Instruction

Span = tuple[int, int]  # inclusive

EVERYTHING: Span = (I64_MIN, I64_MAX)
CHECKED = {"ADDO": "ADD", "SUBO": "SUB", "MULO": "MUL"}
_EXACT: dict[str, Callable[[int, int], int]] = {
    "ADDO": lambda left, right: left + right,
    "SUBO": lambda left, right: left - right,
    "MULO": lambda left, right: left * right,
}


def span_of(factor: int, offset: int, within: Span = EVERYTHING) -> Span:
    """For which `x` of `within` `factor * x + offset` is an i64; empty if the first is larger."""
    if factor == 0:
        return within if I64_MIN <= offset <= I64_MAX else (1, 0)
    low, high = I64_MIN - offset, I64_MAX - offset
    if factor < 0:
        low, high = high, low
    return max(within[0], -(-low // factor)), min(within[1], high // factor)


class CheckedWriter(ArithmeticWriter):
    """The three checked instructions."""

    done = 0  # instructions before it have been written together with an earlier one
    block_end = 0

    def checked(self, each: Instruction) -> None:
        name = each.spec.name
        right, left = self.take(), self.take()
        a, b = left[0].constant, right[0].constant
        if a is not None and b is not None:
            exact = _EXACT[name](int(a), int(b))
            if I64_MIN <= exact <= I64_MAX:
                self.stack.append(Entry("i", constant=exact))
                return
        if b is not None:
            self.load(*left, "i")
            self.with_constant(name, int(b), swapped=False)
        elif a is not None:
            self.load(*right, "i")
            self.with_constant(name, int(a), swapped=True)
        else:
            self.load(*left, "i")
            self.load(*right, "i")
            self.line(f"local.set ${self.local('y', 'i64')} local.set ${self.local('x', 'i64')}")
            self.with_anything(name)
        self.push("i")

    def with_constant(self, name: str, constant: int, swapped: bool) -> None:
        """The other operand is on the WebAssembly stack; the result comes there."""
        factor, offset = 1, constant
        if name == "SUBO":
            factor, offset = (-1, constant) if swapped else (1, -constant)
        elif name == "MULO":
            factor, offset = constant, 0
        x = self.local("x", "i64")
        self.line(f"local.set ${x}")
        first = span_of(factor, offset)
        more = self.following() if name == "MULO" else None
        if more is None:
            self.unless_in(first)
        else:
            offset = more
            both = span_of(factor, offset, first)
            self.outside(both)
            self.line(self.if_wanted() + " if")
            self.outside(first)
            self.line("if")
            self.fail(Fault.OVERFLOW.value)
            self.line("end")
            self.at += 2
            self.fail(Fault.OVERFLOW.value)
            self.at -= 2
            self.line("end")
            self.done = self.at + 3
        self.scaled(factor)
        if offset:
            self.line(f"i64.const {wrapped(offset)} i64.add")

    def following(self) -> int | None:
        """What PUSH and ADDO or SUBO right behind this instruction add."""
        code, at = self.program.instructions, self.at
        if at + 2 >= self.block_end or code[at + 1].spec.name != "PUSH":
            return None
        added, name = code[at + 1].operand, code[at + 2].spec.name
        if not isinstance(added, int) or name not in ("ADDO", "SUBO"):
            return None
        return added if name == "ADDO" else -added

    def scaled(self, factor: int) -> None:
        """`factor * $x`."""
        if factor == -1:
            self.line("i64.const 0 local.get $x i64.sub")
            return
        self.line("local.get $x")
        if factor in (3, 5, 9):  # one address computation where the processor has them
            shift = (factor - 1).bit_length() - 1
            self.line(f"local.get $x i64.const {shift} i64.shl i64.add")
        elif factor > 1 and factor & (factor - 1) == 0:
            self.line(f"i64.const {factor.bit_length() - 1} i64.shl")
        elif factor != 1:
            self.line(f"i64.const {factor} i64.mul")

    def outside(self, span: Span) -> None:
        """The i32 that says whether `$x` is not in `span`."""
        low, high = span
        if low > high:
            self.line("i32.const 1")
        elif low == I64_MIN:
            flag = "i32.const 0" if high == I64_MAX else f"local.get $x i64.const {high} i64.gt_s"
            self.line(flag)
        elif high == I64_MAX:
            self.line(f"local.get $x i64.const {low} i64.lt_s")
        else:
            self.line(f"local.get $x i64.const {low} i64.sub i64.const {high - low} i64.gt_u")

    def unless_in(self, span: Span) -> None:
        if span != EVERYTHING:
            self.outside(span)
            self.fault_if(Fault.OVERFLOW)

    def with_anything(self, name: str) -> None:
        """`$x` and `$y`; the result comes on the WebAssembly stack."""
        r = self.local("r", "i64")
        self.line(f"local.get $x local.get $y i64.{CHECKED[name].lower()} local.set ${r}")
        if name == "MULO":
            # Two factors of 32 bits cannot overflow; others are divided to see.
            self.context.helpers.add("mul_overflows")
            half = "i64.const 0x80000000 i64.add"
            self.line(f"local.get $x {half} local.get $y {half} i64.or")
            self.line("i64.const 0xffffffff i64.gt_u if (result i32)")
            self.line("local.get $x local.get $y call $mul_overflows else i32.const 0 end")
        else:
            # Adding overflows if both operands' signs differ from the result's; subtracting, if
            # the left one's differs from the right one's and from the result's.
            other = "local.get $r" if name == "ADDO" else "local.get $x"
            self.line(f"local.get $x local.get $r i64.xor local.get $y {other} i64.xor")
            self.line("i64.and i64.const 0 i64.lt_s")
        self.fault_if(Fault.OVERFLOW)
        self.line(f"local.get ${r}")


def wrapped(value: int) -> int:
    """Modulo 2^64, as a signed number."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
