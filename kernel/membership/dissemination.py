"""News waiting to be told: each update is sent a bounded number of times, the newest first.

One update per node: a newer one about the same node replaces the older. Updates lie in buckets
by how often they have been sent, so choosing a packet costs what it takes, not what waits.
Source: Das, Gupta, Motivala, "SWIM" (2002), section 4.1 and 5.3 (least gossiped first).

Invariants: D1 an update is sent at most `limit` times, give or take one round; D2 a packet never
exceeds its budget.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import msgspec

from manifold.kernel.membership.messages import PACKET_UPDATES_MAX, Update

UPDATE_BYTES_MIN = 40  # a KID alone takes 36; nothing fits into less
SCAN_MAX = 2 * PACKET_UPDATES_MAX  # updates looked at for one packet; most fit at once

_ENCODER = msgspec.msgpack.Encoder()


def retransmits(factor: int, nodes: int) -> int:
    """How often each node tells an update: factor * ceil(log10(N + 1))."""
    return factor * math.ceil(math.log10(nodes + 1))


class News:
    """The queue. `take` chooses a packet's updates and counts them as sent."""

    __slots__ = ("_buckets", "_level")

    def __init__(self) -> None:
        self._buckets: list[dict[str, tuple[Update, int]]] = [{}]
        self._level: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._level)

    def __contains__(self, kid: str) -> bool:
        return kid in self._level

    def fresh(self) -> bool:
        """Whether something waits that has never been sent."""
        return bool(self._buckets[0])

    def put(self, update: Update) -> None:
        """Tell `update`; what was waiting about the same node is out of date."""
        self.drop(update.kid)
        self._buckets[0][update.kid] = (update, len(_ENCODER.encode(update)))
        self._level[update.kid] = 0

    def drop(self, kid: str) -> None:
        level = self._level.pop(kid, None)
        if level is not None:
            del self._buckets[level][kid]

    def take(self, budget_bytes: int, copies: int, limit: int) -> tuple[Update, ...]:
        """At most `budget_bytes` of updates for a packet that goes out `copies` times."""
        if not self._level:
            return ()
        chosen: list[tuple[int, Update, int]] = []
        left_bytes = budget_bytes
        for scanned, (level, update, size_bytes) in enumerate(self._least_told()):
            if left_bytes < UPDATE_BYTES_MIN or scanned >= SCAN_MAX:
                break
            if size_bytes <= left_bytes:
                chosen.append((level, update, size_bytes))
                left_bytes -= size_bytes
            if len(chosen) == PACKET_UPDATES_MAX - 1:  # one place stays for a forced update
                break
        for level, update, size_bytes in chosen:
            self._sent(level, update, size_bytes, copies, limit)
        assert left_bytes >= 0, "D2"
        return tuple(update for _, update, _ in chosen)

    def _least_told(self) -> Iterator[tuple[int, Update, int]]:
        for level, bucket in enumerate(self._buckets):
            for update, size_bytes in reversed(bucket.values()):
                yield level, update, size_bytes

    def _sent(self, level: int, update: Update, size_bytes: int, copies: int, limit: int) -> None:
        del self._buckets[level][update.kid]
        level += copies
        if level >= limit:  # D1
            del self._level[update.kid]
            return
        while len(self._buckets) <= level:
            self._buckets.append({})
        self._buckets[level][update.kid] = (update, size_bytes)
        self._level[update.kid] = level
