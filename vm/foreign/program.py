"""Foreign programs: WebAssembly binaries made by other compilers, checked before they travel.

Interface: `load(data, name) -> Foreign`, or InvalidProgram that says what is not offered and what
to do. Every node loads what it receives for itself; nothing here compiles or runs anything.
Invariants:
  F1  what loads imports only functions that vm/foreign/wasi offers, with their signatures, so
      instantiation never lacks anything; it has at most one memory, its own, of 32 bits;
  F2  the KID is the hash of the bytes: the same binary has the same name everywhere.
Sources: WebAssembly Core Specification 2.0; WASI preview 1 ("wasi_snapshot_preview1", application
ABI: a command exports `_start` and `memory`, a reactor may export `_initialize`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from manifold.vm.errors import InvalidProgram
from manifold.vm.foreign.binary import PAGE_BYTES, Binary, Import, Signature, read
from manifold.vm.foreign.signatures import WASI_MODULE, WASI_SIGNATURES
from manifold.vm.kid import Kid, kid_of

PROGRAM_BYTES_MAX = 16 << 20  # a quarter of the largest message; a minute or two of compiling
NAME_CHARACTERS_MAX = 256  # of a file's name in messages
START, INITIALIZE, MEMORY = "_start", "_initialize", "memory"
INDEX_TYPES = ("i64", "i32", "f64")
VALUE_TYPES = ("i32", "i64", "f32", "f64")
CHOICES_MAX = 8  # exported functions that an error names

_MAGIC, _MODULE, _COMPONENT = b"\0asm", b"\1\0\0\0", b"\x0d\0\1\0"
_TEXT_STARTS = (b"(module", b"(component", b";;", b"(;")

# What a compiler was told, by words of the validator's message.
_ADVICE = (
    ("SIMD", "Compile it without -msimd128."),
    ("threads", "Compile it without -pthread and -matomics."),
    ("shared", "Compile it without -pthread and -matomics."),
    ("memory64", "Compile it for wasm32, not wasm64."),
    ("multiple memories", "Link it with one memory."),
    ("exceptions", "Compile it without -fwasm-exceptions."),
    ("gc ", "Compile it for linear memory; garbage-collected languages are not taken."),
    ("function references", "Compile it for WebAssembly 2.0, without typed references."),
)
_ADVICE_ELSE = "Compile it again, for WebAssembly 2.0 without proposals beyond it."


@dataclass(frozen=True, slots=True)
class Export:
    """An exported function."""

    name: str
    signature: Signature

    def __str__(self) -> str:
        return f"{self.name}{self.signature}"


@dataclass(frozen=True, slots=True)
class Foreign:
    """A program that may run. "command": `_start` runs once; "module": a function an index.

    `exports` are its functions in the order of the file, `imports` what it takes of WASI.
    """

    data: bytes = field(repr=False)
    name: str
    kid: Kid
    kind: Literal["command", "module"]
    exports: tuple[Export, ...]
    imports: tuple[str, ...]
    memory_bytes: int  # at its start
    initializes: bool  # exports `_initialize`, to be called before anything else

    def entry(self, name: str = "") -> Export:
        """The function that runs for each index: `name`, else the only one, else `run`."""
        if self.kind == "command":
            raise InvalidProgram(
                f"{self.name} is a command: it runs once, not for each index.",
                f"Run it with arguments, as `manifold run {self.name} -- ...`, without a range.",
            )
        usable = [each for each in self.exports if each.name != INITIALIZE]
        names = {each.name: each for each in usable}
        if not name:
            name = usable[0].name if len(usable) == 1 else "run"
        chosen = names.get(name)
        if chosen is None:
            raise InvalidProgram(
                f"{self.name} exports no function named {name}.",
                f"Choose the function to run: {_listed(list(names))}.",
            )
        _check_entry(self.name, chosen)
        return chosen


def load(data: bytes, name: str = "") -> Foreign:
    """The program of a `.wasm` file; `name` is what messages call it."""
    data = bytes(data)
    kid = kid_of(data)
    name = name[:NAME_CHARACTERS_MAX] or kid
    _check_form(data, name)
    _validate(data, name)
    binary = read(data)
    for each in binary.imports:
        _check_import(each, name, binary)
    if binary.imports and binary.others.get(MEMORY) != "memory":
        raise InvalidProgram(
            f"{name} calls WASI but does not export its memory as {MEMORY!r}.",
            "Export it: WASI functions read and write there (wasm-ld does so by itself).",
        )
    kind: Literal["command", "module"] = "command" if START in binary.functions else "module"
    for special in (START, INITIALIZE):
        found = binary.functions.get(special)
        if found is not None and found != Signature((), ()):
            raise InvalidProgram(
                f"{name} exports {special}{found}; it must be () -> ().",
                "Link it with crt1.o of wasi-libc, or rename the function.",
            )
    exports = tuple(Export(*each) for each in binary.functions.items())
    if all(each.name == INITIALIZE for each in exports):
        raise InvalidProgram(
            f"{name} exports no function.",
            "Give a command `main` and wasi-libc; export a module's function with "
            "-Wl,--export=run.",
        )
    return Foreign(
        data,
        name,
        kid,
        kind,
        exports,
        tuple(each.name for each in binary.imports),
        binary.memory_pages * PAGE_BYTES,
        INITIALIZE in binary.functions,
    )


def _check_form(data: bytes, name: str) -> None:
    if len(data) > PROGRAM_BYTES_MAX:
        raise InvalidProgram(
            f"{name} has {len(data)} bytes; the limit is {PROGRAM_BYTES_MAX}.",
            "Strip it (-Wl,--strip-all) and compile it with -Oz.",
        )
    if data.lstrip()[:16].startswith(_TEXT_STARTS):
        raise InvalidProgram(
            f"{name} is WebAssembly text.",
            "Assemble it first: wat2wasm program.wat -o program.wasm (Debian: wabt).",
        )
    if data[:4] != _MAGIC:
        raise InvalidProgram(
            f"{name} is no WebAssembly: it does not start with \\0asm.",
            "Give a binary .wasm file, compiled for wasm32.",
        )
    if data[4:8] == _COMPONENT:
        raise InvalidProgram(
            f"{name} is a component; core modules and WASI preview 1 commands are taken.",
            "Compile it for wasm32-wasip1 (clang: wasm32-wasi), without wasm-tools component.",
        )
    if data[4:8] != _MODULE:
        raise InvalidProgram(
            f"{name} is WebAssembly of the version {data[4:8].hex() or 'none'}, not 1.",
            "Compile it again.",
        )


def _validate(data: bytes, name: str) -> None:
    import wasmtime  # slow to import; the kernel's nodes only pass programs on

    from manifold.vm.foreign.engine import make_engine

    engine = make_engine()
    try:
        wasmtime.Module.validate(engine, data)
    except wasmtime.WasmtimeError as refusal:
        message = str(refusal).split("\n")[0]
        advice = (advice for word, advice in _ADVICE if word in message)
        raise InvalidProgram(
            f"{name} is not valid here: {message}.", next(advice, _ADVICE_ELSE)
        ) from None
    finally:
        engine.close()


def _check_import(each: Import, name: str, binary: Binary) -> None:
    """F1."""
    what = f"{name} imports the {each.kind} {each.module}.{each.name}, which is not offered."
    if each.module != WASI_MODULE or each.kind != "function":
        raise InvalidProgram(what, _import_advice(each, binary))
    offered = WASI_SIGNATURES.get(each.name)
    if offered is None:
        raise InvalidProgram(what, "Compile it for WASI preview 1 (wasm32-wasi, wasm32-wasip1).")
    if each.signature != offered:
        raise InvalidProgram(
            f"{name} imports {each.module}.{each.name}{each.signature}; it is {offered} here.",
            "Compile it for WASI preview 1 (wasm32-wasi, wasm32-wasip1).",
        )


def _import_advice(each: Import, binary: Binary) -> str:
    if "linking" in binary.custom:
        return "This is an object file: link it, with clang or wasm-ld."
    if each.module == "wasi_unstable" or each.module.startswith("wasi:"):
        return "Compile it for WASI preview 1 (wasm32-wasi, wasm32-wasip1)."
    if each.module == "wasi" or "thread" in each.name:
        return "Compile it without threads (-pthread)."
    if each.kind == "memory":
        return "Link it without -Wl,--import-memory: a program brings its own memory."
    if each.module == "env":
        return (
            "Define it, or link what defines it (no -Wl,--allow-undefined; Emscripten: "
            "-sSTANDALONE_WASM). Only WASI preview 1 functions are offered."
        )
    return f"Only functions of {WASI_MODULE} are offered: compile it for wasm32-wasi."


def _check_entry(name: str, chosen: Export) -> None:
    parameters, results = chosen.signature.parameters, chosen.signature.results
    if not parameters or parameters[0] not in INDEX_TYPES:
        raise InvalidProgram(
            f"{name}: {chosen} does not take an index first.",
            f"Its first parameter must be one of {', '.join(INDEX_TYPES)}.",
        )
    for each in (*parameters, *results):
        if each not in VALUE_TYPES:
            raise InvalidProgram(
                f"{name}: {chosen} takes or leaves a {each}.",
                f"Use only {', '.join(VALUE_TYPES)}.",
            )


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:CHOICES_MAX])
    more = len(names) - CHOICES_MAX
    return f"{shown} and {more} more" if more > 0 else shown
