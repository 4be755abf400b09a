"""One function: instructions to WebAssembly.

Interface: `FunctionWriter(context, flow, is_main=...).body()` returns the lines of a body, and
`locals` what it needs; module.py puts the loop over indices, or the `(func ...)`, around it.
A fault sets `$fault` and branches to `$trap`; no WebAssembly trap is ever meant to happen.
"""

from __future__ import annotations

from collections.abc import Callable

from manifold.vm.compile.arithmetic import COMPARISON, INT_OPERATOR, is_power
from manifold.vm.compile.checked import CHECKED, CheckedWriter
from manifold.vm.compile.layout import HALTED, KINDS_AT, OUTPUT_FULL, STOPPED, VALUES_AT, VALUES_MAX
from manifold.vm.compile.stack import WASM, Context, Entry, float_text
from manifold.vm.compile.structure import emit
from manifold.vm.syntax.isa import USES_GLOBALS, Fault
from manifold.vm.syntax.program import I64_MAX, Instruction
from manifold.vm.valid import CALL_DEPTH_MAX, Flow

# Both sides of a branch may be computed and one chosen, when each is at most this long (in gas)
# and has only such instructions: no faults, no effects but on cells and the stack. A mispredicted
# branch costs about as much as fifteen of them.
CHOICE_GAS_MAX = 8
PURE = frozenset(
    {"PUSH", "POP", "DUP", "SWAP", "OVER", "ROT3", "LOAD", "STORE", "LEN", "JMP", "FLOAT", "NOT"}
    | {"NEG", "ABS", "MIN", "MAX", "EQ", "NE", "LT", "LE", "GT", "GE"}
    | set(INT_OPERATOR)
)


