"""The bytes of an acceptor's file, and what damage to them means. Pure functions.

    file    header, snapshot frames, one seal frame, then one frame for each batch
    frame   header: magic, kind, length, number, CRC-32 of the body, CRC-32 of the header, a mark;
            body: the changes and a mark; where they hold 256 zeros in a row, a mark after
            every 255 bytes, and the kind says so
    change  key length, value length + 1 (0: the key is gone), key, value

Interface: `frame` makes one, `scan` reads a whole file: the records, where the last whole frame
ends, and the `damage` in words, if what is wrong cannot have been a crash.
Invariants: F1 a mark is never zero, so that no 512-byte sector that a frame was written to is all
zero, and neither is a frame's last byte: what was not written can be told from what was altered.
F2 frames of a file are numbered from 0; a batch's frame is written only when the one before it is
durable, so a frame that is followed by a later one was durable, and acknowledged. F3 a frame that
is not whole was torn by a crash only if it is the last, comes after the seal, and misses its end
or a whole sector; else it is damage. Zeros up to the end of the file are room for frames to come:
by F1 nothing was written there. F4 header checksums start from the file's random salt: a client's
value cannot hold what looks like a header.
What cannot be told: a disk that acknowledged a sync and then zeroes or cuts off the last frame.
Source: Alagappan et al., Protocol-Aware Recovery (FAST 2018), section 3.3: crash or corruption.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from manifold.kernel.limits import KIB, MIB

SNAPSHOT, SEAL, BATCH = 1, 2, 3
_MARKED = 16  # added to the kind of a frame whose body has marks throughout
SECTOR_BYTES = 512  # the least that any disk writes whole or not at all
BATCH_BYTES_MAX = 16 * MIB  # 16 full frames of the bus in one sync
KEY_BYTES_MAX = 64 * KIB

Change = tuple[bytes, bytes | None]

_MAGIC = b"\xf1Nx\xb7"
_MARK = b"\xa7"
_RUN = 255  # body bytes between marks: with a mark each, two of them in every sector
_ZEROS = bytes(_RUN + 1)  # a body without so many is not zero in any sector
_FRAME = struct.Struct(">4sBIQI")  # magic, kind, length, number, CRC-32 of the body
_CRC = struct.Struct(">I")
_CHANGE = struct.Struct(">II")
_COUNT = struct.Struct(">Q")
_FILE_MAGIC = b"MANINEX1"
SALT_BYTES = 8
FRAME_HEADER_BYTES = _FRAME.size + _CRC.size + len(_MARK)
FILE_HEADER_BYTES = len(_FILE_MAGIC) + SALT_BYTES + _CRC.size
CHANGE_BYTES = _CHANGE.size


@dataclass(slots=True)
class Scan:
    """What a file holds. `end` is where the next frame goes; `last` is the frame before it."""

    records: dict[bytes, bytes] = field(default_factory=dict)
    salt: int = 0
    number: int = 0  # of the next frame
    last: int = 0
    end: int = 0
    sealed: bool = False
    batches: int = 0
    torn_bytes: int = 0
    damage: str = ""


def file_header(salt: bytes) -> bytes:
    assert len(salt) == SALT_BYTES
    head = _FILE_MAGIC + salt
    return head + _CRC.pack(zlib.crc32(head))


def salt_of(salt: bytes) -> int:
    """What the checksums of a file's frame headers start from."""
    return zlib.crc32(salt)


def frame(kind: int, number: int, payload: bytes, salt: int) -> bytes:
    body = payload + _MARK
    if _ZEROS in payload:
        kind += _MARKED
        runs = range(0, len(payload), _RUN)
        body = b"".join(payload[at : at + _RUN] + _MARK for at in runs)
    head = _FRAME.pack(_MAGIC, kind, len(body), number, zlib.crc32(body))
    return head + _CRC.pack(zlib.crc32(head, salt)) + _MARK + body


def encode(changes: Iterable[Change]) -> bytes:
    parts: list[bytes] = []
    for key, value in changes:
        parts.append(_CHANGE.pack(len(key), 0 if value is None else len(value) + 1))
        parts.append(key)
        if value is not None:
            parts.append(value)
    return b"".join(parts)


def decode(data: bytes, at: int, end: int) -> Iterator[Change]:
    """The changes that `encode` put at [at, end)."""
    while at < end:
        key_bytes, length = _CHANGE.unpack_from(data, at)
        at += _CHANGE.size
        key = data[at : at + key_bytes]
        at += key_bytes
        if length == 0:
            yield key, None
            continue
        yield key, data[at : at + length - 1]
        at += length - 1


def seal(records: int) -> bytes:
    """The payload of the frame that ends a snapshot."""
    return _COUNT.pack(records)


