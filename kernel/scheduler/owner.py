"""The owner: what a node does for the jobs that were submitted to it. Pure.

Interface rules: `submit` and `request` answer clients, `receive` takes what runners say, `node_up`
and `node_down` tell who is there. The owner is the only one that assigns blocks of its jobs.
Invariants: O1 a result counts only for the current attempt (ledger L1, L3); O2 work is assigned
only to nodes that geode's hard filter lets through; O3 jobs, results and retained jobs are bounded
(shelf.py); O4 an attempt number is drawn once, over all jobs and all processes of this node.
Source: design page of the scheduler: rate-proportional start, then lazy splitting; one writer.
"""

from __future__ import annotations

import msgspec

from manifold.kernel.config import SchedulerConfig
from manifold.kernel.effects import Effect, Notify, Send
from manifold.kernel.errors import Busy, ManifoldError, NotFound, Unavailable
from manifold.kernel.geode.geode import Geode
from manifold.kernel.process.messages import Fault
from manifold.kernel.scheduler import admission, balance, blocks, outcome
from manifold.kernel.scheduler.keeper import Keeper
from manifold.kernel.scheduler.ledger import Job, Shard
from manifold.kernel.scheduler.messages import (
    Counted,
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
    Shrink,
    Shrunk,
    State,
    SubmitJob,
    WatchJob,
)
from manifold.kernel.scheduler.planner import Planner, task_name
from manifold.kernel.scheduler.queueing import Queue
from manifold.kernel.scheduler.records import JobRecord
from manifold.kernel.scheduler.shelf import Shelf
from manifold.vm.kid import Kid

TICK_MS = 50.0  # while jobs run: half the time in which a stall is noticed by a person
RESEND_MS = 400.0  # an assignment or shrink nobody answered is sent again
WATCHERS_MAX = 64
GOES_ON = ("queued", "running")
NOBODY_MS = 30_000.0  # a job that no node may run waits this long before it fails
ASKED_MS = 30_000.0  # a job that was taken over ends when no client asked about it for so long
WAITING_PER_END = 2  # and when a shard ends: one slot came free


