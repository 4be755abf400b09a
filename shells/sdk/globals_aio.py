"""`Globals` for coroutines: the same calls, awaited. See globals.py."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from manifold.kernel.errors import ManifoldError, Unavailable
from manifold.shells.sdk.globals import (
    LEASE_TIMEOUT_S,
    LEASE_TTL_MS,
    STATES_MAX,
    fence_of,
    lease_of,
)
from manifold.shells.sdk.globals_calls import (
    FOLDER,
    Calls,
    Reading,
    Value,
    encode,
    key_of,
    number_of,
    prefix_of,
    reading_of,
)
from manifold.shells.sdk.registers import TIMEOUT_S, Seen

if TYPE_CHECKING:
    from manifold.shells.sdk.client import Client

T = TypeVar("T")


class AsyncGlobals:
    """`Globals` for coroutines: the same calls, awaited.

    >>> await g.set("x", 1)
    >>> await g["x"], await g.add("x", 5)
    (1, 1)
    >>> async with g.watch("x") as watch:
    ...     async for reading in watch: ...
    """

    def __init__(self, client: Client) -> None:
        self._client = client

    async def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return await _awaited(self._client, coroutine)

    @property
    def _calls(self) -> Calls:
        return self._client.calls_of_globals

    def __getitem__(self, name: str) -> Coroutine[Any, Any, Any]:
        return self._wait(self._calls.item(key_of(name)))

    async def get(
        self, name: str, default: Any = None, stale: bool = False, *, timeout_s: float = TIMEOUT_S
    ) -> Any:
        return await self._wait(self._calls.get(key_of(name), default, timeout_s, stale))

    async def read(
        self, name: str, stale: bool = False, *, timeout_s: float = TIMEOUT_S
    ) -> Reading:
        return await self._wait(self._calls.read(key_of(name), timeout_s, stale))

    async def set(self, name: str, value: Value, *, timeout_s: float = TIMEOUT_S) -> Reading:
        return await self._wait(self._calls.set(key_of(name), encode(value), timeout_s))

    async def delete(self, name: str, *, timeout_s: float = TIMEOUT_S) -> bool:
        return await self._wait(self._calls.delete(key_of(name), timeout_s))

    async def names(self, prefix: str = "") -> list[str]:
        return await self._wait(self._calls.names(prefix_of(prefix)))

    async def items(self, prefix: str = "") -> list[tuple[str, Any]]:
        return await self._wait(self._calls.named(prefix_of(prefix)))

    async def cas(
        self, name: str, expected: Value | None, new: Value, *, timeout_s: float = TIMEOUT_S
    ) -> bool:
        wanted = None if expected is None else encode(expected)
        return await self._wait(self._calls.cas(key_of(name), wanted, encode(new), timeout_s))

    async def propose(
        self, name: str, expected: Value | None, new: Value, *, timeout_s: float = TIMEOUT_S
    ) -> tuple[Any, bool]:
        wanted = None if expected is None else encode(expected)
        return await self._wait(self._calls.propose(key_of(name), wanted, encode(new), timeout_s))

    async def add(
        self, name: str, amount: int | float = 1, *, timeout_s: float = TIMEOUT_S
    ) -> int | float:
        return await self._wait(self._calls.add(key_of(name), number_of(amount), timeout_s))

    def watch(self, name: str) -> AsyncWatch:
        """For `async with` or `async for`."""
        return AsyncWatch(self._client, key_of(name))

    def lease(
        self, name: str, ttl_ms: float = LEASE_TTL_MS, *, timeout_s: float = LEASE_TIMEOUT_S
    ) -> AsyncLease:
        """For `async with`."""
        key_of(name)
        return AsyncLease(self._client, name.removeprefix("/" + FOLDER), ttl_ms, timeout_s)


async def _awaited(client: Client, coroutine: Coroutine[Any, Any, T]) -> T:
    """Run it on the connection's thread; cancelling the awaiting task cancels it."""
    connection = client.connection
    if connection.closed:
        coroutine.close()
        raise Unavailable("This client is closed.", "Connect again.")
    future = asyncio.run_coroutine_threadsafe(coroutine, connection.loop)
    return await asyncio.wrap_future(future)


class AsyncWatch:
    """See `Globals.watch`."""

    def __init__(self, client: Client, key: str) -> None:
        self._client = client
        self._key = key
        self._states: deque[Reading | ManifoldError] = deque(maxlen=STATES_MAX)
        self._more = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __aenter__(self) -> AsyncWatch:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            registers = self._client.calls_of_globals.registers
            await _awaited(self._client, registers.watch(self._key, self._tell))
        return self

    def _tell(self, seen: Seen | ManifoldError) -> None:
        assert self._loop is not None
        state = reading_of(seen) if isinstance(seen, Seen) else seen
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._told, state)

    def _told(self, state: Reading | ManifoldError) -> None:
        self._states.append(state)
        self._more.set()

    def __aiter__(self) -> AsyncWatch:
        return self

    async def __anext__(self) -> Reading:
        await self.__aenter__()
        while not self._states:
            self._more.clear()
            await self._more.wait()
        found = self._states.popleft()
        if isinstance(found, ManifoldError):
            self._states.append(found)
            raise found
        return found

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._loop is not None and not self._client.connection.closed:
            registers = self._client.calls_of_globals.registers
            await _awaited(self._client, registers.unwatch(self._key, self._tell))


class AsyncLease:
    """See `Globals.lease`."""

    def __init__(self, client: Client, name: str, ttl_ms: float, timeout_s: float) -> None:
        self._client = client
        self._lease = lease_of(client, name, ttl_ms)
        self._timeout_s = timeout_s

    @property
    def held(self) -> bool:
        """Whether it is held now: look before you act. Asks nobody."""
        return self._lease.held

    @property
    def fence(self) -> int:
        """The token of this hold; higher than of any before."""
        return fence_of(self._lease)

    async def __aenter__(self) -> AsyncLease:
        await _awaited(self._client, self._lease.acquire(self._timeout_s))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._client.connection.closed:
            await _awaited(self._client, self._lease.release())
