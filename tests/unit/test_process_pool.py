"""The pool against workers that misbehave: no process that does not listen can hold a slot."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from manifold.kernel.process import child, starving
from manifold.kernel.process import pool as pool_module
from manifold.kernel.process.messages import Compute, GlobalCall, GlobalDone, WorkerSpec
from manifold.kernel.process.pool import Pool
from manifold.kernel.process.zygote import Fork, Forked
from manifold.vm.kid import kid_of

WORKERS = {
    "asking": """
while True:
    size = end.recv(4, socket.MSG_WAITALL)
    if not size:
        break
    message = msgspec.msgpack.decode(end.recv(int.from_bytes(size, 'big'), socket.MSG_WAITALL))
    said = []
    if message[0] == 'w.compute':
        for run in (message[1], message[1] + 1000):
            said.append(['w.global', run, 1, 6, 0, 'add', 'count', False, 0, message[1]])
    elif message[0] == 'w.global-done':
        said.append(['w.ended', message[1], ['s.fault', 'answer', str(message[4])]])
    for each in said:
        body = msgspec.msgpack.encode(each)
        end.sendall(len(body).to_bytes(4, 'big') + body)
""",
    "deaf": "time.sleep(60)",
    "short": "sys.exit(3)",
    "garbage": "end.sendall(b'\\0\\0\\0\\2\\xc1\\xc1'); time.sleep(60)",
    "huge": "end.sendall(b'\\xff' * 8); time.sleep(60)",
    "obedient": """
while True:
    size = end.recv(4, socket.MSG_WAITALL)
    if not size:
        break
    message = msgspec.msgpack.decode(end.recv(int.from_bytes(size, 'big'), socket.MSG_WAITALL))
    if message[0] == 'w.abort':
        body = msgspec.msgpack.encode(['w.ended', message[1], None])
        end.sendall(len(body).to_bytes(4, 'big') + body)
