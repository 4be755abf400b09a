"""The joblib backend "manifold": batches of `joblib.Parallel` run in processes of a cluster.

Interface rules: `register` makes it known to joblib; importing this module does so too, in task
processes as well. One backend serves one `parallel_config` block, or one `Parallel` that names it;
its connection and processes stay for the calls to come, until it is dropped.
Invariants, with numbers that the code cites:
  J1  joblib's callbacks, which draw from the user's iterator, never run on the connection's thread;
  J2  an aborted call's processes are killed, and are not used again;
  J3  a call never waits for other calls: inside one, what is parallel runs in threads or in turn.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from joblib._parallel_backends import (
    AutoBatchingMixin,
    FallbackToBackend,
    ParallelBackendBase,
    SequentialBackend,
)
from joblib.parallel import BACKENDS, register_parallel_backend

from manifold.kernel.tasks.inside import inside
from manifold.shells.sdk.executor import Executor

if TYPE_CHECKING:
    from manifold.shells.sdk.future import Future

NAME = "manifold"
OPTIONS = frozenset({"cluster", "client", "initializer", "initargs"})
# What joblib hands to every backend; memory maps of arrays are for pools of one machine.
OF_JOBLIB = frozenset({"max_nbytes", "temp_folder", "mmap_mode", "verbose", "context"})


class _Pool(NamedTuple):
    executor: Executor
    limit: int | None
    options: dict[str, Any]

    @property
    def workers(self) -> int:
        return self.executor._max_workers


def _pool(limit: int | None, options: dict[str, Any]) -> _Pool:
    unknown = sorted(options.keys() - OPTIONS)
    if unknown:
        raise TypeError(
            f"The backend {NAME!r} knows no option {unknown[0]!r}: it has {sorted(OPTIONS)}."
        )
    return _Pool(Executor(limit, **options), limit, options)


class ManifoldBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]
    """See the module. Options: `cluster` or `client`, `initializer`, `initargs`, as of Executor.

    >>> with joblib.parallel_config("manifold"):
    ...     joblib.Parallel()(joblib.delayed(pow)(n, 2) for n in range(5))
    [0, 1, 4, 9, 16]
    """

    supports_retrieve_callback = True
    default_n_jobs = -1  # every slot of the cluster

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._workers: _Pool | None = None  # while a Parallel computes
        self._idle: _Pool | None = None  # kept warm for the next one
        self._users = 0
        self._callbacks = ThreadPoolExecutor(1, "manifold-joblib")  # J1

    def __reduce__(self) -> Any:
        options = {"nesting_level": self.nesting_level, **self.backend_kwargs}
        return (_make, (options,))

    # -- how many -----------------------------------------------------------------------------

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """`n_jobs`; below 0 it counts from the cluster's slots, so that -1 is all of them."""
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if inside():  # J3
            return 1
        n_jobs = self.default_n_jobs if n_jobs is None else n_jobs
        if n_jobs > 0:
            return n_jobs
        return max(self._slots() + 1 + n_jobs, 1)

    def _slots(self) -> int:
        """What a pool without a limit finds there; it is kept for the call that is to come."""
        for pool in (self._workers, self._idle):
            if pool is not None and pool.limit is None:
                return pool.workers
        self._drop_idle()
        self._idle = _pool(None, self.backend_kwargs)
        return self._idle.workers

    def _drop_idle(self) -> None:
        idle, self._idle = self._idle, None
        if idle is not None:
            idle.executor.shutdown(wait=False)

    # -- one Parallel call --------------------------------------------------------------------

    def configure(
        self,
        n_jobs: int = 1,
        parallel: Any = None,
        prefer: str | None = None,
        require: str | None = None,
        **options: Any,
    ) -> int:
        """Called before a `Parallel` computes; `options` are those of its own call."""
        n_jobs = self.effective_n_jobs(n_jobs)
        if n_jobs == 1:
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        given = {key: value for key, value in options.items() if key not in OF_JOBLIB}
        self.parallel = weakref.proxy(parallel)  # it refers to us: neither would ever be dropped
        if self._workers is None:
            self._workers = self._take(n_jobs, {**self.backend_kwargs, **given})
        self._users += 1
        return n_jobs

    def _take(self, n_jobs: int, options: dict[str, Any]) -> _Pool:
        idle = self._idle
        if idle is not None and (idle.workers, idle.options) == (n_jobs, options):
            self._idle = None
            if not idle.executor._broken:
                return idle
        self._drop_idle()
        return _pool(n_jobs, options)

    def submit(self, func: Callable[[], Any], callback: Callable[[Any], None]) -> Future:
        """Send a batch; `callback` is called with its future once that is done."""
        assert self._workers is not None, "joblib configures a backend before it submits"
        callbacks = self._callbacks
        future = self._workers.executor.submit(run_batch, func)
        future.add_done_callback(lambda done: callbacks.submit(callback, done) and None)
        return future

    def retrieve_result_callback(self, future: Future) -> Any:
        """The batch's results; raises what its call raised."""
        return future.result()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """J2."""
        workers, self._workers = self._workers, None
        if workers is not None:
            workers.executor.kill_workers()
            if ensure_ready:
                self._workers = _pool(workers.limit, workers.options)
        self.reset_batch_stats()

    def terminate(self) -> None:
        """A `Parallel` has computed: its processes may wait for the next."""
        self._users = max(0, self._users - 1)
        if not self._users:
            self._idle, self._workers = self._workers or self._idle, None
        self.reset_batch_stats()


def _make(options: dict[str, Any]) -> ManifoldBackend:
    return ManifoldBackend(**options)


def run_batch(batch: Callable[[], Any]) -> Any:
    """In a task process. That it is of this module makes the backend known there (J3)."""
    return batch()


def register() -> None:
    """Let joblib know the name."""
    if BACKENDS.get(NAME) is not ManifoldBackend:
        register_parallel_backend(NAME, ManifoldBackend)


register()
