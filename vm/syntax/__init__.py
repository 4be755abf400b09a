"""Syntax: from text to programs and back.

Interface: `load(source, filename)` takes a file's content by its ending, `.ent` (assembly) or
`.json` (the seed's dialect). `assemble` and `disassemble` are inverse; `decode` reads the
canonical encoding that travels. Everything refused is refused by InvalidProgram with its line.
"""

from __future__ import annotations

from manifold.vm.errors import InvalidProgram
from manifold.vm.syntax.program import Array, Function, Global, Instruction, Program, decode
from manifold.vm.syntax.seed import load_seed
from manifold.vm.syntax.text import assemble, disassemble

SOURCE_BYTES_MAX = 8 << 20  # 64 Ki instructions of 128 bytes of text each

__all__ = [
    "SOURCE_BYTES_MAX",
    "Array",
    "Function",
    "Global",
    "Instruction",
    "Program",
    "assemble",
    "decode",
    "disassemble",
    "load",
]


def load(source: bytes | str, filename: str) -> Program:
    """The program in `source`; the ending of `filename` says what it is."""
    if len(source) > SOURCE_BYTES_MAX:
        raise InvalidProgram(f"{filename}: larger than {SOURCE_BYTES_MAX >> 20} MiB.")
    if isinstance(source, bytes):
        try:
            source = source.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InvalidProgram(f"{filename}: not UTF-8 text ({error.reason}).") from None
    if filename.endswith(".ent"):
        return assemble(source, filename)
    if filename.endswith(".json"):
        return load_seed(source, filename)
    raise InvalidProgram(
        f"{filename}: Manifold does not know this kind of program.",
        "Name it *.ent (assembly) or *.json (a list of instructions).",
    )
