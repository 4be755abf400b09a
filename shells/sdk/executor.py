"""`manifold.Executor`: a `concurrent.futures.Executor` whose processes are those of a cluster.

Interface rules: what `ProcessPoolExecutor` does, this does, save what docs/executor.md lists; the
methods may be called from any thread. The connection outlives the executor until the last of its
calls is done: an executor that is dropped, or shut down without waiting, still finishes its work,
and so does the interpreter before it exits.
Invariants, with numbers that the code cites:
  X1  every future that `submit` returned is done before its connection is closed;
  X2  whoever waits can be interrupted, and then what is left is killed;
  X3  nothing here refers to the executor, or to a result, once its future is done.
"""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import logging
import os
import pickle
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import BrokenExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, ParamSpec, TypeVar, cast

from manifold.kernel.errors import Unavailable
from manifold.kernel.tasks.parcel import dumps
from manifold.shells.sdk.future import RemoteError, RemoteTraceback, settle
from manifold.shells.sdk.placing import Where

if TYPE_CHECKING:
    from manifold.shells.sdk.calls import Calls
    from manifold.shells.sdk.client import Client
    from manifold.shells.sdk.future import Future

P = ParamSpec("P")
T = TypeVar("T")

# `map` cuts its calls into so many chunks for each worker: a slow one at the end then costs at most
# a sixteenth of the whole, and a message carries what many calls would.
CHUNKS_PER_WORKER = 16
CHUNK_MAX = 1024  # calls; their results come back together, so one chunk is at most so late
TEXT_CHARS_MAX = 128 << 10  # of a traceback, as of what a call prints

CHECK_S = 0.5  # how often who waits looks whether a connection that is not its own was closed
LOST = "The client was closed before the call had ended."
NEXT = "Shut the executor down before its client."

log = logging.getLogger("concurrent.futures")  # where the executors of Python log, too
_unfinished: set[_Work] = set()
_exiting = False


