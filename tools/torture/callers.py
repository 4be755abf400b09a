"""Clients in closed loops: what they ask, what they make of the answers, what they record.

Interface: `Caller.run(stopped)` asks one operation after the other until `stopped`, `once` the one
that is wanted; `ask(node, message)` brings an `Operate` to a node: it returns the `Answer`, raises
`Unavailable` where nothing was sent, and any other error where the fate is unknown. Everything that
ended goes to `record`.
Keys: a few hot ones, which are other ones every ROTATE_MS, so that histories stay short enough to
be judged; a few cold ones and a counter that last. What is done to a key depends on its name:
`count` is only added to, `hot` never deleted, `mixed` and `cold` everything.
Invariants: C1 written values are unique, so that a read tells whose it saw. C2 an operation that is
sent twice is sent as a retry, and to a second node only with the base of the first. C3 of an
operation of unknown fate nothing is claimed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import Random

import msgspec

from manifold.kernel.errors import ManifoldError, Unavailable
from manifold.kernel.nexus.messages import Answer, ClientChange, Operate
from manifold.kernel.nexus.values import Add, CasValue, Delete, Get, Put
from manifold.tools.simulator.linearizable import Kind
from manifold.tools.torture.history import Datum, Seen

PREFIX = "globals/torture/"
ROTATE_MS = 6000.0
HOT, MIXED, COLD = 2, 2, 24  # keys at a time
THINK_MS = 12.0  # on average, between two operations of a client
TIMEOUT_MS = 900.0  # what a node is given for an operation
PATIENCE_MS = 1200.0  # and what its answer is waited for
TRIES_MAX = 4  # of an operation whose fate is not known
AWAY_MS = 60.0  # before a node that was not there is asked again
COUNT_BITS = 32

Ask = Callable[[int, Operate], Awaitable[Answer]]
KINDS: dict[str, tuple[Kind, ...]] = {
    "count": ("add", "add", "add", "read"),
    "hot": ("read", "read", "write", "cas", "cas"),
    "mixed": ("read", "read", "write", "add", "cas", "create", "delete"),
    "cold": ("read", "write", "add", "cas", "create", "delete"),
}


def keys_at(elapsed_ms: float) -> dict[str, list[str]]:
    """The keys in use, by kind."""
    turn = int(elapsed_ms // ROTATE_MS)
    return {
        "count": [f"{PREFIX}count"],
        "hot": [f"{PREFIX}hot/{turn}.{each}" for each in range(HOT)],
        "mixed": [f"{PREFIX}mixed/{turn}.{each}" for each in range(MIXED)],
        "cold": [f"{PREFIX}cold/{each}" for each in range(COLD)],
    }


@dataclass(slots=True)
class _Wish:
    """One operation, while it is under way."""

    key: str
    kind: Kind
    argument: tuple[Datum, ...]
    change: ClientChange
    op: str
    base: int
    begun_ms: float
    tries: int = 0


class Caller:
    """See the module. `home` is the node it is attached to; it retries at others as well."""

    def __init__(
        self,
        name: str,
        number: int,
        home: int,
        aliases: list[str],
        random: Random,
        ask: Ask,
        record: Callable[[Seen], None],
        now_ms: Callable[[], float],
        begun_ms: float,
        tries_max: int = TRIES_MAX,
    ) -> None:
        self._tries_max = tries_max
        self._name, self._number, self._home, self._aliases = name, number, home, aliases
        self._random, self._ask, self._record = random, ask, record
        self._now_ms, self._begun_ms = now_ms, begun_ms
        self._count = 0
        self._stamps: dict[str, int] = {}
        self._values: dict[str, Datum] = {}

    async def run(self, stopped: asyncio.Event) -> None:
        while not stopped.is_set():
            status = await self._one(self._wish())
            away = status in ("unavailable", "busy")
            wait_ms = AWAY_MS if away else self._random.uniform(0.0, 2 * THINK_MS)
            try:
                async with asyncio.timeout(wait_ms / 1000):
                    await stopped.wait()
            except TimeoutError:
                continue

    async def once(self, key: str, kind: Kind) -> str:
        """One operation of that kind; what was recorded of it."""
        return await self._one(self._wish_of(key, kind))

    # -- what is asked ----------------------------------------------------------------------------

    def _wish(self) -> _Wish:
        random = self._random
        keys = keys_at(self._now_ms() - self._begun_ms)
        kind_of_key = random.choices(("count", "hot", "mixed", "cold"), (2, 4, 3, 2))[0]
        return self._wish_of(random.choice(keys[kind_of_key]), random.choice(KINDS[kind_of_key]))

    def _wish_of(self, key: str, kind: Kind) -> _Wish:
        """An operation of that kind, with arguments of its own."""
        self._count += 1
        value = ((self._number + 1) << COUNT_BITS) + self._count * 1000  # C1, after adds as well
        expected = self._values.get(key)
        argument: tuple[Datum, ...] = ()
        change: ClientChange
        match kind:
            case "read":
                change = Get()
            case "write":
                argument, change = (value,), Put(value)
            case "add":
                argument, change = (1,), Add(1)
            case "delete":
                change = Delete()
            case "create":
                argument, change = (value,), CasValue(None, value)
            case "cas":
                argument, change = (expected, value), CasValue(expected, value)
        base = self._stamps.get(key, -1) if self._random.random() < 0.5 else -1
        op = f"{self._name}.{self._count}"
        return _Wish(key, kind, argument, change, op, base, self._now_ms())

    # -- what becomes of it -----------------------------------------------------------------------

    async def _one(self, wish: _Wish) -> str:
        """Ask until its fate is known, or nobody can tell; the status that was recorded."""
        node = self._home
        self._record(
            Seen(
                self._name, self._aliases[node], wish.key, wish.kind, wish.argument, "begun",
                None, wish.begun_ms, wish.begun_ms,
            )
        )  # fmt: skip
        while True:
            wish.tries += 1
            status, answer = await self._send(node, wish)
            known = status in ("ok", "no") or (
                wish.tries == 1 and status in ("unavailable", "busy")
            )
            if known or wish.tries >= self._tries_max or wish.kind == "read":
                break
            node = self._random.randrange(len(self._aliases))
        if not known and wish.kind != "read":
            status = (
                "maybe"  # C3: some transmission of it may have been, or may yet be, carried out
            )
        self._note(wish, status, answer)
        return status

    async def _send(self, node: int, wish: _Wish) -> tuple[str, Answer | None]:
        message = Operate(
            wish.op, wish.key, wish.change, TIMEOUT_MS, wish.tries > 1, wish.base
        )  # C2
        try:
            answer = await self._ask(node, message)
        except Unavailable:
            return "unavailable", None
        except ManifoldError:
            return "maybe", None
        if answer.status in ("ok", "no", "unavailable", "busy"):
            return answer.status, answer
        return "maybe", answer

    def _note(self, wish: _Wish, status: str, answer: Answer | None) -> None:
        ended_ms = self._now_ms()
        result: Datum | bool = None
        if status in ("ok", "no"):
            assert answer is not None, "it was told"
            self._stamps[wish.key] = answer.stamp
            result = self._result(wish, answer)
        version = answer.version if answer is not None and status in ("ok", "no") else 0
        seen = Seen(
            self._name, self._aliases[self._home], wish.key, wish.kind, wish.argument, status,
            result, wish.begun_ms, ended_ms, version, wish.tries,
        )  # fmt: skip
        self._record(seen)
        if status == "no" and wish.kind in ("cas", "create", "delete") and answer is not None:
            self._told(seen, answer)

    def _result(self, wish: _Wish, answer: Answer) -> Datum | bool:
        data = answer.data
        assert data is None or isinstance(data, int), f"nobody has written {data!r}"
        match wish.kind:
            case "read":
                self._values[wish.key] = data
                return data
            case "add":
                return data if answer.status == "ok" else None
            case "write":
                return None
        if answer.status == "no":
            self._values[wish.key] = data
        return answer.status == "ok"

    def _told(self, seen: Seen, answer: Answer) -> None:
        """A change that was refused tells what is there: as good as a read at that time."""
        data = answer.data
        assert data is None or isinstance(data, int), f"nobody has written {data!r}"
        told = msgspec.structs.replace(
            seen,
            client=f"{seen.client}*",
            kind="read",
            argument=(),
            status="ok",
            result=data,
            tries=0,
        )
        self._record(told)
