"""Foreign programs are checked before they travel: what is taken, what is refused and why."""

from __future__ import annotations

import functools
import struct
import subprocess
import sys
from typing import Any

import pytest
import wasmtime
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold.vm.errors import InvalidProgram, ManifoldError
from manifold.vm.foreign import Foreign, ForeignMachine, load
from manifold.vm.foreign.program import PROGRAM_BYTES_MAX
from manifold.vm.foreign.signatures import WASI_MODULE, WASI_SIGNATURES
from manifold.vm.kid import kid_of


@functools.cache
def binary(text: str) -> bytes:
    return bytes(wasmtime.wat2wasm(text))


def loaded(text: str) -> Foreign:
    return load(binary(text), "program.wasm")


RUN = '(func (export "run") (param i64) (result i64) (local.get 0))'
COMMAND = """(module
  (import "wasi_snapshot_preview1" "fd_write" (func (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 2) (func (export "_start")))"""


def test_a_module_has_its_functions_with_their_signatures_and_the_kid_of_its_bytes() -> None:
    text = '(module (func (export "mix") (param f64 i32) (result f32 i64) unreachable))'
    module = loaded(text)
    assert module.kind == "module" and module.name == "program.wasm"
    assert [str(each) for each in module.exports] == ["mix(f64, i32) -> (f32, i64)"]
    assert module.kid == kid_of(binary(text)) and module.data == binary(text)
    assert load(binary(text)).name == module.kid


def test_a_command_exports_start_and_names_what_it_takes_of_wasi() -> None:
    command = loaded(COMMAND)
    assert command.kind == "command" and command.imports == ("fd_write",)
    assert command.memory_bytes == 2 << 16


def test_the_signatures_offered_are_those_of_wasmtime() -> None:
    engine = wasmtime.Engine()
    linker, store = wasmtime.Linker(engine), wasmtime.Store(engine)
    linker.define_wasi()
    store.set_wasi(wasmtime.WasiConfig())
    for name, signature in WASI_SIGNATURES.items():
        function: Any = linker.get(store, WASI_MODULE, name)
        kind = function.type(store)
        assert tuple(map(str, kind.params)) == signature.parameters, name
        assert tuple(map(str, kind.results)) == signature.results, name
    store.close()
    linker.close()
    engine.close()


@pytest.mark.parametrize("name", WASI_SIGNATURES)
def test_every_function_of_preview_1_can_be_imported(name: str) -> None:
    signature = WASI_SIGNATURES[name]
    parameters, results = " ".join(signature.parameters), " ".join(signature.results)
    text = f"""(module (import "{WASI_MODULE}" "{name}"
      (func (param {parameters}) (result {results}))) (memory (export "memory") 1) {RUN})"""
    assert loaded(text).imports == (name,)


REFUSED = [
    ('(import "env" "puts" (func (param i32)))', "the function env.puts", "no -Wl,--allow-und"),
    ('(import "env" "memory" (memory 1))', "the memory env.memory", "--import-memory"),
    ('(import "wasi_unstable" "fd_close" (func))', "wasi_unstable.fd_close", "WASI preview 1"),
    ('(import "wasi" "thread-spawn" (func))', "wasi.thread-spawn", "without threads"),
    ('(import "js" "log" (func))', "js.log", "Only functions of wasi_snapshot_preview1"),
    ('(import "wasi_snapshot_preview1" "fd_fly" (func))', "fd_fly, which is not", "wasm32-wasi"),
    ('(import "wasi_snapshot_preview1" "fd_close" (func))', "is (i32) -> (i32) here", "preview 1"),
    ('(import "wasi_snapshot_preview1" "x" (global i32))', "the global wasi_", "Only functions"),
    ('(import "a" "t" (table 1 funcref))', "the table a.t", "Only functions"),
    ("(memory i64 1)", "memory64 must be enabled", "wasm32, not wasm64"),
    ("(memory 1 2 shared)", "threads must be enabled", "without -pthread"),
    ("(memory 1) (memory 1)", "multiple memories", "one memory"),
    ("(func (drop (v128.const i64x2 0 0)))", "SIMD support is not enabled", "without -msimd128"),
    ("(tag)", "exceptions", "without -fwasm-exceptions"),
    ("(type (struct))", "without the gc feature", "garbage-collected"),
    ('(func (export "_start") (param i32))', "_start(i32) -> (); it must be () -> ()", "crt1.o"),
]


@pytest.mark.parametrize("part, message, advice", REFUSED)
def test_what_is_not_offered_is_refused_with_advice(part: str, message: str, advice: str) -> None:
    with pytest.raises(InvalidProgram) as refused:
        loaded(f"(module {part} {'' if '_start' in part else RUN})")
    assert message in refused.value.message and advice in refused.value.next_step
    assert refused.value.message.startswith("program.wasm ")


def test_a_program_that_calls_wasi_must_export_its_memory() -> None:
    hidden = COMMAND.replace('(export "memory")', "")
    renamed = COMMAND.replace('(export "memory")', '(export "mem")')
    for text in (hidden, renamed):
        with pytest.raises(InvalidProgram, match="does not export its memory as 'memory'"):
            loaded(text)


def test_a_program_without_functions_is_refused() -> None:
    for text in ("(module)", '(module (func (export "_initialize")))'):
        with pytest.raises(InvalidProgram, match="exports no function"):
            loaded(text)


