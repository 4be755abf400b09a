"""Jobs that wait until a global takes their effects: it takes those of 64 jobs at a time. Pure.

Interface rules: `first` says which job of this node asks for all that wait at a global; `joined`
takes the answer that there is no room. What has a place there may be over: its owner died between
recording its end and dismissing it. So who asks looks, each time, at the record of the next of
those admitted, `suspect`, and dismisses it where it is over.
Invariants:
  C1  of the jobs that wait at a global one of each node asks, each RETRY_MS;
  C2  globals are asked in the order of their names (`admissions`), so that jobs never wait for
      each other in a circle: of those that have places, the one at the last global runs.
      Source: Havender, Avoiding deadlock in multitasking systems (1968).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from manifold.kernel.scheduler.takeover import Guard


@dataclass(slots=True)
class _Crowd:
    asks: Guard
    looked: int = 0


class Crowds:
    """See the module. `guards` are those of this node's jobs that are kept."""

    def __init__(self, guards: Mapping[str, Guard]) -> None:
        self._guards = guards
        self._of: dict[str, _Crowd] = {}

    def first(self, name: str) -> Guard | None:
        """Who asks at this global (C1), if anybody waits."""
        crowd = self._of.get(name)
        if crowd is None:
            return None
        guard = crowd.asks
        kept = self._guards.get(guard.job.job) is guard and not guard.over
        if kept and guard.admit and guard.admit[-1] == name:
            return guard
        del self._of[name]
        return None

    def joined(self, name: str, guard: Guard) -> bool:
        """There is no room for it. True: it asks from now on, and has not before."""
        if self.first(name) is not None:
            return False
        self._of[name] = _Crowd(guard)
        return True

    def suspect(self, name: str, jobs: Sequence[str]) -> str:
        """The one of those admitted whose turn it is to be looked at."""
        crowd = self._of[name]
        crowd.looked += 1
        return jobs[crowd.looked % len(jobs)]
