"""A fast client of etcd, so that a comparison does not measure a slow one: gRPC by hand.

Interface: `await connect(address)`, then `cas`, `read`, `put`, `leader`; `call` is one unary call.
Everything is on one thread of an asyncio loop; calls of many tasks share the connection, and what
they send within one turn of the loop leaves together. Requests are packed and answers unpacked
here, to the fields that are needed; header blocks of answers are not decoded (our settings forbid
a dynamic table): a call that ends without a message has failed.
Source: RFC 9113 (HTTP/2), the gRPC protocol over it, etcd's rpc.proto of API version 3.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterator
from typing import NamedTuple, cast

from manifold.kernel.errors import Maybe, Unavailable

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS, PADDED = 1, 1, 4, 8
HEADER_BYTES = 9
WINDOW = 65_535  # what HTTP/2 lets us send before the peer gives more
WINDOW_MAX = (1 << 31) - 1  # what we give: a second of answers is far below it
GIVEN_AGAIN = 1 << 30  # bytes received after which we give as much again
GRPC_PREFIX = struct.Struct(">BI")  # compressed or not, length
CONNECT_S = 5.0
ETCD_FRAME_BYTES_MAX = 16_384  # HTTP/2's least, and what etcd's server keeps

TXN = b"/etcdserverpb.KV/Txn"
RANGE = b"/etcdserverpb.KV/Range"
PUT = b"/etcdserverpb.KV/Put"
STATUS = b"/etcdserverpb.Maintenance/Status"


class Read(NamedTuple):
    """What is at a key; `value` None: nothing."""

    value: bytes | None


# --- protobuf ---------------------------------------------------------------------------------


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def field(number: int, data: bytes) -> bytes:
    """A field of bytes, a string or a message."""
    return varint(number << 3 | 2) + varint(len(data)) + data


def number_field(number: int, value: int) -> bytes:
    return varint(number << 3) + varint(value)


def unpack(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message: numbers of varints, bytes of what has a length."""
    at = 0
    while at < len(data):
        tag, at = _varint_at(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint_at(data, at)
            yield tag >> 3, value
        elif kind == 2:
            length, at = _varint_at(data, at)
            yield tag >> 3, data[at : at + length]
            at += length
        else:
            raise Unavailable(f"etcd sent a field of kind {kind}, which its messages do not have.")


def _varint_at(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def cas_request(key: bytes, expected: bytes | None, new: bytes) -> bytes:
    """TxnRequest: if the value is `expected` (None: there is none), put `new`; else tell it."""
    target = number_field(2, 3) + field(3, key) + field(7, expected or b"")
    if expected is None:
        target = number_field(2, 1) + field(3, key) + number_field(5, 0)  # no creation revision
    put = field(2, field(1, key) + field(2, new))
    return field(1, target) + field(2, put) + field(3, field(1, field(1, key)))


def cas_answer(data: bytes) -> tuple[bool, bytes | None]:
    """TxnResponse: whether it was done, and otherwise what is there."""
    responses = b""
    for number, value in unpack(data):
        if number == 2 and value:
            return True, None
        if number == 3 and isinstance(value, bytes):
            responses = value
    found = next((value for number, value in unpack(responses) if number == 1), b"")
    assert isinstance(found, bytes)
    return False, range_answer(found).value


def range_answer(data: bytes) -> Read:
    """RangeResponse of one key."""
    for number, pair in unpack(data):
        if number == 2 and isinstance(pair, bytes):
            for inner, value in unpack(pair):
                if inner == 5 and isinstance(value, bytes):
                    return Read(value)
            return Read(b"")
    return Read(None)


# --- HTTP/2 -----------------------------------------------------------------------------------


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">HBBBI", len(payload) >> 8, len(payload) & 255, kind, flags, stream) + (
        payload
    )


def header_block(path: bytes, authority: bytes) -> bytes:
    """The request headers of a call, literally: no table to keep in step."""

    def literal(name: bytes, value: bytes) -> bytes:
        assert len(name) < 127 and len(value) < 127
        return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value

    return b"".join(
        (
            b"\x83",  # :method POST, of the static table
            b"\x86",  # :scheme http
            literal(b":path", path),
            literal(b":authority", authority),
            literal(b"content-type", b"application/grpc"),
            literal(b"te", b"trailers"),
        )
    )


class Connection(asyncio.Protocol):
    """One connection to one member."""

    def __init__(self, authority: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._authority = authority.encode()
        self._blocks: dict[bytes, bytes] = {}
        self._calls: dict[int, asyncio.Future[bytes]] = {}
        self._bodies: dict[int, bytes] = {}
        self._next_stream = 1
        self._buffer = b""
        self._room = WINDOW
        self._received = 0
        self._transport: asyncio.Transport | None = None
        self.lost = ""  # why no call can be made any more

    # -- calls --------------------------------------------------------------------------------

    def call(self, path: bytes, message: bytes) -> asyncio.Future[bytes]:
        """One unary call; `Maybe` where the connection ends or the member refuses meanwhile."""
        future: asyncio.Future[bytes] = self._loop.create_future()
        if self.lost or self._transport is None:
            future.set_exception(Unavailable(f"The connection to etcd is gone: {self.lost}."))
            return future
        block = self._blocks.get(path)
        if block is None:
            block = self._blocks[path] = header_block(path, self._authority)
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        body = GRPC_PREFIX.pack(0, len(message)) + message
        assert len(body) <= ETCD_FRAME_BYTES_MAX, "the benchmark's values are small"
        self._room -= len(body)
        assert self._room >= 0, "64 calls of 200 bytes are far below the window of 64 KiB"
        self._calls[stream] = future
        self._transport.write(
            frame(HEADERS, END_HEADERS, stream, block) + frame(DATA, END_STREAM, stream, body)
        )
        return future

    async def cas(
        self, key: bytes, expected: bytes | None, new: bytes
    ) -> tuple[bool, bytes | None]:
        """Whether it was done, and otherwise what is there."""
        return cas_answer(await self.call(TXN, cas_request(key, expected, new)))

    async def read(self, key: bytes, *, serializable: bool = False) -> Read:
        """A linearizable read, or one of this member alone."""
        request = field(1, key) + (number_field(7, 1) if serializable else b"")
        return range_answer(await self.call(RANGE, request))

    async def put(self, key: bytes, value: bytes) -> None:
        await self.call(PUT, field(1, key) + field(2, value))

    async def leader(self) -> tuple[int, int]:
        """Who this member is, and who leads (0: nobody)."""
        member = leader = 0
        for number, value in unpack(await self.call(STATUS, b"")):
            if number == 1 and isinstance(value, bytes):
                member = next((int(each) for inner, each in unpack(value) if inner == 2), 0)
            elif number == 4 and isinstance(value, int):
                leader = value
        return member, leader

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    # -- asyncio ------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not one by its bases
        # No dynamic table, no pushes, as much room for answers as there is.
        settings = struct.pack(">HIHIHI", 1, 0, 2, 0, 4, WINDOW_MAX)
        self._write(
            PREFACE
            + frame(SETTINGS, 0, 0, settings)
            + frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", WINDOW_MAX - WINDOW))
        )

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(str(error or "closed"))

    def _fail(self, why: str) -> None:
        self.lost = self.lost or why
        calls, self._calls = self._calls, {}
        for future in calls.values():
            if not future.done():
                future.set_exception(Maybe(f"The connection to etcd ended: {why}."))

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        data = self._buffer + data if self._buffer else data
        at, end = 0, len(data)
        while end - at >= HEADER_BYTES:
            length = int.from_bytes(data[at : at + 3], "big")
            if end - at < HEADER_BYTES + length:
                break
            kind, flags = data[at + 3], data[at + 4]
            stream = int.from_bytes(data[at + 5 : at + 9], "big")
            at += HEADER_BYTES
            self._frame(kind, flags, stream, data[at : at + length])
            at += length
        self._buffer = data[at:]
        if self._received > GIVEN_AGAIN and self._transport is not None:
            self._transport.write(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", self._received)))
            self._received = 0

    def _frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == DATA:
            assert not flags & PADDED, "Go's server does not pad"
            self._bodies[stream] = self._bodies.get(stream, b"") + payload
        elif kind == SETTINGS and not flags & ACK:
            self._write(frame(SETTINGS, ACK, 0, b""))
        elif kind == PING and not flags & ACK:
            self._write(frame(PING, ACK, 0, payload))
        elif kind == WINDOW_UPDATE and stream == 0:
            self._room += int.from_bytes(payload, "big")
        elif kind == GOAWAY:
            self._fail("it said goodbye")
        if kind == RST_STREAM or (kind in (DATA, HEADERS) and flags & END_STREAM):
            self._ended(stream)

    def _ended(self, stream: int) -> None:
        body = self._bodies.pop(stream, b"")
        future = self._calls.pop(stream, None)
        if future is None or future.done():
            return
        if len(body) < GRPC_PREFIX.size:  # trailers only: a status, and no message
            future.set_exception(Maybe("etcd refused a call.", "It may have no leader now."))
        else:
            future.set_result(body[GRPC_PREFIX.size :])

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)


async def connect(host: str, port: int) -> Connection:
    """A connection to the member that serves clients at this port."""
    loop = asyncio.get_running_loop()
    authority = f"{host}:{port}"
    made = loop.create_connection(lambda: Connection(authority), host, port)
    try:
        _, connection = await asyncio.wait_for(made, CONNECT_S)
    except OSError as error:
        raise Unavailable(f"etcd does not listen at {authority}: {error}.") from error
    return connection
