"""Many schedules of one kind from the command line: `SEED SCHEDULES`, until one fails.

Interface: `schedules(schedule, arguments)` prints how many there were and how fast, or what failed
at which seed, and returns the exit status.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol


class Judged(Protocol):
    """What a schedule came to."""

    @property
    def failures(self) -> Sequence[str]: ...


def schedules(schedule: Callable[[int], Judged], arguments: Sequence[str]) -> int:
    """`arguments` are the first seed and a number of schedules."""
    begin, count = (int(each) for each in arguments)
    begun_s = time.process_time()
    for seed in range(begin, begin + count):
        outcome = schedule(seed)
        if outcome.failures:
            print("\n".join([f"FAILED at seed {seed}:", *outcome.failures]))
            return 1
    rate = count / (time.process_time() - begun_s)
    print(f"{count} schedules; {rate:.0f} a second of processor time")
    return 0
