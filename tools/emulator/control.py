"""The control socket of a supervisor: other processes of this user change its cluster.

Interface rules: `Control.serve` where the supervisor runs, `ask` anywhere else. A request and its
answer are MessagePack with their length before them. The socket lies in the runtime folder, which
is nobody else's (0700), and whoever connects is asked the kernel for his user as well.
Invariants: Y1 any bytes get an answer or the end of the connection, and none of them stops the
supervisor; Y2 at most `CONNECTIONS_MAX` are served, `REQUEST_BYTES_MAX` is read of each, within
`READ_S`; Y3 what was begun is finished, also where whoever asked has gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import msgspec

from manifold.kernel import places
from manifold.kernel.errors import Busy, ManifoldError, Maybe, NoCluster, PeerError, Refused
from manifold.kernel.hyperbus.faults import to_error, to_failure
from manifold.kernel.hyperbus.messages import Failure
from manifold.tools.emulator import messages as m

log = logging.getLogger("manifold.supervisor")

NAME = "supervisor"  # no alias is: those end in a number
LENGTH = struct.Struct(">I")
CREDENTIALS = struct.Struct("3i")  # SO_PEERCRED: process, user, group
REQUEST_BYTES_MAX = 1 << 18  # 4096 aliases of 29 characters and a few bytes: 128 KiB, twice that
CONNECTIONS_MAX = 16  # people, and scripts of theirs
READ_S = 5.0  # to send a request, which takes a millisecond
ANSWER_S = 300.0  # 4096 nodes in one call take minutes; a supervisor that is gone closes at once

_requests: msgspec.msgpack.Decoder[m.Request] = msgspec.msgpack.Decoder(m.Request)
_answers: msgspec.msgpack.Decoder[m.Answer] = msgspec.msgpack.Decoder(m.Answer)


class Changing(Protocol):
    """What is served: `Changes`."""

    async def carry_out(self, request: m.Request) -> m.Changed: ...


def socket_path(cluster: str, environ: Mapping[str, str]) -> Path:
    return places.ipc_path(places.runtime_path(cluster, environ), NAME)


def framed(message: msgspec.Struct) -> bytes:
    body = msgspec.msgpack.encode(message)
    return LENGTH.pack(len(body)) + body


def decoded(body: bytes) -> m.Request:
    """A request; `PeerError` where it is none."""
    try:
        return _requests.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PeerError(
            f"The request does not decode: {error}.", "Both sides must be of one release."
        ) from error


class Control:
    """Serves `changes` at `path`."""

    def __init__(self, changes: Changing, path: Path) -> None:
        self._changes = changes
        self._path = path
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._begun: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        """Until `close`."""
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._connected, self._path)

    def close(self) -> None:
        """Whoever waits for an answer sees the connection end."""
        if self._server is not None:
            self._server.close()
        for task in list(self._begun):
            task.cancel()
        for writer in list(self._open):
            writer.close()
        self._path.unlink(missing_ok=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None, "a connection is served by a task"
        self._open.add(writer)
        self._begun.add(task)
        try:
            answer = await self._answer(reader, writer)
            with contextlib.suppress(ConnectionError):  # Y3: it did not wait
                writer.write(framed(answer))
                await writer.drain()
        finally:
            self._begun.discard(task)
            self._open.discard(writer)
            writer.close()

    async def _answer(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> m.Changed | Failure:
        try:
            _check_user(writer)
            if len(self._open) > CONNECTIONS_MAX:  # Y2
                raise Busy(f"{CONNECTIONS_MAX} others ask for something already.", "Come again.")
            return await self._changes.carry_out(decoded(await _read(reader)))
        except ManifoldError as error:
            return to_failure(error)


def _check_user(writer: asyncio.StreamWriter) -> None:
    end: socket.socket = writer.get_extra_info("socket")
    credentials = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    _, user, _ = CREDENTIALS.unpack(credentials)
    if user not in (os.geteuid(), 0):
        raise Refused("This cluster is another user's.", "Start one of your own.")


async def _read(reader: asyncio.StreamReader) -> bytes:
    """Y2."""
    try:
        async with asyncio.timeout(READ_S):
            (size,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
            if size > REQUEST_BYTES_MAX:
                raise PeerError(
                    f"The request has {size} bytes; at most {REQUEST_BYTES_MAX} are read.",
                    "Ask for less at once.",
                )
            return await reader.readexactly(size)
    except (asyncio.IncompleteReadError, ConnectionError, TimeoutError) as error:
        raise PeerError("The request was not sent to its end.", "Try again.") from error


# -- the other side ---------------------------------------------------------------------------


def ask(cluster: str, environ: Mapping[str, str], request: m.Request) -> m.Changed:
    """Have the supervisor of `cluster` do something; raises what it says where it does not."""
    runtime = places.runtime_path(cluster, environ)
    if not runtime.is_dir():
        raise _nobody(cluster)
    places.check_private(runtime)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as end:
        end.settimeout(ANSWER_S)
        try:
            end.connect(str(socket_path(cluster, environ)))
        except OSError as error:
            raise _nobody(cluster) from error
        try:
            end.sendall(framed(request))
            body = _exactly(end, LENGTH.unpack(_exactly(end, LENGTH.size))[0])
        except OSError as error:
            raise Maybe(
                f"The supervisor of cluster {cluster!r} ended, or fell silent, before it answered.",
                "`manifold node ls` shows what was done.",
            ) from error
    answer = _answers.decode(body)
    if isinstance(answer, Failure):
        raise to_error(answer)
    return answer


def _nobody(cluster: str) -> NoCluster:
    return NoCluster(
        f"Nobody supervises cluster {cluster!r} on this host.",
        "Start it with `manifold up`, or name another with --cluster.",
    )


def _exactly(end: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        more = end.recv(size - len(found))
        if not more:
            raise ConnectionResetError("it was closed")
        found += more
    return found
