"""`manifold.Executor` does what a user of `concurrent.futures` expects, on real processes."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import multiprocessing
import os
import pickle
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

import manifold
from manifold.kernel.errors import ProcessDied
from manifold.tools.emulator.testing import TestCluster

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # task processes have no tests
ROOT = Path(__file__).parents[2]
SOON_S = 30.0  # for what takes a fraction of it on a quiet machine


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[TestCluster]:
    """A cluster that `manifold.Executor()` finds."""
    with tempfile.TemporaryDirectory(prefix="mf-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MANIFOLD_STATE_HOME", f"{folder}/state")
        patch.setenv("MANIFOLD_RUNTIME_DIR", f"{folder}/run")
        patch.setenv("MANIFOLD_CLUSTER", f"t{secrets.token_hex(4)}")
        cluster = TestCluster(4, dict(os.environ))
        yield cluster
        cluster.close()


@pytest.fixture
def executor() -> Iterator[manifold.Executor]:
    with manifold.Executor() as executor:
        yield executor
    assert not connections(), "the executor left its connection behind"


def connections() -> list[str]:
    """Those of this process that the module's cluster fixture did not make."""
    return [t.name for t in threading.enumerate() if t.name == "manifold-client"]


def eventually(condition: Any) -> None:
    deadline_s = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come about"
        threading.Event().wait(0.01)


class Odd(Exception):
    """A user's own, with arguments that pickle does not guess."""

    def __init__(self, number: int, *, why: str) -> None:
        super().__init__(f"{number} is odd: {why}")
        self.number = number
        self.why = why

    def __reduce__(self) -> Any:
        return (_odd, (self.number, self.why))


def _odd(number: int, why: str) -> Odd:
    return Odd(number, why=why)


def half(number: int) -> int:
    if number % 2:
        raise Odd(number, why="it has no half")  # here
    return number // 2


# -- what comes back ------------------------------------------------------------------------------


def test_an_exception_comes_back_as_itself_with_the_remote_traceback(
    executor: manifold.Executor,
) -> None:
    with pytest.raises(Odd, match="7 is odd") as caught:
        executor.submit(half, 7).result(SOON_S)
    assert (caught.value.number, caught.value.why) == (7, "it has no half")
    assert type(caught.value.__cause__) is manifold.RemoteTraceback
    assert 'raise Odd(number, why="it has no half")  # here' in str(caught.value.__cause__)


def test_a_builtin_exception_keeps_its_type_and_its_arguments(executor: manifold.Executor) -> None:
    error = executor.submit({}.__getitem__, "key").exception(SOON_S)
    assert type(error) is KeyError
    assert error.args == ("key",)


def test_sys_exit_in_a_call_is_its_result_and_ends_nothing(executor: manifold.Executor) -> None:
    error = executor.submit(sys.exit, 3).exception(SOON_S)
    assert type(error) is SystemExit
    assert error.code == 3
    assert executor.submit(half, 4).result(SOON_S) == 2


def test_a_generator_argument_fails_its_future_and_says_why(executor: manifold.Executor) -> None:
    future = executor.submit(sum, (n for n in range(3)))
    error = future.exception(SOON_S)
    assert isinstance(error, TypeError | pickle.PicklingError)
    assert "generator" in str(error)
    assert executor.submit(sum, [1, 2]).result(SOON_S) == 3


def test_a_result_that_cannot_be_sent_fails_its_future_and_says_why(
    executor: manifold.Executor,
) -> None:
    error = executor.submit(lambda: (n for n in range(3))).exception(SOON_S)
    assert isinstance(error, TypeError | pickle.PicklingError)
    assert "generator" in str(error)
    assert executor.submit(half, 4).result(SOON_S) == 2


def test_ten_thousand_futures_submitted_one_by_one(executor: manifold.Executor) -> None:
    futures = [executor.submit(half, 2 * n) for n in range(10_000)]
    assert [future.result(60) for future in futures] == list(range(10_000))


def test_a_large_argument_and_a_large_result(executor: manifold.Executor) -> None:
    data = os.urandom(20 << 20)
    assert executor.submit(bytes.upper, data).result(SOON_S) == data.upper()


