"""What an owner does while it reaches no majority of the voters: it queues, and hands over. Pure.

Interface rules: the owner asks `cut` before it opens a job, then `submitted`; `shelter` takes a job
that is here already and cannot be recorded; `leave` when it is safe elsewhere or has ended;
`stored` takes the ends of writes, `tick` hands over what waits. All return effects.
An entry is handed over by the way of a job that is submitted again: Nexus is asked for a record of
it first. Then it is recorded, then it leaves the outbox (Q1), and only then is any of it run.
Invariants: Q4 a record in Nexus names the nodes whose outbox may still have its job, its `origins`,
and is not removed before they have taken it out: so nobody begins afresh what has ended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from manifold.kernel.effects import Effect, Send
from manifold.kernel.errors import Busy
from manifold.kernel.scheduler.ledger import Job
from manifold.kernel.scheduler.messages import JobEvent, JobStatus, Stored
from manifold.kernel.scheduler.outbox import PREFIX, Entry, Outbox, Reach

if TYPE_CHECKING:
    from manifold.kernel.scheduler.owner import Owner

HANDED_MAX = 16  # entries on their way into Nexus at a time: some three registers each
JITTER_MS = 2000  # nodes that are back at the same moment do not ask at the same moment
TICK_MS = 250.0  # while anything waits
KID_DIGITS = 8  # of a KID: which part of the jitter is this node's


class Queue:
    """See the module."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self.outbox = Outbox(owner.me)
        self.reach = Reach()
        self._was_cut = True  # also when it starts: what it finds waits a little
        self._due_ms = 0.0

    def load(self, durable: Mapping[str, bytes], now_ms: float) -> None:
        """What a former process of this node has left."""
        for name in self.outbox.load(durable, now_ms):
            job = name.removeprefix(PREFIX)
            self._owner.events.append(JobEvent("damaged", job, "its record in the outbox"))
        for entry in self.outbox.entries.values():
            self._owner.shelf.grow(entry.job, len(entry.record))

    # -- what is asked ------------------------------------------------------------------------

    def cut(self, now_ms: float) -> bool:
        """Whether what is submitted now waits for voters."""
        return self.reach.cut(now_ms)

    def holds(self, name: str) -> bool:
        """Whether the disk may have it."""
        return name in self.outbox.entries

    def find(self, name: str) -> Job | None:
        entry = self.outbox.entries.get(name)
        return entry.job if entry is not None else None

    def jobs(self) -> list[Job]:
        """Those that no other part of the owner knows of."""
        return [entry.job for entry in self.outbox.entries.values() if not entry.handed]

    @property
    def waiting(self) -> bool:
        return self.outbox.waiting

    # -- in -----------------------------------------------------------------------------------

    def submitted(self, job: Job) -> list[Effect]:
        """A new job has to wait; raises `Busy` where there is no room."""
        held = self.outbox.put(job)
        job.state = "queued"
        self._owner.events.append(JobEvent("queued", job.job, "no majority of the voters answers"))
        return [held]

    def shelter(self, job: Job, begun: bool, now_ms: float) -> list[Effect]:
        """It cannot be recorded: the disk is to have it meanwhile. It stays where it is."""
        if self.holds(job.job) or job.spec.kind == "python":
            return []
        before, told = job.state, []
        if not begun:
            job.state = "queued"
            told = self._told(job, now_ms)
        try:
            held = self.outbox.put(job, told)
        except Busy:
            job.state = before
            return []
        self.outbox.entries[job.job].handed = True
        what = "it goes on without a record" if begun else "no majority of the voters answers"
        self._owner.events.append(JobEvent("queued", job.job, what))
        return [held]

    def _told(self, job: Job, now_ms: float) -> list[Effect]:
        status = self._owner.status(job, now_ms, brief=True)
        return [Send(watcher, status) for watcher in job.watchers]

    # -- out ----------------------------------------------------------------------------------

    def leave(self, name: str, then: Sequence[Effect] = ()) -> list[Effect]:
        """It is recorded, or over; `then` happens when the disk has forgotten it."""
        entry = self.outbox.entries.get(name)
        if entry is None:
            return list(then)
        if entry.leaving and not then:
            return []
        return [self.outbox.leave(entry, then)]

    def cancel(self, job: Job, now_ms: float) -> tuple[JobStatus, list[Effect]]:
        """A job that waits here is not wanted any more: what is told once that is durable."""
        entry = self.outbox.entries[job.job]
        entry.cancelled = True
        job.state = "cancelled"
        status = self._owner.status(job, now_ms)
        job.state = "queued"
        return status, [self.outbox.leave(entry)]

    def client_gone(self, client: str, now_ms: float) -> list[Effect]:
        gone = [job for job in self.jobs() if job.client == client and not job.detach]
        return [effect for job in gone for effect in self.cancel(job, now_ms)[1]]

    def stored(self, message: Stored, now_ms: float) -> list[Effect]:
        entry = self.outbox.stored(message)
        if entry is None:
            return []
        job = entry.job
        if not message.leaves and message.kept:
            return []
        if entry.handed:
            if job.state == "queued" and not message.leaves:
                job.state = "running"  # the disk has refused it: it waits for voters all the same
            return self._owner.keeper.left(job, now_ms)
        if entry.cancelled:
            return self._owner.end(job, "cancelled", now_ms)
        return self._owner.forget(job)  # the disk has refused it, and so has its submitter heard

    # -- over to Nexus ------------------------------------------------------------------------

    def tick(self, now_ms: float) -> list[Effect]:
        seen = self.reach.seen() and self._owner.keeper.known
        if not seen:
            self._was_cut = True
            self.reach.cut(now_ms)
            return []
        if self._was_cut:
            self._was_cut = False
            self._due_ms = now_ms + self._jitter_ms
        if now_ms < self._due_ms or not self.outbox.waiting:
            return []
        effects: list[Effect] = []
        for entry in self.outbox.next(HANDED_MAX):
            effects += self._hand_over(entry, now_ms)
        return effects

    @property
    def _jitter_ms(self) -> int:
        digits = self._owner.me.rpartition("-")[2][:KID_DIGITS]
        return int(digits, 16) % JITTER_MS

    def _hand_over(self, entry: Entry, now_ms: float) -> list[Effect]:
        if len(self._owner.jobs) >= self._owner.config.jobs:
            return []
        return self._owner.keeper.look(entry.job.job)

    def take(self, name: str) -> Job | None:
        """Hand it over, where it was not yet."""
        entry = self.outbox.entries.get(name)
        if entry is None or entry.handed or entry.leaving:
            return None
        entry.handed = True
        self._owner.jobs[name] = entry.job
        self._owner.events.append(JobEvent("handed over", name, "the voters are back"))
        return entry.job

    def begins(self, job: Job, now_ms: float) -> list[Effect]:
        """It is recorded and runs from now on."""
        if job.state != "queued":
            return []
        job.state = "running"
        job.started_ms = now_ms
        if not job.detach and job.client not in job.watchers:
            job.asked_ms = now_ms  # its client has to show that it is there still
        return self._told(job, now_ms)
