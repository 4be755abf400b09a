"""What a proposer knows of one register and of the round it has under way. Data only.

Interface: `Operation` is one wish, with `done` to call once its fate is known; `Register` holds
the queue of a key; `Round` is one phase with the voters of one configuration.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from enum import Enum

import msgspec

from manifold.kernel.nexus.ballots import ZERO, Ballot
from manifold.kernel.nexus.configs import Config
from manifold.kernel.nexus.gathering import Gathering
from manifold.kernel.nexus.messages import Promise, ReadReply
from manifold.kernel.nexus.values import Change, Get, Marked, Result, Value, Wanted, absent
from manifold.vm.kid import Kid

Done = Callable[[Result], None]


@dataclass(slots=True)
class Operation:
    """One wish. `base` as in `values.Wanted`; `sent`: an Accept with it, or a Forward, went out."""

    op: str
    key: str
    change: Change
    deadline_ms: float
    done: Done
    base: int | None = None
    rebase: bool = False
    sent: bool = False
    fixed: bool = False  # `base` is the client's: there may be copies at other nodes
    stale: bool = False
    local: bool = True
    everywhere: bool = False  # a tombstone that every voter has to accept, then it collapses
    over: bool = False
    tried: int = 0  # nodes that were asked to propose it and did not answer

    def wanted(self) -> Wanted:
        return Wanted(self.op, self.change, self.base, self.rebase)

    @property
    def reads(self) -> bool:
        return isinstance(self.change, Get)

    @property
    def blind(self) -> bool:
        """Whether it may be proposed as often as one likes: marks decide."""
        return isinstance(self.change, Marked)


class Phase(Enum):
    READ = "read"
    PREPARE = "prepare"
    ACCEPT = "accept"


Heard = Promise | ReadReply


@dataclass(slots=True)
class Round:
    """One phase; replies are kept by voter."""

    rid: int
    phase: Phase
    config: Config
    ballot: Ballot
    batch: list[Operation]
    sent_ms: float
    spared_ms: float = float("-inf")  # when those were asked who were not asked at first
    heard: dict[Kid, Heard] = field(default_factory=dict)
    promised: dict[Kid, Ballot] = field(default_factory=dict)  # by those who accepted
    refused: dict[Kid, Ballot] = field(default_factory=dict)
    grace: bool = False  # a quorum has spoken in vain; the others have a moment left
    full: bool = False  # some refused because they take no further keys
    resent: dict[Kid, int] = field(default_factory=dict)
    kids: tuple[Kid, ...] = ()  # everyone who votes
    asked: tuple[Kid, ...] = ()  # those of them that it has been sent to
    value: Value | None = None
    results: list[Result] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.kids = self.asked = self.config.kids()

    @property
    def everywhere(self) -> bool:
        return self.batch[0].everywhere

    def enough(self, kids: Container[str]) -> bool:
        """A quorum; for what every voter has to accept, all of them."""
        if self.everywhere:
            return all(kid in kids for kid in self.kids)
        return self.config.quorum(kids)

    @property
    def answered(self) -> dict[Kid, None]:
        return dict.fromkeys([*self.heard, *self.promised])

    @property
    def spoke(self) -> dict[Kid, None]:
        return {**self.answered, **dict.fromkeys(self.refused)}

    def missing(self) -> tuple[Kid, ...]:
        """Voters that were asked and said nothing."""
        spoke = self.spoke
        return tuple(kid for kid in self.asked if kid not in spoke)

    def spared(self) -> tuple[Kid, ...]:
        """Voters that were not asked."""
        if self.asked is self.kids:
            return ()
        return tuple(kid for kid in self.kids if kid not in self.asked)

    @property
    def in_vain(self) -> bool:
        """A quorum has spoken: what is missing are refusals taken back, which may never come."""
        return not self.everywhere and self.config.quorum(self.spoke)

    def hopeless(self) -> bool:
        """Whether too many have refused."""
        if self.everywhere and self.refused:
            return True
        left = {kid: None for kid in self.kids if kid not in self.refused}
        return not self.config.quorum(left)

    def latest(self) -> Heard:
        """The reply with the highest accepted ballot."""
        return max(self.heard.values(), key=lambda reply: reply.accepted)

    def floor(self) -> Ballot:
        return max(reply.floor for reply in self.heard.values())

    def present(self) -> Value:
        """What to change: V3. A tombstone that somebody may have dropped, whose floor is then not
        below its ballot, counts on from that floor; so does a register without a record.

        Floors are of a shard: another key may have raised it. So what cannot be won back is kept,
        which are the marks; a ring that is lost costs no more than a `maybe` (V2).
        """
        latest, floor = self.latest(), self.floor()
        if latest.value is None:
            return absent(floor)
        if latest.value.dead and latest.accepted <= floor:
            return msgspec.structs.replace(absent(floor), marks=latest.value.marks)
        return latest.value

    def told(self) -> Value:
        """What to answer where nothing is proposed: no stamp that a later value could be below.

        Floors differ between voters; every quorum has one of these, so none is below the lowest.
        """
        found = self.latest().value
        return found or absent(min(reply.floor for reply in self.heard.values()))

    def agreed(self) -> bool:
        """Whether one quorum reports the accepted ballot that is the highest heard of."""
        accepted = self.latest().accepted
        same = {kid: None for kid, reply in self.heard.items() if reply.accepted == accepted}
        return self.config.quorum(same)


@dataclass(slots=True)
class Cache:
    """A quorum of `epoch` has promised `ballot` and holds `value`."""

    ballot: Ballot
    value: Value
    epoch: int


@dataclass(slots=True)
class Register:
    """A key, as its proposer here sees it."""

    key: str
    n: int  # no ballot above it was used by this process
    queue: deque[Operation] = field(default_factory=deque)
    round: Round | None = None
    cache: Cache | None = None
    tries: int = 0
    waiting: bool = False  # backing off
    contended_until_ms: float = float("-inf")
    highest: Ballot = ZERO  # heard of in a refusal
    missing: tuple[Kid, ...] = ()  # voters that said nothing in the last round that failed
    gathering: Gathering = field(default_factory=Gathering)

    @property
    def idle(self) -> bool:
        return self.round is None and not self.queue and not self.waiting
