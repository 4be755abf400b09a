"""`manifold node …` on a cluster that runs on its own: each verb from a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from manifold.kernel import places
from manifold.tools.emulator import record

WAIT_S = 30.0


class Cluster:
    """Detached; asked by commands only."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment

    def run(self, *arguments: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "manifold", *arguments],
            env=self.environment, capture_output=True, text=True, timeout=90,
        )  # fmt: skip
        assert done.returncode == code, f"{arguments}: {done.returncode} {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def nodes(self) -> dict[str, dict[str, Any]]:
        return {each["alias"]: each for each in json.loads(self.run("node", "ls", "--json"))}

    def state(self, alias: str) -> str:
        return str(self.nodes().get(alias, {}).get("state"))


@pytest.fixture
def cluster(manifold_environment: dict[str, str]) -> Iterator[Cluster]:
    here = Cluster(manifold_environment)
    name = manifold_environment["MANIFOLD_CLUSTER"]
    here.run("up", "--nodes", "4", "--detach", "--set", "membership.probe=200ms", "--set",
             "membership.ack=100ms")  # fmt: skip
    yield here
    here.run("down", "--yes")
    assert not places.runtime_path(name, manifold_environment).exists()
    assert record.holder(places.cluster_dir(name, manifold_environment)) is None


def until(condition: Callable[[], object], what: str) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {WAIT_S} s: {what}"
        time.sleep(0.05)


def test_nodes_are_added_and_removed(cluster: Cluster) -> None:
    assert "rpi4-03, rpi4-04 are there: 6 nodes now" in cluster.run(
        "node", "add", "rpi4", "--count", "2"
    )
    assert cluster.state("rpi4-04") == "ready"
    assert "rpi4-03 has left: 5 nodes now" in cluster.run("node", "remove", "rpi4-03", "--yes")
    assert cluster.state("rpi4-03") == "left"
    done = json.loads(cluster.run("node", "add", "rpi4", "--json"))
    assert done == {"nodes": 6, "aliases": ["rpi4-05"]}
    assert "6 nodes" in cluster.run("up")
    assert "Did you mean rpi4-05?" in cluster.run("node", "remove", "rpi4-55", "--yes", code=4)
    assert "no class 'rpi6'" in cluster.run("node", "add", "rpi6", code=4)
    everybody = list(cluster.nodes())
    staying = [alias for alias in everybody if cluster.state(alias) == "ready"]
    assert "last node" in cluster.run("node", "remove", *staying, "--yes", code=4)


def test_a_node_is_killed_and_started_again(cluster: Cluster) -> None:
    before = cluster.nodes()["rpi4-02"]["pid"]
    assert "is started again" in cluster.run("node", "kill", "rpi4-02")
    until(lambda: cluster.nodes()["rpi4-02"]["pid"] not in (0, before), "it is back")
    assert "stays down" in cluster.run("node", "kill", "rpi4-02", "--stay-down")
    until(lambda: cluster.state("rpi4-02") == "dead", "it is down")
    assert "is down already" in cluster.run("node", "kill", "rpi4-02", code=4)
    cluster.run("node", "start", "rpi4-02")
    until(lambda: cluster.state("rpi4-02") == "ready", "it is there again")
    assert "is not down" in cluster.run("node", "start", "rpi4-02", code=4)


def test_a_paused_node_is_held_for_dead_and_goes_on_at_down_too(cluster: Cluster) -> None:
    assert "is not paused" in cluster.run("node", "resume", "rpi4-02", code=4)
    cluster.run("node", "pause", "rpi4-02")
    until(lambda: cluster.state("rpi4-02") in ("suspect", "dead"), "the others notice")
    cluster.run("node", "resume", "rpi4-02")
    until(lambda: cluster.state("rpi4-02") == "ready", "it is back")
    cluster.run("node", "pause", "rpi4-02")  # and so it is when the fixture ends the cluster


def test_what_would_lose_the_majority_is_refused_unless_forced(cluster: Cluster) -> None:
    def voters() -> list[str]:
        found = json.loads(cluster.run("nexus", "status", "--json"))
        return [each["alias"] for each in found["voters"]]

    until(lambda: len(voters()) == 3, "there are voters")
    one, two, _ = voters()
    cluster.run("node", "pause", one)
    refused = cluster.run("node", "kill", two, "--stay-down", code=4)
    assert "1 of 3 voters are left" in refused and "--force" in refused
    refused = cluster.run("node", "remove", two, "--yes", code=4)
    assert "was not agreed" in refused and "--force" in refused
    cluster.run("node", "pause", two, "--force")
    cluster.run("node", "resume", one)
    cluster.run("node", "resume", two)
    until(lambda: {*map(cluster.state, (one, two))} == {"ready"}, "they are back")
    cluster.run("node", "remove", one, "--yes")
    assert len(voters()) == 3 and one not in voters()


def test_without_a_supervisor_that_is_said(manifold_environment: dict[str, str]) -> None:
    said = Cluster(manifold_environment).run("node", "add", code=3)
    assert "Nobody supervises cluster" in said and "manifold up" in said


def test_a_node_that_was_added_ends_with_a_killed_supervisor(
    cluster: Cluster, manifold_environment: dict[str, str]
) -> None:
    cluster.run("node", "add", "rpi4")
    name = manifold_environment["MANIFOLD_CLUSTER"]
    folder = places.cluster_dir(name, manifold_environment)
    held = record.holder(folder)
    assert held is not None and held.nodes == 5
    os.kill(held.pid, signal.SIGKILL)
    assert record.wait_released(folder), "every process has ended"
    until(lambda: not places.runtime_path(name, manifold_environment).exists(), "sockets are gone")
