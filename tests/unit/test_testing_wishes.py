"""What the manifold marker may say, and what a wrong one is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from manifold.kernel.config import load
from manifold.kernel.errors import ConfigError
from manifold.tools.testing.wishes import DEFAULT_NODES, Wish, count, overrides, wish, write


@pytest.mark.parametrize(
    ("positional", "named", "nodes"),
    [
        ((), {}, DEFAULT_NODES),
        ((5,), {}, 5),
        ((), {"nodes": 5}, 5),
        ((), {"classes": {"small": 3, "big": {"count": 2, "cores": 2}}}, 5),
        ((), {"classes": {"small": {"cores": 1}}}, 1),
        ((7,), {"classes": {"small": 3, "big": 1}}, 7),
    ],
)
def test_so_many_nodes_are_started(
    positional: tuple[Any, ...], named: dict[str, Any], nodes: int
) -> None:
    assert count(wish(positional, named)) == nodes


@pytest.mark.parametrize(
    ("positional", "named", "says"),
    [
        ((3, 4), {}, "only `nodes` without a name"),
        ((3,), {"nodes": 4}, "only `nodes` without a name"),
        ((), {"node": 4}, "no argument 'node'"),
        ((-1,), {}, "no number of nodes"),
        ((True,), {}, "no number of nodes"),
        (("5",), {}, "no number of nodes"),
        ((), {"netns": "yes"}, "neither True nor False"),
        ((), {"classes": ["small"]}, "classes= wants a mapping"),
        ((), {"overrides": "scheduler.grain=5ms"}, "overrides= wants a mapping"),
        ((), {"seed": -1}, "is no seed"),
        ((), {"seed": "x"}, "is no seed"),
        ((), {"config": "a.yaml", "classes": {"small": 1}}, "Leave out one"),
    ],
)
def test_what_makes_no_sense_is_refused_with_what_to_write(
    positional: tuple[Any, ...], named: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        wish(positional, named)
    assert says in str(refused.value)
    assert refused.value.next_step


@pytest.mark.parametrize(
    ("nodes", "voters"), [(1, "1"), (2, "1"), (3, "3"), (4, "3"), (5, "5"), (7, "7"), (16, "7")]
)
def test_the_larger_part_of_a_clusters_nodes_has_most_voters(nodes: int, voters: str) -> None:
    assert overrides(Wish(nodes))["nexus.voters"] == voters
    assert overrides(Wish(nodes, overrides={"nexus.voters": "off"})) == {"nexus.voters": "off"}
    assert overrides(Wish(nodes, config="mine.yaml")) == {}


def test_the_file_that_is_written_is_one_that_manifold_reads(tmp_path: Path) -> None:
    asked = Wish(4, classes={"small": 3, "big": {"count": 1, "cores": 2, "memory": "2GiB"}})
    config = load(write(asked, tmp_path), {}, {})
    assert [(each.name, each.count, each.cores) for each in config.classes] == [
        ("small", 3, 1),
        ("big", 1, 2),
    ]
    assert len(config.spread(count(asked))) == 4


@pytest.mark.parametrize("whole", [True, False])
def test_links_are_rules_or_the_section_that_has_them(tmp_path: Path, whole: bool) -> None:
    rules = [{"between": ["node-01", "node-02"], "latency": "30ms", "rate": "10Mbit/s"}]
    asked = Wish(3, links={"rules": rules} if whole else rules)
    (rule,) = load(write(asked, tmp_path), {}, {}).links.rules
    assert (rule.latency_ms, rule.rate) == (30.0, 10e6)


def test_a_wrong_class_is_told_where_it_stands(tmp_path: Path) -> None:
    path = write(Wish(classes={"small": {"colour": "red"}}), tmp_path)
    with pytest.raises(ConfigError, match="colour"):
        load(path, {}, {})


def test_a_file_of_the_users_own_is_taken_as_it_is(tmp_path: Path) -> None:
    assert write(Wish(config="mine.yaml"), tmp_path) == Path("mine.yaml")
