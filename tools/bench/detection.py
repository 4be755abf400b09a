"""How soon the others know that a node is gone, and how often they are wrong when time is stolen.

Sixteen nodes. One is stopped (SIGSTOP), which its supervisor does not notice: SWIM alone finds out.
Measured until the first node and until every node holds it for dead, against memberlist's formula;
beside it a SIGKILL, of which the supervisor tells. Then for some time 30 % of each core is taken
from the cluster by processes of a higher priority, in which nobody dies: every death told is false.

Then the same two questions in the simulator, where hours are cheap: links that are cut one way,
flap or lose messages. These figures say "simulated".
"""

from __future__ import annotations

import math
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

from manifold.kernel.config import Config
from manifold.tools.bench.harness import Figure
from manifold.tools.bench.scratch import COLLATZ, uniform
from manifold.tools.emulator.testing import TestCluster
from manifold.tools.simulator import bad_links

NODES = 16
EPISODES, EPISODES_QUICK = 6, 1  # of 10 minutes each
KILLS, KILLS_QUICK = 20, 5
QUICK_WEATHERS = (
    "one-way cuts, three a node",
    "one node unheard by all but one",
    "half of links flap, 5 of 10 s",
)
GONE_S = 40.0  # the longest suspicion is 29 s
LOOK_S = 0.05
CALM_S = 3.0  # after the stopped one is back
STEAL = 0.3
PERIOD_S = 0.1
HOUR_S = 3600.0
FORMULA_GOAL = 1.1
# Which of a Poisson process' rates still has a chance of 1 in 20 to show nothing: 3 in the time.
UNSEEN = 3.0

# Takes its share of one core, in pieces: with a real-time priority where that is allowed, else by
# the greatest niceness that is. Says which.
THIEF = """
import os, sys, time
core, share, period_s = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
os.sched_setaffinity(0, [core])
try:
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    how = "real-time priority"
except PermissionError:
    try:
        os.setpriority(os.PRIO_PROCESS, 0, -20)
        how = "niceness -20"
    except PermissionError:
        how = "no higher priority than the nodes': it takes less than its share"
print(how, flush=True)
while True:
    began = time.perf_counter()
    while time.perf_counter() - began < share * period_s:
        pass
    time.sleep((1 - share) * period_s)
"""


def formula_s(config: Config, nodes: int) -> float:
    """T e/(e-1) + min: until some node has probed the dead one, and its suspicion ends early."""
    membership = config.membership
    probe_s = membership.probe_ms / 1000
    least_s = membership.suspicion_factor * max(1.0, math.log10(nodes)) * probe_s
    return probe_s * math.e / (math.e - 1) + least_s


# -- what the logs say ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Said:
    """One node's belief about another: when, who, of whom, what."""

    at_s: float
    who: str
    of: str
    was: str
    now: str


LINE = re.compile(r"^(\S+)Z\s.*?: (\S+) \(K-\S+, boot \d+\): (\w+) -> (\w+)", re.MULTILINE)


def beliefs(cluster: TestCluster, since_s: float) -> list[Said]:
    """All changes of belief that nodes have logged since a time of the wall clock."""
    found = []
    for alias in cluster.aliases:
        for stamp, of, was, now in LINE.findall(cluster.logs(alias)):
            at_s = datetime.fromisoformat(f"{stamp}+00:00").timestamp()
            if at_s >= since_s:
                found.append(Said(at_s, alias, of, was, now))
    return sorted(found, key=lambda said: said.at_s)


def dead_at(said: Sequence[Said], victim: str) -> dict[str, float]:
    """When each node first held it for dead."""
    found: dict[str, float] = {}
    for each in said:
        if each.of == victim and each.now == "dead":
            found.setdefault(each.who, each.at_s)
    return found


# -- a node that is gone ------------------------------------------------------------------------


def detect(cluster: TestCluster, victim: str, *, kill: bool) -> tuple[float, float]:
    """Seconds until the first node and until every node knows."""
    others = len(cluster.aliases) - 1
    began_s = time.time()
    cluster.kill(victim) if kill else cluster.pause(victim)
    known: dict[str, float] = {}
    deadline_s = time.monotonic() + GONE_S
    while len(known) < others and time.monotonic() < deadline_s:
        threading.Event().wait(LOOK_S)
        known = dead_at(beliefs(cluster, began_s), victim)
    if not kill:
        cluster.resume(victim)
    cluster.wait_converged()
    threading.Event().wait(CALM_S)
    if len(known) < others:
        return math.nan, math.nan
    return min(known.values()) - began_s, max(known.values()) - began_s


