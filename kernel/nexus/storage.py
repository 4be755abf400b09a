"""What an acceptor must never forget: a map of records, one append-only checksummed file.

Interface: `open(folder)` recovers and locks the folder. `records()` is a view of what is there.
`append(changes)` makes one batch durable, whole or not at all, and returns when it is: grouping
what waits into one batch is the caller's. `close()` ends it; `verify(folder)` only looks. Used off
the event loop's thread, by one caller at a time.
Errors: `NotDurable`, the disk refused (full, read-only, a failed sync): this storage is finished,
every later call raises too, and what the last batch came to is only known after opening again.
`Amnesia`: what was acknowledged is damaged or gone: the voter must rejoin as a new one.
`Exhausted`: the batch would not fit; nothing was written and the storage goes on.
Invariants: S1 what was acknowledged is there after any crash, and beyond it at most the one batch
that was under way, whole. S2 after a failed call nothing more is written: a sync that failed once
may succeed the next time without having written (fsyncgate). S3 what `open` returned is durable
when it returns: the last frame is written again before the sync, because a sync that failed in an
earlier life left pages that look clean. S4 the file is replaced by a rename of one that is synced
whole, so at every step exactly one complete file has the name. S5 the file is at most about 2.5
times the records, LOG_BYTES_MIN and one batch, so recovery is bounded; where records were removed,
it shrinks within as many batches as they had slices.
Source: design page of nexus (storage); Pillai et al., OSDI 2014; Rebello et al., ATC 2020.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from manifold.kernel.durable import NotDurable
from manifold.kernel.errors import Exhausted, ManifoldError, Unavailable
from manifold.kernel.limits import KIB, MIB
from manifold.kernel.nexus import storage_frames as frames
from manifold.kernel.nexus.storage_files import DISK, Files
from manifold.kernel.nexus.storage_frames import BATCH_BYTES_MAX, KEY_BYTES_MAX, Change, Scan

LIVE_BYTES_MAX = 64 * MIB  # 1 024 registers of 64 KiB; read in about a second on a slow board
LOG_BYTES_MIN = 4 * MIB  # a log shorter than this is not worth replacing: read in 50 ms
SLICE_BYTES = 256 * KIB  # of a new file with each batch: about a millisecond more
SYNC_BYTES = 1 * MIB  # a new file is synced as it grows, so that no batch waits for all of it
ROOM_BYTES = 1 * MIB  # allocated at a time: some 2 500 batches of one record
FREE_BYTES = 4 * MIB  # of a replaced file with each batch; 140 MB at once took 60 ms
# Where nothing can be allocated ahead, the file grows as it is written.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
FILE, NEW, LOCK = "records", "records.new", "lock"
BORN = b"a voter lives here\n"  # in the lock file, once there were records
REJOIN = "Remove the folder and let this voter join again as a new one."


class Amnesia(ManifoldError):
    """A voter's memory is damaged: it may have promised or accepted what it no longer knows."""

    code = "amnesia"


@dataclass(frozen=True, slots=True)
class Sizes:
    """When the file is replaced and in which steps; tests make it small."""

    log_bytes_min: int = LOG_BYTES_MIN
    slice_bytes: int = SLICE_BYTES
    sync_bytes: int = SYNC_BYTES
    live_bytes_max: int = LIVE_BYTES_MAX
    room_bytes: int = ROOM_BYTES


@dataclass(frozen=True, slots=True)
class Report:
    """What a folder holds. `torn_bytes`: a last batch that a crash cut off, never acknowledged."""

    folder: Path
    records: int
    live_bytes: int
    file_bytes: int
    batches: int
    torn_bytes: int
    damage: str

    @property
    def sound(self) -> bool:
        return not self.damage

    def __str__(self) -> str:
        if self.damage:
            return f"{self.folder} is damaged: {self.damage}. {REJOIN}"
        text = f"{self.folder} is sound: {self.records} records, {self.live_bytes} bytes, "
        text += f"{self.batches} batches since the snapshot, {self.file_bytes} bytes of file."
        return text + (f" {self.torn_bytes} torn bytes end it." if self.torn_bytes else "")


