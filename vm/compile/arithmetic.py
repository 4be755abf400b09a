"""Arithmetic, comparison, bits, conversion and the stack shuffles, as WebAssembly.

Interface: methods of `ArithmeticWriter`, one for each group of instructions (see `WRITE` in
function.py); each takes its operands from the symbolic stack and pushes its result.
Where a divisor is a constant other than zero there is no check, and a power of two is no division.
"""

from __future__ import annotations

from manifold.vm.compile.stack import WASM, Entry, StackWriter
from manifold.vm.syntax.isa import Fault
from manifold.vm.syntax.program import Instruction

INT_OPERATOR = {
    **{"ADD": "add", "SUB": "sub", "MUL": "mul", "AND": "and", "OR": "or", "XOR": "xor"},
    **{"SHL": "shl", "SHR": "shr_s", "SHRU": "shr_u"},
}
FLOAT_OPERATOR = {"ADD": "add", "SUB": "sub", "MUL": "mul", "MIN": "min", "MAX": "max"}
COMPARISON = {"EQ": "eq", "NE": "ne", "LT": "lt", "LE": "le", "GT": "gt", "GE": "ge"}


class ArithmeticWriter(StackWriter):
    """The instructions that only compute."""

    def constant(self, each: Instruction) -> None:
        assert each.operand is not None
        value = each.operand
        self.stack.append(Entry("f" if isinstance(value, float) else "i", constant=value))

    def shuffle(self, each: Instruction) -> None:
        """POP DUP SWAP OVER ROT3: entries change places."""
        spec = each.spec
        count = len(spec.taken)
        base = len(self.stack) - count
        taken = self.stack[base:]
        order = [int(letter) - 1 for letter in spec.left]
        for which in order:
            if taken[which].constant is None:
                self.load(taken[which], base + which, taken[which].type)
        del self.stack[base:]
        self.stack += [Entry(taken[w].type, taken[w].constant) for w in order]
        for place in reversed(range(len(order))):
            entry = self.stack[base + place]
            if entry.constant is None:
                self.set(self.place(base + place, entry.type))

    def arithmetic(self, each: Instruction) -> None:
        name = each.spec.name
        factor = self.stack[-1].constant
        if name == "MUL" and 2 in (factor, self.stack[-2].constant) and self.double():
            return
        kind = self.pair()
        if name == "MUL" and kind == "i" and factor in (3, 5, 9):
            # One address computation where the processor has them, instead of a multiplication.
            x = self.local("x", "i64")
            self.line(f"drop local.tee ${x} local.get ${x}")
            self.line(f"i64.const {int(factor - 1).bit_length() - 1} i64.shl i64.add")
        elif kind == "f":
            self.line(f"f64.{FLOAT_OPERATOR[name]}")
        elif name in ("MIN", "MAX"):
            self.line(f"local.set ${self.local('y', 'i64')} local.set ${self.local('x', 'i64')}")
            order = "i64.lt_s" if name == "MIN" else "i64.gt_s"
            self.line(f"local.get $x local.get $y local.get $x local.get $y {order} select")
        else:
            self.line(f"i64.{INT_OPERATOR[name]}")
        self.push(kind)

    def double(self) -> bool:
        """Twice a float, as a sum: the same, and needs no constant. False if it is an int."""
        right, left = self.take(), self.take()
        x = left if left[0].constant is None else right
        if x[0].type != "f" or x[0].constant is not None:
            self.stack += [left[0], right[0]]
            return False
        self.load(*x, "f")
        self.load(*x, "f")
        self.line("f64.add")
        self.push("f")
        return True

    def compare(self, each: Instruction) -> None:
        kind = self.pair()
        operator = COMPARISON[each.spec.name]
        signed = "_s" if kind == "i" and operator not in ("eq", "ne") else ""
        self.line(f"{WASM[kind]}.{operator}{signed}")
        self.push_flag()

    def divide(self, each: Instruction) -> None:
        """DIV, MOD and FDIV."""
        name = each.spec.name
        divisor = self.stack[-1].constant
        kinds = {entry.type for entry in self.stack[-2:]}
        if name == "FDIV" or (self.context.json and name == "DIV"):
            self.float_divide("f64.div", divisor)
        elif "f" in kinds and name == "MOD" and is_power(divisor, 1 << 51):
            self.float_mod_power(int(divisor or 0))
        elif "f" in kinds:
            helper = "python_div" if name == "DIV" else "python_mod"
            self.context.helpers.add(helper)
            self.float_divide(f"call ${helper}", divisor)
        elif divisor is not None and divisor != 0:
            assert isinstance(divisor, int)
            self.divide_by_constant(name, divisor)
        else:
            self.divide_by_any(name)

    def float_mod_power(self, divisor: int) -> None:
        """MOD by a power of two: the low bits, when the dividend is whole and below 2^51.

        Adding 1.5 * 2^52 puts the low bits of a whole number into the low bits of the significand.
        """
        self.context.helpers.add("python_mod")
        self.take()
        self.load(*self.take(), "f")
        x, y = self.local("fx", "f64"), self.local("fy", "f64")
        self.line(f"local.tee ${x} f64.const 0x1.8p52 f64.add local.tee ${y}")
        self.line(f"f64.const 0x1.8p52 f64.sub local.get ${x} f64.eq")
        self.line(f"local.get ${x} f64.abs f64.const 0x1p51 f64.lt i32.and if (result f64)")
        self.line(f"local.get ${y} i64.reinterpret_f64 i64.const {divisor - 1} i64.and")
        self.line("f64.convert_i64_s else")
        self.line(f"local.get ${x} f64.const {divisor} call $python_mod end")
        self.push("f")

    def float_divide(self, operator: str, divisor: int | float | None) -> None:
        if operator == "f64.div" and is_power(divisor, 1 << 62):
            self.stack[-1] = Entry("f", constant=1.0 / int(divisor or 1))  # exact, so the same
            operator = "f64.mul"
        self.pair("f")
        if divisor is None or divisor == 0:
            y = self.local("fy", "f64")
            self.line(f"local.tee ${y} f64.const 0 f64.eq")
            self.fault_if(Fault.DIVISION)
            # The dividend waited on the WebAssembly stack; the divisor comes back.
            self.line(f"local.get ${y}")
        self.line(operator)
        self.push("f")

    def divide_by_constant(self, name: str, divisor: int) -> None:
        """No check, and no division for powers of two."""
        self.take()
        self.load(*self.take(), "i")
        if divisor > 0 and divisor & (divisor - 1) == 0:
            shift = divisor.bit_length() - 1
            operator = f"i64.const {shift} i64.shr_s"
            self.line(operator if name == "DIV" else f"i64.const {divisor - 1} i64.and")
        elif divisor == -1:
            x = self.local("x", "i64")
            negate = f"local.set ${x} i64.const 0 local.get ${x} i64.sub"
            self.line(negate if name == "DIV" else "drop i64.const 0")
        else:
            x, q, r = (self.local(each, "i64") for each in ("x", "q", "r"))
            self.line(f"local.tee ${x} i64.const {divisor} i64.div_s local.set ${q}")
            self.line(f"local.get ${x} local.get ${q} i64.const {divisor} i64.mul i64.sub")
            self.line(f"local.set ${r}")
            # Rounding down: one less when the remainder and the divisor differ in sign.
            if divisor > 0:
                off = f"local.get ${r} i64.const 63 i64.shr_s"
            else:
                off = f"i64.const 0 local.get ${r} i64.const 0 i64.gt_s i64.extend_i32_u i64.sub"
            if name == "DIV":
                self.line(f"local.get ${q} {off} i64.add")
            else:
                self.line(f"local.get ${r} {off} i64.const {divisor} i64.and i64.add")
        self.push("i")

    def divide_by_any(self, name: str) -> None:
        self.pair("i")
        x, y, r = (self.local(each, "i64") for each in ("x", "y", "r"))
        self.line(f"local.set ${y} local.set ${x} local.get ${y} i64.eqz")
        self.fault_if(Fault.DIVISION)
        wrong = f"local.get ${r} local.get ${y} i64.xor i64.const 0 i64.lt_s"
        wrong += f" local.get ${r} i64.const 0 i64.ne i32.and"
        if name == "MOD":
            self.line(f"local.get ${x} local.get ${y} i64.rem_s local.set ${r}")
            self.line(f"local.get ${r} local.get ${y} i64.add local.get ${r} {wrong} select")
        else:
            q = self.local("q", "i64")
            self.line(f"local.get ${y} i64.const -1 i64.eq if (result i64)")
            self.line(f"i64.const 0 local.get ${x} i64.sub else")
            self.line(f"local.get ${x} local.get ${y} i64.div_s end local.set ${q}")
            self.line(
                f"local.get ${x} local.get ${q} local.get ${y} i64.mul i64.sub local.set ${r}"
            )
            self.line(f"local.get ${q} {wrong} i64.extend_i32_u i64.sub")
        self.push("i")

    def unary(self, each: Instruction) -> None:
        """NEG ABS FLOOR NOT FLOAT."""
        entry, depth = self.take()
        name, kind = each.spec.name, entry.type
        if name == "FLOAT":
            self.load(entry, depth, "f")
            self.push("f")
            return
        self.load(entry, depth, kind)
        if kind == "f":
            self.line({"NEG": "f64.neg", "ABS": "f64.abs", "FLOOR": "f64.floor"}[name])
        elif name == "NOT":
            self.line("i64.const -1 i64.xor")
        elif name != "FLOOR":
            x = self.local("x", "i64")
            self.line(f"local.set ${x} i64.const 0 local.get ${x} i64.sub")
            if name == "ABS":
                self.line(f"local.get ${x} local.get ${x} i64.const 0 i64.lt_s select")
        self.push(kind)

    def root(self, each: Instruction) -> None:
        self.load(*self.take(), "f")
        if self.context.json:
            x = self.local("fx", "f64")
            self.line(f"local.tee ${x} f64.const 0 f64.lt")
            self.fault_if(Fault.ROOT)
            self.line(f"local.get ${x}")
        self.line("f64.sqrt")
        self.push("f")

    def to_int(self, each: Instruction) -> None:
        entry, depth = self.take()
        self.load(entry, depth, entry.type)
        if entry.type == "f":
            x = self.local("fx", "f64")
            self.line(f"local.tee ${x} f64.const -0x1p63 f64.ge")
            self.line(f"local.get ${x} f64.const 0x1p63 f64.lt i32.and i32.eqz")
            self.fault_if(Fault.CONVERSION)
            self.line(f"local.get ${x} i64.trunc_sat_f64_s")
        self.push("i")


def is_power(value: int | float | None, limit: int) -> bool:
    """Whether `value` is a whole power of two up to `limit`."""
    if value is None or not 1 <= value <= limit or value != int(value):
        return False
    return int(value) & (int(value) - 1) == 0
