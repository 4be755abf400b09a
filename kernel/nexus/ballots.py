"""Ballots: the order of proposals to one register.

A ballot names its proposer's process twice over: by `boot`, which is on its disk before it first
speaks, and by a random `nonce`, because a disk that was restored from a copy repeats its boots.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

from msgspec import Meta

COUNTER_MAX = (1 << 62) - 1  # what msgpack and every reader of it holds exactly


class Ballot(NamedTuple):
    """Ordered by `n`; the rest breaks ties, so no two processes share a ballot."""

    n: Annotated[int, Meta(ge=0, le=COUNTER_MAX)]
    node: Annotated[str, Meta(max_length=34)]
    boot: Annotated[int, Meta(ge=0, le=COUNTER_MAX)]
    nonce: Annotated[int, Meta(ge=0, le=COUNTER_MAX)]


ZERO = Ballot(0, "", 0, 0)


def following(ballot: Ballot) -> Ballot:
    """The next ballot of the same process."""
    return Ballot(ballot.n + 1, ballot.node, ballot.boot, ballot.nonce)