def open(folder: Path, files: Files = DISK, sizes: Sizes = Sizes()) -> Storage:
    """Recover what is there, or begin where there never was anything."""
    with ExitStack() as undo:
        with _refusals(folder):
            files.make_folder(folder)
            lock = _locked(folder, files)
            undo.callback(files.close, lock)
            found, data = _recovered(folder, files)
            handle = files.open(folder / FILE)
            undo.callback(files.close, handle)
            if found.torn_bytes:
                files.truncate(handle, found.end)
            files.write(handle, data[found.last : found.end], found.last)  # S3
            files.sync(handle)
            files.sync_folder(folder)
            if files.read(folder / LOCK) != BORN:
                files.write(lock, BORN, 0)
                files.sync(lock)
        undo.pop_all()
    return Storage(folder, files, sizes, lock, handle, found, _report(folder, found, len(data)))


def verify(folder: Path, files: Files = DISK) -> Report:
    """Read everything and change nothing. While a voter runs, its batch under way looks torn."""
    for again in (True, False):
        with _refusals(folder):
            data = files.read(folder / FILE)
        if data is None:
            return Report(folder, 0, 0, 0, 0, 0, f"there is no {FILE} in it")
        report = _report(folder, frames.scan(data), len(data))
        if report.sound or not again:  # a file that a voter just replaced and frees looks damaged
            break
    return report


class Storage:
    """One folder, open and locked. `recovered` says what was found when it was opened."""

    def __init__(
        self, folder: Path, files: Files, sizes: Sizes, lock: int, handle: int,
        found: Scan, recovered: Report,
    ) -> None:  # fmt: skip
        self.recovered = recovered
        self._folder, self._files, self._sizes, self._lock = folder, files, sizes, lock
        self._records = found.records
        self._live_bytes = _live_bytes(found.records)
        room_end = found.end if found.torn_bytes else recovered.file_bytes
        self._file = _File(handle, found.salt, found.number, found.end, room_end)
        self._next: _Next | None = None
        self._replaced: _File | None = None  # it has no name any more, and is freed in steps
        self._finished = ""  # why nothing can be done any more

    def records(self) -> Mapping[bytes, bytes]:
        """A view that follows `append`; whoever reads in another thread copies it first."""
        self._check()
        return MappingProxyType(self._records)

    @property
    def file_bytes(self) -> int:
        return self._file.end

    def append(self, changes: Sequence[Change]) -> None:
        """Make the batch durable; later changes of one key win; None removes a key."""
        self._check()
        if not changes:
            return
        payload, live_bytes = self._fitting(changes)
        # Whatever cuts this short, an interrupt included, nothing is written after it (S2).
        self._finished = "a batch was cut short"
        try:
            self._write(payload, live_bytes, changes)
        except OSError as fault:
            refusal = _refused(self._folder, fault)
            self._finished = f"earlier, {refusal.message[0].lower()}{refusal.message[1:-1]}"
            raise refusal from fault
        self._finished = ""

    def _write(self, payload: bytes, live_bytes: int, changes: Sequence[Change]) -> None:
        grown = self._file.make_room(self._files, self._sizes.room_bytes, len(payload))
        self._file.add(self._files, frames.BATCH, payload, durable=not grown)
        if grown:  # the room as well
            self._files.sync(self._file.handle)
        frames.apply(self._records, changes)
        self._live_bytes = live_bytes
        self._free_in_steps()
        self._replace_in_steps(changes, len(payload))

    def close(self) -> None:
        """Give the folder back; everything is durable already. Nothing happens the second time."""
        if self._finished == "closed":
            return
        self._finished = "closed"
        if self._next is not None:
            self._files.close(self._next.file.handle)
        if self._replaced is not None:
            self._files.close(self._replaced.handle)
        self._files.close(self._file.handle)
        self._files.close(self._lock)

    def _check(self) -> None:
        if self._finished:
            raise NotDurable(
                f"The storage in {self._folder} has stopped: {self._finished}.", "Open it again."
            )

    def _fitting(self, changes: Sequence[Change]) -> tuple[bytes, int]:
        """The batch in bytes, and the size of all records after it."""
        payload = frames.encode(changes)
        final = dict(changes)
        live_bytes = self._live_bytes
        for key, value in final.items():
            assert len(key) <= KEY_BYTES_MAX, "the caller bounds its keys"
            before = self._records.get(key)
            live_bytes -= 0 if before is None else _bytes_of(key, before)
            live_bytes += 0 if value is None else _bytes_of(key, value)
        if len(payload) > BATCH_BYTES_MAX:
            raise Exhausted(
                f"A batch of {len(payload)} bytes is over {BATCH_BYTES_MAX}.", "Write less at once."
            )
        if live_bytes > max(self._sizes.live_bytes_max, self._live_bytes):
            raise Exhausted(
                f"The records in {self._folder} would take {live_bytes} bytes, over "
                f"{self._sizes.live_bytes_max}.",
                "Delete keys, or add a voter group.",
            )
        return payload, live_bytes

    # --- replacing the file -------------------------------------------------------------------

    def _replace_in_steps(self, changes: Sequence[Change], written: int) -> None:
        """With each batch a slice of the next file, so that no batch waits for all of it (S5)."""
        if self._next is None:
            if self._file.end <= 2 * self._live_bytes + self._sizes.log_bytes_min:
                return
            file = _File.begin(self._files, self._folder / NEW)
            self._next = _Next(file, iter(list(self._records)))
        self._next.changed.update((key, None) for key, _ in changes)
        if self._next.step(self._files, self._records, self._sizes, written):
            self._switch(self._next)

    def _switch(self, following: _Next) -> None:
        """S4: all of the new file is durable before it gets the name."""
        _seal(self._files, following.file, len(self._records))
        _give_name(self._folder, self._files)
        if self._replaced is not None:
            self._files.close(self._replaced.handle)
        self._replaced, self._file, self._next = self._file, following.file, None

    def _free_in_steps(self) -> None:
        old = self._replaced
        if old is None:
            return
        old.end = max(0, max(old.end, old.room_end) - FREE_BYTES)
        old.room_end = 0
        self._files.truncate(old.handle, old.end)
        if old.end == 0:
            self._replaced = None
            self._files.close(old.handle)


