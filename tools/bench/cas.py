"""Compare-and-swap: three voters of Nexus against three members of etcd, on one disk, in turns.

Closed loops of 1, 8 and 64 clients, each on a key of its own, then all on one key: read, swap, and
again with what a refusal tells. Our clients are dealt to the three nodes; all of etcd's are at its
leader, which is its best place. Clients of both are loops on one thread with one connection a node.
Swaps become durable on both sides before they are answered; beside them: bare appends, each synced.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import uvloop

from manifold.tools.bench import etcd, swaps
from manifold.tools.bench.harness import Figure, no_garbage_collection, percentile
from manifold.tools.bench.scratch import uniform
from manifold.tools.bench.swaps import EtcdSession, Load, NexusSession, Session

NODES = 3
CLIENTS = (1, 8, 64)
ROUND_S = 1.0
SETTLE_S = 0.15  # etcd writes its pages up to 100 ms after a swap was answered
P50_GOAL, RATE_GOAL = 0.8, 0.5
APPENDS, APPEND_BYTES = 500, 200
FLOOR_READS = 1000

Measure = Callable[[], Awaitable[Load]]


class Pair:
    """Rounds of the same thing on both sides, in turns."""

    def __init__(self, ours: Measure, theirs: Measure) -> None:
        self._measures = {"ours": ours, "etcd": theirs}
        self.rounds: list[dict[str, Load]] = []

    async def run(self, rounds: int) -> Pair:
        """One round more than asked for: the first only warms both."""
        for number in range(rounds + 1):
            order = ("ours", "etcd") if number % 2 else ("etcd", "ours")
            loads = {}
            for side in order:
                with no_garbage_collection():
                    loads[side] = await self._measures[side]()
                await asyncio.sleep(SETTLE_S)
            if number:
                self.rounds.append(loads)
        return self

    def figure(
        self, name: str, value: Callable[[Load], float], unit: str, *, lower: bool,
        goal: float | None, note: str = "",
    ) -> Figure:  # fmt: skip
        """The ratio of ours to etcd's: the median of the rounds' own (harness, B1)."""
        ratios = [value(each["ours"]) / value(each["etcd"]) for each in self.rounds]
        raw: dict[str, float | str] = {
            f"{side} {unit}": statistics.median(value(each[side]) for each in self.rounds)
            for side in ("ours", "etcd")
        }
        raw |= {"ratio lowest": min(ratios), "ratio highest": max(ratios)}
        ratio = statistics.median(ratios)
        return Figure(name, ratio, goal, "lower" if lower else "higher", "x", raw, note)

    def shares(self) -> str:
        """How much of its one core the clients' thread used, and what was never answered."""
        ours, theirs = (
            statistics.median(each[side].client_share for each in self.rounds)
            for side in ("ours", "etcd")
        )
        lost = {side: sum(each[side].unknown for each in self.rounds) for side in ("ours", "etcd")}
        return (
            f"the clients' thread was busy {ours:.0%} of the time with ours, {theirs:.0%} etcd's; "
            f"of unknown fate: {lost['ours']} of ours, {lost['etcd']} of etcd's"
        )


def compared(name: str, pair: Pair) -> list[Figure]:
    """p50, p99 and rate of one kind of load."""
    return [
        pair.figure(f"p50, {name} / etcd", lambda load: load.ms(50), "ms", lower=True,
                    goal=P50_GOAL),
        pair.figure(f"p99, {name} / etcd", lambda load: load.ms(99), "ms", lower=True, goal=None),
        pair.figure(f"swaps a second, {name} / etcd", lambda load: load.per_s, "/s", lower=False,
                    goal=RATE_GOAL, note=pair.shares()),
    ]  # fmt: skip


def synced_appends_s(folder: Path) -> list[float]:
    """Seconds of each of some appends of a record's size, synced: what no voter can go below."""
    path = folder / "floor"
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    taken = []
    try:
        for _ in range(APPENDS):
            began = time.perf_counter()
            os.write(handle, b"\1" * APPEND_BYTES)
            os.fdatasync(handle)
            taken.append(time.perf_counter() - began)
    finally:
        os.close(handle)
        path.unlink()
    return taken