class FunctionWriter(CheckedWriter):
    """Writes the body of one function.

    `bounded` says of cells that they hold an index from 0 to below a length: an element was
    reached by them, and they were not written since. It holds on into a block with one way in.
    """

    def __init__(self, context: Context, flow: Flow, *, is_main: bool) -> None:
        super().__init__(context, flow, is_main=is_main)
        self.block_start = 0
        self.bounded: dict[int, int] = {}
        self.bounded_after: dict[int, dict[int, int]] = {}

    def body(self) -> list[str]:
        """All blocks; every path ends in `br $next`, `br $trap` or `return`."""
        if emit(self.flow.graph, self):
            self.local("pc", "i32")
        return self.lines

    def block(self, at: int, short: str) -> bool | None:
        """Writes a block; see structure.Writer."""
        block = self.flow.graph.blocks[at]
        self.stack = [Entry(kind) for kind in block.types]
        self.at = block.start
        self.charge(self.flow.plan.headers.get(block.start, 0), short)
        return self.straight(at)

    def refill(self, at: int) -> None:
        """What a loop does when it is short of gas; see structure.Writer."""
        self.at = self.flow.graph.blocks[at].start
        self.ask_again(self.flow.plan.headers[self.at], f"$l{at}")

    def straight(self, at: int) -> bool | None:
        """The instructions of a block; says what `block` says."""
        block = self.flow.graph.blocks[at]
        self.done = self.block_start = block.start
        self.block_end = block.end
        before = block.predecessors
        self.bounded = dict(self.bounded_after.get(before[0], {})) if len(before) == 1 else {}
        self.bounded_after[at] = self.bounded
        for self.at in range(block.start, block.end):
            if self.at < self.done:
                continue
            each = self.program.instructions[self.at]
            name = each.spec.name
            if name in ("JZ", "JNZ", "LOOP"):
                return self.condition(name)
            if name == "JMP":
                self.settle()
            else:
                WRITE[name](self, each)
        self.settle()
        return None

    def choose(self, yes: int | None, no: int | None, after: int) -> bool:
        """Both sides, then `select`; see structure.Writer."""
        sides = [side for side in (yes, no) if side is not None]
        if not all(self.is_cheap(side) for side in sides):
            return False
        chosen = self.local("chosen", "i32")
        self.line(f"local.set ${chosen}")
        wrote: dict[str, dict[str, str]] = {"yes": {}, "no": {}}
        for name, at in (("yes", yes), ("no", no)):
            if at is not None:
                self.stack = [Entry(kind) for kind in self.flow.graph.blocks[at].types]
                self.side, self.renamed = name, wrote[name]
                self.straight(at)
        self.side, self.renamed = "", {}
        live = {f"{kind}{k}" for k, kind in enumerate(self.flow.graph.blocks[after].types)}
        for name in sorted(wrote["yes"] | wrote["no"]):
            if name[0] == "c" or name in live:
                for side in ("yes", "no"):
                    self.get_either(wrote[side].get(name), name)
                self.line(f"local.get ${chosen} select")
                self.set(name)
        return True

    def get_either(self, renamed: str | None, name: str) -> None:
        if renamed is None:
            self.get(name)
        else:
            self.line(f"local.get ${renamed}")

    def is_cheap(self, at: int) -> bool:
        """Whether block `at` may be computed although it may not be wanted."""
        block = self.flow.graph.blocks[at]
        gas, stored = 0, False
        for here in range(block.start, block.end):
            spec = self.program.instructions[here].spec
            gas += 1 if self.is_shift(here) else spec.gas
            # A fault shows the cells, which a side keeps elsewhere: none may be written before it.
            may = self.is_shift(here) or (self.is_range_check(here) and not stored)
            if gas > CHOICE_GAS_MAX or not (spec.name in PURE or may):
                return False
            stored = stored or spec.name == "STORE"
        return True

    def is_range_check(self, at: int) -> bool:
        """Whether the instruction is checked arithmetic with a constant right before it."""
        code = self.program.instructions
        if code[at].spec.name not in CHECKED or at == 0:
            return False
        return code[at - 1].spec.name == "PUSH"

    def is_shift(self, at: int) -> bool:
        """Whether the instruction divides an i64 by a power of two that stands right before it."""
        code = self.program.instructions
        if code[at].spec.name not in ("DIV", "MOD") or self.context.json or at == 0:
            return False
        before = code[at - 1]
        is_int = before.spec.name == "PUSH" and isinstance(before.operand, int)
        return is_int and is_power(before.operand, I64_MAX)

    def condition(self, name: str) -> bool:
        """Leaves an i32; whether the jump is taken if that is true, rather than if it is false.

        The flag of a comparison stays as it is: the engine branches on it directly.
        """
        if name == "LOOP":
            self.settle()
            self.loop_condition()
            return True
        entry, depth = self.take()
        self.settle()
        if entry.flag:
            self.line(f"local.get $b{depth}")
            return name == "JNZ"
        self.load(entry, depth, entry.type)
        kind = WASM[entry.type]
        self.line(f"{kind}.const 0 {kind}.{'eq' if name == 'JZ' else 'ne'}")
        return True

    def loop_condition(self) -> None:
        kind = self.context.verified.cells[0]
        self.bounded.pop(0, None)
        self.get("c0")
        self.line(f"{WASM[kind]}.const 1 {WASM[kind]}.add")
        self.set("c0")
        self.get("c0")
        self.bound("GET_END", kind)
        self.line("f64.lt" if kind == "f" else "i64.lt_s")

    def bound(self, name: str, kind: str) -> None:
        """The start or the end of this run (of this index), as `kind`."""
        if self.context.is_range:
            self.get("lo" if name == "GET_START" else "hi")
        else:
            self.get("index")
            if name == "GET_END":
                self.line("i64.const 1 i64.add")
        if kind == "f":
            self.line("f64.convert_i64_s")

    # -- cells, arrays, calls ----------------------------------------------------------------

    def load_cell(self, each: Instruction) -> None:
        self.get(f"c{each.operand}")
        self.push(self.context.verified.cells[int(each.operand or 0)])

    def store_cell(self, each: Instruction) -> None:
        entry, depth = self.take()
        self.load(entry, depth, entry.type)
        self.set(f"c{each.operand}")
        self.bounded.pop(int(each.operand or 0), None)

    def element(self, number: int) -> str:
        """Checks the index on top and leaves the element's address; returns its load's suffix."""
        x = self.local("x", "i64")
        entry, depth = self.take()
        constant, length = entry.constant, self.program.arrays[number].length
        if constant is not None and 0 <= constant < length:
            self.line("i32.const 0")
            return f"offset={self.context.arrays[number] + 8 * int(constant)}"
        self.load(entry, depth, "i")
        before = self.program.instructions[self.at - 1]
        is_cell = self.at > self.block_start and before.spec.name == "LOAD"
        cell = before.operand if is_cell else None
        if cell is None or self.bounded.get(int(cell), length + 1) > length:
            self.line(f"local.tee ${x} i64.const {length} i64.ge_u")
            self.fault_if(Fault.BOUNDS)
            self.line(f"local.get ${x}")
            if cell is not None:
                self.bounded[int(cell)] = length
        self.line("i32.wrap_i64 i32.const 3 i32.shl")
        return f"offset={self.context.arrays[number]}"

    def load_element(self, each: Instruction) -> None:
        number = int(each.operand or 0)
        kind = "f" if self.program.arrays[number].type == "f64" else "i"
        offset = self.element(number)
        self.line(f"{WASM[kind]}.load {offset}")
        self.push(kind)

    def store_element(self, each: Instruction) -> None:
        number = int(each.operand or 0)
        kind = "f" if self.program.arrays[number].type == "f64" else "i"
        offset = self.element(number)
        self.load(*self.take(), kind)
        self.line(f"{WASM[kind]}.store {offset}")

    def length(self, each: Instruction) -> None:
        size = self.program.arrays[int(each.operand or 0)].length
        self.stack.append(Entry("i", constant=size))

    def call(self, each: Instruction) -> None:
        number = int(each.operand or 0)
        called = self.context.verified.functions[number]
        self.bounded.clear()  # it may write any cell
        self.line(f"global.get $depth i32.const {CALL_DEPTH_MAX} i32.ge_u")
        self.fault_if(Fault.DEPTH)
        self.line("global.get $depth i32.const 1 i32.add global.set $depth")
        arguments = [self.take() for _ in called.takes]
        for kind, argument in zip(called.takes, reversed(arguments), strict=True):
            self.load(*argument, kind)
        self.line(f"call $function{number}")
        base = len(self.stack)
        for place in reversed(range(len(called.leaves))):
            self.set(self.place(base + place, called.leaves[place]))
        self.stack += [Entry(kind) for kind in called.leaves]
        self.line("global.get $depth i32.const 1 i32.sub global.set $depth")
        self.line("global.get $fault i64.const 0 i64.ne br_if $trap")

    def leave(self, each: Instruction) -> None:
        for depth, entry in enumerate(self.stack):
            self.load(entry, depth, entry.type)
        self.line("return")

    def halt(self, each: Instruction) -> None:
        if self.is_main:
            self.line("br $next")
        else:
            self.fail(HALTED)

    def raise_fault(self, each: Instruction) -> None:
        self.fail(Fault.RAISED.value)

    def unknown(self, each: Instruction) -> None:
        self.fail(Fault.UNKNOWN.value)

    def read_bound(self, each: Instruction) -> None:
        kind = "f" if self.context.json else "i"
        self.bound(each.spec.name, kind)
        self.push(kind)

    def sleep(self, each: Instruction) -> None:
        self.line(f"f64.const {float_text(float(each.operand or 0.0))} call $sleep if")
        self.fail(STOPPED)
        self.line("end")

    def reach_global(self, each: Instruction) -> None:
        """The host does it: values travel as 64 bits, the flag is 2 where it could not."""
        takes, leaves = each.spec.stack_of(json=self.context.json)
        number = int(each.operand or 0)
        kind = "f" if self.program.globals[number].type == "f64" else "i"
        taken = [self.take() for _ in takes]
        self.line(f"i32.const {USES_GLOBALS.index(each.spec.name)} i32.const {number}")
        self.bound("GET_START", "i")
        for entry, depth in reversed(taken):
            self.load(entry, depth, kind)
            if kind == "f":
                self.line("i64.reinterpret_f64")
        self.line("i64.const 0 " * (2 - len(taken)) + "call $global")
        flag, value = self.local("gflag", "i32"), self.local("gvalue", "i64")
        self.line(f"local.set ${flag} local.set ${value} local.get ${flag} i32.const 2 i32.eq")
        self.fault_if(Fault.GLOBAL)
        if leaves.startswith("g"):
            self.line(f"local.get ${value}" + (" f64.reinterpret_i64" if kind == "f" else ""))
            self.push(kind)
        if leaves.endswith("i"):
            self.line(f"local.get ${flag}")
            self.push_flag()
        elif leaves == "s":
            self.line(f"local.get ${flag} f64.convert_i32_u")
            self.push("f")

    # -- results -----------------------------------------------------------------------------

    def emit(self, each: Instruction) -> None:
        """EMIT and PRINT: into the reduction, or the output buffer."""
        entry, depth = self.take()
        self.load(entry, depth, entry.type)
        value = self.local("vf" if entry.type == "f" else "vi", WASM[entry.type])
        self.line(f"local.set ${value}")
        self.add_one("emitted")
        if entry.type == "f" and self.context.reduce != "count":
            self.add_one("floats")
        match self.context.reduce:
            case "sum":
                self.emit_sum(entry.type)
            case "min" | "max":
                self.emit_best(entry.type)
            case "collect":
                self.emit_value(entry.type)

    def add_one(self, name: str) -> None:
        self.get(name)
        self.line("i64.const 1 i64.add")
        self.set(name)

    def emit_sum(self, kind: str) -> None:
        """i64: into 128 bits, exactly. f64: one IEEE addition, in order."""
        if kind == "f":
            self.get("sum_float")
            self.line("local.get $vf f64.add")
            self.set("sum_float")
            return
        self.get("sum_low")
        self.line("local.get $vi i64.add")
        self.set("sum_low")
        self.get("sum_high")
        self.line("local.get $vi i64.const 63 i64.shr_s i64.add")
        self.get("sum_low")
        self.line("local.get $vi i64.lt_u i64.extend_i32_u i64.add")
        self.set("sum_high")

    def emit_best(self, kind: str) -> None:
        if kind == "f":
            self.get("float_best")
            self.line(f"local.get $vf f64.{self.context.reduce}")
            self.set("float_best")
            return
        order = "lt_s" if self.context.reduce == "min" else "gt_s"
        self.line("local.get $vi")
        self.get("int_best")
        self.line("local.get $vi")
        self.get("int_best")
        self.line(f"i64.{order} select")
        self.set("int_best")

    def emit_value(self, kind: str) -> None:
        """Into the buffer, which the host empties when it is full."""
        self.get("buffered")
        self.line(f"i64.const {VALUES_MAX} i64.ge_u if")
        self.flush()
        self.line("end")
        self.get("buffered")
        self.line("i32.wrap_i64 i32.const 3 i32.shl")
        if kind == "f":  # NaNs have one spelling, whatever the processor made of them
            self.line("f64.const nan local.get $vf local.get $vf local.get $vf f64.ne select")
        else:
            self.line("local.get $vi")
        self.line(f"{WASM[kind]}.store offset={VALUES_AT}")
        if self.context.mixed:
            self.get("buffered")
            self.line(f"i32.wrap_i64 i32.const {int(kind == 'f')} i32.store8 offset={KINDS_AT}")
        self.add_one("buffered")
        self.add_one("here")

    def flush(self) -> None:
        """Hands the buffers to the host; ends the run if it wants no more."""
        self.get("buffered")
        self.get("ended")
        self.line("call $flush if")
        self.fail(OUTPUT_FULL)
        self.line("end i64.const 0")
        self.set("buffered")
        self.line("i64.const 0")
        self.set("ended")


