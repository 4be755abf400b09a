"""The pool of task processes over a real zygote: who is used again, who is killed, and for what."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from manifold.kernel.process import taskpool as module
from manifold.kernel.process.messages import Calls, Fault, Result, Session, TaskSpec, Value
from manifold.kernel.process.remains import Remains
from manifold.kernel.process.taskpool import TaskPool
from manifold.kernel.tasks.parcel import encoded, pack, unpack
from manifold.vm.kid import kid_of

PATIENCE_S = 60.0
ONE = Session("S-" + "1" * 16, "C-" + "1" * 16)
TWO = Session("S-" + "2" * 16, "C-" + "2" * 16)


@pytest.fixture
def zygote() -> Iterator[Path]:
    """The socket of a zygote that can fork task processes."""
    folder = Path(tempfile.mkdtemp(prefix="mf-"))
    path = folder / "zygote"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen(8)
    liveness_read, liveness_write = os.pipe()
    remains = msgspec.json.encode(Remains(str(folder), False, (), ())).decode()
    process = subprocess.Popen(
        [
            sys.executable, "-m", "manifold.kernel.process.zygote", str(folder),
            str(listener.fileno()), str(liveness_read), remains, "manifold.kernel.process.tasks",
        ],
        pass_fds=(listener.fileno(), liveness_read),
    )  # fmt: skip
    listener.close()
    os.close(liveness_read)
    yield path
    os.close(liveness_write)
    process.wait(PATIENCE_S)
    shutil.rmtree(folder)


class Told:
    """What the pool says, by run; `news` is set with each."""

    def __init__(self) -> None:
        self.results: dict[int, list[Result]] = {}
        self.ended: dict[int, int] = {}  # run to the slot it ended on
        self.limited: dict[int, int] = {}
        self.moved: list[tuple[int, int, int]] = []
        self.lost: list[tuple[int, str]] = []
        self.news = asyncio.Event()

    def run_blocks(
        self, slot: int, run: int, first: int, results: Sequence[Result], gas: float, busy_ms: float
    ) -> None:
        known = self.results.setdefault(run, [])
        assert first == len(known), "in order, and each once"
        known.extend(results)
        self.news.set()

    def run_limited(self, slot: int, run: int, last: int) -> None:
        self.limited[run] = last
        self.news.set()

    def run_ended(self, slot: int, run: int, fault: Fault | None) -> None:
        assert fault is None and run not in self.ended
        self.ended[run] = slot
        self.news.set()

    def run_moved(self, slot: int, run: int, to: int) -> None:
        self.moved.append((slot, run, to))
        self.news.set()

    def run_lost(self, slot: int, run: int, reason: str) -> None:
        self.lost.append((slot, reason))
        self.news.set()

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self.news.clear()
                await self.news.wait()

    def values(self, run: int) -> list[Any]:
        return [unpack(each.parcel, "") for each in self.results[run] if isinstance(each, Value)]


def calls(run: int, function: Callable[..., Any], *arguments: Any, session: Session = ONE) -> Calls:
    """A run of as many calls as there are `arguments`, one each."""
    code = encoded(pack(function, ""))
    parcels = tuple(pack(((each,), {}), "") for each in arguments)
    return Calls(run, session, kid_of(code), code, parcels, 0, len(parcels))


def bench(
    zygote: Path, test: Callable[[TaskPool, Told], Awaitable[None]], grace_ms: float = 200.0
) -> None:
    async def main() -> None:
        told = Told()
        spec = TaskSpec("n-1", 1.0, "", 0, str(zygote.parent), {})
        pool = TaskPool(str(zygote), spec, 2, grace_ms, told)
        try:
            await test(pool, told)
        finally:
            pool.close()

    asyncio.run(main())


def pid_of(_: Any) -> int:
    return os.getpid()


async def gone(pid: int) -> None:
    """Until a process, which is not our child, has ended."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(fd, ended.set)
    try:
        async with asyncio.timeout(PATIENCE_S):
            await ended.wait()
    finally:
        asyncio.get_running_loop().remove_reader(fd)
        os.close(fd)


