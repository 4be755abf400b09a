"""Futures of jobs and of single tasks: `concurrent.futures.Future`s that a cluster completes."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from manifold.kernel.errors import Exhausted, ManifoldError, Trap
from manifold.kernel.hyperbus.faults import to_error
from manifold.kernel.hyperbus.messages import Failure
from manifold.kernel.process.messages import Fault
from manifold.kernel.scheduler.messages import JobStatus


class JobFailed(ManifoldError):
    """A job failed for a reason that is not its program's."""

    code = "job_failed"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is: indices done of all, shards made, attempts that had to be repeated."""

    done: int
    total: int
    shards: int
    retries: int
    elapsed_ms: float


def error_of(fault: Fault, status: JobStatus | None = None) -> ManifoldError:
    """The exception that a fault is raised as at the client, with where it happened.

    A node knows a program by its KID alone; with `status` the user reads the name they gave.
    """
    message = fault.message
    if status is not None and status.name:
        message = message.replace(status.program, status.name)
    if fault.code == Trap.code:
        on = f" on {fault.node}" if fault.node else ""
        return Trap(
            f"{message.rstrip('.')}{on}.", fault.next_step, line=fault.line,
            instruction=fault.instruction, cells=fault.cells, index=fault.index,
        )  # fmt: skip
    if fault.code == Exhausted.code:
        return Exhausted(message, fault.next_step)
    return to_error(Failure(fault.code, message, fault.next_step))


class Future(concurrent.futures.Future[Any]):
    """The result of a job or task. `cancel` ends it in the cluster; `progress` says how far it is.

    `result(timeout)` raises `Trap` where the program failed, `Exhausted` where a limit was
    reached, `concurrent.futures.CancelledError` where it was cancelled.
    """

    def __init__(self, job: str, cancel: Callable[[str], None]) -> None:
        super().__init__()
        self.job = job
        self.status: JobStatus | None = None
        self._cancel_job = cancel

    def progress(self) -> Progress | None:
        """The latest known, None before the first report."""
        status = self.status
        if status is None:
            return None
        return Progress(status.done, status.total, status.shards, status.retries, status.elapsed_ms)

    def cancel(self) -> bool:
        """Cancel the job in the cluster; False where it has ended already."""
        if self.done():
            return self.cancelled()
        self._cancel_job(self.job)
        return super().cancel()
