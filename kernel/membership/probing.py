"""Whom to probe next, the probe under way, pings made for others, and this node's own health.

Sources: SWIM section 4.3 (round robin over a shuffled list: worst-case time to the first probe is
bounded); Lifeguard section 4.1, LHA-Probe (the local health multiplier, 0 to 7).

Invariants: P1 0 <= score <= SCORE_MAX; P2 in one turn of the ring each living node is probed once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from random import Random

from manifold.kernel.membership.table import Record, Table
from manifold.vm.kid import Kid

SCORE_MAX = 7  # Lifeguard's S: probes take at most 8 times as long
RELAYS_MAX = 256  # pings made for others at once; each is forgotten after a few seconds
RTT_MS_MIN = 0.001  # 1 us: a smaller figure is a clock's fault, and zero breaks ratios
RTT_MS_MAX = 10_000.0
RTT_ALPHA = 0.25  # weight of a new round trip: about seven probes of memory


@dataclass(slots=True)
class Probe:
    """One probe: direct, then through relays and on the data plane, then a verdict."""

    seq: int
    target: Kid
    boot: int
    incarnation: int  # ours when it was sent: an answer proves that it was durable
    sent_ms: float
    ack_due_ms: float
    end_ms: float
    data_seq: int = -1
    relays: tuple[Kid, ...] = ()
    nacked: list[Kid] = field(default_factory=list)

    @property
    def indirect(self) -> bool:
        return self.data_seq >= 0


@dataclass(slots=True)
class Relay:
    """A ping made for `origin`, who called it `origin_seq`."""

    origin: Kid
    origin_seq: int
    target: Kid
    nack_due_ms: float
    end_ms: float
    nacked: bool = False

    @property
    def due_ms(self) -> float:
        return self.end_ms if self.nacked else self.nack_due_ms


class Health:
    """Lifeguard's local health multiplier: how much this node distrusts itself."""

    __slots__ = ("score",)

    def __init__(self) -> None:
        self.score = 0

    def add(self, points: int) -> None:
        self.score = max(0, min(SCORE_MAX, self.score + points))
        assert 0 <= self.score <= SCORE_MAX, "P1"

    def scale(self, interval_ms: float) -> float:
        return interval_ms * (self.score + 1)


class Ring:
    """The nodes to probe, in a random order that is drawn anew after each turn."""

    def __init__(self) -> None:
        self._kids: list[Kid] = []
        self._inside: dict[Kid, None] = {}
        self._next = 0

    def add(self, kid: Kid, random: Random) -> None:
        """Insert at a random place, as the paper does with those that join."""
        if kid not in self._inside:
            self._inside[kid] = None
            self._kids.insert(int(random.random() * (len(self._kids) + 1)), kid)

    def next(self, table: Table, random: Random) -> Record | None:
        """The next living, describable node (P2); the gone are dropped on the way."""
        for _ in range(2 * len(self._kids) + 1):
            if self._next >= len(self._kids):
                self._turn(table, random)
                if not self._kids:
                    return None
            kid = self._kids[self._next]
            self._next += 1
            record = table.get(kid)
            if record is not None and record.live and record.meta is not None:
                return record
        return None

    def _turn(self, table: Table, random: Random) -> None:
        self._next = 0
        rows = [(kid, table.get(kid)) for kid in self._kids]
        self._kids = [kid for kid, record in rows if record is not None and record.live]
        self._inside = dict.fromkeys(self._kids)
        random.shuffle(self._kids)


def smooth_rtt(known_ms: float | None, sample_ms: float) -> float | None:
    """The round trip's moving average; an impossible sample changes nothing."""
    if math.isnan(sample_ms) or sample_ms < 0 or sample_ms > RTT_MS_MAX:
        return known_ms
    sample_ms = max(sample_ms, RTT_MS_MIN)
    if known_ms is None:
        return sample_ms
    return known_ms + RTT_ALPHA * (sample_ms - known_ms)
