"""Nexus in the simulator: schedules a second on one core, all faults included.

Each schedule is a cluster of its own with clients, crashes, cuts and changes of voters, checked
from outside; a failing one ends the benchmark and names its seed. One process, so one core.
"""

from __future__ import annotations

import time

from manifold.tools.bench.harness import Figure
from manifold.tools.simulator import nexus

SEED = 1
ROUNDS = 5
SCHEDULES, SCHEDULES_QUICK = 100, 20  # of a round: a second is some 45


def run(quick: bool = False) -> list[Figure]:
    """The best round: what the core can do when it is left alone."""
    schedules = SCHEDULES_QUICK if quick else SCHEDULES
    rates: list[float] = []
    events = operations = changes = 0
    cpu_s = 0.0
    for number in range(ROUNDS):
        began = time.process_time()
        summary = nexus.run(SEED + number * schedules, schedules)
        cpu_s += time.process_time() - began
        assert summary.failed is None, summary.text()
        rates.append(summary.schedules / summary.wall_s)
        events += summary.events
        operations += summary.operations
        changes += summary.changes
    done = ROUNDS * schedules
    raw: dict[str, float | str] = {
        "seeds": f"{SEED} to {SEED + done - 1}",
        "schedules": done,
        "events": events,
        "operations": operations,
        "changes of voters": changes,
        "slowest round /s": min(rates),
        "per second of CPU": done / cpu_s,
    }
    return [Figure("schedules a second", max(rates), None, "higher", "/s", raw)]