def test_a_session_has_its_processes_to_itself_and_uses_them_again(zygote: Path) -> None:
    async def test(pool: TaskPool, told: Told) -> None:
        for run, session in enumerate((ONE, ONE, TWO, ONE), 1):
            pool.compute(0, calls(run, pid_of, None, session=session))
            await told.until(lambda run=run: run in told.ended)
        first, second, other, again = (told.values(run)[0] for run in range(1, 5))
        assert first == second == again != other

    bench(zygote, test)


def test_what_a_process_prints_lies_with_its_own_call(zygote: Path) -> None:
    async def test(pool: TaskPool, told: Told) -> None:
        pool.compute(0, calls(1, print, "one", "two"))
        await told.until(lambda: 1 in told.ended)
        assert [each.stdout for each in told.results[1] if isinstance(each, Value)] == [
            "one\n", "two\n",
        ]  # fmt: skip

    bench(zygote, test)


def test_a_limit_is_answered_with_where_the_run_will_end(zygote: Path, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)

    def wait(path: str) -> None:
        with open(path) as file:
            file.read()

    async def test(pool: TaskPool, told: Told) -> None:
        pool.compute(0, calls(1, wait, *[str(gate)] * 5))
        pool.limit(1, 0)
        await told.until(lambda: 1 in told.limited)
        assert told.limited[1] <= 1  # it may have begun the first, and that one is finished
        if told.limited[1] == 1:
            await asyncio.to_thread(gate.write_text, "")
        await told.until(lambda: 1 in told.ended)
        assert len(told.results.get(1, [])) == told.limited[1]

    bench(zygote, test)


def test_a_process_that_dies_fails_its_call_and_ends_its_run(zygote: Path) -> None:
    async def test(pool: TaskPool, told: Told) -> None:
        pool.compute(1, calls(1, lambda n: n if n else os._exit(9), 1, 2, 0, 3))
        await told.until(lambda: 1 in told.ended)
        assert told.values(1) == [1, 2]
        fault = told.results[1][2]
        assert isinstance(fault, Fault) and fault.code == "process_died"
        assert "status 9" in fault.message
        assert len(told.results[1]) == 3 and pool.pids() == {}

    bench(zygote, test)


def test_a_run_that_is_aborted_may_clean_up_and_then_ends(zygote: Path, tmp_path: Path) -> None:
    def work(path: str) -> None:
        try:
            Path(path, "begun").touch()
            signal.pause()
        finally:
            Path(path, "cleaned").touch()

    async def test(pool: TaskPool, told: Told) -> None:
        pool.compute(0, calls(1, work, str(tmp_path)))
        async with asyncio.timeout(PATIENCE_S):
            while not (pool.every_pid() and (tmp_path / "begun").exists()):
                await asyncio.sleep(0)
        (pid,) = pool.every_pid()
        pool.abort(1)
        await told.until(lambda: 1 in told.ended)
        await gone(pid)
        assert (tmp_path / "cleaned").exists() and told.results.get(1, []) == []

    bench(zygote, test, grace_ms=60_000.0)


