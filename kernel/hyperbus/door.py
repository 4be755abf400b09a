"""The door: the one socket a stranger may knock at, and the client's side of knocking.

Interface rules: every answer leaves on the pipe its question came by, at once, so nobody can make
a node send to an address that was not proved. On one host an address is proved by lying in the
same 0700 directory as the node's own; whoever has no such address gets a reverse channel, which
the node opens and the stranger dials.
Invariants: D1 at most `REVERSE_CHANNELS_MAX` reverse channels, and none that nobody has dialed for
`REVERSE_IDLE_MS`; D2 any bytes get an answer, and none of them stops the node; D3 a greeting does
not move a peer that is known to another address.
"""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict
from typing import TYPE_CHECKING

import msgspec
import pynng

from manifold.kernel.effects import Plane
from manifold.kernel.errors import NoCluster, PeerError, Refused, Unavailable
from manifold.kernel.hyperbus import sockets
from manifold.kernel.hyperbus.messages import (
    REFUSAL_CHARACTERS_MAX,
    REVERSE_IDLE_MS,
    UNDECODABLE,
    VERSION,
    VERSION_OLDEST,
    DoorAnswer,
    Hello,
    Unwelcome,
    Welcome,
)
from manifold.kernel.limits import IPC_PATH_BYTES_MAX, REVERSE_CHANNELS_MAX

if TYPE_CHECKING:
    from manifold.kernel.hyperbus.driver import Bus

KNOCKS_PER_WAKE_MAX = 64
TRY_CLIENTS_S = 5.0  # trying 4096 takes 40 ms: under 1 % of the time
_hello_decoder = msgspec.msgpack.Decoder(Hello)
_answer_decoder: msgspec.msgpack.Decoder[DoorAnswer] = msgspec.msgpack.Decoder(DoorAnswer)


