"""How a node leaves: it takes on nothing more, hands over what it has, and says goodbye.

Interface rules: `drain` begins, once; `look` is called after whatever happens meanwhile, and lets
the node leave when nothing is lost by it; at the deadline it leaves in any case, as if it had
died, which costs work that is done again and no job. `settle` lets others vote in its place.
Source: design page of node, "Leaving well".
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from manifold.kernel.membership.messages import State
from manifold.kernel.messages import Leaves, SettleVoters, VotersSettled
from manifold.kernel.nexus import seating
from manifold.kernel.nexus.messages import Answer, SetVoters
from manifold.vm.kid import Kid

if TYPE_CHECKING:
    from manifold.kernel.node import Node

log = logging.getLogger("manifold.node")

LEAVE_S = 0.3  # after saying goodbye, the time for it to reach others
CHANGE_MS = 5000.0  # of the first try to change voters: it takes a few ms. Twice as long each time
REFUSALS_MAX = 4  # somebody else changes them at the same time, and again: three such are bad luck
RETRY_S = 0.2  # a change of somebody else takes a few round trips


class Leaving:
    """See the module."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._deadline: asyncio.TimerHandle | None = None
        self.left = False

    @property
    def draining(self) -> bool:
        return self._deadline is not None

    def drain(self, deadline_ms: float) -> None:
        """Give back and hand over what is here."""
        node = self._node
        if self.draining or self.left:
            return
        log.info("drains: it takes on nothing more")
        self._deadline = node.loop.call_later(deadline_ms / 1000, self._late)
        node.perform(node.core.drain(node.now_ms()))

    def look(self) -> None:
        """Leave, if everything is handed over."""
        if self.draining and self._node.core.drained:
            log.info("drained: nothing is left to do here")
            self.close()
            self.leave()

    def _late(self) -> None:
        held = self._node.core.scheduler.runner.held
        owned = len(self._node.core.scheduler.owner.jobs)
        log.warning("not drained in time: %d shards and %d jobs are left behind", held, owned)
        self.close()
        self.leave()

    def leave(self) -> None:
        """Tell the others, then end."""
        if self.left:
            return
        self.left = True
        node = self._node
        node.core.scheduler.runner.cordoned = True
        node.perform(node.core.leave(node.now_ms()))
        for client, _ in node.bus.clients():
            node.bus.send(client, Leaves())
        node.loop.call_later(LEAVE_S, node.end, 0, "left the cluster")

    def close(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    # -- voters ---------------------------------------------------------------------------------

    async def settle(self, wish: SettleVoters) -> None:
        """None of those who leave votes any more: others do. The supervisor is told.

        What was late is tried on, since a host that is overloaded is late and not gone; unless all
        that did not answer are known to be gone.
        """
        why, voters, refusals, change_ms = "", list[Kid](), 0, CHANGE_MS
        late_s = self._node.loop.time() + wish.timeout_ms / 1000
        while (left_ms := (late_s - self._node.loop.time()) * 1000) > 0:
            config = self._node.core.nexus.config
            if config is None:
                self._node.tell(VotersSettled(wish.number, True))
                return
            voters = [Kid(voter.kid) for voter in config.new]
            members = self._node.core.membership.members()
            labels = {each.kid: each.meta.labels for each in members}
            target = seating.settle(voters, wish.leaving, self._candidates(), labels)
            if not target:
                self._node.tell(VotersSettled(wish.number, False, why="nobody else can vote"))
                return
            # Also where it seems that nothing changes: who votes is known once they were asked.
            wanted = SetVoters(tuple(target), min(change_ms, left_ms), config.epoch)
            answer = await self._node.consulting.ask(wanted)
            assert isinstance(answer, Answer), "a change of voters is answered by one"
            if answer.status == "ok":
                self._node.tell(VotersSettled(wish.number, True, tuple(target)))
                return
            silent = ", ".join(self._alias(kid) for kid in answer.missing)
            why = (answer.why or answer.status) + (f" No answer from {silent}." if silent else "")
            refusals += answer.status == "refused"
            known = self._node.core.nexus.config
            news = known is not None and known.epoch != config.epoch
            if refusals == REFUSALS_MAX or (self._gone(answer.missing) and not news):
                break
            change_ms *= 2
            await asyncio.sleep(min(RETRY_S, left_ms / 1000))
        self._node.tell(VotersSettled(wish.number, False, tuple(voters), why))

    def _gone(self, silent: Sequence[str]) -> bool:
        """Whether somebody did not answer, and nobody of them can be expected to."""
        members = [self._node.core.membership.get(Kid(kid)) for kid in silent]
        return bool(members) and all(
            member is not None and member.state in (State.DEAD, State.LEFT) for member in members
        )

    def _alias(self, kid: str) -> str:
        member = self._node.core.membership.get(Kid(kid))
        return member.meta.alias if member is not None else kid[:10]

    def _candidates(self) -> list[seating.Candidate]:
        """Every node that is well, in the order of their aliases."""
        members = self._node.core.membership.members()
        well = [each for each in members if each.state == State.ALIVE and each.meta.alias]
        well.sort(key=lambda each: each.meta.alias)
        return [(each.kid, each.meta.labels) for each in well]
