"""The runtime: reductions, limits, faults, the cache, the JSON dialect as it runs, the examples."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold.vm.errors import Exhausted, InvalidProgram, ManifoldError, Trap
from manifold.vm.runtime import (
    Machine,
    Partial,
    Stopped,
    calibrate,
    finish,
    machine,
    merge,
    outcome,
)
from manifold.vm.runtime.results import from_entries
from manifold.vm.syntax import Program, assemble, load

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PLENTY = 1 << 50


@pytest.fixture(scope="module")
def box() -> Iterator[Machine]:
    made = Machine(1 << 24)
    yield made
    made.close()


def never(used: int) -> int:
    raise AssertionError("there was plenty of gas")


def run(
    box: Machine, program: Program | str, reduce: str, lo: int, hi: int, *arguments: Any
) -> Any:
    program = assemble(program) if isinstance(program, str) else program
    unit = box.load(program, reduce)
    sleeps: list[float] = []
    done = unit.run(lo, hi, gas=PLENTY, on_yield=never, on_sleep=sleeps.append, arguments=arguments)
    return finish(reduce, done.partial, lo, hi)


def seed(box: Machine, text: str, reduce: str = "collect", lo: int = 3, hi: int = 6) -> Any:
    return run(box, load(text, "seed.json"), reduce, lo, hi)


# -- reductions --------------------------------------------------------------------------------


def test_a_sum_of_integers_is_exact_however_large(box: Machine) -> None:
    assert run(box, "PUSH 0x7FFFFFFFFFFFFFFF\nEMIT\nHALT", "sum", 0, 1000) == (2**63 - 1) * 1000
    assert run(box, f"PUSH {-(2**63)}\nEMIT\nHALT", "sum", 0, 1000) == -(2**63) * 1000


def test_a_sum_of_floats_is_added_one_by_one_in_order(box: Machine) -> None:
    expected = 0.0
    for index in range(1, 1000):
        expected += 1.0 / index
    assert run(box, "PUSH 1\nLOAD 0\nFDIV\nEMIT\nHALT", "sum", 1, 1000) == expected


def test_mixed_minimum_compares_exactly_and_prefers_the_integer_when_equal() -> None:
    big = 2**53 + 1
    parts = from_entries("min", [[big], [2.0**53]], json=False, flat=False)
    assert finish("min", parts, 0, 2) == 2.0**53
    equal = finish("max", from_entries("max", [[1.0, 1]], json=False, flat=False), 0, 1)
    assert equal == 1 and isinstance(equal, int)


def test_a_nan_anywhere_makes_the_minimum_nan() -> None:
    for values in ([math.nan, 1.0], [1.0, math.nan], [1, math.nan]):
        result = finish("min", from_entries("min", [values], json=False, flat=False), 0, 1)
        assert isinstance(result, float) and math.isnan(result)


def test_negative_zero_is_less_than_zero() -> None:
    for values in ([0.0, -0.0], [-0.0, 0.0]):
        low = finish("min", from_entries("min", [values], json=False, flat=False), 0, 1)
        high = finish("max", from_entries("max", [values], json=False, flat=False), 0, 1)
        assert math.copysign(1, float(str(low))) == -1 and math.copysign(1, float(str(high))) == 1


def test_reductions_of_nothing() -> None:
    for reduce, value in (("sum", 0), ("count", 0), ("min", None), ("max", None), ("collect", [])):
        assert finish(reduce, merge(reduce, []), 5, 5) == value


def test_collect_has_one_entry_an_index(box: Machine) -> None:
    text = "LOAD 0\nSTORE 1\nagain: LOAD 1\nJZ end\nLOAD 0\nEMIT\nLOAD 1\nPUSH 1\nSUB\nSTORE 1\n"
    assert run(box, text + "JMP again\nend: HALT", "collect", 0, 4) == [None, 1, [2, 2], [3, 3, 3]]


def test_collect_of_both_types_keeps_them(box: Machine) -> None:
    found = run(box, "LOAD 0\nEMIT\nLOAD 0\nFLOAT\nEMIT\nHALT", "collect", 1, 3)
    assert repr(found) == "[[1, 1.0], [2, 2.0]]"


def test_collecting_more_than_the_buffer_holds_loses_nothing(box: Machine) -> None:
    assert run(box, "LOAD 0\nEMIT\nHALT", "collect", 5, 200_005) == list(range(5, 200_005))
    text = "LOAD 0\nPUSH 3\nMOD\nJZ end\nLOAD 0\nEMIT\nend: HALT"
    expected = [n if n % 3 else None for n in range(150_000)]
    assert run(box, text, "collect", 0, 150_000) == expected


def test_a_range_program_collects_its_values_flat(box: Machine) -> None:
    text = ".range\nagain: LOAD 0\nEMIT\nLOOP again\nHALT"
    assert run(box, text, "collect", 4, 8) == [4, 5, 6, 7]
    assert run(box, ".range\nGET_START\nEMIT\nLOAD 1\nEMIT\nHALT", "collect", 4, 8) == [4, 8]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.integers(-(1 << 63), (1 << 63) - 1) | st.floats(), max_size=3), max_size=12
    ),
    st.integers(0, 12),
    st.sampled_from(["min", "max", "count", "collect"]),
)
def test_merging_two_parts_is_reducing_the_whole(
    entries: list[list[int | float]], at: int, reduce: str
) -> None:
    def part(some: list[list[int | float]]) -> Partial:
        return from_entries(reduce, some, json=False, flat=False)

    at = min(at, len(entries))
    whole = finish(reduce, part(entries), 0, len(entries))
    merged = merge(reduce, [part(entries[:at]), part(entries[at:])])
    assert repr(finish(reduce, merged, 0, len(entries))) == repr(whole)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-(1 << 63), (1 << 63) - 1), max_size=20), st.integers(0, 20))
def test_a_partial_survives_the_network(values: list[int], at: int) -> None:
    parts = [
        from_entries("sum", [values[:at]], json=False, flat=False),
        from_entries("sum", [values[at:]], json=False, flat=False),
    ]
    sent = msgspec.msgpack.encode(merge("sum", parts))
    assert finish("sum", msgspec.msgpack.decode(sent, type=Partial), 0, 2) == sum(values)


def test_a_partial_that_does_not_cover_its_range_is_refused() -> None:
    part = from_entries("collect", [[1], [2]], json=False, flat=False)
    with pytest.raises(ManifoldError, match="does not cover"):
        finish("collect", part, 0, 3)


# -- gas, faults, limits -----------------------------------------------------------------------


def test_gas_runs_out_asks_and_goes_on(box: Machine) -> None:
    asked: list[int] = []

    def more(used: int) -> int:
        asked.append(used)
        return 1000

    unit = box.load(load((EXAMPLES / "collatz.ent").read_text(), "collatz.ent"), "sum")
    done = unit.run(1, 1000, gas=0, on_yield=more, on_sleep=print)
    assert finish("sum", done.partial, 1, 1000) == 59431
    assert asked == sorted(asked) and len(asked) == -(-done.gas_used // 1000)


def test_no_more_gas_stops_the_run_and_says_where(box: Machine) -> None:
    unit = box.load(load((EXAMPLES / "forever.ent").read_text(), "forever.ent"), "count")
    with pytest.raises(Stopped) as caught:
        unit.run(7, 9, gas=10_000, on_yield=lambda used: 0, on_sleep=print)
    assert caught.value.index == 7 and caught.value.gas_used > 10_000
    with pytest.raises(Stopped):
        unit.run(7, 9, gas=10, on_yield=lambda used: 0, on_sleep=print)


def test_a_division_by_zero_names_line_instruction_cells_and_index(box: Machine) -> None:
    text = ".cells 3\nPUSH 42\nSTORE 2\nLOAD 2\nEMIT\nPUSH 1\nLOAD 0\nPUSH 5\nSUB\nDIV\nPOP\nHALT"
    with pytest.raises(Trap, match=r"program.ent, line 10, DIV: division by zero at index 5") as it:
        run(box, text, "collect", 3, 9)
    assert (it.value.line, it.value.instruction, it.value.index) == (10, "DIV", 5)
    assert it.value.cells == (5, 0, 42)
    assert it.value.results == (42,)


@pytest.mark.parametrize("index", [-1, 4, 1 << 62])
def test_arrays_are_checked(box: Machine, index: int) -> None:
    text = f".array xs i64 4\nPUSH 3\nEMIT\nPUSH {index}\nLOADI xs\nEMIT\nHALT"
    with pytest.raises(Trap, match="LOADI xs: array index out of range"):
        run(box, text, "collect", 0, 1)


def test_arrays_and_cells_start_at_zero_at_every_index(box: Machine) -> None:
    text = ".array xs i64 4\nPUSH 0\nLOADI xs\nLOAD 1\nADD\nEMIT\nPUSH 9\nPUSH 0\nSTOREI xs\n"
    assert run(box, text + "PUSH 9\nSTORE 1\nHALT", "sum", 0, 5) == 0


def test_arguments_stand_in_the_cells_after_the_index(box: Machine) -> None:
    text = ".arguments i64 f64\nLOAD 1\nEMIT\nLOAD 2\nEMIT\nHALT"
    assert run(box, text, "collect", 0, 2, 7, 2) == [[7, 2.0], [7, 2.0]]
    for wrong in ((), (1,), (1, 2, 3), (1.5, 2.0), (1 << 63, 1.0)):
        with pytest.raises(InvalidProgram):
            run(box, text, "collect", 0, 2, *wrong)
    assert run(box, ".cells 2\nLOAD 1\nEMIT\nHALT", "sum", 0, 2, 21) == 42
    assert run(box, ".cells 2\nLOAD 1\nEMIT\nHALT", "sum", 0, 2) == 0


def test_sleep_asks_the_host(box: Machine) -> None:
    naps: list[float] = []
    unit = box.load(assemble("SLEEP 1.5\nHALT"), "count")
    unit.run(0, 3, gas=PLENTY, on_yield=never, on_sleep=naps.append)
    assert naps == [1.5] * 3


def test_a_sleep_that_is_interrupted_ends_the_run_at_once(box: Machine) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    unit = box.load(assemble("again: SLEEP 1.5\nJMP again"), "count")
    with pytest.raises(KeyboardInterrupt):
        unit.run(0, 3, gas=PLENTY, on_yield=never, on_sleep=interrupt)


def test_output_is_bounded(box: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "OUTPUT_BYTES_MAX", 1 << 20)
    with pytest.raises(Exhausted, match="1048576 bytes"):
        run(box, "again: LOAD 0\nEMIT\nJMP again", "collect", 0, 1)
    assert outcome.OUTPUT_BYTES_MAX == 64 << 20


def test_memory_is_bounded() -> None:
    small = Machine(1 << 20)
    with pytest.raises(Exhausted, match="bytes of memory"):
        small.load(assemble(".array xs i64 1000000\nHALT"), "sum")
    small.close()


def test_the_cache_is_bounded_and_closes_what_it_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "UNITS_MAX", 2)
    made = Machine(1 << 20)
    units = [made.load(assemble(f"PUSH {n}\nEMIT\nHALT"), "sum") for n in range(3)]
    assert made.load(units[2].program, "sum") is units[2]
    with pytest.raises(Exhausted, match="Load the program again"):
        units[0].run(0, 1, gas=PLENTY, on_yield=never, on_sleep=print)
    assert made.load(units[0].program, "sum") is not units[0]
    made.close()
    with pytest.raises(Exhausted, match="closed"):
        made.load(units[0].program, "sum")
    gc.collect()


def test_the_end_of_the_native_stack_is_exhausted_and_the_unit_still_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "NATIVE_STACK_BYTES", 64 << 10)
    made = Machine(1 << 20)
    text = ".function f ( a -- b )\nLOAD 0\nCALL f\nEMIT\nHALT\n"
    text += "f: DUP\nJZ end\nPUSH 1\nSUB\nDUP\nSTORE 1\n" + "DUP\nPUSH 3\nMUL\n" * 200
    text += "LOAD 1\nCALL f\n" + "ADD\n" * 201 + "end: RET\n"
    unit = made.load(assemble(text), "count")
    for _ in range(2):
        assert unit.run(0, 3, gas=PLENTY, on_yield=never, on_sleep=print).partial.emitted == 3
        with pytest.raises(Exhausted, match="bytes of stack"):
            unit.run(1000, 1001, gas=PLENTY, on_yield=never, on_sleep=print)
    made.close()


def test_an_unknown_reduction_and_a_bad_range_are_refused(box: Machine) -> None:
    with pytest.raises(InvalidProgram, match="no reduction 'product'"):
        box.load(assemble("HALT"), "product")
    with pytest.raises(InvalidProgram, match="out of bounds"):
        box.load(assemble("HALT"), "sum").run(5, 4, gas=1, on_yield=never, on_sleep=print)


def test_calibration_finds_a_plausible_rate() -> None:
    assert 1e6 < calibrate(0.01) < 1e12


# -- the seed's dialect as it runs -------------------------------------------------------------


def test_json_values_are_f64_and_whole_results_print_as_integers(box: Machine) -> None:
    assert seed(box, '[["PUSH", 7], ["PUSH", 2], ["DIV"], ["PRINT"]]') == [3.5] * 3
    assert repr(seed(box, '[["PUSH", 8], ["PUSH", 2], ["DIV"], ["PRINT"]]')) == "[4, 4, 4]"
    assert seed(box, '[["PUSH", -7], ["PUSH", 3], ["MOD"], ["PRINT"]]') == [2] * 3
    assert repr(seed(box, '[["LOAD", 0], ["PRINT"]]', "sum")) == "12"


def test_json_index_and_next_stand_in_cells_0_and_1(box: Machine) -> None:
    assert seed(box, '[["LOAD", 0], ["PRINT"], ["LOAD", 1], ["PRINT"]]') == [[3, 4], [4, 5], [5, 6]]
    text = '[["LOAD", 0], ["PRINT"], ["LOOP", 0], ["GET_END"], ["PRINT"]]'
    text = f'{{"kind": "range", "program": {text}}}'
    assert seed(box, text) == [3, 4, 5, 6]


def test_json_an_unknown_opcode_is_a_fault_when_it_is_reached(box: Machine) -> None:
    assert seed(box, '[["JMP", 2], ["FROB"], ["PUSH", 1], ["PRINT"]]') == [1, 1, 1]
    with pytest.raises(Trap, match="UNKNOWN FROB: unknown instruction at index 3") as caught:
        seed(box, '[["PUSH", 1], ["PRINT"], ["FROB"]]')
    assert repr(caught.value.results) == "(1,)"


def test_json_the_root_of_a_negative_number_is_a_fault(box: Machine) -> None:
    with pytest.raises(Trap, match="square root of a negative"):
        seed(box, '[["PUSH", -1], ["SQRT"], ["PRINT"]]')
    assert math.isnan(run(box, "PUSH -1.0\nSQRT\nEMIT\nHALT", "sum", 0, 1))


def test_json_programs_with_a_dynamic_stack_run_in_the_interpreter_with_a_note(
    box: Machine,
) -> None:
    text = '[["LOAD", 0], ["PUSH", 4], ["SUB"], ["JZ", 5], ["PUSH", 1], ["PUSH", 2], ["PRINT"]]'
    program = load(text, "seed.json")
    assert "runs in the interpreter" in box.load(program, "collect").note
    assert run(box, program, "collect", 3, 6) == [2, 2, 2]
    with pytest.raises(Trap, match="stack underflow"):
        seed(box, '[["PUSH", 1], ["PRINT"], ["POP"]]')
    with pytest.raises(Trap, match="the stack grew beyond 65536"):
        seed(box, '[["PUSH", 1], ["JMP", 0]]')


# -- examples ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reduce", "lo", "hi", "expected"),
    [
        ("collatz.ent", "sum", 1, 1_000_000, 131434272),
        ("seed_collatz.json", "collect", 6, 9, [[6, 8], [7, 16], [8, 3]]),
        ("primes.ent", "count", 0, 100_000, 9592),
        ("primes.ent", "sum", 0, 100_000, 454396537),
        ("primes.ent", "max", 0, 100_000, 99991),
        ("mandelbrot.ent", "sum", 0, 60, 339449),
        ("pi.ent", "sum", 0, 1000, 785406),
        ("trap.ent", "sum", 0, 500, -7054),
    ],
)
def test_examples_do_what_they_say(
    box: Machine, name: str, reduce: str, lo: int, hi: int, expected: object
) -> None:
    assert run(box, load((EXAMPLES / name).read_bytes(), name), reduce, lo, hi) == expected


def test_the_trap_example_traps(box: Machine) -> None:
    program = load((EXAMPLES / "trap.ent").read_bytes(), "trap.ent")
    with pytest.raises(Trap) as caught:
        run(box, program, "sum", 0, 1000)
    assert (caught.value.index, caught.value.line) == (500, 10)
