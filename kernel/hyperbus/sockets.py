"""nng sockets with the sizes set: nng's defaults are unlimited messages and a queue of one.

Interface rules: nothing here may run before the last fork of a process: nng's threads do not
survive one, and nng panics if it was used before it.
An address is a base: `ipc:///dir/name` has the door at `.d`, control at `.c` and data at `.a`.
"""

from __future__ import annotations

import functools
from typing import Any

import pynng

from manifold.kernel.effects import Plane
from manifold.kernel.errors import PeerError
from manifold.kernel.hyperbus.messages import (
    NNG_BUFFER_MESSAGES,
)
from manifold.kernel.limits import (
    FRAME_BYTES_MAX,
)

# Room for a seal's counter and tag around the largest frame.
SEALED_BYTES_MAX = FRAME_BYTES_MAX + 256
NNG_THREADS = 1  # of each kind; two task threads are nng's own least
RECONNECT_MS_MIN = 20
RECONNECT_MS_MAX = 1000

DOOR = "door"
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
    socket = pynng.Pull0(recv_buffer_size=NNG_BUFFER_MESSAGES, **_limits())
    if listen:
        socket.listen(listen)
    else:
        socket.dial(dial, block=False)
    return socket


def pusher(listen: str = "", dial: str = "") -> pynng.Push0:
    """A socket to send on, dialing or (a reverse channel) listening."""
    socket = pynng.Push0(send_buffer_size=NNG_BUFFER_MESSAGES, **_limits())
    if listen:
        socket.listen(listen)
    else:
        socket.dial(dial, block=False)
    return socket


def answerer(listen: str) -> pynng.Rep0:
    """The door."""
    socket = pynng.Rep0(**_limits())
    socket.listen(listen)
    return socket


def asker(dial: str, timeout_ms: float) -> pynng.Req0:
    """A client at somebody's door; raises pynng.ConnectionRefused and the like at once."""
    timeout = int(timeout_ms)
    return pynng.Req0(dial=dial, send_timeout=timeout, recv_timeout=timeout, **_limits())
