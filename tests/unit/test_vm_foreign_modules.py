"""Foreign modules run over blocks of indices as our own programs do: metered, bounded, exact."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import pytest
import wasmtime
from hypothesis import example, given, settings
from hypothesis import strategies as st

from manifold.vm.errors import Exhausted, InvalidProgram, Trap
from manifold.vm.foreign import Foreign, ForeignMachine, load
from manifold.vm.foreign.block import Reduction
from manifold.vm.foreign.engine import SLICE_GAS
from manifold.vm.runtime import REDUCTIONS, Outcome, Stopped, finish
from manifold.vm.runtime.results import Partial, Value, from_entries

MEMORY_BYTES = 4 << 20
PLENTY = 1 << 40


@functools.cache
def program(text: str) -> Foreign:
    return load(bytes(wasmtime.wat2wasm(f"(module {text})")), "program.wasm")


@pytest.fixture
def machine() -> Iterator[ForeignMachine]:
    machine = ForeignMachine(MEMORY_BYTES)
    yield machine
    machine.close()


def none(_: float) -> int:
    return 0


def run(
    machine: ForeignMachine,
    text: str,
    lo: int = 0,
    hi: int = 1,
    *,
    reduce: str = "collect",
    entry: str = "",
    gas: int = PLENTY,
    on_yield: Callable[[int], int] = none,
    arguments: Sequence[Value] = (),
) -> Outcome:
    unit = machine.load(program(text), reduce, entry)
    return unit.run(lo, hi, gas=gas, on_yield=on_yield, on_sleep=no_sleep, arguments=arguments)


def no_sleep(seconds: float) -> None:
    raise AssertionError("nothing here sleeps")


def collected(machine: ForeignMachine, text: str, lo: int, hi: int, **options: object) -> object:
    return finish("collect", run(machine, text, lo, hi, **options).partial, lo, hi)  # type: ignore[arg-type]


SQUARE = '(func (export "run") (param i64) (result i64) (i64.mul (local.get 0) (local.get 0)))'
ENDLESS = '(func (export "run") (param i64) (result i64) (loop (br 0)) (i64.const 0))'


def test_the_function_is_called_for_each_index_in_order(machine: ForeignMachine) -> None:
    assert collected(machine, SQUARE, -3, 4) == [9, 4, 1, 0, 1, 4, 9]
    assert collected(machine, SQUARE, 5, 5) == []


@pytest.mark.parametrize("kind", ["i32", "i64", "f64"])
def test_the_index_may_be_of_three_types(kind: str, machine: ForeignMachine) -> None:
    text = f'(func (export "run") (param {kind}) (result {kind}) (local.get 0))'
    assert collected(machine, text, -2, 3) == [-2, -1, 0, 1, 2]


def test_all_four_types_of_results_come_back_and_several_make_a_list(
    machine: ForeignMachine,
) -> None:
    text = """(func (export "run") (param i64) (result i32 f32 i64 f64)
      (i32.const -7) (f32.const 0.1) (local.get 0) (f64.const 0.1))"""
    tenth = 0.10000000149011612  # what an f32 holds of it
    assert collected(machine, text, 4, 6) == [[-7, tenth, 4, 0.1], [-7, tenth, 5, 0.1]]
    assert collected(machine, '(func (export "run") (param i64))', 0, 2) == [None, None]


def test_arguments_follow_the_index(machine: ForeignMachine) -> None:
    text = """(func (export "run") (param i64 i32 f32 f64 i64) (result i64 i32 f32 f64)
      (local.get 4) (local.get 1) (local.get 2) (local.get 3))"""
    found = collected(machine, text, 0, 1, arguments=(-5, 0.5, 3, -(1 << 63)))
    assert found == [[-(1 << 63), -5, 0.5, 3.0]]


@pytest.mark.parametrize(
    "kinds, arguments, message",
    [
        ("", (1,), "takes 0 arguments after the index, not 1"),
        ("i64 i64", (1,), "takes 2 arguments after the index, not 1"),
        ("i64", (1.5,), "Argument 1, 1.5, is an f64, but the parameter is an i64"),
        ("i32", (1 << 31,), "does not fit in an i32"),
        ("i64", (1 << 63,), "does not fit in an i64"),
        ("f64", (10**400,), "does not fit in an f64"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    kinds: str, arguments: tuple[Value, ...], message: str, machine: ForeignMachine
) -> None:
    text = f'(func (export "run") (param i64 {kinds}))'
    with pytest.raises(InvalidProgram, match=message):
        run(machine, text, arguments=arguments)


@pytest.mark.parametrize(
    "kind, lo, hi, fits",
    [
        ("i32", (1 << 31) - 2, 1 << 31, True),
        ("i32", (1 << 31) - 2, (1 << 31) + 1, False),
        ("i32", -(1 << 31) - 1, -(1 << 31), False),
        ("f64", (1 << 53) - 1, (1 << 53) + 1, True),
        ("f64", (1 << 53) - 1, (1 << 53) + 2, False),
        ("i64", (1 << 63) - 3, (1 << 63) - 1, True),
    ],
)
def test_an_index_type_must_hold_the_whole_range(
    kind: str, lo: int, hi: int, fits: bool, machine: ForeignMachine
) -> None:
    text = f'(func (export "run") (param {kind}) (result {kind}) (local.get 0))'
    if fits:
        assert collected(machine, text, lo, hi) == list(range(lo, hi))
    else:
        with pytest.raises(InvalidProgram, match="does not hold all of"):
            run(machine, text, lo, hi)


def test_out_of_bounds_ranges_gas_and_reductions_are_refused(machine: ForeignMachine) -> None:
    for lo, hi, gas in ((3, 2, 5), (0, 1 << 63, 5), (0, 1, -1)):
        with pytest.raises(InvalidProgram, match="out of bounds"):
            run(machine, SQUARE, lo, hi, gas=gas)
    with pytest.raises(InvalidProgram, match="no reduction 'mean'"):
        run(machine, SQUARE, reduce="mean")


# --- results --------------------------------------------------------------------------------

ROWS = st.sampled_from(["i", "f", "ff", "if", "fi", "fif", ""]).flatmap(
    lambda row: st.tuples(
        st.just(row),
        st.lists(
            st.tuples(
                *(
                    st.integers(-(1 << 63), (1 << 63) - 1) if each == "i" else st.floats(width=64)
                    for each in row
                )
            ),
            max_size=6,
        ),
    )
)


@settings(max_examples=200, deadline=None)
@given(ROWS, st.sampled_from(REDUCTIONS), st.integers(1, 4))
@example(("f", [(-0.0,)]), "min", 1)
@example(("if", [((1 << 63) - 1, 0.0), (-(1 << 63), -0.0)]), "max", 1)
def test_results_add_up_as_the_reference_says_however_they_are_buffered(
    rows: tuple[str, list[tuple[Value, ...]]], reduce: str, step: int
) -> None:
    row, entries = rows
    reduction = Reduction(reduce, tuple("i64" if each == "i" else "f64" for each in row))
    for start in range(0, len(entries), step):
        part = entries[start : start + step]
        whole = from_entries("collect", part, json=False, flat=False)
        reduction.add(whole.values, len(part))
    expected = from_entries(reduce, entries, json=False, flat=False)
    assert same(reduction.partial(), expected)


def same(left: Partial, right: Partial) -> bool:
    """Equal, NaNs and the signs of zeros included; a row of nothing may say so by its counts."""
    return repr(left) == repr(right)


def test_many_indices_cross_in_several_buffers(machine: ForeignMachine) -> None:
    outcome = run(machine, SQUARE, 0, 20_000, reduce="sum")
    assert finish("sum", outcome.partial, 0, 20_000) == sum(each * each for each in range(20_000))
    assert collected(machine, SQUARE, 0, 20_000) == [each * each for each in range(20_000)]


def test_a_float_sum_is_added_in_order_over_the_whole_block(machine: ForeignMachine) -> None:
    text = """(func (export "run") (param i64) (result f64)
      (f64.div (f64.const 1) (f64.convert_i64_s (local.get 0))))"""
    total = 0.0
    for index in range(1, 20_000):
        total += 1 / index
    partial = run(machine, text, 1, 20_000, reduce="sum").partial
    assert finish("sum", partial, 1, 20_000) == total


def test_a_nan_has_one_spelling_whatever_the_program_returns(machine: ForeignMachine) -> None:
    text = (
        '(func (export "run") (param i64) (result f64 f32) (f64.const -nan:0x123) (f32.const -nan))'
    )
    partial = run(machine, text).partial
    assert partial == from_entries("collect", [[math.nan, math.nan]], json=False, flat=False)
    found = run(machine, text, reduce="max").partial
    assert math.isnan(found.float_best)


def test_collecting_too_much_is_an_error(machine: ForeignMachine) -> None:
    text = f"""(func (export "run") (param i64) (result {"i64 " * 1000})
      {"(local.get 0)" * 1000})"""
    with pytest.raises(Exhausted, match="More than 67108864 bytes of results"):
        run(machine, text, 0, 9_000)
    assert run(machine, text, 0, 9_000, reduce="count").partial.emitted == 9_000_000


# --- state ----------------------------------------------------------------------------------

COUNTER = """(global $calls (mut i64) (i64.const 0)) (memory (export "memory") 1)
  (func (export "_initialize") (global.set $calls (i64.const 100)))
  (func (export "run") (param i64) (result i64 i64)
    (global.set $calls (i64.add (global.get $calls) (i64.const 1)))
    (i64.store (i32.const 0) (i64.add (i64.load (i32.const 0)) (i64.const 1)))
    (global.get $calls) (i64.load (i32.const 0)))"""


def test_state_lives_as_long_as_a_block_and_starts_initialized(machine: ForeignMachine) -> None:
    for _ in range(2):
        assert collected(machine, COUNTER, 0, 3) == [[101, 1], [102, 2], [103, 3]]


def test_a_start_function_runs_before_the_first_index(machine: ForeignMachine) -> None:
    text = """(global $g (mut i64) (i64.const 0)) (func $s (global.set $g (i64.const 7))) (start $s)
      (func (export "run") (param i64) (result i64) (global.get $g))"""
    assert collected(machine, text, 0, 2) == [7, 7]


# --- gas ------------------------------------------------------------------------------------


def test_gas_is_the_same_number_each_time_and_however_it_is_granted(
    machine: ForeignMachine,
) -> None:
    text = """(func (export "run") (param i64) (result i64) (local i64)
      (loop (local.set 1 (i64.add (local.get 1) (i64.const 1)))
        (br_if 0 (i64.lt_u (local.get 1) (i64.const 100000)))) (local.get 1))"""
    used = {run(machine, text, 0, 9).gas_used for _ in range(3)}
    asked: list[int] = []

    def little(gas_used: int) -> int:
        asked.append(gas_used)
        return 70_000

    used.add(run(machine, text, 0, 9, gas=1, on_yield=little).gas_used)
    assert len(used) == 1 and used.pop() > 900_000 * 5
    assert asked == sorted(asked) and len(asked) > 50


def test_a_run_never_uses_more_than_it_was_granted(machine: ForeignMachine) -> None:
    needed = run(machine, SQUARE, 0, 100).gas_used
    assert run(machine, SQUARE, 0, 100, gas=needed).gas_used == needed
    with pytest.raises(Stopped) as stopped:
        run(machine, SQUARE, 0, 100, gas=needed - 1)
    assert stopped.value.gas_used == needed


@pytest.mark.parametrize(
    "text, index",
    [
        (ENDLESS, 0),
        ("(func $f (loop (br 0))) (start $f) " + SQUARE, None),
        ('(func (export "_initialize") (loop (br 0))) ' + SQUARE, None),
        ('(func $f (export "run") (param i64) (return_call $f (local.get 0)))', 0),
        (
            """(memory 60) (func (export "run") (param i64)
            (loop (memory.fill (i32.const 0) (i32.const 1) (i32.const 3900000)) (br 0)))""",
            0,
        ),
    ],
)
def test_what_never_ends_is_stopped_within_a_slice(
    text: str, index: int | None, machine: ForeignMachine
) -> None:
    grants = [5_000_000, 5_000_000, 0]
    with pytest.raises(Stopped) as stopped:
        run(machine, text, gas=1_000_000, on_yield=lambda _: grants.pop(0))
    assert not grants and stopped.value.index == index
    assert 11_000_000 <= stopped.value.gas_used <= 11_000_000 + SLICE_GAS


def test_being_stopped_tells_the_index(machine: ForeignMachine) -> None:
    text = """(func (export "run") (param i64)
      (if (i64.eq (local.get 0) (i64.const 30)) (then (loop (br 0)))))"""
    with pytest.raises(Stopped) as stopped:
        run(machine, text, 0, 100, gas=1_000_000)
    assert stopped.value.index == 30


def test_what_a_callback_raises_comes_out_and_the_unit_runs_again(
    machine: ForeignMachine,
) -> None:
    def interrupt(_: int) -> int:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(machine, ENDLESS, gas=1000, on_yield=interrupt)
    with pytest.raises(Stopped):
        run(machine, ENDLESS, gas=1000)


# --- faults and limits ----------------------------------------------------------------------

DIVIDE = """(func $divide (param i64) (result i64) (i64.div_s (i64.const 9) (local.get 0)))
  (func $outer (export "run") (param i64) (result i64) (call $divide (local.get 0)))"""


def test_a_trap_tells_what_where_and_at_which_index(machine: ForeignMachine) -> None:
    with pytest.raises(Trap) as trapped:
        run(machine, DIVIDE, -10_000, 10)
    expected = "program.wasm: integer divide by zero in divide < outer at index 0."
    assert trapped.value.message == expected and trapped.value.index == 0


@pytest.mark.parametrize(
    "body, message",
    [
        ("unreachable", "`unreachable` instruction executed"),
        ("(drop (i32.load (i32.const 70000)))", r"out of bounds memory access \(address 0x11170 "),
        ("(drop (i32.trunc_f64_s (f64.const nan)))", "invalid conversion to integer"),
        ("(call_indirect (i32.const 5))", "undefined element: out of bounds table access"),
    ],
)
def test_traps_without_names_name_the_function_by_number(
    body: str, message: str, machine: ForeignMachine
) -> None:
    text = f'(memory 1) (table 1 funcref) (func (export "run") (param i64) {body})'
    with pytest.raises(
        Trap, match=message + r".* in function 0 \(byte 0x.* at index 8\. Compile it"
    ):
        run(machine, text, 8, 9)


def test_a_trap_while_it_starts_has_no_index(machine: ForeignMachine) -> None:
    with pytest.raises(Trap, match=r"executed in \$?boom\.$") as trapped:
        run(machine, f"(func $boom unreachable) (start $boom) {SQUARE}")
    assert trapped.value.index is None


def test_endless_recursion_is_exhausted_and_not_a_crash(machine: ForeignMachine) -> None:
    text = """(func $f (export "run") (param i64) (result i64)
      (i64.add (call $f (local.get 0)) (i64.const 1)))"""
    with pytest.raises(Exhausted, match="need more than 4194304 bytes of stack"):
        run(machine, text)


def test_memory_beyond_the_machines_is_refused_or_not_given(machine: ForeignMachine) -> None:
    with pytest.raises(Exhausted, match="needs 4259840 bytes of memory; a worker here has 4194304"):
        run(machine, f"(memory 65) {SQUARE}")
    grow = """(memory 1) (func (export "run") (param i64) (result i32 i32)
      (memory.grow (i32.const 63)) (memory.grow (i32.const 1)))"""
    assert collected(machine, grow, 0, 1) == [[1, -1]]
    for tables in ("(table 262145 funcref)", "(table 1 funcref)" * 5):
        with pytest.raises(Exhausted, match="table"):
            run(machine, tables + SQUARE)


def test_a_module_that_exits_or_prints_has_no_streams(machine: ForeignMachine) -> None:
    wasi = '(import "wasi_snapshot_preview1" '
    text = f"""{wasi} "proc_exit" (func $exit (param i32)))
      {wasi} "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
      (memory (export "memory") 1)
      (func (export "run") (param i64) (result i32)
        (if (i64.eq (local.get 0) (i64.const 3)) (then (call $exit (i32.const 5))))
        (call $write (i32.const 1) (i32.const 0) (i32.const 0) (i32.const 8)))"""
    assert collected(machine, text, 0, 2) == [8, 8]  # EBADF
    with pytest.raises(Trap, match=r"called exit\(5\) at index 3") as trapped:
        run(machine, text, 0, 9)
    assert trapped.value.index == 3


# --- the machine ----------------------------------------------------------------------------


def test_programs_are_kept_by_kid_and_those_not_used_leave(machine: ForeignMachine) -> None:
    first = machine.load(program(SQUARE), "sum")
    for number in range(33):
        text = f'(func (export "run") (param i64) (result i64) (i64.const {number}))'
        machine.load(program(text), "sum")
    assert first.closed
    with pytest.raises(Exhausted, match="Load it again"):
        first.run(0, 1, gas=PLENTY, on_yield=none, on_sleep=no_sleep)
    assert collected(machine, SQUARE, 3, 4) == [9]


LARGE = "".join(
    f"(func (param i64) (result i64) {'(i64.mul (local.get 0) ' * 500} (i64.const {number})"
    f"{')' * 500})"
    for number in range(200)
)


def test_the_host_is_called_while_a_large_program_compiles(
    machine: ForeignMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manifold.vm.foreign.machine.WAIT_S", 0.0)
    waited: list[int] = []
    unit = machine.load(program(SQUARE + LARGE), "sum", "run", on_wait=lambda: waited.append(1))
    assert waited
    outcome = unit.run(3, 4, gas=PLENTY, on_yield=none, on_sleep=no_sleep)
    assert finish("sum", outcome.partial, 3, 4) == 9


def test_what_is_raised_while_it_compiles_comes_out_and_it_can_be_loaded_again(
    machine: ForeignMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manifold.vm.foreign.machine.WAIT_S", 0.0)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        machine.load(program(LARGE + SQUARE), "sum", on_wait=interrupt)
    assert collected(machine, LARGE + SQUARE, 3, 4) == [9]


def test_a_closed_machine_loads_nothing_and_a_module_is_no_command() -> None:
    machine = ForeignMachine(MEMORY_BYTES)
    with pytest.raises(InvalidProgram, match="is a module: it has no _start"):
        machine.command(program(SQUARE))
    machine.load(program(SQUARE), "sum")
    machine.close()
    with pytest.raises(Exhausted, match="has been closed"):
        machine.load(program(SQUARE), "sum")
