"""Where other nodes are reached: what membership tells, for the bus.

Interface rules: `learn` takes each news of a member before anything is sent with it; `send_anyway`
what the bus has refused to send. The bus keeps a line to each node that is held for alive. Of one
that is held for dead it keeps nothing; what membership itself sends to it goes to its last address,
as to a seed: else two halves that have buried each other could not meet again, and whoever was
believed dead by hearsay could neither be answered nor proved alive.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, get_args

from manifold.kernel.errors import Unavailable
from manifold.kernel.hyperbus.driver import Bus
from manifold.kernel.membership import messages as membership
from manifold.kernel.membership.messages import Member, State
from manifold.vm.kid import Kid

log = logging.getLogger("manifold.node")

_TO_ANYBODY = frozenset(get_args(membership.Message))


class Addressing:
    """See the module. `known` tells what membership knows of a node, the dead included."""

    def __init__(self, bus: Bus, known: Callable[[Kid], Member | None]) -> None:
        self._bus = bus
        self._known = known

    def learn(self, member: Member) -> None:
        if member.state not in (State.ALIVE, State.SUSPECT):
            self._bus.forget(member.kid)
        elif member.meta.addresses:
            try:
                self._bus.learn(member.kid, member.meta.addresses[0])
            except Unavailable as error:
                log.warning("%s stays out of reach: %s", member.meta.alias, error)

    def send_anyway(self, to: str, message: Any) -> bool:
        """What the bus refused to send, to the last address of who has no line; whether it left."""
        if self._bus.knows(to) or type(message) not in _TO_ANYBODY:
            return False
        member = self._known(Kid(to))
        if member is None or not member.meta.addresses:
            return False
        try:
            self._bus.send(member.meta.addresses[0], message)
        except Unavailable:
            return False
        return True
