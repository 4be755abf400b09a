"""The assembler and the disassembler of `.ent` text.

Interface: `assemble(text, filename) -> Program`, `disassemble(program) -> str`.
Invariant: T1 `assemble(disassemble(p)) == p` for every program, KID included.

One instruction a line, `label:` before it or on a line of its own, `; comment`. Directives:
`.cells n`, `.array name type length`, `.global name type`, `.arguments type ...`,
`.function label ( a b -- c )`, `.entry label`, `.range`, `.dialect json`, and
`.line n`, which numbers the next line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from manifold.vm.errors import InvalidProgram
from manifold.vm.syntax.isa import BY_NAME, NAMED, Immediate, Spec
from manifold.vm.syntax.program import (
    ARGUMENTS_MAX,
    ARRAY_BYTES_MAX,
    CELLS_MAX,
    GLOBAL_LENGTH_MAX,
    GLOBAL_NAME,
    GLOBALS_FOLDER,
    GLOBALS_MAX,
    I64_MAX,
    I64_MIN,
    INSTRUCTIONS_MAX,
    LINE_MAX,
    NAME,
    NAME_LENGTH_MAX,
    Array,
    Dialect,
    Function,
    Global,
    Instruction,
    Kind,
    Operand,
    Program,
    Type,
    build,
)

_INTEGER = re.compile(r"[+-]?(0[xX][0-9a-fA-F_]+|[0-9][0-9_]*)\Z")
_FLOAT = re.compile(
    r"[+-]?([0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9][0-9_]*(?=[eE])|inf|nan)([eE][+-]?[0-9]+)?\Z"
)
_TYPES: dict[str, Type] = {"i64": "i64", "f64": "f64"}
_LATER = {".channel": "channels", ".shared": "shared arrays"}


@dataclass
class _Assembler:
    """What has been read so far."""

    filename: str
    line: int = 0
    kind: Kind = "index"
    dialect: Dialect = "ent"
    entry: tuple[str, int] | None = None
    cells: int | None = None
    arguments: tuple[Type, ...] = ()
    arrays: dict[str, Array] = field(default_factory=dict)
    globals: dict[str, Global] = field(default_factory=dict)
    functions: dict[str, tuple[int, int, int]] = field(default_factory=dict)  # takes, leaves, line
    names: dict[str, int] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    code: list[tuple[Spec, str, int]] = field(default_factory=list)

    def refuse(self, reason: str, next_step: str = "", line: int | None = None) -> InvalidProgram:
        at = self.line if line is None else line
        return InvalidProgram(f"{self.filename}, line {at}: {reason}", next_step, line=at)

    def read(self, raw: str) -> None:
        """One line of source."""
        text = raw.split(";", 1)[0].strip()
        while (colon := text.find(":")) >= 0 and not text.startswith("."):
            self.label(text[:colon].strip())
            text = text[colon + 1 :].strip()
        if not text:
            return
        word, _, rest = (
            text.partition(" ") if "\t" not in text else text.expandtabs().partition(" ")
        )
        if word.startswith("."):
            self.directive(word.lower(), rest.split())
            return
        spec = BY_NAME.get(word.upper())
        if spec is None:
            raise self.refuse(f"no instruction is called {word!r}.", "See docs/entangle.md.")
        if len(self.code) >= INSTRUCTIONS_MAX:
            raise self.refuse(f"more than {INSTRUCTIONS_MAX} instructions.")
        self.code.append((spec, rest.strip(), self.line))

    def label(self, name: str) -> None:
        self.need_name(name, "label")
        if name in self.labels:
            raise self.refuse(f"the label {name!r} stands twice.")
        self.labels[name] = len(self.code)

    def need_name(self, name: str, what: str) -> None:
        if not NAME.match(name) or len(name) > NAME_LENGTH_MAX:
            raise self.refuse(f"{name!r} is not a name for a {what}.", "Use letters, digits, _ .")

    def number(self, word: str, low: int, high: int, what: str) -> int:
        if (
            not _INTEGER.match(word)
            or not low <= int(word, 0 if "x" in word.lower() else 10) <= high
        ):
            raise self.refuse(f"{what} must be a whole number from {low} to {high}, not {word!r}.")
        return int(word, 0 if "x" in word.lower() else 10)

    def type(self, word: str) -> Type:
        if word not in _TYPES:
            raise self.refuse(f"{word!r} is not a type.", "The types are i64 and f64.")
        return _TYPES[word]

    def directive(self, word: str, rest: list[str]) -> None:
        match word, rest:
            case ".cells", [count]:
                self.cells = self.number(count, 0, CELLS_MAX, ".cells")
            case ".array", [name, kind, length]:
                self.need_name(name, "array")
                if name in self.arrays:
                    raise self.refuse(f"the array {name!r} stands twice.")
                size = self.number(length, 1, ARRAY_BYTES_MAX // 8, "an array's length")
                self.arrays[name] = Array(name, self.type(kind), size)
            case ".arguments", [*types] if 0 < len(types) <= ARGUMENTS_MAX:
                self.arguments = tuple(self.type(each) for each in types)
            case ".function", [name, "(", *effect, ")"] if effect.count("--") == 1:
                self.need_name(name, "function")
                if name in self.functions:
                    raise self.refuse(f"the function {name!r} stands twice.")
                takes = effect.index("--")
                self.functions[name] = (takes, len(effect) - takes - 1, self.line)
            case ".entry", [name]:
                self.entry = (name, self.line)
            case ".range", []:
                self.kind = "range"
            case ".dialect", ["json"]:
                self.dialect = "json"
            case ".line", [number]:
                self.line = self.number(number, 0, LINE_MAX, ".line") - 1
            case ".global", [name, kind]:
                self.declare_global(name, self.type(kind))
            case ((".channel" | ".shared"), _):
                raise self.refuse(f"this release does not have {_LATER[word]}.")
            case _:
                raise self.refuse(
                    f"{' '.join([word, *rest])!r} is not a directive.",
                    "Directives: .cells n, .array name type length, .global name type, "
                    ".arguments type ..., .function label ( a -- b ), .entry label, .range, "
                    ".dialect json, .line n.",
                )

    def declare_global(self, written: str, kind: Type) -> None:
        name = written.removeprefix(GLOBALS_FOLDER)
        if not GLOBAL_NAME.match(name) or len(name) > GLOBAL_LENGTH_MAX:
            raise self.refuse(
                f"{written!r} is not a name for a global.",
                f"Use letters, digits, _ . - and / between them, at most {GLOBAL_LENGTH_MAX}.",
            )
        if name in self.globals:
            raise self.refuse(f"the global {name!r} stands twice.")
        if len(self.globals) >= GLOBALS_MAX:
            raise self.refuse(f"more than {GLOBALS_MAX} globals.")
        if self.dialect == "json" and kind != "f64":
            raise self.refuse("a global of the JSON dialect is an f64.")
        self.globals[name] = Global(name, kind)

    def finish(self) -> Program:
        functions = {name: at for at, name in enumerate(self.functions)}
        table = []
        for name, (takes, leaves, line) in self.functions.items():
            if max(takes, leaves) > 255:
                raise self.refuse("a function takes and leaves at most 255 values.", line=line)
            table.append(Function(self.target(name, line), takes, leaves))
        instructions = tuple(
            Instruction(spec.opcode, self.operand(spec, word, line, functions), line)
            for spec, word, line in self.code
        )
        return build(
            kind=self.kind,
            dialect=self.dialect,
            entry=0 if self.entry is None else self.target(*self.entry),
            cells=self.default_cells(instructions) if self.cells is None else self.cells,
            arguments=self.arguments,
            arrays=tuple(self.arrays.values()),
            functions=tuple(table),
            names=tuple(self.names),
            globals=tuple(self.globals.values()),
            instructions=instructions,
            filename=self.filename,
        )

    def default_cells(self, instructions: tuple[Instruction, ...]) -> int:
        """Without `.cells`: as many as the instructions and the arguments name."""
        first = 1 if self.kind == "index" and self.dialect == "ent" else 2
        used = [
            int(each.operand or 0) + 1
            for each in instructions
            if each.spec.immediate is Immediate.CELL
        ]
        return min(max([first + len(self.arguments), *used]), CELLS_MAX)

    def target(self, name: str, line: int) -> int:
        if name not in self.labels:
            raise self.refuse(f"there is no label {name!r}.", line=line)
        return self.labels[name]

    def operand(self, spec: Spec, word: str, line: int, functions: dict[str, int]) -> Operand:
        kind = spec.immediate
        self.line = line
        if kind is Immediate.NONE:
            if word:
                raise self.refuse(f"{spec.name} takes no operand, but {word!r} stands there.")
            return None
        if not word or " " in word:
            raise self.refuse(f"{spec.name} takes one operand, a {kind.value}, not {word!r}.")
        if kind is Immediate.NUMBER:
            return self.constant(word)
        if kind is Immediate.SECONDS:
            return float(self.constant(word))
        if kind is Immediate.CELL:
            return self.number(word, 0, CELLS_MAX - 1, "a cell")
        if kind is Immediate.LABEL:
            return self.target(word, line)
        if kind is Immediate.FUNCTION:
            if word not in functions:
                raise self.refuse(
                    f"no function is called {word!r}.",
                    f"Declare it: .function {word} ( arguments -- results ).",
                )
            return functions[word]
        if kind is Immediate.ARRAY:
            if word not in self.arrays:
                raise self.refuse(f"no array is called {word!r}.", f".array {word} i64 1024")
            return list(self.arrays).index(word)
        if kind is Immediate.GLOBAL:
            name = word.removeprefix(GLOBALS_FOLDER)
            if name not in self.globals:
                raise self.refuse(
                    f"no global is called {word!r}.", f"Declare it: .global {word} i64"
                )
            return list(self.globals).index(name)
        assert kind in NAMED
        return self.names.setdefault(word, len(self.names))

    def constant(self, word: str) -> int | float:
        if _INTEGER.match(word):
            value = int(word, 0 if "x" in word.lower() else 10)
            if self.dialect == "json":
                return float(value)
            if "x" in word.lower() and I64_MAX < value < 1 << 64:
                value -= 1 << 64  # the bit pattern
            if not I64_MIN <= value <= I64_MAX:
                raise self.refuse(f"{word} does not fit in an i64.", "Write it as an f64: add .0")
            return value
        if _FLOAT.match(word):
            return float(word)
        raise self.refuse(f"{word!r} is not a number.")


def assemble(text: str, filename: str = "program.ent") -> Program:
    """The program that `text` spells."""
    assembler = _Assembler(filename)
    for raw in text.splitlines():
        assembler.line += 1
        if assembler.line > LINE_MAX:
            raise assembler.refuse(f"lines are numbered up to {LINE_MAX}.")
        assembler.read(raw)
    return assembler.finish()


def disassemble(program: Program) -> str:
    """The text that assembles to exactly `program`, KID and line numbers included."""
    lines = [f"; {program.kid}", f".cells {program.cells}"]
    if program.dialect == "json":
        lines.append(".dialect json")
    if program.kind == "range":
        lines.append(".range")
    if program.arguments:
        lines.append(".arguments " + " ".join(program.arguments))
    lines += [f".array {each.name} {each.type} {each.length}" for each in program.arrays]
    lines += [f".global {each.name} {each.type}" for each in program.globals]
    for function in program.functions:
        takes = " ".join(_letters(function.takes, "a"))
        leaves = " ".join(_letters(function.leaves, "r"))
        effect = " ".join(part for part in ("(", takes, "--", leaves, ")") if part)
        lines.append(f".function L{function.entry} {effect}")
    targets = _targets(program)
    if program.entry:
        lines.append(f".entry L{program.entry}")
    expected = len(lines) + 1
    for at, each in enumerate(program.instructions):
        if each.line != expected:
            lines.append(f".line {each.line}")
        expected = each.line + 1
        label = f"L{at}:" if at in targets else ""
        lines.append(f"{label:<8}{program.text_of(at)}")
    if len(program.instructions) in targets:
        lines.append(f"L{len(program.instructions)}:")
    return "\n".join(lines) + "\n"


def _targets(program: Program) -> set[int]:
    found = {each.entry for each in program.functions} | {program.entry}
    for each in program.instructions:
        if each.spec.immediate is Immediate.LABEL:
            found.add(int(each.operand or 0))
    return found


def _letters(count: int, letter: str) -> list[str]:
    return [f"{letter}{each}" for each in range(1, count + 1)]
