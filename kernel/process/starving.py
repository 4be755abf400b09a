"""Whether a process that says nothing could not, because others had the processor.

Interface: a `Patience` belongs to one process; `spent(pid, heard_s, now_s)` is asked now and then.
It says how long the process was silent without an excuse: the time since it was heard, less what
its main thread has spent in the run queue since the first question after QUIET_S. A process that
sleeps, is stopped, or computes without a word has no excuse; where the kernel keeps no such account
(`/proc/PID/schedstat`) nobody has.
"""

from __future__ import annotations

from dataclasses import dataclass


def queued_s(pid: int) -> float:
    """How long the main thread of `pid` was ready to run and did not, since it began."""
    try:
        with open(f"/proc/{pid}/schedstat", "rb") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):  # it has ended, or the kernel does not count
        return 0.0


QUIET_S = 0.5  # nobody is looked at before that: a look takes 30 us


@dataclass(slots=True)
class Patience:
    """See the module. `excused_s_max`: no excuse goes beyond that."""

    excused_s_max: float
    _heard_s: float = -1.0
    _queued_s: float = 0.0

    def spent(self, pid: int, heard_s: float, now_s: float) -> float:
        if now_s - heard_s < QUIET_S:
            return now_s - heard_s
        if heard_s != self._heard_s:
            self._heard_s, self._queued_s = heard_s, queued_s(pid)
        excused_s = min(queued_s(pid) - self._queued_s, self.excused_s_max)
        return now_s - heard_s - max(0.0, excused_s)
