"""Jobs of a client: submitted, watched, fetched, and submitted again where their owner is lost.

Interface rules: everything here runs on the connection's thread. `Awaited` is who waits for a job;
exactly one of `done`, `failed` and `cancelled` is called on it, once. A job's id is its idempotency
token: where the node that owns it is lost, the client attaches to another and submits it again
under the same id.
"""

from __future__ import annotations

import asyncio
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import msgspec

from manifold.kernel.errors import ManifoldError, Maybe, NoCluster, NotFound, Unavailable
from manifold.kernel.scheduler.messages import (
    ORIGINS_MAX,
    FetchResult,
    JobSpec,
    JobStatus,
    KillJob,
    ResultPart,
    SubmitJob,
    WatchJob,
)
from manifold.kernel.tasks.inside import lend
from manifold.kernel.tasks.messages import Parcel
from manifold.shells.sdk import tracing
from manifold.shells.sdk.connection import Connection
from manifold.shells.sdk.future import JobFailed, error_of
from manifold.vm.kid import Kid

CHECK_S = 1.0  # a job of which nothing was heard for so long is asked about
ALIVE_S = 10.0  # who took a job over ends it where no client has asked about it for 30 s
ASK_TIMEOUT_MS = 1500.0
RESUBMITS_MAX = 20
LOST_S = 5.0  # with no node that answers: a supervisor starts a node again within a second
REATTACH_S = 0.25
BUSY_S = 0.25
CLOSED = "The client was closed before the job ended."
KILLS_MAX = 3  # at ten seconds each
GOES_ON = ("queued", "running")  # states of a job that has not ended


def new_job() -> str:
    """A job id nobody else has: 64 random bits."""
    return "J-" + os.urandom(8).hex()


class Awaited(ABC):
    """Who waits for one job."""

    @abstractmethod
    def progress(self, status: JobStatus) -> None:
        """Where it stands."""

    @abstractmethod
    def some(self, first: int, results: Sequence[Any]) -> None:
        """Results of a job of tasks from `first` on, before all of them are there."""

    @abstractmethod
    def done(self, status: JobStatus, first: int, results: Sequence[Any]) -> None:
        """All that was not told by `some`: the results from `first` on."""

    @abstractmethod
    def failed(self, error: BaseException) -> None:
        """There will be no result, and why."""

    @abstractmethod
    def cancelled(self) -> None:
        """Somebody has ended it."""


class Job:
    """One submitted job."""

    __slots__ = (
        "answer", "asked_s", "awaited", "detach", "fetching", "finished", "heard_s", "ir", "job",
        "killed", "lost_s", "origins", "owner", "parcels", "resubmits", "span", "spec", "taken",
        "task",
    )  # fmt: skip

    def __init__(
        self,
        spec: JobSpec,
        ir: bytes,
        awaited: Awaited,
        *,
        job: str = "",
        parcels: tuple[Parcel, ...] = (),
        detach: bool = False,
    ) -> None:
        # Text that is no UTF-8 is refused to who made the job; on the loop nobody would hear.
        msgspec.msgpack.encode(spec)
        self.job = job or new_job()
        self.spec = spec
        self.ir = ir
        self.parcels = parcels
        self.detach = detach
        self.awaited = awaited
        self.answer: asyncio.Future[Any] | None = None  # to the submission, once it was sent
        self.heard_s = 0.0
        self.asked_s = 0.0
        self.lost_s = 0.0
        self.resubmits = 0
        self.taken = 0  # results that were told by `some`
        self.fetching = False
        self.owner = ""  # which node has it, as it said last
        self.origins: tuple[Kid, ...] = ()  # which nodes have queued it: others are to know
        self.killed = False  # by us: it is not submitted again
        self.finished = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self.span: tracing.Submission | None = None

    def traced(self, cluster: str) -> None:
        """Begin its span, where traces are wanted; what computes it learns of that."""
        self.span = tracing.begin(self.job, self.spec, cluster)
        if self.span is not None:
            self.spec = msgspec.structs.replace(self.spec, trace=self.span.traceparent)

    def over(self, state: str, why: str = "") -> None:
        """Its outcome is known."""
        self.finished.set()
        if self.span is not None:
            self.span.end(state, why)

    @property
    def submission(self) -> SubmitJob:
        again = self.resubmits > 0
        return SubmitJob(
            self.job, self.spec, self.ir, True, self.parcels, self.detach, again, self.origins
        )


