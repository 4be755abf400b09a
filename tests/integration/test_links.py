"""Links between real nodes: slow, narrow, lossy, cut; by the file and by `manifold net`."""

from __future__ import annotations

import contextlib
import io
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from manifold.kernel import messages as m
from manifold.kernel.errors import ManifoldError, Unavailable
from manifold.kernel.hyperbus.rules import LinkRule
from manifold.shells.cli.main import run
from manifold.shells.sdk import Client
from manifold.tools.emulator.testing import TestCluster

Start = Callable[..., TestCluster]
WAIT_S = 20.0
ASK_MS = 1500.0  # longer than any latency here


@pytest.fixture
def start(manifold_clusters: Start, tmp_path: Path) -> Callable[..., TestCluster]:
    """Clusters of a-01, b-01 and, of three nodes, c-01; `rules` are those of its file."""

    def started(nodes: int = 3, rules: str = "", **options: object) -> TestCluster:
        file = tmp_path / "manifold.yaml"
        links = f"links:\n  rules:\n{rules}" if rules else ""
        classes = "".join(f"  {name}: {{count: 1}}\n" for name in "abc"[:nodes])
        file.write_text(f"classes:\n{classes}{links}")
        return manifold_clusters(nodes, config=file, **options)

    return started


def until(what: Callable[[], bool], why: str) -> None:
    quiet = threading.Event()
    deadline_s = time.monotonic() + WAIT_S
    while not what():
        assert time.monotonic() < deadline_s, why
        quiet.wait(0.05)


def reaches(client: Client, node: str, timeout_ms: float = ASK_MS, body: Any = None) -> bool:
    """Whether the node a client is attached to has an answer from another."""
    try:
        client.ask(body or m.GetNode(), node, timeout_ms)
    except ManifoldError:
        return False
    return True


def asking_ms(client: Client, node: str, body: Any = None) -> float:
    """The least of some round trips: what the link takes, not what the machine does."""
    found = []
    for _ in range(5):
        began_s = time.monotonic()
        client.ask(body or m.GetNode(), node)
        found.append((time.monotonic() - began_s) * 1000)
    return min(found)


def tallies(client: Client) -> dict[LinkRule, m.LinkTally]:
    """What the node a client is attached to says of its links."""
    return {each.rule: each for each in client.ask(m.GetLinks()).tallies}


def test_a_latency_is_in_every_round_trip_of_those_it_is_between_and_in_no_other(
    start: Start,
) -> None:
    cluster = start()
    client = cluster.client("a-01")
    cluster.slow("a-01", "b-01", latency_ms=60)
    assert 120 <= asking_ms(client, "b-01") < 180
    assert asking_ms(client, "c-01") < 60
    cluster.slow("a-01", "b-01", latency_ms=90, one_way=True)  # of the two the last holds
    assert 150 <= asking_ms(client, "b-01") < 210
    cluster.heal()
    assert asking_ms(client, "b-01") < 60


def test_a_rate_makes_a_message_take_its_time_in_the_direction_it_is_set_for(start: Start) -> None:
    cluster = start(2)
    client, other = cluster.client("a-01"), cluster.client("b-01")
    cluster.slow("a-01", "b-01", rate_bps=100_000, one_way=True)
    question = m.ReadLog(contains="x" * 4000, limit=1)  # 320 ms, and nearly no answer
    assert asking_ms(client, "b-01", question) >= 320
    assert asking_ms(other, "a-01", question) < 320


def test_a_lossy_link_loses_some_and_says_how_many(start: Start) -> None:
    cluster = start(2)
    client = cluster.client("a-01")
    cluster.slow("a-01", "b-01", loss=0.5)
    answered = 0

    def both_seen() -> bool:
        nonlocal answered
        answered += reaches(client, "b-01", 100)
        (found,) = tallies(client).values()
        return found.lost > 0 and found.sent > 0 and answered > 0

    until(both_seen, "half of the questions get through, or a quarter with their answers")


def test_a_cut_one_way_stops_what_one_sends_and_not_what_it_hears(start: Start) -> None:
    cluster = start(2)
    one, other = cluster.client("a-01"), cluster.client("b-01")
    cluster.cut(["a-01"], ["b-01"], one_way=True)
    assert not reaches(one, "b-01")
    rule = LinkRule("a-01", "b-01", one_way=True, cut=True)
    assert tallies(one)[rule].cut > 0
    before = tallies(other)[rule].cut  # what came before both had the rule
    assert not reaches(other, "a-01"), "the answer is cut"
    assert tallies(other)[rule].cut == before, "nothing of what b-01 sends is"
    # It hears, and obeys: what it sends now gets as far as b-01, which has the rule, too.
    assert not reaches(other, "a-01", body=m.SetLink("b-01", latency_ms=1))
    until(lambda: tallies(other)[rule].cut > before, "a-01 has a rule of its own")
    one.ask(m.ClearLinks())
    cluster.heal()
    assert reaches(one, "b-01", WAIT_S * 1000)