# -- map ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunksize", [0, 1, 7, 1000])
def test_map_keeps_order_whatever_the_chunks(executor: manifold.Executor, chunksize: int) -> None:
    found = executor.map(pow, range(500), [2] * 501, chunksize=chunksize)
    assert list(found) == [n * n for n in range(500)]


def test_map_takes_generators(executor: manifold.Executor) -> None:
    assert list(executor.map(half, (2 * n for n in range(50)))) == list(range(50))
    assert list(executor.map(half, ())) == []


def test_map_sends_five_thousand_small_calls_in_few_messages(executor: manifold.Executor) -> None:
    began = time.monotonic()
    assert sum(executor.map(half, range(0, 10_000, 2))) == sum(range(5000))
    assert time.monotonic() - began < SOON_S


@pytest.mark.parametrize("chunksize", [1, 2, 3, 100])
def test_map_yields_what_came_before_a_failure_and_then_fails_as_the_call_did(
    executor: manifold.Executor, chunksize: int
) -> None:
    results = executor.map(half, [2, 4, 5, 6], chunksize=chunksize)
    assert [next(results), next(results)] == [1, 2]
    with pytest.raises(Odd, match="5 is odd") as caught:
        next(results)
    assert str(caught.value.__cause__).count("File ") == 1, "no frame of ours"
    assert 'raise Odd(number, why="it has no half")  # here' in str(caught.value.__cause__)
    assert list(results) == []


class Secret(Exception):
    """One that cannot be sent."""

    def __reduce__(self) -> Any:
        raise TypeError("secret")


def tell(number: int) -> int:
    if number == 3:
        raise Secret("of three")
    return number


@pytest.mark.parametrize("chunksize", [1, 10])
def test_an_exception_that_cannot_be_sent_arrives_as_text(
    executor: manifold.Executor, chunksize: int
) -> None:
    results = executor.map(tell, range(5), chunksize=chunksize)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(manifold.RemoteError, match="Secret: of three") as caught:
        next(results)
    assert 'raise Secret("of three")' in str(caught.value.__cause__)


def test_map_gives_up_at_its_timeout_and_cancels_the_rest() -> None:
    executor = manifold.Executor(1)
    results = executor.map(time.sleep, [0, 20, 20, 20], timeout=3)
    assert next(results) is None
    with pytest.raises(TimeoutError):
        next(results)
    began = time.monotonic()
    executor.kill_workers()  # it slept still; what had not begun must not begin
    executor.shutdown()
    assert time.monotonic() - began < 10


# -- workers --------------------------------------------------------------------------------------


def nap(seconds: float) -> tuple[float, float]:
    began = time.monotonic()
    time.sleep(seconds)
    return began, time.monotonic()


def test_no_more_calls_run_at_a_time_than_max_workers() -> None:
    with manifold.Executor(2) as executor:
        naps = list(executor.map(nap, [0.1] * 8, chunksize=1))
    for began, _ in naps:
        assert sum(other <= began < end for other, end in naps) <= 2


def test_as_many_calls_run_at_a_time_as_the_cluster_has_slots(
    executor: manifold.Executor, cluster: TestCluster
) -> None:
    assert executor._max_workers >= len(cluster.aliases)
    executor.submit(nap, 0).result(SOON_S)
    naps = list(executor.map(nap, [1.0] * executor._max_workers, chunksize=1))
    assert max(sum(o <= began < end for o, end in naps) for began, _ in naps) >= 2


def test_a_process_that_dies_fails_its_own_call_and_no_other(executor: manifold.Executor) -> None:
    futures = [executor.submit(os._exit, 3) if n == 25 else executor.submit(half, 2 * n)
               for n in range(50)]  # fmt: skip
    with pytest.raises(ProcessDied):
        futures[25].result(SOON_S)
    others = [future.result(SOON_S) for n, future in enumerate(futures) if n != 25]
    assert others == [n for n in range(50) if n != 25]
    assert executor.submit(half, 4).result(SOON_S) == 2


MARKS: dict[str, int] = {}


def mark(name: str, value: int) -> None:
    sys.modules["__main__"].__dict__[name] = value


