"""Whose turn it is, without asking: highest random weight.

Interface: `first(key, kids)` is the same on every node that knows the same nodes, and when one of
them goes only its keys move.
Source: Thaler and Ravishankar, "Using Name-Based Mappings to Increase Hit Rates" (1998).
"""

from __future__ import annotations

from collections.abc import Sequence

import blake3

from manifold.vm.kid import Kid


def first(key: str, kids: Sequence[Kid]) -> Kid | None:
    """The node that the hash of it and the key puts first; None where there is none."""
    if not kids:
        return None
    return max(kids, key=lambda kid: blake3.blake3(f"{key}\0{kid}".encode()).digest())