class Owner(Planner):
    """See the module. `boot` is the number of this process of the node."""

    def __init__(self, me: Kid, config: SchedulerConfig, geode: Geode, boot: int = 0) -> None:
        super().__init__(me, config, geode, boot)
        self.shelf = Shelf(config.retain_ms)
        self.keeper = Keeper(self, boot)
        self.queue = Queue(self)
        self._ticked_ms = 0.0

    # -- clients ------------------------------------------------------------------------------

    def submit(
        self, client: str, message: SubmitJob, now_ms: float
    ) -> tuple[msgspec.Struct, list[Effect]]:
        """The answer to a submission, and what follows from it."""
        job = self._find(message.job)
        if job is not None:  # submitted before: the id is its idempotency token
            self._asked(job, client if message.watch else "", now_ms)
            return self.status(job, now_ms), self.queue.outbox.again(job.job)
        admission.check(message, len(self.jobs), self.config)
        self.peers.relent(now_ms)
        count = blocks.count(message.spec)
        job = Job(
            message.job, message.spec, message.ir, now_ms, count, [None] * count,
            parcels=message.parcels, client=client, detach=message.detach,
            origins=message.origins,
        )  # fmt: skip
        if message.watch and client:
            self._watch(job, client)
        demand = balance.demand(self.geode, job, 1)
        # The arguments of a call are with its client, which calls again: it runs where it can.
        cut = message.spec.kind != "python" and self.queue.cut(now_ms)
        if count and not cut and not balance.capable(self.geode, demand):
            raise Unavailable(
                f"No node may run this job: {balance.reasons(self.geode, demand, now_ms)}.",
                "Ask for less, or add such a node.",
            )
        if not self.shelf.grow(job, outcome.parcels_nbytes(message.parcels)):
            self.shelf.held_bytes -= job.held_bytes
            raise Busy("This node holds too many arguments and results.", "Come again.")
        if cut:
            try:
                effects = self.queue.submitted(job)
            except Busy:
                self.shelf.held_bytes -= job.held_bytes
                raise
            return self.status(job, now_ms), effects
        self.jobs[job.job] = job
        self._event("submitted", job, f"{blocks.total(job.spec)} indices in {count} blocks")
        effects = self.keeper.begin(job, message.again, now_ms)
        return self.status(job, now_ms), effects

    def _find(self, name: str) -> Job | None:
        return self.jobs.get(name) or self.queue.find(name) or self.shelf.jobs.get(name)

    def _asked(self, job: Job, client: str, now_ms: float) -> None:
        if client and job.state in GOES_ON:
            self._watch(job, client)
        if job.asked_ms >= 0:
            job.asked_ms = now_ms

    def _watch(self, job: Job, client: str) -> None:
        if len(job.watchers) >= WATCHERS_MAX:
            job.watchers.pop(next(iter(job.watchers)))
        job.watchers[client] = None

    def request(
        self, client: str, message: WatchJob | KillJob | FetchResult | ListJobs, now_ms: float
    ) -> tuple[msgspec.Struct, list[Effect]]:
        """Answer a client's question about jobs."""
        if isinstance(message, ListJobs):
            every = [*self.shelf.jobs.values(), *self.jobs.values(), *self.queue.jobs()]
            return JobList(tuple(self.status(j, now_ms, brief=True) for j in every[-1000:])), []
        job = self._find(message.job)
        if job is None:
            raise NotFound(f"This node owns no job {message.job}.", "`manifold jobs` lists them.")
        match message:
            case WatchJob():
                self._asked(job, client, now_ms)
                return self.status(job, now_ms), self.queue.outbox.again(job.job)
            case KillJob(moved=moved) if job.job not in self.jobs and job.state == "queued":
                # What is acknowledged by a disk is not given up for what may be in memory alone.
                return (self.status(job, now_ms), []) if moved else self.queue.cancel(job, now_ms)
            case KillJob(moved=True):
                # Its client believes that somebody else has it. Where a record says who, it does.
                kept = self.keeper.keeps(job.job)
                effects = [] if kept or job.state != "running" else self.lose(job, now_ms)
                return self.status(job, now_ms), effects
            case KillJob():
                effects = [] if job.state not in GOES_ON else self.end(job, "cancelled", now_ms)
                return self.status(job, now_ms), effects
            case FetchResult():
                return ResultPart(message.first, outcome.part(job, message.first)), []

    def status(self, job: Job, now_ms: float, *, brief: bool = False) -> JobStatus:
        """The job as it stands; `brief` leaves results out."""
        return outcome.status(job, self.me, self.peers.alias, now_ms, brief=brief)

    # -- who is there -------------------------------------------------------------------------

    def node_up(self, node: Kid, now_ms: float) -> list[Effect]:
        """A node joined, or came back as a new process."""
        self.peers.forget(node)
        self.keeper.node_up(node)
        self.queue.cut(now_ms)  # it looks who is there
        return self.pump(now_ms)

    def node_down(self, node: Kid, now_ms: float) -> list[Effect]:
        """A node is dead: what it owed goes to others at once."""
        self.peers.forget(node)
        self.queue.cut(now_ms)
        for job in self.jobs.values():
            for shard in [s for s in job.shards.values() if s.node == node]:
                self._release(job, shard, "its node died", now_ms)
        return [*self.keeper.node_down(node), *self.pump(now_ms)]

    def client_gone(self, client: str, now_ms: float) -> list[Effect]:
        """A client has left, or its lease has: what it alone waited for ends."""
        effects: list[Effect] = []
        for job in [j for j in self.jobs.values() if j.client == client and not j.detach]:
            effects += self.end(job, "cancelled", now_ms)
        return effects + self.queue.client_gone(client, now_ms)

    # -- jobs that change their owner -----------------------------------------------------------

    def resume(self, job: Job, now_ms: float) -> list[Effect]:
        """Go on with a job of which some blocks may be counted already."""
        job.held = False
        told = self.queue.begins(job, now_ms)
        return [*told, *self._resume(job, now_ms)] if told else self._resume(job, now_ms)

    def _resume(self, job: Job, now_ms: float) -> list[Effect]:
        if job.blocks and job.counted == job.blocks:
            return self.keeper.complete(job, now_ms)
        if not job.shards:
            return self.begin(job, now_ms)
        return self._plan(job, now_ms)

    def adopt(self, job: Job, new: bool, now_ms: float) -> list[Effect]:
        """A job that another owner began is ours now; `new`: no client of ours has asked for it."""
        size = outcome.nbytes([result for result in job.results if result is not None])
        self.shelf.grow(job, size + outcome.parcels_nbytes(job.parcels))
        if new:
            self.jobs[job.job] = job
            job.asked_ms = now_ms
        self._event("taken over", job, f"{job.counted} of {job.blocks} blocks are counted")
        wait = job.spec.effects or self.queue.holds(job.job)
        return [] if wait else self.resume(job, now_ms)

    def lose(self, job: Job, now_ms: float) -> list[Effect]:
        """Somebody else owns it: drop it, without a word of its end."""
        self.keeper.drop(job.job)
        if self.jobs.get(job.job) is not job:
            return []
        effects = self._abandon(job, now_ms)
        effects += self.forget(job)
        self._event("moved", job, "another node owns it")
        return effects + self.queue.leave(job.job)

    def forget(self, job: Job) -> list[Effect]:
        """It is not one of ours any more."""
        self.jobs.pop(job.job, None)
        self._waiting.pop(job.job, None)
        self.shelf.held_bytes -= job.held_bytes
        return []

    def ended_elsewhere(self, job: Job, record: JobRecord, now_ms: float) -> list[Effect]:
        """It was submitted again, and has ended already."""
        if record.state == "done" and record.results is None and not job.spec.effects:
            job.kept = False  # its results are gone with their owner: it is done again
            return [] if job.shards else self.resume(job, now_ms)
        effects = self._abandon(job, now_ms)
        job.fault = record.fault
        if record.state == "done" and record.results is None:
            job.fault = Fault(
                "exhausted", "The job is done; its results are gone with the node that owned it.",
                "Its effects on globals are there; reduce the results next time.",
            )  # fmt: skip
            return [*effects, *self.end(job, "failed", now_ms)]
        job.results = list(record.results or ())
        job.done = blocks.total(job.spec) if record.state == "done" else 0
        return [*effects, *self._over(job, record.state, now_ms)]

    def damaged(self, record: JobRecord, job: Job | None, why: str, now_ms: float) -> list[Effect]:
        """What was kept of it makes no job: whoever asks for it hears that."""
        if job is None:
            self.events.append(JobEvent("damaged", record.job, why))
            return []
        job.fault = Fault(
            "damaged", f"What was kept of this job is damaged: {why}.", "Run it anew."
        )
        return self.end(job, "failed", now_ms)

    # -- runners ------------------------------------------------------------------------------

    def receive(
        self, source: Kid, message: Report | Shrunk | Rejected | NeedProgram, now_ms: float
    ) -> list[Effect]:
        self.peers.heard(source)
        job = self.jobs.get(message.job)
        shard = job.shards.get(message.shard) if job is not None else None
        if isinstance(message, Report):
            self.peers.load(source, message.load, now_ms)
        if job is None or shard is None or shard.node != source or shard.attempt != message.attempt:
            if isinstance(message, Report):  # O1: over, cancelled or fenced
                return [Send(source, DropShard(message.job, message.shard, message.attempt))]
            return []
        shard.heard_ms = now_ms
        match message:
            case Report():
                return self._report(job, shard, message, now_ms)
            case Shrunk(last=last):
                rest = job.shrink(shard, last)
                if rest is not None:
                    rest.stolen_from = self.peers.alias(source) or "another node"
                    rest.avoid = source if shard.shed else None
                if shard.number not in job.shards:
                    self._left(job, shard, source, now_ms)
                    drop = DropShard(job.job, shard.number, shard.attempt)
                    return [Send(source, drop), *self._plan(job, now_ms)]
                return self._plan(job, now_ms)
            case Rejected(retry_ms=retry_ms, forward=forward):
                if message.load is not None:
                    self.peers.load(source, message.load, now_ms)
                path = (*shard.path, source)
                self._take_back(job, shard, now_ms)
                shard.attempts -= 1  # a refusal is not a failure
                if forward is not None:
                    return self._follow(job, shard, path, forward, now_ms)
                shard.not_before_ms = now_ms + min(retry_ms, 1000.0)
                return self._plan(job, now_ms)
            case NeedProgram():
                self.peers.lacks(source, job.spec.program)
                return [self._assignment(job, shard)]

    def _follow(
        self, job: Job, shard: Shard, path: tuple[Kid, ...], forward: Kid, now_ms: float
    ) -> list[Effect]:
        """One greedy hop: assign it to the link that its runner thinks better."""
        demand = balance.demand(self.geode, job, shard.owed)
        node, shard.path = self.peers.follow(path, forward, demand, now_ms)
        note = f"sent on by {self.peers.alias(path[-1])}, hop {len(path)}"
        ranked = self._rank(job, demand, now_ms)
        return self._give(job, shard, node, demand, ranked, note, now_ms)

    def _report(self, job: Job, shard: Shard, report: Report, now_ms: float) -> list[Effect]:
        node = shard.node
        assert node is not None
        shard.acknowledged = True
        done = job.done
        fresh = job.count(shard, report.first, report.results)
        shard.gauge(report.gas, report.busy_ms, now_ms)
        if report.running and shard.gauges:
            job.speeds[node] = 1000 * shard.speed
        if fresh:
            self._learn(job, shard, node, report, job.done - done, now_ms)
        missing = report.first > shard.counted
        kept = self.keeper.counted(job, shard.counted - len(fresh), len(fresh), now_ms)
        settled = self.keeper.settled(job)
        ack = ReportAck(job.job, report.shard, report.attempt, shard.counted, missing, settled)
        effects: list[Effect] = [Send(node, ack), *kept]
        ended = shard.number not in job.shards
        if ended:
            self._left(job, shard, node, now_ms)
        if report.fault is not None:
            job.fault = msgspec.structs.replace(report.fault, node=self.peers.alias(node))
            self._event("trapped", job, job.fault.message)
            return effects + self.end(job, "failed", now_ms)
        if report.lost and not ended:
            self._release(job, shard, report.lost, now_ms)
            effects.append(Send(node, DropShard(job.job, report.shard, report.attempt)))
        if fresh and not self.shelf.grow(job, outcome.nbytes(fresh)):
            job.fault = Fault(
                "exhausted", "The results are larger than this node holds.", "Reduce them."
            )
            return effects + self.end(job, "failed", now_ms)
        if job.counted == job.blocks:
            if job.spec.trace:
                self.events.append(Counted(job.job, job.blocks, now_ms))
            effects += self.keeper.complete(job, now_ms)
        else:
            if fresh:
                job.probing_until_ms = 0.0
            if ended or job.pending:
                effects += self._plan(job, now_ms)
            effects += self._progress(job, now_ms)
        if ended and self._waiting:
            effects += self._pump_waiting(WAITING_PER_END, now_ms)
        return effects

    def _learn(
        self, job: Job, shard: Shard, node: Kid, report: Report, indices: int, now_ms: float
    ) -> None:
        """From what the attempt has used since its last report that counted."""
        gas = report.gas - shard.gas_seen
        busy_ms = report.busy_ms - shard.busy_seen_ms
        if gas <= 0:
            return
        shard.gas_seen, shard.busy_seen_ms = report.gas, report.busy_ms
        job.gas += gas
        job.measured += indices
        known = self.geode.node(node)
        if known is None:
            return
        self.geode.learn_gas_per_index(job.spec.program, known.node_class, gas / indices)
        if busy_ms > 1.0:  # shorter stretches measure the clock, not the machine
            rate = gas / busy_ms * 1000
            self.geode.observed(node, known.node_class, job.spec.program, rate, now_ms)

    def _left(self, job: Job, shard: Shard, node: Kid, now_ms: float) -> None:
        """The shard no longer counts against `node`."""
        self.peers.left(node)
        self.geode.completed(node, shard.flight_gas, now_ms)
        self.geode.ended(task_name(job, shard), now_ms - shard.assigned_ms)

    def _take_back(self, job: Job, shard: Shard, now_ms: float) -> None:
        assert shard.node is not None
        self._left(job, shard, shard.node, now_ms)
        job.release(shard)

    def _release(self, job: Job, shard: Shard, reason: str, now_ms: float) -> None:
        node = self.peers.alias(shard.node)
        self._take_back(job, shard, now_ms)
        job.retries += 1
        self._event("retry", job, f"shard {shard.number}: {reason} ({node or 'unknown node'})")

    # -- the end ------------------------------------------------------------------------------

    def end(self, job: Job, state: State, now_ms: float) -> list[Effect]:
        effects = self._abandon(job, now_ms)
        if state == "done":
            try:
                outcome.reduce(job)
            except ManifoldError as error:
                state = "failed"
                job.fault = Fault(error.code, error.message, error.next_step)
        if state != "done":
            job.results = []
        return effects + self._over(job, state, now_ms)

    def _abandon(self, job: Job, now_ms: float) -> list[Effect]:
        """Nobody is to go on with it."""
        effects: list[Effect] = []
        for shard in list(job.shards.values()):
            if shard.node is not None:
                drop = DropShard(job.job, shard.number, shard.attempt)
                effects.append(Send(shard.node, drop))
                self._left(job, shard, shard.node, now_ms)
        job.shards.clear()
        job.pending.clear()
        return effects

    def _over(self, job: Job, state: State, now_ms: float) -> list[Effect]:
        job.state = state
        job.ended_ms = now_ms
        job.drop_program()
        self.jobs.pop(job.job, None)
        self._waiting.pop(job.job, None)
        self.shelf.put(job)
        self._event(job.state, job, f"{job.done} indices in {now_ms - job.started_ms:.0f} ms")
        effects = self.keeper.ended(job, now_ms)
        told: list[Effect] = []
        if job.watchers:
            status = self.status(job, now_ms)
            told += [Send(watcher, status) for watcher in job.watchers]
            job.watchers.clear()
        return effects + self.queue.leave(job.job, told)

    def _progress(self, job: Job, now_ms: float) -> list[Effect]:
        if job.done == job.told_done or now_ms - job.told_ms < self.config.progress_ms:
            return []
        job.told_done, job.told_ms = job.done, now_ms
        status = self.status(job, now_ms, brief=True)
        return [Send(watcher, status) for watcher in job.watchers]

    def _event(self, what: str, job: Job, detail: str) -> None:
        self.events.append(JobEvent(what, job.job, detail, job.spec.trace))

    # -- time ---------------------------------------------------------------------------------

    def tick(self, now_ms: float) -> list[Effect]:
        late_ms = now_ms - self._ticked_ms - TICK_MS
        self._ticked_ms = now_ms
        self.wake_ms = float("inf")
        self.peers.relent(now_ms)
        effects: list[Effect] = []
        for job in list(self.jobs.values()):
            if late_ms > TICK_MS:
                # It was us who slept: what they said meanwhile is still in our queues.
                for shard in job.shards.values():
                    shard.heard_ms = min(now_ms, shard.heard_ms + late_ms)
            effects += self._tick_job(job, now_ms)
        self.shelf.expire(now_ms)
        effects += [*self.queue.tick(now_ms), *self.keeper.tick(now_ms)]
        return [*effects, *self.pump(now_ms)]

    def _tick_job(self, job: Job, now_ms: float) -> list[Effect]:
        if job.state == "queued":
            return []  # its time begins when it runs
        limit_ms = job.spec.timeout_ms
        if limit_ms and now_ms - job.started_ms >= limit_ms:
            job.fault = Fault(
                "exhausted",
                f"The job ran into its timeout of {limit_ms / 1000:g} s.",
                "Give it longer with --timeout, or less to do.",
            )
            return self.end(job, "failed", now_ms)
        if 0 <= job.starved_since_ms < now_ms - NOBODY_MS:
            reasons = balance.reasons(self.geode, balance.demand(self.geode, job, 1), now_ms)
            job.fault = Fault(
                "unavailable", f"No node that may run this job is alive: {reasons}.",
                "`manifold node ls` shows which there are.",
            )  # fmt: skip
            return self.end(job, "failed", now_ms)
        if 0 <= job.asked_ms < now_ms - ASKED_MS and not job.detach:
            return self.end(job, "cancelled", now_ms)
        effects: list[Effect] = []
        for shard in list(job.shards.values()):
            if shard.node is None:
                continue
            if now_ms - shard.heard_ms > self.config.silence_ms:
                self.peers.stall(shard.node, now_ms)
                self._release(job, shard, "silent", now_ms)
            elif now_ms - shard.sent_ms > RESEND_MS:
                if not shard.acknowledged:
                    shard.sent_ms = now_ms
                    self.peers.lacks(shard.node, job.spec.program)
                    effects.append(self._assignment(job, shard))
                if shard.shrinking >= 0:
                    shard.sent_ms = now_ms
                    again = Shrink(job.job, shard.number, shard.attempt, shard.shrinking)
                    effects.append(Send(shard.node, again))
        return effects

    def take_events(self) -> list[Effect]:
        """What happened since the last call, for the node's log."""
        events, self.events = self.events, []
        return [Notify(event) for event in events]
