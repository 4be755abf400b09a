"""Kernels on a cluster: the examples give what they say, and results are those of plain Python."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import manifold
from manifold.examples import collatz, mandelbrot, nbody, pi
from manifold.kernel.errors import InvalidProgram
from manifold.tools.emulator.testing import TestCluster
from manifold.vm.errors import Trap

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster() -> Iterator[TestCluster]:
    with tempfile.TemporaryDirectory(prefix="mf-") as folder:
        environ = os.environ | {
            "MANIFOLD_STATE_HOME": f"{folder}/state",
            "MANIFOLD_RUNTIME_DIR": f"{folder}/run",
            "MANIFOLD_CLUSTER": f"t{secrets.token_hex(4)}",
        }
        cluster = TestCluster(4, environ)
        yield cluster
        cluster.close()


@pytest.fixture
def client(cluster: TestCluster) -> Iterator[manifold.Client]:
    with manifold.connect(environ=cluster.environ) as client:
        yield client


def example(cluster: TestCluster, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], env=dict(cluster.environ), cwd=ROOT,
        capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_parallel_for_takes_a_kernel(client: manifold.Client) -> None:
    steps = client.parallel_for(collatz.collatz_steps, 1, 2000)
    assert steps == [collatz.collatz_steps(n) for n in range(1, 2000)]
    assert client.parallel_for(pi.hits, 0, 3, reduce="sum") == sum(map(pi.hits, range(3)))


def test_submit_takes_a_kernel_and_its_arguments(client: manifold.Client) -> None:
    pixels = [1000, 6000, 9000]
    futures = [client.submit(mandelbrot.escape, pixel, 120) for pixel in pixels]
    expected = [mandelbrot.escape(pixel, 120) for pixel in pixels]
    assert [future.result(30) for future in futures] == expected


def test_several_values_come_back_together_and_bit_by_bit(client: manifold.Client) -> None:
    found = client.parallel_for(nbody.nbody, 0, 3, arguments=(20,))
    assert [tuple(each) for each in found] == [nbody.nbody(index, 20) for index in range(3)]


def test_a_fault_on_a_node_names_the_line_of_the_kernel(client: manifold.Client) -> None:
    @manifold.kernel
    def inverse(n: int) -> float:
        return 1 / (n - 50)

    with pytest.raises(Trap, match=r"DIV: division by zero at index 50") as fault:
        client.parallel_for(inverse, 0, 100)
    assert fault.value.line == inverse.__wrapped__.__code__.co_firstlineno + 2


def test_a_function_that_is_no_kernel_is_refused_before_anything_is_sent(
    client: manifold.Client,
) -> None:
    with pytest.raises(InvalidProgram, match="inverse is not a program"):

        def inverse(n: int) -> float:
            return 1 / n

        client.parallel_for(inverse, 0, 100)  # type: ignore[arg-type]


def test_the_examples_give_what_they_say(cluster: TestCluster, tmp_path: Path) -> None:
    assert example(cluster, "examples/collatz.py", "27") == "111\n"
    assert example(cluster, "examples/collatz.py").startswith("131434424 steps in ")
    assert example(cluster, "examples/pi.py") == "3.141026\n"
    picture = tmp_path / "set.png"
    said = example(cluster, "examples/mandelbrot.py", str(picture), "60")
    assert "60 by 40" in said and picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    first, second = example(cluster, "examples/nbody.py").splitlines()
    assert first.startswith("100 systems, 1000 steps each; the energy drifts by at most ")
    assert second.startswith("Jupiter comes nearest, to ")
