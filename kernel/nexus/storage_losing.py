"""A disk that loses what was not synced when its process is killed: SIGKILL is a power loss.

Interface: a `Files` (storage_files.py) over the real disk, for tests that need real processes
(`nexus.disk: losing`). What is written, named or removed lies in this process's memory, where its
own reads see it, until `sync` or `sync_folder` puts it on the real disk; whoever opens the files
after a SIGKILL finds what a power loss would have left. With a seed other than 0 some of it
reaches the disk early, as on real disks: single sectors in any order, a file cut at any byte, some
of the pending names; so a batch under way is found torn. `lose_power` does to a living process
what SIGKILL does to its disk.
Invariants:
  Q1  what was not synced, and did not happen to be written early, is not on the real disk;
  Q2  a sync writes everything before it returns, and dies halfway with every part of it possible;
  Q3  names change in the order in which they were asked for, each whole, as on a journal;
  Q4  sectors of 512 bytes are written whole or not at all, but for the one that ends the file.
One folder at a time, the one that was locked last; files that never got their name are called
`.losing.*`, and the next process that locks the folder removes them.
Source: Pillai et al., "All File Systems Are Not Created Equal" (OSDI 2014): what may be lost.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from manifold.kernel.nexus.storage_files import DISK

SECTOR_BYTES = 512
EARLY = 0.25  # with a seed: how often a write or a name makes some of what waits real
PART = 0.5  # of the sectors, then
PREFIX = ".losing."


@dataclass(slots=True)
class _Write:
    """`data` None: the file ends at `offset`, cut or longer by zeros."""

    offset: int
    data: bytes | None


@dataclass(slots=True)
class _Inode:
    """A file: what is on the disk, behind `handle`, and what was written since its last sync."""

    handle: int
    holders: int = 0
    pending: list[_Write] = field(default_factory=list)

    def view(self) -> bytes:
        """What a process reads."""
        data = bytearray(_whole(self.handle))
        for each in self.pending:
            if each.data is None:
                data.extend(bytes(max(0, each.offset - len(data))))
                del data[each.offset :]
            else:
                end = each.offset + len(each.data)
                data.extend(bytes(max(0, end - len(data))))
                data[each.offset : end] = each.data
        return bytes(data)


@dataclass(slots=True)
class _Naming:
    """A change of names that waits for its folder: `old` None removes `new`."""

    old: Path | None
    new: Path


class LosingDisk:
    """See the module."""

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._random = Random(seed)
        self._handles: dict[int, _Inode] = {}
        self._names: dict[Path, _Inode | None] = {}  # what this process sees; None: removed
        self._pending: list[_Naming] = []
        self._count = 0

    # -- files ------------------------------------------------------------------------------------

    def make_folder(self, path: Path) -> None:
        DISK.make_folder(path)

    def lock(self, path: Path) -> int:
        handle = DISK.lock(path)
        # What happens differs from life to life, and is the same for the same disk and seed.
        sizes = [(each.name, each.stat().st_size) for each in sorted(path.parent.iterdir())]
        self._random = Random(f"{self._seed} {path} {sizes}")
        for left in path.parent.glob(f"{PREFIX}*"):
            left.unlink(missing_ok=True)
        return self._hold(path, _Inode(handle))

    def create(self, path: Path) -> int:
        inode = self._known(path)
        if inode is not None:  # as O_TRUNC: the same file, empty
            self._write(inode, _Write(0, None))
            return self._hold(path, inode)
        self._count += 1
        hidden = path.with_name(f"{PREFIX}{os.getpid()}.{self._count}")
        inode = _Inode(DISK.create(hidden))
        number = self._hold(path, inode)
        self._rename(_Naming(hidden, path))
        return number

    def open(self, path: Path) -> int:
        inode = self._known(path)
        if inode is None:
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return self._hold(path, inode)

    def read(self, path: Path) -> bytes | None:
        if path not in self._names:
            return DISK.read(path)
        inode = self._names[path]
        return None if inode is None else inode.view()

    def write(self, handle: int, data: bytes, offset: int) -> None:
        self._write(self._handles[handle], _Write(offset, bytes(data)))

    def append(self, handle: int, data: bytes, offset: int) -> None:
        self.write(handle, data, offset)
        self.sync(handle)

    def truncate(self, handle: int, size: int) -> None:
        self._write(self._handles[handle], _Write(size, None))

    def allocate(self, handle: int, size: int) -> None:
        inode = self._handles[handle]
        if size > len(inode.view()):
            self._write(inode, _Write(size, None))

    def sync(self, handle: int) -> None:
        inode = self._handles[handle]
        if self._seed and inode.pending:
            self._write_early(inode)
            DISK.sync(inode.handle)  # Q2: it takes a while, in which the process may be killed
        for each in inode.pending:
            _carry_out(inode.handle, each.offset, each.data)
        DISK.sync(inode.handle)
        inode.pending.clear()

    def close(self, handle: int) -> None:
        inode = self._handles.pop(handle)
        inode.holders -= 1
        self._forget(inode)

    # -- names ------------------------------------------------------------------------------------

    def rename(self, old: Path, new: Path) -> None:
        inode = self._known(old)
        if inode is None:
            raise FileNotFoundError(2, "No such file or directory", str(old))
        replaced = self._names.get(new)
        self._names[new], self._names[old] = inode, None
        self._rename(_Naming(old, new))
        if replaced is not None:
            self._forget(replaced)

    def remove(self, path: Path) -> None:
        inode = self._known(path)
        if inode is None:
            return
        self._names[path] = None
        self._rename(_Naming(None, path))
        self._forget(inode)

    def sync_folder(self, path: Path) -> None:
        self._name_early(len(self._pending))
        DISK.sync_folder(path)

    def random(self, count: int) -> bytes:
        return DISK.random(count)

    def lose_power(self) -> None:
        """Forget what is not on the disk; every handle is closed, as those of a killed process."""
        inodes = {id(each): each for each in self._handles.values()}
        inodes |= {id(each): each for each in self._names.values() if each is not None}
        for inode in inodes.values():
            DISK.close(inode.handle)
        self._handles.clear()
        self._names.clear()
        self._pending.clear()

    # -- inside -----------------------------------------------------------------------------------

    def _known(self, path: Path) -> _Inode | None:
        """The file of that name as this process sees it."""
        if path not in self._names:
            try:
                self._names[path] = _Inode(DISK.open(path))
            except FileNotFoundError:
                return None
        return self._names[path]

    def _hold(self, path: Path, inode: _Inode) -> int:
        self._names[path] = inode
        inode.holders += 1
        self._count += 1
        self._handles[self._count] = inode
        return self._count

    def _forget(self, inode: _Inode) -> None:
        """Close the file of a name that is gone, once nobody holds it and nothing waits for it."""
        named = any(each is inode for each in self._names.values())
        if inode.holders == 0 and not (named and inode.pending):
            for path in [path for path, each in self._names.items() if each is inode]:
                if self._waits(path):
                    return
                del self._names[path]
            DISK.close(inode.handle)

    def _waits(self, path: Path) -> bool:
        return any(path in (each.old, each.new) for each in self._pending)

    def _write(self, inode: _Inode, write: _Write) -> None:
        inode.pending.append(write)
        if self._seed and self._random.random() < EARLY:
            self._write_early(inode)

    def _write_early(self, inode: _Inode) -> None:
        """Some of what waits for a sync is on the disk before it; it still waits for it."""
        handle, last = inode.handle, (0, 0)
        for each in inode.pending:
            if each.data is not None:
                last = max(last, self._write_some(handle, each.offset, each.data))
            elif self._random.random() < PART:
                _carry_out(handle, each.offset, None)
        begin, end = last
        if begin < end == os.fstat(handle).st_size:  # Q4: this piece has made the file longer
            _carry_out(handle, self._random.randint(begin + 1, end), None)

    def _write_some(self, handle: int, offset: int, data: bytes) -> tuple[int, int]:
        """Some sectors of a write, whole; the last of them that was beyond the end of the file."""
        size = os.fstat(handle).st_size
        last = (0, 0)
        for begin, end in _sectors(offset, len(data)):
            if begin < size < end or self._random.random() < PART:  # what was cut is completed
                _carry_out(handle, begin, data[begin - offset : end - offset])
                last = (begin, end) if begin >= size else last
        return last

    def _rename(self, naming: _Naming) -> None:
        self._pending.append(naming)
        if self._seed and self._random.random() < EARLY:
            self._name_early(self._random.randint(0, len(self._pending)))

    def _name_early(self, count: int) -> None:
        """Q3: make the first `count` changes of names real."""
        for each in self._pending[:count]:
            if each.old is None:
                DISK.remove(each.new)
            else:
                DISK.rename(each.old, each.new)
        del self._pending[:count]
        for path in [path for path, inode in self._names.items() if inode is None]:
            if not self._waits(path):
                del self._names[path]


def _whole(handle: int) -> bytes:
    size = os.fstat(handle).st_size
    data = b""
    while len(data) < size:
        more = os.pread(handle, size - len(data), len(data))
        if not more:
            break
        data += more
    return data


def _carry_out(handle: int, offset: int, data: bytes | None) -> None:
    if data is None:
        DISK.truncate(handle, offset)
    else:
        DISK.write(handle, data, offset)


def _sectors(offset: int, length: int) -> Iterator[tuple[int, int]]:
    """The parts of [offset, offset + length) that lie in one sector each."""
    end = offset + length
    while offset < end:
        edge = min(end, offset - offset % SECTOR_BYTES + SECTOR_BYTES)
        yield offset, edge
        offset = edge