def read_mark(name: str) -> int:
    value = sys.modules["__main__"].__dict__[name]
    assert isinstance(value, int)
    return value


def test_the_initializer_runs_before_the_first_call_of_every_process() -> None:
    with manifold.Executor(4, initializer=mark, initargs=("mark", 41)) as executor:
        futures = [executor.submit(read_mark, "mark") for _ in range(20)]
        assert {future.result(SOON_S) for future in futures} == {41}


def test_an_initializer_that_fails_breaks_the_executor(caplog: pytest.LogCaptureFixture) -> None:
    with manifold.Executor(2, initializer=half, initargs=(1,)) as executor:
        futures = [executor.submit(half, 2) for _ in range(4)]
        for future in futures:
            with pytest.raises(concurrent.futures.BrokenExecutor):
                future.result(SOON_S)
        with pytest.raises(concurrent.futures.BrokenExecutor, match="it has no half"):
            executor.submit(half, 2)
    told = [record for record in caplog.records if record.name == "concurrent.futures"]
    assert len(told) == 1, "once"
    assert told[0].exc_info is not None
    assert "1 is odd: it has no half" in str(told[0].exc_info[1])


def nested(number: int) -> int:
    with manifold.Executor() as executor:
        return sum(executor.map(half, range(0, 2 * number, 2), chunksize=1))


def test_calls_may_submit_calls_of_their_own(executor: manifold.Executor) -> None:
    """More of them than there are slots: a call that waits for others lends its own."""
    count = executor._max_workers + 3
    futures = [executor.submit(nested, 5) for _ in range(count)]
    assert [future.result(60) for future in futures] == [10] * count


# -- the end --------------------------------------------------------------------------------------


def test_nothing_is_accepted_after_shutdown(executor: manifold.Executor) -> None:
    executor.shutdown()
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        executor.submit(half, 2)
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        executor.map(half, [2])
    executor.shutdown()


def test_shutdown_waits_for_what_was_submitted() -> None:
    executor = manifold.Executor(2)
    futures = [executor.submit(time.sleep, 0.1) for _ in range(6)]
    executor.shutdown()
    assert all(future.done() and not future.cancelled() for future in futures)
    assert not connections()


def test_shutdown_without_waiting_returns_at_once_and_finishes_the_work() -> None:
    executor = manifold.Executor(2)
    executor.submit(half, 2).result(SOON_S)
    futures = [executor.submit(time.sleep, 1) for _ in range(4)]
    began = time.monotonic()
    executor.shutdown(wait=False)
    assert time.monotonic() - began < 0.5
    assert [future.result(SOON_S) for future in futures] == [None] * 4
    eventually(lambda: not connections())


def test_an_executor_that_is_dropped_finishes_its_work_and_closes() -> None:
    executor = manifold.Executor(2)
    futures = [executor.submit(half, 2 * n) for n in range(20)]
    del executor
    assert [future.result(SOON_S) for future in futures] == list(range(20))
    eventually(lambda: not connections())


def test_cancel_futures_cancels_what_has_not_begun() -> None:
    executor = manifold.Executor(2)
    futures = [executor.submit(time.sleep, 0.3) for _ in range(40)]
    eventually(lambda: any(future.running() or future.done() for future in futures))
    executor.shutdown(cancel_futures=True)
    cancelled = sum(future.cancelled() for future in futures)
    assert all(future.done() for future in futures)
    assert 20 < cancelled < 40


def test_kill_workers_ends_what_runs() -> None:
    executor = manifold.Executor(2)
    futures = [executor.submit(time.sleep, 300) for _ in range(6)]
    eventually(lambda: any(future.running() for future in futures))
    began = time.monotonic()
    executor.kill_workers()
    executor.shutdown()
    assert time.monotonic() - began < SOON_S
    assert all(future.cancelled() or future.exception() for future in futures)


def test_a_client_that_is_given_stays_open(cluster: TestCluster) -> None:
    with manifold.connect() as client:
        for _ in range(2):
            with manifold.Executor(2, client=client) as executor:
                assert executor.submit(half, 2).result(SOON_S) == 1
        assert client.nodes()
        with pytest.raises(ValueError, match="a client has a cluster already"):
            manifold.Executor(client=client, up=2)


