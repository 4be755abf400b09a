"""The module around the functions: imports, memory, the loop over indices, the accumulators.

Interface: `compile_wat(verified, reduce) -> str`. The module exports `memory` and
`run(lo, hi, gas)`, which runs every index of `[lo, hi)` (or the range program once) and leaves the
control words of layout.py in memory: fault 0 when all went well. It imports `yield(gas) -> gas`,
called with what is left (below zero) and answering with the new balance, below zero to stop;
`sleep(seconds) -> i32`, and for `collect` `flush(values, indices) -> i32`: non-zero to stop;
`global(operation, number, index, first, second) -> (value, flag)`, see function.reach_global.
"""

from __future__ import annotations

from manifold.vm.compile.function import FunctionWriter
from manifold.vm.compile.layout import (
    ARGUMENTS_AT,
    CELLS_AT,
    COUNTS_AT,
    HALTED,
    OFFSET,
    PAGE_BYTES,
    VALUES_MAX,
    array_offsets,
)
from manifold.vm.compile.library import library
from manifold.vm.compile.stack import Context
from manifold.vm.syntax.isa import Immediate
from manifold.vm.syntax.program import ARGUMENTS_MAX, I64_MAX, I64_MIN
from manifold.vm.valid import Flow, Verified
from manifold.vm.valid.gas import clearing, written_arrays
from manifold.vm.valid.verifier import first_argument

COMPILER_VERSION = 3

# Everything the run keeps besides the program's cells and stack. Locals, unless functions share it.
_WASM_VARIABLES = {
    **dict.fromkeys(("index", "lo", "hi", "gas", "fault", "emitted", "floats"), "i64"),
    **dict.fromkeys(("sum_low", "sum_high", "int_best", "buffered", "ended", "here"), "i64"),
    **dict.fromkeys(("sum_float", "float_best"), "f64"),
}
_PARAMETERS = ("lo", "hi", "gas")


_IMPORTS = {
    "yield": '(import "host" "yield" (func $yield (param i64) (result i64)))',
    "sleep": '(import "host" "sleep" (func $sleep (param f64) (result i32)))',
    "global": '(import "host" "global" '
    "(func $global (param i32 i32 i64 i64 i64) (result i64 i32)))",
    "flush": '(import "host" "flush" (func $flush (param i64 i64) (result i32)))',
}


def imports(verified: Verified, reduce: str) -> tuple[str, ...]:
    """The host functions that a module needs, in the order of its imports."""
    asked = verified.program.capabilities
    wanted = [name for name in ("sleep", "globals") if name in asked]
    hosts = [name.removesuffix("s") for name in wanted]
    return ("yield", *hosts, *(("flush",) if reduce == "collect" else ()))


def compile_wat(verified: Verified, reduce: str) -> str:
    """The WebAssembly text of a program that has a static stack."""
    main = verified.main
    assert main is not None, "a dynamic program runs in the interpreter"
    starts, memory_bytes = array_offsets(verified.program, reduce)
    cells = sorted(used_cells(verified, verified.flows))
    shared: set[str] = set()
    if verified.functions:
        shared = set(_WASM_VARIABLES)
        shared |= {f"c{cell}" for cell in used_cells(verified, tuple(verified.functions.values()))}
    context = Context(verified, reduce, starts, frozenset(shared), len(verified.emits) > 1)
    functions = [_function(context, flow, at) for at, flow in verified.functions.items()]
    run = _run(context, main, cells)
    kinds = _WASM_VARIABLES | {f"c{n}": _wasm(verified.cells[n]) for n in cells}
    lines = [
        "(module",
        *(_IMPORTS[name] for name in imports(verified, reduce)),
        f'(memory (export "memory") {memory_bytes // PAGE_BYTES} {memory_bytes // PAGE_BYTES})',
        *(
            f"(global ${name} (mut {kinds[name]}) ({kinds[name]}.const 0))"
            for name in sorted(shared)
        ),
    ]
    if verified.functions:
        lines.append("(global $depth (mut i32) (i32.const 0))")
    lines += [library(context.helpers), *functions, run, ")"]
    return "\n".join(lines) + "\n"


def _wasm(letter: str) -> str:
    return "f64" if letter == "f" else "i64"


def used_cells(verified: Verified, flows: tuple[Flow, ...]) -> set[int]:
    """The cells that some functions name (LOOP names cell 0)."""
    found = set()
    for flow in flows:
        for block in flow.graph.blocks:
            for each in verified.program.instructions[block.start : block.end]:
                if each.spec.immediate is Immediate.CELL:
                    found.add(int(each.operand or 0))
                elif each.spec.name == "LOOP":
                    found.add(0)
    return found


def _function(context: Context, flow: Flow, number: int) -> str:
    """A called function. `$trap` at its end leaves zeros, and the caller sees `$fault`."""
    writer = FunctionWriter(context, flow, is_main=False)
    writer.line("block $trap")
    writer.at = flow.graph.entry
    writer.charge(flow.plan.entry)
    writer.body()
    writer.line("end")
    writer.lines += [f"{_wasm(letter)}.const 0" for letter in flow.leaves]
    parameters = [(f"{letter}{at}", _wasm(letter)) for at, letter in enumerate(flow.takes)]
    for name, _ in parameters:
        writer.locals.pop(name, None)
    head = f"(func $function{number}"
    head += "".join(f" (param ${name} {kind})" for name, kind in parameters)
    head += "".join(f" (result {_wasm(letter)})" for letter in flow.leaves)
    return "\n".join([head, _locals(writer.locals), *writer.lines, ")"])


