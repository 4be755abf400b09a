"""How long a store stands still when one of its three members is killed: Nexus against etcd.

Eight clients of the two that survive, each in turn on a key of its own and on one of six that all
share; the longest time between two completed swaps, whosever, after SIGKILL of the third. Each
voter of ours in turn; etcd's leader, and a follower. A client that gets no answer in 0.5 s asks
again. What was killed is started again only after the measurement: it saves nobody.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import signal
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import uvloop

from manifold.kernel.errors import Maybe, Unavailable
from manifold.tools.bench import etcd, swaps
from manifold.tools.bench.harness import Figure
from manifold.tools.bench.scratch import uniform
from manifold.tools.bench.swaps import Session
from manifold.tools.emulator.testing import TestCluster

NODES = 3
CLIENTS = 8
SHARED_KEYS = 6
BEFORE_S, AFTER_S = 1.0, 4.0  # etcd's elections take 1 to 2 s
ATTEMPT_S = 0.5
PAUSE_S = 0.002  # after a failed attempt, so that a refusal does not spin
AWAY_S = 6.0  # so long our supervisor is made to wait: longer than the measurement
GOAL_MS = 200.0


@dataclass(slots=True)
class Progress:
    """When swaps were completed, by client; `killed` on the same clock."""

    completed: list[list[float]] = field(default_factory=lambda: [[] for _ in range(CLIENTS)])
    began: float = 0.0
    killed: float = 0.0
    ends: float = 0.0

    def gap_ms(self) -> float:
        """Without a completion by anybody, after the kill."""
        return gap_s(itertools.chain(*self.completed), self.killed, self.ends) * 1000

    def client_gap_ms(self) -> float:
        """That of the client that waited for longest."""
        return max(gap_s(each, self.killed, self.ends) for each in self.completed) * 1000

    def quiet_ms(self) -> float:
        """The same while nothing was wrong: what the machine and the disk do by themselves."""
        return gap_s(itertools.chain(*self.completed), self.began, self.killed) * 1000


def gap_s(times: itertools.chain[float] | Sequence[float], begin: float, end: float) -> float:
    """The longest time without one of `times` from `begin` to `end`."""
    inside = sorted(each for each in times if begin < each < end)
    return max(after - before for before, after in itertools.pairwise([begin, *inside, end]))


async def client(number: int, session: Session, progress: Progress) -> None:
    """Swaps until the time is over, on its own key and on shared ones in turn."""
    random = Random(number)
    known: dict[str, int | None] = {}
    completed = progress.completed[number]
    for count in itertools.count():
        if time.perf_counter() >= progress.ends:
            return
        own = f"bench/failover/own{number}"
        key = own if count % 2 else f"bench/failover/shared{random.randrange(SHARED_KEYS)}"
        try:
            async with asyncio.timeout(ATTEMPT_S):
                if key not in known:
                    known[key] = await session.read(key)
                number_there = known[key]
                following = (number_there or 0) + 1
                done, found = await session.swap(key, number_there, following)
        except (Maybe, Unavailable, TimeoutError):
            known.pop(key, None)
            await asyncio.sleep(PAUSE_S)
            continue
        known[key] = following if done else found
        completed.append(time.perf_counter())


async def one_kill(survivors: Sequence[Session], pid: int) -> Progress:
    """Clients of the survivors, and the kill in the middle."""
    progress = Progress()
    progress.began = time.perf_counter()
    progress.ends = progress.began + BEFORE_S + AFTER_S

    async def kill() -> None:
        await asyncio.sleep(BEFORE_S)
        os.kill(pid, signal.SIGKILL)
        progress.killed = time.perf_counter()

    loops = (client(n, survivors[n % len(survivors)], progress) for n in range(CLIENTS))
    await asyncio.gather(kill(), *loops)
    return progress


# --- the two clusters -------------------------------------------------------------------------


def kill_voter(cluster: TestCluster, alias: str) -> Progress:
    """One of ours; it is back, and all agree, when this returns."""
    watched = cluster.supervisor.nodes[alias]
    pid = watched.pid
    hold_back(cluster, alias)

    async def attached() -> Progress:
        others = [each for each in cluster.aliases if each != alias]
        store = swaps.manifold_store(cluster.name, cluster.environ, others)
        async with store as sessions:
            await swaps.wait_agreeing(sessions)
            return await one_kill(list(sessions.values()), pid)

    progress = uvloop.run(attached())
    assert watched.pid == pid or not alive(watched.pid), "it came back during the measurement"
    cluster.wait_converged()
    return progress


def hold_back(cluster: TestCluster, alias: str) -> None:
    """The supervisor starts it again only after `AWAY_S`, as if it had failed before."""
    watched = cluster.supervisor.nodes[alias]
    watched.backoff_s = AWAY_S
    watched.started_s = math.inf  # never steady: the delay is kept


def alive(pid: int) -> bool:
    return pid > 0 and Path("/proc", str(pid)).exists()


def kill_member(cluster: etcd.Cluster, *, leader: bool) -> Progress:
    """One of etcd's; it is back, and all agree, when this returns."""
    leading = cluster.leader()
    victim = next(m for m in cluster.members if (m is leading) == leader)
    others = [each.name for each in cluster.members if each is not victim]
    assert victim.process is not None
    pid = victim.process.pid

    async def attached() -> Progress:
        async with swaps.etcd_store(cluster) as sessions:
            survivors = {name: sessions[name] for name in others}
            await swaps.wait_agreeing(survivors)
            return await one_kill(list(survivors.values()), pid)

    progress = uvloop.run(attached())
    victim.process.wait()
    cluster.start(victim)
    cluster.wait_healthy()
    return progress


