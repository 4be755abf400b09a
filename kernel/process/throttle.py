"""How an emulated node's compute share is enforced: a cgroup's CPU quota, or pacing.

Interface rules: `prepare` makes a node's group and returns its path, or "" where the host allows
none (then workers pace themselves with `Pacer`, which the notice says); `join` puts the calling
process in it; `remove` takes it away once its processes are gone. v1 and v2 behind one interface.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

# Short periods make a throttled worker's pauses short: at a quarter of a core it stands still for
# 15 ms of every 20. The kernel's least quota is 1 ms.
PERIOD_US = 20_000
QUOTA_US_MIN = 1_000
ROOTS = ((Path("/sys/fs/cgroup/cpu"), 1), (Path("/sys/fs/cgroup"), 2))


def prepare(group: str, cores: float) -> str:
    """Make the group `group` limited to `cores` of CPU; its path, or "" where that cannot be."""
    for root, version in ROOTS:
        probe = root / ("cpu.cfs_quota_us" if version == 1 else "cgroup.controllers")
        if not root.is_dir() or not (probe.exists() or version == 1):
            continue
        path = root / "manifold" / group
        try:
            path.mkdir(parents=True, exist_ok=True)
            _limit(path, version, max(QUOTA_US_MIN, round(cores * PERIOD_US)))
        except OSError:
            with contextlib.suppress(OSError):
                path.rmdir()
            continue
        return str(path)
    return ""


def _limit(path: Path, version: int, quota_us: int) -> None:
    if version == 1:
        (path / "cpu.cfs_period_us").write_text(str(PERIOD_US))
        (path / "cpu.cfs_quota_us").write_text(str(quota_us))
        return
    for parent in (path.parent.parent, path.parent):
        control = parent / "cgroup.subtree_control"
        if "cpu" not in control.read_text().split():
            control.write_text("+cpu")
    (path / "cpu.max").write_text(f"{quota_us} {PERIOD_US}")


def join(path: str) -> bool:
    """Move this process into the group; whether that worked."""
    try:
        Path(path, "cgroup.procs").write_text(str(os.getpid()))
    except OSError:
        return False
    return True


def remove(path: str) -> None:
    """Remove a group whose processes have ended, and its parents where they are empty."""
    for directory in (Path(path), Path(path).parent, Path(path).parent.parent):
        if directory.name in ("cpu", "cgroup"):
            return
        try:
            directory.rmdir()
        except OSError:
            return


class Pacer:
    """Slice pacing: after `cpu_s` of work, how long to pause so that the share is kept."""

    def __init__(self, share: float) -> None:
        self.share = share
        self._owed_s = 0.0

    def pause_s(self, cpu_s: float) -> float:
        """Work of `cpu_s` was done; the pause that is due now (0 while it is under a ms)."""
        self._owed_s += cpu_s * (1 / self.share - 1)
        return self._owed_s if self._owed_s > 0.001 else 0.0

    def paused(self, wall_s: float) -> None:
        """So much of what was due has been paused (more than was due is credit up to 10 ms)."""
        self._owed_s = max(self._owed_s - wall_s, -0.01)
