"""WASI preview 1 commands: three streams, arguments, an environment, clocks; nothing else."""

from __future__ import annotations

import functools
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import wasmtime
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold.vm.errors import Exhausted, InvalidProgram, ManifoldError, Trap
from manifold.vm.foreign import CommandOutcome, CommandTrap, Foreign, ForeignMachine, load
from manifold.vm.foreign.signatures import WASI_MODULE, WASI_SIGNATURES
from manifold.vm.foreign.wasi import CALL_GAS, OUTPUT_BYTES_MAX, RANDOM_GAS
from manifold.vm.runtime import Stopped

PLENTY = 1 << 40
BADF, FAULT, INVAL, NOTSUP, SPIPE, NOTCAPABLE = 8, 21, 28, 58, 70, 76


@functools.cache
def program(text: str) -> Foreign:
    return load(bytes(wasmtime.wat2wasm(text)), "program.wasm")


def command(body: str, *, pages: int = 1, rest: str = "") -> Foreign:
    """A command whose `_start` is `body`; all of WASI is imported under its names."""
    imports = "".join(
        f'(import "{WASI_MODULE}" "{name}" (func ${name} (param {" ".join(each.parameters)}) '
        f"(result {' '.join(each.results)})))"
        for name, each in WASI_SIGNATURES.items()
        if f"${name} " in body + rest
    )
    memory = f'(memory (export "memory") {pages})'
    return program(f'(module {imports} {memory} {rest} (func (export "_start") {body}))')


@pytest.fixture(scope="module")
def machine() -> Iterator[ForeignMachine]:
    machine = ForeignMachine(64 << 20)
    yield machine
    machine.close()


def no_sleep(seconds: float) -> None:
    raise AssertionError("nothing here sleeps")


def run(
    machine: ForeignMachine,
    foreign: Foreign,
    argv: Sequence[str] = ("program",),
    *,
    environ: Mapping[str, str] | None = None,
    stdin: bytes = b"",
    gas: int = PLENTY,
    on_yield: Callable[[int], int] = lambda _: 0,
    on_sleep: Callable[[float], None] = no_sleep,
) -> CommandOutcome:
    return machine.command(foreign).run(
        argv,
        environ=environ or {},
        stdin=stdin,
        gas=gas,
        on_yield=on_yield,
        on_sleep=on_sleep,
    )


def errno(machine: ForeignMachine, call: str, **options: Any) -> int:
    """What a WASI function answers: the command exits with it."""
    return run(machine, command(f"(call $proc_exit (call {call}))"), **options).status


WRITE_ALL = """(i32.store (i32.const 0) (i32.const {at})) (i32.store (i32.const 4) {size})
  (drop (call $fd_write (i32.const {fd}) (i32.const 0) (i32.const 1) (i32.const 8)))"""


def write(at: int, size: str, fd: int = 1) -> str:
    return WRITE_ALL.format(at=at, size=size, fd=fd)


def test_returning_is_status_0_and_proc_exit_gives_its_own(machine: ForeignMachine) -> None:
    assert run(machine, command("")) == CommandOutcome(
        0, b"", b"", run(machine, command("")).gas_used
    )
    body = "(call $proc_exit (i32.const 7)) unreachable"
    assert run(machine, command(body)).status == 7
    assert run(machine, command("(call $proc_exit (i32.const -1))")).status == 0xFFFF_FFFF


def test_what_is_written_to_the_two_streams_is_kept_apart(machine: ForeignMachine) -> None:
    data = '(data (i32.const 16) "outerr")'
    body = write(16, "(i32.const 3)") + write(19, "(i32.const 3)", 2) + write(16, "(i32.const 1)")
    outcome = run(machine, command(body, rest=data))
    assert (outcome.stdout, outcome.stderr) == (b"outo", b"err")


def test_several_buffers_are_written_in_order_and_counted(machine: ForeignMachine) -> None:
    vectors = struct.pack("<6I", 64, 2, 70, 0, 66, 3).hex(" ").replace(" ", "\\")
    rest = f'(data (i32.const 0) "\\{vectors}") (data (i32.const 64) "hello")'
    body = """(drop (call $fd_write (i32.const 1) (i32.const 0) (i32.const 3) (i32.const 40)))
      (call $proc_exit (i32.load (i32.const 40)))"""
    outcome = run(machine, command(body, rest=rest))
    assert outcome.stdout == b"hello" and outcome.status == 5