def apply(records: dict[bytes, bytes], changes: Iterable[Change]) -> None:
    for key, value in changes:
        if value is None:
            records.pop(key, None)
        else:
            records[key] = value


# --- reading a file ---------------------------------------------------------------------------


@dataclass(slots=True)
class _Header:
    kind: int
    length: int
    number: int
    body_crc: int


def scan(data: bytes) -> Scan:
    found = Scan()
    salt = data[len(_FILE_MAGIC) : len(_FILE_MAGIC) + SALT_BYTES]
    if len(salt) < SALT_BYTES or data[:FILE_HEADER_BYTES] != file_header(salt):
        found.damage = "its first bytes are not those of a voter's file"
        return found
    found.salt = salt_of(salt)
    found.end = FILE_HEADER_BYTES
    while not found.damage and found.end < len(data) and _take(data, found):
        pass
    if not found.damage and data[found.end :].strip(b"\0"):
        _judge(data, found)
    if not found.damage and not found.sealed:
        found.damage = "its snapshot has no end"
    return found


def _take(data: bytes, found: Scan) -> bool:
    """Read the frame at the end of what is known, if it is whole."""
    header = _header(data, found.end, found.salt)
    if header is None or header.number != found.number:
        return False
    begin = found.end + FRAME_HEADER_BYTES
    end = begin + header.length
    body = memoryview(data)[begin:end]
    if len(body) != header.length or zlib.crc32(body) != header.body_crc:
        return False
    found.last, found.end = found.end, end
    found.number += 1
    if header.kind & _MARKED:
        data = _unmarked(data[begin:end])
        begin, end = 0, len(data) + 1
    kind = header.kind & ~_MARKED
    if kind == SEAL:
        _check_seal(data[begin : end - 1], found)
    elif (kind == BATCH) != found.sealed:
        found.damage = f"frame {header.number} is on the wrong side of the snapshot's end"
    else:
        found.batches += kind == BATCH
        apply(found.records, decode(data, begin, end - 1))
    return True


def _unmarked(body: bytes) -> bytes:
    """The changes of a body that has marks throughout, the last of them after a shorter run."""
    body = body[:-1]
    return b"".join(body[at : at + _RUN] for at in range(0, len(body), _RUN + 1))


def _check_seal(payload: bytes, found: Scan) -> None:
    if found.sealed:
        found.damage = "its snapshot ends twice"
    elif payload != seal(len(found.records)):
        found.damage = f"its snapshot holds {len(found.records)} records, and should not"
    found.sealed = True


def _judge(data: bytes, found: Scan) -> None:
    """Tell a torn last frame (F3), which was never acknowledged, from damage."""
    at, where = found.end, f"frame {found.number} at byte {found.end}"
    found.torn_bytes = len(data.rstrip(b"\0")) - at
    later = _later(data, found)
    header = _header(data, at, found.salt)
    if later:
        found.damage = f"{where} is damaged, and frame {later} was written after it"
    elif header is None:
        if not _missing(data, at, at + FRAME_HEADER_BYTES):
            found.damage = f"the header of {where} was altered"
    elif header.number != found.number:
        found.damage = f"{where} is another one, {header.number}"
    else:
        end = at + FRAME_HEADER_BYTES + header.length
        if not _missing(data, at, end) or data[end:].strip(b"\0"):
            found.damage = f"{where} was altered"


def _missing(data: bytes, begin: int, end: int) -> bool:
    """Whether the end or a whole sector of what should be at [begin, end) was never written."""
    if end > len(data) or data[end - 1] == 0:
        return True
    edges = [begin, *range(begin - begin % SECTOR_BYTES + SECTOR_BYTES, end, SECTOR_BYTES), end]
    return any(not data[low:high].strip(b"\0") for low, high in pairwise(edges))


def _header(data: bytes, at: int, salt: int) -> _Header | None:
    """The header of a frame at `at`, if its checksum is right."""
    head = data[at : at + FRAME_HEADER_BYTES]
    if len(head) < FRAME_HEADER_BYTES or head[-1:] != _MARK:
        return None
    if zlib.crc32(head[: _FRAME.size], salt) != _CRC.unpack_from(head, _FRAME.size)[0]:
        return None
    magic, kind, length, number, body_crc = _FRAME.unpack_from(head)
    return _Header(kind, length, number, body_crc) if magic == _MAGIC else None


def _later(data: bytes, found: Scan) -> int:
    """The number of some frame behind the damage that was written after it, or 0."""
    at = data.find(_MAGIC, found.end + 1)
    while at >= 0:
        header = _header(data, at, found.salt)
        if header is not None and header.number > found.number:
            return header.number
        at = data.find(_MAGIC, at + 1)
    return 0
