"""Fixtures for every test: a cluster of its own, and a guard that nothing is left running."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from manifold.tools.emulator.testing import TestCluster


@pytest.fixture
def state_home() -> Iterator[Path]:
    """A state folder of this test alone; paths stay short enough for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="mf-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def cluster_environment(state_home: Path) -> dict[str, str]:
    """The environment of commands that use this test's cluster and no other."""
    return os.environ | {
        "MANIFOLD_STATE_HOME": str(state_home / "state"),
        "MANIFOLD_RUNTIME_DIR": str(state_home / "run"),
        "MANIFOLD_CLUSTER": f"t{secrets.token_hex(4)}",
    }


@pytest.fixture
def manifold_cluster(
    cluster_environment: dict[str, str],
) -> Iterator[Callable[..., TestCluster]]:
    """Start clusters of N nodes; each is taken down in the end, and must have left nothing."""
    started: list[TestCluster] = []

    def start(nodes: int, **options: object) -> TestCluster:
        environment = dict(cluster_environment)
        environment["MANIFOLD_CLUSTER"] += str(len(started))
        cluster = TestCluster(nodes, environment, **options)  # type: ignore[arg-type]
        started.append(cluster)
        return cluster

    yield start
    for cluster in started:
        cluster.close()
