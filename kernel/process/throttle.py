"""How an emulated node's compute share is enforced: a cgroup's CPU quota, or pacing.

Interface rules: `prepare` makes a node's group and returns its path, or "" where the host allows
none (then workers pace themselves with `Pacer`, which the notice says); `join` puts the calling
process in it; `remove` takes it away once its processes are gone, `remove_all` those of a whole
cluster. v1 and v2 behind one interface.
Invariants: T1 of a share of `s`, work of `c` seconds is followed by pauses of `c * (1/s - 1)`
seconds in all; pauses that came late are credit, at most `CREDIT_S`.
Source: the kernel's Documentation/scheduler/sched-bwc.rst (v1) and admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

# Short periods make a throttled worker's pauses short: at a quarter of a core it stands still for
# 15 ms of every 20. The kernel's least quota is 1 ms.
PERIOD_US = 20_000
QUOTA_US_MIN = 1_000
PAUSE_S_MIN = 0.001  # shorter ones are saved up: a wake-up costs a tenth of it
CREDIT_S = 0.01
ABOVE = "manifold"  # the group above those of all clusters
Roots = Sequence[tuple[Path, int]]
ROOTS: Roots = ((Path("/sys/fs/cgroup/cpu"), 1), (Path("/sys/fs/cgroup"), 2))


def prepare(group: str, cores: float, roots: Roots = ROOTS) -> str:
    """Make the group `group` limited to `cores` of CPU; its path, or "" where that cannot be."""
    quota_us = max(QUOTA_US_MIN, round(cores * PERIOD_US))
    for root, version in roots:
        probe = root / ("cgroup.procs" if version == 1 else "cgroup.controllers")
        if not probe.exists():
            continue
        path = root / ABOVE / group
        for _ in range(2):  # another cluster may take the groups above away as we make them
            try:
                path.mkdir(parents=True, exist_ok=True)
                _limit(path, root, version, quota_us)
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
    above = [each for each in reversed(path.parents) if each == root or root in each.parents]
    for parent in above:
        control = parent / "cgroup.subtree_control"
        if "cpu" not in control.read_text().split():
            control.write_text("+cpu")
    (path / "cpu.max").write_text(f"{quota_us} {PERIOD_US}")


def join(path: str) -> bool:
    """Move this process into the group; whether that worked."""
    try:
        with open(Path(path, "cgroup.procs"), "r+") as procs:  # never make a file of that name
            procs.write(str(os.getpid()))
    except OSError:
        return False
    return True


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
