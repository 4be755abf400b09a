"""Emulated links between two processes: how late a frame is at 10 ms, how near 10 Mbit/s it is.

One way, by the clock that both processes share; no round trip halves an error. Each sample by the
timerfd is followed by one by the loop's timers, and by one without any rule: what the way itself
takes is part of the error. A rate is that of the frames between the first and the last to arrive.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from random import Random
from typing import Any

import uvloop

from manifold.kernel.effects import Plane
from manifold.kernel.hyperbus.driver import Bus, Incoming
from manifold.kernel.hyperbus.filter import Link
from manifold.kernel.messages import DECODER, Done
from manifold.tools.bench import cables
from manifold.tools.bench.harness import Figure, percentile

LATENCY_MS = 10.0
RATE_BPS = 10e6
RATE_S = 2.0
MESSAGE_BYTES = 2500  # 1000 of them are 2 s at 10 Mbit/s, and fit the queue of a peer
RECEIVER = "K-receiver"
ERROR_MS_MAX = 0.5
RATE_ERROR_MAX = 0.05
ANSWER_MS = 10_000.0
FLOWS = {"control": (Plane.CONTROL,), "data": (Plane.DATA,), "both": tuple(Plane)}


class _Receiver:
    """What the other process does: notes when what has come, and tells it when asked."""

    def __init__(self, address: str) -> None:
        self.samples: dict[str, list[float]] = defaultdict(list)
        self.seen: list[tuple[int, int]] = []  # when, and how many bytes had come by then
        self.folder = os.path.dirname(address)
        self.bus = Bus(RECEIVER, 1, "links", DECODER, self.arrived)
        self.bus.listen(address)

    def arrived(self, incoming: Incoming) -> None:
        now_ns = time.monotonic_ns()
        if incoming.request:
            told = {"samples": self.samples, "seen": self.seen}
            self.bus.learn(incoming.source, f"{self.folder}/{incoming.source}")
            self.bus.reply(incoming, Done(json.dumps(told)))
            self.samples, self.seen = defaultdict(list), []
        elif incoming.body.what.startswith("at "):
            sent_ns = int(incoming.body.what[3:])
            self.samples[incoming.source].append((now_ns - sent_ns) / 1e6)
        else:
            self.seen.append((now_ns, self.bus.counters["bytes_received"]))


async def _receive(address: str) -> None:
    receiver = _Receiver(address)
    print("ready", flush=True)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), ended.set)
    await ended.wait()  # whoever started us has closed it
    receiver.bus.close()


def _sender(name: str, folder: str, link: Link, *, precise: bool = True) -> Bus:
    bus = Bus(name, 1, "links", DECODER, lambda incoming: None)
    bus.listen_client(f"ipc://{folder}/{name}")
    bus.learn(RECEIVER, f"ipc://{folder}/receiver")
    bus.emulation.precise = precise
    bus.filter.set(RECEIVER, link)
    return bus


async def _report(bus: Bus) -> dict[str, Any]:
    """What the receiver has seen; by a line of its own, behind what was sent."""
    answer = await bus.request(RECEIVER, Done(), ANSWER_MS)
    found: dict[str, Any] = json.loads(answer.what)
    return found


async def _lateness(folder: str, samples: int, plane: Plane) -> dict[str, list[float]]:
    """Milliseconds that frames were on their way, by who sent them."""
    late = Link(latency_ms=LATENCY_MS)
    senders = [
        _sender("K-timerfd", folder, late),
        _sender("K-loop", folder, late, precise=False),
        _sender("K-none", folder, Link()),
    ]
    random = Random(1)
    for _ in range(samples):
        for bus in senders:
            # At no fixed place between the milliseconds in which the loop counts.
            await asyncio.sleep(0.003 + random.random() / 500)
            bus.send(RECEIVER, Done(f"at {time.monotonic_ns()}"), plane)
    await asyncio.sleep(3 * LATENCY_MS / 1000)
    found = (await _report(senders[2]))["samples"]
    for bus in senders:
        bus.close()
    return {name: each[1:] for name, each in found.items()}  # the first had to connect


async def _rate(folder: str, planes: tuple[Plane, ...], seconds: float) -> float:
    """Bits a second over a link of 10 Mbit/s."""
    bus = _sender("K-rate", folder, Link(rate_bps=RATE_BPS))
    asker = _sender("K-asker", folder, Link())
    count = int(RATE_BPS * seconds / 8 / MESSAGE_BYTES)
    for number in range(count):
        bus.send(RECEIVER, Done("x" * MESSAGE_BYTES), planes[number % len(planes)])
    seen: list[list[int]] = []
    while len(seen) < count:
        await asyncio.sleep(seconds / 4)
        seen += (await _report(asker))["seen"]
    bus.close()
    asker.close()
    (first_ns, first_bytes), (last_ns, last_bytes) = seen[0], seen[-1]
    return (last_bytes - first_bytes) * 8e9 / (last_ns - first_ns)


async def _measure(folder: str, quick: bool) -> list[Figure]:
    figures = []
    for plane in Plane:
        found = await _lateness(folder, 100 if quick else 500, plane)
        ours, loops = ([ms - LATENCY_MS for ms in found[f"K-{n}"]] for n in ("timerfd", "loop"))
        figures.append(
            Figure(
                f"median error at 10 ms, {plane.value}", percentile(ours, 50), ERROR_MS_MAX,
                "lower", "ms",
                {
                    "timerfd p99": percentile(ours, 99), "loop timers p50": percentile(loops, 50),
                    "loop timers p99": percentile(loops, 99),
                    "without a rule p50": percentile(found["K-none"], 50),
                },
            )
        )  # fmt: skip
    for name, planes in FLOWS.items():
        rate_bps = await _rate(folder, planes, RATE_S / 2 if quick else RATE_S)
        figures.append(
            Figure(
                f"off 10 Mbit/s, {name}", abs(rate_bps / RATE_BPS - 1), RATE_ERROR_MAX, "lower",
                "", {"rate / limit": rate_bps / RATE_BPS},
            )
        )  # fmt: skip
    return figures


def run(quick: bool = False) -> list[Figure]:
    """Errors and rates, between this process and one of its own; and those of real cables."""
    with tempfile.TemporaryDirectory(prefix="mf-links-") as folder:
        command = [sys.executable, "-P", "-m", __name__, str(Path(folder) / "receiver")]
        receiver = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ
        )
        try:
            assert receiver.stdout is not None
            assert receiver.stdout.readline() == b"ready\n"
            figures = uvloop.run(_measure(folder, quick))
        finally:
            receiver.communicate()
    return figures + cables.figures(quick)


if __name__ == "__main__":
    uvloop.run(_receive(f"ipc://{sys.argv[1]}"))
