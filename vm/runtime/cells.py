"""What stands in the cells when an index starts, and how a fault becomes a Trap.

Interface: `check_arguments` once a run, `initial_cells` at an index, `trap` at a fault, `placed`
where who has the globals refused. Shared by both back ends, so that they cannot differ.
"""

from __future__ import annotations

from collections.abc import Sequence

from manifold.vm.errors import InvalidProgram, ManifoldError, Trap
from manifold.vm.runtime.results import as_number
from manifold.vm.syntax.isa import FAULT_TEXT, Fault
from manifold.vm.syntax.program import ARGUMENTS_MAX, I64_MAX, I64_MIN, Program
from manifold.vm.valid import Verified
from manifold.vm.valid.verifier import first_argument

Value = int | float

_NEXT_STEP = {
    Fault.DIVISION: "Test the divisor first.",
    Fault.BOUNDS: "Arrays start at 0; LEN tells the length.",
    Fault.DEPTH: "Use a loop, or an array as a stack.",
    Fault.CONVERSION: "INT takes values from -2^63 to below 2^63.",
    Fault.ROOT: "Test the operand first.",
    Fault.UNKNOWN: "See docs/entangle.md.",
    Fault.OVERFLOW: "Keep values below 2^63, or use @kernel(wrap=True): ADD SUB MUL.",
    Fault.RAISED: "",
    Fault.GLOBAL: "",
}


def check_arguments(verified: Verified, arguments: Sequence[Value]) -> tuple[Value, ...]:
    """The arguments as their cells hold them; InvalidProgram if they do not fit."""
    program = verified.program
    first = first_argument(program)
    room = min(program.cells - first, ARGUMENTS_MAX)
    wrong = len(arguments) != len(program.arguments) if program.arguments else len(arguments) > room
    if wrong:
        wanted = str(len(program.arguments)) if program.arguments else f"at most {room}"
        raise InvalidProgram(f"The program takes {wanted} arguments, not {len(arguments)}.")
    found: list[Value] = []
    for number, value in enumerate(arguments):
        is_float = verified.cells[first + number] == "f"
        if isinstance(value, int) and not I64_MIN <= value <= I64_MAX:
            raise InvalidProgram(f"Argument {number + 1}, {value}, does not fit in an i64.")
        if isinstance(value, float) and not is_float:
            raise InvalidProgram(
                f"Argument {number + 1}, {value}, is an f64, but cell {first + number} is an i64.",
                "Pass a whole number, or declare it: .arguments f64.",
            )
        found.append(float(value) if is_float else int(value))
    return tuple(found)


def initial_cells(
    verified: Verified, start: int, end: int, arguments: Sequence[Value]
) -> list[Value]:
    """The cells of an index (start, start + 1) or a range; `arguments` have been checked."""
    cells: list[Value] = [0.0 if letter == "f" else 0 for letter in verified.cells]
    first = first_argument(verified.program)
    for cell, value in enumerate((start, end)[:first]):
        cells[cell] = float(value) if verified.cells[cell] == "f" else value
    cells[first : first + len(arguments)] = arguments
    return cells


def trap(
    program: Program,
    at: int,
    reason: Fault | str,
    cells: Sequence[Value],
    index: int,
    results: Sequence[Value],
) -> Trap:
    """The error of a fault at instruction `at`."""
    line, text = program.instructions[at].line, program.text_of(at)
    if reason is Fault.RAISED:
        reason = program.names[int(program.instructions[at].operand or 0)].replace("_", " ")
    what = reason if isinstance(reason, str) else FAULT_TEXT[reason]
    where = "range from" if program.kind == "range" else "index"
    name = program.filename or program.kid
    if program.dialect == "json":
        results = [as_number(each) for each in results]
    return Trap(
        f"{name}, line {line}, {text}: {what} at {where} {index}.",
        "" if isinstance(reason, str) else _NEXT_STEP[reason],
        line=line,
        instruction=text,
        cells=tuple(cells),
        index=index,
        results=tuple(results),
    )


def placed(
    error: ManifoldError,
    program: Program,
    at: int,
    cells: Sequence[Value],
    index: int,
    results: Sequence[Value],
) -> Trap:
    """`error`, which instruction `at` met with outside of the program: what and where."""
    found = trap(program, at, error.message.rstrip("."), cells, index, results)
    found.next_step = error.next_step
    found.code = error.code
    found.__cause__ = error
    return found