_W = FunctionWriter
WRITE: dict[str, Callable[[FunctionWriter, Instruction], None]] = {
    "PUSH": _W.constant,
    **dict.fromkeys(("POP", "DUP", "SWAP", "OVER", "ROT3"), _W.shuffle),
    **dict.fromkeys(("ADD", "SUB", "MUL", "MIN", "MAX"), _W.arithmetic),
    **dict.fromkeys(("AND", "OR", "XOR", "SHL", "SHR", "SHRU"), _W.arithmetic),
    **dict.fromkeys(("DIV", "MOD", "FDIV"), _W.divide),
    **dict.fromkeys(("NEG", "ABS", "FLOOR", "NOT", "FLOAT"), _W.unary),
    **dict.fromkeys(COMPARISON, _W.compare),
    "SQRT": _W.root,
    "INT": _W.to_int,
    "LOAD": _W.load_cell,
    "STORE": _W.store_cell,
    "LOADI": _W.load_element,
    "STOREI": _W.store_element,
    "LEN": _W.length,
    "CALL": _W.call,
    "RET": _W.leave,
    "HALT": _W.halt,
    "UNKNOWN": _W.unknown,
    "RAISE": _W.raise_fault,
    **dict.fromkeys(CHECKED, _W.checked),
    "EMIT": _W.emit,
    "PRINT": _W.emit,
    "SLEEP": _W.sleep,
    **dict.fromkeys(USES_GLOBALS, _W.reach_global),
    "GET_START": _W.read_bound,
    "GET_END": _W.read_bound,
}
