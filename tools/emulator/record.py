"""What a running cluster leaves on disk for those who look for it: one lock and one record.

Interface rules: whoever holds the lock of `supervisor.lock` is the cluster's supervisor; the record
beside it says who that is. Locks end with their process, so a stale record never counts.
Invariants: E1 a process is signalled only if its pid and its start time both match the record.
"""

from __future__ import annotations

import fcntl
import os
import signal
from pathlib import Path

import msgspec

from manifold.kernel.durable import make_folder

LOCK = "supervisor.lock"


class Record(msgspec.Struct, frozen=True):
    """Who supervises a cluster."""

    pid: int
    started: int  # clock ticks since boot, from /proc/<pid>/stat
    runtime_dir: str
    nodes: int


class Lock:
    """The supervisor's lock on a cluster's state folder (or an agent's on its node's)."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._fd = -1

    def acquire(self, nodes: int, runtime_dir: str) -> bool:
        """Take the lock and write the record; False where somebody holds it."""
        make_folder(self.path.parent)
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        self._fd = fd
        record = Record(os.getpid(), start_time(os.getpid()), runtime_dir, nodes)
        os.ftruncate(fd, 0)
        os.pwrite(fd, msgspec.json.encode(record), 0)
        return True

    def release(self) -> None:
        if self._fd >= 0:
            os.ftruncate(self._fd, 0)
            os.close(self._fd)
            self._fd = -1


def holder(folder: Path) -> Record | None:
    """The record of whoever holds the lock now, or None where nobody does."""
    path = folder / LOCK
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return msgspec.json.decode(os.pread(fd, 65_536, 0), type=Record)
        return None
    except msgspec.DecodeError:
        return None  # it took the lock this instant and has not written yet
    finally:
        os.close(fd)


def wait_released(folder: Path) -> None:
    """Block until nobody holds the lock."""
    try:
        fd = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
    finally:
        os.close(fd)


def start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot; -1 where there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return -1
    return int(stat.rpartition(")")[2].split()[19])


def signal_holder(record: Record, number: signal.Signals) -> bool:
    """E1. Whether the process was there."""
    try:
        pidfd = os.pidfd_open(record.pid)
    except ProcessLookupError:
        return False
    try:
        if start_time(record.pid) != record.started:
            return False
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(pidfd)
    return True
