"""Bytes of a stream to frames and back: each frame behind its length in four bytes. Pure.

Interface rules: `take` until it gives None, then `feed` what came next.
Invariants: P1 frames come out as they were put in, wherever the stream was cut; P2 a length that
no frame has is refused before anything is kept for it: at most one frame and one read are held.
"""

from __future__ import annotations

import struct

from manifold.kernel.errors import PeerError
from manifold.kernel.limits import FRAME_BYTES_MAX

# Room for a seal's counter and tag around the largest frame.
SEALED_BYTES_MAX = FRAME_BYTES_MAX + 256
LENGTH = struct.Struct(">I")


def framed(frame: bytes) -> bytes:
    """A frame as it travels."""
    return LENGTH.pack(len(frame)) + frame


class Splitter:
    """See the module."""

    __slots__ = ("_at", "_data", "_partial", "_wanted")

    def __init__(self) -> None:
        self._data: bytes | bytearray = b""  # what was read last, done up to `_at`
        self._at = 0
        self._partial = bytearray()  # a frame that is not whole; `_data` is empty then
        self._wanted = 0  # how long `_partial` has to become

    @property
    def held_bytes(self) -> int:
        return len(self._partial) + len(self._data) - self._at

    def feed(self, data: bytes) -> None:
        if self._partial:
            self._partial += data
            if len(self._partial) < self._wanted:
                return
            self._data, self._partial = self._partial, bytearray()
        elif self._at < len(self._data):
            self._data = bytes(self._data[self._at :]) + data
        else:
            self._data = data
        self._at = 0

    def take(self) -> bytes | None:
        """The next whole frame; `PeerError` for a length that no frame has (P2)."""
        data, at = self._data, self._at
        have = len(data) - at - LENGTH.size
        if have < 0:
            self._park(LENGTH.size)
            return None
        length: int = LENGTH.unpack_from(data, at)[0]
        if length > SEALED_BYTES_MAX:
            raise PeerError(f"A frame of {length} bytes is larger than {SEALED_BYTES_MAX}.")
        if have < length:
            self._park(LENGTH.size + length)
            return None
        at += LENGTH.size
        self._at = end = at + length
        return data[at:end] if isinstance(data, bytes) else bytes(memoryview(data)[at:end])

    def _park(self, wanted: int) -> None:
        """Keep what is left, to be looked at again when it is `wanted` bytes long."""
        if self._at < len(self._data):
            self._partial += self._data[self._at :]
            self._wanted = wanted
        self._data, self._at = b"", 0