def test_the_event_loop_of_asyncio_takes_it_for_an_executor(executor: manifold.Executor) -> None:
    async def main() -> list[int]:
        loop = asyncio.get_running_loop()
        calls = [loop.run_in_executor(executor, half, 2 * n) for n in range(10)]
        return list(await asyncio.gather(*calls))

    assert asyncio.run(main()) == list(range(10))


def test_an_executor_cannot_be_sent_to_a_call(executor: manifold.Executor) -> None:
    with pytest.raises(TypeError, match="the call can make one of its own"):
        pickle.dumps(executor)


def leave(executor: manifold.Executor) -> None:
    with executor, pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(half, 2)


def test_a_forked_child_neither_uses_nor_waits_for_its_parents_executor(
    executor: manifold.Executor,
) -> None:
    future = executor.submit(time.sleep, 2)
    child = multiprocessing.get_context("fork").Process(target=leave, args=(executor,))
    child.start()
    child.join(SOON_S)
    assert child.exitcode == 0
    assert executor.submit(half, 4).result(SOON_S) == 2
    assert future.result(SOON_S) is None


def test_an_executor_whose_client_was_closed_ends_all_the_same() -> None:
    client = manifold.connect()
    executor = manifold.Executor(2, client=client)
    futures = [executor.submit(time.sleep, 1) for _ in range(10)]
    eventually(lambda: futures[0].running())
    client.close()
    executor.shutdown(cancel_futures=True)
    assert all(future.done() for future in futures)
    executor.kill_workers()


class Unreadable:
    """Sent without trouble; raises where it is read."""

    def __reduce__(self) -> Any:
        return (half, (1,))

    def __call__(self) -> None:
        raise AssertionError("it was never made")


def test_a_function_that_cannot_be_read_there_fails_each_of_its_calls_with_the_reason() -> None:
    with manifold.Executor(1) as executor:
        function = Unreadable()
        futures = [executor.submit(function) for _ in range(3)]
        assert [type(future.exception(SOON_S)) for future in futures] == [Odd] * 3
        assert executor.submit(half, 4).result(SOON_S) == 2


# -- programs -------------------------------------------------------------------------------------

INTERRUPTED = """
import time
import manifold

with manifold.Executor() as executor:
    executor.submit(pow, 2, 2).result()
    futures = [executor.submit(time.sleep, 300) for _ in range(50)]
    while not futures[0].running():
        time.sleep(0.01)
    print("ready", flush=True)
    futures[0].result()
"""
LEFT_RUNNING = INTERRUPTED.replace("with manifold.Executor() as executor:", "executor = "
                                   "manifold.Executor()\nif True:")  # fmt: skip


@pytest.mark.parametrize("script", [INTERRUPTED, LEFT_RUNNING], ids=["with", "without"])
def test_ctrl_c_ends_the_program_and_what_it_ran(cluster: TestCluster, script: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        began = time.monotonic()
        program.send_signal(signal.SIGINT)
        _, errors = program.communicate(timeout=SOON_S)
        took_s = time.monotonic() - began
    assert program.returncode != 0
    assert errors.rstrip().endswith("KeyboardInterrupt"), errors
    assert took_s < 5  # a second on a quiet machine
    with contextlib.closing(cluster.client()) as client:
        eventually(lambda: not client.processes().processes)


UNFINISHED = """
import time
import manifold

def slow(n):
    time.sleep(0.2)
    print(n, flush=True)

executor = manifold.Executor(2)
for n in range(6):
    executor.submit(slow, n)
"""


def test_the_interpreter_finishes_what_was_submitted_before_it_exits() -> None:
    done = subprocess.run(
        [sys.executable, "-c", UNFINISHED], capture_output=True, text=True, timeout=60, check=True
    )
    assert sorted(done.stdout.split()) == ["0", "1", "2", "3", "4", "5"]
    assert done.stderr == ""


def test_the_example_prints_what_its_header_says() -> None:
    path = ROOT / "examples" / "executor.py"
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, timeout=90, check=True
    )
    header = next(line for line in path.read_text().splitlines() if "prints" in line)
    assert done.stdout.strip() == header.split("prints ")[1]