ECHO = (
    """(loop
  (i32.store (i32.const 0) (i32.const 100)) (i32.store (i32.const 4) (i32.const 7))
  (i32.store (i32.const 8) (i32.const 300)) (i32.store (i32.const 12) (i32.const 500))
  (drop (call $fd_read (i32.const 0) (i32.const 0) (i32.const 2) (i32.const 20)))
  (if (i32.eqz (i32.load (i32.const 20))) (then (return)))
  (i32.store (i32.const 24) (i32.load (i32.const 20)))
  (i32.store (i32.const 4) (select (i32.const 7) (i32.load (i32.const 20))
    (i32.gt_u (i32.load (i32.const 20)) (i32.const 7))))
  (i32.store (i32.const 12) (i32.sub (i32.load (i32.const 24)) (i32.load (i32.const 4))))"""
    + "(drop (call $fd_write (i32.const 1) (i32.const 0) (i32.const 2) (i32.const 20))) (br 0))"
)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 507, 508, 3_000])
def test_standard_input_is_read_in_pieces_to_its_end(size: int, machine: ForeignMachine) -> None:
    data = bytes(each % 251 for each in range(size))
    assert run(machine, command(ECHO), stdin=data).stdout == data


def test_arguments_and_environment_arrive_as_c_strings(machine: ForeignMachine) -> None:
    for kind in ("args", "environ"):
        body = f"""(drop (call ${kind}_sizes_get (i32.const 32) (i32.const 36)))
          (drop (call ${kind}_get (i32.const 64) (i32.const 200)))
          {write(32, "(i32.const 8)")} {write(64, "(i32.const 8)")}
          {write(200, "(i32.load (i32.const 36))")}"""
        argv, environ = ["prog", "né"], {"A": "1", "B": "x=y"}
        found = run(machine, command(body), argv, environ=environ).stdout
        texts = ["prog", "né"] if kind == "args" else ["A=1", "B=x=y"]
        whole = b"".join(each.encode() + b"\0" for each in texts)
        second = 200 + len(texts[0]) + 1
        assert found == struct.pack("<4I", 2, len(whole), 200, second) + whole


def test_arguments_that_c_cannot_hold_are_refused(machine: ForeignMachine) -> None:
    for argv, environ, message in (
        (["a\0b"], {}, "holds a NUL"),
        ([], {"A=B": "c"}, "is no name of a variable"),
        ([], {"": "c"}, "is no name of a variable"),
        (["x" * (1 << 20)], {}, "take more than 1048576 bytes"),
        (["x"] * 20_000, {}, "are more than 16384"),
    ):
        with pytest.raises(InvalidProgram, match=message):
            run(machine, command(""), argv, environ=environ)


def test_output_is_bounded_over_both_streams(machine: ForeignMachine) -> None:
    mebibyte = "(i32.const 1048576)"
    body = write(0, mebibyte) * 8 + write(0, mebibyte, 2) * 8
    outcome = run(machine, command(body, pages=17))
    assert len(outcome.stdout) + len(outcome.stderr) == OUTPUT_BYTES_MAX
    with pytest.raises(Exhausted, match="More than 16777216 bytes on standard output and error"):
        run(machine, command(body + write(0, "(i32.const 1)"), pages=17))


# --- clocks, random numbers, waiting --------------------------------------------------------


def test_the_two_clocks_go_and_others_are_invalid(machine: ForeignMachine) -> None:
    body = "(drop (call $clock_time_get (i32.const {}) (i64.const 0) (i32.const 16)))"
    for clock, now_ns in ((0, time.time_ns), (1, time.monotonic_ns)):
        before = now_ns()
        text = body.format(clock) + write(16, "(i32.const 8)")
        (shown,) = struct.unpack("<Q", run(machine, command(text)).stdout)
        assert before <= shown <= now_ns()
    for clock in (2, 3, 4, -1):
        assert errno(machine, f"$clock_res_get (i32.const {clock}) (i32.const 0)") == INVAL
    assert errno(machine, "$clock_res_get (i32.const 1) (i32.const 0)") == 0


def test_random_numbers_fill_the_buffer_and_cost_by_the_byte(machine: ForeignMachine) -> None:
    body = "(drop (call $random_get (i32.const 64) (i32.const 2000000)))" + write(
        64, "(i32.const 2000000)"
    )
    outcome = run(machine, command(body, pages=32))
    assert outcome.stdout.count(0) < 2_000_000 / 128
    assert outcome.gas_used > 2_000_000 * RANDOM_GAS


