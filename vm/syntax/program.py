"""Programs: what the assembler makes, what travels, what the verifier takes.

Interface: `build(...)` makes a `Program` and its canonical encoding; `decode(ir)` is the inverse
and accepts only what `build` could have made. The KID is the hash of `ir`, so whoever holds a KID
holds one program. `ir` carries the line of every instruction, so that a trap on any node names
source lines; comments, label names and the file's name are not part of it.
Invariants:
  P1  `decode(program.ir) == program`, and `decode` refuses every other spelling of it;
  P2  every immediate is in range of its own table (array, function, name) and every jump lands on
      an instruction or on the end; the verifier, which can name lines, checks the rest;
  P3  names stand in the order of their first use, so that text and encoding are one to one;
  P4  a program without globals is encoded as before there were any: its KID has not changed.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from manifold.vm.errors import InvalidProgram
from manifold.vm.kid import Kid, kid_of
from manifold.vm.syntax.isa import BY_OPCODE, NAMED, WRITES_GLOBALS, Immediate, Spec

IR_VERSION = 1
IR_VERSION_WITH_GLOBALS = 2
IR_BYTES_MAX = 4 << 20  # 64 Ki instructions of at most 1 + 9 + 5 bytes, and the tables
INSTRUCTIONS_MAX = 65_536
CELLS_MAX = 1024
ARRAYS_MAX = 256
ARRAY_BYTES_MAX = 64 << 20  # of all arrays together, 8 bytes an element
FUNCTIONS_MAX = 1024
ARGUMENTS_MAX = 32
NAMES_MAX = 1024
NAME_LENGTH_MAX = 64
GLOBALS_MAX = 64  # 8 KiB of names, which a job that writes them all carries with it
GLOBAL_LENGTH_MAX = 128
LINE_MAX = 1 << 31
SLEEP_SECONDS_MAX = 3600.0
I64_MIN, I64_MAX = -(1 << 63), (1 << 63) - 1

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*\Z")  # of labels, arrays and functions
GLOBAL_NAME = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*\Z")
GLOBALS_FOLDER = "/globals/"  # where people find them: /globals/NAME is NAME

Type = Literal["i64", "f64"]
Kind = Literal["index", "range"]
Dialect = Literal["ent", "json"]
Operand = int | float | None


class Instruction(NamedTuple):
    """One instruction; `operand` is the immediate, or an index into the table it names."""

    opcode: int
    operand: Operand
    line: int

    @property
    def spec(self) -> Spec:
        return BY_OPCODE[self.opcode]


class Array(NamedTuple):
    """A private array: zeros when an index (or a range) starts."""

    name: str
    type: Type
    length: int


class Global(NamedTuple):
    """A register of the whole cluster, and the type that the program wants it to have."""

    name: str
    type: Type


class Function(NamedTuple):
    """A function: where it starts, how many values it takes and leaves."""

    entry: int
    takes: int
    leaves: int


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """A program before verification. Two are equal when their encodings are."""

    kid: Kid
    ir: bytes = field(repr=False)
    kind: Kind
    dialect: Dialect
    entry: int
    cells: int
    arguments: tuple[Type, ...]
    arrays: tuple[Array, ...]
    functions: tuple[Function, ...]
    names: tuple[str, ...]
    instructions: tuple[Instruction, ...] = field(repr=False)
    filename: str = ""
    globals: tuple[Global, ...] = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and self.ir == other.ir

    def __hash__(self) -> int:
        return hash(self.ir)

    @property
    def capabilities(self) -> tuple[str, ...]:
        """What the program asks of the node, in alphabetical order."""
        wanted = {_CAPABILITY.get(each.spec.name, "") for each in self.instructions}
        return tuple(sorted(wanted - {""}))

    @property
    def written(self) -> tuple[str, ...]:
        """The globals that it may write, in alphabetical order."""
        found = {
            self.globals[int(each.operand or 0)].name
            for each in self.instructions
            if each.spec.name in WRITES_GLOBALS
        }
        return tuple(sorted(found))

    def text_of(self, at: int) -> str:
        """The instruction at `at` as the disassembler writes it: labels are `L` and an index."""
        spec, operand = self.instructions[at].spec, self.instructions[at].operand
        if operand is None:
            return spec.name
        if spec.immediate is Immediate.LABEL:
            return f"{spec.name} L{operand}"
        if spec.immediate is Immediate.FUNCTION:
            return f"{spec.name} L{self.functions[int(operand)].entry}"
        if spec.immediate is Immediate.ARRAY:
            return f"{spec.name} {self.arrays[int(operand)].name}"
        if spec.immediate is Immediate.GLOBAL:
            return f"{spec.name} {self.globals[int(operand)].name}"
        if spec.immediate in NAMED:
            return f"{spec.name} {self.names[int(operand)]}"
        return f"{spec.name} {number_text(operand)}"


_CAPABILITY = {"PRINT": "print", "EMIT": "print", "SLEEP": "sleep", "LOAD_GLOBAL": "globals"}
_CAPABILITY |= dict.fromkeys(WRITES_GLOBALS, "globals")

_Name = Annotated[str, msgspec.Meta(max_length=NAME_LENGTH_MAX)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=INSTRUCTIONS_MAX)]
_Line = Annotated[int, msgspec.Meta(ge=0, le=LINE_MAX)]
_Value = Annotated[int, msgspec.Meta(ge=I64_MIN, le=I64_MAX)] | float


class _ArrayImage(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    name: _Name
    type: Type
    length: Annotated[int, msgspec.Meta(ge=1, le=ARRAY_BYTES_MAX // 8)]


class _GlobalImage(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    name: Annotated[str, msgspec.Meta(max_length=GLOBAL_LENGTH_MAX)]
    type: Type


class _FunctionImage(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    entry: _Count
    takes: Annotated[int, msgspec.Meta(ge=0, le=255)]
    leaves: Annotated[int, msgspec.Meta(ge=0, le=255)]


class _Image(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What `ir` holds: a msgpack array of these fields, in this order."""

    version: int
    kind: Kind
    dialect: Dialect
    entry: _Count
    cells: Annotated[int, msgspec.Meta(ge=0, le=CELLS_MAX)]
    arguments: Annotated[tuple[Type, ...], msgspec.Meta(max_length=ARGUMENTS_MAX)]
    arrays: Annotated[tuple[_ArrayImage, ...], msgspec.Meta(max_length=ARRAYS_MAX)]
    functions: Annotated[tuple[_FunctionImage, ...], msgspec.Meta(max_length=FUNCTIONS_MAX)]
    names: Annotated[tuple[_Name, ...], msgspec.Meta(max_length=NAMES_MAX)]
    code: Annotated[bytes, msgspec.Meta(max_length=INSTRUCTIONS_MAX)]
    operands: Annotated[tuple[_Value, ...], msgspec.Meta(max_length=INSTRUCTIONS_MAX)]
    lines: Annotated[tuple[_Line, ...], msgspec.Meta(max_length=INSTRUCTIONS_MAX)]


