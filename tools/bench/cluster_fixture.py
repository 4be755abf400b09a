"""A cluster in a test: how long it takes to come and to go, and what a test with one costs.

Clusters of 2, 4, 8 and 16 nodes are started until all see each other, and closed, in turns with as
many bare processes that a forkserver starts with the same imports: the least that so many
interpreters cost. Then twenty generated test files, each with a test that has a cluster of four
compute something, are run by `pytest -n 2`, in turns with one such file.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

from manifold.tools.bench.boot import bare_forkserver
from manifold.tools.bench.harness import Absent, Figure, interleave
from manifold.tools.bench.scratch import environment
from manifold.tools.emulator.testing import TestCluster

SIZES = (2, 4, 8, 16)
GOALS_S = {4: 0.5}
FILES = 20
WORKERS = 2
PYTEST_S = 300.0

# What a user's test looks like that wants a cluster. The marker and the fixture are the plugin's.
TEST = """\
import pytest

SQUARES = "LOAD 0\\nDUP\\nMUL\\nEMIT\\nHALT\\n"


@pytest.mark.manifold(nodes=4)
def test_squares_{number}(manifold_cluster):
    client = manifold_cluster.client()
    assert client.parallel_for(SQUARES, 0, 100, reduce="sum") == 328350
"""


class Fixtures:
    """Clusters of one size; how long each took to go, beside how long it took to come."""

    def __init__(self, nodes: int) -> None:
        self._nodes = nodes
        self.close_s: list[float] = []

    def __call__(self) -> float:
        with environment() as environ:
            file = Path(environ["MANIFOLD_STATE_HOME"]).parent / "manifold.yaml"
            file.write_text(f"classes:\n  node: {{count: {self._nodes}, cores: 1, compute: 1}}\n")
            began = time.perf_counter()
            cluster = TestCluster(self._nodes, environ, config=file)
            seconds = time.perf_counter() - began
            began = time.perf_counter()
            cluster.close()
            self.close_s.append(time.perf_counter() - began)
        return seconds


def of_size(nodes: int, rounds: int) -> list[Figure]:
    """Coming, beside bare processes; and going."""
    fixtures = Fixtures(nodes)
    pair = interleave(fixtures, lambda: bare_forkserver(nodes), rounds)
    return [
        Figure(f"{nodes} nodes, start to converged", pair.a, GOALS_S.get(nodes), "lower", "s",
               pair.raw("cluster", "bare processes")),
        Figure(f"{nodes} nodes / {nodes} bare processes", pair.ratio, None, "lower", "x"),
        Figure(f"{nodes} nodes, close", statistics.median(fixtures.close_s), None, "lower", "s",
               {"longest s": max(fixtures.close_s)}),
    ]  # fmt: skip


def write_tests(folder: Path, files: int) -> Path:
    """A folder of so many test files."""
    folder.mkdir()
    (folder / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n")
    for number in range(files):
        (folder / f"test_number_{number:02}.py").write_text(TEST.format(number=number))
    return folder


def run_tests(folder: Path, files: int) -> None:
    """`pytest -n 2` on it; `Absent` where that cannot work here."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", str(WORKERS), "-p", "no:cacheprovider"]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=PYTEST_S, check=False
    )
    if f"{files} passed" not in done.stdout:
        said = (done.stdout + done.stderr).strip().splitlines()
        raise Absent(
            f"The generated tests did not pass: {said[-1] if said else 'nothing was said'}",
            "They need pytest, pytest-xdist and this package's plugin: pip install -e '.[dev]'.",
        )


def of_tests(rounds: int) -> list[Figure]:
    """Seconds a test of many, and of one alone."""
    with environment() as environ:
        base = Path(environ["MANIFOLD_STATE_HOME"]).parent
        many, one = write_tests(base / "many", FILES), write_tests(base / "one", 1)
        pair = interleave(lambda: run_tests(many, FILES), lambda: run_tests(one, 1), rounds)
    return [
        Figure(f"{FILES} test files on {WORKERS} workers, a test", pair.a / FILES, None, "lower",
               "s", pair.raw(f"{FILES} files", "1 file")),
        Figure(f"{FILES} test files / 1 test file", pair.ratio, float(FILES), "lower", "x", {},
               f"{FILES} if nothing were shared and nothing ran beside anything"),
    ]  # fmt: skip


def run(quick: bool = False) -> list[Figure]:
    """Seconds and ratios, by size; then of whole test runs."""
    figures = []
    for nodes in SIZES:
        figures += of_size(nodes, 2 if quick else 7)
    return figures + of_tests(1 if quick else 3)
