"""Watches: tell a client that a register is not what it was. Level-triggered, without history.

Interface: `watch` and `unwatch` by the client's handle; `hint` when a voter has accepted something;
`emit(client, key, state)` is called with each state that is told: the first is what was there when
the watch was asked for, and where that cannot be read in time it says why, and the watch is over.
Invariants:
  W1  what is told was read by a quorum, and versions told of a key only grow, but for absence; a
      first state that is stale, where that was asked for, says so and does not count;
  W2  after the last change a watcher is told of it within a poll, hints or not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from manifold.kernel.nexus.context import Context
from manifold.kernel.nexus.messages import Read
from manifold.kernel.nexus.proposer import Proposer
from manifold.kernel.nexus.rounds import Operation
from manifold.kernel.nexus.values import Get, Result

KEYS_MAX = 4096
CLIENTS_MAX = 1024  # of one key
_GONE = (0, False)
Emit = Callable[[int, str, Result], None]


@dataclass(slots=True)
class Watched:
    """A key; `told` is what each client heard last: the version and whether it was there."""

    told: dict[int, tuple[int, bool] | None] = field(default_factory=dict)
    reading: bool = False
    again: bool = False


class Watches:
    """See the module."""

    def __init__(self, context: Context, proposer: Proposer, emit: Emit) -> None:
        self._context = context
        self._proposer = proposer
        self._emit = emit
        self._keys: dict[str, Watched] = {}

    def watch(self, client: int, key: str, timeout_ms: float, stale: bool) -> bool:
        """False: there are too many already."""
        watched = self._keys.get(key)
        if watched is None:
            if len(self._keys) >= KEYS_MAX:
                return False
            watched = self._keys[key] = Watched()
            self._poll(key, watched)
        if len(watched.told) >= CLIENTS_MAX and client not in watched.told:
            return False
        watched.told[client] = None
        self._first(client, key, watched, timeout_ms, stale)
        return True

    def _first(
        self, client: int, key: str, watched: Watched, timeout_ms: float, stale: bool
    ) -> None:
        """The first state is read for each client: it has a deadline of its own."""

        def done(result: Result) -> None:
            if self._keys.get(key) is not watched or watched.told.get(client, _GONE) is not None:
                return  # told by a hint meanwhile, or it does not watch any more
            if result.status != "ok":
                self.unwatch(client, key)
                self._emit(client, key, result)
            elif result.strength == "stale":
                self._emit(client, key, result)
                self._read(key, watched)
            else:
                self._seen(key, watched, result)

        deadline_ms = self._context.now_ms + timeout_ms
        self._proposer.submit(Operation(self._op(), key, Get(), deadline_ms, done, stale=stale))

    def _op(self) -> str:
        return f"{self._context.me[:18]}.{self._context.nonce}.{self._context.rid()}"

    def adopted(self) -> None:
        """Voters are known, or are others: they have to know who watches."""
        for key in self._keys:
            self._enlist(key)

    def unwatch(self, client: int, key: str) -> None:
        watched = self._keys.get(key)
        if watched is not None:
            watched.told.pop(client, None)
            if not watched.told:
                del self._keys[key]

    def client_gone(self, client: int) -> None:
        for key in [key for key, watched in self._keys.items() if client in watched.told]:
            self.unwatch(client, key)

    def hint(self, key: str, _version: int) -> None:
        watched = self._keys.get(key)
        if watched is not None:
            self._read(key, watched)

    def _poll(self, key: str, watched: Watched) -> None:
        if self._keys.get(key) is not watched:
            return
        self._enlist(key)
        if watched.told:
            self._read(key, watched)
        self._context.later(self._context.timing.poll_ms, lambda _now: self._poll(key, watched))

    def _enlist(self, key: str) -> None:
        """So that voters send hints; the answers are nobody's."""
        config = self._proposer.config
        if config is not None:
            for kid in config.kids():
                self._context.send(kid, Read(self._context.rid(), config.epoch, key, True))

    def _read(self, key: str, watched: Watched) -> None:
        """One read under way at a time; a hint meanwhile asks for one more (it may be newer)."""
        if watched.reading:
            watched.again = True
            return
        watched.reading, watched.again = True, False
        deadline_ms = self._context.now_ms + self._context.timing.poll_ms

        def done(result: Result) -> None:
            watched.reading = False
            if self._keys.get(key) is not watched:
                return
            if result.status == "ok":
                self._seen(key, watched, result)
            if watched.again:
                self._read(key, watched)

        self._proposer.submit(Operation(self._op(), key, Get(), deadline_ms, done))

    def _seen(self, key: str, watched: Watched, result: Result) -> None:
        present = result.data is not None
        for client, told in list(watched.told.items()):
            grew = told is None or result.version > told[0] or (present and not told[1])
            if told is not None and not told[1] and not present:
                continue  # absent still: its version is its shard's floor
            if grew:
                watched.told[client] = (result.version, present)
                self._emit(client, key, result)
