"""Rendezvous hashing: which members of a ring a key belongs to, computed alike everywhere.

Interface: `order(key, members)` is every member, the best first; the first r of them hold r
replicas. A member that goes leaves the order of the others as it is, one that comes is put
somewhere among them, so only the keys move that must.

Each member draws `u` in (0, 1) from the hash of the key and its KID, and scores `u ** (1 / w)`: it
comes first with probability w / sum of all w. Weights are powers of two, so the power is a chain
of square roots, which every machine rounds alike; logarithms differ in their last bit between C
libraries, and two nodes could then place a key differently.
Sources: Thaler and Ravishankar, "Using name-based mappings to increase hit rates" (1998); the
weighted form: Efraimidis and Spirakis, "Weighted random sampling with a reservoir" (2006).
"""

from __future__ import annotations

from collections.abc import Iterable
from math import log2, sqrt

import blake3

from manifold.kernel.registry.messages import WEIGHT_MAX
from manifold.vm.kid import Kid

UNIT_BYTES = 1 << 26  # weighs 1: the least memory that a node may be configured to have
KEEP_PART = 0.75  # a weight is kept until it is off by more: a rounding must not move data
_STEP = 0.5**52


def score(key: str, kid: Kid, weight: int) -> float:
    digest = blake3.blake3(f"{key}\0{kid}".encode()).digest(8)
    drawn = ((int.from_bytes(digest, "big") >> 12) + 0.5) * _STEP
    for _ in range(weight):
        drawn = sqrt(drawn)
    return drawn


def order(key: str, members: Iterable[tuple[Kid, int]]) -> list[Kid]:
    """`members` with their weights (as in `Kind`); a tie goes to the larger KID."""
    scored = [(score(key, kid, weight), kid) for kid, weight in members]
    return [kid for _, kid in sorted(scored, reverse=True)]


def weight_of(memory_bytes: int, before: int | None) -> int:
    """The weight of a node with so much memory; `before` is what the ring says of it."""
    exact = log2(max(memory_bytes, UNIT_BYTES) / UNIT_BYTES)
    if before is not None and abs(exact - before) <= KEEP_PART:
        return before
    return min(WEIGHT_MAX, round(exact))
