"""The client for coroutines: the same calls, awaited.

Interface rules: every method is the one of `Client` that has its name; what blocks there is awaited
here, and cancelling the awaiting task cancels the job. `submit` and `job` return futures, which can
be awaited, passed to `asyncio.wait_for`, or left.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from manifold.kernel.scheduler.messages import Reduction
from manifold.shells.sdk.client import Client, Number
from manifold.shells.sdk.future import Future
from manifold.shells.sdk.mapping import Joined, map_futures, reduce_futures
from manifold.shells.sdk.placing import Where

if TYPE_CHECKING:
    from manifold.shells.sdk.globals_aio import AsyncGlobals
    from manifold.shells.sdk.programs import Source


class AsyncClient:
    """Made by `manifold.connect_async`; use it with `async with`.

    >>> async with manifold.connect_async() as m:
    ...     await m.map(str.upper, ["any", "function"])
    """

    def __init__(self, connect: Callable[[], Client]) -> None:
        self._connect = connect
        self._client: Client | None = None

    async def __aenter__(self) -> AsyncClient:
        self._client = await asyncio.to_thread(self._connect)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Leave the cluster."""
        if self._client is not None:
            await asyncio.to_thread(self._client.close)

    @property
    def client(self) -> Client:
        """The blocking client beneath, for questions such as `nodes`."""
        assert self._client is not None, "use `async with`"
        return self._client

    @property
    def globals(self) -> AsyncGlobals:
        """`Client.globals`, awaited: `await m.globals.set("x", 1)`."""
        from manifold.shells.sdk.globals_aio import AsyncGlobals

        return AsyncGlobals(self.client)

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future:
        return self.client.submit(function, *args, **kwargs)

    def submit_where(self, where: Where, function: Any, /, *args: Any, **kwargs: Any) -> Future:
        return self.client.submit_where(where, function, *args, **kwargs)

    def job(self, program: Source, lo: int, hi: int, **options: Any) -> Future:
        return self.client.job(program, lo, hi, **options)

    async def parallel_for(
        self,
        program: Source,
        lo: int,
        hi: int,
        *,
        reduce: Reduction = "collect",
        arguments: Sequence[Number] = (),
        where: Where = (),
        timeout_s: float | None = None,
    ) -> Any:
        return await self.client.job(
            program, lo, hi, reduce=reduce, arguments=arguments, where=where,
            timeout_ms=(timeout_s or 0.0) * 1000,
        )  # fmt: skip

    async def map(
        self,
        function: Any,
        *iterables: Iterable[Any],
        chunksize: int = 0,
        where: Where = (),
        timeout_s: float | None = None,
    ) -> list[Any]:
        prepare = functools.partial(map_futures, self.client, function, iterables, chunksize, where)
        futures, join = await _begun(prepare)
        found: list[Any] = join(await _all(futures, timeout_s))
        return found

    async def reduce(
        self,
        function: Callable[[Any, Any], Any],
        items: Iterable[Any],
        *,
        chunksize: int = 0,
        where: Where = (),
        timeout_s: float | None = None,
    ) -> Any:
        prepare = functools.partial(reduce_futures, self.client, function, items, chunksize, where)
        futures, join = await _begun(prepare)
        found: list[Any] = join(await _all(futures, timeout_s))
        return found


class Beginning:
    """Calls that a thread begins, which may be given up before it has begun them all."""

    def __init__(self, begin: Callable[[], Joined]) -> None:
        self._begin = begin
        self._lock = threading.Lock()
        self._futures: Sequence[Future] = ()
        self._given_up = False

    def run(self) -> Joined:
        """In the thread."""
        joined = self._begin()
        with self._lock:
            self._futures = joined[0]
            given_up = self._given_up
        if given_up:
            self._cancel()
        return joined

    def give_up(self) -> None:
        """Nobody waits for them: what has begun ends, and so does what is begun yet."""
        with self._lock:
            self._given_up = True
        self._cancel()

    def _cancel(self) -> None:
        for future in self._futures:
            future.cancel()


async def _begun(begin: Callable[[], Joined]) -> Joined:
    beginning = Beginning(begin)
    try:
        return await asyncio.to_thread(beginning.run)
    except asyncio.CancelledError:
        beginning.give_up()
        raise


async def _all(futures: Sequence[Future], timeout_s: float | None) -> list[Any]:
    """Every result; the first exception, a timeout or a cancellation cancels the rest."""
    waiting = [asyncio.wrap_future(future) for future in futures]
    try:
        async with asyncio.timeout(timeout_s):
            return list(await asyncio.gather(*waiting))
    except BaseException:
        for each in waiting:
            each.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        raise


def connect_async(
    cluster: str = "", *, node: str = "", environ: Mapping[str, str] | None = None, up: int = 0
) -> AsyncClient:
    """As `manifold.connect`, for `async with`."""
    from manifold.shells.sdk import connect

    return AsyncClient(functools.partial(connect, cluster, node=node, environ=environ, up=up))
