"""Globals over real processes: sessions of people, races of clients, and nodes that are killed."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import manifold
from manifold.kernel.errors import Maybe, NoCluster, Unavailable
from manifold.kernel.nexus.messages import NexusInfo
from manifold.shells.cli.main import run
from manifold.shells.sdk.client import Client
from manifold.shells.sdk.globals_calls import Reading
from manifold.tools.emulator.testing import TestCluster
from manifold.vm.kid import Kid

Start = Callable[..., TestCluster]
WAIT_S = 20.0  # for what takes milliseconds on a machine with nothing else to do


@pytest.fixture(scope="module")
def calm() -> Iterator[TestCluster]:
    """A cluster that nobody hurts."""
    folder = Path(tempfile.mkdtemp(prefix="mf-"))
    environment = os.environ | {
        "MANIFOLD_STATE_HOME": str(folder / "state"),
        "MANIFOLD_RUNTIME_DIR": str(folder / "run"),
        "MANIFOLD_CLUSTER": f"g{secrets.token_hex(4)}",
    }
    cluster = TestCluster(4, environment)
    try:
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(folder)


@pytest.fixture
def client(calm: TestCluster) -> Iterator[Client]:
    with Client(calm.name, environ=calm.environ) as client:
        yield client


def voters_of(cluster: TestCluster) -> list[str]:
    """Aliases of who votes, once they are agreed."""
    with Client(cluster.name, environ=cluster.environ) as client:
        client.globals.get("there-are-voters", timeout_s=WAIT_S)
        info: NexusInfo = client.connection.call(client.calls_of_globals.registers.nexus())
        aliases = {node.kid: node.alias for node in client.nodes()}
    return sorted(aliases[Kid(kid)] for kid in info.voters)


def until(what: Callable[[], bool], why: str) -> None:
    quiet = threading.Event()
    deadline_s = time.monotonic() + WAIT_S
    while not what():
        assert time.monotonic() < deadline_s, why
        quiet.wait(0.02)


# -- what people do -------------------------------------------------------------------------------


class Shell:
    """Runs `manifold` on a cluster."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        self.environment, self.folder = environment, folder

    def process(self, *arguments: str) -> str:
        """In a process of its own, which must succeed; what it prints."""
        done = subprocess.run(
            [sys.executable, "-m", "manifold", *arguments], env=self.environment, text=True,
            cwd=self.folder, capture_output=True, timeout=60, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def __call__(self, *arguments: str) -> tuple[int, str]:
        """In this process, which saves its start: status and what it prints."""
        printed = io.StringIO()
        with (
            patch.dict(os.environ, self.environment),
            contextlib.chdir(self.folder),
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
        ):
            status = run(list(arguments))
        return status, printed.getvalue()

    def ok(self, *arguments: str) -> str:
        status, printed = self(*arguments)
        assert status == 0, printed
        return printed


@pytest.fixture
def shell(calm: TestCluster, tmp_path: Path) -> Shell:
    return Shell(dict(calm.environ), tmp_path)


def test_the_session_of_a_newcomer(manifold_environment: dict[str, str], tmp_path: Path) -> None:
    shell = Shell(manifold_environment, tmp_path)
    shell.process("up", "--nodes", "16", "--detach")
    try:
        assert shell.process("set", "/globals/x", "1") == "x = 1  (version 1, quorum)\n"
        assert shell.process("cas", "/globals/x", "1", "2") == "x = 2  (version 2, quorum)\n"
        assert shell.process("get", "/globals/x") == "x = 2  (version 2, quorum)\n"
    finally:
        shell.process("down", "--yes")


def test_verbs_say_what_they_did_and_how_strong_it_is(shell: Shell) -> None:
    assert shell.ok("set", "v/x", "1") == "v/x = 1  (version 1, quorum)\n"
    assert shell.ok("add", "/globals/v/x", "-5") == "v/x = -4  (version 2, quorum)\n"
    assert shell.ok("add", "v/new") == "v/new = 1  (version 1, quorum)\n"
    assert shell.ok("set", "v/t", "5", "--type", "text") == 'v/t = "5"  (version 1, quorum)\n'
    assert shell.ok("get", "v/t", "--value") == "5\n"
    assert shell.ok("cas", "v/absent", "hello", "--absent") == (
        "v/absent = hello  (version 1, quorum)\n"
    )
    listed = shell.ok("ls", "v").splitlines()
    assert [each.split()[0] for each in listed[1:-1]] == ["v/absent", "v/new", "v/t", "v/x"]
    assert listed[-1] == "4 names under /globals/v  (quorum)"
    assert "/globals" in shell.ok("ls", "/").split()
    assert shell.ok("del", "v/x") == "v/x deleted  (quorum)\n"
    assert [each["name"] for each in json.loads(shell.ok("ls", "/globals/v", "--json"))] == [
        "v/absent", "v/new", "v/t",
    ]  # fmt: skip


def test_a_swap_that_is_refused_says_what_is_there(shell: Shell) -> None:
    shell.ok("set", "s", "5")
    assert shell("cas", "s", "1", "2") == (1, "s is 5, not 1  (version 1, quorum)\n")
    status, printed = shell("cas", "s", "5.0", "2", "--json")
    assert status == 1
    assert json.loads(printed) == {
        "name": "s", "value": 5, "type": "int", "version": 1, "strength": "quorum",
        "swapped": False,
    }  # fmt: skip
    assert shell("cas", "s", "--absent", "2") == (1, "s is 5, not absent  (version 1, quorum)\n")


@pytest.mark.parametrize(
    ("status", "code", "arguments"),
    [
        (4, "not_found", ("get", "nothing-here")),
        (4, "not_found", ("del", "nothing-here")),
        (2, "usage", ("get", "no name")),
        (2, "usage", ("set", "/nexus/config", "1")),
        (2, "usage", ("set", "x", str(1 << 63))),
        (4, "refused", ("set", "x", "y" * 65_537)),
        (2, "usage", ("add", "x", "much")),
    ],
)
def test_refusals_have_a_code_and_an_exit_status(
    shell: Shell, status: int, code: str, arguments: tuple[str, ...]
) -> None:
    found, printed = shell(*arguments, "--json")
    assert (found, json.loads(printed)["error"]["code"]) == (status, code)


def test_watch_prints_a_line_for_each_change(shell: Shell, client: Client) -> None:
    client.globals["w"] = 0
    with subprocess.Popen(
        [sys.executable, "-m", "manifold", "watch", "w", "--count", "3"], text=True,
        env=shell.environment, cwd=shell.folder, stdout=subprocess.PIPE,
    ) as watching:  # fmt: skip
        assert watching.stdout is not None
        assert watching.stdout.readline() == "w = 0  (version 1, quorum)\n"
        client.globals["w"] = 1
        assert watching.stdout.readline() == "w = 1  (version 2, quorum)\n"
        del client.globals["w"]
        assert watching.stdout.readline() == "w is absent  (quorum)\n"
        assert watching.wait(WAIT_S) == 0


# -- what programs do -----------------------------------------------------------------------------


def test_globals_are_a_mapping_that_every_node_agrees_on(calm: TestCluster) -> None:
    values: dict[str, Any] = {"i": -3, "f": 0.1, "t": "grün\n", "b": b"\x00\xff", "e": ""}
    clients = [calm.client(alias) for alias in calm.aliases]
    for at, (name, value) in enumerate(values.items()):
        clients[at % len(clients)].globals[f"m/{name}"] = value
    for one in clients:
        found = {name: one.globals[f"m/{name}"] for name in values}
        assert found == values and list(map(type, found.values())) == list(
            map(type, values.values())
        )
        assert one.globals.names("m/") == sorted(f"m/{name}" for name in values)
        assert dict(one.globals.items("m/")) == {f"m/{name}": v for name, v in values.items()}


def test_what_is_absent_is_what_it_is_in_a_mapping(client: Client) -> None:
    g = client.globals
    assert "absent" not in g
    assert g.get("absent") is None and g.get("absent", 7) == 7
    assert g.read("absent") == Reading(None, 0)
    with pytest.raises(KeyError, match="absent"):
        g["absent"]
    with pytest.raises(KeyError, match="absent"):
        del g["absent"]
    assert g.delete("absent") is False
    assert g.cas("absent", 1, 2) is False


def test_add_and_propose_tell_what_was_before(client: Client) -> None:
    g = client.globals
    assert [g.add("a"), g.add("a", 5), g.add("a", -6), g["a"]] == [0, 1, 6, 0]
    assert [g.add("af", 0.1), g.add("af", 0.2), g.add("af", 0.3)] == [0.0, 0.1, 0.1 + 0.2]
    assert g.propose("p", 0, 4) == (0, True)
    assert g.propose("p", 0, 5) == (4, False)
    assert g.propose("p2", 7, 5) == (0, False) and "p2" not in g
    assert g.propose("p", 4.0, 5) == (4, False)
    assert g.propose("p3", None, "x") == (None, True)
    with pytest.raises(TypeError, match=r"an int .* a float"):
        g.add("a", 1.0)
    g["top"] = (1 << 63) - 1
    with pytest.raises(OverflowError):
        g.add("top")
    assert g.counter == 0
    g.counter = 3
    assert (g.counter, g["counter"]) == (3, 3)


def test_of_clients_that_swap_one_global_exactly_one_wins(calm: TestCluster) -> None:
    clients = [calm.client(calm.aliases[at % 4]) for at in range(8)]
    with ThreadPoolExecutor(len(clients)) as threads:
        for turn in range(20):
            wishes = [
                threads.submit(one.globals.cas, "race", turn or None, turn + 1) for one in clients
            ]
            assert sum(wish.result() for wish in wishes) == 1
    assert clients[0].globals.read("race").version == 20


def test_the_default_globals_are_of_the_cluster_that_connect_finds(
    calm: TestCluster, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MANIFOLD_STATE_HOME", "MANIFOLD_RUNTIME_DIR", "MANIFOLD_CLUSTER"):
        monkeypatch.setenv(name, calm.environ[name])
    try:
        manifold.globals["default"] = 1
        assert client.globals["default"] == 1
        assert client.submit(_adds_here, 5).result() == 1
        assert manifold.globals["default"] == 6
    finally:
        manifold.globals._leave()
    monkeypatch.setenv("MANIFOLD_CLUSTER", "no-such-cluster")
    with pytest.raises(NoCluster):
        manifold.globals["default"]


def _adds_here(amount: int) -> Any:
    return manifold.globals.add("default", amount)


def test_coroutines_await_the_same_calls(calm: TestCluster) -> None:
    async def session() -> None:
        async with manifold.connect_async(calm.name, environ=calm.environ) as m:
            g = m.globals
            assert (await g.set("async", 1)).version == 1
            assert await g["async"] == 1
            assert await asyncio.gather(*(g.add("async") for _ in range(50)))
            assert await g.read("async") == Reading(51, 51)
            assert await g.cas("async", 51, "x") and await g.propose("async", 1, 2) == ("x", False)
            with pytest.raises(KeyError):
                await g["async/absent"]
            async with g.watch("async") as watch:
                assert (await anext(watch)).value == "x"
                assert await g.delete("async")
                assert (await anext(watch)).value is None
            async with g.lease("async") as lease:
                assert lease.held and lease.fence > 0
            assert not lease.held
            assert await g.names("async") == []

    asyncio.run(asyncio.wait_for(session(), WAIT_S))


# -- leases ---------------------------------------------------------------------------------------

HOLDER = """
import sys, time, manifold
with manifold.connect() as m, m.globals.lease("work", 1000) as lease:
    print(lease.fence, flush=True)
    sys.stdin.read()
"""


def test_a_lease_has_one_holder_and_fences_grow(calm: TestCluster) -> None:
    one, other = calm.client(), calm.client()
    with one.globals.lease("one", 5000) as first:
        assert first.held
        with pytest.raises(Unavailable, match="is held by C-"):
            other.globals.lease("one", 5000, timeout_s=0.3).__enter__()
    assert not first.held
    with other.globals.lease("one", 5000) as second, pytest.raises(Unavailable):
        assert second.held
        _ = first.fence
    fences = []
    for client in (one, other, one):
        with client.globals.lease("two") as lease:
            fences.append(lease.fence)
    assert fences == sorted(set(fences))


def test_a_lease_is_renewed_while_it_is_held_and_ends_with_its_client(calm: TestCluster) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER], env=calm.environ, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert holder.stdout is not None and holder.stdin is not None
        before = int(holder.stdout.readline())
        with pytest.raises(Unavailable):  # for three times its time to live
            calm.client().globals.lease("work", 1000, timeout_s=3.0).__enter__()
        holder.kill()
        with calm.client().globals.lease("work", 1000, timeout_s=WAIT_S) as lease:
            assert lease.fence > before
    finally:
        holder.kill()
        holder.communicate()


# -- what is killed -------------------------------------------------------------------------------

ADDER = """
import sys, manifold
count, maybe = 0, 0
with manifold.connect(node=sys.argv[1]) as m:
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(int(sys.argv[2])):
        try:
            m.globals.add("total", timeout_s=30.0)
            count += 1
        except manifold.Maybe:
            maybe += 1
    print(count, maybe)
"""


def add_from_processes(
    cluster: TestCluster, nodes: list[str], each: int, hurt: Callable[[], None]
) -> tuple[int, int]:
    """Processes, attached to `nodes`, add one again and again; what was told, and what was not."""
    adders = [
        subprocess.Popen(
            [sys.executable, "-c", ADDER, node, str(each)], env=dict(cluster.environ), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for node in nodes
    ]  # fmt: skip
    try:
        for adder in adders:
            assert adder.stdout is not None and adder.stdin is not None
            assert adder.stdout.readline() == "ready\n"
        for adder in adders:
            assert adder.stdin is not None
            adder.stdin.write("go\n")
            adder.stdin.flush()
        hurt()
        told = [adder.communicate(timeout=120)[0].split() for adder in adders]
        assert all(adder.returncode == 0 for adder in adders)
        return sum(int(count) for count, _ in told), sum(int(maybe) for _, maybe in told)
    finally:
        for adder in adders:
            adder.kill()
            adder.communicate()


def when_total_is(cluster: TestCluster, least: int) -> None:
    with cluster.client() as client:
        until(lambda: client.globals.get("total", 0) >= least, "nobody adds")


def test_a_total_of_eight_processes_is_exact_while_a_voter_is_killed(
    manifold_clusters: Start,
) -> None:
    """Nothing is counted twice or lost; what was under way at each death may be told as unknown."""
    cluster = manifold_clusters(4)
    victim = voters_of(cluster)[0]
    others = [alias for alias in cluster.aliases if alias != victim]

    def hurt() -> None:
        for turn in range(3):
            when_total_is(cluster, 50 + 150 * turn)
            pid = cluster.kill(victim)
            until(lambda pid=pid: cluster.pid(victim) not in (0, pid), "not restarted")  # type: ignore[misc]

    nodes = [others[at % len(others)] for at in range(8)]
    count, maybe = add_from_processes(cluster, nodes, 100, hurt)
    assert count + maybe == 800
    assert count <= cluster.client().globals["total"] <= count + maybe
    assert maybe <= 3 * 8  # one of each client was under way, at each death


def test_what_clients_of_a_killed_node_were_told_is_what_happened(manifold_clusters: Start) -> None:
    cluster = manifold_clusters(4)
    victim = voters_of(cluster)[0]

    def hurt() -> None:
        when_total_is(cluster, 100)
        cluster.kill(victim)

    count, maybe = add_from_processes(cluster, [victim] * 4, 150, hurt)
    assert count + maybe == 600
    assert count <= cluster.client().globals["total"] <= count + maybe
    assert maybe <= 4  # one of each client was under way


def test_all_nodes_are_killed_at_once_and_what_was_acknowledged_is_there(
    manifold_clusters: Start,
) -> None:
    cluster = manifold_clusters(5)
    clients = [cluster.client(alias) for alias in cluster.aliases]
    survivor = cluster.client().globals  # for a while nobody answers at any door
    told: dict[str, int] = {}
    stop = threading.Event()

    def write(at: int) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            try:
                clients[at].globals[f"all/{at}"] = number
            except (Maybe, NoCluster):
                return
            told[f"all/{at}"] = number

    with ThreadPoolExecutor(len(clients)) as threads:
        writes = [threads.submit(write, at) for at in range(len(clients))]
        until(lambda: len(told) == 5 and min(told.values()) > 20, "nobody writes")
        for pid in [cluster.pid(alias) for alias in cluster.aliases]:
            os.kill(pid, signal.SIGKILL)
        stop.set()
        for each in writes:
            each.result()
    before = dict(told)
    for name, number in before.items():
        found = survivor.get(name, timeout_s=WAIT_S)
        assert number <= found <= number + 1  # one was under way
    clients[0].globals["all/after"] = 1  # the old clients have found their way back
    assert survivor["all/after"] == 1


def test_a_minority_refuses_and_says_who_is_missing_and_heals_by_itself(
    manifold_clusters: Start,
) -> None:
    cluster = manifold_clusters(3)
    alone, *rest = voters_of(cluster)
    client, other = cluster.client(alone), cluster.client(rest[0])
    client.globals["seen"] = 1
    assert other.globals["seen"] == 1
    cluster.cut([alone], rest)
    with pytest.raises(Unavailable, match="/globals/seen was not read: no majority") as caught:
        client.globals.get("seen", timeout_s=0.5)
    assert sorted(caught.value.missing) == rest  # type: ignore[attr-defined]
    assert all(alias in caught.value.message for alias in rest)
    with pytest.raises(Unavailable, match="/globals/new was not changed"):
        client.globals.set("new", 2, timeout_s=0.5)
    assert client.globals.read("seen", stale=True) == Reading(1, 1, "stale")
    with pytest.raises(Unavailable, match="was not listed"):
        client.connection.call(client.calls_of_globals.names("", 0.5))
    stale = client.connection.call(client.calls_of_globals.named("", WAIT_S, True))
    assert ("seen", 1) in stale
    other.globals["seen"] = 2  # the majority goes on
    assert client.globals.read("seen", stale=True).value in (1, 2)
    cluster.heal()
    assert client.globals.get("seen", timeout_s=WAIT_S) == 2
    client.globals["new"] = 3
    assert other.globals["new"] == 3


def test_the_verbs_of_a_minority_exit_with_a_failure_and_mark_what_is_stale(
    manifold_clusters: Start, tmp_path: Path
) -> None:
    cluster = manifold_clusters(3)
    alone, *rest = voters_of(cluster)
    cluster.client(alone).globals["seen"] = 1
    for each in rest:
        cluster.pause(each)
    shell = Shell(dict(cluster.environ), tmp_path)
    status, printed = shell("get", "seen", "--timeout", "0.5", "--json")
    assert status == 1
    error = json.loads(printed)["error"]
    assert error["code"] == "unavailable" and all(each in error["message"] for each in rest)
    assert "--stale" in error["next"]
    assert shell.ok("get", "seen", "--stale") == "seen = 1  (version 1, stale)\n"
    cluster.heal()
    assert shell.ok("get", "seen", "--timeout", "20") == "seen = 1  (version 1, quorum)\n"


def test_reads_leave_a_node_that_is_stopped_and_a_write_is_done_once(
    manifold_clusters: Start,
) -> None:
    cluster = manifold_clusters(4)
    voters_of(cluster)
    client = cluster.client()
    client.globals["x"] = 1
    stopped = client.node
    cluster.pause(stopped)
    with ThreadPoolExecutor(1) as threads:
        write = threads.submit(client.globals.add, "x", 1, timeout_s=WAIT_S)
        assert client.globals.get("x", timeout_s=WAIT_S) == 1
        assert client.node != stopped
        assert not write.done()
        cluster.resume(stopped)
        assert write.result() == 1
    assert client.globals["x"] == 2


def test_a_watch_survives_its_node_and_ends_with_the_last_state(manifold_clusters: Start) -> None:
    cluster = manifold_clusters(4)
    voters_of(cluster)
    watcher, writer = cluster.client(), cluster.client(cluster.aliases[-1])
    if watcher.node == cluster.aliases[-1]:
        watcher, writer = writer, cluster.client(cluster.aliases[0])
    writer.globals["w"] = 0
    with watcher.globals.watch("w") as watch:
        assert watch.next(WAIT_S).value == 0
        cluster.kill(watcher.node)
        for value in range(1, 6):
            writer.globals["w"] = value
        seen = watch.next(WAIT_S)
        while seen.value != 5:
            newer = watch.next(WAIT_S)
            assert newer.version > seen.version
            seen = newer
        del writer.globals["w"]
        assert watch.next(WAIT_S).value is None
        writer.globals["w"] = 6
        assert watch.next(WAIT_S).value == 6


def test_a_lease_survives_the_node_of_its_holder(manifold_clusters: Start) -> None:
    cluster = manifold_clusters(4)
    voters_of(cluster)
    client, other = cluster.client(), cluster.client()
    with client.globals.lease("l", 3000) as lease:
        fence = lease.fence
        cluster.kill(client.node)
        with pytest.raises(Unavailable, match="held by"):
            other.globals.lease("l", 3000, timeout_s=4.0).__enter__()
        assert lease.held and lease.fence == fence
