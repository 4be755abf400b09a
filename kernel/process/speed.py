"""How fast this processor runs Python, so that nodes of unequal speed agree on what work is.

A Python call has no gas of its own. It is given as much as a program of the sandbox would have used
in its time on this processor: `gas_per_ms` is that rate, from a short loop timed once per host, in
the zygote, whose children inherit it.
"""

from __future__ import annotations

import time

LOOPS = 20_000
TRIES = 3  # the best counts: the others were interrupted
# The loop takes 1 ms where a program of the sandbox uses 500 000 gas a millisecond.
REFERENCE_MS = 1.0
REFERENCE_GAS_PER_MS = 500_000.0

_measured = 0.0


def gas_per_ms() -> float:
    """Gas that a millisecond of Python on a whole core counts for."""
    global _measured
    if not _measured:
        best_ms = min(_loop_ms() for _ in range(TRIES))
        _measured = REFERENCE_GAS_PER_MS * REFERENCE_MS / max(best_ms, 1e-3)
    return _measured


def _loop_ms() -> float:
    began_s = time.thread_time()
    total = 0
    for number in range(LOOPS):
        total += number & 7
    return 1000 * (time.thread_time() - began_s)