def test_the_minority_of_a_partition_refuses_and_goes_on_when_it_is_healed(start: Start) -> None:
    cluster = start(3, overrides={"nexus.voters": "3"})
    alone, other = cluster.client("a-01"), cluster.client("c-01")
    other.globals["seen"] = 1
    cluster.partition({"a-01"}, {"b-01", "c-01"})
    other.globals["seen"] = 2
    with pytest.raises(Unavailable, match="/globals/seen was not read"):
        alone.globals.get("seen", timeout_s=0.5)
    cluster.heal()
    assert alone.globals.get("seen", timeout_s=WAIT_S) == 2


def test_a_node_that_is_killed_has_the_rules_again_when_it_is_back(start: Start) -> None:
    cluster = start()
    cluster.cut(["a-01"], ["b-01"])
    pid = cluster.kill("a-01")
    until(lambda: cluster.supervisor.nodes["a-01"].ready is not None
          and cluster.pid("a-01") != pid, "the supervisor starts it again")  # fmt: skip
    client = cluster.client("a-01")
    until(lambda: reaches(client, "c-01", 300), "it has joined")
    assert not reaches(client, "b-01")
    assert list(tallies(client)) == [LinkRule("a-01", "b-01", cut=True)]
    cluster.heal()
    until(lambda: reaches(client, "b-01", 300), "the cut is lifted")


def test_a_node_that_stood_still_takes_the_rules_when_it_goes_on(start: Start) -> None:
    cluster = start(2)
    cluster.pause("b-01")
    cluster.cut(["a-01"], ["b-01"])
    cluster.resume("b-01")
    client = cluster.client("b-01")
    until(lambda: client.ask(m.GetLinks()).number == 1, "it finds them in its socket")
    assert not reaches(client, "a-01")


def test_a_rule_of_the_file_holds_from_the_first_frame_until_an_order_says_otherwise(
    start: Start,
) -> None:
    cluster = start(2, "    - {between: [a, b], cut: true}\n", converge=False)
    nodes = cluster.supervisor.nodes.values()
    until(lambda: all(node.ready is not None for node in nodes), "both are up")
    client = cluster.client("a-01")
    rule = LinkRule("a", "b", cut=True)
    until(lambda: tallies(client)[rule].cut >= 3, "it tries to join")
    assert [node.alive for node in nodes] == [1, 1]
    cluster.slow("*", "*", latency_ms=1)
    cluster.wait_converged()
    pid = cluster.kill("b-01")
    until(lambda: cluster.pid("b-01") != pid, "the supervisor starts it again")
    cluster.wait_converged()


# -- manifold net ---------------------------------------------------------------------------------


class Shell:
    """Runs `manifold` on a cluster, in this process."""

    def __init__(self, cluster: TestCluster) -> None:
        self._environ = dict(cluster.environ)

    def __call__(self, *arguments: str) -> tuple[int, str]:
        printed = io.StringIO()
        with (
            patch.dict(os.environ, self._environ),
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
        ):
            status = run(list(arguments))
        return status, printed.getvalue()

    def ok(self, *arguments: str) -> str:
        status, said = self("net", *arguments)
        assert status == 0, said
        return said

    def json(self, *arguments: str) -> Any:
        return json.loads(self.ok(*arguments, "--json"))


