"""Every example, run as its own header says, gives what its header says."""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from manifold.tools.emulator.testing import TestCluster

ROOT = Path(__file__).parents[2]
DOCUMENTED = re.compile(r"^; +manifold (run .*?)(?: +\((.*)\))?$", re.MULTILINE)


def documented() -> list[tuple[str, str, str]]:
    """Example, command and the result its header gives ("" where it gives none)."""
    return [
        (path.name, command, result)
        for path in sorted((ROOT / "examples").glob("*.ent"))
        for command, result in DOCUMENTED.findall(path.read_text())
    ]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    with tempfile.TemporaryDirectory(prefix="mf-") as folder:
        environ = os.environ | {
            "MANIFOLD_STATE_HOME": f"{folder}/state",
            "MANIFOLD_RUNTIME_DIR": f"{folder}/run",
            "MANIFOLD_CLUSTER": f"t{secrets.token_hex(4)}",
        }
        cluster = TestCluster(4, environ)
        yield cluster
        cluster.close()


def manifold(cluster: TestCluster, command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "manifold", *shlex.split(command)],
        env=dict(cluster.environ), cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_every_example_says_how_to_run_it() -> None:
    names = {name for name, _, _ in documented()}
    assert names == {path.name for path in (ROOT / "examples").glob("*.ent")}


@pytest.mark.parametrize(("name", "command", "result"), documented())
def test_an_example_gives_what_it_says(
    cluster: TestCluster, name: str, command: str, result: str
) -> None:
    if name == "forever.ent":
        command += " --timeout 0.5"
        result = "fails"
    done = manifold(cluster, command + " --json")
    found = json.loads(done.stdout)
    if result == "fails":
        assert done.returncode == 1
        assert found["error"]["code"] in ("trap", "exhausted")
        return
    assert done.returncode == 0, done.stdout + done.stderr
    if result:
        assert found["result"] == json.loads(result.split()[0])


def test_the_seeds_program_yields_all_thousand_pairs_in_order(cluster: TestCluster) -> None:
    done = manifold(cluster, "run examples/seed_collatz.json --range 100:1100 --json")
    pairs = json.loads(done.stdout)["result"]
    assert pairs == [[n, steps(n)] for n in range(100, 1100)]


def steps(n: int) -> int:
    count = 0
    while n != 1:
        n = 3 * n + 1 if n % 2 else n // 2
        count += 1
    return count


def test_monte_carlo_pi_does_not_depend_on_the_sharding(cluster: TestCluster) -> None:
    pi = ROOT / "examples" / "pi.ent"
    client = cluster.client()
    whole = client.parallel_for(pi, 0, 600, reduce="sum")
    parts = [client.parallel_for(pi, at, at + 200, reduce="sum") for at in (0, 200, 400)]
    assert whole == sum(parts)


def test_primes_are_the_primes(cluster: TestCluster) -> None:
    client = cluster.client()
    found = client.parallel_for(ROOT / "examples" / "primes.ent", 0, 3000)
    flags = [n for n, value in enumerate(found) if value]
    assert flags == [n for n in range(3000) if n > 1 and all(n % d for d in range(2, n))]
