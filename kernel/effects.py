"""What a pure protocol asks its driver to do. Effects are data; nothing here does anything.

Interface rules:
  - a protocol returns effects in order; a driver carries them out in order;
  - a `Persist` must be durable before any later effect of the same list is carried out; where the
    lists of several protocols become one, `Held` says which effects those were;
  - `SetTimer` asks for one call of `tick(now_ms)` at `at_ms` or soon after; only the latest
    `SetTimer` of a protocol counts, so a protocol always asks for its earliest deadline.

They are structs, since a node makes some ten of them for each message. Time is milliseconds as a
float, from a clock of the driver's that never goes back. Pattern: h11's and etcd-raft's cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any, Protocol

import msgspec

from manifold.vm.kid import Kid


class Plane(Enum):
    """Control never waits behind data: they are two sockets."""

    CONTROL = "control"
    DATA = "data"


class Send(msgspec.Struct, frozen=True, gc=False):
    """One message to a node by KID, or to an address (`ipc://…`) whose KID is not known yet."""

    to: str
    message: msgspec.Struct
    plane: Plane = Plane.CONTROL


class Persist(msgspec.Struct, frozen=True, gc=False):
    """Replace the durable record `name` by `record`, atomically, synced to disk."""

    name: str
    record: bytes


class SetTimer(msgspec.Struct, frozen=True, gc=False):
    at_ms: float


class Reply(msgspec.Struct, frozen=True, gc=False):
    """The answer to a request; `request` is the handle the driver passed in with it."""

    request: int
    message: msgspec.Struct


class Notify(msgspec.Struct, frozen=True, gc=False):
    """Something other subsystems of this node, its log or its metrics want to know."""

    event: Any


class Held(msgspec.Struct, frozen=True, gc=False):
    """A `Persist`, and what must wait for it; effects that follow need not. Writes begin in order.

    What is in `then` may be a `Send` to this node itself, which is then due to be delivered.
    """

    persist: Persist
    then: tuple[Effect, ...]


Effect = Send | Persist | SetTimer | Reply | Notify | Held


def after_writes(effects: Sequence[Effect], event: Any) -> list[Effect]:
    """`effects`, and `event` noted when all the writes among them are durable: they end in order.

    At once, where there are none.
    """
    for at in range(len(effects) - 1, -1, -1):
        effect = effects[at]
        if isinstance(effect, Held):
            held = Held(effect.persist, (*effect.then, Notify(event)))
            return [*effects[:at], held, *effects[at + 1 :]]
    return [*effects, Notify(event)]


class Machine(Protocol):
    """The shape of every protocol: an event in, a list of effects out."""

    def receive(self, source: Kid, message: Any, now_ms: float) -> list[Effect]: ...

    def tick(self, now_ms: float) -> list[Effect]: ...