class _Work:
    """The calls of one executor, and its connection where that is its own."""

    def __init__(self, calls: Calls, client: Client, *, own: bool) -> None:
        self.calls = calls
        self.closing = False
        self._client = client
        self._own = own
        self._left = 0
        self._futures: set[Future] = set()
        self._changed = threading.Condition()
        self._closer: threading.Thread | None = None
        self._closed = False
        self._foreign = False  # a copy in a child that the program forked
        self._told = False
        _unfinished.add(self)

    # -- calls --------------------------------------------------------------------------------

    def submit(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Future:
        with self._changed:
            if self.calls.broken:
                raise BrokenExecutor(self.calls.broken)
            if self.closing:
                raise RuntimeError("cannot schedule new futures after shutdown")
            if _exiting:
                raise RuntimeError("cannot schedule new futures after interpreter shutdown")
            self._left += 1  # X1: from here on nobody closes the connection
        try:
            future = self.calls.submit(function, args, kwargs)
        except BaseException:
            self._done()
            raise
        with self._changed:
            self._futures.add(future)
        future.add_done_callback(self._done)
        return future

    def _done(self, future: concurrent.futures.Future[Any] | None = None) -> None:
        if self.calls.broken and future is not None and not future.cancelled():
            self._tell(future.exception())
        with self._changed:
            self._left -= 1
            self._futures.discard(future)
            if not self._left:
                self._changed.notify_all()

    def _tell(self, error: BaseException | None) -> None:
        """Log why the initializer failed: once, and with where."""
        if isinstance(error, BrokenExecutor) and error.__cause__ is not None:
            with self._changed:
                told, self._told = self._told, True
            if not told:
                log.critical("Exception in initializer:", exc_info=error.__cause__)

    def coded(self, function: Callable[..., T]) -> Callable[..., T]:
        """Pickled once for many calls; what cannot be is the exception of each of them."""
        try:
            return cast(Callable[..., T], self.calls.code(function))
        except Exception:
            return function  # `submit` finds out again, and says so

    # -- the end ------------------------------------------------------------------------------

    def cancel_pending(self) -> None:
        """Cancel what has not begun. The connection's thread does it, after it has sent what was
        submitted before and there is room for: that has begun."""
        with self._changed:
            if self._lives:
                self._client.connection.loop.call_soon_threadsafe(self.calls.cancel_pending)

    def finish(self) -> None:
        """Return when all calls are done and the connection is closed. X2."""
        self.closing = True
        if self._foreign:
            return
        try:
            with self._changed:
                while not self._changed.wait_for(lambda: self._left == 0, CHECK_S):
                    if not self._lives:
                        self._lose()
        except BaseException:
            self.kill()
            raise
        with self._changed:
            first, self._closed = not self._closed, True
        if first:
            self.calls.close()
            if self._own:
                self._client.close()
            _unfinished.discard(self)

    def _lose(self) -> None:
        """The connection, which was not ours, was closed: nothing will come any more."""
        self.calls.cancel_pending()
        for future in list(self._futures):
            settle(future, functools.partial(future.set_exception, Unavailable(LOST, NEXT)))

    def finish_later(self) -> None:
        """The same, by a thread of its own: nobody waits. May be called from any thread."""
        self.closing = True
        if self._foreign:
            return
        with self._changed:
            if self._closed or self._closer is not None:
                return
            self._closer = threading.Thread(target=self.finish, name="manifold-executor")
        self._closer.start()

    def kill(self) -> None:
        """End what runs and drop what waits; every future is done soon after."""
        self.closing = True
        if not self._foreign:
            self.calls.cancel_pending()
            with self._changed:
                if self._lives:
                    self.calls.close(kill=True)

    def disown(self) -> None:
        """In a child that the program forked: there is no thread here, and nothing to wait for."""
        self.closing = self._foreign = True

    @property
    def _lives(self) -> bool:
        """Whether the connection is there: its owner may have closed it before us."""
        return not self._closed and not self._client.connection.closed


class Executor(concurrent.futures.Executor):
    """Runs calls in processes of a cluster: `cluster`, else $MANIFOLD_CLUSTER, else `default`.

    `max_workers` calls run at a time, by default as many as the cluster has slots. `client` is a
    connection to use instead of one of its own; `up` starts a cluster of so many nodes, and takes
    it down at the end. Calls run only on nodes that have the labels of `where`, such as
    `"site=lab"`. `initializer(*initargs)` is called once in each process before its first
    call; where it fails the executor is broken.

    >>> with manifold.Executor() as executor:
    ...     executor.submit(pow, 2, 10).result()
    1024
    """

    def __init__(
        self,
        max_workers: int | None = None,
        cluster: str = "",
        *,
        client: Client | None = None,
        up: int = 0,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        where: Where = (),
    ) -> None:
        if max_workers is not None and max_workers <= 0:
            raise ValueError("max_workers must be greater than 0")
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        if client is not None and (cluster or up):
            raise ValueError("a client has a cluster already: give `client`, or `cluster` and `up`")
        own = None
        if client is None:
            from manifold.shells.sdk import connect

            client = own = connect(cluster, up=up)
        try:
            calls = client.calls(
                workers=max_workers or 0, initializer=initializer, initargs=initargs, where=where
            )
            self._max_workers = calls.workers
        except BaseException:
            if own is not None:
                own.close()
            raise
        self._work = _Work(calls, client, own=own is not None)
        weakref.finalize(self, self._work.finish_later).atexit = False  # X3

    @property
    def _broken(self) -> str:
        """As in the executors of Python: why it is broken, "" while it is not."""
        return self._work.calls.broken

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future:
        """Call `fn(*args, **kwargs)` in the cluster; returns its future at once."""
        return self._work.submit(fn, args, kwargs)

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 0,
    ) -> Iterator[T]:
        """The results of `fn` over `zip(*iterables)`, in order; all is submitted at once.

        `chunksize` calls travel together; 0 chooses by the length where the iterables have one.
        `TimeoutError` where a result is not there `timeout` seconds after this was called. When
        one fails, or the iterator is dropped, the calls that have not started are cancelled.
        """
        if chunksize < 0:
            raise ValueError("chunksize must be >= 1, or 0 to have it chosen.")
        chunksize = chunksize or self._chunk(iterables)
        if chunksize == 1:
            return super().map(fn, *iterables, timeout=timeout)
        chunks = super().map(
            self._work.coded(_chunk_of(fn)),
            _batched(zip(*iterables, strict=False), chunksize),
            timeout=timeout,
        )
        return _flat(chunks)

    def _chunk(self, iterables: tuple[Iterable[Any], ...]) -> int:
        lengths = [len(iterable) for iterable in iterables if isinstance(iterable, Sized)]
        if not lengths:
            return 1  # a generator: its calls start while it still yields
        return max(1, min(CHUNK_MAX, min(lengths) // (CHUNKS_PER_WORKER * self._max_workers)))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more calls; finish those there are, or cancel those that have not started."""
        self._work.closing = True
        if cancel_futures:
            self._work.cancel_pending()
        if wait:
            self._work.finish()
        else:
            self._work.finish_later()

    def kill_workers(self) -> None:
        """End what runs and drop what waits, whose futures fail; accept no more calls."""
        self._work.kill()
        self._work.finish_later()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> Literal[False]:
        """Ctrl-C inside the block does not wait for what runs: it is killed."""
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._work.kill()
        self.shutdown(wait=True)
        return False

    def __reduce__(self) -> NoReturn:
        raise TypeError("an Executor cannot be sent to a call; the call can make one of its own")


def _batched(items: Iterator[tuple[Any, ...]], size: int) -> Iterator[list[tuple[Any, ...]]]:
    while batch := list(itertools.islice(items, size)):
        yield batch


Chunk = tuple[list[T], "_Failure | None"]  # the results until one failed, and how


class _Failure:
    """The exception of a call among others, on its way: itself, if it can be read again."""

    def __init__(self, error: BaseException) -> None:
        trace = error.__traceback__
        assert trace is not None, "it was raised"
        text = traceback.format_exception(type(error), error, trace.tb_next)  # without our frame
        self.text = "".join(text)[-TEXT_CHARS_MAX:]
        self.line = "".join(traceback.format_exception_only(error)).strip()[-TEXT_CHARS_MAX:]
        try:
            self.pickled = dumps(error)
            pickle.loads(self.pickled)
        except Exception:
            self.pickled = b""  # the text says what it was

    def error(self) -> BaseException:
        error: BaseException = RemoteError(self.line)
        if self.pickled:
            error = pickle.loads(self.pickled)
        error.__cause__ = RemoteTraceback(self.text)
        return error


def _chunk_of(function: Callable[..., T]) -> Callable[[list[tuple[Any, ...]]], Chunk[T]]:
    """Many calls of a function as one. A closure: it is pickled once, as `function` would be."""

    def run(chunk: list[tuple[Any, ...]]) -> Chunk[T]:
        done: list[T] = []
        try:
            for args in chunk:
                done.append(function(*args))
        except BaseException as error:
            return done, _Failure(error)
        return done, None

    run.__qualname__ = str(getattr(function, "__qualname__", type(function).__qualname__))
    return run


def _flat(chunks: Iterator[Chunk[T]]) -> Iterator[T]:
    """X3: a result is let go of before it is handed out."""
    try:
        for done, failure in chunks:
            done.reverse()
            while done:
                yield done.pop()
            if failure is not None:
                raise failure.error()
    finally:
        chunks.close()  # type: ignore[attr-defined]  # a generator: what is left is cancelled


def _at_exit() -> None:
    """Before the interpreter ends: finish what was submitted, unless Ctrl-C ends it."""
    global _exiting
    _exiting = True
    works = list(_unfinished)
    if getattr(sys, "last_type", None) is KeyboardInterrupt:
        for work in works:
            work.kill()
    for work in works:
        work.finish()


def _disown() -> None:
    for work in _unfinished:
        work.disown()
    _unfinished.clear()


# Where ThreadPoolExecutor and ProcessPoolExecutor do the same: before threads are waited for, and
# before `atexit`. Later registered runs earlier, so that what we use of theirs is still there.
threading._register_atexit(_at_exit)  # type: ignore[attr-defined]
os.register_at_fork(after_in_child=_disown)
