"""Registers of Nexus as a client reaches them: operated on once, listed, watched, told in words.

Interface: `Registers` of one connection; its coroutines run on the connection's thread. Keys are
whole (`globals/x`). `operate` returns the answer of an operation whose fate is known, and raises
`Unavailable` (nothing was done), `Maybe` (it may still happen) or `Refused` otherwise.
Invariants:
  O1  an operation has one id, whatever it is sent as, and is applied at most once;
  O2  it is sent for the first time without a base, so that the node proposes it as its own; again,
      to be applied, only after that node's process has ended and nothing of ours waits for the
      next one (sessions.py, D1): with a stamp from before it was first sent (0 is one of every
      key). While some process may still have it, it is only looked up;
  O3  `Unavailable` is not told of what somebody may have.
Source: docs/nexus.md (once, base); values.py V2 and V4.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from manifold.kernel import messages as m
from manifold.kernel.errors import Busy, ManifoldError, Maybe, NoCluster, Refused, Unavailable
from manifold.kernel.nexus.messages import (
    Answer,
    Changed,
    ClientChange,
    Get,
    GetNexus,
    List,
    Listing,
    NexusInfo,
    Operate,
    Unwatch,
    Watch,
)
from manifold.shells.sdk.connection import Connection
from manifold.shells.sdk.sessions import Fate, Session, Sessions
from manifold.vm.kid import Kid, short

TIMEOUT_S = 5.0  # of an operation, unless it is told
GRACE_S = 1.0  # beyond it, for the node to say what came of it
LOOK_S = 1.0  # for the last look at an operation whose node has not said anything
BUSY_S = 0.05
LOST_S = 5.0  # without any node, until a watch gives up
BASES_MAX = 4096  # keys whose last stamp is remembered
READS_MAX = 64  # at a time: what one proposer takes as a batch
ROOTS_MAX = 64
LAST = "\U0010ffff"  # after every name
ALIASES_MS = 3000.0

Tell = Callable[["Seen | ManifoldError"], None]


@dataclass(frozen=True, slots=True)
class Seen:
    """A state of a register; `data` None: absent."""

    version: int
    data: Any
    strength: str = "quorum"


@dataclass(slots=True)
class _Wish:
    """One operation on its way. `copies`: the worst fate of a node that has it; None: nobody."""

    op: str
    key: str
    change: ClientChange
    stale: bool
    base: int
    deadline_s: float
    copies: Fate | None = None
    looked: bool = False

    @property
    def reads(self) -> bool:
        return isinstance(self.change, Get)

    @property
    def loose(self) -> bool:
        """A process that lives may have it."""
        return self.copies in (Fate.REPLACED, Fate.SILENT)

    def went_to(self, fate: Fate) -> None:
        if not self.reads and fate is not Fate.UNSENT and not self.loose:
            self.copies = fate

    def message(self, left_s: float) -> Operate:
        retry = self.copies is not None
        base = self.base if self.copies is Fate.DEAD else -1  # O2
        return Operate(self.op, self.key, self.change, left_s * 1000, retry, base, self.stale)


class Registers:
    """See the module."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._loop = connection.loop
        self._sessions = Sessions(connection)
        self._number = 0
        self._bases: OrderedDict[str, int] = OrderedDict()
        self._watched: dict[str, _Watched] = {}
        self._aliases: dict[str, str] = {}
        self.on_stop: list[Callable[[], Any]] = []  # what is given back when the client leaves

    def name(self) -> str:
        """One that nobody else has or will have: of an operation, of a lease's holder."""
        self._number += 1
        return f"{self._connection.identity}.{self._number}"

    async def stop(self) -> None:
        """The client leaves: who watches is told."""
        for give_back in list(self.on_stop):
            await give_back()
        for watched in list(self._watched.values()):
            watched.end(Unavailable("This client was closed meanwhile.", "Connect again."))
        self._watched.clear()

    # -- operations -------------------------------------------------------------------------------

    async def operate(
        self, key: str, change: ClientChange, timeout_s: float = TIMEOUT_S, *, stale: bool = False
    ) -> Answer:
        """Carry it out, once; `ok` or `no`."""
        base = self._bases.get(key, 0)  # before it is sent (O2)
        deadline_s = self._loop.time() + timeout_s
        wish = _Wish(self.name(), key, change, stale, base, deadline_s)
        answer = None
        while answer is None:
            answer = await self._try(wish)
        if answer.status in ("ok", "no"):
            if answer.strength == "quorum":
                self._learn(key, answer.stamp)
            return answer
        await self._fail(wish, answer)

    async def _try(self, wish: _Wish) -> Answer | None:
        """Send it to whoever answers at present; None: again."""
        left_s = wish.deadline_s - self._loop.time()
        if left_s <= 0:
            if not wish.loose or wish.looked:
                return Answer("unavailable", strength="none")
            wish.looked, left_s = True, LOOK_S
        try:
            session = await self._sessions.current(wish.deadline_s)
            message = wish.message(left_s)
            found = await session.exchange(message, left_s + GRACE_S, patient=not wish.reads)
        except NoCluster:
            if wish.copies is None:
                raise
            return Answer("maybe", strength="none")
        except Unavailable as full:  # our own queue, or the node's
            found = Answer("busy", strength="none", why=full.message)
        if isinstance(found, Fate):
            wish.went_to(found)
            return None
        assert isinstance(found, Answer)
        again = found.status == "busy" or (found.status == "maybe" and wish.loose)
        if again and self._loop.time() + BUSY_S < wish.deadline_s:
            await asyncio.sleep(BUSY_S)
            return None
        return found

    def _learn(self, key: str, stamp: int) -> None:
        """Stamps of a key only grow; answers may overtake each other."""
        self._bases[key] = max(stamp, self._bases.pop(key, 0))
        if len(self._bases) > BASES_MAX:
            self._bases.popitem(last=False)

    async def _fail(self, wish: _Wish, answer: Answer) -> NoReturn:
        where = f"/{wish.key}"
        if answer.status == "refused":
            raise Refused(f"{where}: {answer.why or 'Nexus refused.'}", "Nothing was changed.")
        if answer.status in ("maybe", "rebase") or wish.copies is not None:  # O3
            raise Maybe(
                f"{where}: what became of the change is not known. It may or may not have been "
                "applied, and may still be.",
                f"Read it: `manifold get {where}`.",
            )
        done = "read" if wish.reads else "changed"
        if answer.status == "busy":
            raise Busy(
                f"{where} was not {done}: {answer.why or 'too many operations wait for it'}.",
                "Nothing was done. Come again.",
            )
        raise await self.unavailable(f"{where} was not {done}", answer.missing, answer.why)

    async def unavailable(self, what: str, missing: Sequence[str], why: str = "") -> Unavailable:
        """Nothing was done: who did not answer, by alias, and what to do."""
        names = await self.names_of(missing)
        if names:
            voters = f"voter{'s' * (len(names) > 1)} {', '.join(names)}"
            error = Unavailable(
                f"{what}: no majority of the voters answers. Missing: {voters}.",
                "Nothing was done. It works again once a majority is back: `manifold nexus "
                "status`. What one voter knows is read with --stale (SDK: stale=True).",
            )
        else:
            error = Unavailable(
                f"{what}: {why or 'no voters are known here'}.",
                "`manifold nexus status` tells who votes; `manifold nexus init` chooses the first.",
            )
        vars(error).update(missing=tuple(names))
        return error

    async def names_of(self, kids: Sequence[str]) -> list[str]:
        """Aliases, where the node list has them; else short KIDs."""
        if any(kid not in self._aliases for kid in kids):
            try:
                found: m.NodeList = await self._connection.request(m.AllNodes(), ALIASES_MS)
            except ManifoldError:
                found = m.NodeList(())  # the KIDs have to do
            self._aliases |= {node.kid: node.alias for node in found.nodes}
        return [self._aliases.get(kid) or short(Kid(kid)) for kid in kids]

    # -- many -------------------------------------------------------------------------------------

    async def keys(
        self, prefix: str, timeout_s: float = TIMEOUT_S, *, stale: bool = False
    ) -> tuple[list[str], str]:
        """Every key that begins with `prefix` and perhaps some deleted ones; and the strength."""
        deadline_s = self._loop.time() + timeout_s
        found: list[str] = []
        strength, more, after = "quorum", True, ""
        while more:
            left_s = max(0.001, deadline_s - self._loop.time())
            question = List(prefix, after, timeout_ms=left_s * 1000, stale=stale)
            page = await self.ask(question, left_s)
            assert isinstance(page, Listing)
            if page.strength == "none":
                raise await self.unavailable(f"/{prefix} was not listed", page.missing, page.why)
            strength = page.strength if page.strength != "quorum" else strength
            found += page.keys
            more, after = page.more and bool(page.keys), found[-1] if found else ""
        return found, strength

    async def roots(self, timeout_s: float = TIMEOUT_S, *, stale: bool = False) -> list[str]:
        """The first parts of all keys: a page of one key each, which begins after the last root."""
        found: list[str] = []
        after = ""
        while len(found) < ROOTS_MAX:
            page = await self.ask(List("", after, 1, timeout_s * 1000, stale), timeout_s)
            assert isinstance(page, Listing)
            if page.strength == "none":
                raise await self.unavailable("/ was not listed", page.missing, page.why)
            if not page.keys:
                break
            root = page.keys[0].partition("/")[0]
            found.append(root)
            after = f"{root}/{LAST}"
        return found

    async def read_all(
        self, keys: Sequence[str], timeout_s: float = TIMEOUT_S, *, stale: bool = False
    ) -> list[tuple[str, Seen]]:
        """Those that are there, each with what it held at a moment of its own."""
        room = asyncio.Semaphore(READS_MAX)

        async def read(key: str) -> tuple[str, Seen]:
            async with room:
                answer = await self.operate(key, Get(), timeout_s, stale=stale)
            return key, Seen(answer.version, answer.data, answer.strength)

        reads = [self._loop.create_task(read(key)) for key in keys]
        try:
            return [each for each in await asyncio.gather(*reads) if each[1].data is not None]
        except BaseException:
            for one in reads:
                one.cancel()
            await asyncio.gather(*reads, return_exceptions=True)
            raise

    async def ask(self, body: Any, timeout_s: float = TIMEOUT_S) -> Any:
        """A question that may be put as often as one likes, to whoever answers."""
        deadline_s = self._loop.time() + timeout_s
        while True:
            session = await self._sessions.current(deadline_s)
            left_s = max(0.001, deadline_s - self._loop.time())
            found = await session.exchange(body, left_s + GRACE_S, patient=False)
            if not isinstance(found, Fate):
                return found
            if self._loop.time() >= deadline_s:
                raise Unavailable("No node has answered in time.", "`manifold status` shows them.")

    async def nexus(self) -> NexusInfo:
        """What our node knows of the voters."""
        found: NexusInfo = await self.ask(GetNexus())
        return found

    # -- watches ----------------------------------------------------------------------------------

    async def watch(self, key: str, tell: Tell) -> None:
        """`tell` is called with what is there, then with each later state that is seen."""
        watched = self._watched.get(key)
        if watched is None:
            watched = self._watched[key] = _Watched(key)
            watched.task = self._loop.create_task(self._follow(watched))
        watched.tells.append(tell)
        if watched.last is not None:
            tell(watched.last)

    async def unwatch(self, key: str, tell: Tell) -> None:
        watched = self._watched.get(key)
        if watched is None or tell not in watched.tells:
            return
        watched.tells.remove(tell)
        if not watched.tells:
            del self._watched[key]
            watched.cancel()
            bus = self._connection.bus
            if bus.knows(watched.node):  # at once: a watch that follows must not be ended by it
                answer = bus.request(watched.node, Unwatch(key), TIMEOUT_S * 1000)
                answer.add_done_callback(lambda done: done.cancelled() or done.exception())

    def pushed(self, change: Changed) -> None:
        """A node tells of a watch."""
        watched = self._watched.get(change.key)
        if watched is None:
            return
        if change.data is not None:
            watched.saw(Seen(change.version, change.data))
        elif watched.checking is None:  # no version is told, and it may be late: a read has one
            watched.checking = self._loop.create_task(self._check(watched))

    async def _check(self, watched: _Watched) -> None:
        while True:
            try:
                answer = await self.operate(watched.key, Get())
            except ManifoldError:
                await asyncio.sleep(BUSY_S)
            else:
                watched.checking = None
                watched.saw(Seen(answer.version, answer.data))
                return

    async def _follow(self, watched: _Watched) -> None:
        try:
            while True:
                session = await self._sessions.current(self._loop.time() + LOST_S)
                session.watches += 1
                try:
                    await self._watch_at(session, watched)
                finally:
                    session.watches -= 1
        except ManifoldError as error:
            if self._watched.pop(watched.key, None) is not None:
                watched.end(error)

    async def _watch_at(self, session: Session, watched: _Watched) -> None:
        """Until that node is gone, or has nothing to say."""
        watched.node = session.node.source
        found = await session.exchange(
            Watch(watched.key, TIMEOUT_S * 1000), TIMEOUT_S + GRACE_S, patient=False
        )
        if isinstance(found, Changed):
            self.pushed(found)
            session.guard()
            await asyncio.wait((session.gone,))
        elif isinstance(found, Answer):  # a minority: it heals without us
            await asyncio.sleep(BUSY_S)


class _Watched:
    """A key that is watched here, by whom, and the newest state of it."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.tells: list[Tell] = []
        self.last: Seen | None = None
        self.node = ""
        self.task: asyncio.Task[None] | None = None
        self.checking: asyncio.Task[None] | None = None
        self._newest = -1

    def saw(self, seen: Seen) -> None:
        """Tell it, where it is news: versions only grow, through deletion as well (V3)."""
        if seen.version <= self._newest:
            return
        self._newest = seen.version
        if self.last is not None and self.last.data is None and seen.data is None:
            return  # absent still: its version is its shard's floor
        self.last = seen
        for tell in list(self.tells):
            tell(seen)

    def cancel(self) -> None:
        for task in (self.task, self.checking):
            if task is not None and task is not asyncio.current_task():
                task.cancel()

    def end(self, error: ManifoldError) -> None:
        self.cancel()
        for tell in self.tells:
            tell(error)
