"""What membership has told of each node, as far as the registry goes by it.

Interface: `changed` takes the news, `expect` names who stands in a register, `late` gives back
time during which this node was stopped. `nodes` is to be read only.
Invariants:
  V1  `since_ms` is when this node, running, first knew the node to be in its state: who was
      stopped, or has just started, has not yet waited for anybody;
  V2  at most `NODES_MAX` nodes are kept, and those who are alive stay.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from manifold.kernel.membership.messages import Member, Meta, State
from manifold.vm.kid import Kid

NODES_MAX = 8192  # as many as membership remembers

_AS = {State.ALIVE: State.ALIVE, State.SUSPECT: State.ALIVE, State.DEAD: State.DEAD}


@dataclass(slots=True)
class Seen:
    """`state` is ALIVE (a suspect is), DEAD or LEFT. `meta` is None of who was never seen."""

    state: State
    boot: int
    since_ms: float
    meta: Meta | None

    @property
    def alive(self) -> bool:
        return self.state == State.ALIVE


class View:
    """See the module."""

    def __init__(self) -> None:
        self.nodes: dict[Kid, Seen] = {}

    def changed(self, member: Member, now_ms: float) -> None:
        """A node without an alias takes no part in the cluster: it is an observer."""
        if not member.meta.alias:
            return
        state = _AS.get(member.state, State.LEFT)
        seen = self.nodes.get(member.kid)
        if seen is not None and (seen.state, seen.boot) == (state, member.boot):
            seen.meta = member.meta
            return
        if seen is None:
            self._make_room()
        self.nodes[member.kid] = Seen(state, member.boot, now_ms, member.meta)

    def expect(self, kid: Kid, now_ms: float) -> None:
        """It stands in a register: from now on it is waited for (V1)."""
        if kid not in self.nodes:
            self._make_room()
            self.nodes[kid] = Seen(State.DEAD, 0, now_ms, None)

    def late(self, late_ms: float) -> None:
        for seen in self.nodes.values():
            seen.since_ms += late_ms

    def prune(self, keep: Container[Kid], before_ms: float) -> None:
        """Forget who is gone since `before_ms` and stands in no register."""
        gone = [
            kid
            for kid, seen in self.nodes.items()
            if not seen.alive and seen.since_ms < before_ms and kid not in keep
        ]
        for kid in gone:
            del self.nodes[kid]

    def alive(self) -> list[Kid]:
        return sorted(kid for kid, seen in self.nodes.items() if seen.alive)

    def _make_room(self) -> None:
        if len(self.nodes) >= NODES_MAX:
            gone = [(seen.since_ms, kid) for kid, seen in self.nodes.items() if not seen.alive]
            if gone:
                del self.nodes[min(gone)[1]]
