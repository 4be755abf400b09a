"""An acceptor's storage on a disk that loses power, tears, refuses and lies of failed syncs."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold.kernel.durable import NotDurable
from manifold.kernel.errors import Exhausted, Unavailable
from manifold.kernel.nexus import storage
from manifold.kernel.nexus.storage import Amnesia, Sizes
from manifold.kernel.nexus.storage_frames import BATCH_BYTES_MAX, Change

FOLDER = Path("/voter")
FILE, NEW, LOCK = (FOLDER / name for name in (storage.FILE, storage.NEW, storage.LOCK))
SMALL = Sizes(  # replaced every few batches, and room made every few
    log_bytes_min=600, slice_bytes=100, sync_bytes=200, room_bytes=700
)
ROOMLESS = replace(SMALL, room_bytes=0)  # every batch ends the file
SECTOR = 512
CHANGING = (
    "create", "write", "truncate", "allocate", "sync", "rename", "remove", "sync_folder", "lock"
)  # fmt: skip


class PowerLoss(BaseException):
    """The machine goes dark between two system calls."""


@dataclass
class Inode:
    view: bytearray = field(default_factory=bytearray)  # what a process reads: the page cache
    disk: bytearray = field(default_factory=bytearray)
    dirty: list[tuple[int, bytes | None]] = field(default_factory=list)  # None: so long now


def put(data: bytearray, offset: int, piece: bytes) -> None:
    data.extend(bytes(max(0, offset + len(piece) - len(data))))
    data[offset : offset + len(piece)] = piece


def cut(data: bytearray, size: int) -> None:
    """Make it that long; zeros where it was shorter."""
    put(data, size, b"")
    del data[size:]


class Machine:
    """A file layer of one folder whose unsynced writes and names a power loss may take.

    A failed sync forgets what was dirty and still shows it, as Linux does. A failed sync of a
    folder makes everything read-only, as a journal that gave up does.
    """

    def __init__(self) -> None:
        self.names: dict[Path, Inode] = {}
        self.names_on_disk: dict[Path, Inode] = {}
        self.names_dirty: list[dict[Path, Inode]] = []
        self.handles: dict[int, Inode] = {}
        self.locked: set[int] = set()
        self.calls: list[str] = []
        self.cut_at = self.fail_at = -1
        self.fault = errno.EIO
        self.read_only = False
        self.salts = 0

    def call(self, name: str) -> None:
        if len(self.calls) == self.cut_at:
            raise PowerLoss
        self.calls.append(name)
        if self.read_only and name in CHANGING:
            raise OSError(errno.EROFS, "Read-only file system")
        if len(self.calls) - 1 == self.fail_at:
            raise OSError(self.fault, "planted")

    def handle(self, inode: Inode) -> int:
        number = 1 + max(self.handles, default=2)
        self.handles[number] = inode
        return number

    def renamed(self) -> None:
        self.names_dirty.append(dict(self.names))

    # the layer

    def make_folder(self, path: Path) -> None:
        self.call("make_folder")

    def lock(self, path: Path) -> int:
        self.call("lock")
        if self.locked:
            raise BlockingIOError(errno.EAGAIN, "locked")
        if path not in self.names:
            self.names[path] = Inode()
            self.renamed()
        number = self.handle(self.names[path])
        self.locked.add(number)
        return number

    def create(self, path: Path) -> int:
        self.call("create")
        self.names[path] = Inode()
        self.renamed()
        return self.handle(self.names[path])

    def open(self, path: Path) -> int:
        self.call("open")
        return self.handle(self.names[path])

    def read(self, path: Path) -> bytes | None:
        self.call("read")
        return bytes(self.names[path].view) if path in self.names else None

    def write(self, handle: int, data: bytes, offset: int) -> None:
        inode = self.handles[handle]
        try:
            self.call("write")
        except OSError:
            self.write_to(inode, data[: len(data) // 2], offset)  # as a full disk does
            raise
        self.write_to(inode, data, offset)

    def write_to(self, inode: Inode, data: bytes, offset: int) -> None:
        put(inode.view, offset, data)
        inode.dirty.append((offset, data))

    def truncate(self, handle: int, size: int) -> None:
        self.call("truncate")
        del self.handles[handle].view[size:]
        self.handles[handle].dirty.append((size, None))

    def allocate(self, handle: int, size: int) -> None:
        self.call("allocate")
        inode = self.handles[handle]
        if size > len(inode.view):
            cut(inode.view, size)
            inode.dirty.append((size, None))

    def append(self, handle: int, data: bytes, offset: int) -> None:
        self.write(handle, data, offset)
        self.sync(handle)

    def sync(self, handle: int) -> None:
        inode = self.handles[handle]
        try:
            self.call("sync")
        except OSError:
            inode.dirty.clear()
            raise
        for offset, data in inode.dirty:
            self.persist(inode, offset, data)
        inode.dirty.clear()

    @staticmethod
    def persist(inode: Inode, offset: int, data: bytes | None) -> None:
        if data is None:
            cut(inode.disk, offset)
        else:
            put(inode.disk, offset, data)

    def close(self, handle: int) -> None:
        if len(self.calls) == self.cut_at:
            raise PowerLoss
        self.calls.append("close")  # never refused
        del self.handles[handle]
        self.locked.discard(handle)

    def rename(self, old: Path, new: Path) -> None:
        self.call("rename")
        self.names[new] = self.names.pop(old)
        self.renamed()

    def remove(self, path: Path) -> None:
        self.call("remove")
        if self.names.pop(path, None) is not None:
            self.renamed()

    def sync_folder(self, path: Path) -> None:
        try:
            self.call("sync_folder")
        except OSError:
            self.names_dirty.clear()
            self.read_only = True
            raise
        self.names_on_disk = dict(self.names)
        self.names_dirty.clear()

    def random(self, count: int) -> bytes:
        self.salts += 1
        return Random(self.salts).randbytes(count)

    # what a test does to it

    def power_loss(self, random: Random) -> None:
        """Some names, and any sectors or any prefix of what was not synced, reached the disk."""
        kept = random.randint(0, len(self.names_dirty))
        self.names = dict(self.names_dirty[kept - 1] if kept else self.names_on_disk)
        self.names_on_disk, self.names_dirty = dict(self.names), []
        for inode in self.names.values():
            for offset, data in inode.dirty:
                if data is None:
                    if random.random() < 0.5:
                        self.persist(inode, offset, None)
                    continue
                if random.random() < 0.3:  # the file was made longer before anything was in it
                    inode.disk.extend(bytes(max(0, offset + len(data) - len(inode.disk))))
                for at, piece in self.survivors(random, offset, data):
                    put(inode.disk, at, piece)
            inode.dirty.clear()
            inode.view = bytearray(inode.disk)
        self.handles.clear()
        self.locked.clear()
        self.cut_at, self.fail_at, self.read_only, self.calls = -1, -1, False, []

    @staticmethod
    def survivors(random: Random, offset: int, data: bytes) -> Iterator[tuple[int, bytes]]:
        how = random.choice(("none", "all", "prefix", "sectors", "sectors"))
        if how == "all":
            yield offset, data
        elif how == "prefix":
            yield offset, data[: random.randint(0, len(data))]
        elif how == "sectors":
            edges = [offset, *range(offset - offset % SECTOR + SECTOR, offset + len(data), SECTOR)]
            for low, high in zip(edges, [*edges[1:], offset + len(data)], strict=True):
                if random.random() < 0.5:
                    yield low, data[low - offset : high - offset]

    def restart(self) -> None:
        """The process ends; the page cache, and what a failed sync left in it, stays."""
        self.handles.clear()
        self.locked.clear()
        self.cut_at, self.fail_at, self.read_only, self.calls = -1, -1, False, []


Records = dict[bytes, bytes]


def after(records: Records, batch: list[Change]) -> Records:
    changed = dict(records)
    for key, value in batch:
        if value is None:
            changed.pop(key, None)
        else:
            changed[key] = value
    return changed


def batch_of(random: Random) -> list[Change]:
    def value() -> bytes | None:
        if random.random() < 0.15:
            return None
        size = random.choice((0, 3, 40, 255, 700, 1500))
        return bytes(size) if random.random() < 0.3 else random.randbytes(size)

    return [(b"k%d" % random.randrange(6), value()) for _ in range(random.randint(1, 3))]


class Voter:
    """Writes to a storage, and knows what it may find after anything."""

    def __init__(self, seed: int, sizes: Sizes = SMALL) -> None:
        self.machine = Machine()
        self.sizes = sizes
        self.random = Random(seed)
        self.acknowledged: Records = {}
        self.under_way: Records | None = None

    def open(self) -> storage.Storage:
        opened = storage.open(FOLDER, self.machine, self.sizes)
        found = dict(opened.records())
        assert NEW not in self.machine.names, "what never got the name is gone"
        assert found in (self.acknowledged, self.under_way), "lost, half there, or made up"
        self.acknowledged, self.under_way = found, None
        return opened

    def append(self, opened: storage.Storage, batch: list[Change]) -> None:
        self.under_way = after(self.acknowledged, batch)
        opened.append(batch)
        self.acknowledged, self.under_way = self.under_way, None
        assert opened.records() == self.acknowledged

    def live(self, batches: int) -> None:
        opened = self.open()
        for _ in range(batches):
            self.append(opened, batch_of(self.random))
        opened.close()

    def until_power_loss(self, batches: int, cut_at: int) -> bool:
        """Whether the power failed before all was done."""
        self.machine.cut_at = cut_at
        try:
            self.live(batches)
            return False
        except PowerLoss:
            return True
        finally:
            self.machine.power_loss(self.random)


def calls_of(voter: Voter, batches: int) -> int:
    """How many system calls a whole life takes."""
    voter.live(batches)
    assert voter.machine.calls.count("rename") > 2, "the file is replaced on the way"
    return len(voter.machine.calls)


# --- power loss -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_power_may_fail_between_any_two_system_calls(seed: int) -> None:
    calls = calls_of(Voter(seed), 30)
    for cut_at in range(calls):
        voter = Voter(seed)
        assert voter.until_power_loss(30, cut_at)
        voter.until_power_loss(2, voter.random.randint(0, 30))  # and again while it recovers
        voter.live(1)


@pytest.mark.parametrize("seed", range(3))
def test_a_process_may_be_killed_between_any_two_system_calls(seed: int) -> None:
    calls = calls_of(Voter(seed), 30)
    for cut_at in range(calls):
        voter = Voter(seed)
        voter.machine.cut_at = cut_at
        with suppress(PowerLoss):
            voter.live(30)
        voter.machine.restart()  # what was not synced is seen by the next one all the same
        voter.live(1)
        voter.machine.power_loss(voter.random)
        voter.live(1)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(0, 60), min_size=1, max_size=6))
def test_any_row_of_power_losses_keeps_what_was_acknowledged(seed: int, cuts: list[int]) -> None:
    voter = Voter(seed)
    for cut_at in cuts:
        voter.until_power_loss(12, cut_at)
    voter.live(3)


@pytest.mark.parametrize("filled", [False, True])
def test_a_last_batch_cut_at_any_byte_is_dropped_whole(filled: bool) -> None:
    voter = Voter(1, ROOMLESS)
    voter.live(3)
    machine, acknowledged = voter.machine, voter.acknowledged
    durable = bytes(machine.names[FILE].disk)
    opened = voter.open()
    opened.append([(b"torn", bytes(300) + b"x" * 600), (b"k1", None)])
    whole = bytes(machine.names[FILE].disk)
    opened.close()
    for size in range(len(durable), len(whole)):
        torn = whole[:size] + bytes(len(whole) - size if filled else 0)
        machine.names[FILE].view, machine.names[FILE].disk = bytearray(torn), bytearray(torn)
        report = storage.verify(FOLDER, machine)
        room = size == len(durable)  # nothing of it was written: zeros are room for frames
        assert report.sound
        assert report.torn_bytes == max(0, len(torn.rstrip(b"\0")) - len(durable)), size
        again = storage.open(FOLDER, machine, ROOMLESS)
        assert again.records() == acknowledged and again.file_bytes == len(durable)
        again.close()
        assert bytes(machine.names[FILE].disk) == (torn if room else durable), "gone for good"


def test_a_last_batch_that_misses_any_sectors_is_dropped_whole() -> None:
    voter = Voter(2, ROOMLESS)
    voter.live(2)
    machine, acknowledged = voter.machine, voter.acknowledged
    begin = len(machine.names[FILE].disk)
    opened = voter.open()
    opened.append([(b"torn", bytes(2000)), (b"also", b"x" * 500)])
    whole = bytes(machine.names[FILE].disk)
    opened.close()
    edges = [begin, *range(begin - begin % SECTOR + SECTOR, len(whole), SECTOR), len(whole)]
    sectors = list(pairwise(edges))
    for mask in range(1, 1 << len(sectors)):
        torn = bytearray(whole)
        for index, (low, high) in enumerate(sectors):
            if mask >> index & 1:
                torn[low:high] = bytes(high - low)
        machine.names[FILE].view, machine.names[FILE].disk = torn, bytearray(torn)
        again = storage.open(FOLDER, machine, SMALL)
        assert again.records() == acknowledged, f"sectors {mask:b}"
        again.close()


# --- damage -----------------------------------------------------------------------------------


def test_damage_is_amnesia_and_leaves_nothing_open_or_changed() -> None:
    voter = Voter(3, ROOMLESS)
    voter.live(12)
    machine = voter.machine
    for at in range(0, len(machine.names[FILE].disk), 7):
        machine.names[FILE].view[at] ^= 1
        before = bytes(machine.names[FILE].view)
        with pytest.raises(Amnesia, match="join again as a new one"):
            storage.open(FOLDER, machine, SMALL)
        assert not machine.handles and bytes(machine.names[FILE].view) == before
        assert "is damaged" in str(storage.verify(FOLDER, machine))
        machine.names[FILE].view[at] ^= 1
    voter.live(1)


def test_records_that_are_gone_are_amnesia_and_not_a_new_voter() -> None:
    voter = Voter(7)
    voter.live(2)
    voter.machine.remove(FILE)
    assert "there is no records" in str(storage.verify(FOLDER, voter.machine))
    with pytest.raises(Amnesia, match="are gone"):
        storage.open(FOLDER, voter.machine, SMALL)


def test_zeros_that_a_file_system_added_are_no_damage() -> None:
    voter = Voter(8)
    voter.live(5)
    voter.machine.names[FILE].view.extend(bytes(5000))
    voter.live(5)


def test_batches_go_into_room_that_was_made_before_and_again_after_a_restart() -> None:
    voter = Voter(4, replace(SMALL, log_bytes_min=100_000))
    disk = lambda: len(voter.machine.names[FILE].disk)  # noqa: E731
    opened = voter.open()
    sizes = []
    for _ in range(30):
        voter.append(opened, [(b"k", b"v")])
        sizes.append(disk())
    opened.close()
    assert len(set(sizes)) == voter.machine.calls.count("allocate") < 5
    assert opened.file_bytes < sizes[-1]
    voter.live(1)
    assert disk() == sizes[-1], "there was room left"


# --- a disk that refuses ----------------------------------------------------------------------


@pytest.mark.parametrize("fault", [errno.EIO, errno.ENOSPC])
def test_any_refused_call_ends_the_storage_and_loses_nothing(fault: int) -> None:
    whole = Voter(0)
    calls_of(whole, 20)
    for fail_at, name in enumerate(whole.machine.calls):
        voter = Voter(0)
        machine = voter.machine
        machine.fail_at, machine.fault = fail_at, fault
        hint = name == "allocate" and fault in storage.NO_ROOM
        assert until_refused(voter) == (name != "close" and not hint), f"call {fail_at}, {name}"
        machine.restart()
        voter.live(0)  # the page cache may show what never reached the disk
        machine.power_loss(voter.random)
        voter.live(2)


def until_refused(voter: Voter) -> bool:
    """Twenty batches; at the first refusal, see that nothing more is written, ever."""
    opened = None
    try:
        opened = voter.open()
        for _ in range(20):
            voter.append(opened, batch_of(voter.random))
    except NotDurable:
        calls = len(voter.machine.calls)
        if opened is not None:
            for _ in range(2):
                with pytest.raises(NotDurable, match=r"has stopped: earlier, the disk refused"):
                    opened.append([(b"k", b"v")])
                with pytest.raises(NotDurable):
                    opened.records()
            opened.close()
        assert set(voter.machine.calls[calls:]) <= {"close"}
        assert not voter.machine.handles
        return True
    opened.close()
    return False


@pytest.mark.parametrize(
    ("fault", "advice"),
    [
        (errno.ENOSPC, "Free space"),
        (errno.EROFS, "Make it writable"),
        (errno.EIO, "Check the disk"),
    ],
)
def test_a_refusal_says_what_to_do(fault: int, advice: str) -> None:
    voter = Voter(0, ROOMLESS)
    opened = voter.open()
    voter.machine.fail_at, voter.machine.fault = len(voter.machine.calls), fault
    with pytest.raises(NotDurable, match=advice):
        opened.append([(b"k", b"v")])


def test_an_interrupted_batch_ends_the_storage_too() -> None:
    voter = Voter(0)
    opened = voter.open()
    voter.machine.cut_at = len(voter.machine.calls) + 1
    with suppress(PowerLoss):
        opened.append([(b"k", b"v")])
    with pytest.raises(NotDurable, match="cut short"):
        opened.append([(b"k", b"v")])


# --- bounds -----------------------------------------------------------------------------------


def test_the_file_stays_within_its_bound_and_shrinks_with_the_records() -> None:
    machine, random = Machine(), Random(0)
    opened = storage.open(FOLDER, machine, SMALL)
    lives: list[int] = []
    for number in range(600):
        value = random.randbytes(200) if number < 400 else None
        opened.append([(b"%d" % random.randrange(40), value)])
        lives.append(sum(len(key) + len(each) + 8 for key, each in opened.records().items()))
        live = max(lives[-100:])  # a replacement takes that many batches when slices are so small
        headers = 0.15 * live  # 26 bytes for each value of 200
        assert opened.file_bytes <= 2.5 * live + SMALL.log_bytes_min + headers + 300, number
    assert opened.file_bytes < 2000


def test_a_replaced_file_is_freed_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FREE_BYTES", 700)
    sizes: list[int] = []

    class Watched(Machine):
        def truncate(self, handle: int, size: int) -> None:
            sizes.append(size)
            super().truncate(handle, size)

    machine = Watched()
    opened = storage.open(FOLDER, machine, Sizes(3000, 1000, 1000, room_bytes=1400))
    while machine.calls.count("rename") < 2:
        before = opened.file_bytes
        opened.append([(b"k", b"x" * 200)])
    assert not sizes, "not with the batch that replaced it"
    for _ in range(12):
        opened.append([(b"k", b"x" * 200)])
    assert len(machine.handles) == 2, "the lock and the file"
    assert len(sizes) > before // 700
    assert sizes[-1] == 0 and all(high - low <= 700 for high, low in pairwise(sizes))


def test_a_batch_that_does_not_fit_is_refused_and_the_storage_goes_on() -> None:
    machine = Machine()
    opened = storage.open(FOLDER, machine, Sizes(live_bytes_max=1000))
    opened.append([(b"a", b"x" * 900)])
    calls = len(machine.calls)
    with pytest.raises(Exhausted, match="over 1000"):
        opened.append([(b"b", b"x" * 200)])
    with pytest.raises(Exhausted, match="A batch"):
        opened.append([(b"a", bytes(BATCH_BYTES_MAX))])
    assert len(machine.calls) == calls, "nothing was written"
    opened.append([(b"a", b"y" * 900)])
    opened.append([(b"a", None), (b"b", b"x" * 900)])
    assert opened.records() == {b"b": b"x" * 900}


def test_an_empty_batch_writes_nothing() -> None:
    machine = Machine()
    opened = storage.open(FOLDER, machine)
    calls = len(machine.calls)
    opened.append([])
    assert len(machine.calls) == calls


# --- the real disk ----------------------------------------------------------------------------


def test_it_comes_back_from_a_real_disk(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "voter"
    random, records = Random(1), Records()
    for _ in range(4):
        opened = storage.open(folder, sizes=SMALL)
        assert opened.records() == records
        for _ in range(15):
            batch = batch_of(random)
            opened.append(batch)
            records = after(records, batch)
        opened.close()
        opened.close()
    assert {each.name for each in folder.iterdir()} <= {"records", "records.new", "lock"}
    assert {each.stat().st_mode & 0o777 for each in folder.iterdir()} == {0o600}
    report = storage.verify(folder)
    assert report.sound and report.records == len(records)
    assert f"{len(records)} records" in str(report)


def test_a_folder_has_one_owner_at_a_time(tmp_path: Path) -> None:
    first = storage.open(tmp_path)
    with pytest.raises(Unavailable, match="Another process holds"):
        storage.open(tmp_path)
    assert storage.verify(tmp_path).sound, "looking is always allowed"
    first.close()
    storage.open(tmp_path).close()


def test_a_disk_that_is_really_full_is_told_and_what_was_acknowledged_stays(tmp_path: Path) -> None:
    script = """
import resource, sys
from pathlib import Path
from manifold.kernel.durable import NotDurable
from manifold.kernel.nexus import storage
opened = storage.open(Path(sys.argv[1]))
opened.append([(b"first", b"1")])
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
for _ in range(2):
    try:
        opened.append([(b"second", bytes(9000))])
    except NotDurable as refusal:
        print(refusal)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    first, second = done.stdout.splitlines()
    assert "File too large" in first and "has stopped" in second
    assert storage.verify(tmp_path).torn_bytes > 0
    opened = storage.open(tmp_path)
    assert opened.records() == {b"first": b"1"}
    opened.close()
