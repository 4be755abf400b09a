"""The door: the one socket a stranger may knock at, and the client's side of knocking.

Interface rules: every answer leaves on the pipe its question came by, at once, so nobody can make
a node send to an address that was not proved. On one host an address is proved by lying in the
same 0700 directory as the node's own; whoever has no such address gets a reverse channel, which
the node opens and the stranger dials.
Invariants: D1 at most `REVERSE_CHANNELS_MAX` reverse channels.
"""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict
from typing import TYPE_CHECKING

import msgspec
import pynng

from manifold.kernel.errors import NoCluster, PeerError, Refused
from manifold.kernel.hyperbus import sockets
from manifold.kernel.hyperbus.messages import (
    VERSION,
    VERSION_OLDEST,
    DoorAnswer,
    Hello,
    Unwelcome,
    Welcome,
)
from manifold.kernel.limits import (
    REVERSE_CHANNELS_MAX,
)

if TYPE_CHECKING:
    from manifold.kernel.hyperbus.driver import Bus

KNOCKS_PER_WAKE_MAX = 64
_hello_decoder = msgspec.msgpack.Decoder(Hello)
_answer_decoder: msgspec.msgpack.Decoder[DoorAnswer] = msgspec.msgpack.Decoder(DoorAnswer)


class Door:
    """Answers `Hello`s for `bus`, which serves at `address`."""

    def __init__(self, bus: Bus, address: str, loop: asyncio.AbstractEventLoop) -> None:
        self._bus = bus
        self._address = address
        self._loop = loop
        self._reverse: OrderedDict[str, str] = OrderedDict()
        self._opened = 0
        self._socket = sockets.answerer(sockets.url(address, sockets.DOOR))
        loop.add_reader(self._socket.recv_fd, self._readable)

    def _readable(self) -> None:
        for _ in range(KNOCKS_PER_WAKE_MAX):
            try:
                question = self._socket.recv(block=False)
            except pynng.TryAgain:
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
        except (msgspec.DecodeError, RecursionError) as error:
            self._bus.counters["bad"] += 1
            return self._refuse(f"that is no greeting: {error}")
        if not VERSION_OLDEST <= hello.version <= VERSION:
            return self._refuse(f"version {hello.version} is not spoken here")
        if hello.cluster != self._bus.cluster:
            return self._refuse(f"this is cluster {self._bus.cluster!r}, not {hello.cluster!r}")
        reverse = ""
        if hello.address:
            if not self._proved(hello.address):
                return self._refuse("that address is not in this node's directory")
            self._bus.learn(hello.source, hello.address)
        else:
            reverse = self._open_reverse(hello.source)
        bus = self._bus
        return Welcome(
            VERSION, bus.cluster, bus.identity, bus.boot, bus.alias, self._address, reverse
        )

    def _refuse(self, reason: str) -> Unwelcome:
        return Unwelcome(VERSION_OLDEST, VERSION, reason)

    def _proved(self, address: str) -> bool:
        mine = self._address.removeprefix("ipc://")
        theirs = address.removeprefix("ipc://")
        if mine == self._address or theirs == address:
            return False
        return os.path.dirname(os.path.normpath(mine)) == os.path.dirname(os.path.normpath(theirs))

    def _open_reverse(self, source: str) -> str:
        while len(self._reverse) >= REVERSE_CHANNELS_MAX:  # D1
            oldest, _ = self._reverse.popitem(last=False)
            self._bus.forget(oldest)
        self._opened += 1
        listen = f"{self._address}.r{self._opened}"
        self._bus.learn_reverse(source, listen)
        self._reverse[source] = listen
        return listen

    def close(self) -> None:
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
    except msgspec.DecodeError as error:
        raise PeerError(f"The answer from {address} does not decode: {error}.") from error
    if isinstance(answer, Unwelcome):
        raise Refused(
            f"The node at {address} refused: {answer.reason}.",
            f"It speaks versions {answer.oldest} to {answer.newest}.",
        )
    return answer
