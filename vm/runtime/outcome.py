"""What a run gives back, whichever back end ran it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from manifold.vm.errors import ManifoldError
from manifold.vm.runtime.results import Partial

OUTPUT_BYTES_MAX = 64 << 20  # of values collected by one run: 8 Mi values

OnYield = Callable[[int], int]
OnSleep = Callable[[float], None]


class Stopped(ManifoldError):
    """The host gave no more gas: the run was cancelled, cut short or out of its budget."""

    code = "stopped"

    def __init__(self, gas_used: int, index: int | None) -> None:
        super().__init__(
            f"Stopped after {gas_used} units of gas.", "Give it more gas, or a smaller range."
        )
        self.gas_used = gas_used
        self.index = index


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a block, and what it cost."""

    partial: Partial
    gas_used: int
