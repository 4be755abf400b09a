"""The losing disk: what was not synced is gone, what was is there, whenever the power goes."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from manifold.kernel.nexus import storage, storage_losing
from manifold.kernel.nexus.storage import Sizes
from manifold.kernel.nexus.storage_files import Disk
from manifold.kernel.nexus.storage_frames import Change
from manifold.kernel.nexus.storage_losing import LosingDisk

SMALL = Sizes(log_bytes_min=3000, slice_bytes=800, sync_bytes=1000)  # replaced every few batches
LIVES = 40


class PowerLoss(BaseException):
    """The machine goes dark between two real system calls."""


class Mortal(Disk):
    """The real disk, until it has been changed `left` times."""

    def __init__(self, left: int) -> None:
        self.left = left

    def _change(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise PowerLoss

    def create(self, path: Path) -> int:
        self._change()
        return super().create(path)

    def write(self, handle: int, data: bytes, offset: int) -> None:
        self._change()
        super().write(handle, data, offset)

    def truncate(self, handle: int, size: int) -> None:
        self._change()
        super().truncate(handle, size)

    def sync(self, handle: int) -> None:
        self._change()

    def rename(self, old: Path, new: Path) -> None:
        self._change()
        super().rename(old, new)

    def remove(self, path: Path) -> None:
        self._change()
        super().remove(path)

    def sync_folder(self, path: Path) -> None:
        self._change()


class NeverSyncs(LosingDisk):
    """The planted fault: it says that everything is durable, and does nothing."""

    def sync(self, handle: int) -> None:
        return None


def batch(random: Random, number: int) -> list[Change]:
    """A few keys, of values that fill several sectors now and then."""
    found: list[Change] = [(b"last", b"%d" % number)]
    for _ in range(random.randint(0, 3)):
        size = random.choice((0, 5, 700, 3000))
        value = random.choice((random.randbytes(size), bytes(size), None))
        found.append((b"k%d" % random.randrange(8), value))
    return found


def after(records: dict[bytes, bytes], changes: list[Change]) -> dict[bytes, bytes]:
    changed = dict(records)
    for key, value in changes:
        changed.pop(key, None)
        if value is not None:
            changed[key] = value
    return changed


def live(folder: Path, disk: LosingDisk, random: Random) -> tuple[dict[bytes, bytes], ...]:
    """Append until the power goes: what was acknowledged, and with what was under way."""
    known = maybe = {}
    try:
        opened = storage.open(folder, disk, SMALL)
        known = maybe = dict(opened.records())
        for number in range(1000):
            changes = batch(random, number)
            maybe = after(known, changes)
            opened.append(changes)
            known = maybe
            assert dict(opened.records()) == known
    except PowerLoss:
        disk.lose_power()
    return known, maybe


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_was_acknowledged_is_there_after_any_loss_of_power(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And beyond it at most the batch that was under way, whole. Early writes make torn tails."""
    random = Random(seed)
    folder = tmp_path / "v"
    storage.open(folder).close()
    tails = 0
    for life in range(LIVES):
        before = dict(storage.open(folder, disk := LosingDisk(), SMALL).records())
        disk.lose_power()
        monkeypatch.setattr(storage_losing, "DISK", Mortal(random.choice((2, 9, 40, 150))))
        known, maybe = live(folder, LosingDisk(seed), random)
        monkeypatch.undo()
        report = storage.verify(folder)
        assert report.sound, f"life {life}: {report}"
        tails += report.torn_bytes > 0
        opened = storage.open(folder, disk := LosingDisk(), SMALL)
        assert dict(opened.records()) in (known or before, maybe or before), f"life {life}"
        disk.lose_power()
    assert (tails > 0) == (seed > 0)


def test_seeds_differ_in_what_reaches_the_disk_early(tmp_path: Path) -> None:
    """Without one nothing does; with one a batch under way is found torn, sooner or later."""
    torn = {}
    for seed in range(12):
        folder = tmp_path / str(seed)
        disk = LosingDisk(seed)
        opened = storage.open(folder, disk)
        handle = disk.open(folder / storage.FILE)
        size = len(disk.read(folder / storage.FILE) or b"")
        for at in range(20):
            disk.write(handle, Random(at).randbytes(1500), size + 1500 * at)
        disk.lose_power()
        torn[seed] = (folder / storage.FILE).stat().st_size - size
        del opened
    assert torn[0] == 0
    assert len({*torn.values()}) > 6


