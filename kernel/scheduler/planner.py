"""Planning: which blocks of a job go to which node, at first and as it runs. Pure.

Interface rules: `begin` once for each job, `pump` whenever slots may have come free; both return
assignments. This is the part of the owner that assigns: it is its base class, and nothing else
calls it.
Source: design page of the scheduler: rate-proportional start, then lazy splitting.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence

from manifold.kernel.config import SchedulerConfig
from manifold.kernel.effects import Effect, Send
from manifold.kernel.geode.geode import Geode, Ranked
from manifold.kernel.geode.messages import Demand
from manifold.kernel.process.messages import Fault
from manifold.kernel.scheduler import balance
from manifold.kernel.scheduler.ledger import Job, Shard
from manifold.kernel.scheduler.messages import (
    ATTEMPT_BITS,
    BOOT_MASK,
    AssignShard,
    Counted,
    JobEvent,
    Placed,
    Shrink,
    State,
)
from manifold.kernel.scheduler.peers import Peers
from manifold.vm.kid import Kid

WAITING_PER_TICK = 64  # jobs that wait for a slot and are tried in one tick: 4 ms of work
MISSES_MAX = 8  # so many of them in a row found none: neither will the others


class Planner(ABC):
    """See the module. `boot` is the number of this process of the node."""

    def __init__(self, me: Kid, config: SchedulerConfig, geode: Geode, boot: int) -> None:
        self.me = me
        self.config = config
        self.geode = geode
        self.jobs: OrderedDict[str, Job] = OrderedDict()  # running
        self.peers = Peers(config, geode)
        self.events: list[JobEvent | Placed | Counted] = []
        self.wake_ms = float("inf")  # a tick is wanted then, sooner than the usual one
        self._attempts = (boot & BOOT_MASK) << ATTEMPT_BITS
        self._waiting: OrderedDict[str, None] = OrderedDict()  # jobs with a shard without a slot

    @abstractmethod
    def end(self, job: Job, state: State, now_ms: float) -> list[Effect]:
        """It is over."""

    @abstractmethod
    def _event(self, what: str, job: Job, detail: str) -> None:
        """For the node's log."""

    @property
    def drawn(self) -> int:
        """The attempt number that was drawn last: the boot, and how many assignments it made."""
        return self._attempts

    def begin(self, job: Job, now_ms: float) -> list[Effect]:
        if not job.blocks:
            return self.end(job, "done", now_ms)
        spread = job.blocks > 1 and not job.spec.serial
        if spread and balance.gas_per_block(self.geode, job) is None:
            probe = job.cut(0, 1)
            job.cut(1, job.blocks)
            job.probing_until_ms = now_ms + self.config.grain_ms
            self.wake_ms = min(self.wake_ms, job.probing_until_ms)
            return self._place_one(job, probe, now_ms)
        job.cut(0, job.blocks)
        return self._plan(job, now_ms)

    def pump(self, now_ms: float) -> list[Effect]:
        """Assign what is pending and rebalance what runs, as far as there are slots."""
        effects: list[Effect] = []
        for job in list(self.jobs.values()):
            if job.pending and not job.held and job.job not in self._waiting:
                effects += self._plan(job, now_ms)
        effects += self._pump_waiting(WAITING_PER_TICK, now_ms)
        for job in list(self.jobs.values()):
            if not job.pending:
                effects += self._rebalance(job, now_ms)
        return effects

    def _pump_waiting(self, most: int, now_ms: float) -> list[Effect]:
        """Try jobs that found no slot, the one that waits longest first."""
        effects: list[Effect] = []
        misses = 0
        for name in list(self._waiting)[:most]:
            job = self.jobs.get(name)
            if job is None or not job.pending:
                self._waiting.pop(name, None)
                continue
            found = self._plan(job, now_ms)
            misses = 0 if found else misses + 1
            effects += found
            if misses >= MISSES_MAX:
                for missed in list(self._waiting)[:MISSES_MAX]:
                    self._waiting.move_to_end(missed)  # their constraints may be what is wrong
                break
        return effects

    def _plan(self, job: Job, now_ms: float) -> list[Effect]:
        if now_ms < job.probing_until_ms:
            return []
        effects: list[Effect] = []
        for number in list(job.pending):
            shard = job.shards.get(number)
            if shard is None or shard.not_before_ms > now_ms:
                continue
            whole = shard.attempts == 0 and not shard.stolen_from and not job.spec.serial
            if whole and shard.owed > 1:
                effects += self._spread(job, shard, now_ms)
            else:
                effects += self._place_one(job, shard, now_ms)
            if job.state != "running":
                break
        if job.pending:
            self._waiting[job.job] = None
        else:
            self._waiting.pop(job.job, None)
            effects += self._rebalance(job, now_ms)
        return effects

    def _rank(self, job: Job, demand: Demand, now_ms: float) -> Sequence[Ranked]:
        """Who may take it, at the rate that this job has seen there."""
        ranked = self.peers.not_stalled(self.geode.ranked(demand, now_ms), now_ms)
        for each in ranked:
            speed = job.speeds.get(each.kid)
            if speed:
                each.slot_gas_per_s = speed
        return ranked

    def _spread(self, job: Job, shard: Shard, now_ms: float) -> list[Effect]:
        """Cut a fresh shard in proportion to the predicted rates of the slots it is worth."""
        ranked = self._rank(job, balance.demand(self.geode, job, shard.owed), now_ms)
        pieces = balance.proportional(
            shard,
            balance.slots(ranked, self.peers.busy(now_ms)),
            balance.gas_per_block(self.geode, job),
            self.config.grain_ms,
            self.me,
        )
        if not pieces:
            return self._place_one(job, shard, now_ms)
        mean = balance.demand(self.geode, job, max(1, shard.owed // len(pieces)))
        ranked = self._rank(job, mean, now_ms)
        job.pending.remove(shard.number)
        del job.shards[shard.number]
        note = f"rate-proportional, {len(pieces)} ways"
        effects: list[Effect] = []
        for node, first, last in pieces:
            piece = job.cut(first, last)
            effects += self._give(job, piece, node, mean, ranked, note, now_ms)
        return effects

    def _place_one(self, job: Job, shard: Shard, now_ms: float) -> list[Effect]:
        """Give one shard to an idle slot, or to whoever finishes it first if the job starves."""
        demand = balance.demand(self.geode, job, shard.owed, shard.avoid)
        home = self._at_home(job, demand, now_ms)
        if home:
            note = "here: a slot is free, and it is not worth a round trip"
            return self._give(job, shard, self.me, demand, home, note, now_ms)
        ranked = self._rank(job, demand, now_ms)
        if not ranked and shard.avoid is not None:  # then who lost it may have it again
            demand = balance.demand(self.geode, job, shard.owed)
            ranked = self._rank(job, demand, now_ms)
        if not ranked:
            if balance.capable(self.geode, balance.demand(self.geode, job, 1)):
                job.starved_since_ms = -1.0  # all are full, or stalled: it waits here
            elif job.starved_since_ms < 0:
                job.starved_since_ms = now_ms
                self.geode.keep(task_name(job, shard), demand, (), None, now_ms, "waits for a node")
            return []
        job.starved_since_ms = -1.0
        busy = self.peers.busy(now_ms)
        node = balance.idle_node(ranked, busy, demand.work_gas, self.me)
        if node is None and shard.attempts and shard.avoid is not None:
            # Only who lost it has a slot free: one of its workers may have died, not the node.
            demand = balance.demand(self.geode, job, shard.owed)
            ranked = self._rank(job, demand, now_ms)
            node = balance.idle_node(ranked, busy, demand.work_gas, self.me)
        if node is None:
            if any(s.node is not None for s in job.shards.values()):
                return []  # its other shards hold slots; one of them comes free first
            # Sampling: the least of everybody's stale views would be everybody's choice.
            node = self.geode.choose(demand, now_ms, f"{task_name(job, shard)}?").winner
            if node is None or all(each.kid != node for each in ranked):
                node = ranked[0].kid
        note = f"taken from {shard.stolen_from}" if shard.stolen_from else "one shard"
        if shard.attempts:
            note = f"attempt {shard.attempts + 1}"
        return self._give(job, shard, node, demand, ranked, note, now_ms)

    def _at_home(self, job: Job, demand: Demand, now_ms: float) -> Sequence[Ranked]:
        """Ourselves, where a slot is free here for less than a grain of work: no need to rank."""
        if not demand.work_gas or job.job in self._waiting:
            return ()
        own = self.geode.node(self.me)
        if own is None or self.peers.live().get(self.me, 0) >= own.slots:
            return ()
        ranked = self.geode.ranked(demand, now_ms, self.me)
        if not ranked or self.peers.busy(now_ms).get(self.me, 0) >= own.slots:
            return ()
        work_ms = 1000 * demand.work_gas / ranked[0].slot_gas_per_s
        return ranked if work_ms < self.config.grain_ms else ()

    def _give(
        self,
        job: Job,
        shard: Shard,
        node: Kid,
        demand: Demand,
        ranked: Sequence[Ranked],
        note: str,
        now_ms: float,
    ) -> list[Effect]:
        if shard.attempts >= self.config.attempts:
            self._event("gave up", job, f"shard {shard.number} after {shard.attempts} attempts")
            job.fault = Fault(
                "exhausted",
                f"Shard {shard.number} was lost {shard.attempts} times.",
                "`manifold logs` says why its nodes or workers ended.",
            )
            return self.end(job, "failed", now_ms)
        self._attempts += 1  # O4
        job.assign(shard, node, self._attempts, now_ms)
        self.geode.keep(task_name(job, shard), demand, ranked, node, now_ms, note)
        gas = balance.gas_per_block(self.geode, job) or 0.0
        shard.flight_gas = gas * shard.owed
        self.geode.dispatched(node, shard.flight_gas, now_ms)
        self.peers.took(node)
        if job.spec.trace:
            self.events.append(
                Placed(
                    job.job, shard.number, shard.attempt, shard.attempts, self.peers.alias(node),
                    shard.first, shard.last, shard.flight_gas, note, now_ms,
                )
            )  # fmt: skip
        return [self._assignment(job, shard)]

    def _assignment(self, job: Job, shard: Shard) -> Effect:
        node = shard.node
        assert node is not None
        ir = job.ir if self.peers.needs(node, job.spec.program) else b""
        return Send(
            node,
            AssignShard(
                job.job, shard.number, shard.attempt, job.spec, shard.first, shard.last, ir,
                shard.attempts, balance.demand(self.geode, job, shard.owed).work_gas, shard.path,
                job.parcels[shard.first : shard.last],
            ),
        )  # fmt: skip

    def _rebalance(self, job: Job, now_ms: float) -> list[Effect]:
        """Lazy splitting: shrink the largest remainders for the sake of idle slots."""
        if job.state != "running" or job.spec.serial:
            return []
        if all(shard.owed < 2 for shard in job.shards.values()):
            return []
        ranked = self._rank(job, balance.demand(self.geode, job, 1), now_ms)
        busy = self.peers.busy(now_ms)
        block_gas = balance.gas_per_block(self.geode, job)
        wishes = balance.steals(job, ranked, busy, block_gas, self.config.grain_ms, now_ms)
        idle = len(wishes) > 0 and bool(balance.idle_slots(ranked, busy))
        effects: list[Effect] = []
        for shard, last in wishes:
            assert shard.node is not None
            shard.shed = not idle
            shard.shrinking = last
            shard.sent_ms = now_ms
            effects.append(Send(shard.node, Shrink(job.job, shard.number, shard.attempt, last)))
        return effects


def task_name(job: Job, shard: Shard) -> str:
    """What geode knows an attempt by."""
    return f"{job.job}/{shard.number}.{shard.attempts}"
