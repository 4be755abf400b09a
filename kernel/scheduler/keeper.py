"""The keeper: an owner's jobs, kept in Nexus so that they outlive their owner. Pure.

Interface rules: the owner calls `begin` for each new job, `counted`, `complete` and `ended` as it
goes on, `tick` while there is something to keep; `node_down` says whose jobs need another owner,
`nexus_known` that there are voters. All return effects; `answered` takes what Nexus says.
A job with effects is recorded and admitted to its globals before any of it runs, and its end is
recorded before anybody hears of it. Any other job is recorded once it has run for KEEP_AFTER_MS,
and then at least every KEEP_MS; shorter ones are not worth a disk's sync, and are done again.
Invariants:
  K1  a job with a record is changed only by who owns its record: an owner that finds another there
      drops the job (a compare-and-swap of the record's version tells);
  K2  a position is told to be settled only once the result of its block is in the record;
  K3  a job with effects is begun afresh only where no record of it was ever made;
  K4  of each job one request to Nexus is under way at a time, so that chunks precede their record;
  K5  a job is admitted to a global only once it has a record, so a job without one is over.
Source: design page of the scheduler (checkpoint of the owner's ledger, effects on globals).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from manifold.kernel.effects import Effect
from manifold.kernel.nexus.messages import (
    Admit,
    Answer,
    CasVersion,
    ClientChange,
    Delete,
    Dismiss,
    Get,
    Put,
    crowd,
)
from manifold.kernel.process.messages import Fault
from manifold.kernel.scheduler import outcome, records
from manifold.kernel.scheduler.crowds import Crowds
from manifold.kernel.scheduler.ledger import Job
from manifold.kernel.scheduler.messages import ORIGINS_MAX, SETTLED_MAX, JobEvent
from manifold.kernel.scheduler.outbox import ENTRIES_MAX
from manifold.kernel.scheduler.records import JobRecord, Run
from manifold.kernel.scheduler.takeover import (
    RETAINED_MAX,
    RETRY_MS,
    Guard,
    Takeover,
    Then,
    admissions,
    over,
    owned_of,
    record_of,
)
from manifold.vm.kid import Kid

if TYPE_CHECKING:
    from manifold.kernel.scheduler.owner import Owner

KEEP_AFTER_MS = 300.0  # a job that ran for so long is worth a few syncs
KEEP_MS = 500.0
AGAIN_MS = 3000.0  # so long a job that was submitted again waits for voters; then it is begun
VOTERS_MS = 30_000.0  # and a job with effects, before it fails
# Together they fit our list, with what comes from a full outbox.
GUARDS_MAX = records.OWNED_MAX - RETAINED_MAX - ENTRIES_MAX


class Keeper(Takeover):
    """See the module. `boot` is the number of this process."""

    def __init__(self, owner: Owner, boot: int) -> None:
        super().__init__(owner, boot)
        self._listed: dict[str, None] = {}  # as our register has it
        self._listing = False
        self._keep_after_ms = KEEP_AFTER_MS
        self._crowds = Crowds(self.guards)

    # -- Nexus --------------------------------------------------------------------------------

    def nexus_known(self, now_ms: float) -> list[Effect]:
        """There are voters. First of all: what did a former process of this node leave?"""

        def read(answer: Answer, now_ms: float) -> list[Effect]:
            if answer.status != "ok":
                again = self._retry(now_ms, lambda: self.nexus_known(now_ms))
                return [*again, *self._shelter(answer, now_ms)]
            self._known = True
            left = owned_of(answer)
            self._listed = dict.fromkeys(left)
            self._wanted = self._listed | self._wanted
            effects = [effect for job in left for effect in self.look(job)]
            return effects + self._inherit_all() + self.tick(now_ms)

        return [self._ask(records.owned_key(self._owner.me), Get(), read)]

    @property
    def due_ms(self) -> float:
        """When a tick is wanted; never, where there is nothing to keep."""
        if self.guards or self._waiting or self._later:
            return 0.0
        return self._retained[0][0] if self._retained and self._known else float("inf")

    def keeps(self, job: str) -> bool:
        """Whether its record is ours."""
        guard = self.guards.get(job)
        return guard is not None and guard.claimed

    def hurry(self) -> None:
        """This node is about to leave: every job that can be recorded is, however short."""
        self._keep_after_ms = 0.0

    @property
    def safe(self) -> bool:
        """Whether every job of this node is on record, so that another may go on with it."""
        running = all(self.keeps(job) for job in self._owner.jobs)
        return running and all(guard.told for guard in self.guards.values() if guard.over)

    def waits(self, job: str) -> bool:
        """Whether it is not begun yet: it is looked for, or not recorded."""
        guard = self.guards.get(job)
        return job in self._waiting or (guard is not None and not guard.begun)

    # -- what the owner says --------------------------------------------------------------------

    def begin(self, job: Job, again: bool, now_ms: float) -> list[Effect]:
        """A job was submitted: begin it, now or when it is recorded."""
        held = self._holds(job.job)
        if job.spec.effects and not held and len(self.guards) >= GUARDS_MAX:
            job.fault = Fault("busy", "This node keeps too many jobs already.", "Come again.")
            return self._owner.end(job, "failed", now_ms)
        if job.spec.effects or held:
            guard = self._guard(job, now_ms)
            if not guard.head:
                return self._too_large(guard, now_ms)
            return self._step(guard, now_ms)
        if again and self._known:
            self._waiting[job.job] = (job, now_ms + AGAIN_MS)
            return self._look(job.job)
        return self._owner.begin(job, now_ms)

    def _guard(self, job: Job, now_ms: float) -> Guard:
        guard = self.guards[job.job] = Guard(job, now_ms)
        guard.admit = admissions(job)
        guard.head = records.head_pieces(job)
        guard.origins = job.origins
        guard.begun = not job.spec.effects and not self._holds(job.job)
        guard.fresh = records.merge_runs(
            [(at, at + 1) for at, result in enumerate(job.results) if result is not None], ()
        )
        return guard

    def counted(self, job: Job, first: int, count: int, now_ms: float) -> list[Effect]:
        guard = self.guards.get(job.job)
        if guard is None or not count:
            return []
        guard.fresh = records.merge_runs(guard.fresh, [(first, first + count)])
        return self._step(guard, now_ms) if job.spec.effects else []

    def settled(self, job: Job) -> tuple[tuple[int, int], ...]:
        """K2: for the runners of a job with effects."""
        guard = self.guards.get(job.job)
        if guard is None or not job.spec.effects:
            return ()
        return records.positions(job.spec, guard.saved, SETTLED_MAX)

    def complete(self, job: Job, now_ms: float) -> list[Effect]:
        """Every block is counted: the job ends, at once or when that is recorded."""
        guard = self.guards.get(job.job)
        if guard is None or not job.spec.effects:
            return self._owner.end(job, "done", now_ms)
        guard.completing = True
        return self._step(guard, now_ms)

    def ended(self, job: Job, now_ms: float) -> list[Effect]:
        """It has ended here."""
        self._waiting.pop(job.job, None)
        guard = self.guards.get(job.job)
        if guard is None:
            return []
        guard.over, guard.due_ms = True, 0.0
        guard.fresh, guard.head = [], guard.head[:1] if guard.busy else []
        return self._step(guard, now_ms)

    def drop(self, job: str) -> None:
        """Somebody else has it."""
        self._waiting.pop(job, None)
        guard = self.guards.get(job)
        if guard is not None:
            self._forget(guard)

    def _forget(self, guard: Guard) -> None:
        if self.guards.get(guard.job.job) is guard:
            del self.guards[guard.job.job]
        self._wanted.pop(guard.job.job, None)

    # -- keeping a job --------------------------------------------------------------------------

    def tick(self, now_ms: float) -> list[Effect]:
        effects: list[Effect] = []
        for job, _ in [each for each in self._waiting.values() if now_ms >= each[1]]:
            del self._waiting[job.job]
            effects += self._owner.begin(job, now_ms)
        if self._known:
            for job in list(self._owner.jobs.values()):
                if now_ms - job.started_ms < self._keep_after_ms:
                    break  # they stand in the order of their start, about
                if job.job not in self.guards and self._worth(job):
                    guard = self._guard(job, now_ms)
                    if not guard.head:
                        job.kept = False
                        self._forget(guard)
        for _ in range(len(self._later)):
            due_ms, make = self._later.popleft()
            if now_ms < due_ms:
                self._later.append((due_ms, make))
            else:
                effects += make()
        for guard in list(self.guards.values()):
            effects += self._step(guard, now_ms)
        effects += self._expire(now_ms)
        return effects

    def _worth(self, job: Job) -> bool:
        """A call's arguments are with its client, which calls again."""
        waits = job.job in self._waiting or job.state != "running"
        kept = job.kept and job.spec.kind != "python"
        return kept and not waits and len(self.guards) < GUARDS_MAX

    def _step(self, guard: Guard, now_ms: float) -> list[Effect]:
        """K4: the next thing to do for it, if it is time."""
        if self.guards.get(guard.job.job) is not guard:
            return []
        late = not guard.begun and not guard.over and now_ms - guard.since_ms > VOTERS_MS
        if late and not self._holds(guard.job.job):
            return self._without_voters(guard, now_ms)
        if guard.busy:
            return []
        if guard.over and not guard.claimed:
            return self._unmade(guard)
        if not self._known or now_ms < guard.due_ms:
            return []
        if guard.job.job not in self._listed:
            self._wanted[guard.job.job] = None
            return self._list(now_ms)
        if guard.head:
            return self._write_head(guard)
        if guard.claimed and self._holds(guard.job.job):
            return self._owner.queue.leave(guard.job.job)  # Q1; `left` goes on
        if self._stale(guard):
            return self._write_results(guard, now_ms)
        if guard.over:
            return self._close(guard, now_ms)
        if guard.admit:
            return self._admit(guard, now_ms)
        if not guard.begun:
            guard.begun = True
            return self._owner.resume(guard.job, now_ms)
        if guard.completing and guard.job.state == "running":
            return self._owner.end(guard.job, "done", now_ms)
        return []

    def left(self, job: Job, now_ms: float) -> list[Effect]:
        """It is in our outbox no more."""
        guard = self.guards.get(job.job)
        if guard is None:
            return self._clear(job.job)
        guard.since_ms = now_ms  # so long it waited for voters on the disk
        return self._step(guard, now_ms)

    def _shelter(self, answer: Answer, now_ms: float) -> list[Effect]:
        """No majority answers: the disk is to have what cannot be recorded."""
        if answer.status != "unavailable" or not answer.missing:
            return []
        return [
            effect
            for guard in self.guards.values()
            if not guard.claimed and not guard.over
            for effect in self._owner.queue.shelter(guard.job, guard.begun, now_ms)
        ]

    def _unmade(self, guard: Guard) -> list[Effect]:
        """It ended before it had a record: nobody has heard of it."""
        self._forget(guard)
        keys = records.chunk_keys(guard.job.job, guard.chunks)
        return [effect for key in keys for effect in self._until_ok(key, Delete())]

    def _stale(self, guard: Guard) -> bool:
        if not guard.claimed or (guard.over and not guard.told):
            return True
        return not guard.full and not records.covers(guard.saved, guard.fresh)

    def _without_voters(self, guard: Guard, now_ms: float) -> list[Effect]:
        job = guard.job
        job.fault = Fault(
            "unavailable",
            f"The globals of this program cannot be reached: {', '.join(job.spec.effects)}.",
            "`manifold nexus status` says which voters are missing.",
        )
        return self._owner.end(job, "failed", now_ms)

    def _do(self, guard: Guard, key: str, change: ClientChange, then: Then) -> list[Effect]:
        """One request for a job; what does not come off is tried again later."""
        guard.busy = True

        def answered(answer: Answer, now_ms: float) -> list[Effect]:
            guard.busy = False
            if self.guards.get(guard.job.job) is not guard:
                return []
            return [*self._shelter(answer, now_ms), *then(answer, now_ms)]

        return [self._ask(key, change, answered)]

    def _wait(self, guard: Guard, now_ms: float) -> list[Effect]:
        guard.due_ms = now_ms + RETRY_MS
        return []

    def _write_head(self, guard: Guard) -> list[Effect]:
        def written(answer: Answer, now_ms: float) -> list[Effect]:
            if answer.status != "ok":
                return self._wait(guard, now_ms)
            guard.head = guard.head[1:]
            guard.written += 1
            return self._step(guard, now_ms)

        key = records.chunk_key(guard.job.job, guard.generation, guard.written)
        data = records.encode(records.Chunk(guard.head[0]))
        return self._do(guard, key, Put(data), written)

    def _write_results(self, guard: Guard, now_ms: float) -> list[Effect]:
        """What does not fit into the record goes to a chunk before it."""
        tail, spans = records.take_results(guard.job, guard.fresh, records.TAIL_BYTES)
        if guard.full or records.covers(spans, guard.fresh):
            return self._write_record(guard, tail, spans, now_ms)
        if guard.chunk is None:
            guard.chunk = records.take_results(guard.job, guard.fresh, records.CHUNK_BYTES)
        data, spans = guard.chunk
        if not spans or not guard.room:
            return self._too_large(guard, now_ms)

        def written(answer: Answer, now_ms: float) -> list[Effect]:
            if answer.status != "ok":
                return self._wait(guard, now_ms)
            guard.written += 1
            guard.chunk = None
            guard.chunked = records.merge_runs(guard.chunked, spans)
            guard.fresh = records.without(guard.fresh, spans)
            return self._step(guard, now_ms)

        key = records.chunk_key(guard.job.job, guard.generation, guard.written)
        return self._do(guard, key, Put(data), written)

    def _too_large(self, guard: Guard, now_ms: float) -> list[Effect]:
        """No more is kept: another owner would compute the rest again, but for effects."""
        guard.full = True
        if guard.job.spec.effects and guard.job.state == "running":
            guard.job.fault = Fault(
                "exhausted",
                "A program with effects on globals, or its results, are too large to be kept: "
                f"together at most {records.CHUNKS_MAX * records.CHUNK_BYTES} bytes.",
                "Reduce the results, or split the job.",
            )
            return self._owner.end(guard.job, "failed", now_ms)
        return self._step(guard, now_ms)

    def _write_record(
        self, guard: Guard, tail: bytes, spans: list[Run], now_ms: float
    ) -> list[Effect]:
        job, owner = guard.job, self._owner
        guard.seq += 1
        results = None
        if guard.over and job.state == "done":
            done = tuple(result for result in job.results if result is not None)
            small = outcome.nbytes(done) < records.RESULTS_BYTES_MAX
            results = done if small and len(records.encode(done)) < records.CHUNK_BYTES else None
        saving, over = records.merge_runs(guard.chunked, spans), guard.over
        record = JobRecord(
            job.job, owner.me, self._boot, guard.generation, guard.seq,
            "running" if job.state == "queued" else job.state, job.detach,
            job.client, max(0.0, (job.ended_ms or now_ms) - job.started_ms), guard.chunks,
            job.retries, job.fault, results, tail, self._origins(guard),
        )  # fmt: skip

        def written(answer: Answer, now_ms: float) -> list[Effect]:
            if answer.status == "ok" and guard.version:
                # Not the answer's: of a write that was found done that is the present one (K1).
                return self._recorded(guard, guard.version + 1, saving, over, now_ms)
            return self._read_back(guard, record, saving, now_ms)

        change = CasVersion(guard.version, records.encode(record))
        return self._do(guard, records.job_key(job.job), change, written)

    def _origins(self, guard: Guard) -> tuple[Kid, ...]:
        """Q4."""
        me, name = self._owner.me, guard.job.job
        others = [kid for kid in guard.origins if kid != me]
        return tuple([me, *others][:ORIGINS_MAX] if self._holds(name) else others)

    def _recorded(
        self, guard: Guard, version: int, saving: list[Run], over: bool, now_ms: float
    ) -> list[Effect]:
        guard.claimed, guard.version = True, version
        guard.told = guard.told or over
        guard.saved = records.merge_runs(guard.saved, saving)
        if not guard.job.spec.effects and not guard.over:
            guard.due_ms = now_ms + KEEP_MS
        return self._step(guard, now_ms)

    def _read_back(
        self, guard: Guard, record: JobRecord, saving: list[Run], now_ms: float
    ) -> list[Effect]:
        """The record was not changed as meant, or nobody knows: what does it say?"""

        def read(answer: Answer, now_ms: float) -> list[Effect]:
            if answer.status != "ok":
                guard.busy = True
                return self._retry(now_ms, look)
            try:
                found = record_of(answer)
            except records.Damaged as error:
                self._forget(guard)
                self._waiting[record.job] = (guard.job, float("inf"))
                return self._unreadable(record.job, str(error), now_ms) if not guard.over else []
            if found is None:
                if guard.claimed:  # it was there: somebody has removed it
                    return self._owner.lose(guard.job, now_ms)
                guard.version = 0
                return self._wait(guard, now_ms)
            if found == record:
                over = record.state != "running"
                return self._recorded(guard, answer.version, saving, over, now_ms)
            mine = (found.owner, found.boot, found.generation)
            if mine == (record.owner, record.boot, record.generation):
                guard.version = answer.version  # an earlier write of ours, or an origin is gone
                guard.origins = tuple(kid for kid in guard.origins if kid in found.origins)
                return self._wait(guard, now_ms)
            if guard.claimed:
                return self._owner.lose(guard.job, now_ms)  # K1
            return self._known_already(guard, found, answer.version, now_ms)

        def look() -> list[Effect]:
            return self._do(guard, records.job_key(record.job), Get(), read)

        return look()

    def _known_already(
        self, guard: Guard, found: JobRecord, version: int, now_ms: float
    ) -> list[Effect]:
        """A job that was submitted to us has a record of another owner."""
        job = guard.job
        if guard.over:
            self._forget(guard)
            return []
        if not guard.begun:
            self._forget(guard)
            self._waiting[job.job] = (job, float("inf"))
            return self._found(found, version, now_ms)  # K3
        if found.state != "running":
            self._forget(guard)
            return self._owner.ended_elsewhere(job, found, now_ms)
        if found.owner != self._owner.me and found.owner in self._owner.geode.nodes():
            return self._owner.lose(job, now_ms)
        guard.version, guard.generation = version, found.generation + 1
        guard.head, guard.written = records.head_pieces(job), 0  # over the dead one's, with ours
        return self._step(guard, now_ms)

    def _admit(self, guard: Guard, now_ms: float) -> list[Effect]:
        """The globals are to take effects of this job; it may be said again by anybody."""
        name = guard.admit[-1]
        first = self._crowds.first(name)
        if first is not None and first is not guard:  # C1
            guard.since_ms = max(guard.since_ms, first.since_ms)
            return self._wait(guard, now_ms)

        def admitted(answer: Answer, now_ms: float) -> list[Effect]:
            if answer.status == "ok":
                guard.admit.pop()
                return self._step(guard, now_ms)
            if answer.status in ("refused", "no"):
                guard.job.fault = Fault(
                    "refused",
                    f"The global {name} does not take this job: {answer.why}",
                    "Submit it under another id.",
                )
                return self._owner.end(guard.job, "failed", now_ms)
            if answer.status == "busy" and (jobs := crowd(answer.data)):
                return self._crowded(guard, name, jobs, now_ms)
            return self._wait(guard, now_ms)

        return self._do(guard, f"globals/{name}", Admit(guard.job.job), admitted)

    def _crowded(
        self, guard: Guard, name: str, jobs: tuple[str, ...], now_ms: float
    ) -> list[Effect]:
        """There is no room at this global. Whoever asks for all sees whether one could be made."""
        guard.since_ms = now_ms  # the voters have answered
        if self._crowds.joined(name, guard):
            detail = f"{len(jobs)} jobs write {name} already"
            self._owner.events.append(JobEvent("waits", guard.job.job, detail))
        if self._crowds.first(name) is not guard:
            return self._wait(guard, now_ms)
        suspect = self._crowds.suspect(name, jobs)

        def read(answer: Answer, now_ms: float) -> list[Effect]:
            try:
                record = record_of(answer)
            except records.Damaged:
                return self._wait(guard, now_ms)  # another release wrote it: it is left alone
            if answer.status != "ok" or not over(record):
                return self._wait(guard, now_ms)
            return self._do(guard, f"globals/{name}", Dismiss(suspect), dismissed)

        def dismissed(answer: Answer, now_ms: float) -> list[Effect]:
            return self._step(guard, now_ms) if answer.status == "ok" else self._wait(guard, now_ms)

        return self._do(guard, records.job_key(suspect), Get(), read)

    def _close(self, guard: Guard, now_ms: float) -> list[Effect]:
        """Its end is recorded: nothing of it has effects any more; the record stays for a while."""
        del self.guards[guard.job.job]
        if self._origins(guard):
            self._wanted.pop(guard.job.job, None)  # Q4: who has it there removes its record
        else:
            self._retain(guard.job.job, guard.chunks, now_ms)
        return [
            effect
            for name in guard.job.spec.effects
            for effect in self._until_ok(f"globals/{name}", Dismiss(guard.job.job))
        ]

    def _until_ok(self, key: str, change: ClientChange) -> list[Effect]:
        def answered(answer: Answer, now_ms: float) -> list[Effect]:
            if answer.status in ("maybe", "unavailable", "busy"):
                return self._retry(now_ms, lambda: [self._ask(key, change, answered)])
            return []

        return [self._ask(key, change, answered)]

    def _expire(self, now_ms: float) -> list[Effect]:
        effects: list[Effect] = []
        while self._known and self._retained and now_ms >= self._retained[0][0]:
            _, job, chunks = self._retained.popleft()
            for key in (records.job_key(job), *records.chunk_keys(job, chunks)):
                effects += self._until_ok(key, Delete())
            self._wanted.pop(job, None)
        return effects + (self._list(now_ms) if effects else [])

    # -- our list -------------------------------------------------------------------------------

    def _list(self, now_ms: float) -> list[Effect]:
        wanted = dict(list(self._wanted.items())[-records.OWNED_MAX :])
        if self._listing or not self._known or list(wanted) == list(self._listed):
            return []
        self._listing = True

        def written(answer: Answer, now_ms: float) -> list[Effect]:
            self._listing = False
            if answer.status != "ok":
                return self._shelter(answer, now_ms)  # the next tick tries again
            self._listed = wanted
            effects: list[Effect] = []
            for job in list(wanted):
                if job in self.guards:
                    effects += self._step(self.guards[job], now_ms)
            return effects + self._list(now_ms)

        data = records.encode(records.Owned(tuple(wanted)))
        return [self._ask(records.owned_key(self._owner.me), Put(data), written)]
