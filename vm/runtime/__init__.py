"""Runtime: a worker's machine, which runs programs over blocks of indices.

Interface: `Machine(memory_bytes)`, `machine.load(program, reduce) -> Unit`, `unit.run(lo, hi, ...)
-> Outcome`, `calibrate() -> gas per second`. Partial results and their merging are in `results`;
`Globals` is who gives a run the registers of the cluster.
wasmtime is imported only when a Machine is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from manifold.vm.runtime.globals import Globals
from manifold.vm.runtime.outcome import Outcome, Stopped
from manifold.vm.runtime.results import REDUCTIONS, Partial, finish, merge

if TYPE_CHECKING:
    from manifold.vm.runtime.machine import Machine, Unit, calibrate

__all__ = [
    "REDUCTIONS",
    "Globals",
    "Machine",
    "Outcome",
    "Partial",
    "Stopped",
    "Unit",
    "calibrate",
    "finish",
    "merge",
]


def __getattr__(name: str) -> Any:
    if name in ("Machine", "Unit", "calibrate"):
        from manifold.vm.runtime import machine

        return getattr(machine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
