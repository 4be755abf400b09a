"""Calls that go wrong as nobody plans for: everybody who waits is told, and nothing is lost."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import manifold
from manifold.kernel.process.messages import Value
from manifold.kernel.scheduler.messages import JobSpec, JobStatus, ResultPart
from manifold.kernel.tasks.messages import Parcel
from manifold.shells.sdk.client import Client
from manifold.shells.sdk.jobs import Awaited, Job, Jobs
from manifold.tools.emulator.testing import TestCluster
from manifold.vm.kid import kid_of

CLASSES = "classes:\n  server: {count: 2, cores: 2, memory: 2GiB}\n"
SOON_S = 10.0
ROOT = Path(__file__).parents[2]
PAUSE = threading.Event()  # never set


@pytest.fixture
def start(
    manifold_clusters: Callable[..., TestCluster], tmp_path: Path
) -> Callable[..., TestCluster]:
    def started(nodes: int = 1) -> TestCluster:
        config = tmp_path / "manifold.yaml"
        config.write_text(CLASSES)
        return manifold_clusters(nodes, config=config)

    return started


@pytest.fixture
def client(start: Callable[..., TestCluster]) -> Client:
    return start().client()


def until(condition: Callable[[], Any], what: str, seconds: float = SOON_S) -> None:
    deadline_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline_s, f"in vain: {what}"
        PAUSE.wait(0.02)


def nap(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


# -- calls that nobody hears of -------------------------------------------------------------------


def test_who_waits_for_a_call_that_is_cancelled_while_it_runs_is_told(client: Client) -> None:
    future = client.submit(nap, 60)
    until(lambda: client.processes().processes, "it runs")
    assert future.cancel()
    assert future in wait([future], SOON_S).done


def test_a_progress_bar_ends_when_its_job_is_killed(client: Client) -> None:
    """`manifold run` waits in this way, and never returns."""
    seen = threading.Event()
    loop = str(ROOT / "examples" / "collatz.ent")

    def run() -> None:
        with pytest.raises(CancelledError):
            client.parallel_for(loop, 1, 1 << 40, reduce="sum", progress=lambda _: seen.set())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert seen.wait(SOON_S)
    client.kill(next(job.job for job in client.jobs().jobs if job.state == "running"))
    thread.join(SOON_S)
    assert not thread.is_alive()


def test_what_cannot_be_printed_here_does_not_lose_the_call(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert client.submit(print, "é").result(SOON_S) is None


@dataclass(frozen=True, slots=True)
class Frozen(Exception):
    code: int


def raise_frozen() -> None:
    raise Frozen(3)


def test_an_exception_that_takes_no_cause_is_raised_all_the_same(client: Client) -> None:
    with pytest.raises(Frozen):
        client.submit(raise_frozen).result(SOON_S)


def test_a_folder_whose_name_is_no_text_does_not_hang_calls(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = os.fsencode(tmp_path) + b"/\xff"
    os.mkdir(folder)
    monkeypatch.chdir(os.fsdecode(folder))
    assert client.submit(pow, 2, 3).result(SOON_S) == 8


def test_results_that_are_fetched_while_the_job_ends_go_to_their_own_calls() -> None:
    values = [Value(Parcel(b"%d" % number)) for number in range(8)]
    got: dict[int, bytes] = {}

    class Waits(Awaited):
        def progress(self, status: JobStatus) -> None:
            return None

        def failed(self, error: BaseException) -> None:
            raise error

        def cancelled(self) -> None:
            raise AssertionError("nobody cancelled it")

        def some(self, first: int, results: Sequence[Any]) -> None:
            got.update({at: each.parcel.data for at, each in enumerate(results, first)})

        def done(self, status: JobStatus, first: int, results: Sequence[Any]) -> None:
            self.some(first, results)

    class Connection:
        cluster = "none"

        def __init__(self) -> None:
            self.loop = asyncio.get_running_loop()
            self.asked: list[asyncio.Future[Any]] = []

        def ask_now(self, body: Any, timeout_ms: float) -> asyncio.Future[Any]:
            self.request(body).set_result(status("running", 0))
            return self.asked.pop()

        def request(self, body: Any) -> asyncio.Future[Any]:
            self.asked.append(self.loop.create_future())
            return self.asked[-1]

    spec = JobSpec(kid_of(b""), 0, 8, "collect", isolate=True)
    job = Job(spec, b"", Waits())

    def status(state: Any, done: int, parts: int = 0) -> JobStatus:
        return JobStatus(job.job, state, "", "", kid_of(b""), done, 8, 1.0, 1, 0, parts=parts)

    async def main() -> None:
        connection = Connection()
        jobs = Jobs(connection)  # type: ignore[arg-type]
        jobs.start(job)
        for news in (None, status("running", 3), status("done", 8, 8)):
            if news is not None:
                jobs.pushed(news)
            for _ in range(5):
                await asyncio.sleep(0)
        some, every = connection.asked
        some.set_result(ResultPart(0, tuple(values[:3])))
        for _ in range(5):
            await asyncio.sleep(0)
        every.set_result(ResultPart(0, tuple(values)))
        await job.finished.wait()

    asyncio.run(main())
    assert got == {at: b"%d" % at for at in range(8)}


# -- nodes that die, calls that run twice ---------------------------------------------------------


def test_a_call_that_forks_and_returns_twice_does_not_end_its_node(client: Client) -> None:
    before = [(node.pid, node.boot) for node in client.nodes()]
    client.submit(os.fork).result(SOON_S)
    until(lambda: client.submit(pow, 2, 3).result(3 * SOON_S) == 8, "another call", 60)
    assert [(node.pid, node.boot) for node in client.nodes()] == before


def begin(path: str) -> None:
    with open(path, "a") as file:
        file.write("begun\n")
    time.sleep(2)


def test_an_idle_worker_that_dies_does_not_let_a_call_run_twice(
    client: Client, tmp_path: Path
) -> None:
    client.parallel_for(str(ROOT / "examples" / "collatz.ent"), 1, 200_000, reduce="sum")
    workers = client.nodes()[0].workers
    log = tmp_path / "log"
    future = client.submit(begin, str(log))
    until(log.exists, "the call has begun")
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    future.result(SOON_S)
    assert log.read_text() == "begun\n"


def test_a_client_whose_node_died_while_it_was_idle_maps_through_another(
    start: Callable[..., TestCluster],
) -> None:
    cluster = start(2)
    client = cluster.client()
    assert client.map(abs, [1, 2]) == [1, 2]
    cluster.kill(client.node)
    assert client.map(abs, [1, 2]) == [1, 2]


# -- what stays behind ----------------------------------------------------------------------------


def test_calls_that_were_all_cancelled_leave_their_slots_though_they_share_a_job(
    client: Client,
) -> None:
    wait([client.submit(nap, 0) for _ in range(300)])
    futures = [client.submit(nap, 20) for _ in range(40)]
    until(lambda: client.processes().processes, "they run")
    assert all(future.cancel() for future in futures)
    assert client.submit(nap, 0).result(SOON_S) == 0


def spawn(path: str) -> None:
    child = subprocess.Popen(["sleep", "60"])
    Path(path).write_text(str(child.pid))
    child.wait()


def test_what_a_cancelled_call_has_started_is_gone(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "pid"
    future = client.submit(spawn, str(path))
    until(lambda: path.exists() and path.read_text(), "it has a child")
    child = int(path.read_text())
    future.cancel()
    try:
        until(lambda: not Path(f"/proc/{child}").exists(), "the child is gone")
    finally:
        if Path(f"/proc/{child}").exists():
            os.kill(child, signal.SIGKILL)


def test_the_file_of_a_large_argument_goes_when_its_call_is_done(client: Client) -> None:
    client.submit(len, os.urandom(1 << 20)).result(SOON_S)
    assert not list(Path(client.folder()).iterdir())


def test_a_map_writes_what_its_function_captured_once(client: Client) -> None:
    large = bytearray(1 << 20)
    client.map(lambda at: large[at], range(100))
    assert len(list(Path(client.folder()).iterdir())) <= 1


# -- what does not hold ---------------------------------------------------------------------------


def test_an_executor_may_have_thousands_of_workers(client: Client) -> None:
    with manifold.Executor(3000, client=client) as executor:
        futures = [executor.submit(nap, 0) for _ in range(3000)]
        assert [future.result(60) for future in futures] == [0] * 3000


SETTINGS = types.ModuleType("settings_of_nobody_else")


def test_a_module_that_is_sent_by_value_is_sent_as_it_is_then(client: Client) -> None:
    def setting() -> int:
        return int(SETTINGS.x)

    SETTINGS.__dict__["x"] = 1
    assert client.submit(setting).result(SOON_S) == 1
    SETTINGS.__dict__["x"] = 2
    assert client.submit(setting).result(SOON_S) == 2
