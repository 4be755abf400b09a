"""Who votes: configurations, their epochs and quorums, and the preferred proposer of a key.

Voters are chosen explicitly. A voter is a node and the disk it started with: a node that lost its
disk is another voter, and says so. While voters change, a configuration is joint: every quorum is
a majority of the old and of the new ones.
Invariants:
  E1  an epoch is `origin << 32 | count`; configurations of one origin are numbered from 1, each
      two of them that follow each other share a majority;
  E2  the origin is derived from the first voters, so that two who initialise the same ones agree.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Annotated

import blake3
import msgspec
from msgspec import Meta

from manifold.kernel.nexus.ballots import COUNTER_MAX
from manifold.vm.kid import Kid

VOTERS_MAX = 7  # more cost throughput and save nothing: more groups of five do
COUNT_BITS = 32
ORIGIN_BITS = 30  # 32 + 30 bits are what a counter of the wire holds

KidText = Annotated[str, Meta(min_length=34, max_length=34)]
Epoch = Annotated[int, Meta(ge=0, le=COUNTER_MAX)]


class Voter(msgspec.Struct, frozen=True, array_like=True):
    kid: KidText
    disk: Annotated[int, Meta(ge=1, le=COUNTER_MAX)]


Voters = Annotated[tuple[Voter, ...], Meta(max_length=VOTERS_MAX)]


class Config(msgspec.Struct, frozen=True, array_like=True):
    """`old` is empty but while voters change."""

    epoch: Epoch
    old: Voters
    new: Voters

    @property
    def joint(self) -> bool:
        return bool(self.old)

    @property
    def origin(self) -> int:
        return self.epoch >> COUNT_BITS

    @property
    def count(self) -> int:
        return self.epoch & ((1 << COUNT_BITS) - 1)

    def kids(self) -> tuple[Kid, ...]:
        """Everyone who votes, once."""
        both = dict.fromkeys(voter.kid for voter in (*self.new, *self.old))
        return tuple(Kid(kid) for kid in both)

    def is_voter(self, kid: str, disk: int) -> bool:
        voter = Voter(kid, disk)
        return voter in self.new or voter in self.old

    def quorum(self, kids: Container[str]) -> bool:
        """Whether `kids` hold a majority of the new ones and, while joint, of the old ones."""
        return majority(self.new, kids) and (not self.old or majority(self.old, kids))

    def toward(self, voters: Sequence[Voter]) -> Config:
        """The joint configuration that leads from this one to `voters`."""
        assert not self.joint, "one change at a time"
        return Config(self.epoch + 1, self.new, tuple(voters))

    def settled(self) -> Config:
        """The configuration after this joint one."""
        assert self.joint, "only a joint one has a successor of its own"
        return Config(self.epoch + 1, (), self.new)


def final_epoch(epoch: int) -> int:
    """Of the final configuration that this one is or leads to: odd counts are final."""
    return epoch + 1 - epoch % 2


def majority(voters: Sequence[Voter], kids: Container[str]) -> bool:
    held = 0
    for voter in voters:  # a generator costs twice as much, and this is asked for every answer
        held += voter.kid in kids
    return 2 * held > len(voters)


def first_config(voters: Sequence[Voter]) -> Config:
    """The first configuration of these voters (E2)."""
    ordered = tuple(sorted(voters, key=lambda voter: voter.kid))
    digest = blake3.blake3(msgspec.msgpack.encode(ordered)).digest()
    origin = int.from_bytes(digest[:4], "big") >> (32 - ORIGIN_BITS)
    return Config((origin or 1) << COUNT_BITS | 1, (), ordered)
