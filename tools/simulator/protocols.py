"""What a run of the simulator is made of: who takes part, what runs on a node, who judges it.

Interface: a `Factory` makes `Protocols` from the `Roster`; `run.py` runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from manifold.tools.simulator.faults import Faults
from manifold.tools.simulator.world import Boot, Node, World
from manifold.vm.kid import Kid


class Checker(Protocol):
    """Judges from outside. `failures` grows during the run; `settled` is what liveness waits for.

    `name` says what is checked, for the report; `settle_ms` how long settling may take.
    """

    name: str
    settle_ms: float
    failures: list[str]

    def watch(self, world: World, faults: Faults) -> None:
        """Register with the world, before any node starts."""

    def settled(self, world: World, well: Sequence[Node]) -> str:
        """Why the well part of the cluster is not yet as it should be; "" when it is."""

    def summary(self) -> str:
        """What was checked, with figures, for the report."""


@dataclass(frozen=True, slots=True)
class Roster:
    """Who will take part, for the factory."""

    kids: tuple[Kid, ...]
    addresses: tuple[str, ...]
    seed: int

    def index(self, kid: Kid) -> int:
        return self.kids.index(kid)


@dataclass(frozen=True, slots=True)
class Protocols:
    """What runs, what it says, who judges it, and what is done to it."""

    boot: Boot
    messages: Any  # the union of all message types
    checkers: Sequence[Checker]
    workload: Callable[[World], None] = lambda world: None
    duration_ms: float = 60_000.0


Factory = Callable[[Roster], Protocols]
