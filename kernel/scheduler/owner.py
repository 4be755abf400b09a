"""The owner: what a node does for the jobs that were submitted to it. Pure.

Interface rules: clients and runners speak through `receive`; `node_up`, `node_down` and `heard`
tell who is there. The owner is the only one that assigns blocks of its jobs.
Invariants: O1 a result counts only for the current attempt (ledger L1, L3); O2 work is assigned
only to nodes that geode's hard filter lets through; O3 jobs, results and retained jobs are bounded.
Source: design page of the scheduler: rate-proportional start, then lazy splitting; one writer.
"""

from __future__ import annotations

from collections import OrderedDict

import msgspec

from manifold.kernel.config import SchedulerConfig
from manifold.kernel.effects import Effect, Notify, Send
from manifold.kernel.errors import Busy, ManifoldError, NotFound, Refused, Unavailable
from manifold.kernel.geode.geode import Geode
from manifold.kernel.process.messages import Fault
from manifold.kernel.scheduler import balance, blocks, outcome
from manifold.kernel.scheduler.ledger import Job, Shard
from manifold.kernel.scheduler.messages import (
    INDICES_EXPLICIT_MAX,
    AssignShard,
    DropShard,
    FetchResult,
    JobEvent,
    JobList,
    JobStatus,
    KillJob,
    ListJobs,
    NeedProgram,
    Rejected,
    Report,
    ReportAck,
    ResultPart,
    ShardStatus,
    Shrink,
    Shrunk,
    State,
    SubmitJob,
    WatchJob,
)
from manifold.vm.kid import Kid, kid_of

TICK_MS = 50.0  # while jobs run: half the time in which a stall is noticed by a person
RESEND_MS = 400.0  # an assignment or shrink nobody answered is sent again
WATCHERS_MAX = 64
ENDED_MAX = 4096  # ended jobs remembered
RESULT_BYTES_MAX = 2 << 30  # held for clients, all jobs together; the oldest ended go first
NOBODY_MS = 30_000.0  # a job that no node may run waits this long before it fails


