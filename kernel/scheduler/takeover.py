"""Taking over jobs whose owner is dead, and finding what became of one. Pure.

Interface rules: the base of `Keeper`, which keeps this node's own jobs. Of a dead node's jobs the
live node that its hash puts first becomes the owner, by a compare-and-swap of each job's record:
whoever else tries finds another version. A node that restarts looks after its own in the same way.
Source: design page of the scheduler ("One writer": a job is taken over under its idempotency
token); rendezvous hashing: Thaler and Ravishankar (1998).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from manifold.kernel import rendezvous
from manifold.kernel.effects import Effect, Notify
from manifold.kernel.nexus.ask import Ask
from manifold.kernel.nexus.messages import Answer, CasVersion, ClientChange, Get, Operate
from manifold.kernel.process.messages import Fault
from manifold.kernel.scheduler import records
from manifold.kernel.scheduler.ledger import Job
from manifold.kernel.scheduler.records import JobRecord, Run
from manifold.vm.kid import Kid

if TYPE_CHECKING:
    from manifold.kernel.scheduler.owner import Owner

RETRY_MS = 250.0
TIMEOUT_MS = 5000.0  # of one request
RETAINED_MAX = 1000

Then = Callable[[Answer, float], list[Effect]]


@dataclass(slots=True)
class Guard:
    """One job that is kept."""

    job: Job
    since_ms: float
    generation: int = 1
    origins: tuple[Kid, ...] = ()  # nodes whose outbox may have it, as the record tells
    earlier: list[tuple[int, int]] = field(default_factory=list)  # chunks of former generations
    written: int = 0  # chunks of this one
    version: int = 0
    seq: int = 0
    claimed: bool = False
    head: list[bytes] = field(default_factory=list)  # pieces to write
    fresh: list[Run] = field(default_factory=list)  # counted, not in a chunk
    chunked: list[Run] = field(default_factory=list)  # in a chunk of this owner
    saved: list[Run] = field(default_factory=list)  # what the record tells of
    chunk: tuple[bytes, list[Run]] | None = None  # that is being written: the same till it is done
    admit: list[str] = field(default_factory=list)  # globals that do not know the job yet
    begun: bool = False
    completing: bool = False
    over: bool = False  # it has ended here: the record is to say so
    told: bool = False  # and it does
    full: bool = False  # no more results are kept
    busy: bool = False
    due_ms: float = 0.0

    @property
    def chunks(self) -> tuple[tuple[int, int], ...]:
        own = [(self.generation, self.written)] if self.written else []
        return (*self.earlier, *own)

    @property
    def room(self) -> bool:
        return sum(count for _, count in self.chunks) < records.CHUNKS_MAX


class Takeover(ABC):
    """See the module. `boot` is the number of this process."""

    def __init__(self, owner: Owner, boot: int) -> None:
        self._owner = owner
        self._boot = boot
        self._token = 0
        self._asked: dict[int, Then] = {}
        self._later: deque[tuple[float, Callable[[], list[Effect]]]] = deque()
        self._known = False  # whether there are voters, and our list was read
        self.guards: dict[str, Guard] = {}
        self._wanted: dict[str, None] = {}  # the jobs that our list ought to name
        self._dead: dict[Kid, bool] = {}  # whether we look after their jobs
        self._waiting: dict[str, tuple[Job, float]] = {}  # submitted again, looked for
        self._retained: deque[tuple[float, str, tuple[tuple[int, int], ...]]] = deque()

    @abstractmethod
    def begin(self, job: Job, again: bool, now_ms: float) -> list[Effect]:
        """A job was submitted: begin it, now or when it is recorded."""

    @property
    def known(self) -> bool:
        """Whether the voters have answered us once."""
        return self._known

    @abstractmethod
    def _step(self, guard: Guard, now_ms: float) -> list[Effect]:
        """The next thing to do for a job that is kept."""

    def _ask(self, key: str, change: ClientChange, then: Then) -> Effect:
        self._token += 1
        self._asked[self._token] = then
        op = f"{self._owner.me[:18]}.s{self._boot}.{self._token}"
        return Notify(Ask(self._token, Operate(op, key, change, TIMEOUT_MS)))

    def answered(self, token: int, answer: Answer, now_ms: float) -> list[Effect]:
        self._owner.queue.reach.heard(answer, now_ms)
        then = self._asked.pop(token, None)
        return then(answer, now_ms) if then is not None else []

    def _retry(self, now_ms: float, make: Callable[[], list[Effect]]) -> list[Effect]:
        """Not at once: what is busy answers at once."""
        self._later.append((now_ms + RETRY_MS, make))
        return []

    def _retain(self, job: str, chunks: tuple[tuple[int, int], ...], now_ms: float) -> None:
        """For clients that submit it again; not for ever."""
        self._retained.append((now_ms + self._owner.config.retain_ms, job, chunks))
        for at in range(len(self._retained) - RETAINED_MAX):  # these are due at once
            _, job, chunks = self._retained[at]
            self._retained[at] = (now_ms, job, chunks)

    def _retain_ended(self, record: JobRecord, now_ms: float) -> None:
        """Q4: where another node may still have it, that one does so when it is back."""
        if all(kid == self._owner.me for kid in record.origins):
            self._wanted[record.job] = None
            self._retain(record.job, record.chunks, now_ms)

    # -- jobs of others ---------------------------------------------------------------------------

    def node_up(self, node: Kid) -> None:
        self._dead.pop(node, None)

    def node_down(self, node: Kid) -> list[Effect]:
        """Its jobs need another owner: the one that the hash of it puts first."""
        self._dead[node] = False
        return self._inherit_all()

    def _inherit_all(self) -> list[Effect]:
        effects: list[Effect] = []
        live = self._owner.geode.nodes()
        for dead in [kid for kid, looked in self._dead.items() if not looked and self._known]:
            if rendezvous.first(records.owned_key(dead), live) == self._owner.me:
                self._dead[dead] = True
                effects += self._inherit(dead)
        return effects

    def _inherit(self, dead: Kid) -> list[Effect]:
        def read(answer: Answer, now_ms: float) -> list[Effect]:
            if answer.status != "ok" and dead in self._dead:
                return self._retry(now_ms, lambda: self._inherit(dead))
            return [effect for job in owned_of(answer) for effect in self.look(job)]

        return [self._ask(records.owned_key(dead), Get(), read)]

    def look(self, job: str) -> list[Effect]:
        """What does Nexus know of this job? It is begun where that is nothing."""
        queued = self._owner.queue.take(job)
        if queued is not None:
            self._waiting[job] = (queued, float("inf"))
        return self._look(job)

    def _look(self, job: str) -> list[Effect]:
        def read(answer: Answer, now_ms: float) -> list[Effect]:
            if answer.status != "ok":
                return self._retry(now_ms, lambda: self._look(job))
            try:
                record = record_of(answer)
            except records.Damaged as error:
                return self._unreadable(job, str(error), now_ms)
            if record is not None:
                return self._found(record, answer.version, now_ms)
            self._wanted.pop(job, None)
            waiting = self._waiting.pop(job, None)
            if waiting is None:
                return []
            if waiting[0].spec.effects or self._owner.queue.holds(job):  # K3, Q1: recorded first
                return self.begin(waiting[0], False, now_ms)
            return self._owner.begin(waiting[0], now_ms)

        return [self._ask(records.job_key(job), Get(), read)]

    def _unreadable(self, job: str, why: str, now_ms: float) -> list[Effect]:
        """Another release wrote it, or it is damaged: it is left alone."""
        self._wanted.pop(job, None)
        waiting = self._waiting.pop(job, None)
        if waiting is None:
            return []
        message = f"What was kept of this job cannot be read: {why}."
        waiting[0].fault = Fault("damaged", message, "Submit it under another id.")
        return self._owner.end(waiting[0], "failed", now_ms)

    def _found(self, record: JobRecord, version: int, now_ms: float) -> list[Effect]:
        """A record of a job that we own no more, or never did."""
        if record.job in self.guards:
            return []
        mine = record.owner == self._owner.me
        if not mine and self._owner.me in record.origins and not self._holds(record.job):
            return [*self._clear(record.job), *self._found_of(record, version, now_ms)]
        return self._found_of(record, version, now_ms)

    def _holds(self, job: str) -> bool:
        return self._owner.queue.holds(job)

    def _clear(self, job: str) -> list[Effect]:
        """Q4: our outbox has it no more."""
        me = self._owner.me

        def read(answer: Answer, now_ms: float) -> list[Effect]:
            if answer.status != "ok":
                return self._retry(now_ms, lambda: self._clear(job))
            try:
                record = record_of(answer)
            except records.Damaged:
                return []  # another release wrote it: it is left alone
            if record is None or me not in record.origins or self._holds(job):
                return []
            if job in self.guards:
                return []  # ours: what is written next says it
            rest = tuple(kid for kid in record.origins if kid != me)
            cleared = msgspec.structs.replace(record, origins=rest)

            def written(answer: Answer, now_ms: float) -> list[Effect]:
                if answer.status != "ok":
                    return self._retry(now_ms, lambda: self._clear(job))
                if record.state != "running" and not rest:
                    self._retain(job, record.chunks, now_ms)
                return []

            change = CasVersion(answer.version, records.encode(cleared))
            return [self._ask(records.job_key(job), change, written)]

        return [self._ask(records.job_key(job), Get(), read)]

    def _found_of(self, record: JobRecord, version: int, now_ms: float) -> list[Effect]:
        mine = record.owner == self._owner.me
        if record.state != "running":
            if mine or self._dead.get(record.owner, False):
                self._retain_ended(record, now_ms)
            waiting = self._waiting.pop(record.job, None)
            return self._owner.ended_elsewhere(waiting[0], record, now_ms) if waiting else []
        if not mine and record.owner in self._owner.geode.nodes():
            waiting = self._waiting.pop(record.job, None)  # it lives: clients find it there
            self._wanted.pop(record.job, None)
            return self._owner.lose(waiting[0], now_ms) if waiting else []
        return self._claim(record, version)

    def _claim(self, record: JobRecord, version: int) -> list[Effect]:
        claim = msgspec.structs.replace(
            record, owner=self._owner.me, boot=self._boot, generation=record.generation + 1, seq=0
        )

        def claimed(answer: Answer, now_ms: float) -> list[Effect]:
            if answer.status == "ok":
                return self._fetch(claim, version + 1)
            return self._retry(
                now_ms, lambda: self._look(record.job)
            )  # somebody was faster, or it is to be read

        change = CasVersion(version, records.encode(claim))
        return [self._ask(records.job_key(record.job), change, claimed)]

    def _fetch(self, claim: JobRecord, version: int) -> list[Effect]:
        keys = records.chunk_keys(claim.job, claim.chunks)
        found: list[bytes] = []

        def read(answer: Answer, now_ms: float) -> list[Effect]:
            if answer.status != "ok":
                return self._retry(now_ms, lambda: [self._ask(keys[len(found)], Get(), read)])
            found.append(answer.data if isinstance(answer.data, bytes) else b"")
            if len(found) < len(keys):
                return [self._ask(keys[len(found)], Get(), read)]
            return self._restore(claim, version, found, now_ms)

        return [self._ask(keys[0], Get(), read)] if keys else []

    def _restore(
        self, claim: JobRecord, version: int, chunks: list[bytes], now_ms: float
    ) -> list[Effect]:
        waiting = self._waiting.pop(claim.job, None)
        if claim.job in self.guards or (waiting is None and claim.job in self._owner.jobs):
            return []
        ended = self._owner.shelf.jobs.get(claim.job)
        if ended is not None:  # it was killed here while we looked for it: its record is to say so
            guard = self.guards[claim.job] = Guard(ended, now_ms, claim.generation)
            guard.earlier, guard.version = list(claim.chunks), version
            guard.claimed = guard.begun = guard.over = True
            return self._step(guard, now_ms)
        try:
            job, saved = records.restore(claim, chunks, now_ms)
        except records.Damaged as error:
            return self._owner.damaged(claim, waiting[0] if waiting else None, str(error), now_ms)
        if waiting is not None and waiting[0].spec != job.spec:
            waiting[0].fault = Fault(
                "refused", "Another job has this id.", "Submit it under an id of its own."
            )
            return [*self._owner.end(waiting[0], "failed", now_ms), *self._look(claim.job)]
        if waiting is not None:  # its client is here: that is the job it watches
            mine = waiting[0]
            mine.started_ms, mine.retries, mine.results = job.started_ms, job.retries, job.results
            records.fill(mine, saved)
            job = mine
        guard = self.guards[job.job] = Guard(job, now_ms, claim.generation)
        guard.earlier, guard.version, guard.claimed = list(claim.chunks), version, True
        guard.saved, guard.admit = saved, admissions(job)
        guard.fresh = records.runs_of(claim.tail)  # K2: they are in no chunk yet
        guard.origins = claim.origins
        guard.begun = not job.spec.effects and not self._holds(job.job)
        job.held = not guard.begun
        effects = self._owner.adopt(job, waiting is None, now_ms)
        return effects + self._step(guard, now_ms)


def admissions(job: Job) -> list[str]:
    """The globals that are to take its effects, the first to be asked at the end (C2)."""
    return sorted(job.spec.effects, reverse=True)


def over(record: JobRecord | None) -> bool:
    """Whether a job that has had a record is over, as what is there now tells."""
    return record is None or record.state != "running"


def owned_of(answer: Answer) -> tuple[str, ...]:
    try:
        return records.decode_owned(answer.data).jobs if isinstance(answer.data, bytes) else ()
    except msgspec.MsgspecError:
        return ()  # of a release that we do not understand: its jobs are looked for by name only


def record_of(answer: Answer) -> JobRecord | None:
    """What a register says of a job; raises `records.Damaged`, which is not the same as nothing."""
    try:
        return records.decode_record(answer.data) if isinstance(answer.data, bytes) else None
    except msgspec.MsgspecError as error:
        raise records.Damaged(str(error)) from error
