"""What a WebAssembly binary takes and gives: its sections, read without compiling it.

Interface: `read(data) -> Binary`, of a module that wasmtime has validated. Whatever it cannot read
is InvalidProgram all the same, so a disagreement with the validator is a refusal and no crash.
Source: WebAssembly Core Specification 2.0, chapter 5 (binary format).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from manifold.vm.errors import InvalidProgram

T = TypeVar("T")

PAGE_BYTES = 1 << 16
_TYPES = {0x7F: "i32", 0x7E: "i64", 0x7D: "f32", 0x7C: "f64", 0x7B: "v128", 0x70: "funcref"}
_TYPES[0x6F] = "externref"
_KINDS = ("function", "table", "memory", "global", "tag")
_HAS_MAXIMUM = 1  # of the flags of a memory's or table's limits
_LEB_BYTES_MAX = 10  # of a 64-bit number


@dataclass(frozen=True, slots=True)
class Signature:
    """What a function takes and leaves."""

    parameters: tuple[str, ...]
    results: tuple[str, ...]

    def __str__(self) -> str:
        return f"({', '.join(self.parameters)}) -> ({', '.join(self.results)})"


@dataclass(frozen=True, slots=True)
class Import:
    """`signature` of functions only."""

    module: str
    name: str
    kind: str
    signature: Signature | None


@dataclass(slots=True)
class Binary:
    """`functions` are the exported functions, `others` what else is exported, name by kind."""

    imports: list[Import] = field(default_factory=list)
    functions: dict[str, Signature] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    custom: list[str] = field(default_factory=list)  # names of the custom sections
    memory_pages: int = 0  # of its own memory at the start


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data, self.at = data, 0

    def more(self) -> bool:
        return self.at < len(self._data)

    def take(self, size: int) -> bytes:
        taken = self._data[self.at : self.at + size]
        if len(taken) != size:
            raise InvalidProgram("The WebAssembly binary is cut off.", "Compile it again.")
        self.at += size
        return taken

    def byte(self) -> int:
        return self.take(1)[0]

    def number(self) -> int:
        """An unsigned LEB128."""
        value = 0
        for shift in range(0, 7 * _LEB_BYTES_MAX, 7):
            byte = self.byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise InvalidProgram("The WebAssembly binary holds a malformed number.")

    def name(self) -> str:
        return self.take(self.number()).decode(errors="replace")

    def types(self) -> tuple[str, ...]:
        return tuple(self.type() for _ in range(self.number()))

    def type(self) -> str:
        code = self.byte()
        if code not in _TYPES:
            raise InvalidProgram(
                f"The WebAssembly binary uses a type, 0x{code:02x}, that is not offered.",
                "Compile it for WebAssembly 2.0 without garbage collection and exceptions.",
            )
        return _TYPES[code]

    def limits(self) -> int:
        """The least size; the greatest is skipped."""
        flags, least = self.byte(), self.number()
        if flags & _HAS_MAXIMUM:
            self.number()
        return least


def read(data: bytes) -> Binary:
    """What `data`, a valid module, imports and exports."""
    found, reader = Binary(), _Reader(data)
    reader.take(8)  # magic and version
    types: list[Signature] = []
    functions: list[int] = []  # the type of each function, imported ones first
    while reader.more():
        section = reader.byte()
        body = _Reader(reader.take(reader.number()))
        if section == 0:
            found.custom.append(body.name())
        elif section == 1:
            types = [_signature(body) for _ in range(body.number())]
        elif section == 2:
            found.imports = [_import(body, types, functions) for _ in range(body.number())]
        elif section == 3:
            functions += [body.number() for _ in range(body.number())]
        elif section == 5:
            found.memory_pages = sum(body.limits() for _ in range(body.number()))
        elif section == 7:
            _exports(body, types, functions, found)
    return found


def _signature(body: _Reader) -> Signature:
    form = body.byte()
    if form != 0x60:
        raise InvalidProgram(
            f"The WebAssembly binary defines a type of the form 0x{form:02x}, not a function's.",
            "Compile it for WebAssembly 2.0 without garbage collection.",
        )
    return Signature(body.types(), body.types())


def _import(body: _Reader, types: list[Signature], functions: list[int]) -> Import:
    module, name, kind = body.name(), body.name(), body.byte()
    signature = None
    if kind == 0:
        functions.append(body.number())
        signature = _pick(types, functions[-1])
    elif kind == 1:
        body.type()
        body.limits()
    elif kind == 2:
        body.limits()
    elif kind == 3:
        body.type()
        body.byte()
    else:
        body.byte()
        body.number()
    return Import(module, name, _KINDS[min(kind, 4)], signature)


def _exports(body: _Reader, types: list[Signature], functions: list[int], found: Binary) -> None:
    for _ in range(body.number()):
        name, kind, index = body.name(), body.byte(), body.number()
        if kind == 0:
            found.functions[name] = _pick(types, _pick(functions, index))
        else:
            found.others[name] = _KINDS[min(kind, 4)]


def _pick(things: Sequence[T], index: int) -> T:
    if index >= len(things):
        raise InvalidProgram("The WebAssembly binary names something that it does not have.")
    return things[index]
