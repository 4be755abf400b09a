"""How a node leaves: it takes on nothing more, hands over what it has, and says goodbye.

Interface rules: `drain` begins, once; `look` is called after whatever happens meanwhile, and lets
the node leave when nothing is lost by it; at the deadline it leaves in any case, as if it had
died, which costs work that is done again and no job. `settle` lets others vote in its place.
Source: design page of node, "Leaving well".
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from manifold.kernel.membership.messages import State
from manifold.kernel.messages import SettleVoters, VotersSettled
from manifold.kernel.nexus import seating
from manifold.kernel.nexus.messages import Answer, SetVoters
from manifold.vm.kid import Kid

if TYPE_CHECKING:
    from manifold.kernel.node import Node

log = logging.getLogger("manifold.node")

LEAVE_S = 0.3  # after saying goodbye, the time for it to reach others
CHANGE_MS = 5000.0  # of one change of voters: a majority answers in a few ms, or is not there
TRIES_MAX = 4  # somebody else changes them at the same time, and again: three such are bad luck
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
        node.loop.call_later(LEAVE_S, node.end, 0, "left the cluster")

    def close(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    # -- voters ---------------------------------------------------------------------------------

    async def settle(self, wish: SettleVoters) -> None:
        """None of those who leave votes any more: others do. The supervisor is told."""
        why, voters = "", list[Kid]()
        for _ in range(TRIES_MAX):
            config = self._node.core.nexus.config
            if config is None:
                self._node.tell(VotersSettled(wish.number, True))
                return
            voters = [Kid(voter.kid) for voter in config.new]
            members = self._node.core.membership.members()
            known = {each.kid: each.meta.labels for each in members}
            target = seating.settle(voters, wish.leaving, self._candidates(), known)
            if not target:
                self._node.tell(VotersSettled(wish.number, False, why="nobody else can vote"))
                return
            # Also where it seems that nothing changes: who votes is known once they were asked.
            wanted = SetVoters(tuple(target), CHANGE_MS, config.epoch)
            answer = await self._node.consulting.ask(wanted)
            assert isinstance(answer, Answer), "a change of voters is answered by one"
            if answer.status == "ok":
                self._node.tell(VotersSettled(wish.number, True, tuple(target)))
                return
            silent = ", ".join(self._alias(kid) for kid in answer.missing)
            why = (answer.why or answer.status) + (f" No answer from {silent}." if silent else "")
            if answer.status not in ("refused", "busy"):  # by somebody else's change
                break
            await asyncio.sleep(RETRY_S)
        self._node.tell(VotersSettled(wish.number, False, tuple(voters), why))

    def _alias(self, kid: str) -> str:
        member = self._node.core.membership.get(Kid(kid))
        return member.meta.alias if member is not None else kid[:10]

    def _candidates(self) -> list[seating.Candidate]:
        """Every node that is well, in the order of their aliases."""
        members = self._node.core.membership.members()
        well = [each for each in members if each.state == State.ALIVE and each.meta.alias]
        well.sort(key=lambda each: each.meta.alias)
        return [(each.kid, each.meta.labels) for each in well]
