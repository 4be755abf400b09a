"""Questions that outlive the node they were put to: is it dead, replaced, or only silent?

Interface: `Sessions.current(deadline_s)` is the session with the node that answers at present;
`Session.exchange` puts a question and returns the answer, or the `Fate` of the node instead. Runs
on the connection's thread. Clients reach nodes of their own host only, so the kernel knows whether
a process listens: this tells a dead node within `PROBE_S`, without waiting for a timeout.
Invariants: D1 after `DEAD` nobody has what was sent: the process has ended, and what still lay in
our own buffers was thrown away before any later process could have got it. D2 a session ends once;
who waits for an answer in it is told by `gone`.
"""

from __future__ import annotations

import asyncio
import os
from enum import Enum
from typing import Any

import msgspec

from manifold.kernel.errors import ManifoldError, Maybe, NoCluster, Unavailable
from manifold.kernel.hyperbus import sockets
from manifold.kernel.hyperbus.door import knock
from manifold.kernel.hyperbus.messages import VERSION, Hello, Welcome
from manifold.shells.sdk.connection import Connection

PROBE_S = 0.03  # without an answer for so long: does the process live? 0.2 ms of work
KNOCK_S = 1.0  # and is it still the same process? Also how long it has to answer at its door
WATCH_PROBE_S = 0.5  # where nothing but changes is waited for
REATTACH_S = 0.05  # between two looks for a node that answers


class Fate(Enum):
    """What became of the node that was asked."""

    UNSENT = 0  # it was not even asked
    DEAD = 1  # D1
    REPLACED = 2  # its process has ended; the next one may have got the question
    SILENT = 3  # it does not answer, and may go on later


class Session:
    """One process of one node, as long as it answers."""

    def __init__(self, connection: Connection, node: Welcome) -> None:
        self.node = node
        self.gone: asyncio.Future[Fate] = connection.loop.create_future()
        self.watches = 0
        self._connection = connection
        self._loop = connection.loop
        self._asked: dict[int, float] = {}  # questions without an answer, since; the oldest first
        self._number = 0
        self._looked_s = self._knocked_s = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._looking: asyncio.Task[None] | None = None

    async def exchange(self, body: msgspec.Struct, timeout_s: float, *, patient: bool) -> Any:
        """The answer, or a `Fate`. `patient`: who is silent may still answer within the timeout."""
        bus = self._connection.bus
        if not bus.knows(self.node.source) and self._looking is not None:
            await asyncio.wait((self.gone,))  # what it is about to find out is more exact
        if self.gone.done() or not bus.knows(self.node.source):
            self.end(Fate.SILENT)
            return Fate.UNSENT
        answer = bus.request(self.node.source, body, timeout_s * 1000)
        bus.flush()
        self._number += 1
        number = self._number
        self._asked[number] = self._loop.time()
        self.guard()
        try:
            await asyncio.wait((answer, self.gone), return_when=asyncio.FIRST_COMPLETED)
            if not answer.done() and not (patient and self.gone.result() is Fate.SILENT):
                return self.gone.result()
            return await answer
        except Maybe:
            return Fate.SILENT
        finally:
            del self._asked[number]
            answer.cancel()

    def end(self, fate: Fate) -> None:
        """D2."""
        if not self.gone.done():
            self.gone.set_result(fate)

    def stop(self) -> None:
        """The client leaves: nobody looks after the node any more."""
        self.end(Fate.SILENT)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._looking is not None:
            self._looking.cancel()

    # -- is it there? -----------------------------------------------------------------------------

    def guard(self) -> None:
        """Look after the node while anybody waits for it."""
        if self._timer is None and not self.gone.done() and (self._asked or self.watches):
            pause_s = PROBE_S if self._asked else WATCH_PROBE_S
            self._timer = self._loop.call_later(pause_s, self._check)

    def _check(self) -> None:
        self._timer = None
        oldest_s = next(iter(self._asked.values()), None)
        now_s = self._loop.time()
        waits = oldest_s is not None and now_s - oldest_s >= PROBE_S
        waits = waits or (self.watches > 0 and now_s - self._looked_s >= WATCH_PROBE_S)
        if waits and self._looking is None:
            self._looked_s = now_s
            self._looking = self._loop.create_task(self._look())
            self._looking.add_done_callback(self._has_looked)
        else:
            self.guard()

    def _has_looked(self, task: asyncio.Task[None]) -> None:
        self._looking = None
        if not task.cancelled():
            task.result()
            self.guard()

    async def _look(self) -> None:
        if not await self._listens():
            self._connection.bus.forget(self.node.source)
            self.end(Fate.REPLACED if await self._listens() else Fate.DEAD)  # D1
            return
        if self._loop.time() - self._knocked_s < (WATCH_PROBE_S if self.watches else KNOCK_S):
            return
        folder, _, _ = self.node.address.rpartition("/")
        mine = self._connection.identity
        hello = Hello(VERSION, self._connection.cluster, mine, os.getpid(), f"{folder}/c{mine[2:]}")
        try:
            found = await asyncio.to_thread(knock, self.node.address, hello, KNOCK_S * 1000)
        except ManifoldError:
            self.end(Fate.SILENT)
            return
        self._knocked_s = self._loop.time()
        if (found.source, found.boot) != (self.node.source, self.node.boot):
            self._connection.bus.forget(self.node.source)
            self.end(Fate.REPLACED)

    async def _listens(self) -> bool:
        # Where our questions go, not the door: a process that starts listens there first.
        control = f"{self.node.address}.c"
        return await asyncio.to_thread(sockets.listens, control, sockets.PUSHER)


class Sessions:
    """With whichever node the connection is attached to."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._session: Session | None = None
        self._lock = asyncio.Lock()
        connection.on_leave.append(self._stop)

    def _stop(self) -> None:
        if self._session is not None:
            self._session.stop()

    async def current(self, deadline_s: float) -> Session:
        """The session with a node that answers; `NoCluster` where none does until then."""
        found = self._living()
        if found is not None:
            return found
        async with self._lock:
            while (found := self._living()) is None:
                await self._attach(deadline_s)
            return found

    def _living(self) -> Session | None:
        """The present session, or a new one where somebody has attached to another node."""
        attached, session = self._connection.attached, self._session
        if attached is None:
            return None
        if session is None or _process(session.node) != _process(attached):
            session = self._session = Session(self._connection, attached)
        return None if session.gone.done() else session

    async def _attach(self, deadline_s: float) -> None:
        attached = self._connection.attached
        try:
            await self._connection.attach(attached.address if attached is not None else "")
        except (NoCluster, Unavailable):
            if self._connection.loop.time() >= deadline_s:
                raise
            await asyncio.sleep(REATTACH_S)
            return
        self._session = None  # whoever answered at its door is asked, though it was silent before


def _process(node: Welcome) -> tuple[str, int]:
    return node.source, node.boot
