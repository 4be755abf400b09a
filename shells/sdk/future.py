"""Futures of jobs and of single tasks: `concurrent.futures.Future`s that a cluster completes."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from manifold.kernel.errors import Exhausted, ManifoldError, Trap
from manifold.kernel.hyperbus.faults import to_error
from manifold.kernel.hyperbus.messages import Failure
from manifold.kernel.process.messages import Fault
from manifold.kernel.scheduler.messages import JobStatus

if TYPE_CHECKING:
    from manifold.kernel.geode.messages import Decision
    from manifold.shells.sdk.client import Client


log = logging.getLogger("manifold.sdk")
CANCELLED = "CANCELLED"  # of concurrent.futures: cancelled, and nobody was told yet


class JobFailed(ManifoldError):
    """A job failed for a reason that is not its program's."""

    code = "job_failed"


class RemoteTraceback(Exception):
    """The traceback of an exception as it was in its task process: the cause of the one here."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"\n{self.text}"


class RemoteError(ManifoldError):
    """An exception of a call that cannot be had here itself: its class could not be read."""

    code = "remote_error"


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
    """The result of a job, a task or a call. `cancel` ends it, `progress` says how far it is.

    `result(timeout)` raises `Trap` where a program failed, the function's own exception where a
    call did, `Exhausted` where a limit was reached, `concurrent.futures.CancelledError` where it
    was cancelled. In a coroutine it can be awaited; cancelling the awaiting task cancels it.
    """

    def __init__(self, job: str = "", client: Client | None = None) -> None:
        super().__init__()
        self.job = job
        self.status: JobStatus | None = None
        self.on_cancel: Callable[[], None] | None = None  # on the connection's thread, once sent
        self._client = client

    def progress(self) -> Progress | None:
        """The latest known, None before the first report."""
        status = self.status
        if status is None:
            return None
        return Progress(status.done, status.total, status.shards, status.retries, status.elapsed_ms)

    def why(self) -> tuple[Decision, ...]:
        """How it was placed, and why there; `NotFound` where it was not placed yet."""
        assert self._client is not None, "a future of a client"
        return self._client.why(self.job)

    def cancel(self) -> bool:
        """Cancel it in the cluster; False where it has ended already, or runs for an `Executor`.

        Calls that share a job end when all of them are cancelled; until then, the result of one
        that is cancelled is thrown away.
        """
        if not super().cancel():
            return False
        self._tell_cancelled()
        if self.on_cancel is not None and self._client is not None:
            self._client.soon(self.on_cancel)
        return True

    def _tell_cancelled(self) -> None:
        """Who waits for it, by `wait` or `as_completed`, is told."""
        with self._condition:
            if self._state == CANCELLED:
                self.set_running_or_notify_cancel()

    def begin(self) -> bool:
        """It is being sent: from now on it runs. False where it was cancelled before."""
        with self._condition:
            return not self.cancelled() and self.set_running_or_notify_cancel()

    def __await__(self) -> Generator[Any, None, Any]:
        return asyncio.wrap_future(self).__await__()


def settle(future: Future, settled: Callable[[], None]) -> None:
    """Give a future what it waited for, unless somebody cancelled it meanwhile."""
    if future.done():
        return
    try:
        settled()
    except concurrent.futures.InvalidStateError:
        if not future.done():
            raise
    except BaseException:  # a callback's, such as SystemExit, that must not end our thread
        if not future.done():
            raise
        log.exception("a callback of %r failed", future)


def cancel_here(future: Future) -> None:
    """Mark a future cancelled without asking the cluster again."""
    future.on_cancel = None
    if not future.cancel():
        settle(future, lambda: future.set_exception(concurrent.futures.CancelledError()))
