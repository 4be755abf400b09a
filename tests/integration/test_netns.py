"""Clusters whose nodes are in network namespaces: real links, and nothing of it on the host."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from manifold.kernel import messages as m
from manifold.kernel import netns, places
from manifold.kernel.errors import ProtocolError, Unsupported
from manifold.kernel.geode.messages import Demand
from manifold.kernel.main import enter_network
from manifold.shells.sdk import Client
from manifold.tools.bench import cables
from manifold.tools.emulator import record
from manifold.tools.emulator.network import Network
from manifold.tools.emulator.testing import TestCluster

Start = Callable[..., TestCluster]
Environment = dict[str, str]
ROOT = Path(__file__).parents[2]
COLLATZ = ROOT / "examples" / "collatz.ent"
PATIENCE_S = 60.0
SO_NETNS_COOKIE = 71  # asm-generic/socket.h
SUM = sum(range(1000))
ADD_UP = "LOAD 0\nEMIT\nHALT"


def why_not() -> str:
    """Why there can be no namespaces here, "" where there can."""
    try:
        network = Network()
    except Unsupported as error:
        return str(error)
    network.close()
    return ""


WHY_NOT = why_not()
spaces = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


@pytest.fixture
def start(manifold_clusters: Start) -> Iterator[Start]:
    """Clusters in namespaces; the host must not see anything of them, at any time."""
    before = host_links()

    def started(nodes: int = 4, **options: object) -> TestCluster:
        cluster = manifold_clusters(nodes, netns=True, **options)
        assert host_links() == before
        return cluster

    yield started
    assert host_links() == before


def host_links() -> set[str]:
    return {name for _, name in socket.if_nameindex()}


def space_of(pid: int) -> int:
    """The network namespace that a process is in."""
    return cookie(f"/proc/{pid}/ns/net")


def cookie(path: str) -> int:
    """A namespace's number, which no other ever has: those of its inode are used again."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return netns.within(descriptor, _own_cookie)
    finally:
        os.close(descriptor)


def _own_cookie() -> int:
    with socket.socket() as probe:
        return int.from_bytes(probe.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8), "little")


def spaces_held(of: str = "[0-9]*") -> set[int]:
    """Every network namespace that a process is in, or has a descriptor of."""
    found = {}
    for process in Path("/proc").glob(of):
        with suppress(OSError):
            for path in (process / "ns/net", *(process / "fd").iterdir()):
                with suppress(OSError):
                    if (link := os.readlink(path)).startswith("net:") and link not in found:
                        found[link] = cookie(str(path))
    return set(found.values())


def until(condition: Callable[[], object], what: str) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {PATIENCE_S} s: {what}"
        time.sleep(0.02)


def collatz(n: int) -> int:
    steps = 0
    while n != 1:
        n = n // 2 if n % 2 == 0 else 3 * n + 1
        steps += 1
    return steps


def lines_of(client: Client) -> dict[str, str]:
    return {node.alias: node.line for node in client.nodes()}


def asking_ms(client: Client, node: str) -> float:
    """The least of some round trips to another node, by the one the client is attached to."""
    found = []
    for _ in range(5):
        began_s = time.monotonic()
        client.ask(m.GetNode(), node)
        found.append((time.monotonic() - began_s) * 1000)
    return min(found)


# -- a cluster like any other ---------------------------------------------------------------------


@spaces
def test_nodes_in_namespaces_compute_and_agree_like_any_others(start: Start) -> None:
    cluster = start()
    client = cluster.client()
    assert client.parallel_for(COLLATZ, 1, 3000, reduce="sum") == sum(map(collatz, range(1, 3000)))
    client.globals.set("x", 41)
    assert client.globals.add("x", 1) == 41  # what it was
    assert client.globals.get("x") == 42
    assert client.submit(abs, -1).result(PATIENCE_S) == 1
    for alias in cluster.aliases:  # each does its part, and answers by its door
        job = client.job(ADD_UP, 0, 1000, reduce="sum", demand=Demand(node=alias))
        assert job.result(PATIENCE_S) == SUM
        assert "manifold_node_info" in client.metrics(alias).text


@spaces
def test_each_node_has_a_namespace_and_a_line_of_its_own_and_clients_stay_outside(
    start: Start,
) -> None:
    cluster = start()
    own = space_of(os.getpid())
    inside = {alias: space_of(cluster.pid(alias)) for alias in cluster.aliases}
    assert len({own, *inside.values()}) == 5
    client = cluster.client()
    lines = lines_of(client)
    assert len(set(lines.values())) == 4
    assert all(line.startswith("tcp://10.77.0.") for line in lines.values())
    assert all(line.endswith(f"/{alias}") for alias, line in lines.items())
    # What nodes say to each other goes over their cables: each has TCP connections to the others.
    for alias in cluster.aliases:
        table = Path(f"/proc/{cluster.pid(alias)}/net/tcp").read_text().splitlines()[1:]
        assert sum(row.split()[3] == "01" for row in table) >= 3, table


