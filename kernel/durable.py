"""Small records that survive a power cut: replaced whole, checked when read.

Interface: `write_record` returns once the record is on the disk; `read_record` returns what was
written last, None where nothing ever was, and raises `Damaged` for anything else. A record is
never repaired or replaced on its own account: what is damaged is for a person to look at.
A writer whose `write_record` raised `NotDurable` must not go on as if it had been written.
Invariants: D1 at any crash the path holds the old record or the new one, whole. D2 what
`read_record` returns had been passed to `write_record` (checked by a CRC-32 and a length).
Source: the usual order, write, fsync, rename, fsync of the folder (Pillai et al., OSDI 2014).
"""

from __future__ import annotations

import os
import re
import stat
import struct
import threading
import zlib
from pathlib import Path

from manifold.kernel.errors import ManifoldError
from manifold.kernel.limits import RECORD_BYTES_MAX

_MAGIC = b"MANIREC1"
_TEMPORARY = re.compile(r"\..+\.([0-9]{1,10})\.[0-9]{1,10}\Z")
_HEADER = struct.Struct(">8sII")  # magic, length, CRC-32 of the payload
MODE = 0o600
LOOK = "Look at the file; restore it from a copy, or remove it if its loss is acceptable."


class Damaged(ManifoldError):
    """A durable record is torn, altered, too large, or not one of ours."""

    code = "damaged"


class NotDurable(ManifoldError):
    """The disk refused a record; nobody may rely on it."""

    code = "not_durable"


def write_record(path: Path, payload: bytes, *, replace: bool = True) -> bool:
    """Make `payload` the durable content of `path`, mode 0600.

    With `replace` False a record that is already there stays, and False is returned.
    """
    assert len(payload) <= RECORD_BYTES_MAX, "the caller bounds its records"
    # A name of this thread's own: two writers cannot tear each other's file. `sweep` knows it.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_native_id()}")
    try:
        _write_synced(temporary, _HEADER.pack(_MAGIC, len(payload), zlib.crc32(payload)) + payload)
        try:
            done = _put(temporary, path, replace)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as fault:
        raise NotDurable(
            f"{path} cannot be made durable: {fault.strerror}.", "Check the disk and its space."
        ) from fault
    return done


def read_record(path: Path) -> bytes | None:
    """The payload of the record at `path`, or None where there is no file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as fault:
        raise Damaged(f"{path} cannot be opened: {fault.strerror}.", LOOK) from fault
    try:
        _check_ours(path, os.fstat(descriptor))
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            data = file.read(_HEADER.size + RECORD_BYTES_MAX + 1)
    finally:
        os.close(descriptor)
    if len(data) < _HEADER.size:
        raise Damaged(f"{path} is torn: it has {len(data)} bytes.", LOOK)
    magic, length, checksum = _HEADER.unpack_from(data)
    payload = data[_HEADER.size :]
    if magic != _MAGIC:
        raise Damaged(f"{path} is not a record of Manifold.", LOOK)
    if len(payload) != length:
        raise Damaged(f"{path} is torn: {len(payload)} bytes of {length}.", LOOK)
    if zlib.crc32(payload) != checksum:
        raise Damaged(f"{path} was altered: its checksum does not match.", LOOK)
    return payload


def sweep(folder: Path) -> None:
    """Remove what writers that were killed left behind; a writer that lives keeps its file."""
    for path in folder.iterdir():
        match = _TEMPORARY.match(path.name)
        if match and not Path("/proc", match[1]).exists():
            path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make `path` (mode 0700) and its parents, durably."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    for each in reversed(missing):
        each.mkdir(mode=0o700, exist_ok=True)
        sync_folder(each.parent)


def sync_folder(path: Path) -> None:
    """Make the names in the folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_synced(path: Path, data: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags, MODE), "wb") as file:
        os.fchmod(file.fileno(), MODE)  # whatever the umask, and whatever a crash left behind
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _put(temporary: Path, path: Path, replace: bool) -> bool:
    if replace:
        temporary.replace(path)
        return True
    try:
        os.link(temporary, path)  # unlike rename, it fails where there is something
    except FileExistsError:
        return False
    return True


def _check_ours(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise Damaged(f"{path} is not a plain file.", LOOK)
    if status.st_uid != os.geteuid():
        raise Damaged(f"{path} belongs to user {status.st_uid}.", "Run as its owner.")
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise Damaged(
            f"{path} may be read by others (mode {stat.S_IMODE(status.st_mode):04o}).",
            f"If nobody else has used it: chmod 600 {path}",
        )
