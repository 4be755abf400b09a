"""Jobs that have ended, kept for clients that ask; and the bytes of results held for them.

Interface rules: `grow` with what a running job counts, `put` when it ends.
Invariants: O3 at most `ENDED_MAX` ended jobs; their results and those of running jobs take at most
`RESULT_BYTES_MAX` and half of the node's memory, the oldest ended go first; `held_bytes` is the sum
over all jobs.
"""

from __future__ import annotations

from collections import OrderedDict

from manifold.kernel.scheduler import outcome
from manifold.kernel.scheduler.ledger import Job

ENDED_MAX = 4096  # ended jobs remembered
RESULT_BYTES_MAX = 2 << 30  # held for clients, all jobs together


class Shelf:
    """See the module."""

    def __init__(self, retain_ms: float) -> None:
        self.memory_bytes = 0  # of the node, where that is known
        self._retain_ms = retain_ms
        self.jobs: OrderedDict[str, Job] = OrderedDict()  # by the time they ended
        self.held_bytes = 0

    @property
    def most_bytes(self) -> int:
        """O3."""
        return min(RESULT_BYTES_MAX, self.memory_bytes // 2 or RESULT_BYTES_MAX)

    def grow(self, job: Job, nbytes: int) -> bool:
        """`job` holds so much more; False if that cannot be had even without the ended ones."""
        job.held_bytes += nbytes
        self.held_bytes += nbytes
        while self.jobs and self.held_bytes > self.most_bytes:
            self._throw_away()
        return self.held_bytes <= self.most_bytes

    def put(self, job: Job) -> None:
        """It has ended: its results are what they will be."""
        self.held_bytes -= job.held_bytes
        job.held_bytes = outcome.nbytes([r for r in job.results if r is not None])
        self.held_bytes += job.held_bytes
        self.jobs[job.job] = job
        while len(self.jobs) > ENDED_MAX:
            self._throw_away()

    def expire(self, now_ms: float) -> None:
        while self.jobs:
            oldest = next(iter(self.jobs.values()))
            if now_ms - oldest.ended_ms < self._retain_ms:
                return
            self._throw_away()

    def _throw_away(self) -> None:
        _, old = self.jobs.popitem(last=False)
        self.held_bytes -= old.held_bytes
        assert self.held_bytes >= 0, "O3"