@spaces
def test_status_and_the_list_of_nodes_say_that_they_are_in_namespaces(start: Start) -> None:
    cluster = start(2)
    assert "in a namespace of its own" in cluster.command("status").stdout
    assert json.loads(cluster.command("status", "--json").stdout)["network"] == "namespaces"
    listed = cluster.command("node", "ls").stdout
    assert "LINE" in listed and "tcp://10.77.0.1:7070/" in listed
    targets = cluster.command("metrics", "--targets")
    assert "from within each" in targets.stderr


@spaces
@pytest.mark.manifold(nodes=2, netns=True)
def test_a_test_asks_for_namespaces_by_the_marker(manifold_cluster: TestCluster) -> None:
    assert all(line.startswith("tcp://") for line in lines_of(manifold_cluster.client()).values())


# -- nodes that come and go -----------------------------------------------------------------------


@spaces
def test_a_killed_node_comes_back_at_its_address(start: Start) -> None:
    cluster = start()
    client = cluster.client("server-01")
    lines, inside = lines_of(client), space_of(cluster.pid("rpi4-01"))
    cluster.restart("rpi4-01")
    assert space_of(cluster.pid("rpi4-01")) == inside
    assert lines_of(client) == lines
    job = client.job(ADD_UP, 0, 1000, reduce="sum", demand=Demand(node="rpi4-01"))
    assert job.result(PATIENCE_S) == SUM


@spaces
def test_all_nodes_come_back_after_the_zygote_was_killed(start: Start) -> None:
    cluster = start(3)
    lines = lines_of(cluster.client())
    zygote = int(Path(f"/proc/{cluster.pid(0)}/stat").read_text().split()[3])
    os.kill(zygote, signal.SIGKILL)
    nodes = cluster.supervisor.nodes.values()
    until(lambda: all(n.restarts and n.serves for n in nodes), "all are back")
    cluster.wait_converged()
    assert lines_of(cluster.client()) == lines


@spaces
def test_nodes_are_added_removed_and_started_again(start: Start) -> None:
    cluster = start(4)
    client = cluster.client("server-01")
    (new,) = cluster.add("rpi4", 1)
    assert lines_of(client)[new] == f"tcp://10.77.0.5:7070/{new}"
    gone = space_of(cluster.pid(new))
    cluster.remove(new)
    until(lambda: gone not in spaces_held(), "the namespace of a node that has left is gone")
    (other,) = cluster.add("rpi4", 1)
    assert lines_of(client)[other].startswith("tcp://10.77.0.6:"), "an address is given out once"
    cluster.kill("rpi4-01", stay_down=True)
    cluster.start("rpi4-01")
    cluster.wait_converged()
    cluster.pause("rpi5-01")
    cluster.resume("rpi5-01")
    cluster.wait_converged()
    assert client.parallel_for(ADD_UP, 0, 1000, reduce="sum") == SUM


# -- links ----------------------------------------------------------------------------------------


@spaces
@pytest.mark.parametrize("rate_bps", [2e6, 10e6])
def test_a_cable_carries_what_its_class_says(rate_bps: float) -> None:
    """Of 1514 bytes of a packet 1448 are a frame's: 0.956 of the rate."""
    ratios = []
    for _ in range(5):  # a busy machine only makes it slower: the fastest says what the cable does
        ratios.append(cables.rate(rate_bps, seconds=1.0) / rate_bps)
        if ratios[-1] > 0.92:
            break
    assert 0.9 < max(ratios) < 1.0, ratios


@spaces
def test_rules_of_links_hold_in_namespaces_too(start: Start) -> None:
    cluster = start(4)
    client = cluster.client("server-01")
    assert asking_ms(client, "rpi4-01") < 20
    cluster.slow("server-01", "rpi4-01", latency_ms=30)
    assert asking_ms(client, "rpi4-01") > 60
    cluster.heal()
    assert asking_ms(client, "rpi4-01") < 20
    cluster.partition({"server-01", "rpi5-01", "rpi4-02"}, {"rpi4-01"})
    until(
        lambda: {n.alias: n.state for n in client.nodes()}["rpi4-01"] == "dead",
        "who is cut off is held for dead",
    )
    cluster.heal()
    cluster.wait_converged()


@spaces
def test_latencies_of_classes_are_the_bus_s_and_rates_are_the_cables(start: Start) -> None:
    cluster = start(
        2,
        config=None,
        classes={"far": {"count": 2, "latency": "20ms", "bandwidth": "10Mbit/s"}},
        links={"classes": "on"},
    )
    client = cluster.client("far-01")
    assert asking_ms(client, "far-02") > 80  # both cables, there and back
    (tally,) = client.ask(m.GetLinks()).tallies
    assert (tally.rule.latency_ms, tally.rule.rate_bps) == (40.0, 0.0)