FORMS = [
    (b"", "does not start with"),
    (b"\x7fELF\2\1\1\0", "does not start with"),
    (b"\n (module)", "WebAssembly text.*wat2wasm"),
    (b";; text\n(module)", "WebAssembly text"),
    (b"\0asm\x0d\0\1\0", "is a component.*wasm32-wasip1"),
    (b"\0asm\2\0\0\0", "version 02000000, not 1"),
    (b"\0asm\1\0", "version 0100, not 1"),
    (b"\0asm\1\0\0\0\1", "unexpected end"),
]


@pytest.mark.parametrize("data, message", FORMS)
def test_what_is_no_binary_module_is_refused_by_its_form(data: bytes, message: str) -> None:
    with pytest.raises(InvalidProgram, match=message):
        load(data, "program.wasm")


def test_a_program_has_a_size_limit() -> None:
    with pytest.raises(InvalidProgram, match=r"the limit is 16777216\. Strip it"):
        load(b"\0asm" + bytes(PROGRAM_BYTES_MAX), "program.wasm")


def test_an_object_file_is_told_from_a_program() -> None:
    name = b"linking"
    section = bytes([0, len(name) + 2, len(name)]) + name + b"\2"
    data = binary(f'(module (import "env" "__stack_pointer" (global i32)) {RUN})') + section
    with pytest.raises(InvalidProgram, match="This is an object file: link it"):
        load(data, "program.o")


ENTRIES = [
    ('(func (export "a") (param i64))', "", "a"),
    ('(func (export "a") (param i64)) (func (export "_initialize"))', "", "a"),
    ('(func (export "a") (param i64)) (func (export "run") (param i32))', "", "run"),
    ('(func (export "a") (param f64)) (func (export "run") (param i32))', "a", "a"),
]


@pytest.mark.parametrize("text, given_name, chosen", ENTRIES)
def test_the_entry_is_the_named_the_only_or_the_run_function(
    text: str, given_name: str, chosen: str
) -> None:
    assert loaded(f"(module {text})").entry(given_name).name == chosen


TWO = '(func (export "a") (param i64)) (func (export "b") (param i64))'
NO_ENTRIES = [
    (TWO, "", r"no function named run\. Choose the function to run: a, b"),
    (TWO, "c", r"no function named c\. Choose the function to run: a, b"),
    ('(func (export "a"))', "", r"a\(\) -> \(\) does not take an index first.*i64, i32, f64"),
    ('(func (export "a") (param f32))', "", "does not take an index first"),
    ('(func (export "a") (param i64 externref))', "", "takes or leaves a externref"),
    ('(func (export "a") (param i64) (result funcref) unreachable)', "", "leaves a funcref"),
]


@pytest.mark.parametrize("text, given_name, message", NO_ENTRIES)
def test_no_entry_is_an_error_that_names_the_choices(
    text: str, given_name: str, message: str
) -> None:
    with pytest.raises(InvalidProgram, match=message):
        loaded(f"(module {text})").entry(given_name)


def test_a_command_has_no_entry_and_many_choices_are_cut_short() -> None:
    with pytest.raises(InvalidProgram, match="is a command: it runs once"):
        loaded(COMMAND).entry()
    many = "".join(f'(func (export "f{each}") (param i64))' for each in range(20))
    with pytest.raises(InvalidProgram, match="f6, f7 and 12 more"):
        loaded(f"(module {many})").entry()


# --- anything at all ------------------------------------------------------------------------

SEEDS = [
    COMMAND,
    f"(module {RUN})",
    f'(module (memory (export "memory") 1 9) (table 3 funcref) (global i32 (i32.const 7)) {RUN}'
    '(data (i32.const 8) "hello") (func $s (drop (i32.const 1))) (start $s)'
    '(func (export "f") (param i32 f32) (result f64 i32) (loop (br 0)) unreachable))',
]


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([b"", b"\0asm", b"\0asm\1\0\0\0"]))
def test_random_bytes_load_or_are_refused(data: bytes, start: bytes) -> None:
    try:
        load(start + data)
    except InvalidProgram as refusal:
        assert refusal.next_step or refusal.message


def mutated(seed: bytes, edits: list[tuple[int, int, int]]) -> bytes:
    data = bytearray(seed)
    for kind, at, value in edits:
        at %= len(data)
        if kind == 0:
            data[at] = value
        elif kind == 1:
            data[at:at] = struct.pack("B", value)
        else:
            del data[max(at, 8) : at + value % 8]
    return bytes(data)


EDITS = st.tuples(st.integers(0, 2), st.integers(8, 400), st.integers(0, 255))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(SEEDS), st.lists(EDITS, min_size=1, max_size=4))
def test_mutated_programs_load_or_are_refused_and_run_or_fail_as_programs(
    text: str, edits: list[tuple[int, int, int]]
) -> None:
    data = mutated(binary(text), edits)
    try:
        program = load(data)
    except InvalidProgram:
        return
    machine = ForeignMachine(1 << 20)
    try:
        if program.kind == "command":
            machine.command(program).run(
                ["p"], environ={}, stdin=b"", gas=1 << 20, on_yield=none_left, on_sleep=no_sleep
            )
        else:
            arguments = [1] * (len(program.entry().signature.parameters) - 1)
            unit = machine.load(program, "sum")
            unit.run(0, 3, gas=1 << 20, on_yield=none_left, on_sleep=no_sleep, arguments=arguments)
    except ManifoldError:
        pass
    finally:
        machine.close()


def none_left(gas_used: int) -> int:
    assert gas_used >= 0
    return 0


def no_sleep(seconds: float) -> None:
    raise AssertionError("nothing here sleeps")


def test_importing_the_package_loads_neither_wasmtime_nor_numpy() -> None:
    code = "import sys, manifold.vm.foreign; print({'wasmtime', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert done.stdout.decode().strip() == "set()", done.stderr