def test_a_sector_is_written_whole_or_not_at_all_unless_it_ends_the_file(tmp_path: Path) -> None:
    sector = storage_losing.SECTOR_BYTES
    path = tmp_path / "file"
    for seed in range(1, 60):
        disk = LosingDisk(seed)
        disk.lock(tmp_path / "lock")
        handle = disk.create(path)
        disk.sync_folder(tmp_path)
        for at in range(4):
            disk.write(handle, b"x" * 1300, at * 1300)
        disk.lose_power()
        data = path.read_bytes()
        edges = sorted({*range(0, 5200, sector), *range(0, 5200, 1300), 5200})
        for begin, end in itertools.pairwise(edges):
            piece = data[begin:end]
            assert len(data) < end or piece.strip(b"x") == b"" or piece.strip(b"\0") == b""
        path.unlink()


def test_names_become_real_with_their_folder_and_in_order(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    seen = set()
    for seed in range(40):
        disk = LosingDisk(seed)
        disk.lock(tmp_path / "lock")
        handle = disk.create(one)
        disk.write(handle, b"data", 0)
        disk.sync(handle)
        assert disk.read(one) == b"data"
        disk.rename(one, two)
        assert disk.read(one) is None
        assert disk.read(two) == b"data"
        disk.lose_power()
        seen.add((one.exists(), two.exists()))
        assert seed or not (one.exists() or two.exists())
        for path in (one, two):
            assert not path.exists() or path.read_bytes() == b"data"
            path.unlink(missing_ok=True)
    assert seen == {(False, False), (True, False), (False, True)}
    disk = LosingDisk(5)
    disk.lock(tmp_path / "lock")
    disk.create(one)
    disk.rename(one, two)
    disk.sync_folder(tmp_path)
    disk.lose_power()
    assert two.exists()
    assert not one.exists()


def test_a_removal_that_did_not_reach_the_folder_did_not_happen(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"still here")
    disk = LosingDisk()
    disk.remove(path)
    assert disk.read(path) is None
    disk.lose_power()
    assert path.read_bytes() == b"still here"
    disk.remove(path)
    disk.sync_folder(tmp_path)
    assert not path.exists()


def test_a_file_that_never_got_its_name_is_removed_by_the_next_life(tmp_path: Path) -> None:
    disk = LosingDisk()
    disk.lock(tmp_path / "lock")
    disk.sync(disk.create(tmp_path / "file"))
    disk.lose_power()
    assert list(tmp_path.glob(".losing.*"))
    LosingDisk().lock(tmp_path / "lock")
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_files_are_closed_when_nobody_needs_them(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for life in range(5):
        opened = storage.open(tmp_path / "v", LosingDisk(3), SMALL)
        random = Random(life)
        for number in range(40):
            opened.append(batch(random, number))
        opened.close()
    assert len(os.listdir("/proc/self/fd")) <= before + 5  # the locks' inodes go with their object


# -- real processes -------------------------------------------------------------------------------

WRITER = """
import sys
from pathlib import Path
from manifold.kernel.nexus import storage
from manifold.kernel.nexus.storage_losing import LosingDisk

class NeverSyncs(LosingDisk):
    def sync(self, handle):
        return None

opened = storage.open(Path(sys.argv[1]), LosingDisk(int(sys.argv[2])))
if sys.argv[3] == "planted":
    opened._files.__class__ = NeverSyncs
known = int(dict(opened.records()).get(b"n", b"0"))
print(known, flush=True)
while True:
    known += 1
    opened.append([(b"n", b"%d" % known), (b"pad%d" % (known % 5), b"x" * 2000)])
    print(known, flush=True)
"""


def killed_while_it_writes(folder: Path, seed: int, kind: str, acks: int) -> tuple[int, int]:
    """The first and the last number that a process told before SIGKILL."""
    command = [sys.executable, "-P", "-c", WRITER, str(folder), str(seed), kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = [int(process.stdout.readline()) for _ in range(acks)]
        process.send_signal(signal.SIGKILL)
        told += [int(line) for line in process.stdout.read().splitlines()]
    return told[0], told[-1]


def test_a_killed_process_has_lost_nothing_that_it_acknowledged(tmp_path: Path) -> None:
    last = 0
    for seed in (0, 1, 2):
        first, last_now = killed_while_it_writes(tmp_path / "v", seed, "honest", 30 + seed * 17)
        assert last <= first <= last + 1
        last = last_now
    report = storage.verify(tmp_path / "v")
    assert report.sound


def test_a_storage_that_acknowledges_before_the_sync_loses_what_it_acknowledged(
    tmp_path: Path,
) -> None:
    _, last = killed_while_it_writes(tmp_path / "v", 0, "planted", 40)
    first, _ = killed_while_it_writes(tmp_path / "v", 0, "honest", 1)
    assert first < last