@spaces
def test_what_is_called_in_a_namespace_leaves_its_caller_where_it_was() -> None:
    def fails() -> None:
        raise KeyError("inside")

    own, space = os.readlink(netns.OWN), netns.make()
    try:
        assert netns.within(space, lambda: os.readlink(netns.OWN)) != own
        with pytest.raises(KeyError, match="inside"):
            netns.within(space, fails)
        assert netns.within(space, socket.if_nameindex) == [(1, "lo")]
        assert "xyz" in netns.run(space, ["ip", "-batch", "-"], "link set xyz up\n")
        assert netns.run(space, ["ip", "-batch", "-"], "link set lo up\n") == ""
        assert os.readlink(netns.OWN) == own
    finally:
        os.close(space)


# -- the end, and what is not possible ------------------------------------------------------------


class Place:
    """A cluster of the command line."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self.name = environment["MANIFOLD_CLUSTER"]
        self.folder = places.cluster_dir(self.name, environment)
        self.runtime = places.runtime_path(self.name, environment)

    def manifold(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "manifold", *arguments], env=self.environment | variables,
            capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip

    def up(self) -> set[str]:
        """Up in namespaces: which those are."""
        before = spaces_held()
        done = self.manifold("up", "--netns", "--detach", "--nodes", "4")
        assert done.returncode == 0, done.stderr
        assert "in network namespaces: rates of the classes by tbf, latency none" in done.stdout
        pids = [each["pid"] for each in json.loads(self.manifold("node", "ls", "--json").stdout)]
        held = record.holder(self.folder)
        assert held is not None
        # Those of the nodes, which the supervisor holds, and that of the hub.
        made = spaces_held(str(held.pid)) - {space_of(os.getpid())}
        assert {space_of(pid) for pid in pids} < made and len(made) == 5
        assert not made & before
        return made

    def nothing_is_left(self) -> bool:
        return record.holder(self.folder) is None and not self.runtime.exists()


@pytest.fixture
def place(manifold_environment: Environment) -> Iterator[Place]:
    place = Place(manifold_environment)
    yield place
    place.manifold("down", "--yes")


@spaces
def test_everything_is_gone_after_down(place: Place) -> None:
    before = host_links()
    made = place.up()
    assert host_links() == before
    assert place.manifold("down", "--yes").returncode == 0
    until(lambda: not made & spaces_held(), "every namespace is gone")
    assert place.nothing_is_left() and host_links() == before


@spaces
def test_everything_is_gone_after_the_supervisor_was_killed(place: Place) -> None:
    before = host_links()
    made = place.up()
    held = record.holder(place.folder)
    assert held is not None
    os.kill(held.pid, signal.SIGKILL)
    until(lambda: not made & spaces_held(), "every namespace is gone")
    until(place.nothing_is_left, "sockets and record are gone")
    assert host_links() == before


@spaces
def test_two_clusters_have_the_same_addresses_and_do_not_meet(start: Start) -> None:
    one, two = start(2), start(2)
    assert set(lines_of(one.client()).values()) == set(lines_of(two.client()).values())
    assert {n.alive for each in (one, two) for n in each.client().nodes()} == {2}


@spaces
def test_an_agent_is_refused_and_refuses(place: Place) -> None:
    place.up()
    done = place.manifold("agent", "--alias", "guest-01")
    assert done.returncode == 4 and "cannot reach them" in done.stderr


def test_a_node_with_a_tcp_line_does_not_start_outside_a_namespace() -> None:
    with pytest.raises(ProtocolError, match="without a network namespace"):
        enter_network([])


def test_without_the_programs_it_is_refused_with_the_package(place: Place, tmp_path: Path) -> None:
    done = place.manifold("up", "--netns", "--nodes", "2", PATH=str(tmp_path))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "Not in PATH, and needed for namespaces: ip, tc." in done.stderr
    assert "Debian package iproute2" in done.stderr
    assert place.nothing_is_left()


def test_without_the_privilege_it_is_refused_with_what_it_takes(place: Place) -> None:
    if shutil.which("setpriv") is None or os.geteuid() != 0:
        pytest.skip("giving up a privilege takes setpriv (util-linux), and having it")
    if shutil.which("ip") is None or shutil.which("tc") is None:
        pytest.skip("no iproute2: that is refused first")
    done = subprocess.run(
        ["setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable, "-m", "manifold",
         "up", "--netns", "--nodes", "2"],
        env=place.environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "cannot be made: Operation not permitted" in done.stderr and "sudo" in done.stderr
    assert place.nothing_is_left()


@spaces
def test_a_kernel_that_lacks_the_queue_is_refused_with_what_tc_says(
    place: Place, tmp_path: Path
) -> None:
    before = spaces_held()
    ip = shutil.which("ip")
    assert ip is not None
    (tmp_path / "ip").symlink_to(ip)
    (tmp_path / "tc").write_text(
        "#!/bin/sh\necho 'Error: Specified qdisc not found.' >&2; exit 2\n"
    )
    (tmp_path / "tc").chmod(0o755)
    done = place.manifold("up", "--netns", "--nodes", "2", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "Specified qdisc not found" in done.stderr and "tbf" in done.stderr
    assert place.nothing_is_left()
    until(lambda: spaces_held() <= before, "what was begun is gone")
