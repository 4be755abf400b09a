"""Mitosis and lazy splitting: pure functions over a ranking of nodes and a ledger.

Interface rules: nothing here assigns; the owner does what these functions propose.
Source: design page of the scheduler, "Mitosis": a rate-proportional start and lazy splitting
(makespan 1.07 of ideal at ±30 % rate error, 1.14 when one node slows five times).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from manifold.kernel import labels
from manifold.kernel.geode.geode import Geode, Ranked, refusal
from manifold.kernel.geode.messages import Demand
from manifold.kernel.scheduler import blocks
from manifold.kernel.scheduler.ledger import Job, Shard
from manifold.vm.kid import Kid

# A runner reports at least every 200 ms: after twice that without a word nothing is known of how
# far a shard is, and the time goes by.
QUIET_MS = 400.0
ARRIVE_MS = 10.0  # an assignment is given so long before something is asked of it
SLICE_MS = 5.0  # until a worker sees that it was limited
# A steal must gain at least this part of what the job has taken so far: halving the last
# remainders down to the grain costs messages for which nobody is better off.
GAIN = 0.02
STUCK_MS = 60_000.0  # a block of a shard that stands still is taken to need so long
SHED_GRAINS = 5  # and while there is work for so long
COARSE = 0.25  # and only where one more block of it would take this part of that time
SHED = 2.0  # a shard that takes so many times as long as the job would if balanced sheds the rest

Slot = tuple[Kid, float]  # a node, and the gas per second one slot of it is predicted to give


def gas_per_block(geode: Geode, job: Job) -> float | None:
    """Predicted gas of one block: from this job, else from earlier runs, else unknown."""
    size = blocks.block_indices(job.spec)
    if job.measured:
        return job.gas / job.measured * size
    gas = geode.gas_per_index(job.spec.program, "")
    return None if gas is None else gas * size


def demand(geode: Geode, job: Job, owed: int, avoid: Kid | None = None) -> Demand:
    """What `owed` blocks ask of a node; it is not to be `avoid`."""
    wanted = job.spec.demand
    gas = (gas_per_block(geode, job) or 0.0) * owed
    exclude = wanted.exclude if avoid is None else (*wanted.exclude, avoid)
    return msgspec.structs.replace(
        wanted, work_gas=min(gas, 1e23), program=job.spec.program, exclude=exclude
    )


def capable(geode: Geode, wanted: Demand) -> bool:
    """Whether any node could ever take it; if not now, then when others are done there."""
    for kid in geode.nodes():
        node = geode.node(kid)
        if node is not None and refusal(node, wanted) is None:
            return True
    return False


def reasons(geode: Geode, wanted: Demand, now_ms: float) -> str:
    """Why the hard filter refused everybody; of a label that nobody has, what there is instead."""
    everybody = [node.facts for kid in geode.nodes() if (node := geode.node(kid)) is not None]
    for wish in wanted.labels if everybody else ():
        if not any(labels.meets(facts, wish) for facts in everybody):
            what = f"every node has {wish[1:]}" if wish.startswith("!") else f"none has {wish}"
            return f"{what}; {labels.others(everybody, wish)}"
    refused = geode.refusals(wanted, now_ms)
    listed = [f"{alias}: {reason}" for alias, reason in refused[:4]]
    more = len(refused) - len(listed)
    return "; ".join(listed) + (f"; and {more} more" if more > 0 else "") or "no node is alive"


def slots(ranked: Sequence[Ranked], busy: Mapping[Kid, int]) -> list[Slot]:
    """Every slot of every candidate with its rate, which a busy node shares out; best first."""
    found: list[Slot] = []
    for each in ranked:
        taken = busy.get(each.kid, 0)
        for number in range(each.slots):
            # The first free slots are whole; the others are shared with what runs there.
            sharing = 1 if number < each.slots - taken else 2
            found.append((each.kid, each.slot_gas_per_s / sharing))
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


def idle_node(
    ranked: Sequence[Ranked], busy: Mapping[Kid, int], work_gas: float, me: Kid
) -> Kid | None:
    """The candidate with a free slot that is predicted to finish first; ourselves if as good."""
    best: Ranked | None = None
    least_s = 0.0
    for each in ranked:
        if busy.get(each.kid, 0) >= each.slots:
            continue
        finish_s = work_gas / each.slot_gas_per_s + each.entry.node.rtt_s
        if best is None or finish_s < least_s:
            best, least_s = each, finish_s
    if best is None or best.kid == me:
        return None if best is None else me
    for each in ranked:
        if each.kid == me and busy.get(me, 0) < each.slots:
            return me if each.slot_gas_per_s >= 0.5 * best.slot_gas_per_s else best.kid
    return best.kid


def idle_slots(ranked: Sequence[Ranked], busy: Mapping[Kid, int]) -> list[Ranked]:
    """A candidate for each of its free slots, the fastest first."""
    idle = [each for each in ranked for _ in range(each.slots - busy.get(each.kid, 0))]
    return sorted(idle, key=lambda each: -each.slot_gas_per_s)


def steals(
    job: Job,
    ranked: Sequence[Ranked],
    busy: Mapping[Kid, int],
    block_gas: float | None,
    grain_ms: float,
    now_ms: float,
) -> list[tuple[Shard, int]]:
    """Which shards to shrink to where, one for each idle slot that would gain from it.

    The thief and the victim are to finish together, the thief beginning later by what the change
    costs. It is done only where the victim's part is over sooner by more than a grain (which is
    more than twice any round trip here) and by `GAIN` of the time the job has taken.
    """
    outstanding = sum(shard.shrinking >= 0 for shard in job.shards.values())
    thieves = idle_slots(ranked, busy)[outstanding:]
    if block_gas is None or (outstanding and not thieves):
        return []
    nodes = {each.kid: each for each in ranked}
    victims = [
        Victim(shard, nodes.get(shard.node), block_gas, now_ms)
        for shard in job.shards.values()
        if shard.node is not None
        and (shard.acknowledged or now_ms - shard.assigned_ms >= ARRIVE_MS)
        and shard.shrinking < 0
        and shard.owed >= 2
        and shard.refused_at != shard.counted
    ]
    victims.sort(key=lambda each: (each.left_ms, each.shard.number))
    least_ms = max(grain_ms, GAIN * (now_ms - job.started_ms))
    if not thieves:
        return _shed(victims, least_ms, grain_ms)
    found: list[tuple[Shard, int]] = []
    for thief in thieves:
        if not victims:
            break
        victim = victims.pop()
        give = victim.share(thief, 1000 * block_gas / thief.slot_gas_per_s, least_ms)
        if give:
            found.append((victim.shard, victim.shard.last - give))
        elif victim.takeable:
            break  # the next one is done even sooner
    return found


def _shed(victims: Sequence[Victim], least_ms: float, grain_ms: float) -> list[tuple[Shard, int]]:
    """The straggler, and where to stop it, though nobody is idle yet.

    What it will not come to in time is taken from it now, for the first slot that comes free: by
    then it might have begun a block that takes longer than all else. Not near the end, when slots
    come free all the time.
    """
    if len(victims) < 2:
        return []
    worst = victims[-1]
    # All together, in blocks and in blocks per ms: when would everything be done?
    blocks_left = sum(each.shard.owed for each in victims)
    speed = sum(each.shard.owed / each.left_ms for each in victims)
    balanced_ms = blocks_left / speed
    if balanced_ms < SHED_GRAINS * grain_ms or worst.block_ms < COARSE * balanced_ms:
        return []
    if worst.left_ms < SHED * balanced_ms + least_ms:
        return []
    give = min(worst.takeable, int(worst.shard.owed * (1 - balanced_ms / worst.left_ms)))
    return [(worst.shard, worst.shard.last - give)] if give > 0 else []


class Victim:
    """A shard that another slot may help: how long it takes yet, and what can be taken."""

    __slots__ = ("block_ms", "left_ms", "rtt_ms", "shard", "takeable")

    def __init__(self, shard: Shard, node: Ranked | None, block_gas: float, now_ms: float) -> None:
        self.shard = shard
        speed = shard.speed
        if not shard.gauges and node is not None:
            speed = node.slot_gas_per_s / 1000
        speed = max(speed, block_gas / STUCK_MS)
        since_ms = now_ms - shard.gauged_ms
        done_gas = shard.gauged_gas
        if since_ms < QUIET_MS:
            done_gas += since_ms * speed
        # It is within a block that was not counted yet, and finishes that in any case.
        begun = min(max(int(done_gas / block_gas), shard.counted - shard.first) + 1, shard.owed)
        self.takeable = shard.last - shard.first - begun
        left_gas = max((shard.last - shard.first) * block_gas - done_gas, 0.5 * block_gas)
        self.left_ms = left_gas / speed
        self.block_ms = block_gas / speed
        self.rtt_ms = 1000 * node.entry.node.rtt_s if node is not None else 0.0

    def share(self, thief: Ranked, thief_ms: float, least_ms: float) -> int:
        """How many blocks `thief`, at `thief_ms` a block, is to take; 0: none."""
        cost_ms = 1000 * thief.entry.node.rtt_s + self.rtt_ms + SLICE_MS
        give = round((self.left_ms - cost_ms) / (self.block_ms + thief_ms))
        give = min(max(give, 1), self.takeable)
        new_ms = max(cost_ms + give * thief_ms, self.left_ms - give * self.block_ms)
        return give if give > 0 and self.left_ms - new_ms >= least_ms else 0