def subscription(at: int, kind: int, number: int, timeout_ns: int = 0, flags: int = 0) -> str:
    return f"""(i64.store (i32.const {at}) (i64.const {1000 + at}))
      (i32.store8 (i32.const {at + 8}) (i32.const {kind}))
      (i32.store (i32.const {at + 16}) (i32.const {number}))
      (i64.store (i32.const {at + 24}) (i64.const {timeout_ns}))
      (i32.store16 (i32.const {at + 40}) (i32.const {flags}))"""


def poll(machine: ForeignMachine, *subscriptions: str, **options: Any) -> list[tuple[int, ...]]:
    body = "".join(subscriptions) + (
        "(drop (call $poll_oneoff (i32.const 512) (i32.const 2048) "
        f"(i32.const {len(subscriptions)}) (i32.const 20)))"
        + write(2048, "(i32.mul (i32.load (i32.const 20)) (i32.const 32))")
    )
    stdout = run(machine, command(body), **options).stdout
    return [each[:4] for each in struct.iter_unpack("<QHB5xQH6x", stdout)]


def test_waiting_sleeps_through_the_host_until_the_first_is_due(machine: ForeignMachine) -> None:
    slept: list[float] = []
    events = poll(
        machine,
        subscription(512, 0, 1, 3_000_000_000),
        subscription(560, 0, 0, 1_500_000_000),
        on_sleep=slept.append,
    )
    assert slept == [1.5] and events == [(1560, 0, 0, 0)]


def test_an_absolute_time_that_is_past_is_due_at_once(machine: ForeignMachine) -> None:
    assert poll(machine, subscription(512, 0, 0, 5, 1)) == [(1512, 0, 0, 0)]


def test_streams_are_always_ready_and_wrong_subscriptions_answered(
    machine: ForeignMachine,
) -> None:
    events = poll(
        machine,
        subscription(512, 1, 0),
        subscription(560, 2, 1),
        subscription(608, 2, 0),
        subscription(656, 1, 9),
        subscription(704, 7, 0),
        subscription(752, 0, 8),
        subscription(800, 0, 1, 10**9),
        stdin=b"abc",
    )
    assert events == [
        (1512, 0, 1, 3),
        (1560, 0, 2, 0),
        (1608, BADF, 2, 0),
        (1656, BADF, 1, 0),
        (1704, INVAL, 7, 0),
        (1752, INVAL, 0, 0),
    ]


@pytest.mark.parametrize("count", [0, 1025, -1])
def test_a_poll_of_nothing_or_too_much_is_invalid(count: int, machine: ForeignMachine) -> None:
    call = f"$poll_oneoff (i32.const 0) (i32.const 0) (i32.const {count}) (i32.const 0)"
    assert errno(machine, call) == INVAL


# --- what is not there ----------------------------------------------------------------------

NOT_THERE = [
    ("$fd_prestat_get (i32.const 3) (i32.const 0)", BADF),
    ("$fd_prestat_dir_name (i32.const 3) (i32.const 0) (i32.const 9)", BADF),
    ("$fd_close (i32.const 3)", BADF),
    ("$fd_read (i32.const 1) (i32.const 0) (i32.const 0) (i32.const 0)", BADF),
    ("$fd_write (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)", BADF),
    ("$fd_write (i32.const -1) (i32.const 0) (i32.const 0) (i32.const 0)", BADF),
    ("$fd_seek (i32.const 1) (i64.const 0) (i32.const 0) (i32.const 0)", SPIPE),
    ("$fd_seek (i32.const 5) (i64.const 0) (i32.const 0) (i32.const 0)", BADF),
    ("$fd_tell (i32.const 0) (i32.const 0)", SPIPE),
    ("$fd_sync (i32.const 1)", INVAL),
    ("$proc_raise (i32.const 6)", NOTSUP),
    ("$path_unlink_file (i32.const 3) (i32.const 0) (i32.const 1)", BADF),
    ("$path_unlink_file (i32.const 0) (i32.const 0) (i32.const 1)", NOTCAPABLE),
    ("$sock_shutdown (i32.const 7) (i32.const 0)", BADF),
    ("$sched_yield ", 0),
    ("$fd_fdstat_set_flags (i32.const 1) (i32.const 1)", 0),
    ("$fd_filestat_get (i32.const 1) (i32.const 0)", 0),
]


@pytest.mark.parametrize("call, expected", NOT_THERE)
def test_what_is_not_there_is_an_error_number(
    call: str, expected: int, machine: ForeignMachine
) -> None:
    assert errno(machine, call) == expected


