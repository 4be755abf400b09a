"""Real nodes behind bad links: nobody who runs is held for dead, who stands still is found out.

What the simulator measures in node-hours (tests/simulation/test_sim_membership_links.py), seen once
with real sockets and clocks; membership's constants are shorter, so that seconds are enough.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

import pytest

from manifold.tools.bench.detection import beliefs, dead_at
from manifold.tools.emulator.testing import TestCluster

Start = Callable[..., TestCluster]
NODES = 6
FAST = {"membership.probe": "400ms", "membership.ack": "200ms", "membership.gossip": "100ms"}
LEAST_S = 1.6  # 4 probe intervals: how long a suspicion that two confirm lasts
HOLD_S = 4 * LEAST_S
FLAP_S = 0.4 * LEAST_S  # down, then up for as long
FOUND_S = 30.0  # about 2.5 s on a quiet machine, 10 s where nobody confirms


def hold(seconds: float) -> None:
    """Let bad weather last."""
    threading.Event().wait(seconds)


def one_way(cluster: TestCluster) -> None:
    """The first node hears all, and only the last hears it; another two are cut apart one way."""
    first, *others, last = cluster.aliases
    cluster.cut([first], others, one_way=True)
    cluster.cut([last], [others[0]], one_way=True)
    hold(HOLD_S)


def flapping(cluster: TestCluster) -> None:
    """All links of one node are down and up by turns."""
    first, *others = cluster.aliases
    for _ in range(math.ceil(HOLD_S / (2 * FLAP_S))):
        cluster.cut([first], others)
        hold(FLAP_S)
        cluster.heal()
        hold(FLAP_S)
    cluster.cut([first], [others[0]], one_way=True)


def lossy(cluster: TestCluster) -> None:
    """A tenth of all frames is lost, and the rest is late."""
    for place, alias in enumerate(cluster.aliases):
        for other in cluster.aliases[place + 1 :]:
            cluster.slow(alias, other, latency_ms=5, jitter_ms=5, loss=0.1)
    hold(HOLD_S)


@pytest.mark.parametrize("weather", [one_way, flapping, lossy], ids=lambda each: each.__name__)
def test_bad_links_bury_nobody_and_hide_nobody_who_stands_still(
    manifold_clusters: Start, weather: Callable[[TestCluster], None]
) -> None:
    cluster = manifold_clusters(NODES, overrides=FAST)
    began_s = time.time()
    weather(cluster)
    said = beliefs(cluster, began_s)
    assert not [each for each in said if each.now == "dead"]

    *_, victim, _last = cluster.aliases
    stopped_s = time.time()
    cluster.pause(victim)
    deadline_s = time.monotonic() + FOUND_S
    known: dict[str, float] = {}
    while len(known) < NODES - 1:
        assert time.monotonic() < deadline_s, f"after {FOUND_S} s only {sorted(known)} know"
        hold(0.1)
        known = dead_at(beliefs(cluster, stopped_s), victim)
    cluster.heal()
    cluster.wait_converged()


def test_halves_that_have_buried_each_other_meet_again_with_all_that_came_later(
    manifold_clusters: Start,
) -> None:
    """Nobody has the address of a node that was added but from hearing of it while it lived."""
    cluster = manifold_clusters(4, overrides=FAST)
    added = cluster.add(count=2)
    first, *others = (alias for alias in cluster.aliases if alias not in added)
    halves = [first, others[1], *added], [others[0], others[2]]
    clients = [cluster.client(half[0]) for half in halves]
    cluster.partition(*halves)
    deadline_s = time.monotonic() + FOUND_S
    for client, half in zip(clients, halves, strict=True):
        while {node.alias for node in client.nodes() if node.state == "ready"} != set(half):
            assert time.monotonic() < deadline_s, f"{half[0]} holds others for alive"
            hold(0.1)
    hold(HOLD_S)
    cluster.heal()
    cluster.wait_converged()
