"""Where a line is, and the sockets at its ends: a path of this host, or TCP in a closed network.

Interface rules: nothing here blocks. An address is a base: `ipc:///folder/name` has its lines at
`.c` and `.a` (sockets.py), `tcp://HOST:PORT/alias` at that port (control) and at the next (data);
both end in the alias of their node. TCP lines are not sealed: only a bus that was told that its
network is closed (`tcp=True`) has any, and everybody else refuses the address.
Invariants: E1 an end that is gone is noticed: by its FIN or RST when it ends, by `KEEPALIVE_S` and
its probes when its network has ended with it, and after `UNACKNOWLEDGED_MS` when it takes nothing.
"""

from __future__ import annotations

import errno
import os
import re
import socket
from ipaddress import IPv4Address
from typing import NamedTuple

from manifold.kernel.effects import Plane
from manifold.kernel.errors import PeerError, Unavailable
from manifold.kernel.hyperbus import sockets
from manifold.kernel.hyperbus.splitter import SEALED_BYTES_MAX

TCP = re.compile(r"tcp://(\d+\.\d+\.\d+\.\d+):([1-9]\d{0,4})/([A-Za-z0-9._-]+)", re.ASCII)
PORT_MAX = 65_535
# What the kernel holds of a connection and has not sent. More would only wait there: behind a link
# of 10 Mbit/s this is 0.2 s.
UNSENT_BYTES_MAX = 256 << 10
UNACKNOWLEDGED_MS = 30_000  # a process that is stopped does not read for as long as it likes
KEEPALIVE_S, PROBE_S, PROBES = 10, 5, 3


class Tcp(NamedTuple):
    """One line's place in a network."""

    host: str
    port: int


Where = str | Tcp  # a path, or that


def of(address: str, plane: Plane, *, tcp: bool) -> Where:
    """Where the line of a plane is; `PeerError` where that is no address that may be used here."""
    if not tcp or not address.startswith("tcp:"):
        return sockets.path(address, plane)
    found = TCP.fullmatch(address)
    if found is None or not int(found[2]) < PORT_MAX:
        raise PeerError(f"{address!r} is not an address.", "Write tcp://HOST:PORT/ALIAS.")
    try:
        host = str(IPv4Address(found[1]))
    except ValueError as error:
        raise PeerError(f"{address!r} is not an address: {error}.") from error
    return Tcp(host, int(found[2]) + (plane is Plane.DATA))


def checked(where: Where) -> Where:
    """A place that a socket can have; `PeerError` where it cannot."""
    return where if isinstance(where, Tcp) else sockets.checked(where)


def listening(where: Where) -> socket.socket:
    """A socket that listens there."""
    if not isinstance(where, Tcp):
        return sockets.listening(where)
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setblocking(False)
    try:
        # What a process that was killed has left in the kernel is nobody who listens.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(sockets.BACKLOG)
    except OSError as error:
        listener.close()
        raise Unavailable(
            f"Nothing can be received at {where.host}:{where.port}: {error}.",
            "Does it run already?",
        ) from error
    return listener


def accepted(connection: socket.socket, where: Where) -> None:
    """Make a connection that was accepted there one of ours."""
    connection.setblocking(False)
    if isinstance(where, Tcp):
        _watch_over(connection)


def attempt(where: Where) -> tuple[socket.socket, bool]:
    """Begin to connect: the socket, and whether that is done; `OSError` where it has failed.

    On one host it ends at once, either way; over TCP the socket becomes writable when it has.
    """
    made = socket.socket(
        socket.AF_INET if isinstance(where, Tcp) else socket.AF_UNIX, socket.SOCK_STREAM
    )
    try:
        made.setblocking(False)
        if not isinstance(where, Tcp):
            made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEALED_BYTES_MAX)
            made.connect(where)
            return made, True
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES_MAX)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS)
        _watch_over(made)
        number = made.connect_ex(where)
        if number not in (0, errno.EINPROGRESS):
            raise OSError(number, os.strerror(number))
        return made, number == 0
    except OSError:
        made.close()
        raise


def _watch_over(connection: socket.socket) -> None:
    """E1."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)


def gone(connection: socket.socket) -> bool:
    """Whether the other end of a line that we send on has ended. It says nothing while it lives."""
    try:
        connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:  # reset
        return True
    return True  # its end, or bytes that nobody sends this way


def file_of(where: Where) -> tuple[int, int]:
    """Which file a path is; (0, 0) where there is none."""
    return (0, 0) if isinstance(where, Tcp) else sockets.file_of(where)


def release(where: Where, file: tuple[int, int]) -> None:
    """Take away the file of a listener; not another's, who took us for dead."""
    if not isinstance(where, Tcp) and sockets.file_of(where) == file:
        os.unlink(where)