def test_a_closed_stream_is_closed_and_a_renumbered_one_is_where_it_went(
    machine: ForeignMachine,
) -> None:
    body = f"""(drop (call $fd_renumber (i32.const 2) (i32.const 1)))
      {write(16, "(i32.const 2)")} (drop (call $fd_close (i32.const 1)))
      (call $proc_exit (call $fd_fdstat_get (i32.const 1) (i32.const 0)))"""
    outcome = run(machine, command(body, rest='(data (i32.const 16) "hi")'))
    assert (outcome.status, outcome.stdout, outcome.stderr) == (BADF, b"", b"hi")


def test_streams_are_no_terminals(machine: ForeignMachine) -> None:
    body = "(drop (call $fd_fdstat_get (i32.const 1) (i32.const 16)))" + write(16, "(i32.const 24)")
    kind, _, rights, inherited = struct.unpack("<BxH4xQQ", run(machine, command(body)).stdout)
    assert kind == 0 and rights & 1 << 6 and not rights & 1 << 1 and not inherited


# --- hostile pointers -----------------------------------------------------------------------

END = 65536
HOSTILE = [
    f"$fd_write (i32.const 1) (i32.const {END - 7}) (i32.const 1) (i32.const 0)",
    "$fd_write (i32.const 1) (i32.const -8) (i32.const 1) (i32.const 0)",
    f"$fd_write (i32.const 1) (i32.const 0) (i32.const 0) (i32.const {END - 3})",
    f"$fd_read (i32.const 0) (i32.const 0) (i32.const 0) (i32.const {END - 3})",
    f"$random_get (i32.const {END - 1}) (i32.const 2)",
    "$random_get (i32.const 1) (i32.const -1)",
    f"$args_get (i32.const {END - 3}) (i32.const 0)",
    f"$args_get (i32.const 0) (i32.const {END - 7})",
    f"$args_sizes_get (i32.const 0) (i32.const {END - 3})",
    f"$clock_time_get (i32.const 0) (i64.const 0) (i32.const {END - 7})",
    f"$fd_fdstat_get (i32.const 1) (i32.const {END - 23})",
    f"$poll_oneoff (i32.const {END - 47}) (i32.const 0) (i32.const 1) (i32.const 0)",
    f"$poll_oneoff (i32.const 0) (i32.const {END - 31}) (i32.const 1) (i32.const 0)",
]


@pytest.mark.parametrize("call", HOSTILE)
def test_a_pointer_out_of_range_is_a_fault(call: str, machine: ForeignMachine) -> None:
    assert errno(machine, call) == FAULT


@pytest.mark.parametrize("at, size", [(-1, 1), (0, -1), (END - 4, 5), (-8, 16), (1 << 30, 1)])
@pytest.mark.parametrize("name, descriptor", [("fd_write", 1), ("fd_read", 0)])
def test_a_buffer_out_of_range_is_a_fault_and_moves_nothing(
    name: str, descriptor: int, at: int, size: int, machine: ForeignMachine
) -> None:
    body = f"""(i32.store (i32.const 0) (i32.const 100)) (i32.store (i32.const 4) (i32.const 4))
      (i32.store (i32.const 8) (i32.const {at})) (i32.store (i32.const 12) (i32.const {size}))
      (call $proc_exit (call ${name} (i32.const {descriptor}) (i32.const 0) (i32.const 2)
        (i32.const 40)))"""
    outcome = run(machine, command(body), stdin=b"12345678")
    assert outcome.status == FAULT and outcome.stdout == b""


def test_too_many_buffers_are_invalid(machine: ForeignMachine) -> None:
    call = "$fd_write (i32.const 1) (i32.const 0) (i32.const {}) (i32.const 60000)"
    assert errno(machine, call.format(1024)) == 0
    assert errno(machine, call.format(1025)) == INVAL
    assert errno(machine, call.format(-1)) == INVAL


WORDS = st.one_of(
    st.integers(0, 3),
    st.integers(-64, 64),
    st.integers(END - 64, END),
    st.integers(-(2**31), 2**31 - 1),
)
CALLS = st.sampled_from(sorted(WASI_SIGNATURES)).flatmap(
    lambda name: st.tuples(
        st.just(name), st.tuples(*(WORDS for _ in WASI_SIGNATURES[name].parameters))
    )
)


@settings(max_examples=120, deadline=None)
@given(st.lists(CALLS, min_size=1, max_size=6))
def test_no_call_whatever_its_parameters_does_more_than_end_the_program(
    calls: list[tuple[str, tuple[int, ...]]],
) -> None:
    body = ""
    for name, values in calls:
        kinds = WASI_SIGNATURES[name].parameters
        given_values = [f"({kind}.const {v})" for kind, v in zip(kinds, values, strict=True)]
        call = f"(call ${name} {' '.join(given_values)})"
        body += f"(drop {call})" if WASI_SIGNATURES[name].results else call
    machine = ForeignMachine(1 << 20)
    try:
        run(machine, command(body), stdin=b"some input", gas=1 << 22, on_sleep=lambda _: None)
    except ManifoldError as error:
        assert error.code in ("stopped", "exhausted")
    finally:
        machine.close()


