"""The client: submit work to a cluster, ask about it, wait for it.

Interface rules: blocking methods may be called from any thread; what starts with an underscore runs
on the connection's thread. What a client has submitted ends with it, unless it was detached.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import wait
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import msgspec

from manifold.kernel import messages as m
from manifold.kernel import places
from manifold.kernel.errors import ManifoldError
from manifold.kernel.geode.messages import Decision, Demand
from manifold.kernel.nexus.messages import Changed
from manifold.kernel.observe.messages import Form, GetMetrics, Metrics, Profile, ProfileNode
from manifold.kernel.process.messages import Value
from manifold.kernel.scheduler.messages import (
    INDICES_EXPLICIT_MAX,
    JobSpec,
    JobStatus,
    KillJob,
    Reduction,
    WatchJob,
    WhyAnswer,
    WhyTask,
)
from manifold.shells.sdk import tracing
from manifold.shells.sdk.connection import REQUEST_TIMEOUT_MS, Connection
from manifold.shells.sdk.future import Future, cancel_here, error_of, settle
from manifold.shells.sdk.jobs import Awaited, Job, Jobs
from manifold.shells.sdk.placing import Where, demand_of, wishes_of
from manifold.shells.sdk.progress import PROGRESS_S, Shown, is_program, shown
from manifold.vm.kid import Kid
from manifold.vm.runtime.results import Partial, finish

if TYPE_CHECKING:
    from manifold.shells.sdk.calls import Calls
    from manifold.shells.sdk.globals import Globals
    from manifold.shells.sdk.globals_calls import Calls as GlobalsCalls
    from manifold.shells.sdk.programs import Source
    from manifold.vm.syntax import Program

TASKS_PER_BATCH_MAX = 4096
QUEUES_MAX = 16  # of calls, for as many kinds of wishes in use at a time

Number = int | float


def _program_of(source: Source) -> Program:
    from manifold.shells.sdk.programs import program_of  # the assembler: not every client needs it

    return program_of(source)


class Client:
    """Attached to one node of a cluster. Use as a context manager, or `close` it.

    >>> with manifold.connect() as m:
    ...     m.parallel_for("examples/collatz.ent", 1, 1_000_000, reduce="sum")
    ...     m.map(str.upper, ["any", "function"])
    """

    def __init__(
        self, cluster: str = "", *, node: str = "", environ: Mapping[str, str] | None = None
    ) -> None:
        self.environ = os.environ if environ is None else environ
        self.cluster = cluster or self.environ.get("MANIFOLD_CLUSTER", "") or "default"
        self._pending: deque[tuple[Program, int, tuple[Number, ...], tuple[str, ...], Future]] = (
            deque()
        )
        self._pending_lock = threading.Lock()
        self._calls: OrderedDict[tuple[str, ...], Calls] = OrderedDict()  # by what they wish for
        self._queues: weakref.WeakSet[Calls] = weakref.WeakSet()
        self._folder: Path | None = None
        self._calls_of_globals: GlobalsCalls | None = None
        self._closing = threading.RLock()
        self.connection = Connection(self.cluster, self.environ, self._pushed, node)
        self.jobs_of = Jobs(self.connection)

    def _pushed(self, message: Any) -> None:
        if not isinstance(message, Changed):
            self.jobs_of.pushed(message)
        elif self._calls_of_globals is not None:
            self._calls_of_globals.registers.pushed(message)

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
        """Leave the cluster; what it computes for us alone ends, what was detached goes on."""
        with self._closing:
            if not self.connection.closed:
                for calls in list(self._queues):
                    calls.close()
                    calls.cancel_pending()
                if self._calls_of_globals is not None:
                    self.connection.call(self._calls_of_globals.registers.stop())
                self.connection.call(self.jobs_of.stop())
                tracing.flush()
            self.connection.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def node(self) -> str:
        """The alias of the node we are attached to."""
        attached = self.connection.attached
        return attached.alias if attached is not None else ""

    def folder(self) -> str:
        """Where large arguments and results lie for us alone."""
        if self._folder is None:
            path = places.spool_dir(self.cluster, self.environ) / self.connection.identity
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder = path
        return str(self._folder)

    # -- programs over ranges -----------------------------------------------------------------

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
        where: Where = (),
        name: str = "",
        job: str = "",
        detach: bool = False,
    ) -> Future:
        """Start `program` over the half-open range `[lo, hi)`; returns at once.

        `arguments` go to the cells after the index. It runs only on nodes that have the labels of
        `where`. `job` resubmits under an id of yours. What is `detach`ed goes on when this client
        has left.
        """
        loaded = _program_of(program)
        spec = JobSpec(
            loaded.kid, lo, hi, reduce, tuple(arguments), False, (), timeout_ms,
            name or (str(program)[:100] if isinstance(program, str | Path) else ""),
            demand_of(demand, where), effects=loaded.written,
        )  # fmt: skip
        future = Future("", self)
        entry = Job(spec, loaded.ir, _Whole(spec, future), job=job, detach=detach)
        future.job = entry.job
        future.on_cancel = partial(self.jobs_of.kill, entry.job)
        self.connection.loop.call_soon_threadsafe(self.jobs_of.start, entry)
        return future

    def parallel_for(
        self,
        program: Source,
        lo: int,
        hi: int,
        *,
        reduce: Reduction = "collect",
        arguments: Sequence[Number] = (),
        where: Where = (),
        timeout_s: float | None = None,
        progress: Shown = None,
    ) -> Any:
        """Run `program` over `[lo, hi)` and return the reduced result.

        `sum`, `min`, `max` and `count` give a number, `collect` a list with an entry per index.
        Ctrl-C cancels the job. `progress=True` draws a bar on a terminal; a function is called
        with the future about five times a second.
        """
        timeout_ms = (timeout_s or 0.0) * 1000
        future = self.job(
            program, lo, hi, reduce=reduce, arguments=arguments, where=where, timeout_ms=timeout_ms
        )
        return self.wait(future, progress)

    def wait(self, future: Future, progress: Shown = None) -> Any:
        """The future's result; a `KeyboardInterrupt` cancels its job."""
        try:
            with shown(progress) as show:
                while show is not None and not wait((future,), PROGRESS_S).done:
                    show(future)
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
            cancel_here(future)

    # -- functions ----------------------------------------------------------------------------

    def calls(
        self,
        *,
        workers: int = 0,
        initializer: Callable[..., Any] | None = None,
        initargs: Sequence[Any] = (),
        demand: Demand | None = None,
        where: Where = (),
    ) -> Calls:
        """A queue of calls with task processes of its own: what is beneath `Executor`."""
        from manifold.shells.sdk.calls import Calls

        calls = Calls(
            self, workers=workers, initializer=initializer, initargs=initargs,
            demand=demand_of(demand, where),
        )  # fmt: skip
        self._queues.add(calls)
        return calls

    def own_calls(self, where: Where = ()) -> Calls:
        """Those of `submit`, `map` and `reduce`: their futures can be cancelled while they run."""
        from manifold.shells.sdk.calls import Calls

        wishes = wishes_of(where)
        with self._pending_lock:
            calls = self._calls.get(wishes)
            if calls is None:
                calls = Calls(self, lenient=True, demand=demand_of(None, wishes))
                self._calls[wishes] = calls
                self._queues.add(calls)
                if len(self._calls) > QUEUES_MAX:  # what it has is done all the same
                    self._calls.popitem(last=False)
            self._calls.move_to_end(wishes)
        return calls

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future:
        """Call `function` somewhere on the cluster: a Python function, or a program for one index.

        Many at once travel together, each with its own result or exception.
        """
        if is_program(function):
            return self._submit_index((), function, *args, **kwargs)
        return self.own_calls().submit(function, args, kwargs)

    def submit_where(self, where: Where, function: Any, /, *args: Any, **kwargs: Any) -> Future:
        """`submit`, on a node that has the labels of `where`, such as `["site=lab", "!ssd"]`."""
        if is_program(function):
            return self._submit_index(wishes_of(where), function, *args, **kwargs)
        return self.own_calls(where).submit(function, args, kwargs)

    def map(
        self,
        function: Any,
        *iterables: Iterable[Any],
        chunksize: int = 0,
        where: Where = (),
        timeout_s: float | None = None,
        progress: Shown = None,
    ) -> list[Any]:
        """The results of `function` for each element (or one of each iterable), in order.

        Calls travel in chunks of `chunksize`, which is chosen where it is 0. The first exception is
        raised, and what was not begun is cancelled; so it is after `timeout_s`, and on Ctrl-C.
        """
        from manifold.shells.sdk.mapping import gathered, map_futures

        found = gathered(
            map_futures(self, function, iterables, chunksize, where), timeout_s, progress
        )
        assert isinstance(found, list)
        return found

    def reduce(
        self,
        function: Callable[[Any, Any], Any],
        items: Iterable[Any],
        *,
        chunksize: int = 0,
        where: Where = (),
        timeout_s: float | None = None,
        progress: Shown = None,
    ) -> Any:
        """`functools.reduce` in parallel: `function` has to be associative, `items` not empty."""
        from manifold.shells.sdk.mapping import gathered, reduce_futures

        return gathered(
            reduce_futures(self, function, items, chunksize, where), timeout_s, progress
        )

    # -- programs for single indices ----------------------------------------------------------

    def _submit_index(
        self, wishes: tuple[str, ...], program: Source, index: int, *arguments: Number
    ) -> Future:
        loaded = _program_of(program)
        future = Future("", self)
        with self._pending_lock:
            first = not self._pending
            self._pending.append((loaded, index, arguments, wishes, future))
        if first:
            self.connection.loop.call_soon_threadsafe(self._flush_tasks)
        return future

    def _flush_tasks(self) -> None:
        with self._pending_lock:
            pending, self._pending = self._pending, deque()
        groups: dict[tuple[Kid, tuple[Number, ...], tuple[str, ...]], list[tuple[int, Future]]] = {}
        programs: dict[Kid, Program] = {}
        for program, index, arguments, wishes, future in pending:
            programs[program.kid] = program
            groups.setdefault((program.kid, arguments, wishes), []).append((index, future))
        assert TASKS_PER_BATCH_MAX <= INDICES_EXPLICIT_MAX
        for (kid, arguments, wishes), tasks in groups.items():
            for at in range(0, len(tasks), TASKS_PER_BATCH_MAX):
                batch = tasks[at : at + TASKS_PER_BATCH_MAX]
                self._start_batch(programs[kid], arguments, wishes, batch)

    def _start_batch(
        self,
        program: Program,
        arguments: tuple[Number, ...],
        wishes: tuple[str, ...],
        batch: list[tuple[int, Future]],
    ) -> None:
        indices = tuple(index for index, _ in batch)
        futures = [future for _, future in batch]
        spec = JobSpec(
            program.kid, 0, len(batch), "collect", arguments, True, indices, 0.0, "tasks",
            demand_of(None, wishes), effects=program.written,
        )  # fmt: skip
        tasks = _Tasks(indices, futures)
        job = Job(spec, program.ir, tasks)
        tasks.kill = partial(self.jobs_of.kill, job.job)
        for future in futures:
            future.job, future.on_cancel = job.job, tasks.look
        self.jobs_of.start(job)
        tasks.look()

    # -- globals ------------------------------------------------------------------------------

    @property
    def globals(self) -> Globals:
        """Named values that the whole cluster agrees on: `client.globals["x"] = 1`."""
        from manifold.shells.sdk.globals import Globals

        return Globals(self)

    @property
    def calls_of_globals(self) -> GlobalsCalls:
        """What is beneath `globals`, in whatever form they are used."""
        if self._calls_of_globals is None:
            from manifold.shells.sdk.globals_calls import Calls
            from manifold.shells.sdk.registers import Registers

            with self._closing:
                if self._calls_of_globals is None:
                    self._calls_of_globals = Calls(Registers(self.connection))
        return self._calls_of_globals

    # -- WebAssembly --------------------------------------------------------------------------

    def command(
        self,
        path: str | Path,
        arguments: Sequence[str] = (),
        *,
        stdin: bytes = b"",
        environ: Mapping[str, str] | None = None,
        timeout_ms: float = 0.0,
        demand: Demand | None = None,
        where: Where = (),
        detach: bool = False,
    ) -> Future:
        """Run a WASI preview 1 program once; the result has `status`, `stdout` and `stderr`."""
        from manifold.shells.sdk.wasm import command_job, foreign_of

        program = foreign_of(Path(path))
        future = Future("", self)
        entry = command_job(
            program, (program.name, *arguments), future, stdin=stdin, environ=environ,
            timeout_ms=timeout_ms, demand=demand_of(demand, where), detach=detach,
        )  # fmt: skip
        future.job = entry.job
        future.on_cancel = partial(self.jobs_of.kill, entry.job)
        self.connection.loop.call_soon_threadsafe(self.jobs_of.start, entry)
        return future

    def module(
        self, path: str | Path, lo: int, hi: int, *, detach: bool = False, **options: Any
    ) -> Future:
        """Start an exported function of a WebAssembly module over `[lo, hi)`.

        `entry` names the function where there are several; other options are those of `job`.
        """
        from manifold.shells.sdk.wasm import foreign_of, module_spec

        program = foreign_of(Path(path))
        spec = module_spec(program, lo, hi, **options)
        future = Future("", self)
        entry = Job(spec, program.data, _Whole(spec, future), detach=detach)
        future.job = entry.job
        future.on_cancel = partial(self.jobs_of.kill, entry.job)
        self.connection.loop.call_soon_threadsafe(self.jobs_of.start, entry)
        return future

    # -- questions ----------------------------------------------------------------------------

    def ask(
        self, body: msgspec.Struct, node: str = "", timeout_ms: float = REQUEST_TIMEOUT_MS
    ) -> Any:
        """One system call, answered by the node we are attached to or by `node`."""
        return self.connection.call(self.connection.request(body, timeout_ms, node))

    def nodes(self) -> tuple[m.NodeInfo, ...]:
        """Every node that is known, by alias."""
        return self.connection.call(self.ask_nodes())

    async def ask_nodes(self) -> tuple[m.NodeInfo, ...]:
        answer: m.NodeList = await self.connection.request(m.AllNodes())
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

    def soon(self, function: Callable[[], None]) -> None:
        """Run on the connection's thread, as long as there is one."""
        with contextlib.suppress(RuntimeError):  # the loop has been closed
            self.connection.loop.call_soon_threadsafe(function)

    def why(self, task: str) -> tuple[Decision, ...]:
        """How a job's shards (`J-…`) or one shard (`J-…/3`) were placed, and why there."""
        answer: WhyAnswer = self.ask(WhyTask(task))
        return answer.decisions

    def log(self, node: str, after: int = 0, contains: str = "") -> m.LogLines:
        """Lines of one node's log after a number, and the number to go on from."""
        answer: m.LogLines = self.ask(m.ReadLog(after, contains), node)
        return answer

    def metrics(self, node: str = "", form: Form = "text") -> Metrics:
        """One node's metrics, as text for Prometheus or as families to read."""
        answer: Metrics = self.ask(GetMetrics(form), node)
        return answer

    def profile(self, node: str = "", seconds: float = 10.0, hz: int = 100) -> Profile:
        """Where a node's threads are, looked at `hz` times a second while it goes on serving."""
        asked = ProfileNode(seconds, hz)
        timeout_ms = seconds * 1000 + REQUEST_TIMEOUT_MS
        answer: Profile = self.connection.call(self.connection.look(asked, timeout_ms, node))
        return answer


