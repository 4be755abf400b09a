"""Collatz 1 to 10^6 by the assembly program on one worker, against gcc, CPython and the seed.

The worker's own code path: blocks of the same grid, the same gas slices, results kept per block.
"""

from __future__ import annotations

import time

from manifold.kernel.scheduler import blocks
from manifold.kernel.scheduler.messages import JobSpec
from manifold.shells.sdk.programs import program_of
from manifold.tools.bench import peers
from manifold.tools.bench.harness import Figure, interleave
from manifold.tools.bench.scratch import COLLATZ, COLLATZ_SUM
from manifold.vm.runtime import Machine, merge
from manifold.vm.runtime.results import finish

HI = 1_000_000
GAS_SLICE = 2_500_000  # about 5 ms, a worker's slice
CPYTHON_N = 30_000
SEED_N = 500


class OneWorker:
    """What a worker does with `collatz.ent`, in this process."""

    def __init__(self) -> None:
        program = program_of(COLLATZ)
        self._machine = Machine(1 << 28)
        self._unit = self._machine.load(program, "sum")
        self._spec = JobSpec(program.kid, 1, HI, "sum")

    def __call__(self) -> float:
        began = time.perf_counter()
        partials = [
            self._unit.run(
                *blocks.bounds(self._spec, block),
                gas=GAS_SLICE,
                on_yield=lambda _: GAS_SLICE,
                on_sleep=time.sleep,
            ).partial
            for block in range(blocks.count(self._spec))
        ]
        total = finish("sum", blocks.tree_reduce(partials, lambda g: merge("sum", g)), 1, HI)
        seconds = time.perf_counter() - began
        assert total == COLLATZ_SUM, total
        return seconds


def run(quick: bool = False) -> list[Figure]:
    """Ratios of seconds: the program's to gcc's, and CPython's and the seed's to the program's."""
    gcc = peers.gcc_collatz()
    worker = OneWorker()

    def native() -> float:
        timing = gcc(HI - 1)
        assert timing.total == COLLATZ_SUM, timing.total
        return timing.seconds

    pair = interleave(worker, native, 3 if quick else 9)
    python = peers.cpython_collatz(CPYTHON_N)
    python_s = python.seconds / python.total * COLLATZ_SUM
    seed = peers.seed_interpreter(SEED_N)
    seed_s = seed.seconds / seed.total * COLLATZ_SUM
    return [
        Figure("program / gcc -O2", pair.ratio, 1.4, "lower", "x", pair.raw("program", "gcc")),
        Figure(
            "CPython / program", python_s / pair.a, None, "higher", "x",
            {"CPython s": python_s}, f"from its first {CPYTHON_N} numbers, by steps",
        ),
        Figure(
            "seed-style interpreter / program", seed_s / pair.a, 1000, "higher", "x",
            {"seed s": seed_s}, f"from its first {SEED_N} numbers, by steps",
        ),
    ]  # fmt: skip
