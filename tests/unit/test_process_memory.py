"""Who is ended for memory, and when: the books of a node over processes that are real."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from manifold.kernel.process import memory
from manifold.kernel.process.memory import Memory, slots

PATIENCE_S = 30.0
MIB = 1 << 20
HOLDS = "import sys; whole = bytearray(b'1') * (int(sys.argv[1]) << 20); print('up'); input()"


class Pool:
    """Processes that hold so many MiB, the first `busy` of them computing."""

    def __init__(self, *mib: int, busy: int = 99) -> None:
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", HOLDS, str(each)], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for each in mib
        ]  # fmt: skip
        for process in self.processes:
            assert process.stdout is not None
            assert process.stdout.readline() == b"up\n"
        self.busy = busy
        self.evicted: list[int] = []

    def tenants(self) -> Iterator[tuple[int, bool]]:
        for number, process in enumerate(self.processes):
            if process.poll() is None:
                yield process.pid, number < self.busy

    def evict(self, pid: int) -> None:
        self.evicted.append([process.pid for process in self.processes].index(pid))
        process = self.processes[self.evicted[-1]]
        process.kill()
        process.wait()

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture
def pool() -> Iterator[Callable[..., Pool]]:
    made: list[Pool] = []

    def start(*mib: int, busy: int = 99) -> Pool:
        made.append(Pool(*mib, busy=busy))
        return made[-1]

    yield start
    for each in made:
        each.close()


def watched(pool: Pool, limit_mib: int, looks: int, group: str = "") -> list[int]:
    """Who was ended after so many looks, in order."""

    async def main() -> None:
        watch = Memory("n-1", limit_mib * MIB, group)
        watch.join(pool)
        watch.begun()
        async with asyncio.timeout(PATIENCE_S):
            for _ in range(looks):
                assert watch._look is not None
                watch._look.cancel()
                watch._watch()
        watch.close()

    asyncio.run(main())
    return pool.evicted


def test_nobody_is_ended_while_all_fit(pool: Callable[..., Pool]) -> None:
    assert watched(pool(10, 20, 30), 200, 4) == []


def test_whoever_holds_most_is_ended_and_nobody_else(pool: Callable[..., Pool]) -> None:
    assert watched(pool(10, 60, 30), 80, 5) == [1]


def test_one_after_the_other_is_ended_until_the_rest_fits(pool: Callable[..., Pool]) -> None:
    assert watched(pool(20, 50, 40), 50, 5) == [1, 2]


def test_an_idle_one_is_ended_where_that_is_enough(pool: Callable[..., Pool]) -> None:
    assert watched(pool(60, 20, busy=1), 80, 3) == [1]


def test_an_idle_one_is_spared_where_that_is_not_enough(pool: Callable[..., Pool]) -> None:
    assert watched(pool(80, 2, busy=1), 60, 1) == [0]


def test_being_over_by_little_counts_at_the_second_look(pool: Callable[..., Pool]) -> None:
    there = pool(40)
    held = memory.held_bytes(there.processes[0].pid)
    limit_mib = int(held / 1.03) // MIB
    assert limit_mib * MIB < held < limit_mib * MIB * (1 + memory.OVER_PART)
    assert watched(there, limit_mib, 1) == []
    assert watched(there, limit_mib, 2) == [0]


def test_what_a_process_has_started_is_counted_with_it() -> None:
    code = (
        "import subprocess, sys;"
        f"child = subprocess.Popen([sys.executable, '-c', {HOLDS!r}, '40'],"
        " stdin=subprocess.PIPE, stdout=subprocess.PIPE);"
        "child.stdout.readline(); print('up'); input(); child.communicate()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        family = memory.family(process.pid)
        assert len(family) == 2 and family[0] == process.pid
        assert memory.own_bytes({process.pid: family}, 0)[process.pid] > 40 * MIB
    finally:
        process.communicate(b"\n")


def test_books_are_kept_where_nobody_enters_the_group(
    pool: Callable[..., Pool], tmp_path: Path
) -> None:
    (tmp_path / "cgroup.procs").write_text(f"{os.getpid()}\n")
    there = pool(60)
    assert watched(there, 20, memory.ENTER_LOOKS, str(tmp_path)) == []
    assert watched(there, 20, memory.ENTER_LOOKS + 1, str(tmp_path)) == [0]


def test_a_group_that_processes_are_in_is_left_to_the_kernel(
    pool: Callable[..., Pool], tmp_path: Path
) -> None:
    there = pool(60)
    (tmp_path / "cgroup.procs").write_text(f"1\n{there.processes[0].pid}\n")

    async def main() -> None:
        watch = Memory("n-1", 20 * MIB, str(tmp_path))
        watch.join(there)
        watch.begun()
        assert watch._look is not None
        watch._look.cancel()
        watch._watch()
        assert watch._look is None, "it was seen once, and nobody looks again"
        watch.begun()
        assert watch._look is None

    asyncio.run(main())
    assert there.evicted == []


@pytest.mark.parametrize(("version", "name"), [(1, "memory.oom_control"), (2, "memory.events")])
def test_each_kill_of_the_kernel_explains_one_end(tmp_path: Path, version: int, name: str) -> None:
    rest = "oom_kill_disable 0\nunder_oom 0\n" if version == 1 else "low 0\nmax 7\noom 3\n"

    async def main() -> None:
        def kills(count: int) -> None:
            (tmp_path / name).write_text(f"{rest}oom_kill {count}\n")

        kills(5)  # before this node was there
        watch = Memory("n-1", MIB, str(tmp_path))
        assert not watch.killed()
        kills(7)
        assert [watch.killed() for _ in range(3)] == [True, True, False]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("cores", "memory_mib", "task_mib", "group", "expected"),
    [
        (4, 1024, 256, "", 4),
        (4, 1024, 300, "", 3),
        (4, 64, 256, "", 1),
        (4, 64, 256, "/a/group", 4),
        (2, 4096, 1, "", 2),
    ],
)
def test_as_many_run_as_what_they_may_need_fits(
    cores: int, memory_mib: int, task_mib: int, group: str, expected: int
) -> None:
    assert slots(cores, memory_mib * MIB, task_mib * MIB, group) == expected
