"""What damage to an acceptor's file means: torn, and never acknowledged, or altered."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifold.kernel.nexus import storage
from manifold.kernel.nexus.storage import Sizes
from manifold.kernel.nexus.storage_files import Disk
from manifold.kernel.nexus.storage_frames import (
    BATCH,
    SEAL,
    SECTOR_BYTES,
    SNAPSHOT,
    Change,
    encode,
    file_header,
    frame,
    salt_of,
    scan,
    seal,
)

SALT = b"saltsalt"


def file_of(*frames: tuple[int, bytes]) -> bytes:
    """A file of these frames; kinds and payloads."""
    made = [frame(kind, n, payload, salt_of(SALT)) for n, (kind, payload) in enumerate(frames)]
    return file_header(SALT) + b"".join(made)


def batches(*values: bytes) -> bytes:
    """A file with a record in its snapshot and then a batch for each value."""
    snapshot = (SNAPSHOT, encode([(b"old", b"from before")]))
    log = [(BATCH, encode([(b"k%d" % n, value)])) for n, value in enumerate(values)]
    return file_of(snapshot, (SEAL, seal(1)), *log)


ACKNOWLEDGED = batches(b"a" * 300, bytes(700), b"", Random(1).randbytes(1300), b"z")
WHOLE = batches(b"a" * 300, bytes(700), b"", Random(1).randbytes(1300), b"z", b"torn" * 300)
assert WHOLE[: len(ACKNOWLEDGED)] == ACKNOWLEDGED


def damage(data: bytes) -> str:
    return scan(data).damage


def flipped(data: bytes, at: int, bit: int) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 1 << bit
    return bytes(changed)


# --- altered ----------------------------------------------------------------------------------


def test_any_bit_that_flips_in_what_was_acknowledged_is_damage() -> None:
    assert not damage(ACKNOWLEDGED)
    for at in range(len(ACKNOWLEDGED)):
        assert damage(flipped(ACKNOWLEDGED, at, at % 8)), f"byte {at}"
    tail = len(ACKNOWLEDGED) - 60
    for at in range(tail, len(ACKNOWLEDGED)):  # nothing that follows can help here
        for bit in range(8):
            assert damage(flipped(ACKNOWLEDGED, at, bit)), f"byte {at}, bit {bit}"


def test_damage_is_seen_beneath_a_torn_tail_too() -> None:
    random = Random(4)
    for at in range(len(ACKNOWLEDGED)):
        torn = WHOLE[: random.randint(len(ACKNOWLEDGED), len(WHOLE) - 1)]
        torn += bytes(random.choice((0, len(WHOLE) - len(torn))))
        assert damage(flipped(torn, at, random.randrange(8))), f"byte {at}"


def test_a_sector_that_is_lost_before_the_last_batch_is_damage() -> None:
    for low in range(0, len(ACKNOWLEDGED) - SECTOR_BYTES, SECTOR_BYTES):
        high = low + SECTOR_BYTES
        assert damage(WHOLE[:low] + bytes(SECTOR_BYTES) + WHOLE[high:]), f"byte {low}"


def test_a_frame_that_is_gone_is_damage_where_a_later_one_is_there() -> None:
    ends = [len(batches(*[b"v" * 600] * count)) for count in range(5)]
    whole = batches(*[b"v" * 600] * 4)
    for low, high in list(pairwise(ends))[:-1]:
        for end in (low + 30, low + 300, high):  # its header and more
            words = damage(whole[:low] + bytes(end - low) + whole[end:])
            assert "was written after it" in words


def test_a_file_that_ends_within_its_snapshot_is_damaged() -> None:
    data = file_of((SNAPSHOT, encode([(b"k", b"v" * 600)])), (SEAL, seal(1)))
    for size in range(len(data)):
        assert damage(data[:size]) and damage(data[:size] + bytes(len(data) - size))


def test_a_frame_in_the_place_of_another_is_damage() -> None:
    ends = [len(batches(*[b"v"] * count)) for count in range(4)]
    whole = batches(b"v", b"v", b"v")
    first, second = (whole[low:high] for low, high in list(pairwise(ends))[:2])
    assert len(first) == len(second)
    for data in (whole[: ends[2]] + second, whole[: ends[1]] + first + whole[ends[2] :]):
        assert damage(data)
    assert damage(whole[: ends[2]] + first)
    assert damage(whole[: ends[1]] + whole[ends[2] :]), "one is missing"


def test_bytes_behind_a_torn_batch_are_damage() -> None:
    low = len(ACKNOWLEDGED) - len(ACKNOWLEDGED) % SECTOR_BYTES + SECTOR_BYTES
    torn = WHOLE[:low] + bytes(SECTOR_BYTES) + WHOLE[low + SECTOR_BYTES :]
    assert scan(torn).torn_bytes == len(WHOLE) - len(ACKNOWLEDGED) and not damage(torn)
    assert "altered" in damage(torn + b"junk")


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([(BATCH, b"")], "wrong side"),
        ([(SEAL, seal(0)), (SNAPSHOT, b"")], "wrong side"),
        ([(SEAL, seal(0)), (SEAL, seal(0))], "ends twice"),
        ([(SEAL, seal(1))], "holds 0 records"),
        ([(SNAPSHOT, encode([(b"k", b"v")])), (SEAL, seal(0))], "holds 1 records"),
        ([(SNAPSHOT, encode([(b"k", b"v")]))], "has no end"),
    ],
)
def test_whole_frames_that_make_no_sense_are_damage(
    frames: list[tuple[int, bytes]], words: str
) -> None:
    assert words in damage(file_of(*frames))


def test_anything_else_is_no_file_of_ours() -> None:
    for data in (b"", b"MANINEX1", bytes(4096), b"SQLite format 3" + bytes(100)):
        assert "first bytes" in damage(data)


def test_verify_reads_again_what_a_voter_replaced_and_freed_meanwhile(tmp_path: Path) -> None:
    storage.open(tmp_path).close()

    class Replaced(Disk):
        reads = 0

        def read(self, path: Path) -> bytes | None:
            self.reads += 1
            return b"" if self.reads == 1 else super().read(path)

    assert not storage.verify(tmp_path, Replaced()).damage
    (tmp_path / storage.FILE).write_bytes(b"")
    assert storage.verify(tmp_path).damage


# --- torn -------------------------------------------------------------------------------------


def test_zeros_that_a_file_system_added_are_no_damage() -> None:
    found = scan(ACKNOWLEDGED + bytes(5000))
    assert not found.damage and found.end == len(ACKNOWLEDGED)


def test_a_client_cannot_forge_damage_with_a_value_that_looks_like_frames(tmp_path: Path) -> None:
    def content(name: str, values: list[bytes]) -> bytes:
        opened = storage.open(tmp_path / name, sizes=storage.Sizes(room_bytes=0))
        for value in values:
            opened.append([(b"k", value)])
        opened.close()
        return (tmp_path / name / storage.FILE).read_bytes()

    forged = content("other", [b"v"] * 9) + WHOLE
    forged += b"".join(frame(BATCH, number, b"", salt=0) for number in range(1, 9))
    found = scan(content("voter", [b"first", forged])[:-1])
    assert not found.damage and found.records == {b"k": b"first"}


# --- whole ------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.binary(max_size=9), st.none() | st.integers(0, 1100)), max_size=6))
def test_a_frame_gives_back_its_changes_and_is_nowhere_zero_for_a_sector(
    made: list[tuple[bytes, int | None]],
) -> None:
    changes: list[Change] = [(key, None if size is None else bytes(size)) for key, size in made]
    sealed = file_of((SEAL, seal(0)))
    data = file_of((SEAL, seal(0)), (BATCH, encode(changes)))
    found = scan(data)
    last = dict(changes)
    assert found.records == {key: value for key, value in last.items() if value is not None}
    assert found.end == len(data) and found.batches == 1
    assert not found.damage and not found.torn_bytes
    added = data[len(sealed) :]
    assert bytes(SECTOR_BYTES) not in added and added[0] and added[-1]


def test_frames_are_the_same_whatever_the_slices_of_a_replacement(tmp_path: Path) -> None:
    random = Random(2)
    values = [(b"%d" % random.randrange(9), random.randbytes(100)) for _ in range(90)]
    for slice_bytes in (1, 500, 1 << 20):
        opened = storage.open(tmp_path / str(slice_bytes), sizes=Sizes(500, slice_bytes, 1000))
        for change in values:
            opened.append([change])
        opened.close()
        found = scan((tmp_path / str(slice_bytes) / storage.FILE).read_bytes())
        assert found.records == dict(values) and found.batches < 90
