"""The seed's JSON dialect: a list of `["OPCODE", operand]`, loaded unchanged.

Interface: `load_seed(text, filename) -> Program`. A list is a per-index program; an object
`{"kind": "range", "program": [...]}` is a range program. Every constant is an f64; names are read
in any case; jumps are by index, and any index from the end on ends the program, so a HALT is
appended there. An opcode that nobody knows is kept, and is a fault when it is reached. Globals are
declared by being named, and are f64.
"""

from __future__ import annotations

import json
import re
from typing import Any

from manifold.vm.errors import InvalidProgram
from manifold.vm.syntax.isa import BY_NAME, Immediate, Spec
from manifold.vm.syntax.program import (
    CELLS_MAX,
    GLOBAL_LENGTH_MAX,
    GLOBAL_NAME,
    GLOBALS_FOLDER,
    GLOBALS_MAX,
    INSTRUCTIONS_MAX,
    NAME_LENGTH_MAX,
    Global,
    Instruction,
    Kind,
    Program,
    build,
)

_SPACE = re.compile(r"[ \t\r\n]*")
_UNKNOWN = BY_NAME["UNKNOWN"]
_FIRST_CELLS = 2  # index (or start) and end


def load_seed(text: str, filename: str = "program.json") -> Program:
    """The program in `text`."""
    kind: Kind = "index"
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 0)
        raise InvalidProgram(f"{filename}: not JSON: {error}.", line=line) from None
    listed, lines = whole, _lines(text)
    if isinstance(whole, dict):
        listed, lines = whole.get("program"), []
        if set(whole) - {"kind", "program"} or whole.get("kind", "index") not in ("index", "range"):
            raise InvalidProgram(f'{filename}: the keys are "kind" and "program".')
        kind = "range" if whole.get("kind") == "range" else "index"
    if not isinstance(listed, list) or not listed:
        raise InvalidProgram(f'{filename}: not a list of instructions such as ["PUSH", 1].')
    if len(listed) >= INSTRUCTIONS_MAX:
        raise InvalidProgram(f"{filename}: more than {INSTRUCTIONS_MAX - 1} instructions.")
    lines = lines or [at + 1 for at in range(len(listed))]
    loader = _Loader(filename, len(listed))
    code = [loader.instruction(each, lines[at], at) for at, each in enumerate(listed)]
    code.append(Instruction(BY_NAME["HALT"].opcode, None, lines[-1]))
    return build(
        kind=kind,
        dialect="json",
        entry=0,
        cells=loader.cells,
        names=tuple(loader.names),
        globals=tuple(Global(name, "f64") for name in loader.globals),
        instructions=tuple(code),
        filename=filename,
    )


def _lines(text: str) -> list[int]:
    """The line on which each element of the outermost list starts."""
    decoder, found, line, counted = json.JSONDecoder(), [], 1, 0
    at = _skip(text, 0)
    if text[at : at + 1] != "[":
        return []
    at = _skip(text, at + 1)
    while at < len(text) and text[at] != "]":
        line += text.count("\n", counted, at)
        counted = at
        found.append(line)
        _, at = decoder.raw_decode(text, at)
        at = _skip(text, at)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return found


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()


class _Loader:
    """Turns list elements into instructions; remembers cells and names."""

    def __init__(self, filename: str, length: int) -> None:
        self.filename = filename
        self.length = length
        self.cells = _FIRST_CELLS
        self.names: dict[str, int] = {}
        self.globals: dict[str, int] = {}

    def instruction(self, each: Any, line: int, at: int) -> Instruction:
        parts = [each] if isinstance(each, str) else each
        if not isinstance(parts, list) or not parts or not isinstance(parts[0], str):
            raise self.refuse(at, line, f'{each!r} is not an instruction such as ["PUSH", 1]')
        name, operands = parts[0].upper(), parts[1:]
        spec = BY_NAME.get(name)
        if spec is None or not spec.seed:
            return Instruction(_UNKNOWN.opcode, self.name(parts[0]), line)
        if spec.immediate is Immediate.NONE:
            return Instruction(spec.opcode, None, line)
        if len(operands) != 1:
            raise self.refuse(at, line, f"{name} takes one operand, a {spec.immediate.value}")
        return Instruction(spec.opcode, self.operand(spec, operands[0], at, line), line)

    def operand(self, spec: Spec, value: Any, at: int, line: int) -> int | float:
        if spec.immediate is Immediate.GLOBAL:
            return self.global_named(value, at, line)
        if not isinstance(value, int | float):
            raise self.refuse(at, line, f"{spec.name} {value!r}: not a number")
        if spec.immediate in (Immediate.NUMBER, Immediate.SECONDS):
            try:
                return float(value)
            except OverflowError:
                raise self.refuse(at, line, f"{spec.name}: the number is too large") from None
        if value != value or value in (float("inf"), float("-inf")) or int(value) != value:
            raise self.refuse(at, line, f"{spec.name} {value!r}: not a whole number")
        whole = int(value)
        if spec.immediate is Immediate.CELL:
            if not 0 <= whole < CELLS_MAX:
                raise self.refuse(at, line, f"{spec.name} {whole}: cells are 0 to {CELLS_MAX - 1}")
            self.cells = max(self.cells, whole + 1)
            return whole
        if whole < 0:
            raise self.refuse(at, line, f"{spec.name} {whole}: no instruction has that index")
        return min(whole, self.length)

    def global_named(self, value: Any, at: int, line: int) -> int:
        name = value.removeprefix(GLOBALS_FOLDER) if isinstance(value, str) else ""
        if not GLOBAL_NAME.match(name) or len(name) > GLOBAL_LENGTH_MAX:
            raise self.refuse(
                at, line, f"{value!r} is not a global's name: letters, digits, _ . - and / between"
            )
        if name not in self.globals and len(self.globals) >= GLOBALS_MAX:
            raise self.refuse(at, line, f"more than {GLOBALS_MAX} globals")
        return self.globals.setdefault(name, len(self.globals))

    def name(self, text: str) -> int:
        clean = "".join(c if c.isprintable() and c not in " ;:" else "_" for c in text)
        clean = clean[:NAME_LENGTH_MAX] or "_"
        return self.names.setdefault(clean, len(self.names))

    def refuse(self, at: int, line: int, reason: str) -> InvalidProgram:
        return InvalidProgram(
            f"{self.filename}, instruction {at}, line {line}: {reason}.", line=line
        )
