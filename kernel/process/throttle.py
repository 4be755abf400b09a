"""How an emulated node is held to its share: cgroups for CPU and memory, or pacing for the CPU.

Interface rules: `prepare` makes a node's group and returns its path, or "" where the host allows
none (then workers pace themselves with `Pacer`, which the notice says); `prepare_memory` does it
for memory (`memory.py` keeps the books where it cannot); `join` puts the calling process in a
group; `remove` takes it away once its processes are gone, `remove_all` those of a whole cluster.
v1 and v2 behind one interface: in v2 both are one group.
Invariants: T1 of a share of `s`, work of `c` seconds is followed by pauses of `c * (1/s - 1)`
seconds in all; pauses that came late are credit, at most `CREDIT_S`.
Source: the kernel's Documentation/scheduler/sched-bwc.rst, admin-guide/cgroup-v1/memory.rst (v1)
and admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

# Short periods make a throttled worker's pauses short: at a quarter of a core it stands still for
# 15 ms of every 20. The kernel's least quota is 1 ms.
PERIOD_US = 20_000
QUOTA_US_MIN = 1_000
PAUSE_S_MIN = 0.001  # shorter ones are saved up: a wake-up costs a tenth of it
CREDIT_S = 0.01
OOM_SCORE = "800"  # of 1000: sooner than any node, where the whole host is short of memory
ABOVE = "manifold"  # the group above those of all clusters
Roots = Sequence[tuple[Path, int]]
ROOTS: Roots = ((Path("/sys/fs/cgroup/cpu"), 1), (Path("/sys/fs/cgroup"), 2))
MEMORY_ROOTS: Roots = ((Path("/sys/fs/cgroup/memory"), 1), (Path("/sys/fs/cgroup"), 2))


def prepare(group: str, cores: float, roots: Roots = ROOTS) -> str:
    """Make the group `group` limited to `cores` of CPU; its path, or "" where that cannot be."""
    quota_us = max(QUOTA_US_MIN, round(cores * PERIOD_US))
    return _prepare(group, roots, partial(_limit, quota_us=quota_us))


def prepare_memory(group: str, limit_bytes: int, roots: Roots = MEMORY_ROOTS) -> str:
    """Make the group `group` limited to `limit_bytes` of memory, as `prepare`."""
    return _prepare(group, roots, partial(_limit_memory, limit_bytes=limit_bytes))


def _prepare(group: str, roots: Roots, limit: Callable[[Path, Path, int], None]) -> str:
    for root, version in roots:
        probe = root / ("cgroup.procs" if version == 1 else "cgroup.controllers")
        if not probe.exists():
            continue
        path = root / ABOVE / group
        for _ in range(2):  # another cluster may take the groups above away as we make them
            try:
                path.mkdir(parents=True, exist_ok=True)
                limit(path, root, version)
            except FileNotFoundError:
                continue
            except OSError:
                break
            return str(path)
        remove(str(path))
    return ""


def set_cores(path: str, cores: float) -> None:
    """Another quota for a group that `prepare` has made; raises `OSError` where it is gone."""
    assert ABOVE in Path(path).parts, "only groups that `prepare` made are changed"
    quota_us = max(QUOTA_US_MIN, round(cores * PERIOD_US))
    old, new = Path(path, "cpu.cfs_quota_us"), Path(path, "cpu.max")
    if old.exists():
        old.write_text(str(quota_us))
    else:
        new.write_text(f"{quota_us} {PERIOD_US}")


def _limit(path: Path, root: Path, version: int, quota_us: int) -> None:
    if version == 1:
        (path / "cpu.cfs_period_us").write_text(str(PERIOD_US))
        (path / "cpu.cfs_quota_us").write_text(str(quota_us))
        return
    _delegate(path, root, "cpu")
    (path / "cpu.max").write_text(f"{quota_us} {PERIOD_US}")


def _limit_memory(path: Path, root: Path, version: int, limit_bytes: int) -> None:
    """Swap is no way out, where the kernel accounts for it."""
    if version == 1:
        limit, swap = path / "memory.limit_in_bytes", path / "memory.memsw.limit_in_bytes"
        # Below what both together are, always: a group that is there already may have other limits.
        if swap.exists():
            swap.write_text("-1")
        limit.write_text(str(limit_bytes))
        if swap.exists():
            swap.write_text(str(limit_bytes))
        return
    _delegate(path, root, "memory")
    (path / "memory.max").write_text(str(limit_bytes))
    if (path / "memory.swap.max").exists():
        (path / "memory.swap.max").write_text("0")


def _delegate(path: Path, root: Path, controller: str) -> None:
    above = [each for each in reversed(path.parents) if each == root or root in each.parents]
    for parent in above:
        control = parent / "cgroup.subtree_control"
        if controller not in control.read_text().split():
            control.write_text(f"+{controller}")


def memory_kills(path: str) -> int:
    """How many processes of a group of `prepare_memory` the kernel has killed; 0 if it is gone."""
    for name in ("memory.events", "memory.oom_control"):
        try:
            lines = Path(path, name).read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            key, _, value = line.partition(" ")
            if key == "oom_kill" and value.isdigit():
                return int(value)
    return 0


def join(path: str) -> bool:
    """Move this process into the group; whether that worked."""
    try:
        with open(Path(path, "cgroup.procs"), "r+") as procs:  # never make a file of that name
            procs.write(str(os.getpid()))
    except OSError:
        return False
    return True


def members(path: str) -> set[int]:
    """The processes in a group; nobody where it is gone."""
    try:
        return set(map(int, Path(path, "cgroup.procs").read_text().split()))
    except OSError:
        return set()


def be_the_first_victim() -> None:
    """Let this process be ended before others when the host, or its group, is short of memory."""
    with contextlib.suppress(OSError):  # a wish; not every host grants it
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE)


def remove(path: str) -> None:
    """Remove a group whose processes have ended, and those above it where they are empty."""
    assert ABOVE in Path(path).parts, "only groups that `prepare` made are removed"
    for directory in (Path(path), *Path(path).parents):
        try:
            directory.rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            return
        if directory.name == ABOVE:
            return


def above(group: str, roots: Roots = ROOTS) -> tuple[str, ...]:
    """Where the groups of the nodes of a cluster are."""
    return tuple(str(root / ABOVE / group) for root, _ in roots)


def remove_all(group: str, roots: Roots = ROOTS) -> None:
    """Remove what a cluster that was killed with everybody who cleans up has left."""
    for folder in above(group, roots):
        for path in sorted(Path(folder).glob("*/")):
            remove(str(path))


class Pacer:
    """Slice pacing (T1): after work, how long to pause so that the share is kept."""

    def __init__(self, share: float) -> None:
        assert 0 < share <= 1, "a share is of one core"
        self.share = share
        self._owed_s = 0.0

    def pause_s(self, cpu_s: float) -> float:
        """Work of `cpu_s` was done; the pause that is due now (0 while it is under a ms)."""
        self._owed_s += cpu_s * (1 / self.share - 1)
        return self._owed_s if self._owed_s > PAUSE_S_MIN else 0.0

    def paused(self, wall_s: float) -> None:
        """So much of what was due has been paused."""
        self._owed_s = max(self._owed_s - wall_s, -CREDIT_S)