@dataclass(slots=True)
class _File:
    """A file that frames are added to."""

    handle: int
    salt: int
    number: int
    end: int
    room_end: int = 0  # up to here blocks are allocated, and zero behind `end`

    @classmethod
    def begin(cls, files: Files, path: Path) -> _File:
        salt = files.random(frames.SALT_BYTES)
        header = frames.file_header(salt)
        with ExitStack() as undo:
            handle = files.create(path)
            undo.callback(files.close, handle)
            files.write(handle, header, 0)
            undo.pop_all()
        return cls(handle, frames.salt_of(salt), 0, len(header))

    def make_room(self, files: Files, room_bytes: int, payload_bytes: int) -> bool:
        """Allocate ahead: a sync of blocks that the file has already needs no commit of the file
        system's journal. Whether there is something new to sync."""
        if self.end + payload_bytes <= self.room_end or not room_bytes:
            return False
        self.room_end = self.end + payload_bytes + room_bytes
        try:
            files.allocate(self.handle, self.room_end)
        except OSError as fault:
            if fault.errno not in NO_ROOM:
                raise
        return True

    def add(self, files: Files, kind: int, payload: bytes, *, durable: bool = False) -> None:
        data = frames.frame(kind, self.number, payload, self.salt)
        put = files.append if durable else files.write
        put(self.handle, data, self.end)
        self.number += 1
        self.end += len(data)


