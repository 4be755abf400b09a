"""The seeds: addresses where a cluster may be found. Retried for ever, ever more rarely.

Any live node will do as a seed, the list may name this node itself (then it is dropped once that
shows), and a seed that a known living node answers at needs no further call. Because the others
are called on at the slow pace for ever, two halves that have forgotten each other meet again.

Invariants: J1 while a seed is not accounted for, a call is due within `SLOW_MS`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

from manifold.kernel.membership.table import Table
from manifold.vm.kid import Kid

FAN_OUT = 3  # seeds called at once: one may be down, two may be; more is a storm at start
FIRST_MS = 100.0  # the first pause; then doubled
SLOW_MS = 30_000.0  # the longest pause: N nodes cost an absent seed's host N/30 calls a second
SEEDS_MAX = 256


class Seeds:
    """The back-off over all seeds together."""

    def __init__(self, seeds: Sequence[str], own: Sequence[str]) -> None:
        self._seeds = [seed for seed in dict.fromkeys(seeds) if seed not in own][:SEEDS_MAX]
        self._owner: dict[str, Kid] = {}
        self._pause_ms = FIRST_MS
        self.due_ms = math.inf

    def start(self, now_ms: float) -> None:
        self._pause_ms = FIRST_MS
        self.due_ms = now_ms if self._seeds else math.inf

    def is_us(self, seed: str) -> None:
        """Our own call came back to us from there."""
        if seed in self._seeds:
            self._seeds.remove(seed)

    def answered(self, seed: str, kid: Kid) -> None:
        self._owner[seed] = kid

    def absent(self, table: Table) -> list[str]:
        """The seeds at which no living member is known to answer."""
        known = {
            address
            for record in table.records()
            if record.live and record.meta is not None
            for address in record.meta.addresses
        }
        return [seed for seed in self._seeds if seed not in known and not self._owned(seed, table)]

    def _owned(self, seed: str, table: Table) -> bool:
        record = table.get(self._owner.get(seed, ""))
        return record is not None and record.live

    def call(self, table: Table, random: Random, now_ms: float) -> list[str]:
        """The seeds to call now, if it is time; also sets the next time."""
        if now_ms < self.due_ms:
            return []
        absent = self.absent(table)
        pause_ms = self._pause_ms if absent else SLOW_MS
        self.due_ms = now_ms + pause_ms * (0.5 + random.random() / 2)
        self._pause_ms = min(SLOW_MS, 2 * self._pause_ms)
        assert self.due_ms <= now_ms + SLOW_MS, "J1"
        return random.sample(absent, min(FAN_OUT, len(absent)))
