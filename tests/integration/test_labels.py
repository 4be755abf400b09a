"""Labels of real nodes: who tells them, who votes by them, and which links are about them."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from manifold.kernel import messages as m
from manifold.kernel import places
from manifold.kernel.errors import ConfigError, ManifoldError, Refused, Unavailable
from manifold.kernel.geode.messages import Decision
from manifold.shells.sdk.client import Client
from manifold.shells.sdk.executor import Executor
from manifold.shells.sdk.voters import look
from manifold.tools.emulator.testing import TestCluster

Start = Callable[..., TestCluster]
WAIT_S = 30.0


def steps(n: int) -> int:
    count = 0
    while n != 1:
        n, count = n // 2 if n % 2 == 0 else 3 * n + 1, count + 1
    return count


COLLATZ = Path(__file__).parents[2] / "examples" / "collatz.ent"
COLLATZ_SUM = sum(map(steps, range(1, 60_000)))
# Emits its index after a pause: a job of it takes a known time without taking the processor.
SLOW = """
.cells 1
    SLEEP 0.01
    LOAD 0
    EMIT
    HALT
"""
SITES = {"pi": {"count": 9, "labels": {"site": ["a", "b", "c"], "rack": ["r1", "r1", "r1", "r2"]}}}


def until(condition: Callable[[], object], what: str) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {WAIT_S} s: {what}"
        time.sleep(0.05)


def ok(cluster: TestCluster, *arguments: str) -> str:
    done = cluster.command(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def told(cluster: TestCluster, node: str) -> dict[str, tuple[str, ...]]:
    """The labels of every node, as one of them knows them."""
    return {each.alias: each.labels for each in cluster.client(node).nodes()}


def voters_by(cluster: TestCluster, key: str) -> Counter[str]:
    found = look(cluster.client())
    return Counter(found.groups(kid).get(key, "") for kid in found.info.voters)


def test_every_node_knows_the_labels_of_every_node(manifold_clusters: Start) -> None:
    cluster = manifold_clusters(
        classes={
            "pi": {"count": 3, "labels": {"site": ["a", "b"], "ssd": None}},
            "hub": {"count": 1},
        }
    )
    expected = {
        "pi-01": ("site=a", "ssd"), "pi-02": ("site=b", "ssd"), "pi-03": ("site=a", "ssd"),
        "hub-01": (),
    }  # fmt: skip
    assert told(cluster, "pi-01") == told(cluster, "hub-01") == expected
    assert cluster.add("pi", labels=["site=z", "cam"]) == ["pi-04"]
    expected["pi-04"] = ("cam", "site=z", "ssd")
    assert told(cluster, "pi-01") == told(cluster, "pi-04") == expected
    cluster.restart("pi-04")
    assert told(cluster, "hub-01") == expected, "they are there again after a crash"
    with pytest.raises(ConfigError, match="the label 'Site=a' has a wrong key"):
        cluster.add("pi", labels=["Site=a"])


def test_labels_are_shown_wherever_nodes_are(manifold_clusters: Start) -> None:
    cluster = manifold_clusters(classes={"pi": {"count": 2, "labels": {"site": "a"}}})
    assert "pi-03 is there" in ok(cluster, "node", "add", "pi", "--label", "site=b", "--label", "x")
    nodes = json.loads(ok(cluster, "node", "ls", "--json"))
    assert {each["alias"]: each["labels"] for each in nodes} == {
        "pi-01": ["site=a"],
        "pi-02": ["site=a"],
        "pi-03": ["site=b", "x"],
    }
    table = ok(cluster, "node", "ls").splitlines()
    assert table[0].endswith("LABELS")
    assert table[3].endswith("site=b,x")
    assert ok(cluster, "cat", "/nodes/pi-03/labels").split() == ["site=b", "x"]
    done = cluster.command("node", "add", "pi", "--label", "gpu")
    assert done.returncode == 2
    assert "'--label': gpu is no label to give" in done.stderr


def test_the_first_voters_are_spread_over_sites_and_so_are_those_that_follow(
    manifold_clusters: Start,
) -> None:
    cluster = manifold_clusters(classes=SITES, overrides={"nexus.voters": "5"})
    assert sorted(voters_by(cluster, "site").values()) == [1, 2, 2]
    for _ in range(2):  # each time somebody else of the same site votes instead, if it has anybody
        found = look(cluster.client())
        leaving = sorted(found.name(kid) for kid in found.info.voters)[0]
        cluster.remove(leaving)
        assert sorted(voters_by(cluster, "site").values()) == [1, 2, 2]
        assert leaving not in cluster.aliases


def test_status_says_which_site_must_not_be_lost(manifold_clusters: Start) -> None:
    cluster = manifold_clusters(
        classes={"pi": {"count": 4, "labels": {"site": ["a", "b"]}}},
        overrides={"nexus.voters": "3"},
    )
    said = ok(cluster, "nexus", "status")
    assert "losing site=a would lose the majority: pi-01, pi-03" in said
    assert "site=b would" not in said
    found: dict[str, Any] = json.loads(ok(cluster, "nexus", "status", "--json"))
    assert found["at_risk"] == [{"group": "site=a", "voters": ["pi-01", "pi-03"]}]
    assert {row["alias"]: row["groups"] for row in found["voters"]} == {
        "pi-01": {"site": "a"}, "pi-02": {"site": "b"}, "pi-03": {"site": "a"},
    }  # fmt: skip
    cluster.kill("pi-02", stay_down=True)
    found = json.loads(ok(cluster, "nexus", "status", "--json"))
    assert {risk["group"] for risk in found["at_risk"]} == {"site=a"}


def test_rules_of_the_file_are_about_links_between_sites(manifold_clusters: Start) -> None:
    cluster = manifold_clusters(
        classes={"pi": {"count": 4, "labels": {"site": ["a", "b"]}}},
        links=[{"between": ["site=a", "site=b"], "latency": "60ms"}],
        overrides={"nexus.voters": "off"},
    )

    def asking_ms(one: str, other: str) -> float:
        client = cluster.client(one)
        taken = []
        for _ in range(5):
            began_s = time.monotonic()
            client.ask(m.GetNode(), other)
            taken.append((time.monotonic() - began_s) * 1000)
        return min(taken)

    assert asking_ms("pi-01", "pi-02") >= 120, "there and back"
    assert asking_ms("pi-01", "pi-03") < 60
    assert cluster.add("pi", labels=["site=a"]) == ["pi-05"]
    assert cluster.add("pi", labels=["site=a"]) == ["pi-06"], "whose class says b by its number"
    assert asking_ms("pi-06", "pi-02") >= 120
    assert asking_ms("pi-06", "pi-01") < 60


def test_an_order_cuts_a_site_off_and_lifts_that_again(manifold_clusters: Start) -> None:
    cluster = manifold_clusters(
        classes={"pi": {"count": 3, "labels": {"site": ["a", "b"]}}},
        overrides={  # nobody is held for dead meanwhile
            "nexus.voters": "off",
            "membership.probe": "30s",
            "membership.ack": "10s",
        },
    )

    def reaches(one: str, other: str) -> bool:
        try:
            cluster.client(one).ask(m.GetNode(), other, 1500.0)
        except ManifoldError:
            return False
        return True

    said = ok(cluster, "net", "cut", "site=a", "site=b")
    assert "now     site=a <-> site=b: cut" in said
    assert not reaches("pi-01", "pi-02")
    assert reaches("pi-01", "pi-03")
    wrong = cluster.command("net", "cut", "site=c", "pi")
    assert "'site=c' is no label of any node" in wrong.stderr
    ok(cluster, "net", "heal", "site=a", "pi-02")
    assert reaches("pi-01", "pi-02")
    cluster.heal()
    cluster.partition(["site=b"])
    assert not reaches("pi-03", "pi-02")


# -- where work runs ------------------------------------------------------------------------------

CLASSES = {
    "pi": {"count": 4, "labels": {"site": ["a", "b"]}},
    "hub": {"count": 1, "labels": {"site": "a", "ssd": None}},
}


def placed(decisions: Sequence[Decision]) -> set[str]:
    """Every node that a job was given to."""
    found = {decision.candidate(decision.winner) for decision in decisions if decision.winner}
    return {each.alias for each in found if each is not None}


def decided(cluster: TestCluster, *arguments: str) -> set[str]:
    said = ok(cluster, "run", str(COLLATZ), "--range", "1:60000", "--reduce", "sum", "--why",
              "--json", *arguments)  # fmt: skip
    found = json.loads(said)
    assert found["result"] == COLLATZ_SUM
    aliases = {each["kid"]: each["alias"] for d in found["why"] for each in d["candidates"]}
    return {aliases[decision["winner"]] for decision in found["why"]}


def test_run_goes_where_it_is_told_to(manifold_clusters: Start) -> None:
    cluster = manifold_clusters(classes=CLASSES)
    assert decided(cluster, "--where", "site=b") <= {"pi-02", "pi-04"}
    assert decided(cluster, "--where", "ssd") == {"hub-01"}
    assert decided(cluster, "--where", "site=a", "--where", "!ssd") <= {"pi-01", "pi-03"}
    assert decided(cluster, "--where", "site!=b", "--where", "class=pi") <= {"pi-01", "pi-03"}
    refused = cluster.command("run", str(COLLATZ), "--where", "site=c")
    assert refused.returncode == 1
    assert "No node may run this job: none has site=c; there is site=a, site=b." in refused.stderr
    refused = cluster.command("run", str(COLLATZ), "--where", "camera")
    assert "none has camera; no node has a label camera." in refused.stderr
    refused = cluster.command("run", str(COLLATZ), "--where", "site=b", "--where", "ssd")
    assert "hub-01: has site=a, not site=b" in refused.stderr
    assert ": lacks the label ssd" in refused.stderr
    refused = cluster.command("run", str(COLLATZ), "--where", "site=")
    assert refused.returncode == 4
    assert "'site=' is no wish" in refused.stderr


def square(number: int) -> int:
    return number * number


def test_the_sdk_says_where(manifold_clusters: Start) -> None:
    cluster = manifold_clusters(classes=CLASSES)
    client = cluster.client()

    def jobs() -> set[str]:
        return {each.job for each in client.jobs().jobs}

    assert client.parallel_for(COLLATZ, 1, 60_000, reduce="sum", where="site=b") == COLLATZ_SUM
    (first,) = jobs()
    assert placed(client.why(first)) <= {"pi-02", "pi-04"}
    before = jobs()
    assert client.map(square, range(40), where="site=b") == [square(n) for n in range(40)]
    more = jobs() - before
    assert more
    assert set().union(*(placed(client.why(job)) for job in more)) <= {"pi-02", "pi-04"}
    for where, function, found, allowed in (
        ("ssd", square, 729, {"hub-01"}),
        (["site=a", "!ssd"], square, 729, {"pi-01", "pi-03"}),
        ("ssd", COLLATZ, 111, {"hub-01"}),
    ):
        future = client.submit_where(where, function, 27)
        assert future.result() == found
        assert placed(future.why()) <= allowed
    with Executor(client=client, where="ssd") as executor:
        futures = [executor.submit(square, number) for number in range(4)]
        assert [each.result() for each in futures] == [0, 1, 4, 9]
        assert set().union(*(placed(each.why()) for each in futures)) == {"hub-01"}
    with pytest.raises(Unavailable, match="none has site=c; there is site=a, site=b"):
        client.submit_where("site=c", square, 1).result()
    with pytest.raises(Refused, match="is no wish"):
        client.submit_where("site=", square, 1)


def test_shards_stay_where_they_may_be_while_nodes_die_and_come(manifold_clusters: Start) -> None:
    cluster = manifold_clusters(classes=CLASSES, seed=5)
    client = cluster.client("hub-01")
    future = client.job(SLOW, 0, 1200, reduce="sum", where=["site=b"])
    allowed = {"pi-02", "pi-04"}
    cluster.restart("pi-02")
    allowed |= set(cluster.add("pi", labels=["site=b"]))
    cluster.add("pi", labels=["site=z"])
    cluster.kill("pi-04")
    cluster.add("hub", 2)
    assert client.wait(future) == sum(range(1200))
    decisions = client.why(future.job)
    assert placed(decisions) <= allowed
    assert len(decisions) > 2, "what was lost was placed again"


def test_a_job_waits_for_a_node_with_its_label_and_says_so(manifold_clusters: Start) -> None:
    cluster = manifold_clusters(
        classes={"pi": {"count": 3}, "hub": {"count": 1, "labels": {"ssd": None}}}
    )
    client = cluster.client("pi-01")
    future = client.job(SLOW, 0, 600, reduce="sum", where="ssd")
    until(lambda: client.status(future.job).done > 20, "it runs")
    cluster.kill("hub-01", stay_down=True)
    until(lambda: "waits for a node" in ok(cluster, "why", future.job), "it waits, and says why")
    said = ok(cluster, "why", future.job)
    assert "no node may take it" in said
    assert "refused pi-02: lacks the label ssd" in said
    assert cluster.add("pi", labels=["ssd"]) == ["pi-04"]
    assert client.wait(future) == sum(range(600))
    assert placed(client.why(future.job)) == {"hub-01", "pi-04"}


# -- labels of running nodes ----------------------------------------------------------------------


def test_a_running_node_is_labelled_and_remembers_it(manifold_clusters: Start) -> None:
    cluster = manifold_clusters(classes=CLASSES)
    assert ok(cluster, "node", "label", "pi-01") == "pi-01: site=a\n"
    assert ok(cluster, "node", "label", "pi-01", "site=z", "cam") == "pi-01: cam, site=z\n"

    def heard(labels: tuple[str, ...]) -> Callable[[], bool]:
        return lambda: told(cluster, "hub-01")["pi-01"] == labels

    until(heard(("cam", "site=z")), "the others hear of it")
    client = cluster.client("pi-02")
    until(lambda: _runs(client, "site=z"), "work that wants it goes there")
    assert placed(client.why(_last(client))) == {"pi-01"}
    cluster.restart("pi-01")
    assert told(cluster, "hub-01")["pi-01"] == ("cam", "site=z")
    assert json.loads(ok(cluster, "node", "label", "pi-01", "cam-", "site-", "--json")) == {
        "alias": "pi-01", "labels": [],
    }  # fmt: skip
    until(heard(()), "they hear of that, too")
    cluster.restart("pi-01")
    assert told(cluster, "hub-01")["pi-01"] == ()


def test_labels_whose_record_is_damaged_do_not_count_and_the_node_says_so(
    manifold_clusters: Start,
) -> None:
    cluster = manifold_clusters(classes=CLASSES)
    ok(cluster, "node", "label", "pi-01", "cam")
    cluster.kill("pi-01", stay_down=True)
    record = places.state_dir(cluster.name, "pi-01", cluster.environ) / "labels"
    record.write_bytes(record.read_bytes()[:-1])
    cluster.start("pi-01")
    cluster.wait_converged()
    assert told(cluster, "hub-01")["pi-01"] == ("site=a",)
    assert "labels that were given to this node do not count" in cluster.logs("pi-01")
    assert ok(cluster, "node", "label", "pi-01", "cam") == "pi-01: cam, site=a\n"


def _runs(client: Client, where: str) -> bool:
    try:
        return client.parallel_for(COLLATZ, 1, 60_000, reduce="sum", where=where) == COLLATZ_SUM
    except Unavailable:  # the news of the label is on its way
        return False


def _last(client: Client) -> str:
    return client.jobs().jobs[-1].job


def test_what_cannot_be_labelled_is_refused_in_a_sentence(manifold_clusters: Start) -> None:
    cluster = manifold_clusters(classes=CLASSES)
    for arguments, status, reason in (
        (("rack-",), 4, "It has no label rack."),
        (("gpu",), 2, "gpu is no label to give"),
        (("Site=a",), 2, "has a wrong key"),
        (tuple(f"k{n:02}={'v' * 30}" for n in range(9)), 2, "take 315 bytes, of at most 256"),
    ):
        done = cluster.command("node", "label", "pi-01", *arguments)
        assert done.returncode == status, done.stderr
        assert reason in done.stderr
    ok(cluster, "node", "label", "pi-01", *(f"{name}={'v' * 32}" for name in "abcdefg"))
    done = cluster.command("node", "label", "pi-01", f"h={'v' * 32}")
    assert done.returncode == 4
    assert "The labels of one node take 287 bytes, of at most 256" in done.stderr
    assert told(cluster, "pi-01")["pi-01"][0] == f"a={'v' * 32}"
