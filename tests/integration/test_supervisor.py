"""The supervisor on real processes: what is killed comes back, and what ends leaves nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from manifold.kernel import messages as m
from manifold.kernel import places
from manifold.kernel.nexus.messages import GetNexus
from manifold.kernel.process import throttle
from manifold.shells.sdk import Client
from manifold.tools.emulator import record
from manifold.tools.emulator.changes import DRAIN_S
from manifold.tools.emulator.testing import TestCluster

Start = Callable[..., TestCluster]
Environment = dict[str, str]
COLLATZ = Path(__file__).parents[2] / "examples" / "collatz.ent"
PATIENCE_S = 30.0
FAST = {"membership.probe": "100ms", "membership.ack": "50ms", "membership.gossip": "50ms"}


def until(condition: Callable[[], object], what: str, seconds: float = PATIENCE_S) -> float:
    """Wait for a condition; how long that took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"not within {seconds} s: {what}"
        time.sleep(0.01)
    return time.monotonic() - began


def manifold(environment: Environment, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "manifold", *arguments],
        env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


class Place:
    """What a cluster of the command line has on this host."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self.name = environment["MANIFOLD_CLUSTER"]
        self.folder = places.cluster_dir(self.name, environment)
        self.runtime = places.runtime_path(self.name, environment)

    def up(self, *arguments: str) -> dict[str, object]:
        done = manifold(self.environment, "up", "--detach", "--json", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        found: dict[str, object] = json.loads(done.stdout)
        return found

    def supervisor(self) -> int:
        held = record.holder(self.folder)
        assert held is not None
        return held.pid

    def processes(self) -> list[int]:
        """Every process of the cluster but the supervisor: the zygote's children show its name."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    if os.fsencode(self.runtime) in (entry / "cmdline").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
        return found

    def left(self) -> list[str]:
        """Everything that should be gone by now."""
        groups = [
            root / throttle.ABOVE / self.runtime.name
            for root, _ in (*throttle.ROOTS, *throttle.MEMORY_ROOTS)
        ]
        held = [] if record.wait_released(self.folder, 0) else ["the lock"]
        there = [str(path) for path in (self.runtime, *groups) if path.exists()]
        return [*map(str, self.processes()), *there, *held]


@pytest.fixture
def place(manifold_environment: Environment) -> Iterator[Place]:
    here = Place(manifold_environment)
    yield here
    done = manifold(manifold_environment, "down", "--yes")
    left = here.left()
    for pid in here.processes():  # a test that failed leaves nothing either
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    throttle.remove_all(here.runtime.name)
    assert not left, f"left behind: {left}, {done.stderr}"