def floor(folder: Path, rounds: int) -> Figure:
    taken = [each for _ in range(rounds) for each in synced_appends_s(folder)]
    return Figure(
        "appends a second, each synced", len(taken) / sum(taken), None, "higher", "/s",
        {"p50 ms": percentile(taken, 50) * 1000, "p99 ms": percentile(taken, 99) * 1000,
         "file system": file_system(folder)},
        f"etcd {etcd.version()} is on the same one, as it is set by default",
    )  # fmt: skip


def file_system(folder: Path) -> str:
    """The type of what `folder` lies on: in memory a sync costs nothing."""
    found = ("", "unknown")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, kind, *_ = line.split()
        if folder.is_relative_to(point) and len(point) >= len(found[0]):
            found = (point, kind)
    return found[1]


async def client_floor(ours: NexusSession, theirs: EtcdSession) -> list[Figure]:
    """What one read takes with no disk: the clients' own part is below it."""
    reads: dict[str, Callable[[], Awaitable[object]]] = {
        "etcd: a serializable read, p50": lambda: theirs.read_here("bench/ready"),
        "etcd: a linearizable read, p50": lambda: theirs.read("bench/ready"),
        "Nexus: a linearizable read, p50": lambda: ours.read("bench/ready"),
    }
    figures = []
    for name, read in reads.items():
        taken = []
        for _ in range(FLOOR_READS):
            began = time.perf_counter()
            await read()
            taken.append(time.perf_counter() - began)
        figures.append(Figure(name, percentile(taken, 50) * 1000, None, "lower", "ms"))
    return figures


async def measured(
    nexus: Mapping[str, NexusSession], members: Mapping[str, EtcdSession], leader: str, rounds: int
) -> list[Figure]:
    """All loads, one after the other."""
    ours, best = list(nexus.values()), [members[leader]]

    def pair(clients: int, key: str, *, one: bool, etcds: Sequence[Session] = best) -> Pair:
        return Pair(
            lambda: swaps.spread(ours, clients, key, ROUND_S, one=one),
            lambda: swaps.spread(etcds, clients, key, ROUND_S, one=one),
        )

    figures = await client_floor(ours[0], best[0])
    for clients in CLIENTS:
        name = "1 client" if clients == 1 else f"{clients} clients, own keys"
        done = await pair(clients, f"bench/own{clients}", one=False).run(rounds)
        figures += compared(name, done)
    for clients in CLIENTS[1:]:
        done = await pair(clients, f"bench/one{clients}", one=True).run(rounds)
        figures += compared(f"{clients} clients, one key", done)
    most = CLIENTS[-1]
    everywhere = list(members.values())
    done = await pair(most, "bench/all", one=False, etcds=everywhere).run(max(1, rounds // 2))
    figures.append(
        done.figure(f"swaps a second, {most} clients, own keys / etcd, clients at all members",
                    lambda load: load.per_s, "/s", lower=False, goal=None)
    )  # fmt: skip
    done = await Pair(
        lambda: swaps.spread_adding(ours, most, "bench/add", ROUND_S),
        lambda: swaps.spread(best, most, "bench/added", ROUND_S, one=True),
    ).run(max(1, rounds // 2))
    figures.append(
        done.figure(f"increments a second, {most} clients, one key: ADD / etcd's swaps",
                    lambda load: load.per_s, "/s", lower=False, goal=None)
    )  # fmt: skip
    return figures


def run(quick: bool = False) -> list[Figure]:
    """Ratios of p50, p99 and rate, and the floors of disk and clients."""
    rounds = 3 if quick else 9
    etcd.program()  # told before the long work
    with uniform(NODES) as cluster:
        folder = Path(cluster.environ["MANIFOLD_STATE_HOME"]).parent
        with etcd.etcd_cluster(folder / "etcd") as peer:
            leader = peer.leader()
            assert leader is not None, "it was healthy a moment ago"

            async def both() -> list[Figure]:
                nodes = swaps.manifold_store(cluster.name, cluster.environ, cluster.aliases)
                async with nodes as nexus, swaps.etcd_store(peer) as members:
                    await swaps.wait_agreeing(nexus)
                    return await measured(nexus, members, leader.name, rounds)

            return [
                floor(folder, rounds),
                *uvloop.run(both()),
            ]
