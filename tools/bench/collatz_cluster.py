"""Collatz 1 to 10^6 by a cluster, against one node of the same kind.

Jobs are submitted by a client and waited for, so everything is in it: placing, messages, reducing.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from manifold.shells.sdk import Client
from manifold.tools.bench.harness import Figure, interleave
from manifold.tools.bench.scratch import COLLATZ, COLLATZ_SUM, uniform


def job(client: Client) -> Callable[[], float]:
    """One whole job, timed from submission to result."""

    def measured() -> float:
        began = time.perf_counter()
        total = client.parallel_for(COLLATZ, 1, 1_000_000, reduce="sum")
        seconds = time.perf_counter() - began
        assert total == COLLATZ_SUM, total
        return seconds

    return measured


def speed_up(nodes: int, compute: float, rounds: int) -> tuple[float, dict[str, float | str]]:
    """How many times faster `nodes` nodes are than one, both up at once and asked in turns."""
    with uniform(1, compute=compute) as one, uniform(nodes, compute=compute) as many:
        pair = interleave(job(one.client()), job(many.client()), rounds)
        return pair.ratio, pair.raw("one node", f"{nodes} nodes")


def run(quick: bool = False) -> list[Figure]:
    """Speed-ups: two whole cores, and four half cores."""
    rounds = 3 if quick else 9
    two, two_raw = speed_up(2, 1.0, rounds)
    four, four_raw = speed_up(4, 0.5, rounds)
    return [
        Figure("2 nodes of a core / 1 node", two, 1.8, "higher", "x", two_raw),
        Figure("4 nodes of half a core / 1 node", four, 3.5, "higher", "x", four_raw),
    ]
