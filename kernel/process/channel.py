"""Framed messages over a socket pair: blocking for the worker, non-blocking for the node.

Interface rules: a message is its length in `LENGTH_BYTES` big-endian bytes, then MessagePack.
`PeerError` means that the other end does not keep to that: the channel is of no use any more.
"""

from __future__ import annotations

import select
import socket
from typing import Any, Generic, TypeVar

import msgspec

from manifold.kernel.errors import PeerError
from manifold.kernel.process.messages import LENGTH_BYTES, LOCAL_BYTES_MAX

READ_BYTES = 256 << 10

_encoder = msgspec.msgpack.Encoder()
T = TypeVar("T")


class Closed(Exception):
    """The other end is gone."""


class Channel(Generic[T]):
    """One end. `T` is the union of what may arrive here."""

    def __init__(self, end: socket.socket, arrives: Any) -> None:
        self.socket = end
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(arrives)
        self._incoming = bytearray()
        self._outgoing = bytearray()

    def take(self) -> list[T]:
        """Every message that is here, without waiting; `Closed` once the other end is gone."""
        try:
            data = self.socket.recv(READ_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        except ConnectionResetError as error:
            raise Closed from error
        if not data:
            raise Closed
        self._incoming += data
        found: list[T] = []
        at = 0
        while len(self._incoming) - at >= LENGTH_BYTES:
            size = int.from_bytes(self._incoming[at : at + LENGTH_BYTES], "big")
            if size > LOCAL_BYTES_MAX:
                raise PeerError(f"A local message of {size} bytes is larger than allowed.")
            if len(self._incoming) - at - LENGTH_BYTES < size:
                break
            at += LENGTH_BYTES
            found.append(self._decode(at, size))
            at += size
        del self._incoming[:at]
        return found

    def _decode(self, at: int, size: int) -> T:
        with memoryview(self._incoming) as whole:
            try:
                return self._decoder.decode(whole[at : at + size])
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise PeerError(f"A local message does not decode: {error}.") from error

    def wait(self, timeout_s: float | None = None) -> list[T]:
        """As `take`, after waiting for something to arrive."""
        poller = select.poll()
        poller.register(self.socket, select.POLLIN)
        poller.poll(None if timeout_s is None else timeout_s * 1000)
        return self.take()

    def send(self, *messages: msgspec.Struct) -> None:
        """Send all in one write, blocking (the worker's way)."""
        try:
            self.socket.sendall(b"".join(map(framed, messages)))
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Closed from error

    def post(self, message: msgspec.Struct) -> bool:
        """Queue and send what can be sent now (the node's way); whether something is left."""
        self._outgoing += framed(message)
        return self.flush()

    def flush(self) -> bool:
        """Send queued bytes; whether some are left for when the socket is writable."""
        try:
            while self._outgoing:
                sent = self.socket.send(self._outgoing, socket.MSG_DONTWAIT)
                del self._outgoing[:sent]
        except BlockingIOError:
            return True
        except (BrokenPipeError, ConnectionResetError):
            self._outgoing.clear()  # its end shows up as `Closed` on the reading side
        return False


def framed(message: msgspec.Struct) -> bytes:
    body = _encoder.encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "big") + body