def detections(cluster: TestCluster, rounds: int) -> list[Figure]:
    formula = formula_s(cluster.config, NODES)
    victims = [cluster.aliases[(5 * number + 3) % NODES] for number in range(rounds)]
    stopped = [detect(cluster, victim, kill=False) for victim in victims]
    killed = [detect(cluster, victim, kill=True) for victim in victims]
    first = statistics.median(each for each, _ in stopped)
    every = statistics.median(each for _, each in stopped)
    raw: dict[str, float | str] = {
        "first knows, median s": first,
        "least s": min(each for each, _ in stopped),
        "most s": max(each for each, _ in stopped),
        "formula s": formula,
        "rounds": rounds,
    }
    return [
        Figure("a stopped node, by SWIM alone / memberlist's formula", first / formula,
               FORMULA_GOAL, "lower", "x", raw),
        Figure("from the first that knows to the last", every - first, None, "lower", "s"),
        Figure("a killed node, told by its supervisor, until all know",
               statistics.median(each for _, each in killed), None, "lower", "s",
               {"most s": max(each for _, each in killed)}),
    ]  # fmt: skip


# -- stolen time --------------------------------------------------------------------------------


@contextmanager
def thieves() -> Iterator[str]:
    """One for each core; how they take it."""
    command = [sys.executable, "-c", THIEF]
    started = [
        subprocess.Popen(
            [*command, str(core), str(STEAL), str(PERIOD_S)], stdout=subprocess.PIPE, text=True
        )
        for core in sorted(os.sched_getaffinity(0))
    ]
    try:
        said = [each.stdout.readline().strip() for each in started if each.stdout is not None]
        yield said[0] if said else ""
    finally:
        for each in started:
            each.kill()
            each.wait()
            if each.stdout is not None:
                each.stdout.close()


def false_deaths(cluster: TestCluster, window_s: float, *, working: bool) -> Figure:
    """Deaths that were told in a while in which nobody died, by the hour."""
    with thieves() as how:
        threading.Event().wait(CALM_S)
        since_s, deadline_s = time.time(), time.monotonic() + window_s
        client = cluster.client() if working else None
        while time.monotonic() < deadline_s:
            if client is None:
                threading.Event().wait(deadline_s - time.monotonic())
            else:
                client.parallel_for(COLLATZ, 1, 2_000_001, reduce="max")
        seconds = time.time() - since_s
        said = beliefs(cluster, since_s)
    cluster.wait_converged()
    deaths = sum(each.now == "dead" for each in said)
    suspicions = sum(each.was == "alive" and each.now == "suspect" for each in said)
    what = "busy" if working else "idle"
    bound = "" if deaths else f"; none seen: below {UNSEEN * HOUR_S / seconds:.0f} an hour (95 %)"
    return Figure(
        f"false deaths with {STEAL:.0%} stolen, {what}", deaths * HOUR_S / seconds, 0.0, "lower",
        "an hour",
        {"deaths told": deaths, "suspicions told": suspicions, "watched s": seconds,
         "node hours": NODES * seconds / HOUR_S},
        f"{PERIOD_S * STEAL * 1000:.0f} ms of each {PERIOD_S * 1000:.0f} ms by {how}{bound}",
    )  # fmt: skip


# -- bad links, simulated -----------------------------------------------------------------------


def simulated(scene: bad_links.Scene, episodes: int, kills: int, formula: float) -> Figure:
    """False deaths by the node-hour in one weather, and how soon true ones are known in it."""
    count = bad_links.watch(scene, episodes)
    first, every = bad_links.detect(scene, kills)
    stolen = f", {STEAL:.0%} stolen" if scene.stolen else ""
    unseen = f"none seen: below {UNSEEN / count.node_hours:.2g} a node-hour (95 %)"
    goal = None if scene.weather.beyond else bad_links.FALSE_DEATHS_PER_NODE_HOUR_MAX
    return Figure(
        f"simulated: false deaths, {scene.weather.name}{stolen}",
        count.per_node_hour, goal, "lower", "a node-hour",
        {"deaths told": count.deaths, "node hours": count.node_hours,
         "suspicions a node-hour": count.suspicions / count.node_hours,
         "messages a node and s": count.messages / count.node_hours / HOUR_S,
         "a true death, first knows, median s": statistics.median(first),
         "/ memberlist's formula": statistics.median(first) / formula,
         "most s": first[-1], "all know, median s": statistics.median(every)},
        "" if count.deaths else unseen,
    )  # fmt: skip


def behind_bad_links(quick: bool) -> list[Figure]:
    formula = formula_s(Config(), NODES)
    episodes, kills = (EPISODES_QUICK, KILLS_QUICK) if quick else (EPISODES, KILLS)
    return [
        simulated(bad_links.Scene(weather, NODES, stolen), episodes, kills, formula)
        for stolen in ((False,) if quick else (False, True))
        for weather in bad_links.WEATHERS
        if not quick or weather.name in QUICK_WEATHERS
    ]


def run(quick: bool = False) -> list[Figure]:
    """Ratio to the formula; false deaths an hour, scaled from the time that was watched."""
    window_s = 20.0 if quick else 300.0
    with uniform(NODES) as cluster:
        threading.Event().wait(CALM_S)
        figures = detections(cluster, 3 if quick else 9)
        figures.append(false_deaths(cluster, window_s, working=False))
        figures.append(false_deaths(cluster, window_s, working=True))
    return figures + behind_bad_links(quick)
