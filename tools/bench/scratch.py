"""What the benchmarks of clusters share: clusters of one class, in a folder of their own."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from manifold.tools.emulator.testing import TestCluster

EXAMPLES = Path(__file__).parents[2] / "examples"
COLLATZ = EXAMPLES / "collatz.ent"
COLLATZ_SUM = 131434272  # of the steps of 1 ≤ n < 10^6, as gcc's and CPython's loops say too


@contextmanager
def environment() -> Iterator[dict[str, str]]:
    """Variables that keep a cluster apart from every other; its folder goes in the end."""
    with tempfile.TemporaryDirectory(prefix="mf-bench-", ignore_cleanup_errors=True) as folder:
        yield os.environ | {
            "MANIFOLD_STATE_HOME": f"{folder}/state",
            "MANIFOLD_RUNTIME_DIR": f"{folder}/run",
            "MANIFOLD_CLUSTER": f"b{secrets.token_hex(4)}",
        }


@contextmanager
def uniform(
    nodes: int, *, cores: int = 1, compute: float = 1.0, overrides: Mapping[str, str] | None = None
) -> Iterator[TestCluster]:
    """A cluster of `nodes` equal nodes, up and converged."""
    with environment() as environ:
        file = Path(environ["MANIFOLD_STATE_HOME"]).parent / "manifold.yaml"
        file.write_text(
            f"classes:\n  bench: {{count: {nodes}, cores: {cores}, compute: {compute}}}\n"
        )
        cluster = TestCluster(nodes, environ, config=file, overrides=overrides)
        try:
            yield cluster
        finally:
            cluster.close()
