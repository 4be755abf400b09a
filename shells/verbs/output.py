"""Files that a verb writes: `-o FILE`.

Interface: `Output(name)` says what is wrong with a name before any work begins; `write` puts the
text there. What is there and is no regular file (a FIFO, a device, /dev/stdout) is written to as it
stands; anything else is replaced.
Invariants: O1 whoever reads a regular file sees the old text or the new one, whole; O2 a symlink
stays one, and a file keeps its mode; O3 nothing is left beside it, however writing ends.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import sys

from manifold.kernel.errors import ManifoldError

STDOUT = "-"
NEXT = "Name another file with -o."


class CannotWrite(ManifoldError):
    """The file that was named cannot be written."""

    code = "cannot_write"
    exit_code = 2


class Output:
    """See the module. `-` is standard output."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._there: os.stat_result | None = None  # what is replaced
        self._path = ""  # what is replaced or made; empty where a name is written to as it stands
        if name == STDOUT:
            return
        if not name or name.endswith("/") or "\0" in name:
            raise CannotWrite(f"{name!r} is no name of a file.", NEXT)
        try:
            self._look()
        except OSError as fault:
            raise _refused(name, fault) from fault

    def _look(self) -> None:
        try:
            there = os.stat(self.name)
        except FileNotFoundError:
            there = None
        path = os.path.realpath(self.name)
        if there is not None:
            if stat.S_ISDIR(there.st_mode):
                raise CannotWrite(f"{self.name} is a folder.", "Name a file in it with -o.")
            if not os.access(self.name, os.W_OK):
                raise CannotWrite(f"{self.name} cannot be written: it is protected.", NEXT)
            if not stat.S_ISREG(there.st_mode) or not _is(path, there):
                return
        folder = os.path.dirname(path)
        if not os.path.isdir(folder):
            raise CannotWrite(f"There is no folder {folder}.", "Make it, or name another with -o.")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise CannotWrite(f"No file can be made in {folder}: it is protected.", NEXT)
        self._there, self._path = there, path

    def write(self, text: str) -> None:
        """All of it at once."""
        if self.name == STDOUT:
            sys.stdout.write(text)
            return
        data = text.encode(errors="backslashreplace")
        try:
            if self._path:
                self._replace(data)
            else:
                with open(self.name, "wb") as file:
                    file.write(data)
        except OSError as fault:
            raise _refused(self.name, fault) from fault

    def _replace(self, data: bytes) -> None:
        fresh = os.path.join(os.path.dirname(self._path), f".manifold-{secrets.token_hex(8)}")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            with open(descriptor, "wb") as file:
                if self._there is not None:
                    with contextlib.suppress(PermissionError):  # only root gives files away
                        os.fchown(descriptor, self._there.st_uid, self._there.st_gid)
                    os.fchmod(descriptor, stat.S_IMODE(self._there.st_mode))
                file.write(data)
            os.replace(fresh, self._path)
        except BaseException:
            os.unlink(fresh)
            raise


def _is(path: str, there: os.stat_result) -> bool:
    """Whether it lies at its path: what is open and deleted has none."""
    try:
        return os.path.samestat(os.stat(path), there)
    except FileNotFoundError:
        return False


def _refused(name: str, fault: OSError) -> CannotWrite:
    return CannotWrite(f"{name} cannot be written: {fault.strerror or fault}.", NEXT)
