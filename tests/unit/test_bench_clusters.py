"""The benchmarks of whole clusters: what they read from logs and limits, and what they write."""

from __future__ import annotations

import ast
import math
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import pytest

from manifold.kernel.config import load
from manifold.tools.bench import cluster_fixture, detection, scale
from manifold.tools.bench.detection import Said
from manifold.tools.bench.scale import Limit, Measured, Weighed
from manifold.tools.emulator.cluster import CONVERGE_S, converge_s
from manifold.tools.emulator.testing import TestCluster

LOG = """\
2026-11-29T03:05:21.456Z INFO     manifold.node: n-62 (K-24df08eb, boot 1): unknown -> alive
2026-11-29T03:05:22.500Z INFO     manifold.node: n-03 (K-95684c44, boot 2): alive -> suspect
2026-11-29T03:05:22.600Z INFO     manifold.node: job J-1 done: alive -> dead in its name only
2026-11-29T03:05:27.250Z INFO     manifold.node: n-03 (K-95684c44, boot 2): suspect -> dead
a traceback without a time
2026-11-29T03:05:28.250Z INFO     manifold.node: n-03 (K-95684c44, boot 2): dead -> alive
"""


class Logs:
    """As much of a cluster as is asked for its logs."""

    aliases = ("n-01", "n-02")

    def logs(self, alias: str) -> str:
        return LOG if alias == "n-01" else LOG.replace("27.250", "26.000")


def test_the_formula_is_memberlists() -> None:
    config = load(None, {}, {})
    assert detection.formula_s(config, 16) == pytest.approx(6.4, abs=0.01)
    assert detection.formula_s(config, 1000) == pytest.approx(13.6, abs=0.02)
    assert detection.formula_s(config, 3) == pytest.approx(math.e / (math.e - 1) + 4)


def test_beliefs_are_read_from_the_logs_of_all_nodes_since_a_time() -> None:
    since_s = datetime(2026, 11, 29, 3, 5, 22, tzinfo=UTC).timestamp()
    said = detection.beliefs(cast(TestCluster, Logs()), since_s)
    assert [(each.who, each.of, each.was, each.now) for each in said] == [
        ("n-01", "n-03", "alive", "suspect"),
        ("n-02", "n-03", "alive", "suspect"),
        ("n-02", "n-03", "suspect", "dead"),
        ("n-01", "n-03", "suspect", "dead"),
        ("n-01", "n-03", "dead", "alive"),
        ("n-02", "n-03", "dead", "alive"),
    ]
    known = detection.dead_at(said, "n-03")
    assert {who: round(at_s - since_s, 2) for who, at_s in known.items()} == {
        "n-02": 4.0, "n-01": 5.25,
    }  # fmt: skip
    assert detection.dead_at(said, "n-62") == {}


def test_the_first_time_that_a_node_is_held_for_dead_counts() -> None:
    said = [Said(1.0, "a", "x", "suspect", "dead"), Said(3.0, "a", "x", "suspect", "dead")]
    assert detection.dead_at(said, "x") == {"a": 1.0}


def test_the_scarcest_limit_is_named_with_the_nodes_that_it_lasts_for() -> None:
    weighed = Weighed(17, 200.0, 160, 1200, 80)
    limits = [Limit("memory MB", 400.0, 8000.0), Limit("threads", 160.0, 1600.0)]
    found = scale.figures(Measured(16, 0.5, 1.0, 0.5, weighed, weighed, 3.0, 1.0, 0.2, 0.4, limits))
    by_name = {figure.name: figure for figure in found}
    scarce = by_name["16 nodes, share of the scarcest limit"]
    assert scarce.value == pytest.approx(0.1)
    assert scarce.met
    assert "threads, which would last for 160 nodes" in scarce.note
    assert by_name["16 nodes, a node / a bare process"].value == pytest.approx(2.0)
    assert by_name["16 nodes, memory of a node"].value == pytest.approx(12.5)


def test_a_process_of_ours_is_weighed_as_the_kernel_says() -> None:
    weighed = scale.weigh([os.getpid()])
    assert weighed.processes == 1
    assert weighed.pss_mb > 5
    assert weighed.threads >= 1
    assert weighed.descriptors == weighed.descriptors_most >= 3
    assert scale.descriptors_of(os.getpid()) >= weighed.descriptors
    assert all(limit.share > 0 for limit in scale.limits(weighed, 1024))


def test_generated_test_files_are_python_and_each_has_a_test_of_its_own(tmp_path: Path) -> None:
    folder = cluster_fixture.write_tests(tmp_path / "many", 3)
    names = set()
    for path in folder.glob("test_*.py"):
        tree = ast.parse(path.read_text())
        names |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert names == {"test_squares_0", "test_squares_1", "test_squares_2"}


def test_many_nodes_may_take_longer_to_find_each_other() -> None:
    assert converge_s(4) == converge_s(40) == CONVERGE_S
    assert converge_s(128) == pytest.approx(3.2 * CONVERGE_S)
