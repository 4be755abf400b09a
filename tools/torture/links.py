"""A client's connection to one node, which is killed, paused and started again under it.

Interface: `Links(cluster, environ, aliases)` belongs to a running event loop; `ask(node, message)`
sends a request to the node of that number and returns what it answers. It raises `Unavailable`
where nothing was sent, `Maybe` where no answer came in time, and what the node refused with.
`close` in the end. It never sends twice, and never to another node: unlike the client of the SDK,
which finds another one, it is here to know what happened.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from manifold.kernel import places
from manifold.kernel.errors import ManifoldError, Maybe, Unavailable
from manifold.kernel.hyperbus.door import knock
from manifold.kernel.hyperbus.driver import Bus
from manifold.kernel.hyperbus.messages import CLIENT_PREFIX, VERSION, Hello
from manifold.kernel.messages import DECODER, Bye
from manifold.kernel.nexus.messages import Answer, ClientChange, Operate
from manifold.tools.torture.callers import PATIENCE_MS

KNOCK_MS = 400.0  # a paused node does not open; whoever waits for it waits in a thread


class Links:
    """See the module. One bus, under one identity, attached to each node on its own."""

    def __init__(self, cluster: str, environ: Mapping[str, str], aliases: Sequence[str]) -> None:
        self.aliases = list(aliases)
        self._cluster = cluster
        self._runtime = places.runtime_path(cluster, environ)
        self._identity = CLIENT_PREFIX + os.urandom(8).hex()
        self._address = f"ipc://{self._runtime / ('c' + self._identity[2:])}"
        self._bus = Bus(self._identity, os.getpid(), cluster, DECODER, lambda incoming: None)
        self._bus.listen_client(self._address)
        self._attached: dict[int, str] = {}  # by number: the node's identity
        self._knocking: dict[int, asyncio.Future[str]] = {}
        self._threads = ThreadPoolExecutor(2 * len(aliases), "knock")

    async def ask(self, node: int, message: msgspec.Struct, timeout_ms: float) -> Any:
        name = await self._name(node)
        answer = self._bus.request(name, message, timeout_ms)
        try:
            return await answer
        except Maybe:
            self.forget(node)  # perhaps
            raise

    def forget(self, node: int) -> None:
        """It has started again, and does not know us any more."""
        self._attached.pop(node, None)

    async def _name(self, node: int) -> str:
        """The node's identity, once it has let us in; `Unavailable` where it does not."""
        known = self._attached.get(node)
        if known is not None:
            return known
        if node not in self._knocking:
            address = f"ipc://{self._runtime / self.aliases[node]}"
            self._knocking[node] = asyncio.ensure_future(self._knock(node, address))
        return await asyncio.shield(self._knocking[node])

    async def _knock(self, node: int, address: str) -> str:
        hello = Hello(VERSION, self._cluster, self._identity, os.getpid(), self._address)
        loop = asyncio.get_running_loop()
        try:
            welcome = await loop.run_in_executor(self._threads, knock, address, hello, KNOCK_MS)
            self._bus.learn(welcome.source, welcome.address)
        except ManifoldError as error:
            raise Unavailable(f"{self.aliases[node]} does not answer: {error}") from error
        finally:
            del self._knocking[node]
        self._attached[node] = welcome.source
        return welcome.source

    async def close(self) -> None:
        for waiting in list(self._knocking.values()):
            with contextlib.suppress(ManifoldError):
                await waiting
        for name in self._attached.values():
            with contextlib.suppress(ManifoldError):
                self._bus.send(name, Bye())
        await asyncio.sleep(0)  # one turn of the loop: the goodbyes leave
        self._threads.shutdown()
        self._bus.close()
        Path(self._address.removeprefix("ipc://") + ".c").unlink(missing_ok=True)


async def operate(links: Links, node: int, key: str, change: ClientChange) -> Answer | None:
    """One operation at that node, under a name of its own; None where it was not done."""
    message = Operate(f"torture.{os.urandom(8).hex()}", key, change, PATIENCE_MS)
    try:
        answer = await ask(links, node, message)
    except ManifoldError:
        return None
    return answer if answer.status == "ok" else None


async def ask(links: Links, node: int, message: Operate) -> Answer:
    """What callers use."""
    answer = await links.ask(node, message, PATIENCE_MS)
    assert isinstance(answer, Answer), f"an operation is answered by {answer!r}"
    return answer