class Jobs:
    """See the module."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._jobs: dict[str, Job] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = False

    def start(self, job: Job) -> None:
        """Submit a job, now, and see it through."""
        if self._stopped:
            job.awaited.failed(Unavailable(CLOSED))
            return
        job.traced(self._connection.cluster)
        lend()  # a call that submits is going to wait: somebody else may have its slot
        self._jobs[job.job] = job
        job.answer = self._connection.ask_now(job.submission, ASK_TIMEOUT_MS)
        job.task = self._connection.loop.create_task(self._shepherd(job))

    async def stop(self) -> None:
        """The client leaves: nobody waits any more, and whoever did is told."""
        self._stopped = True
        tasks = list(self._tasks)
        for job in list(self._jobs.values()):
            self._fail(job, Unavailable(CLOSED))
            if job.answer is not None:
                job.answer.cancel()
            if job.task is not None:
                job.task.cancel()
                tasks.append(job.task)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def kill(self, name: str) -> None:
        """Cancel a job, without waiting for it."""
        job = self._jobs.get(name)
        if job is not None:
            job.killed = True
        self._run(self._kill(name, job.owner if job is not None else ""))

    def _run(self, coroutine: Any) -> None:
        task = self._connection.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _kill(self, name: str, owner: str, *, moved: bool = False) -> None:
        """Told to its owner itself: a node that is slow hears it when it goes on."""
        for _ in range(KILLS_MAX):
            try:
                await self._connection.request_of(owner, KillJob(name, moved))
            except ManifoldError as error:
                if error.code in ("maybe", "unavailable"):
                    continue
            return  # or it has ended, or its owner has: either way it does not run

    # -- one job ------------------------------------------------------------------------------

    async def _shepherd(self, job: Job) -> None:
        loop = self._connection.loop
        try:
            await self._submit(job)
            while not job.finished.is_set():
                try:
                    async with asyncio.timeout(CHECK_S):
                        await job.finished.wait()
                except TimeoutError:
                    now_s = loop.time()
                    if now_s - job.heard_s >= CHECK_S or now_s - job.asked_s >= ALIVE_S:
                        job.asked_s = now_s
                        await self._ask(job)
        except asyncio.CancelledError:
            self._fail(job, Unavailable(CLOSED))
            raise
        except Exception as error:  # whatever it is, somebody waits
            self._fail(job, error)
        finally:
            self._jobs.pop(job.job, None)

    async def _submit(self, job: Job) -> None:
        while True:
            answer, job.answer = job.answer, None
            try:
                status = await (answer or self._connection.request(job.submission, ASK_TIMEOUT_MS))
            except ManifoldError as error:
                if error.code == "busy" and job.spec.kind == "python":
                    await asyncio.sleep(BUSY_S)  # others' calls are before ours
                    continue
                if error.code not in ("maybe", "unavailable", "no_cluster") or (
                    error.code == "unavailable" and await self._connection.lives()
                ):
                    raise
                await self._elsewhere(job, error)
                continue
            job.heard_s = self._connection.loop.time()
            if job.owner not in ("", status.owner):  # it did not answer, and may have it still
                self._run(self._kill(job.job, job.owner, moved=True))
            job.owner = status.owner
            await self._heard(job, status)
            return

    async def _elsewhere(self, job: Job, error: ManifoldError) -> None:
        """Our node does not answer: attach to another, unless it lives after all."""
        job.resubmits += 1
        if job.resubmits > RESUBMITS_MAX:
            raise error
        if await self._connection.lives():
            return
        attached = self._connection.attached
        try:
            await self._connection.attach(attached.address if attached is not None else "")
        except NoCluster as gone:
            now_s = self._connection.loop.time()
            job.lost_s = job.lost_s or now_s
            if now_s - job.lost_s > LOST_S:
                raise Maybe(
                    "No node of the cluster answers any more; what became of the job is not known.",
                    "`manifold status` says whether it is back; a job may be run again.",
                ) from gone
            await asyncio.sleep(REATTACH_S)
        else:
            job.lost_s = 0.0

    async def _ask(self, job: Job) -> None:
        try:
            status = await self._connection.request(WatchJob(job.job), ASK_TIMEOUT_MS)
        except NotFound:  # its owner is gone, and the job with it
            job.resubmits += 1
            if job.resubmits > RESUBMITS_MAX:
                raise
            if job.killed:
                job.over("cancelled")
                job.awaited.cancelled()
                return
            await self._submit(job)
        except ManifoldError as error:
            await self._elsewhere(job, error)
        else:
            job.heard_s = self._connection.loop.time()
            job.owner = status.owner
            if job.killed and status.state in GOES_ON:
                self._run(self._kill(job.job, job.owner))
            await self._heard(job, status)

    # -- what is heard of it ------------------------------------------------------------------

    def pushed(self, message: Any) -> None:
        """What a node said unasked."""
        job = self._jobs.get(message.job) if isinstance(message, JobStatus) else None
        if job is None or (
            message.state != "done" and message.owner != (job.owner or message.owner)
        ):
            return  # nobody's, or of a node that had it once: its end there is not its end
        job.heard_s = self._connection.loop.time()
        if message.results is not None and not job.fetching and not job.finished.is_set():
            self._finish(job, message, message.results)  # at once: the usual end
        else:
            self._run(self._heard(job, message))

    async def _heard(self, job: Job, status: JobStatus) -> None:
        if job.finished.is_set():
            return
        if status.state == "queued" and status.owner not in job.origins:
            job.origins = (*job.origins, status.owner)[-ORIGINS_MAX:]
        if status.state in GOES_ON:
            job.awaited.progress(status)
            if job.spec.isolate and status.done > job.taken and not job.fetching:
                await self._fetch_some(job)
        elif status.state == "done":
            await self._finished(job, status)
        elif status.fault is not None:
            job.awaited.progress(status)
            self._fail(job, error_of(status.fault, status))
        else:
            job.awaited.progress(status)
            job.over("cancelled")
            job.awaited.cancelled()

    async def _finished(self, job: Job, status: JobStatus) -> None:
        results: Sequence[Any] | None = status.results
        if results is None:
            first = job.taken  # more may be taken while we fetch
            try:
                results = (*[None] * first, *await self._fetch(job, first, status.parts))
            except ManifoldError as error:
                if error.code not in ("maybe", "unavailable"):
                    self._fail(job, error)
                return  # its owner does not answer: the next question finds out what is to be done
        if not job.finished.is_set():
            self._finish(job, status, results)

    def _finish(self, job: Job, status: JobStatus, results: Sequence[Any]) -> None:
        job.over("done")
        try:
            job.awaited.progress(msgspec.structs.replace(status, results=None))
            job.awaited.done(status, job.taken, results[job.taken :])
        except Exception as error:
            job.awaited.failed(error)

    async def _fetch_some(self, job: Job) -> None:
        """Of a job of tasks that takes long, what is there already."""
        job.fetching = True
        try:
            part = await self._connection.request(FetchResult(job.job, job.taken))
        except ManifoldError:
            return  # the next progress asks again, and the end tells everything
        finally:
            job.fetching = False
        if isinstance(part, ResultPart) and part.results and not job.finished.is_set():
            first, job.taken = job.taken, job.taken + len(part.results)
            job.awaited.some(first, part.results)

    async def _fetch(self, job: Job, first: int, last: int) -> tuple[Any, ...]:
        found: list[Any] = []
        while first + len(found) < last:
            part = await self._connection.request(FetchResult(job.job, first + len(found)))
            if not isinstance(part, ResultPart) or not part.results:
                raise JobFailed("The result is not held any more.", "Run the job again.")
            found += part.results
        return tuple(found)

    def _fail(self, job: Job, error: BaseException) -> None:
        if not job.finished.is_set():
            left = job.detach and isinstance(error, Unavailable) and error.message == CLOSED
            job.over("detached" if left else "failed", str(error))
            job.awaited.failed(error)