class _Whole(Awaited):
    """One future for the whole of a job."""

    def __init__(self, spec: JobSpec, future: Future) -> None:
        self._spec = spec
        self._future = future

    def progress(self, status: JobStatus) -> None:
        self._future.status = status

    def some(self, first: int, results: Sequence[Any]) -> None:
        raise AssertionError("only a job of tasks tells some of its results")

    def done(self, status: JobStatus, first: int, results: Sequence[Any]) -> None:
        value = _value(self._spec, status.block, results)
        settle(self._future, lambda: self._future.set_result(value))

    def failed(self, error: BaseException) -> None:
        settle(self._future, lambda: self._future.set_exception(error))

    def cancelled(self) -> None:
        cancel_here(self._future)


class _Tasks(Awaited):
    """A future for each index."""

    def __init__(self, indices: Sequence[int], futures: Sequence[Future]) -> None:
        self._indices = indices
        self._futures = futures
        self.kill: Callable[[], None] | None = None

    def look(self) -> None:
        """End the job where nobody waits for any of it."""
        if self.kill is not None and all(future.cancelled() for future in self._futures):
            self.kill()

    def progress(self, status: JobStatus) -> None:
        for future in self._futures:
            future.status = status

    def some(self, first: int, results: Sequence[Any]) -> None:
        last = first + len(results)
        tasks = zip(self._indices[first:last], self._futures[first:last], results, strict=True)
        for index, future, result in tasks:
            if isinstance(result, Partial):
                value = _one(finish("collect", result, index, index + 1))
                settle(future, lambda f=future, v=value: f.set_result(v))  # type: ignore[misc]
            else:
                assert not isinstance(result, Value)
                error = error_of(result)
                settle(future, lambda f=future, e=error: f.set_exception(e))  # type: ignore[misc]

    def done(self, status: JobStatus, first: int, results: Sequence[Any]) -> None:
        self.some(first, results)

    def failed(self, error: BaseException) -> None:
        for future in self._futures:
            settle(future, lambda f=future: f.set_exception(error))  # type: ignore[misc]

    def cancelled(self) -> None:
        for future in self._futures:
            cancel_here(future)


def _one(entries: Any) -> Any:
    """A task's result: its one value, or the list of what it emitted."""
    assert isinstance(entries, list)
    return entries[0] if len(entries) == 1 else entries


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
