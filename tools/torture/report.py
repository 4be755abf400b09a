"""What a run is asked for, and what it came to."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Options:
    """`folder` is where histories of failures are written."""

    seed: int
    seconds: float
    nodes: int = 7
    voters: int = 5
    folder: Path = Path()
    keep: bool = False  # the nodes' logs and disks


@dataclass(slots=True)
class Report:
    """Of every kind of run; `failures` is empty where all is well."""

    seed: int
    seconds: float
    nodes: int
    voters: int
    failures: list[str] = field(default_factory=list)
    operations: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    keys: int = 0
    stalled_ms: float = 0.0
    stalled_at_ms: float = 0.0
    up_ms: float = 0.0  # from healing until every node was up
    healed_ms: float = 0.0  # and from then until every key in use was read and written
    history: str = ""
    crashed: list[str] = field(default_factory=list)  # processes of clients

    @property
    def command(self) -> str:
        """What repeats the plan."""
        return (
            f"manifold torture nexus --seed {self.seed} --seconds {self.seconds:g} "
            f"--nodes {self.nodes} --voters {self.voters}"
        )


@dataclass(slots=True)
class ClusterReport(Report):
    """Of a run with jobs. `jobs`: by what became of them; `kinds`: by what they were."""

    jobs: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    effects: int = 0  # of programs on globals
    work: str = ""  # where all pieces of work are written down
    work_ms: float = (
        0.0  # from when every node was up until every client had had a job of each kind
    )
    idle_ms: float = 0.0  # and from then until no node had a job or a busy worker any more

    @property
    def command(self) -> str:
        return (
            f"manifold torture cluster --seed {self.seed} --minutes {self.seconds / 60:g} "
            f"--nodes {self.nodes} --voters {self.voters}"
        )
