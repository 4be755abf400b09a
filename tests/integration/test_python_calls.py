"""Ordinary Python functions on a cluster: real nodes, real task processes."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import manifold
from manifold.kernel import places
from manifold.shells.sdk.client import Client
from manifold.tools.emulator.testing import TestCluster

CLASSES = "classes:\n  server: {count: 2, cores: 2, memory: 2GiB}\n"
PATIENCE_S = 60.0
ROOT = Path(__file__).parents[2]


@pytest.fixture
def start(
    manifold_clusters: Callable[..., TestCluster], tmp_path: Path
) -> Callable[..., TestCluster]:
    """A cluster of two nodes with two slots each, of whole cores."""

    def started(nodes: int = 2, **options: Any) -> TestCluster:
        config = tmp_path / "manifold.yaml"
        config.write_text(CLASSES)
        return manifold_clusters(nodes, config=config, **options)

    return started


@pytest.fixture
def cluster(start: Callable[..., TestCluster]) -> TestCluster:
    return start()


@pytest.fixture
def client(cluster: TestCluster) -> Client:
    return cluster.client()


def until(condition: Callable[[], Any], what: str) -> None:
    """Wait for what the cluster does by itself; it has no event that a test could wait for."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"in vain: {what}"
        os.sched_yield()


def running(client: Client) -> list[str]:
    return [job.job for job in client.jobs().jobs if job.state == "running"]


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


# -- where calls run ------------------------------------------------------------------------------


def test_a_function_runs_in_a_process_that_is_neither_ours_nor_a_nodes(
    client: Client, cluster: TestCluster
) -> None:
    pid = client.submit(os.getpid).result(PATIENCE_S)
    assert pid not in {os.getpid(), *(cluster.pid(alias) for alias in cluster.aliases)}
    assert pid in {each for node in client.nodes() for each in node.workers}


def test_processes_stay_warm_and_are_used_again(client: Client) -> None:
    pids = {client.submit(os.getpid).result(PATIENCE_S) for _ in range(50)}
    assert len(pids) <= 4  # one for each slot at most


def test_calls_run_at_the_same_time_in_every_slot(client: Client, tmp_path: Path) -> None:
    def meet(name: int) -> int:
        """Everybody is here at once, or nobody ever leaves."""
        (tmp_path / str(name)).touch()
        while len(list(tmp_path.iterdir())) < 4:
            os.sched_yield()
        return name

    futures = [client.submit(meet, name) for name in range(4)]
    assert [future.result(PATIENCE_S) for future in futures] == [0, 1, 2, 3]


def test_two_clients_do_not_share_processes(client: Client, cluster: TestCluster) -> None:
    def remember(value: int) -> int:
        os.environ["SEEN"] = os.environ.get("SEEN", "") + str(value)
        return int(os.environ["SEEN"])

    assert client.submit(remember, 1).result(PATIENCE_S) == 1
    assert cluster.client().submit(remember, 2).result(PATIENCE_S) == 2


def test_a_module_of_the_clients_folder_is_found_and_read_anew_by_the_next_client(
    cluster: TestCluster, tmp_path: Path
) -> None:
    module = tmp_path / "mine.py"
    script = (
        "import sys, manifold\nsys.path.insert(0, sys.argv[1])\nimport mine\n"
        "with manifold.connect() as m:\n    print(m.submit(mine.answer).result(60))\n"
    )
    for value in (41, 42):
        module.write_text(f"def answer():\n    return {value}\n" + "#" * value)
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)],
            env=dict(cluster.environ), capture_output=True, text=True, timeout=PATIENCE_S,
        )  # fmt: skip
        assert done.stdout == f"{value}\n", done.stderr


def test_the_working_folder_is_the_clients(client: Client) -> None:
    assert client.submit(os.getcwd).result(PATIENCE_S) == os.getcwd()


def test_what_a_function_reads_is_taken_as_it_is_when_it_is_submitted(client: Client) -> None:
    factor = 2

    def times(value: int) -> int:
        return value * factor

    doubled = client.submit(times, 21)
    factor = 3
    assert (doubled.result(PATIENCE_S), client.submit(times, 21).result(PATIENCE_S)) == (42, 63)


