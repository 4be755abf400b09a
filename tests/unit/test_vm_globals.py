"""Globals: what the verifier wants of them, what travels, and what a run does with a provider.

Everything is observed in both back ends: results, gas, faults, and each call of the provider with
its number. The provider is a dict that somebody else writes to as well, so that proposals fail.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold.vm.errors import InvalidProgram, ManifoldError, Trap
from manifold.vm.interpret import run as interpret
from manifold.vm.runtime import REDUCTIONS, Machine, Stopped, finish
from manifold.vm.syntax import Program, assemble, decode, disassemble, load
from manifold.vm.syntax.program import GLOBALS_MAX
from manifold.vm.valid import verify

Value = int | float

COUNTER = """
.global counter i64
again:  LOAD 1
        PUSH 1
        ADD
        STORE 1
        LOAD_GLOBAL counter
        DUP
        PUSH 1
        ADD
        PROPOSE_GLOBAL counter
        SWAP
        POP
        JZ again
        LOAD 1
        EMIT
        HALT
"""


def bits(value: Value) -> Value | bytes:
    """Tells zeros and NaNs apart."""
    return struct.pack("<d", value) if isinstance(value, float) else value


class Registers:
    """A provider: a dict, who called what, and somebody else who writes now and then."""

    def __init__(self, others: Random | None = None, **held: Value) -> None:
        self.held: dict[str, Value] = dict(held)
        self.calls: list[tuple[Any, ...]] = []
        self.others = others
        self.refuses_after = 1 << 40

    def called(self, op: str, index: int, k: int, name: str, zero: Value, *values: Value) -> Value:
        self.calls.append((op, index, k, name, type(zero).__name__, *map(bits, values)))
        if len(self.calls) > self.refuses_after:
            raise ManifoldError("The voters are away.", "Wait for them.")
        if self.others is not None and self.others.random() < 0.4:
            self.held[name] = self.others.choice([3, -1, 7]) + zero
        return self.held.get(name, zero)

    def load(self, index: int, name: str, type: str) -> Value:
        return self.called("load", index, -1, name, 0.0 if type == "f64" else 0)

    def store(self, index: int, k: int, name: str, value: Value) -> None:
        self.called("store", index, k, name, value * 0, value)
        self.held[name] = value

    def propose(
        self, index: int, k: int, name: str, expected: Value, new: Value
    ) -> tuple[Value, bool]:
        zero: Value = 0.0 if isinstance(new, float) else 0
        found = self.called("propose", index, k, name, zero, expected, new)
        if found != expected:
            return found, False
        self.held[name] = new
        return found, True

    def add(self, index: int, k: int, name: str, value: Value) -> Value:
        before = self.called("add", index, k, name, 0.0 if isinstance(value, float) else 0, value)
        total = before + value
        whole = (total + (1 << 63)) % (1 << 64) - (1 << 63) if isinstance(total, int) else total
        self.held[name] = whole
        return before


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    made = Machine(1 << 24)
    yield made
    made.close()


def observe(run: Any, registers: Registers, lo: int, hi: int, budget: int) -> tuple[Any, ...]:
    yields: list[int] = []

    def on_yield(used: int) -> int:
        yields.append(used)
        return 4000 if used < budget else 0

    try:
        done = run(
            lo, hi, gas=2500, on_yield=on_yield, on_sleep=lambda _: None, on_global=registers
        )
        what: tuple[Any, ...] = (msgspec.msgpack.encode(done.partial), done.gas_used)
    except Stopped as stopped:
        what = ("stopped", stopped.gas_used, stopped.index)
    except Trap as trap:
        what = (trap.message, trap.next_step, trap.code, trap.line, trap.instruction, trap.index)
        what += (repr(trap.cells), repr(trap.results), repr(trap.__cause__))
    held = {name: bits(value) for name, value in registers.held.items()}
    return (*what, yields, registers.calls, held)


def both(
    machine: Machine, program: Program, make: Any, lo: int = 3, hi: int = 7, budget: int = 200_000
) -> tuple[Any, ...]:
    """What both back ends do, which must be the same."""
    verified, unit = verify(program), machine.load(program, "collect")
    compiled = observe(unit.run, make(), lo, hi, budget)
    interpreted = observe(lambda *a, **o: interpret(verified, "collect", *a, **o), make(), lo, hi,
                          budget)  # fmt: skip
    assert compiled == interpreted, disassemble(program)
    return compiled


def refusal(text: str, filename: str = "bad.ent") -> InvalidProgram:
    with pytest.raises(InvalidProgram) as caught:
        verify(load(text, filename))
    return caught.value


# -- what is declared ----------------------------------------------------------------------------


def test_a_program_says_which_globals_it_has_and_which_of_them_it_may_write() -> None:
    text = ".global a i64\n.global b/c.d-e f64\n.global z i64\n.global only.read i64\n"
    text += "LOAD_GLOBAL only.read\nSTORE_GLOBAL z\nPUSH 1.0\nADD_GLOBAL b/c.d-e\nPOP\n"
    program = assemble(text + "PUSH 1\nDUP\nPROPOSE_GLOBAL a\nPOP\nPOP\nHALT")
    for each in (program, decode(program.ir), assemble(disassemble(program))):
        assert each == program
        assert each.globals == (
            ("a", "i64"), ("b/c.d-e", "f64"), ("z", "i64"), ("only.read", "i64"),
        )  # fmt: skip
        assert each.written == ("a", "b/c.d-e", "z")
        assert "globals" in each.capabilities
    assert assemble("HALT").globals == assemble("HALT").written == ()


def test_a_program_without_globals_has_the_kid_it_had_before_there_were_any() -> None:
    assert assemble("LOAD 0\nEMIT\nHALT").kid == "K-bd0cc527f418845a0ab6be9b6349bb35"


def test_a_global_is_found_by_the_name_that_people_write() -> None:
    program = assemble(".global /globals/x i64\nLOAD_GLOBAL x\nLOAD_GLOBAL /globals/x\nHALT")
    assert program.globals == (("x", "i64"),)
    assert load('[["LOAD_GLOBAL", "/globals/x"]]', "x.json").globals == (("x", "f64"),)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("LOAD_GLOBAL x\nHALT", 1, "no global is called 'x'"),
        (".global x i64\nLOAD_GLOBAL\nHALT", 2, "takes one operand, a global"),
        (".global x\nHALT", 1, "not a directive"),
        (".global x i32\nHALT", 1, "not a type"),
        (".global x i64\n.global /globals/x i64\nHALT", 2, "stands twice"),
        (".global a//b i64\nHALT", 1, "not a name for a global"),
        (".global /a i64\nHALT", 1, "not a name for a global"),
        (".global a: i64\nHALT", 1, "not a name for a global"),
        (f".global {'a' * 129} i64\nHALT", 1, "not a name for a global"),
        (".dialect json\n.global x i64\nHALT", 2, "JSON dialect is an f64"),
        (".global x f64\n.dialect json\nHALT\n.global y i64", 4, "JSON dialect is an f64"),
        (".global x i64\nSTORE_GLOBAL x\nHALT", 2, "takes 1 values, but the stack is ( )"),
        (".global x i64\nPUSH 1\nPROPOSE_GLOBAL x\nHALT", 3, "takes 2 values"),
        (".global x i64\nPUSH 1.0\nSTORE_GLOBAL x\nHALT", 3, "needs an i64"),
        (".global x i64\nPUSH 1.0\nADD_GLOBAL x\nHALT", 3, "needs an i64"),
        (".global x i64\nPUSH 1\nPUSH 1.0\nPROPOSE_GLOBAL x\nHALT", 4, "needs an i64"),
        (".global x i64\nPUSH 1.0\nPUSH 1\nPROPOSE_GLOBAL x\nHALT", 4, "needs an i64"),
        (".global x f64\nLOAD_GLOBAL x\nNOT\nHALT", 3, "needs an i64"),
        (".global x f64\nPUSH 1\nADD_GLOBAL x\nNOT\nHALT", 4, "needs an i64"),
        (".dialect json\n.global x f64\nPUSH 1\nADD_GLOBAL x\nHALT", 4, "has no ADD_GLOBAL"),
    ],
)
def test_a_mistake_with_globals_is_refused_with_its_line(text: str, line: int, words: str) -> None:
    error = refusal(text)
    assert words in error.message
    assert error.line == line


@pytest.mark.parametrize("name", ["1", '""', '"a b"', '"a/"', "null", '"é"', f'"{"a" * 129}"'])
def test_a_name_that_is_none_is_refused_in_json(name: str) -> None:
    assert "not a global's name" in refusal(f'[["LOAD_GLOBAL", {name}]]', "x.json").message


def test_the_number_of_globals_is_bounded() -> None:
    most = "".join(f".global g{n} i64\n" for n in range(GLOBALS_MAX))
    assert len(assemble(most + "HALT").globals) == GLOBALS_MAX
    assert "more than 64" in refusal(most + ".global x i64\nHALT").message
    listed = ", ".join(f'["LOAD_GLOBAL", "g{n}"]' for n in range(GLOBALS_MAX + 1))
    assert "more than 64" in refusal(f"[{listed}]", "x.json").message


def test_an_i64_becomes_an_f64_where_the_global_is_one(machine: Machine) -> None:
    text = ".global x f64\nPUSH 3\nSTORE_GLOBAL x\nPUSH 3\nPUSH 4\nPROPOSE_GLOBAL x\nEMIT\nEMIT\n"
    seen = both(machine, assemble(text + "HALT"), Registers, 0, 1)
    assert seen[-1] == {"x": bits(4.0)}


# -- what travels --------------------------------------------------------------------------------

GOOD = assemble(COUNTER + ".global rate f64\n")


def encoded(**changes: Any) -> bytes:
    names = "version kind dialect entry cells arguments arrays functions names code operands lines"
    parts = dict(zip([*names.split(), "globals"], msgspec.msgpack.decode(GOOD.ir), strict=True))
    return msgspec.msgpack.encode(list((parts | changes).values()))


def test_what_is_encoded_is_what_was_declared() -> None:
    assert encoded() == encoded(operands=[1, 1, 1, 0, 1, 0, 0, 1]) == GOOD.ir
    assert decode(encoded(globals=[["other", "i64"]])).globals == (("other", "i64"),)


@pytest.mark.parametrize(
    "changes",
    [
        {"globals": []},  # then it is the encoding without globals
        {"globals": None},
        {"globals": [["counter"]]},
        {"globals": [["counter", "i32"]]},
        {"globals": [["counter", "i64", 1]]},
        {"globals": [["counter", "i64"], ["counter", "f64"]]},
        {"globals": [["", "i64"]]},
        {"globals": [["a/", "i64"]]},
        {"globals": [["a\n", "i64"]]},
        {"globals": [["/globals/a", "i64"]]},
        {"globals": [["a" * 129, "i64"]]},
        {"globals": [[f"g{n}", "i64"] for n in range(GLOBALS_MAX + 1)]},
        {"version": 1},
        {"version": 3},
        {"dialect": "json", "operands": [1, 1.0, 1, 0, 1.0, 0, 0, 1]},
        *({"operands": [1, 1, 1, number, 1, 0, 0, 1]} for number in (2, -1, 0.0, None)),
    ],
)
def test_any_other_encoding_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidProgram):
        decode(encoded(**changes))


def test_a_program_without_a_table_of_globals_can_name_none() -> None:
    parts = msgspec.msgpack.decode(GOOD.ir)
    with pytest.raises(InvalidProgram, match="there are only 0"):
        decode(msgspec.msgpack.encode([1, *parts[1:12]]))


@settings(max_examples=600, deadline=None)
@given(st.integers(0, len(GOOD.ir) - 1), st.integers(0, 255), st.integers(0, 3))
def test_changed_bytes_are_a_program_or_refused(at: int, byte: int, cut: int) -> None:
    data = GOOD.ir[:at] + bytes([byte]) + GOOD.ir[at + 1 + cut :]
    try:
        program = decode(data)
        verify(program)
    except InvalidProgram:
        return
    assert program.ir == data
    assert assemble(disassemble(program)) == program


# -- what runs -----------------------------------------------------------------------------------


def test_a_counter_is_raised_once_by_each_index_however_often_its_proposals_fail(
    machine: Machine,
) -> None:
    registers = Registers(counter=41)
    unit = machine.load(assemble(COUNTER), "sum")
    done = unit.run(
        0, 10, gas=1 << 40, on_yield=lambda _: 0, on_sleep=print, on_global=registers
    )  # fmt: skip
    assert (registers.held, finish("sum", done.partial, 0, 10)) == ({"counter": 51}, 10)
    tries = both(machine, assemble(COUNTER), lambda: Registers(Random(5)), 0, 40)
    assert len([call for call in tries[-2] if call[0] == "propose"]) > 50


def test_k_counts_the_writes_that_took_place_of_one_index_across_all_globals(
    machine: Machine,
) -> None:
    text = """
        .global a i64
        .global b f64
        .function write ( -- )
        LOAD_GLOBAL a\nPOP
        PUSH 9\nPUSH 9\nPROPOSE_GLOBAL a\nPOP\nPOP
        CALL write
        PUSH 1.5\nADD_GLOBAL b\nPOP
        LOAD_GLOBAL a\nPUSH 5\nPROPOSE_GLOBAL a\nPOP\nPOP
        PUSH 2\nADD_GLOBAL a\nEMIT
        HALT
        write: PUSH 4\nSTORE_GLOBAL a\nRET"""
    seen = both(machine, assemble(text), Registers, 8, 10)
    for index in (8, 9):
        calls = [call[:4] for call in seen[-2] if call[1] == index]
        assert calls == [
            ("load", index, -1, "a"), ("propose", index, 0, "a"), ("store", index, 0, "a"),
            ("add", index, 1, "b"), ("load", index, -1, "a"), ("propose", index, 2, "a"),
            ("add", index, 3, "a"),
        ]  # fmt: skip


def test_k_starts_again_when_an_index_is_run_again(machine: Machine) -> None:
    unit = machine.load(assemble(".global a i64\nPUSH 1\nADD_GLOBAL a\nPOP\nHALT"), "count")
    registers = Registers()
    for _ in range(2):
        unit.run(5, 6, gas=1 << 40, on_yield=lambda _: 0, on_sleep=print, on_global=registers)
    assert [call[2] for call in registers.calls] == [0, 0]


def test_the_index_of_a_range_program_is_its_start(machine: Machine) -> None:
    text = ".range\n.global a i64\nagain: LOAD 0\nADD_GLOBAL a\nPOP\nLOOP again\nHALT"
    seen = both(machine, assemble(text), Registers, 20, 23)
    assert [call[:3] for call in seen[-2]] == [("add", 20, 0), ("add", 20, 1), ("add", 20, 2)]
    assert seen[-1] == {"a": 63}


EDGES: list[Value] = [0, 1, -1, (1 << 53) + 1, (1 << 63) - 1, -(1 << 63)]
EDGES += [0.0, -0.0, 1.5, 5e-324, 1e308, math.inf, -math.inf, math.nan, 2.0**53 + 2]


@pytest.mark.parametrize("value", EDGES)
@pytest.mark.parametrize("shared", [False, True])  # variables of the compiled program
def test_every_value_travels_both_ways_bit_by_bit(
    machine: Machine, value: Value, shared: bool
) -> None:
    kind = "f64" if isinstance(value, float) else "i64"
    text = f".global a {kind}\n.global b {kind}\n.function none ( -- )\n"
    text += "CALL none\n" if shared else ""
    text += f"LOAD_GLOBAL a\nDUP\nEMIT\nSTORE_GLOBAL b\nPUSH {value!r}\nSTORE_GLOBAL a\n"
    text += "LOAD_GLOBAL a\nLOAD_GLOBAL b\nPROPOSE_GLOBAL b\nPOP\nEMIT\nHALT\nnone: RET"
    seen = both(machine, assemble(text), lambda: Registers(a=value), 0, 1)
    assert seen[-1] == {"a": bits(value), "b": bits(value)}


def test_a_nan_is_given_on_in_its_one_spelling(machine: Machine) -> None:
    odd = struct.unpack("<d", b"\1\0\0\0\0\0\xf0\xff")[0]
    text = ".global a f64\n.global b f64\nLOAD_GLOBAL a\nNEG\nSTORE_GLOBAL b\nHALT"
    seen = both(machine, assemble(text), lambda: Registers(a=odd), 0, 1)
    assert seen[-1]["b"] == bits(math.nan)


@pytest.mark.parametrize(
    ("kind", "held", "words"),
    [
        ("i64", 1.0, "holds an f64, but the program declares it i64"),
        ("f64", 1, "holds an i64, but the program declares it f64"),
        ("i64", "text", "holds something else"),
        ("f64", None, "holds something else"),
        ("i64", True, "holds something else"),
        ("i64", 1 << 63, "holds an i64"),
    ],
)
@pytest.mark.parametrize("op", ["LOAD_GLOBAL", "PUSH 2\nADD_GLOBAL", "PUSH 1\nDUP\nPROPOSE_GLOBAL"])
def test_a_register_of_another_type_is_a_trap(
    machine: Machine, kind: str, held: Any, words: str, op: str
) -> None:
    class Other(Registers):
        def load(self, *_: Any) -> Any:
            return held

        def add(self, *_: Any) -> Any:
            return held

        def propose(self, *_: Any) -> Any:
            return held, False

    seen = both(machine, assemble(f".global a {kind}\nPUSH 1\nPOP\n{op} a\nHALT"), Other)
    assert words in seen[0] and "/globals/a" in seen[1]
    assert seen[4].endswith("_GLOBAL a") and seen[3] == 4 + op.count("\n") and seen[5] == 3


@pytest.mark.parametrize("calls", range(9))
@pytest.mark.parametrize("shared", [False, True])
def test_what_the_cluster_refuses_is_a_fault_with_its_place_cells_and_code(
    machine: Machine, calls: int, shared: bool
) -> None:
    text = ".global a i64\n.function twice ( -- )\n.cells 3\nagain: PUSH 1\nADD_GLOBAL a\nEMIT\n"
    text += "LOAD 2\nPUSH 1\nADD\nSTORE 2\n" + ("CALL twice\n" if shared else "")
    text += "LOAD 2\nPUSH 3\nLT\nJNZ again\nHALT\ntwice: LOAD_GLOBAL a\nEMIT\nRET"

    def make() -> Registers:
        made = Registers()
        made.refuses_after = calls
        return made

    seen = both(machine, assemble(text, "far.ent"), make, 10, 12)
    if calls < (6, 12)[shared]:
        message, next_step, code, line, instruction, index, cells, results, cause, *_ = seen
        assert (next_step, code) == ("Wait for them.", "error")
        index_of, done = divmod(calls, 6 if shared else 3)
        text = "LOAD_GLOBAL a" if shared and done % 2 else "ADD_GLOBAL a"
        line = 17 if text[0] == "L" else 5
        assert message == f"far.ent, line {line}, {text}: The voters are away at index {index}."
        assert (seen[3], instruction, index) == (line, text, 10 + index_of)
        rounds = done // 2 + done % 2 if shared else done
        assert cells == f"({index}, 0, {rounds})"
        assert len(eval(results)) == done
        assert "voters" in cause


def test_a_provider_may_stop_the_run_or_fail_in_its_own_way(machine: Machine) -> None:
    class Ends(Registers):
        def load(self, index: int, name: str, type: str) -> Value:
            raise failure

    unit = machine.load(assemble(".global a i64\nLOAD_GLOBAL a\nEMIT\nHALT"), "sum")
    verified = unit.verified
    for run in (unit.run, lambda *a, **o: interpret(verified, "sum", *a, **o)):
        for failure in (Stopped(0, 3), KeyError("bug"), KeyboardInterrupt()):
            with pytest.raises(type(failure)) as caught:
                run(0, 1, gas=9999, on_yield=lambda _: 0, on_sleep=print, on_global=Ends())
            assert caught.value is failure


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_a_program_with_globals_is_refused_where_there_are_none(
    machine: Machine, reduce: str
) -> None:
    unit = machine.load(assemble(COUNTER, "counter.ent"), reduce)
    with pytest.raises(InvalidProgram, match=r"counter.ent, line 7, LOAD_GLOBAL.*none.*cluster"):
        unit.run(0, 1, gas=9999, on_yield=lambda _: 0, on_sleep=print)
    unused = machine.load(assemble(".global a i64\nPUSH 1\nEMIT\nHALT"), reduce)
    unused.run(0, 1, gas=9999, on_yield=lambda _: 0, on_sleep=print)
    other = machine.load(assemble("PUSH 1\nEMIT\nHALT"), reduce)
    other.run(0, 1, gas=9999, on_yield=lambda _: 0, on_sleep=print, on_global=Registers())


def test_each_access_costs_a_thousand_units_of_gas(machine: Machine) -> None:
    unit = machine.load(assemble(".global a i64\nLOAD_GLOBAL a\nPOP\nHALT"), "count")
    done = unit.run(0, 7, gas=1 << 30, on_yield=lambda _: 0, on_sleep=print, on_global=Registers())
    assert done.gas_used == 7 * 1002


# -- the seed's dialect --------------------------------------------------------------------------


def test_a_json_proposal_expects_what_its_index_last_loaded(machine: Machine) -> None:
    text = """[["LOAD_GLOBAL", "x"], ["PUSH", 1], ["ADD"], ["PROPOSE_GLOBAL", "x"], ["PRINT"],
        ["PUSH", 9], ["PROPOSE_GLOBAL", "x"], ["PRINT"],
        ["LOAD_GLOBAL", "x"], ["POP"], ["PUSH", 9], ["PROPOSE_GLOBAL", "x"], ["PRINT"]]"""
    seen = both(machine, load(text, "x.json"), lambda: Registers(x=4.0), 0, 1)
    assert [call[5:] for call in seen[-2] if call[0] == "propose"] == [
        (bits(4.0), bits(5.0)), (bits(4.0), bits(9.0)), (bits(5.0), bits(9.0)),
    ]  # fmt: skip
    registers = Registers(x=4.0)
    unit = machine.load(load(text, "x.json"), "collect")
    done = unit.run(0, 1, gas=1 << 30, on_yield=lambda _: 0, on_sleep=print, on_global=registers)
    assert finish("collect", done.partial, 0, 1) == [[1, 0, 1]]


def test_a_json_index_that_loaded_nothing_expects_zero_whatever_ran_before(
    machine: Machine,
) -> None:
    text = '[["PUSH", 1], ["PROPOSE_GLOBAL", "x"], ["PRINT"], ["LOAD_GLOBAL", "x"], ["PRINT"]]'
    seen = both(machine, load(text, "x.json"), Registers, 0, 3)
    assert [call[5] for call in seen[-2] if call[0] == "propose"] == [bits(0.0)] * 3
    assert seen[-1] == {"x": bits(1.0)}


def test_a_json_program_whose_stack_is_dynamic_has_globals_too(machine: Machine) -> None:
    text = '[["LOAD_GLOBAL", "x"], ["JZ", 3], ["PUSH", 1], ["PUSH", 2], ["STORE_GLOBAL", "x"]]'
    unit = machine.load(load(text, "x.json"), "count")
    assert unit.note
    registers = Registers()
    unit.run(0, 2, gas=1 << 30, on_yield=lambda _: 0, on_sleep=print, on_global=registers)
    assert registers.held == {"x": 2.0}


# -- generated programs --------------------------------------------------------------------------


def generated(random: Random, json: bool) -> Program:
    """Accesses at random in a loop of three rounds, half of them in a function, all seen."""
    lines: list[tuple[str, str]] = []
    for _ in range(random.randrange(1, 9)):
        name = random.choice(["count", "level"])
        is_float = json or name == "level"
        constants: list[Value] = [0, 1, 3, -1, 7, (1 << 63) - 1]
        if is_float:
            constants = [0.0, -0.0, 3.0, 2.5, math.inf, math.nan]
        one, other = (("PUSH", repr(random.choice(constants))) for _ in range(2))
        show = ("PRINT", "") if json else ("EMIT", "")
        lines += {
            "load": [("LOAD_GLOBAL", name), show],
            "store": [one, ("STORE_GLOBAL", name)],
            "propose": [("LOAD_GLOBAL", name), ("POP", ""), one, ("PROPOSE_GLOBAL", name), show]
            if json
            else [one, other, ("PROPOSE_GLOBAL", name), show, show],
            "retry": [("LOAD_GLOBAL", name), one, ("ADD", ""), ("PROPOSE_GLOBAL", name), show]
            if json
            else [("LOAD_GLOBAL", name), ("DUP", ""), one, ("ADD", ""), ("PROPOSE_GLOBAL", name),
                  show, show],
            "add": [("LOAD_GLOBAL", name), show]
            if json
            else [one, ("ADD_GLOBAL", name), ("FLOAT", ""), show],
        }[random.choice(["load", "store", "propose", "retry", "add"])]  # fmt: skip
    text = "\n".join(" ".join(line) for line in lines)
    if json:
        return assemble(f".dialect json\n.global count f64\n.global level f64\n{text}\nHALT")
    head = ".global count i64\n.global level f64\n.function work ( -- )\n.cells 3\n"
    head += random.choice(["", ".range\n"])
    inline = random.random() < 0.5
    loop = "again: LOAD 2\nPUSH 1\nADD\nDUP\nSTORE 2\nPUSH 3\nLE\nJZ done\n"
    body = text if inline else "CALL work"
    return assemble(f"{head}{loop}{body}\nJMP again\ndone: HALT\nwork: {text}\nRET")


@settings(max_examples=250, deadline=None)
@given(
    seed=st.integers(0, 1 << 40),
    json=st.booleans(),
    refuses_after=st.integers(0, 60),
    budget=st.sampled_from([9000, 1 << 40]),
)
def test_generated_programs_do_the_same_to_the_registers_in_both_back_ends(
    machine: Machine, seed: int, json: bool, refuses_after: int, budget: int
) -> None:
    program = generated(Random(seed), json)
    assert decode(program.ir) == assemble(disassemble(program)) == program

    def make() -> Registers:
        made = Registers(Random(seed))
        made.refuses_after = refuses_after
        return made

    seen = both(machine, program, make, budget=budget)
    wanted: dict[int, int] = {}  # A1: the k of each index's next write
    for op, index, k, *_ in seen[-2]:
        if op != "load":
            assert k in (wanted.get(index, 0), wanted.get(index, 0) + 1)
            wanted[index] = k
    assert {call[3] for call in seen[-2] if call[0] != "load"} <= set(program.written)
