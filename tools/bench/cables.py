"""Cables between two namespaces: how near their rate they are, and what TCP costs beside a path.

A process in one namespace receives and one in another sends, as two nodes of `up --netns` do. The
rate is that of the frames from when the first is sent until the last has come, by the clock that
both share: whoever waits for a core only makes it less. What Ethernet, IP and TCP add is part of
the cable's rate, so 0.956 of that is what there is for frames. Round trips over TCP and over
Unix sockets, which cross namespaces, take turns between the same two processes.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import uvloop

from manifold.kernel import netns
from manifold.kernel.effects import Plane
from manifold.kernel.errors import Unsupported
from manifold.kernel.hyperbus.driver import Bus, Incoming
from manifold.kernel.messages import DECODER, Done
from manifold.tools.bench.harness import Figure, percentile
from manifold.tools.emulator.network import Network

RATES_BPS = {"10 Mbit/s": 10e6, "100 Mbit/s": 100e6}
FREE_BPS = 1e9  # for round trips: no packet waits
SECONDS = 2.0
MESSAGE_BYTES = 2500
ON_THE_WAY_MAX = 800  # messages: the queue of a peer takes 1024
RATE_ERROR_MAX = 0.10
TRIES = 3  # whoever waits for a core makes it slower: the fastest says what the cable does
PINGS = 1000
ANSWER_MS = 10_000.0
RECEIVER = "K-receiver"


class _Receiver:
    """Tells who asks how much had come, and when; who asks says where it listens."""

    def __init__(self, path: str, line: str) -> None:
        self.count, self.last = 0, (0, 0)  # when it came, and how many bytes had come by then
        self.bus = Bus(RECEIVER, 1, "cables", DECODER, self.arrived, tcp=True)
        self.bus.listen(path, line)

    def arrived(self, incoming: Incoming) -> None:
        if not incoming.request:
            self.count += 1
            self.last = (time.monotonic_ns(), self.bus.counters["bytes_received"])
            return
        self.bus.learn(incoming.source, incoming.body.what)
        self.bus.reply(incoming, Done(json.dumps([self.count, *self.last])))


async def _receive(path: str, line: str) -> None:
    receiver = _Receiver(path, line)
    print("ready", flush=True)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), ended.set)
    await ended.wait()  # whoever started us has closed it
    receiver.bus.close()


def _bus(name: str, at: str, to: str) -> Bus:
    bus = Bus(name, 1, "cables", DECODER, lambda incoming: None, tcp=True)
    bus.listen_client(at)
    bus.learn(RECEIVER, to)
    return bus


async def _ask(bus: Bus, at: str) -> tuple[int, int, int]:
    """How many had come, when the last of them came, and how many bytes by then."""
    answer = await bus.request(RECEIVER, Done(at), ANSWER_MS)
    count, last_ns, last_bytes = json.loads(answer.what)
    return count, last_ns, last_bytes


async def _rate(ours: str, theirs: str, rate_bps: float, seconds: float) -> float:
    """Bits a second that arrive."""
    bus = _bus("K-sender", ours, theirs)
    total = int(rate_bps * seconds / 8 / MESSAGE_BYTES)
    sent = arrived = last_ns = last_bytes = 0
    await _ask(bus, ours)  # connected
    began_ns = time.monotonic_ns()
    while arrived < total:  # by the control plane of its own connection, beside the data
        while sent < min(total, arrived + ON_THE_WAY_MAX):
            bus.send(RECEIVER, Done("x" * MESSAGE_BYTES), Plane.DATA)
            sent += 1
        arrived, last_ns, last_bytes = await _ask(bus, ours)
    bus.close()
    return last_bytes * 8e9 / (last_ns - began_ns)


async def _trips(lines: dict[str, tuple[str, str]], count: int) -> dict[str, list[float]]:
    """Milliseconds from a question to its answer, by kind of line."""
    buses = {kind: (_bus(f"K-{kind}", *ends), ends[0]) for kind, ends in lines.items()}
    took: dict[str, list[float]] = {kind: [] for kind in lines}
    for _ in range(count + 1):
        for kind, (bus, at) in buses.items():
            began_ns = time.monotonic_ns()
            await _ask(bus, at)
            took[kind].append((time.monotonic_ns() - began_ns) / 1e6)
    for bus, _ in buses.values():
        bus.close()
    return {kind: each[1:] for kind, each in took.items()}  # the first had to connect


class Pair:
    """Two namespaces with a cable of `rate_bps` each, and a process that receives in one."""

    def __init__(self, folder: Path, rate_bps: float) -> None:
        self.network = Network()
        self.path = f"ipc://{folder}/receiver"
        self.there = self.network.plan("receiver", rate_bps)
        self.here = self.network.plan("sender", rate_bps)
        command = [sys.executable, "-P", "-m", __name__, self.path, self.there]
        self._process = netns.within(
            self.network.attach("receiver"),
            lambda: subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE),
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def run(self, measuring: Any) -> Any:
        """A coroutine in the sender's namespace."""
        return netns.within(self.network.attach("sender"), lambda: uvloop.run(measuring))

    def close(self) -> None:
        self._process.communicate()
        self.network.close()


def rate(rate_bps: float, seconds: float = SECONDS) -> float:
    """Bits a second of frames over cables of `rate_bps`. `Unsupported` where there are none."""
    with tempfile.TemporaryDirectory(prefix="mf-cables-") as folder:
        pair = Pair(Path(folder), rate_bps)
        try:
            return float(pair.run(_rate(pair.here, pair.there, rate_bps, seconds)))
        finally:
            pair.close()


def trips(count: int) -> dict[str, list[float]]:
    """Round trips in milliseconds, "unix" and "tcp"."""
    with tempfile.TemporaryDirectory(prefix="mf-cables-") as folder:
        pair = Pair(Path(folder), FREE_BPS)
        ends = {"unix": (f"ipc://{folder}/sender", pair.path), "tcp": (pair.here, pair.there)}
        try:
            found: dict[str, list[float]] = pair.run(_trips(ends, count))
            return found
        finally:
            pair.close()


def figures(quick: bool) -> list[Figure]:
    """Rows of `bench links`; one that says why, where there can be no namespaces."""
    try:
        found = []
        for name, rate_bps in RATES_BPS.items():
            seconds = SECONDS / 2 if quick else SECONDS
            ratio = max(rate(rate_bps, seconds) for _ in range(TRIES)) / rate_bps
            found.append(
                Figure(
                    f"off {name}, cable of a namespace", abs(ratio - 1), RATE_ERROR_MAX, "lower",
                    "", {"rate / limit": ratio},
                )
            )  # fmt: skip
        took = trips(PINGS // 5 if quick else PINGS)
    except Unsupported as error:
        return [Figure("cables of namespaces", float("nan"), None, "lower", "", note=str(error))]
    middle = {kind: percentile(each, 50) for kind, each in took.items()}
    ratio = middle["tcp"] / middle["unix"]
    raw: dict[str, float | str] = {
        "TCP p50 ms": middle["tcp"], "TCP p99 ms": percentile(took["tcp"], 99),
        "Unix p50 ms": middle["unix"], "Unix p99 ms": percentile(took["unix"], 99),
    }  # fmt: skip
    return [*found, Figure("round trip, TCP in namespaces / Unix", ratio, None, "lower", "", raw)]


if __name__ == "__main__":
    uvloop.run(_receive(sys.argv[1], sys.argv[2]))
