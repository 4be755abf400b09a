"""What a test may do to its cluster: each fault is real, and each is undone."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from manifold.kernel import messages as m
from manifold.kernel.errors import NotFound, Unavailable
from manifold.tools.emulator.testing import TestCluster

Start = Callable[..., TestCluster]


def until(condition: Callable[[], bool], what: str, patience_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.02)


def runs(pid: int) -> bool:
    """Whether that process is there, and not only its number."""
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.manifold(nodes=3)
def test_a_node_goes_by_its_alias_or_its_number(manifold_cluster: TestCluster) -> None:
    cluster = manifold_cluster
    assert cluster.aliases == ["node-01", "node-02", "node-03"]
    assert cluster.alias(0) == cluster.alias(-3) == cluster.alias("node-01") == "node-01"
    for wrong in (3, -4, "node-04", True, 1.0):
        with pytest.raises(NotFound) as refused:
            cluster.kill(wrong)  # type: ignore[arg-type]
        assert "0 to 2: node-01, node-02, node-03" in str(refused.value)


@pytest.mark.manifold(nodes=3)
def test_a_killed_node_is_missed_at_once_and_back_when_all_have_converged(
    manifold_cluster: TestCluster,
) -> None:
    cluster = manifold_cluster
    client = cluster.client(0)
    pid = cluster.kill(1)
    assert not runs(pid)
    cluster.wait_converged()
    assert cluster.pid(1) not in (0, pid)
    assert client.ask(m.GetNode(), "node-02").boot == 2
    cluster.restart(1)
    assert client.ask(m.GetNode(), "node-02").boot == 3
    assert [node.state for node in client.nodes()] == ["ready"] * 3


@pytest.mark.manifold(nodes=3)
def test_a_full_disk_stops_a_voter_and_nothing_else(manifold_cluster: TestCluster) -> None:
    cluster = manifold_cluster
    client, own = cluster.client(0), cluster.client(1)
    client.globals["x"] = 0
    cluster.fill_disk(1)
    for number in range(5):  # a value goes to the third voter with those that follow it
        client.globals["x"] = number
        own.globals["y"] = number
    assert own.globals["x"] == client.globals["x"] == 4
    cluster.free_disk(1)
    cluster.restart(1)
    client.globals["x"] = 5
    cluster.kill(2)  # now its vote is needed
    assert cluster.client(1).globals["x"] == 5


@pytest.mark.manifold(nodes=3)
def test_a_clock_jumps_ahead_and_runs_fast_and_nobody_is_hurt(
    manifold_cluster: TestCluster,
) -> None:
    cluster = manifold_cluster
    client = cluster.client(0)

    def uptime_ms(alias: str) -> float:
        return float(client.ask(m.GetNode(), alias).uptime_ms)

    cluster.clock_skew(1, jump_ms=60_000, rate=4.0)
    ahead_ms = uptime_ms("node-02") - uptime_ms("node-01")
    assert ahead_ms >= 59_000
    until(
        lambda: uptime_ms("node-02") - uptime_ms("node-01") > ahead_ms + 500,
        "it runs fast",
    )
    for number in range(20):
        client.globals["x"] = number
        assert cluster.client(1).globals["x"] == number
    assert {node.state for node in client.nodes()} == {"ready"}
    with pytest.raises(ValueError, match="rate"):
        cluster.clock_skew(1, rate=0.0)
    with pytest.raises(ValueError, match="jump_ms"):
        cluster.clock_skew(1, jump_ms=-1.0)


@pytest.mark.manifold(nodes=3)
def test_what_was_done_is_undone_whatever_state_it_was_left_in(
    manifold_cluster: TestCluster,
) -> None:
    cluster = manifold_cluster
    cluster.cut([0], [1, 2])
    cluster.pause(1)
    cluster.fill_disk(2)
    cluster.clock_skew(2, rate=2.0)
    cluster.kill(0)
    cluster.undo()
    for number in range(3):
        cluster.client(number).globals[f"x{number}"] = number
    assert sorted(cluster.client().globals.names()) == ["x0", "x1", "x2"]
    done = [line for _, line in cluster.trace]
    for what in ("pause node-02", "disk of node-03 is full", "resume node-02", "heal"):
        assert what in done


@pytest.mark.manifold(nodes=2)
def test_commands_run_on_this_cluster(manifold_cluster: TestCluster) -> None:
    done = manifold_cluster.command("status")
    assert done.returncode == 0 and f"cluster {manifold_cluster.name}: 2 of 2" in done.stdout
    wrong = manifold_cluster.command("get", "/nowhere")
    assert wrong.returncode != 0 and wrong.stderr


@pytest.mark.manifold(nodes=5)
def test_a_partition_holds_and_heals_and_names_are_checked(manifold_cluster: TestCluster) -> None:
    cluster = manifold_cluster
    few, many = cluster.client(0), cluster.client(4)
    few.globals["x"] = 1
    cluster.partition({0, "node-02"})  # off all the rest
    with pytest.raises(Unavailable):
        few.globals.set("y", 2, timeout_s=1.0)
    many.globals["x"] = 3
    assert few.globals.read("x", stale=True).value in (1, 3)
    cluster.heal()
    assert few.globals["x"] == 3
    for wrong in ({9}, {"nobody"}):
        with pytest.raises(NotFound):
            cluster.partition(wrong, {0})
    with pytest.raises(NotFound):
        cluster.slow("node-01", "nobody", latency_ms=1.0)


@pytest.mark.manifold(
    nodes=3,
    links=[{"between": ["node-01", "*"], "latency": "60ms"}],
    overrides={"nexus.voters": "3"},
)
def test_links_are_from_the_beginning_as_the_marker_says(manifold_cluster: TestCluster) -> None:
    began_s = time.monotonic()
    manifold_cluster.client(0).globals["x"] = 1
    assert time.monotonic() - began_s >= 0.12  # to another voter and back


@pytest.mark.parametrize("nodes", [1, 4])
def test_when_a_cluster_has_converged_everything_can_be_asked_of_every_node(
    manifold_clusters: Start, nodes: int
) -> None:
    cluster = manifold_clusters(nodes)
    for alias in cluster.aliases:
        cluster.client(alias).globals.set(alias, 1, timeout_s=2.0)
    assert cluster.client().globals.names() == cluster.aliases


def test_a_cluster_that_never_comes_up_says_so_and_leaves_nothing(
    manifold_clusters: Start, manifold_environment: dict[str, str]
) -> None:
    from manifold.kernel import places

    name = manifold_environment["MANIFOLD_CLUSTER"] + "a"
    folder = places.state_dir(name, "node-01", manifold_environment)
    folder.mkdir(parents=True, mode=0o700)
    (folder / "boot").write_bytes(b"torn")
    with pytest.raises(Unavailable, match="has not converged"):
        manifold_clusters(classes={"node": 1})
    assert not places.runtime_path(name, manifold_environment).exists()
