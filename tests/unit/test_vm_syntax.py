"""Syntax: the assembler, the canonical encoding, the seed's dialect, the one table."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold.vm.compile.function import WRITE
from manifold.vm.errors import InvalidProgram
from manifold.vm.kid import kid_of
from manifold.vm.syntax import Program, assemble, decode, disassemble, load
from manifold.vm.syntax.isa import BY_OPCODE, TABLE, table_markdown

ROOT = Path(__file__).resolve().parents[2]


def operands(program: Program) -> list[object]:
    return [each.operand for each in program.instructions]


# -- the table ---------------------------------------------------------------------------------


def test_opcodes_and_names_are_unique() -> None:
    assert len({spec.opcode for spec in TABLE}) == len({spec.name for spec in TABLE}) == len(TABLE)


@pytest.mark.parametrize("spec", TABLE, ids=lambda spec: spec.name)
def test_the_stack_effect_and_the_types_say_the_same(spec: object) -> None:
    assert hasattr(spec, "effect")
    before, after = spec.effect.strip("() ").split("--") if spec.effect != "( -- )" else ("", "")
    if spec.name not in ("CALL", "RET"):
        assert (len(before.split()), len(after.split())) == (len(spec.taken), len(spec.left))


def test_the_compiler_writes_every_instruction_of_this_release() -> None:
    block_ends = {"JMP", "JZ", "JNZ", "LOOP"}
    assert {s.name for s in TABLE if not s.reserved} == set(WRITE) | block_ends


def test_the_table_of_the_manual_is_the_table() -> None:
    assert table_markdown() in (ROOT / "docs" / "entangle.md").read_text()


def test_importing_the_vm_is_light() -> None:
    code = "import sys, manifold.vm, manifold.vm.syntax, manifold.vm.valid, manifold.vm.runtime\n"
    code += "assert not {'wasmtime', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- the assembler -----------------------------------------------------------------------------


def test_numbers_are_i64_or_f64_by_their_spelling() -> None:
    text = "PUSH 1_000\nPUSH 0xFFFFFFFFFFFFFFFF\nPUSH -0x10\nPUSH 1.\nPUSH 1e3\nPUSH -inf\nHALT"
    found = operands(assemble(text))
    assert found == [1000, -1, -16, 1.0, 1000.0, -math.inf, None]
    assert [type(x) for x in found[:6]] == [int, int, int, float, float, float]


def test_labels_stand_alone_or_before_an_instruction() -> None:
    program = assemble("a: b: push 1 ; comment: not a label\nJMP b\nc:\nJMP c\n")
    assert operands(program) == [1, 0, 2]


def test_cells_default_to_what_is_named() -> None:
    assert assemble("LOAD 9\nEMIT\nHALT").cells == 10
    assert assemble("HALT").cells == 1
    assert assemble(".range\nHALT").cells == 2
    assert assemble(".arguments f64 i64\nHALT").cells == 3


def test_the_line_directive_numbers_the_next_line() -> None:
    program = assemble(".line 40\nHALT\nHALT\n")
    assert [each.line for each in program.instructions] == [40, 41]


def test_comments_and_label_names_are_not_part_of_the_kid_but_lines_are() -> None:
    one = assemble("again: JMP again ; for ever\n", "one.ent")
    assert one.kid == assemble("x: JMP x\n", "two.ent").kid
    assert one.kid != assemble("\nx: JMP x\n").kid
    assert one.kid == kid_of(one.ir)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("HALT\nFROB 1\n", 2, "no instruction is called 'FROB'"),
        ("PUSH\n", 1, "takes one operand"),
        ("PUSH 1 2\n", 1, "takes one operand"),
        ("ADD 1\n", 1, "takes no operand"),
        ("PUSH 0x\n", 1, "not a number"),
        ("PUSH 9223372036854775808\n", 1, "does not fit in an i64"),
        ("\nJMP nowhere\n", 2, "no label 'nowhere'"),
        ("a: HALT\na: HALT\n", 2, "stands twice"),
        ("LOAD 1024\n", 1, "from 0 to 1023"),
        ("LOADI xs\n", 1, "no array is called"),
        ("CALL f\n", 1, "no function is called"),
        (".array xs i32 5\n", 1, "not a type"),
        (".array xs i64 0\n", 1, "length"),
        (".cells 1025\n", 1, "from 0 to 1024"),
        (".function f ( a )\n", 1, "not a directive"),
        (".channel numbers i64\n", 1, "does not have channels"),
        (".frob\n", 1, "not a directive"),
        ("1a: HALT\n", 1, "not a name"),
        ("SLEEP -1\n", 1, "not from 0 to"),
    ],
)
def test_a_mistake_is_refused_with_its_line(text: str, line: int, words: str) -> None:
    with pytest.raises(InvalidProgram) as caught:
        assemble(text, "bad.ent")
    assert words in caught.value.message
    assert caught.value.line == line


def test_limits_are_limits() -> None:
    with pytest.raises(InvalidProgram, match="65536 instructions"):
        assemble("HALT\n" * 65_537)
    with pytest.raises(InvalidProgram, match="64 MiB"):
        assemble(".array a i64 8388608\n.array b i64 1\nHALT\n")
    with pytest.raises(InvalidProgram, match="no instructions"):
        assemble("; nothing\n")


def test_instructions_of_later_releases_have_their_places() -> None:
    text = "SEND c\nRECV d\nSEND d\nRECV c\n"
    program = assemble(text + "ARRAY_LOAD shared\nARRAY_STORE shared\nHALT\n")
    assert assemble(disassemble(program)) == program
    assert program.names == ("c", "d", "shared")


def test_capabilities_are_what_the_program_asks_for() -> None:
    assert assemble("HALT").capabilities == ()
    assert assemble("PUSH 1\nEMIT\nSLEEP 1\nHALT").capabilities == ("print", "sleep")


@pytest.mark.parametrize("name", ["program.py", "program", "x.wasm", "x.txt"])
def test_other_endings_are_refused(name: str) -> None:
    with pytest.raises(InvalidProgram, match="does not know"):
        load("HALT", name)


def test_bytes_must_be_utf8() -> None:
    with pytest.raises(InvalidProgram, match="UTF-8"):
        load(b"\xff\xfe", "x.ent")


# -- the encoding ------------------------------------------------------------------------------

GOOD = assemble(
    ".array xs f64 4\n.function f ( a -- b )\nPUSH 1.5\nPUSH 2\nSTOREI xs\nPUSH 1\nCALL f\n"
    "EMIT\nSLEEP 0.5\nRECV g\nHALT\nf: PUSH nan\nPOP\nRET\n"
)


def test_decode_is_the_inverse_of_encoding() -> None:
    assert decode(GOOD.ir) == GOOD
    assert disassemble(decode(GOOD.ir)) == disassemble(GOOD)


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=80))
def test_any_bytes_are_a_program_or_refused(noise: bytes) -> None:
    for data in (noise, GOOD.ir + noise, noise + GOOD.ir):
        try:
            assert decode(data).ir == data
        except InvalidProgram:
            continue


@settings(max_examples=800, deadline=None)
@given(st.integers(0, len(GOOD.ir) - 1), st.integers(0, 255), st.integers(0, 3))
def test_a_changed_program_is_canonical_or_refused(at: int, byte: int, cut: int) -> None:
    data = GOOD.ir[:at] + bytes([byte]) + GOOD.ir[at + 1 + cut :]
    try:
        program = decode(data)
    except InvalidProgram:
        return
    assert program.ir == data
    assert assemble(disassemble(program)) == program


@pytest.mark.parametrize(
    ("field", "value"),
    [(0, 2), (1, "both"), (3, 1000), (4, 5000), (9, b"\xfe"), (10, ["x"]), (11, [1])],
)
def test_each_part_is_checked(field: int, value: object) -> None:
    parts = msgspec.msgpack.decode(GOOD.ir)
    parts[field] = value
    with pytest.raises(InvalidProgram):
        decode(msgspec.msgpack.encode(parts))


def test_every_opcode_is_known_by_its_number() -> None:
    assert all(BY_OPCODE[spec.opcode] is spec for spec in TABLE)


# -- the seed's dialect ------------------------------------------------------------------------


def test_json_constants_are_f64_and_names_are_read_in_any_case() -> None:
    program = load('[["push", 1], ["Print"]]', "x.json")
    assert program.dialect == "json"
    assert [(e.spec.name, e.operand) for e in program.instructions] == [
        ("PUSH", 1.0),
        ("PRINT", None),
        ("HALT", None),
    ]


def test_json_instructions_know_their_lines() -> None:
    program = load('[\n  ["PUSH", 1],\n\n  ["PRINT"], ["HALT"]\n]', "x.json")
    assert [each.line for each in program.instructions] == [2, 4, 4, 4]


def test_json_jumps_beyond_the_end_end_the_program() -> None:
    assert load('[["JMP", 99]]', "x.json").instructions[0].operand == 1


def test_a_json_object_says_that_it_is_a_range_program() -> None:
    assert load('{"kind": "range", "program": [["HALT"]]}', "x.json").kind == "range"


def test_json_disassembles_to_text_that_assembles_to_it() -> None:
    text = '[["PUSH", 1.5], ["frob nicate"], ["JMP", 0], ["LOAD_GLOBAL", "a-b"], ["JMP", 5]]'
    program = load(text, "x.json")
    assert assemble(disassemble(program)) == program


@pytest.mark.parametrize(
    "text",
    [
        *("", "[", "[]", "3", "{}", '[["PUSH"]]', '[["PUSH", "x"]]', '[["PUSH", 1, 2]]', "[[]]"),
        *('[["LOAD", 1024]]', '[["LOAD", 0.5]]', '[["JMP", -1]]', "[[1]]", '[["PUSH", null]]'),
        *('{"kind": "x", "program": [["HALT"]]}', '[["SLEEP", -1]]', '[["JMP", NaN]]', "[" * 9999),
        *('[["PUSH", 1' + "0" * 400 + "]]",),
    ],
)
def test_bad_json_is_refused(text: str) -> None:
    with pytest.raises(InvalidProgram):
        load(text, "x.json")
