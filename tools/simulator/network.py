"""The network between the nodes: loss, duplicates, order, delay, cuts, partitions, clogs.

`routes` says after how many milliseconds each copy of a message arrives: none for a lost one.
Cuts are one-way and end by themselves. A link that flaps is up and down by turns. A clogged node's
messages wait, in both directions, and arrive in a random order once it is free.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from manifold.tools.simulator.faults import Faults

REORDER_FACTOR = 10  # a straggler takes up to so many times the longest delay
LOCAL_MS = 0.02  # a message to oneself


class Network:
    """Who can reach whom, and when."""

    def __init__(self, random: Random, faults: Faults, count: int) -> None:
        self._random = random
        self._faults = faults
        self._count = count
        self._cuts: dict[tuple[int, int], float] = {}
        self._sides: list[tuple[list[bool], float]] = []
        self._clogs: dict[int, tuple[float, float]] = {}
        self._flaps: dict[tuple[int, int], tuple[float, float, float]] = {}
        self.faulty = False
        self.sent = 0
        self.delivered = 0
        self.lost = 0

    def cut(self, source: int, target: int, until_ms: float) -> None:
        """Nothing gets from `source` to `target`; the other direction works."""
        self._cuts[(source, target)] = until_ms

    def flap(
        self, source: int, target: int, period_ms: float, down_ms: float, phase_ms: float = 0.0
    ) -> None:
        """Of each `period_ms` nothing gets from `source` to `target` for `down_ms`."""
        assert 0 <= down_ms <= period_ms and period_ms > 0, "a part of the period"
        self._flaps[(source, target)] = (period_ms, down_ms, phase_ms)

    def partition(self, side: Sequence[int], until_ms: float) -> None:
        """Nothing passes between `side` and the rest."""
        within = [False] * self._count
        for index in side:
            within[index] = True
        self._sides.append((within, until_ms))

    def clog(self, index: int, begin_ms: float, end_ms: float) -> None:
        """Messages from and to `index` wait between the two times."""
        self._clogs[index] = (begin_ms, end_ms)

    def heal(self) -> None:
        self.faulty = False
        self._cuts.clear()
        self._sides.clear()
        self._clogs.clear()
        self._flaps.clear()

    def routes(self, source: int, target: int, now_ms: float) -> tuple[float, ...]:
        self.sent += 1
        if source == target:
            return (LOCAL_MS,)
        if (self._cuts or self._sides) and self._broken(source, target, now_ms):
            self.lost += 1
            return ()
        if self._flaps and (source, target) in self._flaps:
            period_ms, down_ms, phase_ms = self._flaps[(source, target)]
            if (now_ms + phase_ms) % period_ms < down_ms:
                self.lost += 1
                return ()
        faults = self._faults
        low, high = faults.delay
        random = self._random.random
        delay_ms = low + (high - low) * random()
        if self._clogs:
            delay_ms += self._held_ms(source, target, now_ms)
        if not self.faulty:
            return (delay_ms,)
        fate = random()  # one draw decides among the three rare fates
        if fate < faults.drop:
            self.lost += 1
            return ()
        fate -= faults.drop
        if fate < faults.dup:
            return (delay_ms, delay_ms + REORDER_FACTOR * high * random())
        if fate - faults.dup < faults.reorder:
            return (delay_ms + REORDER_FACTOR * high * random(),)
        return (delay_ms,)

    def _broken(self, source: int, target: int, now_ms: float) -> bool:
        until_ms = self._cuts.get((source, target))
        if until_ms is not None:
            if now_ms < until_ms:
                return True
            del self._cuts[(source, target)]
        for place in range(len(self._sides) - 1, -1, -1):
            within, end_ms = self._sides[place]
            if now_ms >= end_ms:
                del self._sides[place]
            elif within[source] != within[target]:
                return True
        return False

    def _held_ms(self, source: int, target: int, now_ms: float) -> float:
        held_ms = 0.0
        for index in (source, target):
            begin_ms, end_ms = self._clogs.get(index, (0.0, 0.0))
            if begin_ms <= now_ms < end_ms:
                held_ms = max(held_ms, (end_ms - now_ms) + self._random.random() * 10)
            elif now_ms >= end_ms:
                self._clogs.pop(index, None)
        return held_ms
