"""Labels of real nodes: who tells them, who votes by them, and which links are about them."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from manifold.kernel import messages as m
from manifold.kernel.errors import ConfigError, ManifoldError
from manifold.shells.sdk.voters import look
from manifold.tools.emulator.testing import TestCluster

Start = Callable[..., TestCluster]
SITES = {"pi": {"count": 9, "labels": {"site": ["a", "b", "c"], "rack": ["r1", "r1", "r1", "r2"]}}}


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
        overrides={"nexus.voters": "off"},
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