# -- values ---------------------------------------------------------------------------------------


def test_arrays_come_and_go_and_may_be_changed_in_place(client: Client) -> None:
    def double(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        values *= 2
        return values

    values = np.arange(1_000_000.0)
    result = client.submit(double, values).result(PATIENCE_S)
    assert np.array_equal(result, 2 * np.arange(1_000_000.0))
    assert values[1] == 1.0
    result[0] = 7.0
    assert not result.flags.owndata  # it lies where the task process has put it


def test_a_result_of_200_mb_arrives_and_leaves_nothing_behind(
    client: Client, cluster: TestCluster
) -> None:
    def many(count: int) -> tuple[np.ndarray[Any, Any], bytes]:
        return np.ones(count), b"x" * 1_000_000

    ones, text = client.submit(many, 25_000_000).result(PATIENCE_S)
    assert (ones.sum(), len(text)) == (25_000_000, 1_000_000)
    spool = places.spool_dir(cluster.name, cluster.environ)
    assert [path for path in spool.rglob("*") if path.is_file()] == []
    client.close()
    assert list(spool.iterdir()) == []


def test_ten_thousand_futures_submitted_one_by_one_give_their_own_results(client: Client) -> None:
    futures = [client.submit(divmod, number, 7) for number in range(10_000)]
    assert [f.result(PATIENCE_S) for f in futures] == [divmod(n, 7) for n in range(10_000)]


def test_five_thousand_small_calls_are_not_five_thousand_jobs(client: Client) -> None:
    assert client.map(abs, range(-5000, 0)) == list(range(5000, 0, -1))
    futures = [client.submit(abs, -number) for number in range(5000)]
    assert [future.result(PATIENCE_S) for future in futures] == list(range(5000))
    assert len({future.job for future in futures}) < 500


def test_results_come_as_they_are_done_also_of_calls_that_were_thought_short(
    client: Client, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"

    def call(number: int, gate: Path | None) -> int:
        while gate is not None and not gate.exists():
            os.sched_yield()
        return number

    for _ in range(3):
        list(client.map(call, range(100), [None] * 100, chunksize=1))
    futures = [client.submit(call, n, gate if n >= 64 else None) for n in range(128)]
    done = concurrent.futures.wait(futures[:8], PATIENCE_S)
    assert not done.not_done
    gate.touch()
    assert [future.result(PATIENCE_S) for future in futures] == list(range(128))


def test_map_and_reduce_keep_the_order(client: Client) -> None:
    assert client.map(pow, [2, 3, 4], [5, 6, 7]) == [32, 729, 16384]
    assert client.map(str, iter(range(1000)), chunksize=7) == [str(n) for n in range(1000)]
    assert client.reduce(lambda left, right: left + right, [str(n) for n in range(500)]) == "".join(
        str(n) for n in range(500)
    )
    assert client.map(str, []) == []
    with pytest.raises(TypeError, match="empty sequence"):
        client.reduce(max, [])


def test_a_kernel_is_mapped_and_submitted_like_a_function(client: Client) -> None:
    @manifold.kernel
    def square(n: int) -> int:
        return n * n

    assert client.map(square, range(10)) == [n * n for n in range(10)]
    assert client.map(square, [3, 1, 2]) == [9, 1, 4]
    assert client.submit(square, 5).result(PATIENCE_S) == 25


# -- what is printed ------------------------------------------------------------------------------


def test_what_a_call_prints_appears_at_the_client(
    client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    def speak() -> None:
        print("out")
        print("err", file=sys.stderr)
        subprocess.run(["echo", "from a subprocess"], check=True)

    client.submit(speak).result(PATIENCE_S)
    printed = capsys.readouterr()
    assert set(printed.out.split("\n")) == {"out", "from a subprocess", ""}
    assert printed.err == "err\n"


def test_of_too_much_printed_the_beginning_and_the_end_are_kept(
    client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    def babble() -> None:
        print("first")
        print("x" * 1_000_000)
        print("last")

    client.submit(babble).result(PATIENCE_S)
    printed = capsys.readouterr().out
    assert printed.startswith("first\n") and printed.endswith("last\n")
    assert "bytes are left out" in printed and len(printed) < 140_000


# -- exceptions -----------------------------------------------------------------------------------


class Odd(Exception):
    """Pickles, but cannot be read again: its arguments are not those of its base."""

    def __init__(self, left: int, right: int) -> None:
        super().__init__(f"{left} and {right}")


def test_an_exception_keeps_its_type_its_message_and_its_remote_traceback(client: Client) -> None:
    def fail() -> None:
        raise KeyError("the message")

    with pytest.raises(KeyError, match="the message") as caught:
        client.submit(fail).result(PATIENCE_S)
    cause = caught.value.__cause__
    assert isinstance(cause, manifold.RemoteTraceback)
    assert "test_python_calls.py" in str(cause) and 'raise KeyError("the message")' in str(cause)
    assert "calling.py" not in str(cause)  # the user's frames only


def test_an_exception_that_cannot_be_read_here_is_told_in_words(client: Client) -> None:
    def fail() -> None:
        raise Odd(1, 2)

    with pytest.raises(manifold.RemoteError, match="Odd: 1 and 2"):
        client.submit(fail).result(PATIENCE_S)


def test_a_result_that_cannot_be_pickled_says_so(client: Client) -> None:
    def count() -> Iterator[int]:
        yield 1

    with pytest.raises(Exception, match="count returned a generator, which cannot be sent back"):
        client.submit(count).result(PATIENCE_S)
    assert client.submit(abs, -1).result(PATIENCE_S) == 1


def test_an_argument_that_cannot_be_pickled_is_the_futures_exception(client: Client) -> None:
    future = client.submit(sum, (number for number in range(3)))
    with pytest.raises(TypeError, match="generator"):
        future.result(PATIENCE_S)


# -- processes that die ---------------------------------------------------------------------------


def fall() -> None:
    import ctypes

    ctypes.string_at(0)


def leave() -> None:
    print("about to leave", file=sys.stderr, flush=True)
    os._exit(3)


@pytest.mark.parametrize(
    ("function", "how"), [(fall, r"(?s)SIGSEGV.*Segmentation fault.*in fall"), (leave, "status 3")]
)
def test_a_call_whose_process_dies_says_how_and_what_it_said_last(
    client: Client, function: Callable[[], None], how: str
) -> None:
    with pytest.raises(manifold.ProcessDied, match=how):
        client.submit(function).result(PATIENCE_S)


def test_a_process_that_dies_fails_its_own_call_and_none_is_made_twice(
    client: Client, tmp_path: Path
) -> None:
    log = tmp_path / "log"

    def call(number: int) -> int:
        with log.open("a") as file:
            file.write(f"{number}\n")
        if number % 50 == 49:
            os._exit(1)
        return number

    for _ in range(2):  # the second time they are known to be short, and share jobs
        log.write_text("")
        futures = [client.submit(call, number) for number in range(200)]
        concurrent.futures.wait(futures, PATIENCE_S)
        died = [n for n, f in enumerate(futures) if f.exception() is not None]
        assert died == [49, 99, 149, 199]
        assert sorted(map(int, log.read_text().split())) == list(range(200))


def test_a_call_that_wants_too_much_memory_gets_a_memory_error(client: Client) -> None:
    def hoard() -> int:
        return len(bytearray(8 << 30))

    with pytest.raises(MemoryError):
        client.submit(hoard).result(PATIENCE_S)
    assert client.submit(abs, -1).result(PATIENCE_S) == 1


def test_a_call_on_a_node_that_dies_is_made_again_elsewhere(
    start: Callable[..., TestCluster], tmp_path: Path
) -> None:
    cluster = start()
    client = cluster.client()

    def call() -> int:
        begun = tmp_path / str(os.getppid())
        begun.touch()
        while len(list(tmp_path.glob("again"))) == 0:
            os.sched_yield()
        return 7

    futures = [client.submit(call) for _ in range(4)]
    until(lambda: len(client.processes().processes) == 4, "every slot is taken")
    victim = next(alias for alias in cluster.aliases if alias != client.node)
    pids = [p.pid for p in client.processes().processes if p.node == victim]
    assert len(pids) == 2
    cluster.kill(victim)
    until(lambda: not any(map(alive, pids)), "the task processes end with their node")
    (tmp_path / "again").touch()
    assert [future.result(PATIENCE_S) for future in futures] == [7] * 4


def test_a_call_is_cancelled_also_on_a_node_that_was_slow_for_a_while(
    cluster: TestCluster, client: Client, tmp_path: Path
) -> None:
    def work(path: Path) -> None:
        path.touch()
        while True:
            os.sched_yield()

    future = client.submit(work, tmp_path / "begun")
    until((tmp_path / "begun").exists, "the call begins")
    slow = client.node
    cluster.pause(slow)
    until(lambda: client.node != slow, "the client takes its job to the other node")
    future.cancel()
    cluster.resume(slow)
    observer = cluster.client(slow)
    until(lambda: len([n for n in observer.nodes() if n.state == "ready"]) == 2, "both are back")
    until(lambda: not running(observer), "nobody has the job any more")
    assert not observer.processes().processes


# -- calls within calls ---------------------------------------------------------------------------


def test_calls_that_wait_for_calls_of_their_own_lend_their_slots(client: Client) -> None:
    def outer(depth: int) -> int:
        if depth == 0:
            return 1
        with manifold.connect() as m:
            return sum(future.result() for future in [m.submit(outer, depth - 1)] * 2)

    futures = [client.submit(outer, 2) for _ in range(6)]  # more than there are slots
    assert [future.result(PATIENCE_S) for future in futures] == [4] * 6


# -- the end of things ----------------------------------------------------------------------------


def test_a_call_that_waits_its_turn_is_cancelled_here(client: Client, tmp_path: Path) -> None:
    def wait(gate: Path) -> None:
        while not gate.exists():
            os.sched_yield()

    gate = tmp_path / "gate"
    running = [client.submit(wait, gate) for _ in range(4)]
    waiting = client.submit(abs, -1)
    assert waiting.cancel() and waiting.cancelled()
    gate.touch()
    concurrent.futures.wait(running, PATIENCE_S)


def test_a_call_that_runs_is_cancelled_within_a_second_and_may_clean_up(
    client: Client, tmp_path: Path
) -> None:
    def work() -> None:
        (tmp_path / "begun").write_text(str(os.getpid()))
        try:
            while True:
                os.sched_yield()
        finally:
            (tmp_path / "cleaned").touch()

    future = client.submit(work)
    begun = tmp_path / "begun"
    until(lambda: begun.exists() and begun.read_text(), "the call begins")
    pid = int(begun.read_text())
    began_s = time.monotonic()
    assert future.cancel()
    until(lambda: not alive(pid), "its process ends")
    assert time.monotonic() - began_s < 2.0  # one second, on a machine that is busy with others
    assert (tmp_path / "cleaned").exists()
    until(lambda: not running(client), "its job ends")
    with pytest.raises(concurrent.futures.CancelledError):
        future.result()


def test_a_call_that_ignores_being_cancelled_is_killed_with_what_it_started(
    client: Client, tmp_path: Path
) -> None:
    def work() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen(["sleep", "600"])
        (tmp_path / "pids.new").write_text(f"{os.getpid()} {child.pid}")
        (tmp_path / "pids.new").rename(tmp_path / "pids")
        child.wait()

    future = client.submit(work)
    until((tmp_path / "pids").exists, "the call begins")
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    future.cancel()
    until(lambda: not any(map(alive, pids)), "both end")


def test_map_cancels_the_rest_at_the_first_exception_and_at_its_timeout(
    client: Client, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"

    def call(number: int) -> int:
        if number == 0:
            raise ValueError("zero")
        while not gate.exists():
            os.sched_yield()
        return number

    with pytest.raises(ValueError, match="zero"):
        client.map(call, range(20), chunksize=1)
    until(lambda: not running(client), "the others end")
    with pytest.raises(TimeoutError, match="19 of 19 parts"):
        client.map(call, range(1, 20), chunksize=1, timeout_s=0.3)
    until(lambda: not running(client), "they end")


ENDLESS = """
import sys, time, manifold
def work(path):
    open(path, "w").close()
    while True:
        time.sleep(1)
with manifold.connect() as m:
    m.map(work, [sys.argv[1] + "/" + str(n) for n in range(8)], chunksize=1)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_what_a_client_has_begun_ends_with_it(
    cluster: TestCluster, tmp_path: Path, number: int
) -> None:
    began = tmp_path / "began"
    began.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(began)],
        env=dict(cluster.environ), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    observer = cluster.client()
    until(lambda: len(list(began.iterdir())) == 4, "every slot is at work")
    pids = [each.pid for each in observer.processes().processes]
    process.send_signal(number)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode != 0
    assert ("KeyboardInterrupt" in errors) == (number == signal.SIGINT)
    until(lambda: not running(observer), "its jobs end")
    until(lambda: not any(map(alive, pids)), "its processes end")
    spool = places.spool_dir(cluster.name, cluster.environ)
    until(lambda: not list(spool.iterdir()), "what it left is taken away")


def test_what_clients_and_their_cluster_left_when_both_were_killed_goes_with_the_next_one(
    start: Callable[..., TestCluster],
) -> None:
    cluster = start(1)
    spool = places.spool_dir(cluster.name, cluster.environ)
    cluster.close()
    (spool / ("C-" + "0" * 16)).mkdir(parents=True)
    again = TestCluster(1, cluster.environ)
    try:
        assert list(spool.iterdir()) == []
    finally:
        again.close()


def test_closing_a_client_tells_everybody_who_still_waits(
    cluster: TestCluster, tmp_path: Path
) -> None:
    def wait(path: Path) -> None:
        while not path.exists():
            os.sched_yield()

    client = cluster.client()
    futures = [client.submit(wait, tmp_path / "never") for _ in range(20)]
    futures.append(client.job(ROOT / "examples" / "forever.ent", 0, 10))
    client.close()
    for future in futures:
        with pytest.raises((manifold.Unavailable, concurrent.futures.CancelledError)):
            future.result(PATIENCE_S)
    with pytest.raises((manifold.Unavailable, RuntimeError)):
        client.submit(abs, 1)


def test_python_functions_can_be_off_while_programs_run(
    start: Callable[..., TestCluster],
) -> None:
    client = start(overrides={"tasks.python": "off"}).client()
    with pytest.raises(manifold.Refused, match="Python functions are off"):
        client.submit(abs, -1).result(PATIENCE_S)

    @manifold.kernel
    def square(n: int) -> int:
        return n * n

    assert client.submit(square, 4).result(PATIENCE_S) == 16


# -- coroutines -----------------------------------------------------------------------------------


def test_coroutines_await_calls_and_cancelling_them_cancels_these(
    cluster: TestCluster, tmp_path: Path
) -> None:
    def work(path: Path) -> None:
        path.touch()
        while True:
            os.sched_yield()

    async def main() -> None:
        async with manifold.connect_async(cluster.name, environ=cluster.environ) as m:
            assert await m.submit(abs, -4) == 4
            assert await m.map(str, range(100)) == [str(n) for n in range(100)]
            assert await m.reduce(max, range(100)) == 99
            with pytest.raises(ZeroDivisionError):
                await m.map(divmod, [1, 2], [1, 0], chunksize=1)
            endless = asyncio.ensure_future(m.map(work, [tmp_path / "begun"]))
            while not (tmp_path / "begun").exists():
                await asyncio.sleep(0)
            endless.cancel()
            with pytest.raises(asyncio.CancelledError):
                await endless
            while await asyncio.to_thread(running, m.client):
                await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))
