"""How much gas a run gets at a time, so that it comes back to its host every few milliseconds.

Interface: `Slices(clock)`; a run gets `gas=slices.start(), on_yield=slices.more`. Use one for all
runs of a program, one at a time: what the last slice took says how large the next one is.
Invariant: S1 a slice is at least GAS_MIN and at most GROWTH times the one before it.
Why: a unit of gas takes from 0.03 ns (arithmetic on floats) to 30 ns (divisions, cache misses), and
coming back costs some 20 microseconds. A worker measures its slices in the same way.
"""

from __future__ import annotations

from collections.abc import Callable

SLICE_S = 0.005  # so often a Ctrl-C is seen; 20 microseconds are less than a hundredth of it
GAS_FIRST = 2_500_000  # 5 ms at 0.5 gas a nanosecond, a worker's guess
GAS_MIN = 10_000
GROWTH = 8  # one slice that the machine was slow to start must not make a very long one


class Slices:
    """See the module. `clock` counts seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began_s = 0.0
        self._used = 0
        self._gas = GAS_FIRST

    def start(self) -> int:
        """The first slice of a run."""
        self._began_s, self._used = self._clock(), 0
        return self._gas

    def more(self, gas_used: int) -> int:
        """The next one; `gas_used` counts from the start of the run."""
        now_s = self._clock()
        spent_s = max(now_s - self._began_s, 1e-6)
        wanted = int((gas_used - self._used) / spent_s * SLICE_S)
        self._gas = min(max(wanted, GAS_MIN), GROWTH * self._gas)
        self._began_s, self._used = now_s, gas_used
        return self._gas