def test_who_prints_without_end_is_killed_for_it(
    zygote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PRINTED_BYTES_MAX", 1 << 20)

    def babble(_: Any) -> None:
        while True:
            os.write(1, b"x" * 65536)

    async def test(pool: TaskPool, told: Told) -> None:
        pool.compute(0, calls(1, babble, None))
        await told.until(lambda: 1 in told.ended)
        (fault,) = told.results[1]
        assert isinstance(fault, Fault) and "printed more than 1 MiB" in fault.message

    bench(zygote, test)


def test_calls_that_wait_for_their_own_move_aside_until_there_are_too_many(
    zygote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PARKED_MAX", 1)

    def wait(_: Any) -> None:
        from manifold.kernel.tasks.inside import inside, lend

        assert inside()
        lend()
        lend()  # a slot is lent once
        signal.pause()

    async def test(pool: TaskPool, told: Told) -> None:
        pool.compute(0, calls(1, wait, None))
        await told.until(lambda: told.moved)
        assert told.moved == [(0, 1, 2)]
        pool.compute(0, calls(2, wait, None))
        await told.until(lambda: 2 in told.ended)
        (fault,) = told.results[2]
        assert isinstance(fault, Fault) and "nest less deeply" in fault.message
        pool.abort(1)
        await told.until(lambda: 1 in told.ended)
        assert told.ended[1] == 2

    bench(zygote, test)


def test_idle_processes_end_after_a_time_with_their_client_or_when_others_need_room(
    zygote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "IDLE_MAX", -1)  # one process in all

    async def test(pool: TaskPool, told: Told) -> None:
        pool.compute(0, calls(1, pid_of, None))
        await told.until(lambda: 1 in told.ended)
        pool.compute(0, calls(2, pid_of, None, session=TWO))
        await told.until(lambda: 2 in told.ended)
        await gone(told.values(1)[0])
        assert pool.every_pid() == tuple(told.values(2))
        pool.client_gone(ONE.client)
        assert pool.every_pid() == tuple(told.values(2))
        pool.client_gone(TWO.client)
        assert pool.every_pid() == ()
        monkeypatch.setattr(module, "IDLE_S", 0.0)
        pool.compute(0, calls(3, pid_of, None))
        await told.until(lambda: 3 in told.ended)
        await gone(told.values(3)[0])
        assert pool.every_pid() == ()

    bench(zygote, test)


def test_an_initializer_runs_once_in_each_process_and_its_failure_is_every_calls(
    zygote: Path,
) -> None:
    import pickle

    def session(name: str, function: Callable[..., Any], *arguments: Any) -> Session:
        setup = pickle.dumps((function, arguments))
        return Session("S-" + name * 16, ONE.client, "", (), setup)

    good, bad = session("3", os.putenv, "HELD", "5"), session("4", divmod, 1, 0)

    async def test(pool: TaskPool, told: Told) -> None:
        pool.compute(0, calls(1, lambda _: os.popen("echo $HELD").read(), None, session=good))
        pool.compute(1, calls(2, pid_of, None, None, session=bad))
        await told.until(lambda: {1, 2} <= told.ended.keys())
        assert told.values(1) == ["5\n"]
        failed = [each for each in told.results[2] if isinstance(each, Value)]
        assert [(each.ok, each.status) for each in failed] == [(False, 1)] * 2
        assert unpack(failed[0].parcel, "")[1] == "ZeroDivisionError"

    bench(zygote, test)


def test_where_nobody_can_fork_the_slot_is_lost_and_no_call_is_blamed(tmp_path: Path) -> None:
    path = tmp_path / "zygote"

    async def test(pool: TaskPool, told: Told) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(path))
            listener.listen()
            pool.compute(0, calls(1, pid_of, None))
            connection, _ = await asyncio.to_thread(listener.accept)
            connection.close()
            await told.until(lambda: told.lost)
        assert told.lost[0][0] == 0 and told.results == {} and told.ended == {}

    bench(path, test)


def test_closing_kills_what_calls_have_started(zygote: Path, tmp_path: Path) -> None:
    def work(path: str) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen(["sleep", "600"])
        Path(path, "new").write_text(str(child.pid))
        Path(path, "new").rename(Path(path, "pid"))
        child.wait()

    pids: list[int] = []

    async def test(pool: TaskPool, told: Told) -> None:
        pool.compute(0, calls(1, work, str(tmp_path)))
        async with asyncio.timeout(PATIENCE_S):
            while not (pool.every_pid() and (tmp_path / "pid").exists()):
                await asyncio.sleep(0)
        pids.extend([*pool.every_pid(), int((tmp_path / "pid").read_text())])

    bench(zygote, test)
    for pid in pids:
        asyncio.run(gone(pid))
