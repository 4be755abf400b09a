"""nng sockets with the sizes set: nng's defaults are unlimited messages and a queue of one.

Interface rules: nothing here may run before the last fork of a process: nng's threads do not
survive one, and nng panics if it was used before it.
An address is a base: `ipc:///dir/name` has the door at `.d`, control at `.c` and data at `.a`.
"""

from __future__ import annotations

import errno
import functools
import socket
from typing import Any, TypeVar

import pynng

from manifold.kernel.effects import Plane
from manifold.kernel.errors import PeerError
from manifold.kernel.limits import FRAME_BYTES_MAX, SOCKET_BUFFER_FRAMES

# Room for a seal's counter and tag around the largest frame.
SEALED_BYTES_MAX = FRAME_BYTES_MAX + 256
NNG_THREADS = 1  # of each kind; two task threads are nng's own least
RECONNECT_MS_MIN = 20
RECONNECT_MS_MAX = 1000

# How the end of a connection begins that requests, and one that pushes: "SP", version, protocol.
REQUESTER, PUSHER = b"\0SP\0\0\x30\0\0", b"\0SP\0\0\x50\0\0"
GREETING_S = 0.05

DOOR = "door"
T = TypeVar("T", pynng.Pull0, pynng.Push0)
_ENDING = {DOOR: ".d", Plane.CONTROL: ".c", Plane.DATA: ".a"}


def url(address: str, part: Plane | str) -> str:
    """The nng URL of one part of an address."""
    if not address.startswith("ipc:///"):
        raise PeerError(
            f"{address!r} is not an address.",
            "Until frames are sealed only ipc:///path is served, in a directory of mode 0700.",
        )
    return address + _ENDING[part]


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


def puller(listen: str = "", dial: str = "") -> pynng.Pull0:
    """A socket to receive on, listening or (a reverse channel) dialing."""
    return _placed(pynng.Pull0(recv_buffer_size=SOCKET_BUFFER_FRAMES, **_limits()), listen, dial)


def pusher(listen: str = "", dial: str = "") -> pynng.Push0:
    """A socket to send on, dialing or (a reverse channel) listening."""
    return _placed(pynng.Push0(send_buffer_size=SOCKET_BUFFER_FRAMES, **_limits()), listen, dial)


def _placed(sock: T, listen: str, dial: str) -> T:
    try:
        if listen:
            sock.listen(listen)
        else:
            sock.dial(dial, block=False)
    except pynng.NNGException:
        sock.close()
        raise
    return sock


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
            probe.connect(url.removeprefix("ipc://"))
            # A connection that ends without a greeting makes nng refuse others for 100 ms.
            probe.settimeout(GREETING_S)
            probe.sendall(greeting)
            probe.recv(len(greeting))
        except (BlockingIOError, TimeoutError):
            return True  # its queue is full, or it is stopped
        except OSError:
            return False
    return True
