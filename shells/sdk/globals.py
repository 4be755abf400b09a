"""Globals: named values that the whole cluster agrees on, as a mapping.

Interface: `client.globals`; `manifold.globals` is that of the default connection
(globals_default.py), `AsyncClient.globals` for coroutines (globals_aio.py). Everything here waits;
it may be used from any thread.
Invariants: G1 (globals_calls.py); G2 every change takes place at most once, whatever nodes die
meanwhile (registers.py).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Coroutine, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from manifold.kernel.errors import ManifoldError, Unavailable
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
    from manifold.shells.sdk.leases import ClientLease

STATES_MAX = 256  # of a watch that nobody takes; the oldest are left out
LEASE_TTL_MS = 10_000.0
LEASE_TIMEOUT_S = 60.0

T = TypeVar("T")


# -- blocking -------------------------------------------------------------------------------------


class Globals:
    """Globals as a mapping from names to ints, floats, strs and bytes.

    >>> g = client.globals
    >>> g["x"] = 1
    >>> g.cas("x", 1, 2), g.add("x", 5), g["x"]
    (True, 2, 7)

    Each name is linearizable: what a quorum of voters has agreed to is seen by everybody from then
    on. `Unavailable`: nothing was done. `Maybe`: it may or may not have been. As attributes
    (`g.counter`) they are what they are in a kernel: an absent one reads as 0.
    """

    def __init__(self, client: Client) -> None:
        self._owner = client

    @property
    def _client(self) -> Client:
        return self._owner

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._client.connection.call(coroutine)

    @property
    def _calls(self) -> Calls:
        return self._client.calls_of_globals

    # A mapping.

    def __getitem__(self, name: str) -> Any:
        return self._wait(self._calls.item(key_of(name)))

    def __setitem__(self, name: str, value: Value) -> None:
        self.set(name, value)

    def __delitem__(self, name: str) -> None:
        self._wait(self._calls.drop(key_of(name)))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.read(name).value is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def get(
        self, name: str, default: Any = None, stale: bool = False, *, timeout_s: float = TIMEOUT_S
    ) -> Any:
        """What it holds, else `default`. `stale`: what one voter knows will do (see `read`)."""
        return self._wait(self._calls.get(key_of(name), default, timeout_s, stale))

    def read(self, name: str, stale: bool = False, *, timeout_s: float = TIMEOUT_S) -> Reading:
        """Value, version and strength. A stale reading may be old; a quorum is preferred."""
        return self._wait(self._calls.read(key_of(name), timeout_s, stale))

    def set(self, name: str, value: Value, *, timeout_s: float = TIMEOUT_S) -> Reading:
        """As `g[name] = value`; the value with its version."""
        return self._wait(self._calls.set(key_of(name), encode(value), timeout_s))

    def delete(self, name: str, *, timeout_s: float = TIMEOUT_S) -> bool:
        """Whether it was there."""
        return self._wait(self._calls.delete(key_of(name), timeout_s))

    def names(self, prefix: str = "") -> list[str]:
        """Names that begin with `prefix`, in order."""
        return self._wait(self._calls.names(prefix_of(prefix)))

    def items(self, prefix: str = "") -> list[tuple[str, Any]]:
        """Names and values; each value is of a moment of its own."""
        return self._wait(self._calls.named(prefix_of(prefix)))

    # Changes that depend on what is there.

    def cas(
        self, name: str, expected: Value | None, new: Value, *, timeout_s: float = TIMEOUT_S
    ) -> bool:
        """Set it where it holds `expected` (None: where it is absent); whether it did."""
        wanted = None if expected is None else encode(expected)
        return self._wait(self._calls.cas(key_of(name), wanted, encode(new), timeout_s))

    def propose(
        self, name: str, expected: Value | None, new: Value, *, timeout_s: float = TIMEOUT_S
    ) -> tuple[Any, bool]:
        """`cas` that tells what was found: `(found, ok)`. An absent one counts as 0."""
        wanted = None if expected is None else encode(expected)
        return self._wait(self._calls.propose(key_of(name), wanted, encode(new), timeout_s))

    def add(
        self, name: str, amount: int | float = 1, *, timeout_s: float = TIMEOUT_S
    ) -> int | float:
        """Fetch and add: what it was before. An absent one counts as 0; types do not change."""
        return self._wait(self._calls.add(key_of(name), number_of(amount), timeout_s))

    # What lasts.

    def watch(self, name: str) -> Watch:
        """Readings: what is there, then each change that is seen; the last is never left out.

        Iterate over it, or use it as a context manager and call `next(timeout_s)`.
        """
        return Watch(self._client, key_of(name))

    def lease(
        self, name: str, ttl_ms: float = LEASE_TTL_MS, *, timeout_s: float = LEASE_TIMEOUT_S
    ) -> Lease:
        """A lease of that name, for `with`: one client holds it at a time.

        It ends `ttl_ms` after this client died. Give its `fence` to whatever you act upon: that
        only ever grows, and whoever remembers the highest can refuse what comes too late.
        """
        key_of(name)
        return Lease(self._client, name.removeprefix("/" + FOLDER), ttl_ms, timeout_s)

    # As in a kernel.

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return self.get(name, 0)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
        elif hasattr(type(self), name):
            raise AttributeError(f"{name} is a method here: write g[{name!r}] = …")
        else:
            self[name] = value

    def __repr__(self) -> str:
        return f"<globals of cluster {self._client.cluster!r}>"


class Watch:
    """See `Globals.watch`. States in between may be left out where nobody takes them."""

    def __init__(self, client: Client, key: str) -> None:
        self._client = client
        self._key = key
        self._states: deque[Reading | ManifoldError] = deque(maxlen=STATES_MAX)
        self._more = threading.Condition()
        self._open = True
        client.connection.call(client.calls_of_globals.registers.watch(key, self._tell))

    def _tell(self, seen: Seen | ManifoldError) -> None:
        with self._more:
            self._states.append(reading_of(seen) if isinstance(seen, Seen) else seen)
            self._more.notify()

    def next(self, timeout_s: float | None = None) -> Reading:
        """The next state; `TimeoutError` where there is none in time."""
        with self._more:
            if not self._more.wait_for(lambda: self._states or not self._open, timeout_s):
                raise TimeoutError(f"/{self._key} has not changed in {timeout_s} s")
            if not self._states:
                raise StopIteration
            found = self._states.popleft()
            if isinstance(found, ManifoldError):
                self._states.append(found)  # it is over, however often one asks
                raise found
            return found

    def __iter__(self) -> Watch:
        return self

    def __next__(self) -> Reading:
        return self.next()

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """No more; who waits in another thread is told."""
        with self._more:
            was, self._open = self._open, False
            self._more.notify_all()
        if was and not self._client.connection.closed:
            registers = self._client.calls_of_globals.registers
            self._client.connection.call(registers.unwatch(self._key, self._tell))


class Lease:
    """See `Globals.lease`."""

    def __init__(self, client: Client, name: str, ttl_ms: float, timeout_s: float) -> None:
        self._connection = client.connection
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

    def __enter__(self) -> Lease:
        self._connection.call(self._lease.acquire(self._timeout_s))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._connection.closed:
            self._connection.call(self._lease.release())


def lease_of(client: Client, name: str, ttl_ms: float) -> ClientLease:
    from manifold.shells.sdk.leases import ClientLease

    return ClientLease(client.calls_of_globals.registers, name, ttl_ms)


def fence_of(lease: ClientLease) -> int:
    if lease.fence is None:
        raise Unavailable(f"The lease {lease.name!r} is not held.", "Use it with `with`.")
    return lease.fence
