"""The verifier: what it refuses and how it says so; the gas plan."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest
import wasmtime
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold.vm.compile import compile_wat
from manifold.vm.errors import InvalidProgram
from manifold.vm.runtime import REDUCTIONS
from manifold.vm.syntax import assemble, load
from manifold.vm.syntax.isa import TABLE, Immediate
from manifold.vm.valid import verify


def refusal(text: str) -> InvalidProgram:
    with pytest.raises(InvalidProgram) as caught:
        verify(assemble(text, "bad.ent"))
    return caught.value


@pytest.mark.parametrize(
    ("text", "line", "instruction", "words"),
    [
        ("ADD\nHALT", 1, "ADD", "takes 2 values, but the stack is ( )"),
        ("PUSH 1\nADD\nHALT", 2, "ADD", "the stack is ( i64 )"),
        ("PUSH 1", 1, "PUSH 1", "past the last instruction"),
        ("JMP end\nend:", 1, "JMP L1", "past the last instruction"),
        ("PUSH 1\nJZ end\nend:", 2, "JZ L2", "past the last instruction"),
        ("RET", 1, "RET", "nowhere to return to"),
        (".cells 2\nLOAD 2\nEMIT\nHALT", 2, "LOAD 2", "there are 2 cells"),
        ("PUSH 1.0\nNOT\nEMIT\nHALT", 2, "NOT", "needs an i64"),
        (".array xs i64 3\nPUSH 1.5\nPUSH 0\nSTOREI xs\nHALT", 4, "STOREI xs", "needs an i64"),
        (".array xs f64 3\nPUSH 1.5\nLOADI xs\nEMIT\nHALT", 3, "LOADI xs", "needs an i64"),
        (".dialect json\nEMIT\nHALT", 2, "EMIT", "the JSON dialect has no EMIT"),
        ("UNKNOWN frob\nHALT", 1, "UNKNOWN frob", "only the JSON dialect"),
        (".function f ( -- a )\nCALL f\nHALT\nf: RET", 4, "RET", "leaves 1 values"),
        (".function f ( a -- )\nCALL f\nHALT\nf: POP\nRET", 2, "CALL L2", "takes 1 values"),
        (".function f ( -- )\nCALL f\nJMP f\nf: RET", 4, "RET", "run into each other"),
        ("a: PUSH 1\nJMP a", 1, "PUSH 1", "is ( ) coming from line 1 but ( i64 ) from line 2"),
    ],
)  # fmt: skip
def test_a_refusal_names_line_and_instruction(
    text: str, line: int, instruction: str, words: str
) -> None:
    error = refusal(text)
    assert words in error.message
    assert (error.line, error.instruction) == (line, instruction)


def test_two_depths_at_a_join_are_both_shown() -> None:
    error = refusal("LOAD 0\nJZ other\nPUSH 1\nJMP join\nother: PUSH 1\nPUSH 2.0\njoin: HALT")
    assert "( i64 ) coming from line 4 but ( i64 f64 ) from line 6" in error.message or (
        "( i64 f64 ) coming from line 6 but ( i64 ) from line 4" in error.message
    )


def test_two_types_at_a_join_are_both_named() -> None:
    error = refusal("LOAD 0\nJZ other\nPUSH 1\nJMP join\nother: PUSH 2.0\njoin: EMIT\nHALT")
    assert (
        "stack entry 1 at line 6 would be an i64 here but is an f64 elsewhere (line 5)"
        in error.message
    )


def test_a_cell_has_one_type() -> None:
    error = refusal("PUSH 1\nSTORE 1\nPUSH 1.5\nSTORE 1\nHALT")
    assert error.line == 2
    assert "cell 1 would be an i64 here but is an f64 elsewhere (line 4)" in error.message


def test_types_flow_through_cells_calls_and_joins() -> None:
    text = ".function half ( a -- b )\n.cells 4\nPUSH 3.0\nSTORE 1\nLOAD 1\nCALL half\nSTORE 2\n"
    text += "LOAD 0\nFLOAT\nSTORE 3\nLOAD 2\nEMIT\nHALT\nhalf: PUSH 2\nFDIV\nRET"
    verified = verify(assemble(text))
    assert verified.cells == "ifff"
    assert (verified.functions[0].takes, verified.functions[0].leaves) == ("f", "f")
    assert verified.emits == "f"


def test_the_index_and_declared_arguments_keep_their_types() -> None:
    assert "holds the index" in refusal("PUSH 1.5\nSTORE 0\nHALT").message
    assert "holds an argument" in refusal(".arguments i64\nPUSH 1.5\nSTORE 1\nHALT").message
    assert verify(assemble(".arguments f64\nLOAD 1\nEMIT\nHALT")).emits == "f"


def test_arguments_need_cells() -> None:
    assert "need 2" in refusal(".cells 1\n.arguments i64\nHALT").message


@pytest.mark.parametrize("spec", [s for s in TABLE if s.reserved], ids=lambda spec: spec.name)
def test_what_comes_later_is_refused_by_name(spec: object) -> None:
    assert hasattr(spec, "name")
    error = refusal(f"PUSH 1\nPUSH 1\n{spec.name} thing\nHALT")
    assert "this release does not have" in error.message


def test_sizes_are_bounded() -> None:
    assert "beyond 256" in refusal("PUSH 1\n" * 257 + "HALT").message
    assert verify(assemble("PUSH 1\n" * 256 + "HALT"))
    ladder = "".join(f"LOAD 0\nJZ n{n}\nn{n}:\n" for n in range(4097))
    assert "the limit is 4096" in refusal(ladder + "HALT").message
    wide = "PUSH 1\n" * 250 + "".join(f"LOAD 0\nJZ n{n}\nPUSH 1\nPOP\nn{n}:\n" for n in range(600))
    assert "stack entries at joins" in refusal(wide + "HALT").message


def test_unreachable_code_is_not_judged() -> None:
    assert verify(assemble("HALT\nADD\nRET\n"))
    assert verify(assemble(".function f ( a -- )\nHALT\nf: POP\nPOP\nRET\n")).functions == {}


def test_a_json_program_with_two_depths_at_a_join_is_dynamic_and_says_why() -> None:
    text = '[["LOAD", 0], ["JZ", 3], ["PUSH", 1], ["PUSH", 2], ["PRINT"]]'
    verified = verify(load(text, "x.json"))
    assert verified.main is None
    assert "coming from line 1" in verified.dynamic
    assert verify(load('[["ADD"]]', "x.json")).dynamic


# -- gas ---------------------------------------------------------------------------------------


def test_a_loop_charges_the_costliest_path_through_its_body_at_its_header() -> None:
    text = "again: LOAD 0\nJZ cheap\nPUSH 1\nPUSH 2\nDIV\nPOP\ncheap: LOAD 0\nJNZ again\nHALT"
    plan = verify(assemble(text)).main
    assert plan is not None
    # LOAD JZ, then PUSH PUSH DIV(4) POP, then LOAD JNZ; HALT lies outside the loop.
    assert plan.plan.headers == {0: 2 + 7 + 2}
    assert plan.plan.entry == 1


def test_an_inner_loop_is_charged_by_its_own_header() -> None:
    text = "outer: PUSH 1\nPOP\ninner: LOAD 0\nJNZ inner\nLOAD 0\nJNZ outer\nHALT"
    main = verify(assemble(text)).main
    assert main is not None
    assert main.plan.headers == {0: 4, 2: 2}


def test_an_irreducible_graph_charges_every_block() -> None:
    text = "LOAD 0\nJZ b\na: LOAD 0\nJZ end\nb: LOAD 0\nJNZ a\nend: HALT"
    main = verify(assemble(text)).main
    assert main is not None and main.graph.irreducible
    assert main.plan.entry == 0
    assert main.plan.headers == {0: 2, 2: 2, 4: 2, 6: 1}


def test_clearing_arrays_costs_gas_only_if_they_are_written() -> None:
    from manifold.vm.valid.gas import clearing

    assert clearing(assemble(".array xs i64 800\nHALT")) == 0
    assert clearing(assemble(".array xs i64 800\nPUSH 1\nPUSH 2\nSTOREI xs\nHALT")) == 100


# -- soundness ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine() -> Iterator[wasmtime.Engine]:
    engine = wasmtime.Engine()
    yield engine
    engine.close()


def random_text(random: Random) -> str:
    """Instructions at random: most such programs are refused, some are not."""
    length = random.randrange(1, 14)
    lines = [".array xs f64 4", ".array ys i64 4", ".function f ( a -- b )", ".cells 4"]
    lines += [".global whole i64", ".global real f64"]
    names = [spec for spec in TABLE if not spec.reserved and spec.name != "UNKNOWN"]
    for at in range(length):
        spec = random.choice(names)
        operand = {
            Immediate.NUMBER: random.choice(["0", "2", "-1", "1.5", "nan"]),
            Immediate.CELL: str(random.randrange(4)),
            Immediate.LABEL: f"n{random.randrange(length)}",
            Immediate.FUNCTION: "f",
            Immediate.ARRAY: random.choice(["xs", "ys"]),
            Immediate.SECONDS: "0.5",
            Immediate.GLOBAL: random.choice(["whole", "real"]),
        }.get(spec.immediate, "")
        lines.append(f"n{at}: {spec.name} {operand}")
    return "\n".join([*lines, "HALT", "f: DUP", "JZ zero", "RET", "zero: RET"])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 40))
def test_what_verifies_compiles_and_validates(engine: wasmtime.Engine, seed: int) -> None:
    random = Random(seed)
    for _ in range(40):
        text = random_text(random)
        try:
            verified = verify(assemble(text))
        except InvalidProgram:
            continue
        for reduce in REDUCTIONS:
            binary = wasmtime.wat2wasm(compile_wat(verified, reduce))
            wasmtime.Module.validate(engine, binary)
