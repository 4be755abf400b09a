"""A client's connection: a bus of its own on a background thread, attached to one node.

Interface rules: `call` runs a coroutine function on the thread and waits; what is in `Connection`
otherwise runs on the thread. When the node it is attached to is gone it attaches to another.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import uvloop

from manifold.kernel import places
from manifold.kernel.errors import ManifoldError, NoCluster, Unavailable
from manifold.kernel.hyperbus.door import knock
from manifold.kernel.hyperbus.driver import Bus, Incoming
from manifold.kernel.hyperbus.messages import CLIENT_PREFIX, VERSION, Hello, Welcome
from manifold.kernel.messages import DECODER, Bye, Leaves

DOOR_TIMEOUT_MS = 1000.0
REQUEST_TIMEOUT_MS = 10_000.0
LOOK_S = 2.0  # without an answer for so long: does our node live?
GOODBYE_S = 0.4  # after its goodbye our node ends, once it has answered what it still can
LOOKS_MAX = 3  # that find nobody, one after the other: it is gone; a busy one may miss one

T = TypeVar("T")


def doors(cluster: str, environ: Mapping[str, str]) -> list[str]:
    """The addresses of nodes of `cluster` that have a door on this host."""
    runtime = places.runtime_path(cluster, environ)
    if not runtime.is_dir():
        return []
    places.check_private(runtime)
    return [f"ipc://{str(path)[:-2]}" for path in sorted(runtime.glob("*.d"))]


class Connection:
    """See the module. `on_push` is called on the thread with what nodes send unasked."""

    def __init__(
        self,
        cluster: str,
        environ: Mapping[str, str],
        on_push: Callable[[Any], None],
        node: str = "",
    ) -> None:
        self.cluster = cluster
        self.identity = CLIENT_PREFIX + os.urandom(8).hex()
        self._environ = environ
        self._on_push = on_push
        self._node = node
        self._address = ""
        self.closed = False
        self._leaving = False
        self.on_leave: list[Callable[[], None]] = []  # called before the thread goes
        self._lock = threading.Lock()
        self.attached: Welcome | None = None
        self.loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        self._goodbye: asyncio.Future[None] = self.loop.create_future()  # our node leaves
        self._thread = threading.Thread(target=self._serve, name="manifold-client", daemon=True)
        self._thread.start()
        try:
            self.call(self._open())
        except BaseException:
            self.close()
            raise

    def _serve(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        # Whoever asked for something meanwhile is told: nothing is left that waits for ever.
        self.loop.run_until_complete(self._abandon())

    async def _abandon(self) -> None:
        await asyncio.sleep(0)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _open(self) -> None:
        self._address = f"ipc://{self._runtime() / ('c' + self.identity[2:])}"
        self.bus = Bus(self.identity, os.getpid(), self.cluster, DECODER, self._arrived)
        await self.attach()

    def _runtime(self) -> Path:
        runtime = places.runtime_path(self.cluster, self._environ)
        if not runtime.is_dir():
            raise NoCluster(
                f"Cluster {self.cluster!r} is not running here.",
                "Start it with `manifold up`, or name another with --cluster.",
            )
        return runtime

    async def attach(self, avoid: str = "") -> Welcome:
        """Find a node that answers, and make it ours. `avoid` is asked last."""
        candidates = doors(self.cluster, self._environ)
        if self._node:
            candidates = [a for a in candidates if a.endswith("/" + self._node)] or candidates
        candidates.sort(key=lambda address: address == avoid)
        if not self.attached:
            self.bus.listen_client(self._address)
        error: ManifoldError = NoCluster(
            f"Cluster {self.cluster!r} is not running here.",
            "Start it with `manifold up`, or name another with --cluster.",
        )
        for address in candidates:
            if self._leaving:
                raise Unavailable("This client was closed meanwhile.", "Connect again.")
            hello = Hello(VERSION, self.cluster, self.identity, os.getpid(), self._address)
            try:
                welcome = await asyncio.to_thread(knock, address, hello, DOOR_TIMEOUT_MS)
            except ManifoldError as refused:
                error = refused
                continue
            self.attached = welcome
            if self._goodbye.done():
                self._goodbye = self.loop.create_future()
            self.bus.learn(welcome.source, welcome.address)
            return welcome
        raise error

    async def request(
        self,
        body: msgspec.Struct,
        timeout_ms: float = REQUEST_TIMEOUT_MS,
        destination: str = "",
    ) -> Any:
        """Ask the node we are attached to (or, through it, another)."""
        if self.attached is None:
            await self.attach()
        assert self.attached is not None
        if destination in (self.attached.alias, self.attached.source):
            destination = ""
        answer = self.bus.request(self.attached.source, body, timeout_ms, destination=destination)
        if await self._answered_or_lives(answer, timeout_ms / 1000):
            return await answer
        answer.cancel()
        await self.attach(self.attached.address)
        assert self.attached is not None
        return await self.bus.request(
            self.attached.source, body, timeout_ms, destination=destination
        )

    async def _answered_or_lives(self, answer: asyncio.Future[Any], timeout_s: float) -> bool:
        """Whether to wait for `answer` on: False once our node is found to have ended.

        It is looked for after `LOOK_S`, and again and again once it has said goodbye.
        """
        goodbye = self._goodbye
        look_s = min(LOOK_S, timeout_s)
        await asyncio.wait((answer, goodbye), timeout=look_s, return_when=asyncio.FIRST_COMPLETED)
        if not goodbye.done():
            return answer.done() or timeout_s <= LOOK_S or await self.lives()
        while not answer.done():
            await asyncio.wait((answer,), timeout=GOODBYE_S)
            if not answer.done() and not await self.lives():
                return False
        return True

    async def look(self, body: msgspec.Struct, timeout_ms: float, destination: str) -> Any:
        """As `request`, for what looks at one node for long and is asked of no other instead.

        `Unavailable` soon after the node we are attached to has ended.
        """
        if self.attached is None:
            await self.attach()
        assert self.attached is not None
        welcome = self.attached
        if destination in (welcome.alias, welcome.source):
            destination = ""
        answer = self.bus.request(welcome.source, body, timeout_ms, destination=destination)
        missed = 0
        while missed < LOOKS_MAX:
            done, _ = await asyncio.wait((answer,), timeout=LOOK_S)
            if done:
                return await answer
            missed = 0 if await self.lives() else missed + 1
        answer.cancel()
        raise Unavailable(
            f"{welcome.alias} ended, or fell silent, while it was asked.",
            "`manifold node ls` shows when it is there again.",
        )

    async def request_of(
        self, node: str, body: msgspec.Struct, timeout_ms: float = REQUEST_TIMEOUT_MS
    ) -> Any:
        """Ask a node that we were attached to, also when we are attached to another by now."""
        if self.bus.knows(node):
            return await self.bus.request(node, body, timeout_ms)
        return await self.request(body, timeout_ms)

    def ask_now(self, body: msgspec.Struct, timeout_ms: float) -> asyncio.Future[Any] | None:
        """As `request`, sent before this returns; None where that cannot be."""
        if self.attached is None:
            return None
        try:
            answer = self.bus.request(self.attached.source, body, timeout_ms)
        except ManifoldError:
            return None  # `request` says why
        self.bus.flush()
        return answer

    async def lives(self) -> bool:
        """Whether the node we are attached to still answers at its door."""
        if self.attached is None:
            return False
        hello = Hello(VERSION, self.cluster, self.identity, os.getpid(), self._address)
        try:
            welcome = await asyncio.to_thread(knock, self.attached.address, hello, DOOR_TIMEOUT_MS)
        except ManifoldError:
            return False
        return welcome.source == self.attached.source and welcome.boot == self.attached.boot

    def _arrived(self, incoming: Incoming) -> None:
        if isinstance(incoming.body, Leaves):
            ours = self.attached is not None and incoming.source == self.attached.source
            if ours and not self._goodbye.done():
                self._goodbye.set_result(None)
            return
        self._on_push(incoming.body)

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run `coroutine` on the thread and wait for its result."""
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError(
                "a callback of a future must not wait for the cluster: it would wait for itself; "
                "start a thread, or submit"
            )
        if self.closed:
            coroutine.close()
            raise Unavailable("This client is closed.", "Connect again.")
        try:
            future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        except RuntimeError as error:  # closed since
            coroutine.close()
            raise Unavailable("This client is closed.", "Connect again.") from error
        try:
            return future.result()
        except concurrent.futures.CancelledError as error:
            raise Unavailable("This client was closed meanwhile.", "Connect again.") from error
        except KeyboardInterrupt:
            future.cancel()
            raise

    def close(self) -> None:
        """Say goodbye and end the thread."""
        with self._lock:
            if self.closed:
                return
            with contextlib.suppress(ManifoldError):
                self.call(self._leave())
            self.closed = True
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    async def _leave(self) -> None:
        self._leaving = True
        for tell in self.on_leave:
            tell()
        await self.loop.shutdown_default_executor()
        if not hasattr(self, "bus"):
            return
        if self.attached is not None:
            with contextlib.suppress(ManifoldError):
                self.bus.send(self.attached.source, Bye())
            await asyncio.sleep(0)  # one turn of the loop: the goodbye leaves
        self.bus.close()
        Path(self._address.removeprefix("ipc://") + ".c").unlink(missing_ok=True)
