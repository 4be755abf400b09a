"""The pure half of the bus: queues to frames, frames to envelopes, chunks to messages.

Interface rules: no socket and no clock. `Outbox` belongs to one peer and one plane.
Invariants: F1 a frame never exceeds `FRAME_BYTES_MAX` or `FRAME_ENVELOPES_MAX`; F2 a queue refuses
(`Unavailable`) instead of growing past its bounds; F3 reassembly per peer holds at most
`REASSEMBLY_BYTES_MAX`, oldest stream dropped first.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field

import msgspec

from manifold.kernel.errors import PeerError, Unavailable
from manifold.kernel.hyperbus.messages import (
    CHUNK_BYTES,
    MESSAGE_BYTES_MAX,
    REASSEMBLY_BYTES_MAX,
    REASSEMBLY_STREAMS_MAX,
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

    def take(self, cluster: str, source: str, boot: int) -> tuple[bytes, int]:
        """The next frame and how many queued envelopes it holds; they stay queued until `drop`."""
        parts: list[msgspec.Raw] = []
        room = FRAME_BYTES_MAX - FRAME_OVERHEAD_BYTES
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
    except (msgspec.DecodeError, RecursionError) as error:
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
    except (msgspec.DecodeError, RecursionError) as error:
        raise PeerError(f"A reassembled message does not decode: {error}.") from error


class Reassembly:
    """Chunks of one peer, put together again."""

    def __init__(self) -> None:
        self._streams: OrderedDict[int, list[bytes]] = OrderedDict()
        self.held_bytes = 0

    def add(self, chunk: Chunk) -> bytes | None:
        """The whole message when `chunk` was its last part, else None.

        Chunks of a stream come in order (one pipe); a gap means that a connection broke, and the
        whole stream is given up: the protocol that owns the request retries it.
        """
        parts = self._streams.setdefault(chunk.stream, [])
        if chunk.index != len(parts):
            self._forget(chunk.stream)
            return None
        parts.append(chunk.data)
        self.held_bytes += len(chunk.data)
        if len(parts) == chunk.count:
            whole = b"".join(parts)
            self._forget(chunk.stream)
            return whole
        while self.held_bytes > REASSEMBLY_BYTES_MAX or len(self._streams) > REASSEMBLY_STREAMS_MAX:
            self._forget(next(iter(self._streams)))  # F3
        return None

    def _forget(self, stream: int) -> None:
        self.held_bytes -= sum(map(len, self._streams.pop(stream)))
