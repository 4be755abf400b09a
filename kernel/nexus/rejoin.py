"""A voter whose disk was damaged joins the voters anew, without an operator. Pure.

Interface: made with the step that an earlier process of this node left behind ("" where there is
nothing to do); `tick` and `answered` return effects, among them `Notify(RejoinStep(…))`, which the
node makes durable. Two changes of the voters: first without this node, whose old disk is listed,
then with it and its new disk. Each needs a majority of those who vote then; where too many disks
were lost at once nothing is done, and nothing that was agreed is at risk.
Source: design page of Nexus, storage (amnesia: rejoin only as a new voter).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from manifold.kernel.effects import Effect, Notify, SetTimer
from manifold.kernel.nexus.ask import Ask
from manifold.kernel.nexus.configs import VOTERS_MAX
from manifold.kernel.nexus.messages import Answer, SetVoters
from manifold.kernel.nexus.protocol import Nexus
from manifold.vm.kid import Kid

LOOK_MS = 1000.0
TIMEOUT_MS = 30_000.0

Step = Literal["", "damaged", "removed"]


@dataclass(frozen=True, slots=True)
class RejoinStep:
    """How far it is, and for people why. "": there is nothing more to do."""

    step: Step
    why: str


class Rejoin:
    """See the module."""

    def __init__(self, me: Kid, nexus: Nexus, step: Step) -> None:
        self._me = me
        self._nexus = nexus
        self.step: Step = step
        self._token = 0
        self._asked = False

    def nexus_known(self, now_ms: float) -> list[Effect]:
        """Whether or not anybody noticed: a disk that is not the one listed has been lost."""
        config = self._nexus.config
        assert config is not None, "it is known"
        listed = {voter.kid: voter.disk for voter in (*config.old, *config.new)}
        if not self.step and listed.get(self._me, self._nexus.acceptor.disk) != (
            self._nexus.acceptor.disk
        ):
            self.step = "damaged"
            lost = RejoinStep("damaged", "the disk with which this node votes is not here any more")
            return [Notify(lost), *self.tick(now_ms)]
        return self.tick(now_ms)

    def tick(self, now_ms: float) -> list[Effect]:
        if not self.step or self._asked:
            return []
        config = self._nexus.config
        if config is None or config.joint:
            return [SetTimer(now_ms + LOOK_MS)]
        listed = {voter.kid: voter.disk for voter in config.new}
        others = tuple(kid for kid in listed if kid != self._me)
        if listed.get(self._me) == self._nexus.acceptor.disk:
            return self._over("this node votes again, with a new disk")
        if self._me in listed and not others:
            return self._over("this node was the only voter: what was agreed is lost with its disk")
        if self._me in listed:
            removed: list[Effect] = []
            if self.step == "damaged":  # before it is done: it may be, and nobody tell us
                self.step = "removed"
                why = "the disk that this node voted with is to be no voter any more"
                removed = [Notify(RejoinStep("removed", why))]
            return [*removed, *self._change(others, config.epoch)]
        if self.step == "damaged" or len(others) >= VOTERS_MAX:
            return self._over("this node does not vote any more")
        return self._change((*others, self._me), config.epoch)

    def _change(self, voters: tuple[str, ...], epoch: int) -> list[Effect]:
        self._token += 1
        self._asked = True
        return [Notify(Ask(self._token, SetVoters(voters, TIMEOUT_MS, epoch)))]

    def _over(self, why: str) -> list[Effect]:
        self.step = ""
        return [Notify(RejoinStep("", why))]

    def answered(self, token: int, answer: Answer, now_ms: float) -> list[Effect]:
        self._asked = False
        return [SetTimer(now_ms + LOOK_MS)]
