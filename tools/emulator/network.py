"""The network of a cluster whose nodes are in namespaces: a bridge, and a cable for each node.

Interface rules: one `Network` for a supervisor, in whose descriptors it lives: it ends with that
process, however that goes. `plan` gives a node its address; `attach` makes its namespace, once, and
may be asked again for a node that starts again; `detach` when the node has left for good. These
two run `ip` and `tc`: not on a loop's thread.
Invariants: K1 nothing of it is in the namespace of the host, and no route leads out of it; K2 an
address is given out once: who was told of it never finds another node there.

        node's namespace                  hub's namespace
     eth0 10.77.0.1/16 [tbf] ── cable ── [tbf] n1 ┐
                                                  ├ bridge `hub`
     eth0 10.77.0.2/16 [tbf] ── cable ── [tbf] n2 ┘
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from manifold.kernel import netns
from manifold.kernel.errors import Refused, Unsupported

PORT = 7070  # of control; that of data is the next. The namespace has nobody else
NUMBERS_MAX = 65_000  # of 10.77.0.0/16
# A bucket of 2 ms: less makes the timer of a fast cable work for every packet, more is a burst that
# a slow one does not have. The least is five packets.
BURST_MS = 2.0
BURST_BYTES_MIN = 8 << 10
QUEUE_MS = 50  # a cable's queue: as that of an emulated link (wire.WAITING_MS_MAX)
PROGRAMS = ("ip", "tc")


@dataclass(slots=True)
class _Cable:
    number: int
    rate_bps: float
    namespace: int = -1  # a descriptor, once it is attached

    @property
    def host(self) -> str:
        return f"10.77.{self.number >> 8}.{self.number & 255}"

    @property
    def shaping(self) -> str:
        """Arguments of `tc qdisc`: what leaves, leaves at the rate."""
        burst = max(BURST_BYTES_MIN, round(self.rate_bps * BURST_MS / 8000))
        rate = max(1, round(self.rate_bps))
        return f"root tbf rate {rate}bit burst {burst} latency {QUEUE_MS}ms"


class Network:
    """See the module. `Unsupported` where this user, or this machine, cannot have one."""

    def __init__(self) -> None:
        missing = [name for name in PROGRAMS if shutil.which(name) is None]
        if missing:
            raise Unsupported(
                f"Not in PATH, and needed for namespaces: {', '.join(missing)}.",
                "Install the Debian package iproute2 (it puts them in /usr/sbin), or leave out "
                "--netns.",
            )
        self._cables: dict[str, _Cable] = {}
        self._given = 0  # K2
        self._lock = threading.Lock()  # attaching runs in threads
        try:
            self._hub = netns.make()
        except OSError as error:
            raise Unsupported(
                f"Network namespaces cannot be made: {error.strerror}.",
                "They take root (CAP_SYS_ADMIN and CAP_NET_ADMIN): `sudo manifold up --netns`, or "
                "leave out --netns.",
            ) from error
        try:
            self._ip(self._hub, ["link set lo up", "link add hub type bridge", "link set hub up"])
        except BaseException:
            self.close()
            raise

    def plan(self, alias: str, rate_bps: float) -> str:
        """The address of a node that hangs on a cable of so many bits a second."""
        if self._given >= NUMBERS_MAX:
            raise Refused(
                f"There were {self._given} nodes in this network already.", "Start it anew."
            )
        self._given += 1
        cable = self._cables[alias] = _Cable(self._given, rate_bps)
        return f"tcp://{cable.host}:{PORT}/{alias}"

    def attach_all(self) -> None:
        """Everybody who was planned."""
        for alias in list(self._cables):
            self.attach(alias)

    def attach(self, alias: str) -> int:
        """The descriptor of the node's namespace, which stays ours."""
        with self._lock:
            cable = self._cables[alias]
            if cable.namespace < 0:
                cable.namespace = netns.make()
                try:
                    self._lay(cable)
                except BaseException:
                    os.close(cable.namespace)
                    cable.namespace = -1
                    raise
            return cable.namespace

    def _lay(self, cable: _Cable) -> None:
        name, end = f"n{cable.number}", cable.namespace
        self._ip(
            self._hub,
            [
                f"link add {name} type veth peer name eth0 netns /proc/self/fd/{end}",
                f"link set {name} master hub",
                f"link set {name} up",
            ],
            (end,),
        )
        self._ip(end, ["link set lo up", f"addr add {cable.host}/16 dev eth0", "link set eth0 up"])
        self._tc(self._hub, f"qdisc replace dev {name} {cable.shaping}")
        self._tc(end, f"qdisc replace dev eth0 {cable.shaping}")

    def detach(self, alias: str) -> None:
        """A node that has left for good: nothing where it never was attached."""
        with self._lock:
            cable = self._cables.pop(alias, None)
            if cable is not None and cable.namespace >= 0:
                self._ip(self._hub, [f"link del n{cable.number}"])
                os.close(cable.namespace)

    def close(self) -> None:
        """All of it ends, once nobody is in it any more."""
        with self._lock:
            for cable in self._cables.values():
                if cable.namespace >= 0:
                    os.close(cable.namespace)
            self._cables.clear()
            if self._hub >= 0:
                os.close(self._hub)
                self._hub = -1

    def _ip(self, where: int, lines: Sequence[str], fds: Sequence[int] = ()) -> None:
        self._run(where, "ip", lines, fds)

    def _tc(self, where: int, line: str) -> None:
        self._run(where, "tc", [line])

    def _run(self, where: int, program: str, lines: Sequence[str], fds: Sequence[int] = ()) -> None:
        said = netns.run(where, [program, "-batch", "-"], "\n".join(lines) + "\n", fds)
        if said:
            raise Unsupported(
                f"The network of this cluster cannot be made: `{program}` says {said!r}.",
                "It needs veth, bridges and the queue `tbf` of the kernel; or leave out --netns.",
            )
