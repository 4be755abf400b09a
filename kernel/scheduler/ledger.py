"""The ledger of one job: which blocks are counted, who computes the rest. Pure data.

Interface rules: only the owner's protocol changes a ledger, and only it assigns.
Invariants: L1 every block is counted at most once; L2 live shards and counted blocks cover the job
without overlap; L3 a result counts only for the current attempt of its shard, and a shard that
nobody has has none; L4 attempt numbers only grow (the owner draws each of them once).
Source: design page of the scheduler ("One writer"); lazy splitting.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from manifold.kernel.process.messages import Fault, Result
from manifold.kernel.scheduler import blocks
from manifold.kernel.scheduler.messages import JobSpec, State
from manifold.kernel.tasks.messages import Parcel
from manifold.vm.kid import Kid

# A shard's speed follows what it reported over about this long: reports come every 50 to 200 ms, so
# a slow-down shows after two of them, and one that was late does not upset it.
SPEED_MS = 200.0
STALE_MS = 200.0  # a worker tells its gas each 100 ms, and a runner looks each 100 ms


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
    acknowledged: bool = False  # the runner has reported on this attempt
    shrinking: int = -1  # the boundary asked for, -1 where none is
    attempts: int = 0
    not_before_ms: float = 0.0
    avoid: Kid | None = None  # who lost it last
    stolen_from: str = ""
    path: tuple[Kid, ...] = ()  # who sent this shard on since it was placed
    refused_at: int = -1  # `counted` when it last gave less than was asked of it
    shed: bool = False  # shrunk for being slow, not for the sake of an idle slot
    gas_seen: float = 0.0  # of this attempt, when `counted` last grew
    busy_seen_ms: float = 0.0
    flight_gas: float = 0.0  # what geode was told of it
    gauged_ms: float = 0.0  # the last report
    gauged_gas: float = 0.0  # and what the attempt had used by then
    gauged_busy_ms: float = 0.0
    speed: float = 0.0  # gas per ms, of late
    gauges: int = 0

    @property
    def owed(self) -> int:
        return self.last - self.counted

    def gauge(self, gas: float, busy_ms: float, now_ms: float) -> None:
        """A report: how far the attempt is, within its present block too."""
        if gas <= self.gauged_gas:
            return  # overtaken by a later one, or nothing new
        # Gas and busy time are of one moment, up to `STALE_MS` before the report; where the
        # attempt was not busy for much longer than that, it waits for others in between.
        elapsed_ms = now_ms - self.gauged_ms
        span_ms = max(busy_ms - self.gauged_busy_ms, elapsed_ms - STALE_MS, 0.1)
        weight = min(1.0, span_ms / SPEED_MS) if self.gauges else 1.0
        self.speed += weight * ((gas - self.gauged_gas) / span_ms - self.speed)
        self.gauged_ms, self.gauged_gas, self.gauged_busy_ms = now_ms, gas, busy_ms
        self.gauges += 1


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
    held_bytes: int = 0  # of results, about
    next_shard: int = 0
    shards: dict[int, Shard] = field(default_factory=dict)
    pending: deque[int] = field(default_factory=deque)
    ended_ms: float = 0.0
    retries: int = 0
    watchers: dict[str, None] = field(default_factory=dict)
    gas: float = 0.0
    measured: int = 0  # indices that `gas` was used for
    speeds: dict[Kid, float] = field(default_factory=dict)  # gas per second of a slot, of late
    probing_until_ms: float = 0.0
    starved_since_ms: float = -1.0
    told_done: int = -1
    told_ms: float = 0.0
    parcels: tuple[Parcel, ...] = ()  # one for each index, or none at all
    client: str = ""  # with whom it ends, unless it is detached
    detach: bool = False
    kept: bool = True  # small enough for Nexus
    asked_ms: float = -1.0  # taken over: when a client last asked about it
    held: bool = False  # nothing of it is assigned: it is not recorded, or not admitted, yet
    origins: tuple[Kid, ...] = ()  # nodes whose outbox has it, as far as we know

    def drop_program(self) -> None:
        """It has ended: what was needed to run it is not needed to tell of it."""
        self.parcels, self.ir = (), b""
        self.spec = msgspec.structs.replace(self.spec, session=None)

    def cut(self, first: int, last: int) -> Shard:
        """A new shard over `[first, last)`, pending."""
        assert 0 <= first < last <= self.blocks, "L2"
        shard = Shard(self.next_shard, first, last, 0, first)
        self.next_shard += 1
        self.shards[shard.number] = shard
        self.pending.append(shard.number)
        return shard

    def assign(self, shard: Shard, node: Kid, attempt: int, now_ms: float) -> None:
        """Give a pending shard to `node` under a new attempt."""
        assert shard.node is None and shard.number in self.pending, "L2"
        assert attempt > shard.attempt, "L4"
        self.pending.remove(shard.number)
        shard.node = node
        shard.first = shard.counted
        shard.attempt = attempt
        shard.attempts += 1
        shard.assigned_ms = shard.heard_ms = shard.sent_ms = shard.gauged_ms = now_ms
        shard.acknowledged = False
        shard.shrinking = -1
        shard.shed = False
        shard.refused_at = -1
        shard.gas_seen = shard.busy_seen_ms = shard.gauged_gas = shard.speed = 0.0
        shard.gauged_busy_ms = 0.0
        shard.gauges = 0

    def release(self, shard: Shard) -> None:
        """Take a shard back; what is counted stays counted."""
        assert shard.node is not None, "L2"
        shard.path = ()
        shard.avoid = shard.node
        shard.node = None  # L3: whatever the old attempt still says is stale from now on
        shard.shrinking = -1
        self.pending.append(shard.number)

    def count(self, shard: Shard, first: int, results: Sequence[Result]) -> Sequence[Result]:
        """Count what continues the shard's counted prefix; those results."""
        if not results or first > shard.counted:
            return ()  # nothing, or what came before it is still on its way
        at = shard.counted
        fresh = results[at - first : at - first + shard.owed]
        if not fresh:
            return ()
        for block, result in enumerate(fresh, at):
            assert self.results[block] is None, "L1"
            self.results[block] = result
        shard.counted += len(fresh)
        self.counted += len(fresh)
        low, _ = blocks.positions(self.spec, at)
        _, high = blocks.positions(self.spec, shard.counted - 1)
        self.done += high - low
        if shard.owed == 0:
            self.shards.pop(shard.number)
        return fresh

    def shrink(self, shard: Shard, last: int) -> Shard | None:
        """Cut the shard at `last`; the rest is a new pending shard (None where none is left)."""
        if last > shard.shrinking >= 0:
            shard.refused_at = shard.counted
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
        """Assert L1 and L2."""
        broken = self.broken()
        assert not broken, broken

    def broken(self) -> str:
        """What is wrong with L1 or L2, seen from outside; "" where they hold."""
        owed = sorted((s.counted, s.last) for s in self.shards.values())
        covered = self.counted + sum(last - first for first, last in owed)
        if covered != self.blocks:
            return f"L2: {covered} of {self.blocks} blocks are accounted for"
        if any(last > first for (_, last), (first, _) in itertools.pairwise(owed)):
            return "L2: shards overlap"
        for first, last in owed:
            if any(self.results[block] is not None for block in range(first, last)):
                return f"L1: a result is there for a block of [{first}, {last}), which is owed"
        if self.counted != len(self.results) - self.results.count(None):
            return f"L1: {self.counted} blocks are counted, of others there are results"
        return ""
