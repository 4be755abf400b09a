"""The client: submit work to a cluster, ask about it, wait for it.

Interface rules: blocking methods may be called from any thread; what starts with an underscore and
is a coroutine runs on the connection's thread. A job's id is its idempotency token: where the node
that owns it is lost, the client attaches to another and submits it again under the same id, which
gives the same result since programs have no effects beyond it.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import msgspec

from manifold.kernel import messages as m
from manifold.kernel.errors import ManifoldError, Maybe, NoCluster, NotFound, Unavailable
from manifold.kernel.geode.messages import Decision, Demand
from manifold.kernel.scheduler.messages import (
    INDICES_EXPLICIT_MAX,
    FetchResult,
    JobSpec,
    JobStatus,
    KillJob,
    Reduction,
    ResultPart,
    SubmitJob,
    WatchJob,
    WhyAnswer,
    WhyTask,
)
from manifold.shells.sdk.connection import Connection
from manifold.shells.sdk.future import Future, JobFailed, error_of
from manifold.vm.kid import Kid
from manifold.vm.runtime.results import Partial, finish

if TYPE_CHECKING:
    from manifold.shells.sdk.programs import Source
    from manifold.vm.syntax import Program

CHECK_S = 1.0  # a job of which nothing was heard for so long is asked about
ASK_TIMEOUT_MS = 1500.0
RESUBMITS_MAX = 20
LOST_S = 5.0  # with no node that answers: a supervisor starts a node again within a second
REATTACH_S = 0.25
TASKS_PER_BATCH_MAX = 4096
FETCHES = 4  # parts of a large result asked for at once

Number = int | float


def _program_of(source: Source) -> Program:
    from manifold.shells.sdk.programs import program_of  # the assembler: not every client needs it

    return program_of(source)


def new_job() -> str:
    """A job id nobody else has: 64 random bits."""
    return "J-" + os.urandom(8).hex()


class _Job:
    """One submitted job on the connection's thread."""

    __slots__ = (
        "answer",
        "finished",
        "futures",
        "heard_s",
        "ir",
        "lost_s",
        "resubmits",
        "spec",
        "task",
    )

    def __init__(self, spec: JobSpec, ir: bytes, futures: list[Future]) -> None:
        self.spec = spec
        self.ir = ir
        self.futures = futures
        self.answer: asyncio.Future[Any] | None = None  # to the submission, once it was sent
        self.heard_s = 0.0
        self.lost_s = 0.0
        self.resubmits = 0
        self.finished = asyncio.Event()
        self.task: asyncio.Task[None] | None = None


