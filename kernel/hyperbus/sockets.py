"""Where the parts of an address are, who listens there, and what nng does of the bus: the door
and reverse channels.

Interface rules: nothing here may run before the last fork of a process: nng's threads do not
survive one, and nng panics if it was used before it.
An address is a base: `ipc:///dir/name` has the door at `.d`, control at `.c` and data at `.a`.
Control and data are lines of streams.py. nng's own defaults are unlimited messages and a queue of
one: every size is set here.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pynng

from manifold.kernel.effects import Plane
from manifold.kernel.errors import PeerError, Unavailable
from manifold.kernel.hyperbus.splitter import SEALED_BYTES_MAX
from manifold.kernel.limits import DRAIN_FRAMES_MAX, SOCKET_BUFFER_FRAMES
from manifold.kernel.process.remains import answers

NNG_THREADS = 1  # of each kind; two task threads are nng's own least
RECONNECT_MS_MIN = 20
RECONNECT_MS_MAX = 1000

# How whoever connects has to begin: at the door "SP", version and protocol of nng, at a line with
# nothing.
REQUESTER, PUSHER = b"\0SP\0\0\x30\0\0", b""
GREETING_S = 0.05

PATH_BYTES_MAX = 107  # sun_path holds 108 with its NUL
BACKLOG = 256  # a question to 256 nodes is answered by all of them at once
SCHEME = "ipc://"
DOOR = "door"
_ENDING = {DOOR: ".d", Plane.CONTROL: ".c", Plane.DATA: ".a"}


def url(address: str, part: Plane | str) -> str:
    """The URL of one part of an address."""
    if not address.startswith("ipc:///"):
        raise PeerError(
            f"{address!r} is not an address.",
            "Until frames are sealed only ipc:///path is served, in a directory of mode 0700.",
        )
    return address + _ENDING[part]


def path(address: str, plane: Plane) -> str:
    """Where the line of a plane is in the file system."""
    return url(address, plane).removeprefix(SCHEME)


def checked(path: str) -> str:
    """`path`, which a socket can have; `PeerError` where it cannot."""
    try:
        size = len(os.fsencode(path))
    except UnicodeEncodeError as error:
        raise PeerError(f"{path!r} is not a path.") from error
    if size > PATH_BYTES_MAX or "\0" in path:
        raise PeerError(
            f"{path!r} is not the path of a socket.", f"It has {PATH_BYTES_MAX} bytes at most."
        )
    return path


def listening(path: str) -> socket.socket:
    """A socket that listens there; what a process that was killed has left is taken away."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.setblocking(False)
    try:
        try:
            listener.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _left_behind(path):
                raise
            os.unlink(path)
            listener.bind(path)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise Unavailable(
            f"Nothing can be received at {path}: {error}.", "Does it run already?"
        ) from error
    return listener


def _left_behind(path: str) -> bool:
    return stat.S_ISSOCK(os.lstat(path).st_mode) and not answers(Path(path))


def file_of(path: str) -> tuple[int, int]:
    """Which file it is; (0, 0) where there is none."""
    try:
        found = os.lstat(path)
    except OSError:
        return (0, 0)
    return (found.st_dev, found.st_ino)


@functools.cache
def _few_threads() -> None:
    """Before nng's first use: 13 threads by default are more than a node's traffic needs."""
    library = pynng.lib
    for name in (
        library.NNG_INIT_NUM_TASK_THREADS,
        library.NNG_INIT_NUM_EXPIRE_THREADS,
        library.NNG_INIT_NUM_POLLER_THREADS,
        library.NNG_INIT_NUM_RESOLVER_THREADS,
    ):
        library.nng_init_set_parameter(name, NNG_THREADS)


def _limits() -> dict[str, Any]:
    _few_threads()
    return {
        "recv_max_size": SEALED_BYTES_MAX,
        "reconnect_time_min": RECONNECT_MS_MIN,
        "reconnect_time_max": RECONNECT_MS_MAX,
    }


class ReverseReceiver:
    """Our end of a reverse channel: dials, and gives each frame that comes to `on_frame`."""

    def __init__(
        self, dial: str, loop: asyncio.AbstractEventLoop, on_frame: Callable[[bytes], None]
    ) -> None:
        self._loop = loop
        self._on_frame = on_frame
        self._closed = False
        self._socket = pynng.Pull0(recv_buffer_size=SOCKET_BUFFER_FRAMES, **_limits())
        try:
            self._socket.dial(dial, block=False)
        except pynng.NNGException:
            self._socket.close()
            raise
        loop.add_reader(self._socket.recv_fd, self._readable)

    def _readable(self) -> None:
        for _ in range(DRAIN_FRAMES_MAX):
            frame = None if self._closed else receive(self._socket)
            if frame is None:
                return
            self._on_frame(frame)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._socket.recv_fd)
            self._socket.close()


class ReverseSender:
    """A reverse channel: listens, and sends to whoever dials. As `streams.Sender`."""

    def __init__(self, listen: str, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._socket = pynng.Push0(send_buffer_size=SOCKET_BUFFER_FRAMES, **_limits())
        self.ready = True  # nng has room, as far as is known
        self.on_ready: Callable[[], None] = _nobody_waits
        try:
            self._socket.listen(listen)
        except pynng.NNGException:
            self._socket.close()
            raise

    @property
    def dialed(self) -> bool:
        return bool(self._socket.pipes)

    def send(self, frame: bytes) -> bool:
        try:
            self._socket.send(frame, block=False)
        except pynng.TryAgain:
            if self.ready:
                self.ready = False
                self._loop.add_reader(self._socket.send_fd, self._room)
            return False
        return True

    def _room(self) -> None:
        self._loop.remove_reader(self._socket.send_fd)
        self.ready = True
        self.on_ready()

    def close(self) -> None:
        if not self.ready:
            self._loop.remove_reader(self._socket.send_fd)
        self._socket.close()


def _nobody_waits() -> None:
    """Until somebody asks to be told."""


def receive(sock: pynng.Pull0 | pynng.Rep0) -> bytes | None:
    """The next message, or None where none is here. Never waits."""
    try:
        data: bytes = sock.recv(block=False)
    except pynng.TryAgain:
        return None
    except (
        RuntimeError
    ):  # an empty message: nng gives no buffer, and pynng 0.9 unpacks it all the same
        return b""
    return data


def answerer(listen: str) -> pynng.Rep0:
    """The door."""
    sock = pynng.Rep0(**_limits())
    sock.listen(listen)
    return sock


def asker(dial: str, timeout_ms: float) -> pynng.Req0:
    """A client at somebody's door. `pynng.ConnectionRefused` at once where nobody listens.

    It dials without waiting: nng's own wait for a process that is stopped is 20 s, whatever the
    timeouts of the socket.
    """
    if not listens(dial, REQUESTER):
        raise pynng.ConnectionRefused("nobody listens there", errno.ECONNREFUSED)
    timeout = int(timeout_ms)
    return pynng.Req0(
        dial=dial, block_on_dial=False, send_timeout=timeout, recv_timeout=timeout, **_limits()
    )


def listens(url: str, greeting: bytes) -> bool:
    """Whether somebody listens at a socket of this host. Waits `GREETING_S` at most."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)  # connecting on one host ends at once, either way
        try:
            probe.connect(url.removeprefix(SCHEME))
            if not greeting:
                return True
            # A connection that ends without a greeting makes nng refuse others for 100 ms.
            probe.settimeout(GREETING_S)
            probe.sendall(greeting)
            probe.recv(len(greeting))
        except (BlockingIOError, TimeoutError):
            return True  # its queue is full, or it is stopped
        except OSError:
            return False
    return True
