"""Calls of Python functions on a cluster: queued here, sent in batches, each with its own result.

Interface rules: `submit` may be called from any thread and returns at once. A lane is one job under
way; there are as many lanes as calls may run at a time. Short calls of one function share a job, as
many as take about `BATCH_MS`, so that thousands of them are not thousands of messages; a function
that was never seen, or takes longer, has a job for each call.
Invariants: Q1 a call that was not sent can be cancelled without the cluster; Q2 calls are sent in
the order in which they were submitted; Q3 what is under way is at most one batch a lane; Q4 neither
a call, nor its arguments, nor its result is kept here once its future is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from typing import TYPE_CHECKING, Any

from manifold.kernel.errors import ManifoldError
from manifold.kernel.geode.messages import Demand
from manifold.kernel.process.messages import PATHS_MAX, SETUP_BYTES_MAX, Fault, Session, Value
from manifold.kernel.scheduler.messages import JobSpec, JobStatus
from manifold.kernel.tasks.messages import Parcel
from manifold.kernel.tasks.parcel import dumps, pack, unpack
from manifold.shells.sdk.functions import Code, Functions
from manifold.shells.sdk.future import (
    Future,
    RemoteError,
    RemoteTraceback,
    cancel_here,
    error_of,
    settle,
)
from manifold.shells.sdk.jobs import Awaited, Job
from manifold.vm.kid import Kid

if TYPE_CHECKING:
    from manifold.shells.sdk.client import Client

BATCH_MS = 25.0  # of calls in one job: a round trip of 1 ms is 4 % of it
BATCH_MAX = 1024
BATCH_BYTES_MAX = 1 << 20
GROWTH = 8  # a batch is at most so many times as large as what was seen to be short
SHARE_MS = 1.0  # a batch is not cut up for other lanes below this
WEIGHT = 0.3  # of a newly seen time of a call
FUNCTIONS_MAX = 1024  # whose times are remembered
SLOTS_AGE_S = 5.0

LANES_MAX = 512  # jobs under way: half of what may wait for one node

Call = tuple[Code, Parcel, Future, Session]


class Calls:
    """See the module. `workers` 0: as many calls at a time as the cluster has slots.

    `lenient`: a future can be cancelled while it runs. Close it when nothing more is submitted.
    """

    def __init__(
        self,
        client: Client,
        *,
        workers: int = 0,
        initializer: Callable[..., Any] | None = None,
        initargs: Sequence[Any] = (),
        lenient: bool = False,
        demand: Demand | None = None,
    ) -> None:
        self.broken = ""
        self._client = client
        self._workers = workers
        self._lenient = lenient
        self._demand = demand or Demand()
        self._loop = client.connection.loop
        self._folder = client.folder()
        self._functions = Functions(self._folder)
        setup = dumps((initializer, tuple(initargs))) if initializer else b""
        if len(setup) > SETUP_BYTES_MAX:
            raise ValueError(
                f"the initializer and its arguments take {len(setup)} bytes pickled, more than "
                f"{SETUP_BYTES_MAX}: let the initializer load what is large"
            )
        self._setup = setup
        self._place: tuple[str, tuple[str, ...]] | None = None
        self._session = self._here()
        self._lock = threading.Lock()  # over what follows
        self._queue: deque[Call] = deque()
        self._woken = False
        self._closed = False
        # What follows is of the connection's thread alone.
        self._flying: dict[str, _Batch] = {}
        self._times_ms: OrderedDict[Kid, tuple[float, int]] = OrderedDict()
        self._slots = max(2, os.cpu_count() or 2)  # until the cluster has said
        self._slots_s = -SLOTS_AGE_S
        self._asking: asyncio.Task[None] | None = None

    @property
    def workers(self) -> int:
        """Calls that may run at a time."""
        if self._workers:
            return min(self._workers, LANES_MAX)
        self._slots = _slots_of(self._client.nodes())
        return self._slots

    # -- any thread ---------------------------------------------------------------------------

    def submit(
        self, function: Callable[..., Any] | Code, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Future:
        """Call `function` somewhere. What cannot be pickled is the future's exception."""
        if self._closed:
            raise RuntimeError("cannot schedule new futures after shutdown")
        if self.broken:
            raise BrokenExecutor(self.broken)
        future = Future("", self._client)
        try:
            code = function if isinstance(function, Code) else self._functions.code(function)
            parcel = pack((tuple(args), dict(kwargs)), self._folder)
        except Exception as error:
            future.set_running_or_notify_cancel()
            future.set_exception(error)
            return future
        with self._lock:
            self._queue.append((code, parcel, future, self._here()))
            wake, self._woken = not self._woken, True
        if wake:
            self._loop.call_soon_threadsafe(self._fill)
        return future

    def code(self, function: Callable[..., Any]) -> Code:
        """A function pickled now, for many calls; `submit` takes it in place of the function."""
        return self._functions.code(function)

    def _here(self) -> Session:
        """This process, as its calls are to find it: another session where that has changed."""
        place = _place()
        if place != self._place:
            self._place = place
            identity = self._client.connection.identity
            self._session = Session("S-" + os.urandom(8).hex(), identity, *place, self._setup)
        return self._session

    def cancel_pending(self) -> None:
        """Q1: every call that was not sent."""
        with self._lock:
            queue, self._queue = self._queue, deque()
        for _, parcel, future, _ in queue:
            future.cancel()
            self._forget(parcel)

    def _forget(self, parcel: Parcel) -> None:
        """Q4: nobody will read the arguments any more."""
        if parcel.path:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self._folder, parcel.path))

    def close(self, *, kill: bool = False) -> None:
        """Take no more calls; `kill` also ends those that run."""
        self._closed = True
        if kill:
            self.cancel_pending()
            self._loop.call_soon_threadsafe(self._kill)

    # -- the connection's thread --------------------------------------------------------------

    def _kill(self) -> None:
        for job in list(self._flying):
            self._client.jobs_of.kill(job)

    def _fill(self) -> None:
        """Send batches while there are free lanes."""
        with self._lock:
            self._woken = False
        lanes = min(self._workers or self._slots, LANES_MAX)
        while len(self._flying) < lanes:
            with self._lock:
                batch = self._take(lanes - len(self._flying))
            if not batch:
                break
            self._send(batch)
        if not self._workers and self._loop.time() - self._slots_s > SLOTS_AGE_S:
            self._slots_s = self._loop.time()
            self._asking = self._loop.create_task(self._count_slots())

    def _take(self, free: int) -> list[Call]:
        """The next calls that go together; those cancelled meanwhile are told so."""
        taken: list[Call] = []
        size = nbytes = 0
        while self._queue:
            code, parcel, future, session = self._queue[0]
            if taken and (
                code.kid != taken[0][0].kid
                or session is not taken[0][3]
                or len(taken) >= size
                or nbytes + parcel.nbytes > BATCH_BYTES_MAX
            ):
                break
            call = self._queue.popleft()
            if future.cancelled() or not (self._lenient or future.begin()):
                self._forget(parcel)
                continue
            if not taken:
                size = self._size(code.kid, 1 + len(self._queue), free)
            nbytes += parcel.nbytes
            taken.append(call)
        return taken

    def _size(self, function: Kid, queued: int, free: int) -> int:
        """How many calls of a function to send together."""
        known = self._times_ms.get(function)
        if known is None:
            return 1
        call_ms, seen = known
        most = min(BATCH_MS / max(call_ms, 1e-3), BATCH_MAX, GROWTH * seen)
        least = SHARE_MS / max(call_ms, 1e-3)
        return int(max(1, min(most, max(least, -(-queued // free)))))

    def _send(self, calls: list[Call]) -> None:
        code = calls[0][0]
        spec = JobSpec(
            code.kid, 0, len(calls), "collect", (), True, (), 0.0, code.name, self._demand,
            "python", self._workers > 0, "", calls[0][3],
        )  # fmt: skip
        parcels = tuple(parcel for _, parcel, _, _ in calls)
        batch = _Batch(self, code.kid, [future for _, _, future, _ in calls], parcels)
        job = Job(spec, code.data, batch, parcels=parcels)
        batch.job = job.job
        for _, _, future, _ in calls:
            future.job, future.on_cancel = job.job, batch.look
        self._flying[job.job] = batch
        try:
            self._client.jobs_of.start(job)
        except Exception as error:  # something in it cannot be sent
            batch.failed(error)
            return
        batch.look()  # some may have been cancelled between queue and job, by other threads

    def kill(self, job: str) -> None:
        """End what a batch does: nobody waits for any of it."""
        self._client.jobs_of.kill(job)

    def forget(self, parcels: Sequence[Parcel]) -> None:
        for parcel in parcels:
            self._forget(parcel)

    def landed(self, batch: _Batch) -> None:
        """A lane is free."""
        self._flying.pop(batch.job, None)
        self._fill()

    def took(self, function: Kid, call_ms: float, count: int) -> None:
        """Calls of a function took so long each."""
        known = self._times_ms.pop(function, None)
        if known is not None:
            before_ms, seen = known
            # What suddenly takes long counts at once: a batch of it would hold up its lane.
            weight = 1.0 if call_ms > 4 * before_ms else WEIGHT
            call_ms = before_ms + weight * (call_ms - before_ms)
            count = max(count, seen)
        self._times_ms[function] = (call_ms, count)
        if len(self._times_ms) > FUNCTIONS_MAX:
            self._times_ms.popitem(last=False)

    def breaks(self, why: str) -> None:
        """The initializer failed: nothing will run any more."""
        self.broken = self.broken or why
        with self._lock:
            queue, self._queue = self._queue, deque()
        for _, parcel, future, _ in queue:
            self._forget(parcel)
            if future.begin():
                future.set_exception(BrokenExecutor(why))

    async def _count_slots(self) -> None:
        try:
            self._slots = _slots_of(await self._client.ask_nodes()) or self._slots
        except ManifoldError:
            return  # what is under way says why; it is asked again later
        self._fill()

    @property
    def folder(self) -> str:
        return self._folder


class _Batch(Awaited):
    """Calls that share a job."""

    def __init__(
        self, calls: Calls, function: Kid, futures: Sequence[Future], parcels: Sequence[Parcel]
    ) -> None:
        self.calls = calls
        self._parcels = parcels
        self.function = function
        self.futures: list[Future | None] = list(futures)
        self.job = ""

    def progress(self, status: JobStatus) -> None:
        for future in self.futures:
            if future is not None:
                future.status = status

    def look(self) -> None:
        """End the job where nobody waits for any of it."""
        left = [future for future in self.futures if future is not None]
        if left and all(future.cancelled() for future in left):
            self.calls.kill(self.job)

    def some(self, first: int, results: Sequence[Any]) -> None:
        self._time(results)
        for at, result in enumerate(results, first):
            future, self.futures[at] = self.futures[at], None  # Q4
            self.calls.forget(self._parcels[at : at + 1])
            if future is not None:
                self._settle_surely(future, result)
            del future

    def _settle_surely(self, future: Future, result: Any) -> None:
        """Whatever the classes of results and exceptions do: who waits is told, and the next."""
        future.on_cancel = None
        try:
            self._settle(future, result)
        except BaseException as error:
            _fail(future, error)

    def done(self, status: JobStatus, first: int, results: Sequence[Any]) -> None:
        self.some(first, results)
        self._land()

    def _land(self) -> None:
        self.futures.clear()
        self.calls.forget(self._parcels)
        self.calls.landed(self)

    def _time(self, results: Sequence[Any]) -> None:
        times = [each.busy_ms for each in results if isinstance(each, Value)]
        if times:
            self.calls.took(self.function, sum(times) / len(times), len(times))

    def _settle(self, future: Future, result: Any) -> None:
        if isinstance(result, Fault):
            error = error_of(result)
            settle(future, lambda: future.set_exception(error))
            return
        assert isinstance(result, Value)
        _print(result)
        try:
            value = unpack(result.parcel, self.calls.folder, remove=True)
        except BaseException as problem:  # its class may raise anything
            unread = problem
            settle(future, lambda: future.set_exception(unread))
            return
        if result.ok:
            settle(future, lambda: future.set_result(value))
            return
        raised = _raised(*value)
        if result.status:
            self.calls.breaks(f"A process could not be initialized: {raised!r}")
            broken = BrokenExecutor(self.calls.broken)
            broken.__cause__ = raised
            raised = broken
        settle(future, lambda: future.set_exception(raised))

    def failed(self, error: BaseException) -> None:
        for future in self.futures:
            if future is not None:
                _fail(future, error)
        self._land()

    def cancelled(self) -> None:
        for future in self.futures:
            if future is not None:
                cancel_here(future)
        self._land()


def _fail(future: Future, error: BaseException) -> None:
    settle(future, lambda: future.set_exception(error))


def _print(value: Value) -> None:
    """What a call printed appears where it would have, had it run here."""
    for text, stream in ((value.stdout, sys.stdout), (value.stderr, sys.stderr)):
        if not text or stream is None:
            continue
        try:
            encoding = getattr(stream, "encoding", None) or "utf-8"
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            stream.flush()
        except (OSError, ValueError):  # it is closed: nobody reads what a call prints
            continue


def _raised(pickled: bytes, name: str, message: str, text: str) -> BaseException:
    """The exception of a call, as itself where it can be had here."""
    error: BaseException
    try:
        error = pickle.loads(pickled) if pickled else RemoteError(f"{name}: {message}")
    except Exception as unread:
        error = RemoteError(f"{name}: {message} (its class could not be read here: {unread})")
    with contextlib.suppress(AttributeError, TypeError):  # a class that takes no attributes
        error.__cause__ = RemoteTraceback(text)
    return error


def _slots_of(nodes: Sequence[Any]) -> int:
    return sum(node.cores for node in nodes if node.state in ("ready", "suspect"))


def _place() -> tuple[str, tuple[str, ...]]:
    """The working folder and `sys.path`; names that are no text cannot be told."""
    try:
        folder = os.getcwd()
    except FileNotFoundError:
        folder = ""
    paths = [os.path.join(folder, path) for path in sys.path[:PATHS_MAX]]
    told = tuple(path for path in paths if _is_text(path))
    return folder if _is_text(folder) else "", told


def _is_text(name: str) -> bool:
    return name.isascii() or name.encode(errors="replace").decode() == name