# --- figures ----------------------------------------------------------------------------------


def summary(kills: Sequence[Progress]) -> dict[str, float | str]:
    """What the figures are computed from."""
    return {
        "worst ms": max(each.gap_ms() for each in kills),
        "longest wait of one client, median ms": median_client(kills),
        "without a kill, median ms": statistics.median(each.quiet_ms() for each in kills),
        "kills": len(kills),
    }


def median_gap(kills: Sequence[Progress]) -> float:
    return statistics.median(each.gap_ms() for each in kills)


def median_client(kills: Sequence[Progress]) -> float:
    return statistics.median(each.client_gap_ms() for each in kills)


def run(quick: bool = False) -> list[Figure]:
    """Milliseconds without progress, of each voter and of etcd's two roles, in turns."""
    rounds = 1 if quick else 4
    etcd.program()  # told before the long work
    ours: dict[str, list[Progress]] = {}
    leader: list[Progress] = []
    follower: list[Progress] = []
    with uniform(NODES) as cluster:
        folder = Path(cluster.environ["MANIFOLD_STATE_HOME"]).parent
        with etcd.etcd_cluster(folder / "etcd") as peer:
            for _ in range(rounds):
                for alias in cluster.aliases:
                    ours.setdefault(alias, []).append(kill_voter(cluster, alias))
                    if len(leader) <= len(follower):
                        leader.append(kill_member(peer, leader=True))
                    else:
                        follower.append(kill_member(peer, leader=False))
    return figures(ours, leader, follower)


def figures(
    ours: dict[str, list[Progress]], leader: Sequence[Progress], follower: Sequence[Progress]
) -> list[Figure]:
    every = [progress for kills in ours.values() for progress in kills]
    found = [
        Figure(f"without progress after SIGKILL of voter {alias}", median_gap(kills), GOAL_MS,
               "lower", "ms", summary(kills))
        for alias, kills in ours.items()
    ]  # fmt: skip
    found += [
        Figure("without progress, every voter", median_gap(every), GOAL_MS, "lower", "ms",
               summary(every), f"it comes back {AWAY_S:g} s after the kill: later than measured"),
        Figure("without progress after SIGKILL of etcd's leader", median_gap(leader), None,
               "lower", "ms", summary(leader), f"etcd {etcd.version()}, as it is set by default"),
        Figure("without progress after SIGKILL of an etcd follower", median_gap(follower), None,
               "lower", "ms", summary(follower)),
        Figure("every voter / etcd's leader", median_gap(every) / median_gap(leader), 1.0,
               "lower", "x"),
        Figure("longest wait of one client: every voter / etcd's leader",
               median_client(every) / median_client(leader), None, "lower", "x",
               {"ours ms": median_client(every), "etcd ms": median_client(leader)}),
    ]  # fmt: skip
    return found