def test_net_says_what_it_does_and_lists_what_became_of_frames(start: Start) -> None:
    cluster = start(3, "    - {between: [c, '*'], latency: 1ms}\n")
    shell, client = Shell(cluster), cluster.client("a-01")
    assert shell.ok("slow", "a-01", "b", "--latency", "40ms") == (
        "now     a-01 <-> b: latency 40ms\n"
    )
    assert asking_ms(client, "b-01") >= 80
    assert shell.ok("slow", "b", "a-01", "--rate", "10Mbit/s", "--jitter", "1ms",
                    "--reorder", "0.01", "--loss", "2%") == (
        "lifted  a-01 <-> b: latency 40ms\n"
        "now     b <-> a-01: jitter 1ms, rate 10Mbit/s, loss 2%, reorder 1%\n"
    )  # fmt: skip
    assert shell.ok("cut", "a-01", "c", "--one-way") == "now     a-01 -> c: cut\n"
    assert not reaches(client, "c-01")
    titles, *rows = shell.ok("ls").splitlines()
    assert titles.split() == [
        "NODES", "LINK", "FROM", "SENT", "DELAYED", "LOST", "REORDERED", "CUT"
    ]  # fmt: skip
    assert [row.split("  ")[0] for row in rows] == ["c <-> *", "b <-> a-01", "a-01 -> c"]
    listed = shell.json("ls")
    assert [each["from"] for each in listed["links"]] == ["file", "net", "net"]
    assert listed["links"][0]["frames"]["delayed"] > 0
    assert listed["links"][2]["frames"]["cut"] > 0
    assert listed["silent"] == []
    assert shell.ok("heal", "c", "a-01") == "lifted  a-01 -> c: cut\n"
    assert reaches(client, "c-01", WAIT_S * 1000)
    assert shell.ok("heal") == (
        "lifted  b <-> a-01: jitter 1ms, rate 10Mbit/s, loss 2%, reorder 1%\n"
    )
    assert [each["from"] for each in shell.json("ls")["links"]] == ["file"]
    assert shell.ok("heal") == "nothing to change\n"


def test_net_partitions_and_heals_a_part_of_it(start: Start) -> None:
    cluster = start()
    shell, client = Shell(cluster), cluster.client("a-01")
    done = shell.json("partition", "a-01,b")
    assert done["told"] == ["a-01", "b-01", "c-01"] and done["silent"] == []
    assert (done["rules"][0]["a"], done["rules"][0]["b"]) == ("a-01,b", "c-01")
    assert not reaches(client, "c-01")
    assert reaches(client, "b-01", WAIT_S * 1000)
    assert shell.ok("heal", "a", "c") == "now     a <-> c: as the configuration says\n"
    assert reaches(client, "c-01", WAIT_S * 1000)
    assert not reaches(cluster.client("b-01"), "c-01")


def test_net_says_which_nodes_did_not_answer(start: Start) -> None:
    cluster = start(2)
    cluster.pause("b-01")
    shell = Shell(cluster)
    said = shell.ok("cut", "a", "b")
    assert "did not answer: b-01; each has the rules when it is back" in said
    assert "did not answer: b-01" in shell.ok("ls")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cut", "d-01", "b"), "'d-01' is no node and no class of cluster"),
        (("cut", "a-01,x", "b"), "'x' is no node"),
        (("slow", "a", "b"), "say how: --latency, --jitter, --rate, --loss or --reorder."),
        (("slow", "a", "b", "--latency", "5"), "a time such as 20ms or 1s is wanted"),
        (("slow", "a", "b", "--latency", "2min"), "it must be at most 1min"),
        (("slow", "a", "b", "--rate", "5Mbps"), "did you mean Mbit/s?"),
        (("slow", "a", "b", "--loss", "x"), "'x' is no share; write 2% or 0.02."),
        (("slow", "a", "b", "--loss", "101%"), "is not from 0% to 100%"),
        (("heal", "a"), "name both sides, or none to heal every link."),
        (("partition", "a,b", "b-01,c"), "b-01 is in two groups; a node can be in one."),
        (("partition", "*"), "there must be nodes on both sides."),
    ],
)
def test_net_refuses_in_a_sentence(shared: Shell, arguments: tuple[str, ...], message: str) -> None:
    status, said = shared("net", *arguments)
    assert status == 2
    assert message in said


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cluster that only refuses: one for all of these."""
    folder = tmp_path_factory.mktemp("links")
    file = folder / "manifold.yaml"
    file.write_text("classes:\n  a: {count: 1}\n  b: {count: 1}\n  c: {count: 1}\n")
    environ = os.environ | {
        "MANIFOLD_STATE_HOME": str(folder / "state"),
        "MANIFOLD_CLUSTER": f"t{os.urandom(4).hex()}",
    }
    cluster = TestCluster(3, environ, config=file)
    yield Shell(cluster)
    cluster.close()


def test_net_needs_a_cluster(manifold_environment: dict[str, str]) -> None:
    printed = io.StringIO()
    with patch.dict(os.environ, manifold_environment), contextlib.redirect_stderr(printed):
        assert run(["net", "cut", "a", "b"]) != 0
    assert "is not running here" in printed.getvalue()
