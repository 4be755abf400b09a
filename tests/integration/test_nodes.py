"""Nodes come and go while jobs run: nothing is lost, and who votes is always somebody."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from manifold.kernel.errors import NotFound, Refused
from manifold.kernel.geode.messages import Demand
from manifold.kernel.messages import GetNode
from manifold.kernel.nexus.messages import GetNexus, NexusInfo
from manifold.kernel.process import throttle
from manifold.shells.sdk import Client
from manifold.shells.sdk.connection import LOOK_S
from manifold.tools.emulator.testing import TestCluster

Start = Callable[..., TestCluster]
COLLATZ = Path(__file__).parents[2] / "examples" / "collatz.ent"
WAIT_S = 60.0
# Emits its index after a pause: a job of it takes a known time without taking the processor.
SLOW = """
.cells 1
    SLEEP 0.01
    LOAD 0
    EMIT
    HALT
"""


def until(condition: Callable[[], object], what: str, seconds: float = WAIT_S) -> None:
    """Ask again and again, for a while."""
    deadline_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def voters(cluster: TestCluster) -> set[str]:
    """Aliases of those who vote, as the first node sees it."""
    with Client(cluster.name, environ=cluster.environ) as client:
        info = client.ask(GetNexus())
        assert isinstance(info, NexusInfo)
        names = {node.kid: node.alias for node in client.nodes()}
    return {names.get(kid, kid) for kid in info.voters}


class Busy:
    """Jobs with a known sum, one after the other from each of `clients`, until `stop`."""

    def __init__(self, cluster: TestCluster, clients: int) -> None:
        self.done = 0
        self.wrong: list[object] = []
        self._cluster = cluster
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._work) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        try:
            with Client(self._cluster.name, environ=self._cluster.environ) as client:
                while not self._over.is_set():
                    found = client.parallel_for(SLOW, 0, 500, reduce="sum")
                    if found != sum(range(500)):
                        self.wrong.append(found)
                    self.done += 1
        except Exception as error:
            self.wrong.append(error)

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(WAIT_S)
        assert not any(thread.is_alive() for thread in self._threads), "a job does not end"


@pytest.mark.parametrize(("most", "clients"), [(16, 3), (64, 1)])
def test_a_cluster_grows_and_shrinks_to_4_while_jobs_run(
    manifold_clusters: Start, most: int, clients: int
) -> None:
    cluster = manifold_clusters(4)
    until(lambda: voters(cluster), "there are voters")
    busy = Busy(cluster, clients)
    try:
        added = cluster.add("rpi4", most - 8) + cluster.add("server", 4)
        assert len(cluster.aliases) == most
        before = busy.done
        until(lambda: busy.done > before + 3 or busy.wrong, "jobs go on")
        leaving = [alias for alias in cluster.aliases if alias not in added]
        cluster.remove(*leaving, timeout_s=WAIT_S)  # every first node, and so every voter
        assert voters(cluster) <= set(added)
        assert len(voters(cluster)) == 3
        cluster.remove(*added[:-4], timeout_s=WAIT_S)
        assert sorted(cluster.aliases) == sorted(added[-4:])
        assert voters(cluster) <= set(cluster.aliases)
        before = busy.done
        until(lambda: busy.done > before + 3 or busy.wrong, "jobs go on")
    finally:
        busy.stop()
    assert not busy.wrong
    assert busy.done > 2 * clients


def test_a_node_that_leaves_hands_its_job_over(manifold_clusters: Start) -> None:
    cluster = manifold_clusters(4)
    until(lambda: voters(cluster), "there are voters")
    owner = "server-01"
    with Client(cluster.name, node=owner, environ=cluster.environ) as client:
        future = client.job(SLOW, 0, 2000, reduce="sum", detach=True)
        until(lambda: client.status(future.job).done > 50, "it runs")
        cluster.remove(owner)
    assert "drained" in cluster.logs(owner)
    asker = cluster.client()

    def ended() -> bool:
        return any(j.job == future.job and j.state == "done" for j in asker.jobs().jobs)

    until(ended, "somebody else ends it")
    assert asker.status(future.job).done == 2000


def test_a_client_of_a_node_that_leaves_is_told_so_and_asks_another(
    manifold_clusters: Start,
) -> None:
    cluster = manifold_clusters(3)
    leaves = cluster.aliases[0]
    client = cluster.client(leaves)
    assert client.ask(GetNode()).alias == leaves
    cluster.remove(leaves)
    began_s = time.monotonic()
    assert client.ask(GetNode()).alias in cluster.aliases
    assert time.monotonic() - began_s < LOOK_S, "it has waited as for a node that may be busy"


def test_a_node_that_leaves_is_gone_for_everybody_and_its_name_with_it(
    manifold_clusters: Start,
) -> None:
    cluster = manifold_clusters(3, overrides={"classes.rpi4.count": "24"})
    before = cluster.aliases
    (last,) = [alias for alias in before if alias == "rpi4-02"]
    cluster.remove(last)
    assert last not in cluster.aliases
    cluster.wait_converged()
    client = cluster.client()
    states = {node.alias: node.state for node in client.nodes()}
    assert states.get(last, "left") == "left"
    assert cluster.add("rpi4") == ["rpi4-03"], "a name is given out once"
    assert sorted(n.alias for n in client.nodes() if n.state == "ready") == cluster.aliases


def test_the_last_node_and_one_that_is_not_there_are_not_removed(manifold_clusters: Start) -> None:
    cluster = manifold_clusters(1)
    with pytest.raises(Refused, match="last node"):
        cluster.remove(*cluster.aliases)
    with pytest.raises(NotFound, match="rpi4-1"):
        cluster.remove("rpi4-1")
    with pytest.raises(NotFound, match="rpi6"):
        cluster.add("rpi6")
    assert len(cluster.aliases) == 1


def test_a_voter_is_not_removed_while_the_others_cannot_agree(manifold_clusters: Start) -> None:
    cluster = manifold_clusters(3)
    until(lambda: len(voters(cluster)) == 3, "there are voters")
    one, two, three = cluster.aliases
    cluster.kill(two, stay_down=True)
    cluster.kill(three, stay_down=True)
    with pytest.raises(Refused, match="vote"):
        cluster.remove(one)
    assert cluster.aliases == [one, two, three]
    cluster.start(two)
    cluster.start(three)
    cluster.wait_converged()
    cluster.remove(one)
    assert voters(cluster) == {two} or voters(cluster) == {three}


@pytest.mark.parametrize("how", ["cgroup", "pacing"])
def test_a_node_that_is_slowed_takes_so_much_longer_until_that_is_undone(
    manifold_clusters: Start, how: str
) -> None:
    roots = throttle.ROOTS if how == "cgroup" else ()
    settings = {"classes.rpi5.compute": "0.99" if how == "cgroup" else "1"}
    cluster = manifold_clusters(4, roots=roots, overrides=settings)
    client = cluster.client("rpi5-01")
    (node,) = [each for each in client.nodes() if each.alias == "rpi5-01"]
    if how == "cgroup" and node.throttle != "cgroup":
        pytest.skip("this host allows no cgroup")

    def fastest_ms() -> float:
        """Other work can only make a run longer: the fastest says what the share allows."""
        took = []
        for _ in range(4):
            future = client.job(COLLATZ, 1, 200_000, reduce="sum", demand=Demand(node="rpi5-01"))
            future.result(WAIT_S)
            took.append(client.status(future.job).elapsed_ms)
        return min(took)

    whole_ms = fastest_ms()
    cluster.throttle("rpi5-01", 0.1)
    slow_ms = fastest_ms()
    cluster.throttle("rpi5-01", 1)
    again_ms = fastest_ms()
    assert slow_ms > 2.5 * whole_ms, (whole_ms, slow_ms, again_ms)
    assert again_ms < 0.5 * slow_ms, (whole_ms, slow_ms, again_ms)
    with pytest.raises(Refused, match="no part"):
        cluster.throttle("rpi5-01", 0)
