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
from manifold.kernel.errors import ManifoldError, Unavailable
from manifold.kernel.nexus.messages import GetNexus, NexusInfo
from manifold.shells.sdk import Client
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
    others = [alias for alias in cluster.aliases if alias not in voters]
    return Halves(
        cluster, voters[:2] + others[:6], voters[2:] + others[6:],
        others[0], voters[2],
    )  # fmt: skip


def cut(both: Halves) -> None:
    """On both sides: a process that starts again on one of them is cut off as well."""
    both.cluster.cut(both.minority, both.majority)
    both.cluster.cut(both.majority, both.minority)


def state(client: Client, job: str) -> str:
    """What anybody says of a job; "" where nobody who answers knows it."""
    states = [each.state for each in client.jobs().jobs if each.job == job]
    ended = [each for each in states if each not in ("queued", "running")]
    return (ended or states or [""])[0]


def queue_jobs(both: Halves, sizes: list[int]) -> list[str]:
    """Submit jobs to the cut-off node, by a client that leaves: what it was told is `queued`."""
    with Client(both.cluster.name, node=both.home, environ=both.cluster.environ) as client:
        futures = [client.job(COUNTER, 0, n, reduce="count", detach=True) for n in sizes]
        until(lambda: all(f.status is not None for f in futures), "they are acknowledged")
        until(lambda: all(client.status(f.job).state == "queued" for f in futures), "queued")
        return [future.job for future in futures]


def refuses_consistent_writes(both: Halves, client: Client) -> None:
    with pytest.raises(Unavailable) as refused:
        client.globals.set("x", 2, timeout_s=2)
    missing = [alias for alias in both.majority if alias in str(refused.value)]
    assert len(missing) == 3, refused.value
    stale = client.globals.read("x", stale=True, timeout_s=2)
    assert (stale.value, stale.strength) == (1, "stale")


@pytest.mark.parametrize("killed", [False, True], ids=["healed", "killed-and-healed"])
def test_a_minority_keeps_running_and_what_it_queues_runs_once(
    manifold_clusters: Start, killed: bool
) -> None:
    both = halves(manifold_clusters(NODES, overrides={"nexus.voters": str(VOTERS)}))
    inside, outside = both.cluster.client(both.home), both.cluster.client(both.voter)
    outside.globals.set("x", 1)  # a key whose ballot the minority keeps would say `maybe`
    long = inside.job(SLOW, 0, LONG, reduce="sum")
    until(lambda: inside.status(long.job).done > 0, "the long job runs")
    cut(both)

    early = inside.job(COUNTER, 0, 5, reduce="count", detach=True)  # nobody knows of the cut yet
    until(lambda: state(inside, early.job) == "queued", "the minority knows that it is one")
    done = inside.status(long.job).done
    refuses_consistent_writes(both, inside)
    jobs = queue_jobs(both, [20, 30, 40])
    unwanted = queue_jobs(both, [50])[0]
    assert inside.kill(unwanted).state == "cancelled"
    until(lambda: inside.status(long.job).done > done, "what ran in the minority goes on")

    assert outside.job(SLOW, 0, 200, reduce="sum").result(WAIT_S) == sum(range(200))
    outside.globals.set("y", 3)
    again = outside.job(COUNTER, 0, 20, reduce="count", job=jobs[0])  # the same, on the other side
    assert again.result(WAIT_S) == 20

    if killed:
        pid = both.cluster.kill(both.home)
        until(lambda: both.cluster.pid(both.home) not in (0, pid), "it starts again")
    both.cluster.heal()
    for job in jobs:
        until(lambda job=job: state(outside, job) == "done", f"{job} has run")  # type: ignore[misc]
    assert early.result(WAIT_S) == 5
    assert long.result(WAIT_S) == sum(range(LONG))
    assert outside.globals.get("counter") == 5 + 20 + 30 + 40
    assert state(outside, unwanted) in ("cancelled", "")
    assert inside.globals.get("y") == 3


def test_a_full_outbox_says_what_to_do(manifold_clusters: Start) -> None:
    """Three nodes, two of which are gone: what is left of the voters is no majority."""
    cluster = manifold_clusters(3, overrides={"nexus.voters": "3"})
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