def test_a_start_function_may_call_wasi_before_start(machine: ForeignMachine) -> None:
    rest = f"""(func $early {write(16, "(i32.const 2)")}) (start $early)
      (data (i32.const 16) "hi")"""
    assert run(machine, command("", rest=rest)).stdout == b"hi"


# --- traps and stopping ---------------------------------------------------------------------


def test_a_trap_carries_what_was_written_and_its_last_words(machine: ForeignMachine) -> None:
    rest = f"""(func $panic {write(16, "(i32.const 10)", 2)} unreachable)
      (data (i32.const 16) "one\\0ano egg\\0a")"""
    with pytest.raises(CommandTrap) as trapped:
        run(machine, command(write(16, "(i32.const 3)") + "(call $panic)", rest=rest))
    error = trapped.value
    assert isinstance(error, Trap) and error.code == "trap" and error.index is None
    assert "`unreachable` instruction executed in panic <" in error.message
    assert error.next_step.startswith("Its last words: no eg")
    assert (error.stdout, error.stderr) == (b"one", b"one\nno egg") and error.gas_used > 0


@pytest.mark.parametrize(
    "body",
    [
        "(loop (br 0))",
        "(loop (drop (call $sched_yield )) (br 0))",
        "(loop (drop (call $random_get (i32.const 0) (i32.const 60000))) (br 0))",
        "(loop (drop (call $fd_prestat_get (i32.const 3) (i32.const 0))) (br 0))",
    ],
)
def test_a_command_that_never_ends_is_stopped_within_a_slice(
    body: str, machine: ForeignMachine
) -> None:
    grants = [2_000_000, 2_000_000, 0]
    with pytest.raises(Stopped) as stopped:
        run(machine, command(body), gas=1_000_000, on_yield=lambda _: grants.pop(0))
    assert not grants and stopped.value.gas_used >= 5_000_000
    assert stopped.value.gas_used < 5_000_000 + 60_000 * RANDOM_GAS + 2 * CALL_GAS + (1 << 18)


def test_a_sleep_that_is_cut_short_leads_to_the_next_yield(machine: ForeignMachine) -> None:
    slept: list[float] = []
    body = f"""{subscription(512, 0, 1, 10**18)} (loop (drop (call $poll_oneoff (i32.const 512)
      (i32.const 2048) (i32.const 1) (i32.const 20))) (br 0))"""
    with pytest.raises(Stopped):
        run(machine, command(body), gas=200_000, on_sleep=slept.append)
    assert 5 < len(slept) < 200_000 / CALL_GAS and set(slept) == {1e9}


def test_what_a_host_callback_raises_comes_out_unchanged(machine: ForeignMachine) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    body = f"""{subscription(512, 0, 1, 10**9)} (drop (call $poll_oneoff (i32.const 512)
      (i32.const 2048) (i32.const 1) (i32.const 20)))"""
    with pytest.raises(KeyboardInterrupt):
        run(machine, command(body), on_sleep=interrupt)
    assert run(machine, command("")).status == 0


def test_an_exit_beyond_the_granted_gas_is_stopped(machine: ForeignMachine) -> None:
    body = "(call $proc_exit (i32.const 3))"
    needed = run(machine, command(body)).gas_used
    assert needed >= CALL_GAS and run(machine, command(body), gas=needed).status == 3
    with pytest.raises(Stopped):
        run(machine, command(body), gas=needed - 1)


def test_memory_stops_growing_at_the_machines_limit() -> None:
    machine = ForeignMachine(1 << 20)
    grow = """(loop (br_if 0 (i32.ge_s (memory.grow (i32.const 1)) (i32.const 0))))
      (call $proc_exit (memory.size))"""
    assert run(machine, command(grow)).status == 16
    with pytest.raises(Exhausted, match="needs 1114112 bytes of memory"):
        run(machine, command("", pages=17))
    machine.close()


def test_runs_share_nothing(machine: ForeignMachine) -> None:
    body = """(i32.store (i32.const 0) (i32.add (i32.load (i32.const 0)) (i32.const 1)))
      (call $proc_exit (i32.load (i32.const 0)))"""
    assert [run(machine, command(body)).status for _ in range(3)] == [1, 1, 1]
