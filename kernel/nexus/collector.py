"""Collecting tombstones: write one again at every voter, then let them all drop it.

Interface: `note(key)` when a tombstone was seen; `step` now and then. Invariant:
  G1  a record is dropped only after every voter has accepted that very tombstone, by one ballot;
      floors keep what the records promised, so a late Accept cannot bring the key back.
Source: design page of Nexus; the paper's own way needs the age of every proposer's cache.
"""

from __future__ import annotations

from manifold.kernel.nexus.context import Context
from manifold.kernel.nexus.proposer import Proposer
from manifold.kernel.nexus.rounds import Operation
from manifold.kernel.nexus.values import Result, Rewrite

NOTED_MAX = 4096  # tombstones waiting here; who is forgotten is found by a voter's sweep
COLLECT_MS = 2000.0


class Collector:
    """See the module."""

    def __init__(self, context: Context, proposer: Proposer) -> None:
        self._context = context
        self._proposer = proposer
        self._noted: dict[str, float] = {}

    def note(self, key: str) -> None:
        """Collect it once it is old enough: until then its ring still knows its operations."""
        if key in self._noted or len(self._noted) >= NOTED_MAX:
            return
        after_ms = self._context.timing.gc_ms * (1 + self._context.random.random())
        self._noted[key] = self._context.now_ms + after_ms
        self._context.later(after_ms, lambda _now: self._collect(key))

    def _collect(self, key: str) -> None:
        if self._noted.pop(key, None) is not None:
            self.collect(key)

    def collect(self, key: str) -> None:
        config = self._proposer.config
        if config is None or config.joint:
            return  # a voter's sweep finds it later
        op = f"{self._context.me[:18]}.{self._context.nonce}.{self._context.rid()}"

        def done(result: Result) -> None:
            """Where a voter is down it stays; its sweep asks again."""

        deadline_ms = self._context.now_ms + COLLECT_MS
        operation = Operation(op, key, Rewrite(dead=True), deadline_ms, done, everywhere=True)
        self._proposer.submit(operation)
