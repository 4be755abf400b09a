"""A cluster cut in two: the majority goes on, the minority keeps what it has and queues the rest.

Real processes; sixteen nodes in halves, three of five voters on one side. What was queued runs once
when the cut has healed, also where the node that queued it was killed meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from manifold.kernel import messages as m
from manifold.kernel.errors import ManifoldError
from manifold.kernel.nexus.messages import GetNexus, NexusInfo
from manifold.tools.emulator.testing import TestCluster

Start = Callable[..., TestCluster]
COUNTER = Path(__file__).parents[2] / "examples" / "counter.ent"
SLOW = """
.cells 1
    SLEEP 0.01
    LOAD 0
    EMIT
    HALT
"""
NODES, VOTERS = 16, 5
LONG = 25_000  # indices: a quarter of a minute and more for half of the cluster
WAIT_S = 120.0


def until(predicate: Callable[[], bool], what: str) -> None:
    """Ask again and again, for a while."""
    deadline_s = time.monotonic() + WAIT_S
    while not predicate():
        assert time.monotonic() < deadline_s, f"never: {what}"
        time.sleep(0.1)


@dataclass
class Halves:
    """A cluster that is cut in two. `home` is of the minority, and no voter."""

    cluster: TestCluster
    minority: list[str]
    majority: list[str]
    home: str
    voter: str  # of the majority


def halves(cluster: TestCluster) -> Halves:
    """Two voters of five are of the minority."""
    client = cluster.client()

    def votes() -> list[NexusInfo]:
        found = [client.ask(GetNexus(), alias) for alias in cluster.aliases]
        return [each for each in found if len(each.voters) == VOTERS]

    until(lambda: len(votes()) == NODES, "every node knows the voters")
    kids = {alias: client.ask(m.GetNode(), alias).kid for alias in cluster.aliases}
    voters = [alias for alias in cluster.aliases if kids[alias] in votes()[0].voters]
    alone, *others = cluster.aliases
    both = Halves(cluster, [alone], others, alone, "")
    client = cluster.client(alone)
    until(lambda: client.ask(GetNexus()).known, "it knows the voters")
    cut(both)
    first = client.job(COUNTER, 0, 1, reduce="count", detach=True)
    until(lambda: client.status(first.job).state == "queued", "it knows that it is cut off")
    futures = [client.job(COUNTER, 0, 1, reduce="count", detach=True) for _ in range(256)]
    with pytest.raises(ManifoldError, match="outbox is full: 256 jobs") as refused:
        futures[-1].result(WAIT_S)
    assert refused.value.code == "busy"
    assert "manifold nexus status" in refused.value.next_step
    cluster.heal()
    until(lambda: client.globals.get("counter", default=0) == 256, "what was taken has run")
