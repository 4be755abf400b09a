"""Mitosis and lazy splitting: pure functions over candidates and a ledger.

Interface rules: nothing here assigns; the owner does what these functions propose.
Source: design page of the scheduler, "Mitosis": a rate-proportional start and lazy splitting
(makespan 1.07 of ideal at ±30 % rate error, 1.14 when one node slows five times).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

import msgspec

from manifold.kernel.geode.geode import Geode
from manifold.kernel.geode.messages import Candidate, Demand
from manifold.kernel.scheduler import blocks
from manifold.kernel.scheduler.ledger import Job, Shard
from manifold.vm.kid import Kid

Slot = tuple[Kid, float]  # a node, and the gas per second one slot of it is predicted to give


def gas_per_block(geode: Geode, job: Job) -> float | None:
    """Predicted gas of one block: from this job, else from earlier runs, else unknown."""
    size = blocks.block_indices(job.spec)
    if job.measured:
        return job.gas / job.measured * size
    gas = geode.gas_per_index(job.spec.program, "")
    return None if gas is None else gas * size


def demand(geode: Geode, job: Job, shard: Shard | None, *, forgiving: bool = False) -> Demand:
    """What a shard asks of a node. `forgiving` lets the node that lost it have it again."""
    gas = gas_per_block(geode, job) or 0.0
    owed = shard.owed if shard is not None else 1
    exclude = job.spec.demand.exclude
    if shard is not None and shard.avoid is not None and not forgiving:
        exclude = (*exclude, shard.avoid)
    return msgspec.structs.replace(
        job.spec.demand, work_gas=min(gas * owed, 1e23), program=job.spec.program, exclude=exclude
    )


def reasons(geode: Geode, wanted: Demand, now_ms: float) -> str:
    """Why the hard filter refused everybody."""
    refused = geode.refusals(wanted, now_ms)
    listed = [f"{alias}: {reason}" for alias, reason in refused[:4]]
    more = len(refused) - len(listed)
    return "; ".join(listed) + (f"; and {more} more" if more > 0 else "") or "no node is alive"


def slots(
    candidates: Sequence[Candidate], busy: Mapping[Kid, int], stalled: AbstractSet[Kid]
) -> list[Slot]:
    """Every slot of every candidate with its rate, which a busy node shares out; best first."""
    found: list[Slot] = []
    for candidate in candidates:
        if candidate.kid in stalled:
            continue
        taken = busy.get(candidate.kid, 0)
        for number in range(candidate.slots):
            # The first free slots are whole; the others are shared with what runs there.
            sharing = 1 if number < candidate.slots - taken else 2
            found.append((candidate.kid, candidate.slot_gas_per_s / sharing))
    return sorted(found, key=lambda slot: -slot[1])


def proportional(
    shard: Shard,
    available: Sequence[Slot],
    block_gas: float | None,
    grain_ms: float,
    me: Kid,
) -> list[tuple[Kid, int, int]]:
    """Runs of blocks `(node, first, last)`, each in proportion to its slot's rate.

    Only as many slots are used as keep each run above the grain; ourselves first where one will
    do, since that saves the round trip.
    """
    if not available:
        return []
    chosen = list(available[: shard.owed])
    if block_gas is not None:
        total_ms = block_gas * shard.owed * 1000
        rates = 0.0
        count = 0
        for _, rate in chosen:
            if count and total_ms / (rates + rate) < grain_ms:
                break
            rates += rate
            count += 1
        chosen = chosen[:count]
        if count == 1 and any(node == me for node, _ in available):
            chosen = [next(slot for slot in available if slot[0] == me)]
    pieces: list[tuple[Kid, int, int]] = []
    left_rate = sum(rate for _, rate in chosen)
    at = shard.counted
    for node, rate in chosen:
        share = round((shard.last - at) * rate / left_rate) if left_rate > 0 else shard.last - at
        left_rate -= rate
        share = min(max(share, 0), shard.last - at)
        if share:
            pieces.append((node, at, at + share))
            at += share
    if at < shard.last:
        node, first, _ = pieces.pop()
        pieces.append((node, first, shard.last))
    return pieces


def idle_node(candidates: Sequence[Candidate], busy: Mapping[Kid, int], me: Kid) -> Kid | None:
    """The candidate with a free slot that is predicted to finish first; ourselves if as good."""
    free = [c for c in candidates if busy.get(c.kid, 0) < c.slots]
    if not free:
        return None
    best = free[0]
    for candidate in free:
        if candidate.kid == me and candidate.slot_gas_per_s >= 0.5 * best.slot_gas_per_s:
            return me
    return best.kid


def blend(old: float | None, shard: Shard, elapsed_ms: float) -> float:
    """Blocks per ms of one slot: what the whole attempt averaged, EWMA over reports."""
    average = (shard.counted - shard.first) / max(elapsed_ms, 0.1)
    return average if old is None else 0.5 * old + 0.5 * average


def steals(
    job: Job,
    candidates: Sequence[Candidate],
    busy: Mapping[Kid, int],
    stalled: AbstractSet[Kid],
    grain_ms: float,
    now_ms: float,
) -> list[tuple[Shard, int]]:
    """Which shards to shrink to where, one for each idle slot that would gain from it.

    The thief and the victim are to finish together: the rest is cut in proportion to their rates.
    It is done only where it saves more than a grain, which is more than twice any round trip here.
    """
    rates = {c.kid: c.slot_gas_per_s for c in candidates}
    thieves = [
        candidate.kid
        for candidate in candidates
        if candidate.kid not in stalled
        for _ in range(candidate.slots - busy.get(candidate.kid, 0))
    ]
    outstanding = sum(shard.shrinking >= 0 for shard in job.shards.values())
    thieves = sorted(thieves, key=lambda kid: -rates[kid])[outstanding:]
    victims = [
        s for s in job.shards.values() if s.node is not None and s.shrinking < 0 and s.owed >= 2
    ]
    found: list[tuple[Shard, int]] = []
    for thief in thieves:
        if not victims:
            break
        timed = [(_left_ms(job, s, rates, now_ms), s.number, s) for s in victims]
        left_ms, _, victim = max(timed)
        assert victim.node is not None
        own = rates.get(victim.node, 1.0) or 1.0
        ratio = (rates[thief] or own) / own
        give = int((victim.owed - 1) * ratio / (1 + ratio) + 0.5)
        give = min(max(give, 1), victim.owed - 1)
        block_ms = left_ms / victim.owed
        new_ms = max(give * block_ms / ratio, (victim.owed - give) * block_ms)
        if left_ms - new_ms < grain_ms:
            break
        victims.remove(victim)
        found.append((victim, victim.last - give))
    return found


def _left_ms(job: Job, shard: Shard, rates: Mapping[Kid, float], now_ms: float) -> float:
    """Predicted time until the shard is done: from its own speed, else its node's, else gas."""
    node = shard.node
    assert node is not None
    elapsed_ms = max(now_ms - shard.assigned_ms, 0.1)
    counted = shard.counted - shard.first
    if counted:
        return shard.owed * elapsed_ms / counted
    speed = job.speeds.get(node)
    if speed:
        return max(shard.owed / speed, elapsed_ms)
    if job.measured and rates.get(node):
        block_gas = job.gas / job.measured * blocks.block_indices(job.spec)
        return max(shard.owed * block_gas / rates[node] * 1000, elapsed_ms)
    return shard.owed * elapsed_ms  # not one block yet: at least this long each
