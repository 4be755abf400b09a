"""The system calls that an acceptor's storage makes, as one object that a test can replace.

Interface: paths are whole, handles are small integers of the layer's own. Every call either does
all of what it says or raises OSError. Nothing is durable before `sync` of its file (or `append`
to it) and, for names, `sync_folder` of its folder have returned.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Protocol

from manifold.kernel.durable import MODE, make_folder, sync_folder

_NOT_AT_ONCE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # of this file system, this kernel
_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC


class Files(Protocol):
    """What storage needs of an operating system."""

    def make_folder(self, path: Path) -> None: ...

    def lock(self, path: Path) -> int:
        """Open or create `path` and lock it; BlockingIOError where another process holds it."""

    def create(self, path: Path) -> int:
        """An empty file, whatever was there."""

    def open(self, path: Path) -> int: ...

    def read(self, path: Path) -> bytes | None:
        """The whole file; None where there is none."""

    def write(self, handle: int, data: bytes, offset: int) -> None: ...

    def append(self, handle: int, data: bytes, offset: int) -> None:
        """`write` and `sync` at once, where nothing else waits for a sync."""

    def truncate(self, handle: int, size: int) -> None: ...

    def allocate(self, handle: int, size: int) -> None:
        """Make the file that long, zeros at its end, with blocks of its own. Hints only: a file
        system that cannot, or has no space, raises, and the file is as it was or longer."""

    def sync(self, handle: int) -> None: ...

    def close(self, handle: int) -> None: ...

    def rename(self, old: Path, new: Path) -> None: ...

    def remove(self, path: Path) -> None:
        """Nothing happens where there is no such file."""

    def sync_folder(self, path: Path) -> None: ...

    def random(self, count: int) -> bytes:
        """Bytes that nobody can guess."""


class Disk:
    """The real one. `syncs` counts those of this process."""

    def __init__(self) -> None:
        self.syncs = 0
        self._at_once = hasattr(os, "RWF_DSYNC")  # Linux

    def make_folder(self, path: Path) -> None:
        make_folder(path)

    def lock(self, path: Path) -> int:
        handle = os.open(path, _FLAGS | os.O_CREAT, MODE)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise
        return handle

    def create(self, path: Path) -> int:
        return os.open(path, _FLAGS | os.O_CREAT | os.O_TRUNC, MODE)

    def open(self, path: Path) -> int:
        return os.open(path, _FLAGS)

    def read(self, path: Path) -> bytes | None:
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        with os.fdopen(handle, "rb") as file:
            return file.read()

    def write(self, handle: int, data: bytes, offset: int) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(handle, view, offset)
            view, offset = view[done:], offset + done

    def append(self, handle: int, data: bytes, offset: int) -> None:
        if self._at_once:
            # One system call: the thread has to wait for the interpreter once instead of twice.
            try:
                done = os.pwritev(handle, (data,), offset, os.RWF_DSYNC)
            except OSError as fault:
                if fault.errno not in _NOT_AT_ONCE:
                    raise
                self._at_once = False
            else:
                self.syncs += 1
                if done == len(data):
                    return
                data, offset = data[done:], offset + done
        self.write(handle, data, offset)
        self.sync(handle)

    def truncate(self, handle: int, size: int) -> None:
        os.ftruncate(handle, size)

    def allocate(self, handle: int, size: int) -> None:
        end = os.fstat(handle).st_size
        if size > end:
            self.write(handle, bytes(size - end), end)

    def sync(self, handle: int) -> None:
        self.syncs += 1
        os.fdatasync(handle)  # with the file's size, as far as reading needs it

    def close(self, handle: int) -> None:
        os.close(handle)

    def rename(self, old: Path, new: Path) -> None:
        old.replace(new)

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def sync_folder(self, path: Path) -> None:
        self.syncs += 1
        sync_folder(path)

    def random(self, count: int) -> bytes:
        return os.urandom(count)


DISK = Disk()