class _ImageWithGlobals(_Image, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The same of a program that has globals (P4)."""

    globals: Annotated[tuple[_GlobalImage, ...], msgspec.Meta(min_length=1, max_length=GLOBALS_MAX)]


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(_Image)
_DECODER_WITH_GLOBALS = msgspec.msgpack.Decoder(_ImageWithGlobals)
_HEAD_WITH_GLOBALS = b"\x9d"  # MessagePack's array of 13


def build(
    *,
    kind: Kind,
    dialect: Dialect,
    entry: int,
    cells: int,
    arguments: tuple[Type, ...] = (),
    arrays: tuple[Array, ...] = (),
    functions: tuple[Function, ...] = (),
    names: tuple[str, ...] = (),
    globals: tuple[Global, ...] = (),
    instructions: tuple[Instruction, ...],
    filename: str = "",
) -> Program:
    """The program of these parts, checked and encoded; InvalidProgram if a part is out of range."""
    if len(instructions) > INSTRUCTIONS_MAX:
        raise InvalidProgram(
            f"{filename or 'program'}: {len(instructions)} instructions; the limit is "
            f"{INSTRUCTIONS_MAX}."
        )
    operands = tuple(_canonical(each) for each in instructions if each.operand is not None)
    fields: dict[str, Any] = {
        "kind": kind,
        "dialect": dialect,
        "entry": entry,
        "cells": cells,
        "arguments": arguments,
        "arrays": tuple(_ArrayImage(*each) for each in arrays),
        "functions": tuple(_FunctionImage(*each) for each in functions),
        "names": names,
        "code": bytes(each.opcode for each in instructions),
        "operands": operands,
        "lines": tuple(each.line for each in instructions),
    }
    image = _Image(version=IR_VERSION, **fields)
    if globals:
        declared = tuple(_GlobalImage(*each) for each in globals)
        image = _ImageWithGlobals(version=IR_VERSION_WITH_GLOBALS, **fields, globals=declared)
    return decode(_ENCODER.encode(image), filename)


def decode(ir: bytes, filename: str = "") -> Program:
    """The program that `ir` encodes; InvalidProgram for any other bytes."""
    if len(ir) > IR_BYTES_MAX:
        raise _malformed(f"{len(ir)} bytes; the limit is {IR_BYTES_MAX}")
    image: _Image
    try:
        if ir[:1] == _HEAD_WITH_GLOBALS:
            image = _DECODER_WITH_GLOBALS.decode(ir)
        else:
            image = _DECODER.decode(ir)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _malformed(str(error)) from None
    declared = image.globals if isinstance(image, _ImageWithGlobals) else ()
    version = IR_VERSION_WITH_GLOBALS if declared else IR_VERSION
    if image.version != version:
        raise _malformed(f"version {image.version}; this release reads version {version}")
    if _ENCODER.encode(image) != ir:
        raise _malformed("it is not in canonical form")
    if sum(each.length for each in image.arrays) * 8 > ARRAY_BYTES_MAX:
        raise _malformed(f"arrays take more than {ARRAY_BYTES_MAX >> 20} MiB")
    for each in image.arrays:
        if not NAME.match(each.name):
            raise _malformed(f"{each.name!r} is not a name for an array")
    _check_globals(image, declared)
    for name in image.names:
        if not name or not name.isprintable() or any(c.isspace() or c in ";:" for c in name):
            raise _malformed(f"{name!r} is not a name")
    if len({each.name for each in image.arrays}) != len(image.arrays):
        raise _malformed("two arrays have one name")
    instructions = _instructions(image, len(declared))
    used = [int(e.operand or 0) for e in instructions if e.spec.immediate in NAMED]
    if list(dict.fromkeys(used)) != list(range(len(image.names))):
        raise _malformed("names are not in the order of their first use")
    if len(set(image.names)) != len(image.names):
        raise _malformed("a name stands twice")
    if len({each.entry for each in image.functions}) != len(image.functions):
        raise _malformed("two functions start at one instruction")
    if max(image.entry, *(each.entry for each in image.functions), 0) > len(instructions):
        raise _malformed("an entry lies beyond the end")
    return Program(
        kid=kid_of(ir),
        ir=bytes(ir),
        kind=image.kind,
        dialect=image.dialect,
        entry=image.entry,
        cells=image.cells,
        arguments=image.arguments,
        arrays=tuple(Array(each.name, each.type, each.length) for each in image.arrays),
        functions=tuple(Function(e.entry, e.takes, e.leaves) for e in image.functions),
        names=image.names,
        instructions=instructions,
        filename=filename,
        globals=tuple(Global(each.name, each.type) for each in declared),
    )


def _check_globals(image: _Image, declared: tuple[_GlobalImage, ...]) -> None:
    for each in declared:
        if not GLOBAL_NAME.match(each.name):
            raise _malformed(f"{each.name!r} is not a name for a global")
        if image.dialect == "json" and each.type != "f64":
            raise _malformed("a global of the JSON dialect is an f64")
    if len({each.name for each in declared}) != len(declared):
        raise _malformed("two globals have one name")


def _instructions(image: _Image, globals_count: int) -> tuple[Instruction, ...]:
    """Joins the columns of `image`, checking each operand against its kind."""
    if len(image.code) != len(image.lines):
        raise _malformed("the line table does not fit the code")
    if not image.code:
        raise InvalidProgram("The program has no instructions.", "Write at least HALT.")
    operands = iter(image.operands)
    found = []
    for opcode, line in zip(image.code, image.lines, strict=True):
        spec = BY_OPCODE.get(opcode)
        if spec is None:
            raise _malformed(f"opcode {opcode} does not exist")
        operand: Operand = None
        if spec.immediate is not Immediate.NONE:
            operand = next(operands, None)
            _check_operand(image, globals_count, spec, operand, line)
        found.append(Instruction(opcode, operand, line))
    if next(operands, None) is not None:
        raise _malformed("operands are left over")
    return tuple(found)


def _check_operand(
    image: _Image, globals_count: int, spec: Spec, operand: Operand, line: int
) -> None:
    """P2."""
    if operand is None:
        raise _malformed(f"{spec.name} lacks its {spec.immediate.value}")
    kind = spec.immediate
    if kind is Immediate.NUMBER:
        if image.dialect == "json" and not isinstance(operand, float):
            raise _malformed("a constant of the JSON dialect is an f64")
        if isinstance(operand, float) and operand != operand and _bits(operand) != _bits(math.nan):
            raise _malformed("a NaN that is not the canonical one")
        return
    if kind is Immediate.SECONDS:
        if not isinstance(operand, float) or not 0.0 <= operand <= SLEEP_SECONDS_MAX:
            raise InvalidProgram(
                f"line {line}: SLEEP {operand}: not from 0 to {SLEEP_SECONDS_MAX:g} seconds.",
                line=line,
                instruction=f"SLEEP {operand}",
            )
        return
    if not isinstance(operand, int) or operand < 0:
        raise _malformed(f"{spec.name} {operand}: not an index")
    sizes = {
        Immediate.ARRAY: len(image.arrays),
        Immediate.FUNCTION: len(image.functions),
        Immediate.GLOBAL: globals_count,
        Immediate.LABEL: len(image.code) + 1,
        Immediate.CELL: CELLS_MAX,
    }
    limit = len(image.names) if kind in NAMED else sizes.get(kind)
    if limit is not None and operand >= limit:
        raise _malformed(f"{spec.name} {operand}: there are only {limit}")


def _canonical(each: Instruction) -> int | float:
    operand = each.operand
    assert operand is not None
    return math.nan if operand != operand else operand


def _bits(value: float) -> bytes:
    return _ENCODER.encode(value)


def _malformed(reason: str) -> InvalidProgram:
    return InvalidProgram(f"Not a program: {reason}.", "Assemble it again with this release.")


def number_text(value: int | float) -> str:
    """A constant as the assembler reads it back, bit by bit."""
    if isinstance(value, int):
        return str(value)
    text = repr(value)
    return text if any(c in text for c in ".en") else text + ".0"
