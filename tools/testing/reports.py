"""What the report of a failed test says of its clusters: seed, events, states, logs.

Interface rules: `sections` reads what is on disk, so that it works also where the cluster never
came up; everything is bounded, and the newest is kept. `copy` puts whole logs aside.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from manifold.tools.emulator.testing import LOG_FILES, TestCluster
from manifold.tools.testing.run_folder import STATE

LOG_LINES_MAX = 40  # of each node: what led to the failure, on a few screens
TRACE_LINES_MAX = 200
NODES_MAX = 32  # whose logs are shown; `--manifold-logs` has all

Section = tuple[str, str]


def sections(folder: Path, clusters: Sequence[TestCluster], again: str) -> list[Section]:
    """Titles and texts, in the order in which one reads them; `again` repeats the test."""
    found: list[Section] = []
    for cluster in clusters:
        lines = [f"seed {cluster.seed}; the same again: {again.format(seed=cluster.seed)}"]
        lines += [f"{at_s:9.3f} s  {line}" for at_s, line in cluster.trace[-TRACE_LINES_MAX:]]
        found.append((f"manifold: events of {cluster.name}", "\n".join(lines)))
    logs = list(_logs(folder))
    for alias, lines in logs[:NODES_MAX]:
        found.append((f"manifold: log of {alias}", "\n".join(lines[-LOG_LINES_MAX:])))
    if len(logs) > NODES_MAX:
        rest = ", ".join(alias for alias, _ in logs[NODES_MAX:])
        found.append(("manifold: logs left out", f"{rest}: --manifold-logs=DIR keeps them"))
    return found


def _folders(folder: Path) -> Iterator[Path]:
    """Of the nodes of every cluster in a test's folder."""
    for path in sorted(folder.glob(f"{STATE}/*/*")):
        if any((path / name).exists() for name in LOG_FILES):
            yield path


def _logs(folder: Path) -> Iterator[tuple[str, list[str]]]:
    for path in _folders(folder):
        lines: list[str] = []
        for name in LOG_FILES:
            if (path / name).exists():
                text = (path / name).read_text(errors="replace").splitlines()
                lines += text if name == LOG_FILES[0] else [f"{name}: {line}" for line in text]
        yield path.name, lines


def copy(folder: Path, to: Path) -> None:
    """The logs of every node, as `CLUSTER/ALIAS/node.log` in `to`."""
    for path in _folders(folder):
        kept = to / path.parent.name / path.name
        kept.mkdir(parents=True, exist_ok=True)
        for name in LOG_FILES:
            if (path / name).exists():
                shutil.copyfile(path / name, kept / name)