class Owner:
    """See the module."""

    def __init__(self, me: Kid, config: SchedulerConfig, geode: Geode) -> None:
        self.me = me
        self.config = config
        self.geode = geode
        self.jobs: OrderedDict[str, Job] = OrderedDict()  # running
        self.ended: OrderedDict[str, Job] = OrderedDict()
        self._programs_of: dict[Kid, set[Kid]] = {}
        self._held_bytes = 0
        self._live: dict[Kid, int] = {}  # shards of ours assigned to each node
        self._foreign: dict[Kid, tuple[int, float]] = {}  # slots others keep busy, and when told
        self._stalled: set[Kid] = set()
        self._ticked_ms = 0.0
        self.events: list[JobEvent] = []

    # -- clients ------------------------------------------------------------------------------

    def submit(
        self, client: str, message: SubmitJob, now_ms: float
    ) -> tuple[msgspec.Struct, list[Effect]]:
        """The answer to a submission, and what follows from it."""
        job = self.jobs.get(message.job) or self.ended.get(message.job)
        if job is not None:  # submitted before: the id is its idempotency token
            if message.watch and job.state == "running":
                self._watch(job, client)
            return self.status(job, now_ms), []
        self._admit(message)
        count = blocks.count(message.spec)
        job = Job(message.job, message.spec, message.ir, now_ms, count, [None] * count)
        if message.watch and client:
            self._watch(job, client)
        demand = balance.demand(self.geode, job, None)
        if count and not self.geode.candidates(demand, now_ms):
            raise Unavailable(
                f"No node may run this job: {balance.reasons(self.geode, demand, now_ms)}.",
                "Ask for less, or add such a node.",
            )
        self.jobs[job.job] = job
        self._event("submitted", job, f"{blocks.total(job.spec)} indices in {count} blocks")
        effects = self._begin(job, now_ms)
        return self.status(job, now_ms), effects

    def _admit(self, message: SubmitJob) -> None:
        spec = message.spec
        if len(self.jobs) >= self.config.jobs:
            raise Busy(
                f"This node owns {len(self.jobs)} jobs already.", "Come again.", retry_ms=1000
            )
        if spec.hi < spec.lo:
            raise Refused(f"The range {spec.lo}:{spec.hi} ends before it starts.", "Swap its ends.")
        if spec.indices and not spec.isolate:
            raise Refused("Explicit indices are tasks of their own.", "Set isolate.")
        if spec.isolate and blocks.total(spec) > INDICES_EXPLICIT_MAX:
            raise Refused(
                f"A batch holds at most {INDICES_EXPLICIT_MAX} tasks.", "Submit several batches."
            )
        if kid_of(message.ir) != spec.program:
            raise Refused("The program does not have the KID it claims.", "Submit it again.")

    def _watch(self, job: Job, client: str) -> None:
        if len(job.watchers) >= WATCHERS_MAX:
            job.watchers.pop(next(iter(job.watchers)))
        job.watchers[client] = None

    def request(
        self, client: str, message: WatchJob | KillJob | FetchResult | ListJobs, now_ms: float
    ) -> tuple[msgspec.Struct, list[Effect]]:
        """Answer a client's question about jobs."""
        if isinstance(message, ListJobs):
            every = [*self.ended.values(), *self.jobs.values()]
            return JobList(tuple(self.status(j, now_ms, brief=True) for j in every[-1000:])), []
        job = self.jobs.get(message.job) or self.ended.get(message.job)
        if job is None:
            raise NotFound(f"This node owns no job {message.job}.", "`manifold jobs` lists them.")
        match message:
            case WatchJob():
                if job.state == "running":
                    self._watch(job, client)
                return self.status(job, now_ms), []
            case KillJob():
                effects = [] if job.state != "running" else self._end(job, "cancelled", now_ms)
                return self.status(job, now_ms), effects
            case FetchResult():
                return ResultPart(message.first, outcome.part(job, message.first)), []

    def status(self, job: Job, now_ms: float, *, brief: bool = False) -> JobStatus:
        """The job as it stands; `brief` leaves results out."""
        results, parts = (None, 0) if brief else outcome.inline(job)
        live = (
            ()
            if job.state != "running"
            else tuple(
                ShardStatus(s.number, s.attempt, self._alias(s.node), s.first, s.last, s.counted)
                for s in list(job.shards.values())[:256]
            )
        )
        return JobStatus(
            job.job, job.state, job.spec.program, job.spec.name, self.me, job.done,
            blocks.total(job.spec), (job.ended_ms or now_ms) - job.started_ms, job.next_shard,
            job.retries, blocks.block_indices(job.spec), job.spec.reduce, job.fault, results,
            parts, live,
        )  # fmt: skip

    def _alias(self, node: Kid | None) -> str:
        known = self.geode.node(node) if node is not None else None
        return known.alias if known is not None else ""

    # -- who is there -------------------------------------------------------------------------

    def node_up(self, node: Kid, now_ms: float) -> list[Effect]:
        """A node joined, or came back as a new process."""
        self._programs_of.pop(node, None)
        self._stalled.discard(node)
        return self.pump(now_ms)

    def node_down(self, node: Kid, now_ms: float) -> list[Effect]:
        """A node is dead: what it owed goes to others at once."""
        self._programs_of.pop(node, None)
        self._foreign.pop(node, None)
        self._stalled.discard(node)
        for job in self.jobs.values():
            for shard in [s for s in job.shards.values() if s.node == node]:
                self._release(job, shard, "its node died", now_ms)
        return self.pump(now_ms)

    # -- planning -----------------------------------------------------------------------------

    def _begin(self, job: Job, now_ms: float) -> list[Effect]:
        if not job.blocks:
            return self._end(job, "done", now_ms)
        if job.blocks > 1 and balance.gas_per_block(self.geode, job) is None:
            job.cut(0, 1)
            job.cut(1, job.blocks)
            job.probing_until_ms = now_ms + self.config.grain_ms
            return self._place_one(job, job.shards[0], now_ms)
        job.cut(0, job.blocks)
        return self._plan(job, now_ms)

    def pump(self, now_ms: float) -> list[Effect]:
        """Assign what is pending and rebalance what runs, for every job."""
        effects: list[Effect] = []
        for job in list(self.jobs.values()):
            if job.state == "running":
                effects += self._plan(job, now_ms)
        return effects

    def _plan(self, job: Job, now_ms: float) -> list[Effect]:
        if now_ms < job.probing_until_ms:
            return []
        effects: list[Effect] = []
        for number in list(job.pending):
            shard = job.shards.get(number)
            if shard is None or shard.not_before_ms > now_ms:
                continue
            if shard.attempts == 0 and shard.owed > 1 and not shard.stolen_from:
                effects += self._spread(job, shard, now_ms)
            else:
                effects += self._place_one(job, shard, now_ms)
        if not job.pending:
            effects += self._rebalance(job, now_ms)
        return effects

    def _spread(self, job: Job, shard: Shard, now_ms: float) -> list[Effect]:
        """Cut a fresh shard in proportion to the predicted rates of the slots it is worth."""
        demand = balance.demand(self.geode, job, shard)
        candidates = self.geode.candidates(demand, now_ms)
        slots = balance.slots(candidates, self._busy(now_ms), self._stalled)
        pieces = balance.proportional(
            shard, slots, balance.gas_per_block(self.geode, job), self.config.grain_ms, self.me
        )
        if not pieces:
            return self._place_one(job, shard, now_ms)
        job.pending.remove(shard.number)
        del job.shards[shard.number]
        effects: list[Effect] = []
        for node, first, last in pieces:
            piece = job.cut(first, last)
            effects += self._give(
                job, piece, node, f"rate-proportional, {len(pieces)} ways", now_ms
            )
        return effects

    def _place_one(self, job: Job, shard: Shard, now_ms: float) -> list[Effect]:
        """Give one shard to an idle slot, or to whoever finishes it first if the job starves."""
        demand = balance.demand(self.geode, job, shard)
        candidates = self.geode.candidates(demand, now_ms)
        if not candidates and demand.exclude:
            demand = balance.demand(self.geode, job, shard, forgiving=True)
            candidates = self.geode.candidates(demand, now_ms)
        candidates = tuple(c for c in candidates if c.kid not in self._stalled)
        if not candidates:
            if job.starved_since_ms < 0:
                job.starved_since_ms = now_ms
            return []
        job.starved_since_ms = -1.0
        node = balance.idle_node(candidates, self._busy(now_ms), self.me)
        if node is None:
            if any(s.node is not None for s in job.shards.values()):
                return []  # its other shards hold slots; one of them comes free first
            # Sampling: the least of everybody's stale views would be everybody's choice.
            choice = self.geode.choose(demand, now_ms, f"{_task(job, shard)}?")
            node = choice.winner if choice.winner is not None else candidates[0].kid
            if node in self._stalled:
                node = candidates[0].kid
        note = f"taken from {shard.stolen_from}" if shard.stolen_from else "one shard"
        if shard.attempts:
            note = f"attempt {shard.attempts + 1}"
        return self._give(job, shard, node, note, now_ms)

    def _give(self, job: Job, shard: Shard, node: Kid, note: str, now_ms: float) -> list[Effect]:
        if shard.attempts >= self.config.attempts:
            self._event("gave up", job, f"shard {shard.number} after {shard.attempts} attempts")
            job.fault = Fault(
                "exhausted",
                f"Shard {shard.number} was lost {shard.attempts} times.",
                "`manifold logs` says why its nodes or workers ended.",
            )
            return self._end(job, "failed", now_ms)
        demand = balance.demand(self.geode, job, shard, forgiving=True)
        job.assign(shard, node, now_ms)
        self.geode.record(_task(job, shard), demand, node, now_ms, note)
        self.geode.dispatched(node, demand.work_gas, now_ms)
        self._live[node] = self._live.get(node, 0) + 1
        return [self._assignment(job, shard)]

    def _assignment(self, job: Job, shard: Shard) -> Effect:
        node = shard.node
        assert node is not None
        sent = self._programs_of.setdefault(node, set())
        ir = b"" if job.spec.program in sent else job.ir
        if len(sent) > 200:  # fewer than a runner keeps: it will usually still have those
            sent.clear()
        sent.add(job.spec.program)
        return Send(
            node,
            AssignShard(
                job.job, shard.number, shard.attempt, job.spec, shard.counted, shard.last, ir
            ),
        )

    def _busy(self, now_ms: float) -> dict[Kid, int]:
        """Slots taken on each node: by our shards, and by others' as last told."""
        busy = dict(self._live)
        for node, (foreign, told_ms) in self._foreign.items():
            if now_ms - told_ms < self.config.silence_ms:
                busy[node] = busy.get(node, 0) + foreign
        return busy

    def _rebalance(self, job: Job, now_ms: float) -> list[Effect]:
        """Lazy splitting: shrink the largest remainders for the sake of idle slots."""
        if not job.shards:
            return []
        busy = self._busy(now_ms)
        candidates = self.geode.candidates(balance.demand(self.geode, job, None), now_ms)
        wishes = balance.steals(job, candidates, busy, self._stalled, self.config.grain_ms, now_ms)
        effects: list[Effect] = []
        for shard, last in wishes:
            assert shard.node is not None
            shard.shrinking = last
            shard.sent_ms = now_ms
            effects.append(Send(shard.node, Shrink(job.job, shard.number, shard.attempt, last)))
        return effects

    # -- runners ------------------------------------------------------------------------------

    def receive(
        self, source: Kid, message: Report | Shrunk | Rejected | NeedProgram, now_ms: float
    ) -> list[Effect]:
        self._stalled.discard(source)
        job = self.jobs.get(message.job)
        shard = job.shards.get(message.shard) if job is not None else None
        current = shard is not None and shard.node == source and shard.attempt == message.attempt
        if isinstance(message, Report):
            self._heard_load(source, message, now_ms)
        if job is None or shard is None or not current:
            if isinstance(message, Report):
                return [self._drop(source, message)]  # O1: over, cancelled or fenced
            return []
        shard.heard_ms = now_ms
        shard.acknowledged = True
        match message:
            case Report():
                return self._report(job, shard, message, now_ms)
            case Shrunk(last=last):
                rest = job.shrink(shard, last)
                if shard.number not in job.shards:
                    self._left(job, shard, source, now_ms)
                if rest is not None:
                    rest.stolen_from = self._alias(source) or "another node"
                return self._plan(job, now_ms)
            case Rejected(retry_ms=retry_ms):
                self._take_back(job, shard, now_ms)
                shard.not_before_ms = now_ms + min(retry_ms, 1000.0)
                shard.attempts -= 1  # a refusal is not a failure
                return self._plan(job, now_ms)
            case NeedProgram():
                self._programs_of.setdefault(source, set()).discard(job.spec.program)
                return [self._assignment(job, shard)]

    def _heard_load(self, source: Kid, message: Report, now_ms: float) -> None:
        self.geode.report(source, message.load, now_ms)
        taken = message.load.slots - message.load.free_slots
        foreign = max(0, taken - self._live.get(source, 0))
        self._foreign[source] = (foreign, now_ms)

    def _drop(self, node: Kid, message: Report) -> Effect:
        return Send(node, DropShard(message.job, message.shard, message.attempt))

    def _report(self, job: Job, shard: Shard, report: Report, now_ms: float) -> list[Effect]:
        node = shard.node
        assert node is not None
        done = job.done
        counted = job.count(shard, report.first, report.results)
        self._held_bytes += outcome.nbytes(report.results) if counted else 0
        self._learn(job, node, report, job.done - done, now_ms)
        elapsed_ms = now_ms - shard.assigned_ms
        if counted:
            job.speeds[node] = balance.blend(job.speeds.get(node), shard, elapsed_ms)
        effects: list[Effect] = [
            Send(node, ReportAck(job.job, report.shard, report.attempt, shard.counted))
        ]
        if shard.number not in job.shards:
            self._left(job, shard, node, now_ms)
        if report.fault is not None:
            fault = msgspec.structs.replace(report.fault, node=self._alias(node))
            job.fault = fault
            self._event("trapped", job, fault.message)
            return effects + self._end(job, "failed", now_ms)
        if report.lost and shard.number in job.shards:
            self._release(job, shard, report.lost, now_ms)
        if self._held_bytes > RESULT_BYTES_MAX and not self._make_room():
            job.fault = Fault(
                "exhausted", "The results are larger than this node holds.", "Reduce them."
            )
            return effects + self._end(job, "failed", now_ms)
        if job.counted == job.blocks:
            return effects + self._end(job, "done", now_ms)
        if counted:
            job.probing_until_ms = 0.0
        if counted or report.lost:
            effects += self._plan(job, now_ms)
        return effects + self._progress(job, now_ms)

    def _learn(self, job: Job, node: Kid, report: Report, indices: int, now_ms: float) -> None:
        job.gas += report.gas
        job.measured += indices
        known = self.geode.node(node)
        if known is None or not indices or report.gas <= 0:
            return
        self.geode.learn_gas_per_index(job.spec.program, known.node_class, report.gas / indices)
        if report.busy_ms > 1.0:  # shorter stretches measure the clock, not the machine
            rate = report.gas / report.busy_ms * 1000
            self.geode.observed(node, known.node_class, job.spec.program, rate, now_ms)

    def _left(self, job: Job, shard: Shard, node: Kid, now_ms: float) -> None:
        """The shard no longer counts against `node`."""
        self._live[node] = max(0, self._live.get(node, 0) - 1)
        self.geode.completed(node, _work(self.geode, job, shard), now_ms)
        self.geode.ended(_task(job, shard), now_ms - shard.assigned_ms)

    def _take_back(self, job: Job, shard: Shard, now_ms: float) -> None:
        assert shard.node is not None
        self._left(job, shard, shard.node, now_ms)
        job.release(shard)

    def _release(self, job: Job, shard: Shard, reason: str, now_ms: float) -> None:
        node = self._alias(shard.node)
        self._take_back(job, shard, now_ms)
        self._event("retry", job, f"shard {shard.number}: {reason} ({node or 'unknown node'})")

    # -- the end ------------------------------------------------------------------------------

    def _end(self, job: Job, state: State, now_ms: float) -> list[Effect]:
        effects: list[Effect] = []
        for shard in list(job.shards.values()):
            if shard.node is not None:
                drop = DropShard(job.job, shard.number, shard.attempt)
                effects.append(Send(shard.node, drop))
                self._left(job, shard, shard.node, now_ms)
        job.shards.clear()
        job.pending.clear()
        job.state = state
        job.ended_ms = now_ms
        if state == "done":
            try:
                outcome.reduce(job)
            except ManifoldError as error:
                job.state = "failed"
                job.fault = Fault(error.code, error.message, error.next_step)
        if job.state != "done":
            job.results = []
        self.jobs.pop(job.job, None)
        self.ended[job.job] = job
        self._held_bytes = (
            sum(outcome.held(j) for j in self.ended.values())
            if (self._held_bytes > RESULT_BYTES_MAX // 2)
            else self._held_bytes
        )
        while len(self.ended) > ENDED_MAX:
            self.ended.popitem(last=False)
        self._event(job.state, job, f"{job.done} indices in {now_ms - job.started_ms:.0f} ms")
        status = self.status(job, now_ms)
        effects += [Send(watcher, status) for watcher in job.watchers]
        return effects

    def _make_room(self) -> bool:
        while self.ended and self._held_bytes > RESULT_BYTES_MAX:
            _, old = self.ended.popitem(last=False)
            self._held_bytes -= outcome.held(old)
        return self._held_bytes <= RESULT_BYTES_MAX

    def _progress(self, job: Job, now_ms: float) -> list[Effect]:
        if job.done == job.told_done or now_ms - job.told_ms < self.config.progress_ms:
            return []
        job.told_done, job.told_ms = job.done, now_ms
        status = self.status(job, now_ms, brief=True)
        return [Send(watcher, status) for watcher in job.watchers]

    def _event(self, what: str, job: Job, detail: str) -> None:
        self.events.append(JobEvent(what, job.job, detail))

    # -- time ---------------------------------------------------------------------------------

    def tick(self, now_ms: float) -> list[Effect]:
        late_ms = now_ms - self._ticked_ms - TICK_MS
        self._ticked_ms = now_ms
        effects: list[Effect] = []
        for job in list(self.jobs.values()):
            if TICK_MS < late_ms < now_ms:
                # It was us who slept: what they said meanwhile is still in our queues.
                for shard in job.shards.values():
                    shard.heard_ms = min(now_ms, shard.heard_ms + late_ms)
            effects += self._tick_job(job, now_ms)
        while self.ended:
            oldest = next(iter(self.ended.values()))
            if now_ms - oldest.ended_ms < self.config.retain_ms:
                break
            self.ended.popitem(last=False)
            self._held_bytes = max(0, self._held_bytes - outcome.held(oldest))
        return effects

    def _tick_job(self, job: Job, now_ms: float) -> list[Effect]:
        limit_ms = job.spec.timeout_ms
        if limit_ms and now_ms - job.started_ms >= limit_ms:
            job.fault = Fault(
                "exhausted",
                f"The job ran into its timeout of {limit_ms / 1000:g} s.",
                "Give it longer with --timeout, or less to do.",
            )
            return self._end(job, "failed", now_ms)
        if 0 <= job.starved_since_ms < now_ms - NOBODY_MS:
            job.fault = Fault(
                "unavailable", "No node that may run this job is alive.", "`manifold node ls`."
            )
            return self._end(job, "failed", now_ms)
        effects: list[Effect] = []
        for shard in list(job.shards.values()):
            if shard.node is None:
                continue
            if now_ms - shard.heard_ms > self.config.silence_ms:
                self._stalled.add(shard.node)
                self._release(job, shard, "silent", now_ms)
            elif now_ms - shard.sent_ms > RESEND_MS:
                if not shard.acknowledged:
                    shard.sent_ms = now_ms
                    self._programs_of.pop(shard.node, None)
                    effects.append(self._assignment(job, shard))
                elif shard.shrinking >= 0:
                    shard.sent_ms = now_ms
                    again = Shrink(job.job, shard.number, shard.attempt, shard.shrinking)
                    effects.append(Send(shard.node, again))
        return effects + self._plan(job, now_ms)

    def take_events(self) -> list[Effect]:
        """What happened since the last call, for the node's log."""
        events, self.events = self.events, []
        return [Notify(event) for event in events]


def _task(job: Job, shard: Shard) -> str:
    return f"{job.job}/{shard.number}.{shard.attempt}"


def _work(geode: Geode, job: Job, shard: Shard) -> float:
    return balance.demand(geode, job, shard, forgiving=True).work_gas
