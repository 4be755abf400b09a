"""What clients ask of Nexus, at the node they are attached to.

Interface rules: `serve` takes a request of a client, `answered` what Nexus replies to its handle:
an operation once, a watch again and again, the first time as the answer to the request and from
then on by pushes. A client that is gone is answered no more, and its watches end.
Bounds: WAITING_MAX requests of all clients; Nexus bounds operations and watches itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from manifold.kernel.effects import Reply
from manifold.kernel.errors import Busy, Unavailable
from manifold.kernel.hyperbus.driver import Incoming
from manifold.kernel.hyperbus.faults import to_failure
from manifold.kernel.messages import Done
from manifold.kernel.nexus.messages import (
    Acquire,
    Answer,
    Changed,
    Get,
    Initialise,
    Operate,
    Request,
    Resign,
    Unwatch,
    Watch,
)
from manifold.vm.kid import Kid

if TYPE_CHECKING:
    from manifold.kernel.node import Node

log = logging.getLogger("manifold.nexus")

WAITING_MAX = 16_384  # operations.OPERATIONS_MAX and as many watches
FIRST_TIMEOUT_MS = 30_000.0
OURS = ("cluster/", "jobs/", "owners/", "nexus/")  # registers that only nodes write


def _writes_ours(body: object) -> bool:
    if isinstance(body, Operate):
        return body.key.startswith(OURS) and not isinstance(body.change, Get)
    return isinstance(body, Acquire | Resign) and body.key.startswith(OURS)


class Consulting:
    """See the module."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._waiting: dict[int, Incoming] = {}
        self._watching: dict[tuple[str, str], int] = {}  # (client, key): the handle of its watch
        self._told: set[int] = set()  # watches whose request is answered
        self._handle = 0
        self._first = 0  # the handle of our own wish for first voters
        self._ours: dict[int, asyncio.Future[object]] = {}  # what this node's driver has asked

    @property
    def waiting(self) -> int:
        """Requests that are not answered yet, and watches."""
        return len(self._waiting)

    def initialise(self, voters: Sequence[Kid]) -> None:
        """Make these the first voters, where there are none that anybody here knows of."""
        if self._node.core.nexus.config is not None:
            self._node.tell_agreed()
        if self._node.core.nexus.config is not None or self._first:
            return
        self._handle += 1
        self._first = self._handle
        request = Initialise(tuple(voters), FIRST_TIMEOUT_MS)
        self._node.perform(self._node.core.consult(self._first, request, self._node.now_ms()))

    def ask(self, request: Request) -> asyncio.Future[object]:
        """Ask for the node itself. Nexus answers every operation, by its timeout at the latest."""
        self._handle += 1
        found: asyncio.Future[object] = self._node.loop.create_future()
        self._ours[self._handle] = found
        node = self._node
        node.perform(node.core.consult(self._handle, request, node.now_ms()))
        return found

    def serve(self, incoming: Incoming) -> None:
        node, body, now_ms = self._node, incoming.body, self._node.now_ms()
        if not incoming.request:
            return
        if _writes_ours(body):
            why = "This register is the cluster's own: programs and people write globals."
            node.bus.reply(incoming, Answer("refused", strength="none", why=why))
            return
        if isinstance(body, Unwatch):
            handle = self._watching.get((incoming.source, body.key))
            if handle is not None:
                self._forget(handle)
                node.perform(node.core.consult(handle, body, now_ms))
            node.bus.reply(incoming, Done("watched no more"))
            return
        if len(self._waiting) >= WAITING_MAX:
            error = Busy("Too many operations wait at this node.", "Come again.")
            node.bus.reply(incoming, to_failure(error))
            return
        if isinstance(body, Watch):
            before = self._watching.get((incoming.source, body.key))
            if before is not None:  # it asks again: the answer is told once more
                self._forget(before)
                node.perform(node.core.watcher_gone(before, now_ms))
            self._watching[(incoming.source, body.key)] = self._handle + 1
        self._handle += 1
        self._waiting[self._handle] = incoming
        node.perform(node.core.consult(self._handle, body, now_ms))

    def answered(self, reply: Reply) -> None:
        handle, message = reply.request, reply.message
        if handle == self._first:
            self._initialised(message)
            return
        ours = self._ours.pop(handle, None)
        if ours is not None:
            if not ours.done():
                ours.set_result(message)
            return
        incoming = self._waiting.get(handle)
        if incoming is None:
            return
        if not isinstance(message, Changed):
            self._forget(handle)
            self._node.bus.reply(incoming, message)
        elif handle in self._told:
            self._push(incoming.source, message)
        else:
            self._told.add(handle)
            self._node.bus.reply(incoming, message)

    def _push(self, client: str, message: Changed) -> None:
        try:
            self._node.bus.send(client, message)
        except Unavailable:
            self._node.bus.counters["sends_dropped"] += 1  # a later change tells it again

    def _initialised(self, message: object) -> None:
        self._first = 0
        if isinstance(message, Answer) and message.status != "ok":
            log.warning("nexus: no voters were made: %s", message.why or message.status)
        else:
            log.info("nexus: the voters are agreed")
            self._node.tell_agreed()

    def _forget(self, handle: int) -> None:
        incoming = self._waiting.pop(handle, None)
        self._told.discard(handle)
        if incoming is not None and isinstance(incoming.body, Watch):
            self._watching.pop((incoming.source, incoming.body.key), None)

    def client_gone(self, client: str) -> None:
        gone = [h for h, incoming in self._waiting.items() if incoming.source == client]
        for handle in gone:
            self._forget(handle)
            self._node.perform(self._node.core.watcher_gone(handle, self._node.now_ms()))