def _locals(names: dict[str, str]) -> str:
    return "".join(f"(local ${name} {kind})" for name, kind in sorted(names.items()))


def _run(context: Context, main: Flow, cells: list[int]) -> str:
    """The exported function: prologue, the loop over indices around the body, epilogue."""
    writer = FunctionWriter(context, main, is_main=True)
    for name, kind in _WASM_VARIABLES.items():
        if name not in _PARAMETERS and name not in context.shared:
            writer.local(name, kind)
    for cell in cells:
        if f"c{cell}" not in context.shared:
            writer.local(f"c{cell}", _wasm(context.verified.cells[cell]))
    _prologue(context, writer)
    writer.line("block $trap block $done loop $indices")
    if not context.is_range:
        writer.get("index")
        writer.get("hi")
        writer.line("i64.ge_s br_if $done")
    _start_index(context, writer, cells)
    writer.at = main.graph.entry
    writer.charge(main.plan.entry + clearing(context.verified.program))
    writer.line("block $next")
    if _can_halt_inside(context):
        _guarded_body(writer)
    else:
        writer.body()
    writer.line("end")
    _end_index(context, writer)
    writer.line("end end")
    _store_words(context, writer)
    writer.line("return end")
    _store_words(context, writer)
    for cell in cells:
        kind = _wasm(context.verified.cells[cell])
        writer.line("i32.const 0")
        writer.get(f"c{cell}")
        writer.line(f"{kind}.store offset={CELLS_AT + 8 * cell}")
    head = '(func $run (export "run") (param $lo i64) (param $hi i64) (param $gas i64)'
    return "\n".join([head, _locals(writer.locals), *writer.lines, ")"])


def _can_halt_inside(context: Context) -> bool:
    """Whether a function may end the index."""
    code = context.verified.program.instructions
    return any(
        code[block.end - 1].spec.name == "HALT"
        for flow in context.verified.functions.values()
        for block in flow.graph.blocks
    )


def _guarded_body(writer: FunctionWriter) -> None:
    """The body, where a HALT inside a function comes back as a fault that is none."""
    writer.line("block $caught block $inside")
    lines = len(writer.lines)
    writer.body()
    # A fault of the body may be a HALT from inside: it goes to the check below first.
    writer.lines[lines:] = [_to_inside(each) for each in writer.lines[lines:]]
    writer.line("end")
    writer.get("fault")
    writer.line(f"i64.const 15 i64.and i64.const {HALTED} i64.ne br_if $trap")
    writer.line("i64.const 0")
    writer.set("fault")
    writer.line("end")


def _to_inside(line: str) -> str:
    return line.replace("$trap", "$inside")


def _prologue(context: Context, writer: FunctionWriter) -> None:
    """Accumulators to their starting values."""
    for name in _PARAMETERS:
        if name in context.shared:
            writer.line(f"local.get ${name} global.set ${name}")
    for name, kind in _WASM_VARIABLES.items():
        if name in context.shared and name not in _PARAMETERS:
            writer.line(f"{kind}.const 0 global.set ${name}")
    if context.verified.functions:
        writer.line("i32.const 0 global.set $depth")
    if context.reduce in ("min", "max"):
        writer.line(f"i64.const {I64_MAX if context.reduce == 'min' else I64_MIN}")
        writer.set("int_best")
        writer.line(f"f64.const {'inf' if context.reduce == 'min' else '-inf'}")
        writer.set("float_best")
    writer.get("lo")
    writer.set("index")


def _start_index(context: Context, writer: FunctionWriter, cells: list[int]) -> None:
    """Cells and arrays as an index finds them."""
    program = context.verified.program
    first = first_argument(program)
    for cell in cells:
        kind = context.verified.cells[cell]
        if cell < first:
            bounds = {0: "GET_START", 1: "GET_END"}
            writer.bound(bounds[cell], kind)
        elif cell < first + (len(program.arguments) or ARGUMENTS_MAX):
            at = ARGUMENTS_AT + 8 * (cell - first)
            writer.line(f"i32.const 0 {_wasm(kind)}.load offset={at}")
        else:
            writer.line(f"{_wasm(kind)}.const 0")
        writer.set(f"c{cell}")
    for number in written_arrays(context.verified.program):
        at, size = context.arrays[number], 8 * program.arrays[number].length
        writer.line(f"i32.const {at} i32.const 0 i32.const {size} memory.fill")


def _end_index(context: Context, writer: FunctionWriter) -> None:
    if context.is_range:
        return
    if context.reduce == "collect":
        writer.get("ended")
        writer.line(f"i64.const {VALUES_MAX} i64.ge_u if")
        writer.flush()
        writer.line("end")
        writer.get("ended")
        writer.line("i32.wrap_i64 i32.const 2 i32.shl")
        writer.get("here")
        writer.line(f"i64.store32 offset={COUNTS_AT}")
        writer.add_one("ended")
        writer.line("i64.const 0")
        writer.set("here")
    writer.add_one("index")
    writer.line("br $indices")


def _store_words(context: Context, writer: FunctionWriter) -> None:
    """The control words."""
    for name, at in OFFSET.items():
        writer.line("i32.const 0")
        writer.get(name)
        writer.line(f"{_WASM_VARIABLES[name]}.store offset={at}")