class Client:
    """Attached to one node of a cluster. Use as a context manager, or `close` it.

    >>> with manifold.connect() as m:
    ...     m.parallel_for("examples/collatz.ent", 1, 1_000_000, reduce="sum")
    """

    def __init__(
        self, cluster: str = "", *, node: str = "", environ: Mapping[str, str] | None = None
    ) -> None:
        environ = os.environ if environ is None else environ
        self.cluster = cluster or environ.get("MANIFOLD_CLUSTER", "") or "default"
        self._jobs: dict[str, _Job] = {}
        self._pending: deque[tuple[Program, int, tuple[Number, ...], Future]] = deque()
        self._pending_lock = threading.Lock()
        self._connection = Connection(self.cluster, environ, self._pushed, node)
        self._tasks: set[asyncio.Task[None]] = set()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the cluster; jobs that were not waited for go on there."""
        for job in list(self._jobs.values()):
            if job.task is not None:
                self._connection.loop.call_soon_threadsafe(job.task.cancel)
        self._connection.close()

    @property
    def node(self) -> str:
        """The alias of the node we are attached to."""
        attached = self._connection.attached
        return attached.alias if attached is not None else ""

    # -- work ---------------------------------------------------------------------------------

    def job(
        self,
        program: Source,
        lo: int,
        hi: int,
        *,
        reduce: Reduction = "collect",
        arguments: Sequence[Number] = (),
        timeout_ms: float = 0.0,
        demand: Demand | None = None,
        name: str = "",
        job: str = "",
    ) -> Future:
        """Start `program` over the half-open range `[lo, hi)`; returns at once.

        `arguments` go to the cells after the index. `job` resubmits under an id of yours.
        """
        loaded = _program_of(program)
        spec = JobSpec(
            loaded.kid, lo, hi, reduce, tuple(arguments), False, (), timeout_ms,
            name or (str(program)[:100] if isinstance(program, str | Path) else ""),
            demand or Demand(),
        )  # fmt: skip
        identity = job or new_job()
        future = Future(identity, self._kill_soon)
        entry = _Job(spec, loaded.ir, [future])
        self._connection.loop.call_soon_threadsafe(self._start, identity, entry)
        return future

    def parallel_for(
        self,
        program: Source,
        lo: int,
        hi: int,
        *,
        reduce: Reduction = "collect",
        arguments: Sequence[Number] = (),
        timeout_s: float | None = None,
        progress: Callable[[Future], None] | None = None,
    ) -> Any:
        """Run `program` over `[lo, hi)` and return the reduced result.

        `sum`, `min`, `max` and `count` give a number, `collect` a list with an entry per index.
        Ctrl-C cancels the job. `progress` is called with the future about five times a second.
        """
        timeout_ms = (timeout_s or 0.0) * 1000
        future = self.job(
            program, lo, hi, reduce=reduce, arguments=arguments, timeout_ms=timeout_ms
        )
        return self.wait(future, progress)

    def wait(self, future: Future, progress: Callable[[Future], None] | None = None) -> Any:
        """The future's result; a `KeyboardInterrupt` cancels its job."""
        try:
            while progress is not None and not future.done():
                try:
                    return future.result(0.2)
                except TimeoutError:
                    progress(future)
            return future.result()
        except KeyboardInterrupt:
            self._kill_now(future)
            raise

    def _kill_now(self, future: Future) -> None:
        """Cancel, and know that the cluster has heard it: the caller is about to leave."""
        try:
            self.kill(future.job)
        except ManifoldError:
            return  # it has ended, or its owner has
        finally:
            concurrent_cancel(future)

    def submit(self, program: Source, index: int, *arguments: Number) -> Future:
        """One task: `program` for one index. Many at once travel together, each with its own
        result or fault."""
        loaded = _program_of(program)
        future = Future("", self._kill_soon)
        with self._pending_lock:
            first = not self._pending
            self._pending.append((loaded, index, arguments, future))
        if first:
            self._connection.loop.call_soon_threadsafe(self._flush_tasks)
        return future

    def _flush_tasks(self) -> None:
        with self._pending_lock:
            pending, self._pending = self._pending, deque()
        groups: dict[tuple[Kid, tuple[Number, ...]], list[tuple[int, Future]]] = {}
        programs: dict[Kid, Program] = {}
        for program, index, arguments, future in pending:
            programs[program.kid] = program
            groups.setdefault((program.kid, arguments), []).append((index, future))
        assert TASKS_PER_BATCH_MAX <= INDICES_EXPLICIT_MAX
        for (kid, arguments), tasks in groups.items():
            for at in range(0, len(tasks), TASKS_PER_BATCH_MAX):
                batch = tasks[at : at + TASKS_PER_BATCH_MAX]
                self._start_batch(programs[kid], arguments, batch)

    def _start_batch(
        self, program: Program, arguments: tuple[Number, ...], batch: list[tuple[int, Future]]
    ) -> None:
        identity = new_job()
        futures = [future for _, future in batch]
        for future in futures:
            future.job = identity
        indices = tuple(index for index, _ in batch)
        spec = JobSpec(
            program.kid, 0, len(batch), "collect", arguments, True, indices, 0.0, "tasks"
        )
        self._start(identity, _Job(spec, program.ir, futures))

    def _start(self, identity: str, job: _Job) -> None:
        self._jobs[identity] = job
        submission = SubmitJob(identity, job.spec, job.ir)
        job.answer = self._connection.ask_now(submission, ASK_TIMEOUT_MS)
        job.task = self._connection.loop.create_task(self._shepherd(identity, job))

    # -- one job, on the connection's thread --------------------------------------------------

    async def _shepherd(self, identity: str, job: _Job) -> None:
        """See a job through: submit it, watch it, fetch its result, resubmit where it is lost."""
        loop = self._connection.loop
        try:
            await self._submit(identity, job)
            while not job.finished.is_set():
                try:
                    async with asyncio.timeout(CHECK_S):
                        await job.finished.wait()
                except TimeoutError:
                    if loop.time() - job.heard_s >= CHECK_S:
                        await self._ask(identity, job)
        except ManifoldError as error:
            self._fail(job, error)
        except asyncio.CancelledError:
            self._fail(job, Unavailable("The client was closed before the job ended."))
            raise
        finally:
            self._jobs.pop(identity, None)

    async def _submit(self, identity: str, job: _Job) -> None:
        message = SubmitJob(identity, job.spec, job.ir)
        while True:
            answer, job.answer = job.answer, None
            try:
                status = await (answer or self._connection.request(message, ASK_TIMEOUT_MS))
            except ManifoldError as error:
                if error.code not in ("maybe", "unavailable", "no_cluster") or (
                    error.code == "unavailable" and await self._connection.lives()
                ):
                    raise
                await self._elsewhere(job, error)
                continue
            job.heard_s = self._connection.loop.time()
            await self._heard(identity, job, status)
            return

    async def _elsewhere(self, job: _Job, error: ManifoldError) -> None:
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

    async def _ask(self, identity: str, job: _Job) -> None:
        try:
            status = await self._connection.request(WatchJob(identity), ASK_TIMEOUT_MS)
        except NotFound:
            job.resubmits += 1
            if job.resubmits > RESUBMITS_MAX:
                raise
            await self._submit(identity, job)  # its owner is gone, and the job with it
        except ManifoldError as error:
            if error.code == "not_found":
                await self._submit(identity, job)
                return
            await self._elsewhere(job, error)
        else:
            job.heard_s = self._connection.loop.time()
            await self._heard(identity, job, status)

    def _pushed(self, message: Any) -> None:
        if not isinstance(message, JobStatus):
            return
        job = self._jobs.get(message.job)
        if job is None:
            return
        job.heard_s = self._connection.loop.time()
        task = self._connection.loop.create_task(self._heard(message.job, job, message))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _heard(self, identity: str, job: _Job, status: JobStatus) -> None:
        for future in job.futures:
            future.status = status
        if status.state == "running" or job.finished.is_set():
            return
        if status.state == "done":
            try:
                results = status.results
                if results is None:
                    results = await self._fetch(identity, status.parts)
                self._complete(job, status, results)
            except ManifoldError as error:
                self._fail(job, error)
        elif status.fault is not None:
            self._fail(job, error_of(status.fault, status))
        else:
            for future in job.futures:
                if not future.done():
                    concurrent_cancel(future)
        job.finished.set()

    async def _fetch(self, identity: str, parts: int) -> tuple[Any, ...]:
        found: list[Any] = []
        while len(found) < parts:
            part = await self._connection.request(FetchResult(identity, len(found)))
            if not isinstance(part, ResultPart) or not part.results:
                raise JobFailed("The result is not held any more.", "Run the job again.")
            found += part.results
        return tuple(found)

    def _complete(self, job: _Job, status: JobStatus, results: Sequence[Any]) -> None:
        if job.spec.isolate:
            for index, future, result in zip(job.spec.indices, job.futures, results, strict=True):
                if future.done():
                    continue
                if isinstance(result, Partial):
                    entries = finish("collect", result, index, index + 1)
                    assert isinstance(entries, list)
                    future.set_result(_one(result, entries))
                else:
                    future.set_exception(error_of(result))
            return
        value = _value(job.spec, status.block, results)
        for future in job.futures:
            if not future.done():
                future.set_result(value)

    def _fail(self, job: _Job, error: ManifoldError) -> None:
        for future in job.futures:
            if not future.done():
                future.set_exception(error)
        job.finished.set()

    def _kill_soon(self, identity: str) -> None:
        def send() -> None:
            task = self._connection.loop.create_task(self._kill_quietly(identity))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        self._connection.loop.call_soon_threadsafe(send)

    async def _kill_quietly(self, identity: str) -> None:
        try:
            await self._connection.request(KillJob(identity))
        except ManifoldError:
            return  # it has ended, or its owner has: either way it does not run

    # -- questions ----------------------------------------------------------------------------

    def ask(self, body: msgspec.Struct, node: str = "") -> Any:
        """One system call, answered by the node we are attached to or by `node`."""
        return self._connection.call(self._connection.request(body, destination=node))

    def nodes(self) -> tuple[m.NodeInfo, ...]:
        """Every node that is known, by alias."""
        answer: m.NodeList = self.ask(m.AllNodes())
        return answer.nodes

    def jobs(self) -> m.JobsList:
        """Every job that a live node owns or remembers."""
        answer: m.JobsList = self.ask(m.AllJobs())
        return answer

    def processes(self) -> m.Processes:
        """What the workers of every node compute."""
        answer: m.Processes = self.ask(m.AllProcesses())
        return answer

    def status(self, job: str) -> JobStatus:
        """One job as its owner sees it."""
        answer: JobStatus = self.ask(WatchJob(job))
        return answer

    def kill(self, job: str) -> JobStatus:
        """Cancel a job; its status after that."""
        answer: JobStatus = self.ask(KillJob(job))
        return answer

    def why(self, task: str) -> tuple[Decision, ...]:
        """How a job's shards (`J-…`) or one shard (`J-…/3`) were placed, and why there."""
        answer: WhyAnswer = self.ask(WhyTask(task))
        return answer.decisions

    def log(self, node: str, after: int = 0, contains: str = "") -> m.LogLines:
        """Lines of one node's log after a number, and the number to go on from."""
        answer: m.LogLines = self.ask(m.ReadLog(after, contains), node)
        return answer


def concurrent_cancel(future: Future) -> None:
    """Mark a future cancelled without asking the cluster again."""
    super(Future, future).cancel()


def _one(result: Partial, entries: list[Any]) -> Any:
    """A task's result: its one value, or the list of what it emitted."""
    if len(entries) == 1:
        return entries[0]
    return entries


def _value(spec: JobSpec, block: int, results: Sequence[Any]) -> Any:
    if spec.reduce != "collect":
        whole = results[0] if results else Partial()
        return finish(spec.reduce, whole, spec.lo, spec.hi)
    collected: list[Any] = []
    at = spec.lo
    for result in results:
        assert isinstance(result, Partial)
        end = min(at + block, spec.hi)
        part = finish("collect", result, at, end)
        assert isinstance(part, list)
        collected += part
        at = end
    return collected
