"""What the tasks of a node hold of memory together, and who ends where that is more than its class.

Interface rules: one `Memory` for each node, used from the loop's thread. Pools `join` it and call
`begun` with each run. With a group (`throttle.prepare_memory`) the kernel bounds them and `killed`
says whether it ended one. Without one the node keeps the books: it looks every `LOOK_S` while a
task runs and ends the process that holds most, or an idle one where that is enough. It does so as
well where a group was made that its processes cannot enter. `slots` is how many may run.
Invariants: M1 nobody but a process of a pool, and what it started, is ended: never the node; M2 one
at a time: who was ended is gone from the books before another is; M3 being over by less than
`OVER_PART` is no reason until it was so at `LOOKS_OVER` looks in a row.
Without a group a task that allocates faster than we look gets past the limit for that time; of
private memory the process's own limit (`tasks.py`) stops it. Pages that processes share count in
proportion (PSS). Of the zygote's, which has touched nothing since it forked them, a process has at
most the part that the zygote has itself: that much is nobody's; the error is in favour of tasks.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterable
from typing import Protocol

from manifold.kernel.process import throttle
from manifold.kernel.process.messages import Fault

log = logging.getLogger("manifold.process")

LOOK_S = 0.05  # 20 us for each process, and 1 ms where it has to be counted page by page
OVER_PART = 1 / 16  # of the limit
LOOKS_OVER = 2
ENTER_LOOKS = 40  # until one process at least is in the group: 2 s, on a host that is busy
CHILDREN_MAX = 4096  # of one task, that are counted
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Tenants(Protocol):
    """A pool: whose processes hold memory."""

    def tenants(self) -> Iterable[tuple[int, bool]]:
        """The pid of each process, and whether it computes."""

    def evict(self, pid: int) -> None:
        """End that process, because memory is short."""


def slots(cores: int, memory_bytes: int, task_bytes: int, group: str) -> int:
    """How many tasks may run at a time: where the node keeps the books, what they may need fits."""
    if group or not memory_bytes:
        return cores
    return max(1, min(cores, memory_bytes // task_bytes))


def fault(alias: str, limit_bytes: int) -> Fault:
    """Of the task that was ended."""
    return Fault(
        "no_memory",
        f"It was ended because the tasks of {alias} held more than the memory of its class "
        f"({limit_bytes >> 20} MiB) together.",
        "Hold less at once, run fewer at a time, or give the class more (`classes: memory`).",
        node=alias,
    )


class Memory:
    """See the module. `limit_bytes` 0: nobody is held to anything. `zygote`: its pid, if known."""

    def __init__(self, alias: str, limit_bytes: int, group: str, zygote: int = 0) -> None:
        self.alias = alias
        self.limit_bytes = limit_bytes
        self._group = group
        self._zygote = zygote  # its pid
        self._loop = asyncio.get_running_loop()
        self._pools: list[Tenants] = []
        self._look: asyncio.TimerHandle | None = None
        self._kills = throttle.memory_kills(group) if group else 0
        self._books = not group  # whether we keep them
        self._outside = 0  # looks at which nobody was in the group
        self._over = 0  # looks in a row
        self._ended = 0  # M2

    def join(self, pool: Tenants) -> None:
        self._pools.append(pool)

    def begun(self) -> None:
        """A task begins."""
        wanted = self._books or self._outside >= 0
        if self.limit_bytes and wanted and self._look is None:
            self._look = self._loop.call_later(LOOK_S, self._watch)

    def killed(self) -> bool:
        """A process of ours was killed and not by us: whether the kernel did, for want of memory.

        Each of its kills explains one end.
        """
        if not self._group or throttle.memory_kills(self._group) <= self._kills:
            return False
        self._kills += 1
        return True

    def fault(self) -> Fault:
        return fault(self.alias, self.limit_bytes)

    def close(self) -> None:
        if self._look is not None:
            self._look.cancel()
        self._pools.clear()

    def _watch(self) -> None:
        self._look = None
        there = [(pid, busy, pool) for pool in self._pools for pid, busy in pool.tenants()]
        if self._ended not in [pid for pid, _, _ in there]:
            self._ended = 0
        there_now = [each for each in there if each[0]]
        if self._books:
            self._judge(there_now)
        elif there_now:
            self._see_entered([pid for pid, _, _ in there_now])
        if any(busy for _, busy, _ in there):
            self.begun()

    def _see_entered(self, pids: list[int]) -> None:
        """Once: that the group is one that our processes are in."""
        if throttle.members(self._group) & set(pids):
            self._outside = -1
            return
        self._outside += 1
        if self._outside >= ENTER_LOOKS:
            log.warning("no process enters %s: this node keeps the books of memory", self._group)
            self._books = True

    def _judge(self, there: list[tuple[int, bool, Tenants]]) -> None:
        families = {pid: family(pid) for pid, _, _ in there}
        held = {pid: sum(map(resident_bytes, each)) for pid, each in families.items()}
        if sum(held.values()) > self.limit_bytes:  # shared pages were counted for each
            held = own_bytes(families, self._zygote)
        total = sum(held.values())
        self._over = self._over + 1 if total > self.limit_bytes else 0
        far = total > self.limit_bytes * (1 + OVER_PART)
        if self._ended or not self._over or not (far or self._over >= LOOKS_OVER):
            return  # M2, M3
        pid, busy, pool = self._victim(there, held)
        log.warning(
            "tasks hold %d MiB of %d MiB: pid %d, which has %d MiB and %s, is ended",
            total >> 20, self.limit_bytes >> 20, pid, held[pid] >> 20,
            "computes" if busy else "is idle",
        )  # fmt: skip
        self._ended, self._over = pid, 0
        pool.evict(pid)

    def _victim(
        self, there: list[tuple[int, bool, Tenants]], held: dict[int, int]
    ) -> tuple[int, bool, Tenants]:
        """Whoever holds most, but an idle one where the end of those is enough."""
        idle = [each for each in there if not each[1]]
        left = sum(held.values()) - sum(held[pid] for pid, _, _ in idle)
        enough = left <= self.limit_bytes
        return max(idle if idle and enough else there, key=lambda each: held[each[0]])


def family(pid: int) -> list[int]:
    """The process and those it has started, as far as the kernel tells."""
    found = [pid]
    for each in found:
        try:
            threads = os.listdir(f"/proc/{each}/task")
            for thread in threads:
                with open(f"/proc/{each}/task/{thread}/children", "rb") as file:
                    found += map(int, file.read().split())
        except OSError:  # it has ended meanwhile, or the kernel does not tell
            continue
        if len(found) > CHILDREN_MAX:
            break
    return found[:CHILDREN_MAX]


def resident_bytes(pid: int) -> int:
    """What the process has in memory, what it shares with others included; cheap."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError):  # it has ended
        return 0


def own_bytes(families: dict[int, list[int]], zygote: int) -> dict[int, int]:
    """What each family holds, less what its first process has of the zygote that forked it."""
    inherited = held_bytes(zygote) if zygote else 0
    return {pid: max(0, sum(map(held_bytes, each)) - inherited) for pid, each in families.items()}


def held_bytes(pid: int) -> int:
    """Its part of what it shares, and all that it has for itself (PSS)."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            for line in file:
                if line.startswith(b"Pss:"):
                    return int(line.split()[1]) << 10
    except OSError:  # it has ended
        pass
    return 0
