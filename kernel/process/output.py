"""What a call prints: kept in files in memory that its process writes to and its node can read.

Interface rules: the node makes the two files, so that it has the last words of a process that died.
They are taken on the level of file descriptors: what a C library or a subprocess prints is kept
too. Invariants: U1 of too much, the beginning and the end are kept, `OUTPUT_CHARS_MAX` in all.
"""

from __future__ import annotations

import io
import os
import sys

from manifold.kernel.process.messages import OUTPUT_CHARS_MAX


def _stream(fd: int) -> io.TextIOWrapper:
    return io.TextIOWrapper(
        io.FileIO(fd, "w", closefd=False), encoding="utf-8", errors="backslashreplace",
        write_through=False,
    )  # fmt: skip


class Printed:
    """What goes to standard output and error, taken from the files the node gave us."""

    def __init__(self, out_fd: int, err_fd: int) -> None:
        self._fds = (out_fd, err_fd)
        for fd, number in ((out_fd, 1), (err_fd, 2)):
            os.dup2(fd, number)
        self._streams = (_stream(1), _stream(2))
        sys.stdout, sys.stderr = self._streams

    def take(self) -> tuple[str, str]:
        """What was printed since the last time."""
        for stream in self._streams:
            if not stream.closed:
                stream.flush()
        out_fd, err_fd = self._fds
        return self._take(out_fd), self._take(err_fd)

    def _take(self, fd: int) -> str:
        size = os.fstat(fd).st_size
        if not size:
            return ""
        text = kept(fd, size)
        os.ftruncate(fd, 0)
        return text


def kept(fd: int, size: int) -> str:
    """The text of `size` bytes in a file; of too many, its beginning and its end."""
    note = "\n[… {} bytes are left out …]\n"
    half = (OUTPUT_CHARS_MAX - len(note) - 20) // 2
    if size <= 2 * half:
        return os.pread(fd, size, 0).decode(errors="replace")
    head, tail = os.pread(fd, half, 0), os.pread(fd, half, size - half)
    middle = note.format(size - 2 * half)
    return head.decode(errors="replace") + middle + tail.decode(errors="replace")