class _Next:
    """The file that will replace the present one, as far as it is written.

    Keys that change after they were written are written again, in a further pass; each pass is at
    most a quarter of the one before it, since a slice is four times what the log grew by.
    """

    def __init__(self, file: _File, todo: Iterator[bytes]) -> None:
        self.file = file
        self.todo = todo  # the keys of this pass
        self.changed: dict[bytes, None] = {}  # the keys of the next
        self.synced_end = 0

    def step(
        self, files: Files, records: Mapping[bytes, bytes], sizes: Sizes, written: int
    ) -> bool:
        """Write a slice; True when nothing is left."""
        found, done = self._slice(records, max(sizes.slice_bytes, 4 * written))
        for part in _parts(found, BATCH_BYTES_MAX):
            self.file.add(files, frames.SNAPSHOT, frames.encode(part))
        if self.file.end - self.synced_end >= sizes.sync_bytes:
            files.sync(self.file.handle)
            self.synced_end = self.file.end
        return done

    def _slice(self, records: Mapping[bytes, bytes], budget: int) -> tuple[list[Change], bool]:
        """Changes that make the next keys what they are now, and whether they are the last."""
        found: list[Change] = []
        while budget > 0:
            key = next(self.todo, None)
            if key is not None:
                value = records.get(key)
                found.append((key, value))
                budget -= _bytes_of(key, value or b"")
            elif self.changed:
                self.todo, self.changed = iter(self.changed), {}
            else:
                return found, True
        return found, False


def _parts(changes: Sequence[Change], bytes_max: int) -> Iterator[list[Change]]:
    """The changes in runs that fit a frame each."""
    part: list[Change] = []
    size = 0
    for key, value in changes:
        more = _bytes_of(key, value or b"")
        if part and size + more > bytes_max:
            yield part
            part, size = [], 0
        part.append((key, value))
        size += more
    if part:
        yield part


def _seal(files: Files, file: _File, records: int) -> None:
    file.add(files, frames.SEAL, frames.seal(records))
    files.sync(file.handle)


def _give_name(folder: Path, files: Files) -> None:
    files.rename(folder / NEW, folder / FILE)
    files.sync_folder(folder)


# --- opening ----------------------------------------------------------------------------------


def _locked(folder: Path, files: Files) -> int:
    try:
        return files.lock(folder / LOCK)
    except BlockingIOError as fault:
        raise Unavailable(
            f"Another process holds the storage in {folder}.", "Stop it first."
        ) from fault


def _recovered(folder: Path, files: Files) -> tuple[Scan, bytes]:
    files.remove(folder / NEW)  # a file that never got the name
    data = files.read(folder / FILE)
    if data is None:
        if files.read(folder / LOCK):
            raise Amnesia(f"The {FILE} in {folder} are gone.", REJOIN)
        data = _begun(folder, files)
    found = frames.scan(data)
    if found.damage:
        raise Amnesia(f"{folder / FILE} is damaged: {found.damage}.", REJOIN)
    return found, data


def _begun(folder: Path, files: Files) -> bytes:
    """A file without records, durable; its bytes."""
    file = _File.begin(files, folder / NEW)
    try:
        _seal(files, file, 0)
        _give_name(folder, files)
        data = files.read(folder / FILE)
    finally:
        files.close(file.handle)
    assert data is not None, "it has just been given the name"
    return data


def _report(folder: Path, found: Scan, file_bytes: int) -> Report:
    return Report(
        folder, len(found.records), _live_bytes(found.records), file_bytes, found.batches,
        found.torn_bytes, found.damage,
    )  # fmt: skip


def _bytes_of(key: bytes, value: bytes) -> int:
    return frames.CHANGE_BYTES + len(key) + len(value)


def _live_bytes(records: Mapping[bytes, bytes]) -> int:
    return sum(_bytes_of(key, value) for key, value in records.items())


@contextmanager
def _refusals(folder: Path) -> Iterator[None]:
    """What the operating system refuses, as a sentence and what to do."""
    try:
        yield
    except OSError as fault:
        raise _refused(folder, fault) from fault


def _refused(folder: Path, fault: OSError) -> NotDurable:
    advice = {
        errno.ENOSPC: "Free space on it, then start the voter again.",
        errno.EDQUOT: "Free space or raise the quota, then start the voter again.",
        errno.EROFS: "Make it writable, then start the voter again.",
        errno.EACCES: "Run as the owner of the folder.",
    }.get(fault.errno or 0, "Check the disk before the voter is started again.")
    return NotDurable(f"The disk refused {folder}: {fault.strerror}.", advice)
