"""The pure half of the bus: queues to frames, frames to envelopes, chunks to messages.

Interface rules: no socket and no clock. `Outbox` belongs to one peer and one plane.
Invariants: F1 a frame never exceeds `FRAME_BYTES_MAX` or `FRAME_ENVELOPES_MAX`; F2 a queue that has
reached a bound refuses (`Unavailable`), so that it exceeds one by at most a single message; F3
reassembly holds at most `REASSEMBLY_BYTES_MAX`, whoever sends; the oldest stream is dropped first.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field

import msgspec

from manifold.kernel.errors import PeerError, Unavailable
from manifold.kernel.hyperbus.messages import (
    CHUNK_BYTES,
    MESSAGE_BYTES_MAX,
    REASSEMBLY_BYTES_MAX,
    REASSEMBLY_SOURCE_STREAMS_MAX,
    REASSEMBLY_STREAMS_MAX,
    UNDECODABLE,
    VERSION,
    VERSION_OLDEST,
    Chunk,
    Envelope,
    Frame,
)
from manifold.kernel.limits import (
    FRAME_BYTES_MAX,
    FRAME_ENVELOPES_MAX,
    PEER_QUEUE_BYTES_MAX,
    PEER_QUEUE_ENVELOPES_MAX,
)

_encoder = msgspec.msgpack.Encoder()
_frame_decoder = msgspec.msgpack.Decoder(Frame)
_envelope_decoder = msgspec.msgpack.Decoder(Envelope)

# Room for the frame's own fields: five array slots, three texts of at most 256 characters (4 bytes
# each in the worst encoding) and the list header.
FRAME_OVERHEAD_BYTES = 4096


def encode_envelope(body: msgspec.Struct, envelope: Envelope | None = None) -> bytes:
    """The bytes of an envelope around `body`, with the other fields of `envelope`."""
    raw = msgspec.Raw(_encoder.encode(body))
    if envelope is None:
        return _encoder.encode(Envelope(raw))
    return _encoder.encode(
        Envelope(
            raw,
            envelope.request,
            envelope.reply_to,
            envelope.deadline_ms,
            envelope.destination,
            envelope.trace,
        )
    )


@dataclass(slots=True)
class Outbox:
    """Encoded envelopes that wait for one peer's socket, in order."""

    queue: deque[bytes] = field(default_factory=deque)
    queued_bytes: int = 0
    next_stream: int = 1

    def put(self, encoded: bytes) -> None:
        """Queue one envelope, in chunks where it is larger than a frame may be."""
        if len(self.queue) >= PEER_QUEUE_ENVELOPES_MAX or self.queued_bytes >= PEER_QUEUE_BYTES_MAX:
            raise Unavailable("The queue to this peer is full.", "Send less, or wait.")  # F2
        if len(encoded) + FRAME_OVERHEAD_BYTES <= FRAME_BYTES_MAX:
            self._append(encoded)
            return
        if len(encoded) > MESSAGE_BYTES_MAX:
            raise Unavailable(
                f"A message of {len(encoded)} bytes is larger than {MESSAGE_BYTES_MAX}.",
                "Fetch it in parts.",
            )
        count = -(-len(encoded) // CHUNK_BYTES)
        for index in range(count):
            part = encoded[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
            self._append(encode_envelope(Chunk(self.next_stream, index, count, part)))
        self.next_stream += 1

    def _append(self, encoded: bytes) -> None:
        self.queue.append(encoded)
        self.queued_bytes += len(encoded)

    def take(
        self, cluster: str, source: str, boot: int, most_bytes: int = FRAME_BYTES_MAX
    ) -> tuple[bytes, int]:
        """The next frame and how many queued envelopes it holds; they stay queued until `drop`.

        It has `most_bytes`, or a single envelope."""
        parts: list[msgspec.Raw] = []
        room = most_bytes - FRAME_OVERHEAD_BYTES
        for encoded in self.queue:
            room -= len(encoded)
            if len(parts) >= FRAME_ENVELOPES_MAX or (room < 0 and parts):
                break
            parts.append(msgspec.Raw(encoded))
        frame = _encoder.encode((VERSION, cluster, source, boot, parts))
        assert len(frame) <= FRAME_BYTES_MAX, "F1"
        return frame, len(parts)

    def drop(self, count: int) -> None:
        """Forget the first `count` envelopes: they have left."""
        for _ in range(count):
            self.queued_bytes -= len(self.queue.popleft())


def decode_frame(data: bytes, cluster: str) -> Frame:
    """Decode and check a frame; `PeerError` says what is wrong with it."""
    if len(data) > FRAME_BYTES_MAX:
        raise PeerError(f"A frame of {len(data)} bytes is larger than {FRAME_BYTES_MAX}.")
    try:
        frame = _frame_decoder.decode(data)
    except UNDECODABLE as error:
        raise PeerError(f"A frame does not decode: {error}.") from error
    if not VERSION_OLDEST <= frame.version <= VERSION:
        raise PeerError(
            f"Protocol version {frame.version} is not understood; "
            f"this node speaks {VERSION_OLDEST} to {VERSION}."
        )
    if frame.cluster != cluster:
        raise PeerError("A frame of another cluster.")
    return frame


def decode_envelope(data: bytes) -> Envelope:
    """Decode one reassembled envelope."""
    try:
        return _envelope_decoder.decode(data)
    except UNDECODABLE as error:
        raise PeerError(f"A reassembled message does not decode: {error}.") from error


@dataclass(slots=True)
class _Stream:
    """The parts of one message that have come so far."""

    count: int
    parts: list[bytes] = field(default_factory=list)
    held_bytes: int = 0


# Who sent it, in which of its lives, by which line: each numbers its streams for itself.
Origin = tuple[str, int, str]


class Reassembly:
    """Chunks of every peer, put together again."""

    def __init__(self) -> None:
        self._streams: OrderedDict[tuple[Origin, int], _Stream] = OrderedDict()
        self._per_source: Counter[str] = Counter()
        self.held_bytes = 0

    def __len__(self) -> int:
        return len(self._streams)

    def add(self, origin: Origin, chunk: Chunk) -> bytes | None:
        """The whole message when `chunk` was its last part, else None.

        Chunks of a stream come in order (one pipe); a gap means that a connection broke, and the
        whole stream is given up: the protocol that owns the request retries it.
        """
        key = (origin, chunk.stream)
        if chunk.index == 0:
            self._forget(key)  # a line that was opened anew counts from the start again
            self._streams[key] = _Stream(chunk.count)
            self._per_source[origin[0]] += 1
        stream = self._streams.get(key)
        if stream is None:
            return None
        if chunk.index != len(stream.parts) or chunk.count != stream.count:
            self._forget(key)
            return None
        stream.parts.append(chunk.data)
        stream.held_bytes += len(chunk.data)
        self.held_bytes += len(chunk.data)
        if len(stream.parts) == stream.count:
            self._forget(key)
            return b"".join(stream.parts)
        self._bound(origin[0])
        return None

    def forget(self, source: str) -> None:
        """Drop what has come of `source`."""
        if self._per_source[source]:
            for key in [key for key in self._streams if key[0][0] == source]:
                self._forget(key)

    def _bound(self, source: str) -> None:
        """F3."""
        if self._per_source[source] > REASSEMBLY_SOURCE_STREAMS_MAX:
            self._forget(next(key for key in self._streams if key[0][0] == source))
        while self.held_bytes > REASSEMBLY_BYTES_MAX or len(self._streams) > REASSEMBLY_STREAMS_MAX:
            self._forget(next(iter(self._streams)))

    def _forget(self, key: tuple[Origin, int]) -> None:
        stream = self._streams.pop(key, None)
        if stream is None:
            return
        self.held_bytes -= stream.held_bytes
        self._per_source[key[0][0]] -= 1
        if not self._per_source[key[0][0]]:
            del self._per_source[key[0][0]]