class Door:
    """Answers `Hello`s for `bus`, which serves at `address`."""

    def __init__(
        self,
        bus: Bus,
        address: str,
        loop: asyncio.AbstractEventLoop,
        idle_ms: float = REVERSE_IDLE_MS,
    ) -> None:
        self._bus = bus
        self._address = address
        self._loop = loop
        self._reverse: OrderedDict[str, str] = OrderedDict()
        self._opened = 0
        self._tried_s = float("-inf")
        self._idle_s = idle_ms / 1000
        self._lonely: set[str] = set()  # nobody had dialed them at the last look
        self._check: asyncio.TimerHandle | None = None
        self._socket = sockets.answerer(sockets.url(address, sockets.DOOR))
        loop.add_reader(self._socket.recv_fd, self._readable)

    def _readable(self) -> None:
        for _ in range(KNOCKS_PER_WAKE_MAX):
            question = sockets.receive(self._socket)
            if question is None:
                return
            answer = msgspec.msgpack.encode(self.answer(question))
            try:
                self._socket.send(answer, block=False)
            except (pynng.TryAgain, pynng.BadState):
                self._bus.counters["door_answers_lost"] += 1  # the stranger has left

    def answer(self, question: bytes) -> DoorAnswer:
        """The answer to any bytes whatever."""
        try:
            hello = _hello_decoder.decode(question)
        except UNDECODABLE as error:
            self._bus.counters["bad"] += 1
            return self._refuse(f"that is no greeting: {error}")
        if not VERSION_OLDEST <= hello.version <= VERSION:
            return self._refuse(f"version {hello.version} is not spoken here")
        if hello.cluster != self._bus.cluster:
            return self._refuse(f"this is cluster {self._bus.cluster!r}, not {hello.cluster!r}")
        if hello.source == self._bus.identity:
            return self._refuse("that is this node's own identity")
        reverse = ""
        try:
            if hello.address:
                self._learn(hello)
            else:
                reverse = self._open_reverse(hello.source)
        except (Refused, Unavailable) as error:
            return self._refuse(error.message)
        except pynng.NNGException as error:  # out of descriptors, say
            return self._refuse(f"no channel can be opened: {error}")
        bus = self._bus
        return Welcome(
            VERSION, bus.cluster, bus.identity, bus.boot, bus.alias, self._address, reverse
        )

    def _refuse(self, reason: str) -> Unwelcome:
        return Unwelcome(VERSION_OLDEST, VERSION, reason[:REFUSAL_CHARACTERS_MAX])

    def _learn(self, hello: Hello) -> None:
        """D3."""
        if not self._proved(hello.address):
            raise Refused("that address is not in this node's directory")
        known = self._bus.address_of(hello.source)
        if known not in ("", hello.address):
            raise Refused(f"{hello.source} is known at another address")
        try:
            self._bus.learn(hello.source, hello.address)
        except Unavailable:
            self._forget_the_gone()
            self._bus.learn(hello.source, hello.address)

    def _forget_the_gone(self) -> None:
        """Make room: clients that ended without a goodbye. Not often: each of 4096 is tried."""
        now_s = self._loop.time()
        if now_s < self._tried_s + TRY_CLIENTS_S:
            return
        self._tried_s = now_s
        for client, address in self._bus.clients():
            if not sockets.listens(sockets.url(address, Plane.CONTROL), sockets.PUSHER):
                self._bus.forget(client)

    def _proved(self, address: str) -> bool:
        """Whether it is a plain name in our own directory, short enough to be a socket's."""
        mine = self._address.removeprefix("ipc://")
        theirs = address.removeprefix("ipc://")
        if mine == self._address or theirs == address or "\0" in theirs:
            return False
        folder, name = os.path.split(theirs)
        return (
            folder == os.path.dirname(mine)
            and name not in ("", ".", "..")
            and len(os.fsencode(theirs)) <= IPC_PATH_BYTES_MAX
        )

    def _open_reverse(self, source: str) -> str:
        if source not in self._reverse and self._bus.address_of(source):
            raise Refused(f"{source} is known at an address of its own")  # D3
        while source not in self._reverse and len(self._reverse) >= REVERSE_CHANNELS_MAX:  # D1
            oldest, _ = self._reverse.popitem(last=False)
            self._bus.forget(oldest)
        self._lonely.discard(source)
        self._opened += 1
        listen = f"{self._address}.r{self._opened}"
        self._bus.learn_reverse(source, listen)
        self._reverse[source] = listen
        self._reverse.move_to_end(source)
        if self._check is None:
            self._check = self._loop.call_later(self._idle_s, self._close_idle)
        return listen

    def _close_idle(self) -> None:
        """D1: close what was seen without a dialer twice in a row."""
        self._check = None
        for source in list(self._reverse):
            if self._bus.dialed_by(source):
                self._lonely.discard(source)
            elif source in self._lonely:
                self._lonely.discard(source)
                del self._reverse[source]
                self._bus.forget(source)
            else:
                self._lonely.add(source)
        if self._reverse:
            self._check = self._loop.call_later(self._idle_s, self._close_idle)

    def close(self) -> None:
        if self._check is not None:
            self._check.cancel()
        self._loop.remove_reader(self._socket.recv_fd)
        self._socket.close()


def knock(address: str, hello: Hello, timeout_ms: float) -> Welcome:
    """Greet the node at `address`, blocking. `NoCluster` where nobody answers."""
    try:
        with sockets.asker(sockets.url(address, sockets.DOOR), timeout_ms) as socket:
            socket.send(msgspec.msgpack.encode(hello))
            answer = _answer_decoder.decode(socket.recv())
    except pynng.NNGException as error:
        raise NoCluster(
            f"Nobody answers at {address}: {error}.", "Start a cluster with `manifold up`."
        ) from error
    except UNDECODABLE as error:
        raise PeerError(f"The answer from {address} does not decode: {error}.") from error
    if isinstance(answer, Unwelcome):
        raise Refused(
            f"The node at {address} refused: {answer.reason}.",
            f"It speaks versions {answer.oldest} to {answer.newest}.",
        )
    return answer
