"""What a running cluster leaves on disk for those who look for it: one lock and one record.

Interface rules: whoever holds the lock of `supervisor.lock` is the cluster's supervisor; the record
in it says who that is. The zygote inherits the lock, and its children do: it is free only when
every process of the cluster has ended, so that who acquires it finds nobody in its way.
Invariants: E1 a process is signalled, or said to be up, only if its pid and its start time both
match the record.
"""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from pathlib import Path

import msgspec

from manifold.kernel.durable import make_folder

LOCK = "supervisor.lock"
# What a killed supervisor leaves ends within the zygote's grace of 1 s, slower on a busy host; the
# one that is told to stop takes at most its 2 s for the nodes, and then the same.
ENDING_S = 15.0
RECORD_BYTES = 512  # three numbers and a path of at most 107
LOOK_S = 0.02
_QUIET = threading.Event()  # never set: a lock has no wait with a timeout, so it is looked at


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
        self._record: Record | None = None

    def acquire(self, nodes: int, runtime_dir: str) -> bool:
        """Take the lock and write the record; False where a supervisor that lives holds it.

        Waits where a supervisor that was killed has left processes: they are about to end.
        """
        make_folder(self.path.parent)
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline_s = time.monotonic() + ENDING_S
        while not _try_lock(fd):
            if _living(fd) is not None or time.monotonic() > deadline_s:
                os.close(fd)
                return False
            _QUIET.wait(LOOK_S)
        self._fd = fd
        self._write(Record(os.getpid(), start_time(os.getpid()), runtime_dir, nodes))
        return True

    def count(self, nodes: int) -> None:
        """Write down how many nodes there are by now."""
        if self._record is not None:
            self._write(msgspec.structs.replace(self._record, nodes=nodes))

    def _write(self, record: Record) -> None:
        self._record = record
        # Padded, in one write: who reads meanwhile finds the one or the other whole.
        os.pwrite(self._fd, msgspec.json.encode(record).ljust(RECORD_BYTES), 0)

    @property
    def fd(self) -> int:
        """For the zygote to inherit."""
        return self._fd

    def release(self) -> None:
        self._record = None
        if self._fd >= 0:
            os.ftruncate(self._fd, 0)
            os.close(self._fd)
            self._fd = -1


def holder(folder: Path) -> Record | None:
    """The record of the supervisor that lives and holds the lock, or None."""
    try:
        fd = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return None if _try_lock(fd) else _living(fd)
    finally:
        os.close(fd)


def wait_released(folder: Path, seconds: float = ENDING_S) -> bool:
    """Wait until nobody holds the lock; False where somebody still does after `seconds`."""
    try:
        fd = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    deadline_s = time.monotonic() + seconds
    try:
        while not _try_lock(fd):
            if time.monotonic() > deadline_s:
                return False
            _QUIET.wait(LOOK_S)
    finally:
        os.close(fd)
    return True


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _living(fd: int) -> Record | None:
    """Who is on record, where that process lives; None where it has not written yet, too."""
    try:
        record = msgspec.json.decode(os.pread(fd, 65_536, 0), type=Record)
    except msgspec.DecodeError:
        return None
    return record if start_time(record.pid) == record.started else None


def start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot; -1 where there is none that runs.

    One that was killed stays in the table until its parent looks, which may be never.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return -1
    fields = stat.rpartition(")")[2].split()
    return -1 if fields[0] in "ZX" else int(fields[19])


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