@contextmanager
def foreground(environment: Environment, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A command that stays, in a session of its own; it is ended in any case."""
    process = subprocess.Popen(
        [sys.executable, "-m", "manifold", *arguments], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=PATIENCE_S)


def expect(process: subprocess.Popen[str], pattern: str) -> str:
    """Read lines of a command until one matches."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if re.search(pattern, line):
            return line
    raise AssertionError(f"it ended without {pattern!r}: {seen}")


# -- ending, in whatever way ----------------------------------------------------------------------


def test_down_leaves_nothing(place: Place) -> None:
    place.up("--nodes", "4")
    assert len(place.processes()) >= 5
    assert manifold(place.environment, "run", str(COLLATZ), "--range", "1:2000").returncode == 0
    assert manifold(place.environment, "down").returncode == 0
    assert place.left() == []


def test_a_killed_supervisor_leaves_nothing_and_up_works_again_at_once(place: Place) -> None:
    place.up("--nodes", "4")
    assert manifold(place.environment, "run", str(COLLATZ), "--range", "1:2000").returncode == 0
    os.kill(place.supervisor(), signal.SIGKILL)
    again = place.up("--nodes", "4")
    assert again["nodes"] == 4
    os.kill(place.supervisor(), signal.SIGKILL)
    until(lambda: not place.left(), f"nothing is left: {place.left()}", 10)


def test_a_stopped_node_does_not_survive_its_supervisor(place: Place) -> None:
    place.up("--nodes", "2")
    stop_one(place)
    os.kill(place.supervisor(), signal.SIGKILL)
    until(lambda: not place.left(), f"nothing is left: {place.left()}", 10)


def test_up_waits_for_what_a_killed_supervisor_has_left_to_end(place: Place) -> None:
    place.up("--nodes", "2")
    before = place.processes()
    stop_one(place)  # it does not end by itself: the zygote gives it a second
    os.kill(place.supervisor(), signal.SIGKILL)
    said = place.up("--nodes", "2")
    assert "already" not in said
    assert said["nodes"] == 2
    assert not set(before) & set(place.processes())
    assert manifold(place.environment, "run", str(COLLATZ), "--range", "1:2000").returncode == 0


def stop_one(place: Place) -> None:
    with Client(place.name, environ=place.environment) as client:
        os.kill(client.nodes()[0].pid, signal.SIGSTOP)


def test_a_supervisor_killed_together_with_its_zygote_leaves_what_down_clears(place: Place) -> None:
    place.up("--nodes", "4")
    (zygote,) = [pid for pid in place.processes() if parent(pid) == place.supervisor()]
    supervisor = place.supervisor()
    stop_one(place)  # it cannot see that the liveness pipe is closed
    os.kill(zygote, signal.SIGSTOP)  # nor can this one clean up
    os.kill(supervisor, signal.SIGKILL)
    os.kill(zygote, signal.SIGKILL)
    until(lambda: not place.processes(), "no child outlives the zygote", 10)
    assert manifold(place.environment, "down").returncode == 0
    assert place.left() == []


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_ctrl_c_ends_a_cluster_in_the_foreground(place: Place) -> None:
    with foreground(place.environment, "up", "--nodes", "3") as process:
        expect(process, "3 nodes see each other")
        os.killpg(process.pid, signal.SIGINT)
        expect(process, "nothing is left")
        assert process.wait(PATIENCE_S) == 0
    assert place.left() == []


def test_ctrl_c_before_the_nodes_are_up_ends_them_too(place: Place) -> None:
    with foreground(place.environment, "up", "--nodes", "8") as process:
        expect(process, "8 nodes")  # the first line, said before anything is started
        until(place.processes, "the zygote is there")
        os.killpg(process.pid, signal.SIGINT)
        expect(process, "nothing is left")
        assert process.wait(PATIENCE_S) == 0
    assert place.left() == []


def test_up_on_a_cluster_that_is_up_says_so_and_changes_nothing(place: Place) -> None:
    place.up("--nodes", "2")
    before = place.supervisor(), sorted(place.processes())
    for arguments in (("--detach",), (), ("--nodes", "5")):
        done = manifold(place.environment, "up", *arguments)
        assert done.returncode == 0
        assert "is up already: 2 nodes" in done.stdout
    said = place.up()
    assert said["already"] is True
    assert (place.supervisor(), sorted(place.processes())) == before


def test_down_of_a_cluster_that_is_not_up_says_so(place: Place) -> None:
    done = manifold(place.environment, "down")
    assert done.returncode == 0
    assert "is not up" in done.stdout


# -- healing --------------------------------------------------------------------------------------


def test_a_killed_node_is_back_with_its_identity_and_a_higher_boot(
    manifold_clusters: Start,
) -> None:
    cluster = manifold_clusters(3)
    victim = cluster.aliases[-1]
    client = cluster.client(cluster.aliases[0])
    before = {node.alias: node for node in client.nodes()}[victim]
    cluster.kill(victim)

    def back() -> bool:
        seen = {node.alias: node for node in client.nodes()}.get(victim)
        return seen is not None and seen.state == "ready" and seen.boot > before.boot

    until(back, "the node is back")
    after = {node.alias: node for node in client.nodes()}[victim]
    assert (after.kid, after.boot) == (before.kid, before.boot + 1)
    assert after.pid != before.pid
    cluster.wait_converged()


def test_a_node_that_keeps_dying_is_started_later_each_time(manifold_clusters: Start) -> None:
    cluster = manifold_clusters(2)
    victim = cluster.aliases[-1]
    delays = []
    for _ in range(4):
        pid = cluster.kill(victim)
        delays.append(until(lambda pid=pid: cluster.pid(victim) != pid, "started again"))  # type: ignore[misc]
    assert delays[3] > 2 * delays[0]
    assert delays[3] > 0.75  # 0.1 s doubled three times
    cluster.wait_converged()


def test_others_hear_of_a_death_from_the_supervisor_at_once(manifold_clusters: Start) -> None:
    cluster = manifold_clusters(4)
    victim, *others = reversed(cluster.aliases)
    clients = [cluster.client(alias) for alias in others]
    # Held down: what comes back at once could not be seen to have been dead.
    cluster.supervisor.nodes[victim].backoff_s = 10.0
    cluster.supervisor.nodes[victim].started_s += 3600
    cluster.kill(victim)
    told_s = until(
        lambda: all(client.ask(m.GetNode()).alive == 3 for client in clients), "all know", 5
    )
    assert told_s < 1.0


def test_others_find_out_by_themselves_that_a_stopped_node_is_dead_and_that_it_is_back(
    manifold_clusters: Start,
) -> None:
    cluster = manifold_clusters(4, overrides=FAST)
    victim, *others = reversed(cluster.aliases)
    clients = [cluster.client(alias) for alias in others]
    cluster.pause(victim)
    until(lambda: all(c.ask(m.GetNode()).alive == 3 for c in clients), "all hold it for dead")
    cluster.resume(victim)
    until(lambda: all(c.ask(m.GetNode()).alive == 4 for c in clients), "it has refuted that")
    assert cluster.supervisor.nodes[victim].restarts == 0


def test_a_killed_zygote_is_replaced_and_every_node_comes_back(manifold_clusters: Start) -> None:
    cluster = manifold_clusters(3)
    boots = {node.alias: node.boot for node in cluster.client().nodes()}
    zygote = cluster.supervisor._zygote
    assert zygote is not None
    os.kill(zygote.pid, signal.SIGKILL)
    until(lambda: cluster.supervisor._zygote is not zygote, "another zygote")
    until(lambda: all(n.restarts for n in cluster.supervisor.nodes.values()), "every node again")
    cluster.wait_converged()
    client = cluster.client()
    nodes = client.nodes()
    assert {node.alias for node in nodes if node.state == "ready"} == set(cluster.aliases)
    assert all(node.boot > boots[node.alias] for node in nodes)
    assert client.parallel_for(COLLATZ, 1, 10_000, reduce="max") == 261


def test_a_node_with_a_damaged_key_says_so_and_the_others_live(manifold_clusters: Start) -> None:
    cluster = manifold_clusters(3)
    victim = cluster.aliases[-1]
    key = places.state_dir(cluster.name, victim, cluster.environ) / "identity.key"
    key.write_bytes(key.read_bytes()[:-5])
    cluster.kill(victim)
    until(lambda: cluster.supervisor.failing == [victim], "the supervisor has seen it fail")
    assert "is torn" in cluster.logs(victim)
    assert any("does not come up" in event and "is torn" in event for event in cluster.events)
    cluster.wait_converged()  # the others, with each other
    client = cluster.client(cluster.aliases[0])
    assert client.parallel_for(COLLATZ, 1, 10_000, reduce="max") == 261


def test_a_cluster_comes_up_without_a_node_whose_key_is_damaged(place: Place) -> None:
    key = places.state_dir(place.name, "rpi4-01", place.environment) / "identity.key"
    key.parent.mkdir(parents=True, mode=0o700)
    key.write_bytes(b"no key")
    key.chmod(0o600)
    said = place.up("--nodes", "4")
    assert said["failing"] == ["rpi4-01"]
    assert said["nodes"] == 3


def test_an_idle_cluster_of_eight_holds_nobody_for_dead(manifold_clusters: Start) -> None:
    cluster = manifold_clusters(8)
    time.sleep(10)  # what is tested is that nothing happens
    said = "\n".join(cluster.logs(alias) for alias in cluster.aliases)
    assert not re.findall(r".*alive -> (?:suspect|dead).*", said)
    assert [node.restarts for node in cluster.supervisor.nodes.values()] == [0] * 8
    assert {node.alive for node in cluster.client().nodes()} == {8}


# -- several --------------------------------------------------------------------------------------


def test_two_clusters_on_one_host_do_not_meet(manifold_clusters: Start) -> None:
    one, two = manifold_clusters(2), manifold_clusters(3)
    assert one.supervisor.runtime_dir != two.supervisor.runtime_dir
    seen = {node.kid for node in one.client().nodes()}, {node.kid for node in two.client().nodes()}
    assert [len(kids) for kids in seen] == [2, 3]
    assert not seen[0] & seen[1]
    one.close()
    assert two.client().parallel_for(COLLATZ, 1, 10_000, reduce="max") == 261


def aliases(place: Place) -> dict[str, str]:
    with Client(place.name, environ=place.environment) as client:
        return {node.alias: node.state for node in client.nodes()}


def test_an_agent_joins_computes_and_leaves(place: Place) -> None:
    place.up("--nodes", "2")
    with foreground(place.environment, "agent", "--alias", "guest-01", "--class", "rpi5") as agent:
        expect(agent, "node guest-01")
        until(lambda: aliases(place).get("guest-01") == "ready", "it has joined")
        done = manifold(
            place.environment, "run", str(COLLATZ), "--range", "1:1000", "--reduce", "max",
            "--on", "guest-01", "--why", "--json",
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        found = json.loads(done.stdout)
        assert found["result"] == 178
        assert {w["winner"] for w in found["why"]} == {kid_of(place, "guest-01")}
        os.killpg(agent.pid, signal.SIGINT)
        expect(agent, "node guest-01 has left")
    until(lambda: aliases(place).get("guest-01") in (None, "left"), "it has left", 10)
    assert not list(place.runtime.glob("*guest-01*"))
    assert list(aliases(place).values()).count("ready") == 2


def test_an_agent_takes_the_voters_there_are_and_hands_over_its_jobs(place: Place) -> None:
    """Voters of its own would be a second cluster, which knows nothing of what was agreed."""
    place.up("--nodes", "2")
    with Client(place.name, environ=place.environment) as client:
        client.globals["x"] = 7
        voters = client.ask(GetNexus()).voters
        with foreground(place.environment, "agent", "--alias", "guest-01") as agent:
            expect(agent, "node guest-01")
            until(lambda: aliases(place).get("guest-01") == "ready", "it has joined")
            with Client(place.name, node="guest-01", environ=place.environment) as guest:
                until(lambda: guest.ask(GetNexus()).known, "it knows who votes")
                assert guest.ask(GetNexus()).voters == client.ask(GetNexus()).voters == voters
                assert guest.globals["x"] == 7
                counter = Path(__file__).parents[2] / "examples" / "counter.ent"
                job = guest.job(counter, 0, 2000, reduce="count", detach=True).job
                until(lambda: guest.status(job).done > 0, "some of it is done")
                assert guest.status(job).owner == kid_of(place, "guest-01")
            os.killpg(agent.pid, signal.SIGTERM)
            expect(agent, "node guest-01 has left")
        until(lambda: client.status(job).state == "done", "another node went on with it", 60)
        assert client.globals["counter"] == 2000


def test_an_agent_that_drains_ends_at_once_when_it_is_told_again(place: Place) -> None:
    place.up("--nodes", "2")
    with foreground(place.environment, "agent", "--alias", "guest-01", "--label", "cam") as agent:
        expect(agent, "node guest-01")
        until(lambda: aliases(place).get("guest-01") == "ready", "it has joined")
        with Client(place.name, environ=place.environment) as client:
            client.submit_where("cam", time.sleep, 60.0)  # nobody can go on with it elsewhere
            log = places.state_dir(place.name, "guest-01", place.environment) / "node.log"
            until(lambda: computes(client, "guest-01"), "it runs there")
            os.kill(agent.pid, signal.SIGTERM)
            until(lambda: "drains" in log.read_text(), "it drains")
            told_s = time.monotonic()
            os.kill(agent.pid, signal.SIGTERM)
            expect(agent, "node guest-01 has left")
            assert time.monotonic() - told_s < DRAIN_S / 2


def computes(client: Client, alias: str) -> bool:
    """Whether anything runs at a node."""
    return any(node.alias == alias and node.load and node.load.free_slots < node.load.slots
               for node in client.nodes())  # fmt: skip


def test_an_agent_has_the_labels_it_is_given(place: Place) -> None:
    place.up("--nodes", "2")
    labels = ("--label", "site=roof", "--label", "cam")
    with foreground(place.environment, "agent", "--alias", "guest-01", *labels) as agent:
        expect(agent, "node guest-01")
        until(lambda: aliases(place).get("guest-01") == "ready", "it has joined")
        run = ("run", str(COLLATZ), "--range", "1:1000", "--reduce", "max", "--why", "--json")
        done = manifold(place.environment, *run, "--where", "site=roof")
        assert done.returncode == 0, done.stdout
        winners = {each["winner"] for each in json.loads(done.stdout)["why"]}
        assert winners == {kid_of(place, "guest-01")}
        said = manifold(place.environment, "node", "label", "guest-01", "cam-", "ups")
        assert said.stdout == "guest-01: site=roof, ups\n"
        os.killpg(agent.pid, signal.SIGINT)
        expect(agent, "node guest-01 has left")


def kid_of(place: Place, alias: str) -> str:
    with Client(place.name, environ=place.environment) as client:
        return {node.alias: str(node.kid) for node in client.nodes()}[alias]


def test_an_agent_killed_with_its_supervisor_is_found_out_by_swim(place: Place) -> None:
    fast = [x for key, value in FAST.items() for x in ("--set", f"{key}={value}")]
    place.up("--nodes", "3", *fast)
    with foreground(place.environment, "agent", "--alias", "guest-01", *fast) as agent:
        expect(agent, "node guest-01")
        until(lambda: aliases(place).get("guest-01") == "ready", "it has joined")
        with Client(place.name, environ=place.environment) as client:
            (pid,) = [node.pid for node in client.nodes() if node.alias == "guest-01"]
        os.kill(pid, signal.SIGSTOP)  # it cannot say goodbye
        os.kill(agent.pid, signal.SIGKILL)
        until(lambda: aliases(place).get("guest-01") in (None, "dead"), "the others know")
    until(lambda: not list(place.runtime.glob("*guest-01*")), "its zygote has cleaned up")


def test_an_agent_that_was_there_first_is_joined_and_outlives_the_cluster(place: Place) -> None:
    with foreground(place.environment, "agent", "--alias", "guest-01") as agent:
        expect(agent, "node guest-01")
        until(lambda: (place.runtime / "guest-01.d").exists(), "its door")
        place.up("--nodes", "2")
        until(lambda: aliases(place).get("guest-01") == "ready", "they are one cluster")
        assert manifold(place.environment, "down").returncode == 0
        until(lambda: aliases(place).get("guest-01") == "ready", "it answers still")
        assert sorted(path.name for path in place.runtime.iterdir()) == [
            "guest-01.a", "guest-01.c", "guest-01.d", "zygote-guest-01",
        ]  # fmt: skip
        os.killpg(agent.pid, signal.SIGTERM)
        expect(agent, "has left")
    assert place.left() == []


def test_an_agent_whose_alias_is_taken_is_refused(place: Place) -> None:
    place.up("--nodes", "1")
    (alias,) = aliases(place)
    done = manifold(place.environment, "agent", "--alias", alias)
    assert done.returncode == 4
    assert f"has a node '{alias}' already" in done.stderr
    assert aliases(place) == {alias: "ready"}


# -- shares ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cgroup", "pacing"])
def test_an_rpi4_computes_at_a_quarter_of_a_servers_rate(
    manifold_clusters: Start, how: str
) -> None:
    roots = throttle.ROOTS if how == "cgroup" else ()
    cluster = manifold_clusters(4, roots=roots)  # one server, one rpi5, two rpi4
    client = cluster.client("server-01")
    kinds = {node.node_class: node for node in client.nodes()}
    if how == "cgroup" and kinds["rpi4"].throttle != "cgroup":
        pytest.skip("this host allows no cgroup")
    assert kinds["rpi4"].throttle == how
    assert kinds["server"].throttle == "none"
    fastest: dict[str, float] = {}
    for alias in ("server-01", "rpi4-01", "server-01", "rpi4-01", "server-01", "server-01"):
        done = manifold(
            dict(cluster.environ), "run", str(COLLATZ), "--range", "1:600000", "--reduce", "sum",
            "--on", alias, "--json",
        )  # fmt: skip
        took_ms = json.loads(done.stdout)["elapsed_ms"]
        fastest[alias] = min(fastest.get(alias, took_ms), took_ms)
    # A quarter of a core beside two whole ones: 4 to 8 on a quiet machine. Other work can only make
    # a run longer, so the fastest of several says what the share allows.
    assert fastest["rpi4-01"] > 2 * fastest["server-01"], fastest
