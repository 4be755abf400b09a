"""A job outlives the node that owns it: another node takes it over where it was, effects included.

Real processes; the owner is the node that the client is attached to, and it is killed on the way.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from manifold.kernel.nexus.marks import JOBS_MAX
from manifold.kernel.nexus.messages import Answer, GetNexus, NexusInfo, Operate
from manifold.kernel.nexus.values import Get
from manifold.shells.sdk import Client, Future
from manifold.tools.emulator.testing import TestCluster

Start = Callable[..., TestCluster]
COUNTER = Path(__file__).parents[2] / "examples" / "counter.ent"
# Emits its index after a pause: a job of it takes a known time without taking the processor.
SLOW = """
.cells 1
    SLEEP 0.01
    LOAD 0
    EMIT
    HALT
"""
WAIT_S = 60.0


def until(predicate: Callable[[], bool], what: str) -> None:
    """Ask again and again, for a while."""
    deadline_s = time.monotonic() + WAIT_S
    while not predicate():
        assert time.monotonic() < deadline_s, f"never: {what}"
        time.sleep(0.05)


def started(manifold_clusters: Start, nodes: int, **options: object) -> TestCluster:
    """A cluster whose voters are agreed."""
    cluster = manifold_clusters(nodes, **options)
    client = cluster.client()

    def known() -> bool:
        found = [client.ask(GetNexus(), alias) for alias in cluster.aliases]
        return all(isinstance(each, NexusInfo) and each.known for each in found)

    until(known, "every node knows the voters")
    return cluster


def on_the_way(share: float, act: Callable[[], object]) -> Callable[[Future], None]:
    """A progress callback that acts once, when the job has got so far."""
    done = []

    def progress(future: Future) -> None:
        now = future.progress()
        if now is not None and not done and now.done >= share * now.total:
            done.append(True)
            act()

    return progress


def value_of(client: Client, name: str) -> object:
    answer = client.ask(Operate(f"test.{time.time_ns()}", f"globals/{name}", Get()))
    assert isinstance(answer, Answer) and answer.status == "ok", answer
    return answer.data


def told(cluster: TestCluster, what: str) -> list[str]:
    return [
        line
        for alias in cluster.aliases
        for line in cluster.logs(alias).splitlines()
        if what in line
    ]


def test_the_clients_wait_goes_on_when_the_owner_of_its_job_dies(manifold_clusters: Start) -> None:
    cluster = started(manifold_clusters, 4)
    owner = "server-01"
    client = cluster.client(owner)
    future = client.job(SLOW, 0, 1500, reduce="sum")
    assert client.wait(future, on_the_way(0.4, lambda: cluster.kill(owner))) == sum(range(1500))
    (line,) = told(cluster, "taken over: ")
    counted = re.search(r"(\d+) of (\d+) blocks", line)
    assert counted is not None and int(counted[1]) > 0, "it was not begun afresh"


def test_a_detached_job_ends_without_its_owner_and_its_client(manifold_clusters: Start) -> None:
    cluster = started(manifold_clusters, 4)
    owner = "rpi5-01"
    with Client(cluster.name, node=owner, environ=cluster.environ) as client:
        future = client.job(SLOW, 0, 1500, reduce="sum", detach=True)
        until(lambda: bool(future.job), "it has an id")
        until(lambda: client.status(future.job).done > 300, "it runs")
    cluster.kill(owner)
    asker = cluster.client("server-01")

    def ended() -> bool:
        found = [job for job in asker.jobs().jobs if job.job == future.job]
        return any(job.state == "done" for job in found)

    until(ended, "it is done")
    status = asker.status(future.job)
    assert status.done == status.total == 1500


def test_the_jobs_of_a_cluster_that_lost_power_go_on_when_it_is_back(
    manifold_clusters: Start,
) -> None:
    cluster = started(manifold_clusters, 3)
    with Client(cluster.name, node="server-01", environ=cluster.environ) as client:
        future = client.job(SLOW, 0, 2000, reduce="sum", detach=True)
        until(lambda: client.status(future.job).done > 300, "it runs")
    killed = {alias: cluster.kill(alias) for alias in cluster.aliases}
    until(lambda: all(cluster.pid(a) not in (0, pid) for a, pid in killed.items()), "they restart")
    cluster.wait_converged()

    def ended() -> bool:
        asker = Client(cluster.name, environ=cluster.environ)
        with asker:
            return any(j.job == future.job and j.state == "done" for j in asker.jobs().jobs)

    until(ended, "it is done")


@pytest.mark.parametrize("victims", ["runners", "owner"])
def test_each_effect_on_a_global_is_there_once_while_nodes_are_killed(
    manifold_clusters: Start, victims: str
) -> None:
    cluster = started(manifold_clusters, 5)
    owner = "server-01"
    client = cluster.client(owner)
    runners = [alias for alias in cluster.aliases if alias != owner]

    def strike() -> None:
        for alias in [owner] if victims == "owner" else runners[:2]:
            cluster.kill(alias)

    future = client.job(COUNTER, 0, 200, reduce="count")
    assert client.wait(future, on_the_way(0.3, strike)) == 200
    assert value_of(client, "counter") == 200


def test_more_jobs_than_a_global_takes_at_a_time_have_their_turns(manifold_clusters: Start) -> None:
    """Also where one of those that had a place is killed with its node."""
    cluster = started(manifold_clusters, 4)
    clients = [cluster.client(alias) for alias in cluster.aliases[:3]]
    futures = [
        client.job(COUNTER, 0, 3, reduce="count") for client in clients for _ in range(JOBS_MAX)
    ]
    cluster.kill(cluster.aliases[3])
    assert [future.result(WAIT_S) for future in futures] == [3] * len(futures)
    assert value_of(clients[0], "counter") == 3 * len(futures)


def test_a_job_that_is_submitted_twice_has_its_effects_once(manifold_clusters: Start) -> None:
    cluster = started(manifold_clusters, 3)
    name = "J-00000000000000aa"
    first, second = cluster.client(0), cluster.client(1)
    one = first.job(COUNTER, 0, 30, reduce="count", job=name)
    two = second.job(COUNTER, 0, 30, reduce="count", job=name)
    assert one.result(WAIT_S) == 30
    assert two.result(WAIT_S) == 30
    assert value_of(first, "counter") == 30