""",
}


class FakeZygote(threading.Thread):
    """Answers requests for forks with processes of one kind of `WORKERS`."""

    def __init__(self, path: Path, kind: str, delay_s: float) -> None:
        super().__init__()
        self.kind = kind
        self.delay_s = delay_s
        self.specs: list[WorkerSpec] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen()

    def run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                message, fds, _, _ = socket.recv_fds(connection, 1 << 16, 4)
                if self.kind == "refuses":
                    os.close(fds[0])
                    continue
                request = msgspec.msgpack.decode(message, type=Fork)
                self.specs.append(msgspec.msgpack.decode(request.payload, type=WorkerSpec))
                time.sleep(self.delay_s)
                script = (
                    "import msgspec, socket, sys, time\n"
                    "end = socket.socket(fileno=int(sys.argv[1]))\n" + WORKERS[self.kind]
                )
                process = subprocess.Popen(
                    [sys.executable, "-c", script, str(fds[0])], pass_fds=fds
                )
                os.close(fds[0])
                self.processes.append(process)
                with suppress(BrokenPipeError):  # who asked has closed
                    connection.send(msgspec.msgpack.encode(Forked(process.pid)))

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.join()
        for process in self.processes:
            process.kill()
            process.wait()


class Told:
    """What the pool tells its node."""

    def __init__(self) -> None:
        self.ended: list[int] = []
        self.faults: list[object] = []
        self.calls: list[tuple[int, GlobalCall]] = []
        self.lost: list[tuple[int, str]] = []

    def run_blocks(self, *_: Any) -> None:
        return None

    def run_limited(self, slot: int, run: int, last: int) -> None:
        return None

    def run_ended(self, slot: int, run: int, fault: object) -> None:
        self.ended.append(run)
        self.faults.append(fault)

    def run_lost(self, slot: int, run: int, reason: str) -> None:
        self.lost.append((slot, reason))

    def global_call(self, slot: int, call: GlobalCall) -> None:
        self.calls.append((slot, call))


def compute(run: int) -> Compute:
    return Compute(run, kid_of(b"program"), b"ir", "sum", (), False, 0, 10, 1, 0, 10)


class Bench:
    def __init__(self, folder: Path, kind: str, delay_s: float = 0.0) -> None:
        self.path = folder / "zygote"
        self.zygote = FakeZygote(self.path, kind, delay_s)
        self.told = Told()

    def run(self, test: Callable[[Bench, Pool], Coroutine[Any, Any, None]]) -> None:
        async def inside() -> None:
            template = WorkerSpec("test-01", 0, 1 << 20, 5.0, 1.0, "", "")
            grace_ms = 20_000.0 if self.zygote.kind == "obedient" else 200.0
            pool = Pool(str(self.path), template, grace_ms, self.told)
            try:
                await test(self, pool)
            finally:
                pool.close()

        self.zygote.start()
        try:
            asyncio.run(inside())
        finally:
            self.zygote.close()

    async def until(self, condition: Callable[[], object], seconds: float = 20.0) -> None:
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.01)


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="mf-"))
    yield path
    shutil.rmtree(path)


def test_a_worker_that_ignores_an_abort_is_killed_and_the_next_run_gets_another(
    folder: Path,
) -> None:
    async def test(bench: Bench, pool: Pool) -> None:
        pool.compute(0, compute(1))
        await bench.until(lambda: pool.pids())
        pool.abort(0, 1)
        await bench.until(lambda: bench.told.lost)
        assert bench.told.lost[0][0] == 0
        assert "ignored being cancelled" in bench.told.lost[0][1]
        assert await asyncio.to_thread(bench.zygote.processes[0].wait) == -signal.SIGKILL
        pool.compute(0, compute(2))
        await bench.until(lambda: pool.pids())
        assert len(bench.zygote.processes) == 2

    Bench(folder, "deaf").run(test)


def test_a_worker_that_obeys_lives_on(folder: Path) -> None:
    async def test(bench: Bench, pool: Pool) -> None:
        for run in (1, 2, 3):
            pool.compute(0, compute(run))
            pool.abort(0, run)
            await bench.until(lambda run=run: run in bench.told.ended)  # type: ignore[misc]
        assert bench.told.lost == []
        assert len(bench.zygote.processes) == 1
        assert bench.zygote.specs[0].slot == 0

    Bench(folder, "obedient").run(test)


def test_a_call_of_a_global_goes_to_the_node_and_the_answer_to_the_run_that_waits(
    folder: Path,
) -> None:
    async def test(bench: Bench, pool: Pool) -> None:
        pool.compute(4, compute(1))
        pool.compute(5, compute(2))
        await bench.until(lambda: len(bench.told.calls) == 2)
        # A call of a run that was not started there (the worker makes one up) goes nowhere.
        assert sorted(bench.told.calls, key=lambda each: each[0]) == [
            (slot, GlobalCall(run, 1, 6, 0, "add", "count", False, 0, run))
            for slot, run in ((4, 1), (5, 2))
        ]
        for slot, run in ((9, 1), (5, 1), (4, 2), (4, 7)):
            pool.global_done(slot, GlobalDone(run, 1, True, 13))
        pool.global_done(5, GlobalDone(2, 1, True, 1 << 62))
        await bench.until(lambda: bench.told.ended == [2])
        pool.global_done(4, GlobalDone(1, 1, True, 0.5))
        await bench.until(lambda: bench.told.ended == [2, 1])
        assert [fault.message for fault in bench.told.faults] == [str(1 << 62), "0.5"]
        pool.global_done(4, GlobalDone(1, 1, True, 1))  # it has ended
        await asyncio.sleep(0.05)
        assert bench.told.ended == [2, 1]

    Bench(folder, "asking").run(test)


def test_a_worker_that_is_stopped_is_killed_for_its_silence(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "SILENCE_S", 0.5)

    async def test(bench: Bench, pool: Pool) -> None:
        pool.compute(0, compute(1))
        await bench.until(lambda: pool.pids())
        os.kill(pool.pids()[0], signal.SIGSTOP)
        await bench.until(lambda: bench.told.lost)
        assert "silent" in bench.told.lost[0][1]
        assert await asyncio.to_thread(bench.zygote.processes[0].wait) == -signal.SIGKILL

    Bench(folder, "obedient").run(test)


def test_a_worker_that_the_host_gives_no_processor_is_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "SILENCE_S", 0.8)
    monkeypatch.setattr(starving, "QUIET_S", 0.0)
    monkeypatch.setattr(starving, "queued_s", lambda pid: time.monotonic())  # it waits all the time

    async def test(bench: Bench, pool: Pool) -> None:
        pool.compute(0, compute(1))
        await bench.until(lambda: pool.pids())
        os.kill(pool.pids()[0], signal.SIGSTOP)
        await asyncio.sleep(2.0)
        assert bench.told.lost == []
        monkeypatch.setattr(starving, "queued_s", lambda pid: 0.0)
        await bench.until(lambda: bench.told.lost)
        assert "silent" in bench.told.lost[0][1]

    Bench(folder, "obedient").run(test)


def test_no_worker_is_waited_for_without_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "SILENCE_S", 0.5)
    monkeypatch.setattr(pool_module, "STARVED_S_MAX", 0.5)
    monkeypatch.setattr(starving, "queued_s", lambda pid: time.monotonic())

    async def test(bench: Bench, pool: Pool) -> None:
        pool.compute(0, compute(1))
        await bench.until(lambda: bench.told.lost)
        assert "silent" in bench.told.lost[0][1]

    Bench(folder, "deaf").run(test)


def test_waiting_for_a_processor_is_told_from_waiting_for_anything_else() -> None:
    """Two that compute on one core, and one that sleeps there."""
    core = min(os.sched_getaffinity(0))
    spin = f"import os; os.sched_setaffinity(0, [{core}])\nwhile True: pass"
    sleep = f"import os, time; os.sched_setaffinity(0, [{core}]); print(flush=True); time.sleep(60)"
    command = [sys.executable, "-c"]
    with (
        subprocess.Popen([*command, sleep], stdout=subprocess.PIPE) as asleep,
        subprocess.Popen([*command, spin]) as one,
        subprocess.Popen([*command, spin]) as other,
    ):
        try:
            assert asleep.stdout is not None and asleep.stdout.readline()
            begun_s = starving.queued_s(asleep.pid)
            deadline_s = time.monotonic() + 30.0
            while min(starving.queued_s(each.pid) for each in (one, other)) < 0.5:
                assert time.monotonic() < deadline_s
                time.sleep(0.05)
            assert starving.queued_s(asleep.pid) - begun_s < 0.5
        finally:
            for each in (asleep, one, other):
                each.kill()
    assert starving.queued_s(one.pid) == 0.0, "it has ended"


def test_an_idle_worker_may_be_silent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(bench: Bench, pool: Pool) -> None:
        pool.compute(0, compute(1))
        pool.abort(0, 1)
        await bench.until(lambda: bench.told.ended)
        monkeypatch.setattr(pool_module, "SILENCE_S", 0.1)
        await asyncio.sleep(3 * pool_module.CHECK_S)
        assert bench.told.lost == []

    Bench(folder, "obedient").run(test)


@pytest.mark.parametrize("kind", ["garbage", "huge"])
def test_a_worker_that_breaks_the_protocol_is_killed(folder: Path, kind: str) -> None:
    async def test(bench: Bench, pool: Pool) -> None:
        pool.compute(0, compute(1))
        await bench.until(lambda: bench.told.lost)
        assert "broke the protocol" in bench.told.lost[0][1]

    Bench(folder, kind).run(test)


def test_a_worker_that_ends_loses_its_slot(folder: Path) -> None:
    async def test(bench: Bench, pool: Pool) -> None:
        pool.compute(3, compute(1))
        await bench.until(lambda: bench.told.lost == [(3, "its process ended")])
        assert pool.pids() == {}

    Bench(folder, "short").run(test)


def test_a_worker_given_up_while_it_is_forked_is_killed_when_it_is(folder: Path) -> None:
    async def test(bench: Bench, pool: Pool) -> None:
        pool.compute(0, compute(1))
        pool.abort(0, 1)
        await bench.until(lambda: bench.told.lost)
        await bench.until(lambda: bench.zygote.processes)
        assert await asyncio.to_thread(bench.zygote.processes[0].wait, 20) == -signal.SIGKILL

    Bench(folder, "deaf", delay_s=1.0).run(test)


def test_a_fork_that_is_refused_loses_the_slot(folder: Path) -> None:
    async def test(bench: Bench, pool: Pool) -> None:
        pool.compute(0, compute(1))
        await bench.until(lambda: bench.told.lost)

    Bench(folder, "refuses").run(test)


def test_a_zygote_that_is_not_there_is_asked_again_until_it_is(folder: Path) -> None:
    async def test(bench: Bench, pool: Pool) -> None:
        hidden = bench.path.with_name("hidden")
        bench.path.rename(hidden)
        pool.compute(0, compute(1))
        await asyncio.sleep(2 * child.RETRY_S)
        assert bench.told.lost == []
        hidden.rename(bench.path)
        await bench.until(lambda: pool.pids())

    Bench(folder, "obedient").run(test)


def test_closing_ends_every_worker_also_those_being_forked(folder: Path) -> None:
    async def test(bench: Bench, pool: Pool) -> None:
        pool.compute(0, compute(1))
        await bench.until(lambda: pool.pids())
        pool.compute(1, compute(2))
        pool.close()
        assert await asyncio.to_thread(bench.zygote.processes[0].wait, 20) == -signal.SIGKILL

    Bench(folder, "deaf").run(test)
