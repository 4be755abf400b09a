"""The ledger of one job: which blocks are counted, who computes the rest. Pure data.

Interface rules: only the owner's protocol changes a ledger, and only it assigns.
Invariants: L1 every block is counted at most once; L2 live shards and counted blocks cover the job
without overlap; L3 a result counts only for the current attempt of its shard; L4 an attempt number
is never used twice.
Source: design page of the scheduler ("One writer"); lazy splitting.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from manifold.kernel.process.messages import Fault, Result
from manifold.kernel.scheduler import blocks
from manifold.kernel.scheduler.messages import (
    JobSpec,
    State,
)
from manifold.vm.kid import Kid


@dataclass(slots=True)
class Shard:
    """Blocks `[counted, last)` are still owed; `node` is None while nobody has it.

    `first` is where the current attempt began.
    """

    number: int
    first: int
    last: int
    attempt: int
    counted: int
    node: Kid | None = None
    assigned_ms: float = 0.0
    heard_ms: float = 0.0
    sent_ms: float = 0.0
    acknowledged: bool = False  # the runner has said something about this attempt
    shrinking: int = -1  # the boundary asked for, -1 where none is
    attempts: int = 0
    not_before_ms: float = 0.0
    avoid: Kid | None = None  # who lost it last
    stolen_from: str = ""

    @property
    def owed(self) -> int:
        return self.last - self.counted


@dataclass(slots=True)
class Job:
    """One job at its owner."""

    job: str
    spec: JobSpec
    ir: bytes
    started_ms: float
    blocks: int
    results: list[Result | None]
    state: State = "running"
    fault: Fault | None = None
    counted: int = 0
    done: int = 0  # indices of counted blocks
    next_shard: int = 0
    shards: dict[int, Shard] = field(default_factory=dict)
    pending: deque[int] = field(default_factory=deque)
    ended_ms: float = 0.0
    retries: int = 0
    watchers: dict[str, None] = field(default_factory=dict)
    gas: float = 0.0
    measured: int = 0  # indices that `gas` was used for
    probing_until_ms: float = 0.0
    starved_since_ms: float = -1.0
    told_done: int = -1
    told_ms: float = 0.0
    reduced: tuple[Result, ...] | None = None
    speeds: dict[Kid, float] = field(default_factory=dict)  # blocks per ms of one slot

    def cut(self, first: int, last: int) -> Shard:
        """A new shard over `[first, last)`, pending."""
        assert 0 <= first < last <= self.blocks, "L2"
        shard = Shard(self.next_shard, first, last, 0, first)
        self.next_shard += 1
        self.shards[shard.number] = shard
        self.pending.append(shard.number)
        return shard

    def assign(self, shard: Shard, node: Kid, now_ms: float) -> None:
        """Give a pending shard to `node` under a new attempt."""
        assert shard.node is None and shard.number in self.pending, "L2"
        self.pending.remove(shard.number)
        shard.node = node
        shard.first = shard.counted
        shard.attempt += 1  # L4
        shard.attempts += 1
        shard.assigned_ms = shard.heard_ms = shard.sent_ms = now_ms
        shard.acknowledged = False
        shard.shrinking = -1

    def release(self, shard: Shard) -> None:
        """Take a shard back; what is counted stays counted."""
        assert shard.node is not None, "L2"
        shard.avoid = shard.node
        shard.node = None
        shard.shrinking = -1
        shard.attempt += 1  # L3: whatever the old attempt still says is stale from now on
        self.retries += 1
        self.pending.append(shard.number)

    def count(self, shard: Shard, first: int, results: Sequence[Result]) -> int:
        """Count what continues the shard's counted prefix; how many blocks that were."""
        fresh = results[shard.counted - first :] if first <= shard.counted else ()
        fresh = fresh[: shard.owed]
        for result in fresh:
            assert self.results[shard.counted] is None, "L1"
            self.results[shard.counted] = result
            low, high = blocks.positions(self.spec, shard.counted)
            self.done += high - low
            shard.counted += 1
            self.counted += 1
        if shard.owed == 0:
            self.shards.pop(shard.number)
        return len(fresh)

    def shrink(self, shard: Shard, last: int) -> Shard | None:
        """Cut the shard at `last`; the rest is a new pending shard (None where none is left)."""
        shard.shrinking = -1
        last = max(last, shard.counted)
        if last >= shard.last:
            return None
        rest = self.cut(last, shard.last)
        shard.last = last
        if shard.owed == 0:
            self.shards.pop(shard.number)
        return rest

    def check(self) -> None:
        """Assert L2 from the outside; called by tests and the simulator."""
        owed = sorted((s.counted, s.last) for s in self.shards.values())
        covered = self.counted + sum(last - first for first, last in owed)
        assert covered == self.blocks, f"L2: {covered} of {self.blocks} blocks are accounted for"
        for (_, last), (first, _) in itertools.pairwise(owed):
            assert last <= first, "L2: shards overlap"
        assert self.counted == sum(result is not None for result in self.results), "L1"
