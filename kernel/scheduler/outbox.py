"""The outbox of one node: submissions that are on its disk since no voters could be reached. Pure.

Interface rules: `put` and `leave` return the write to be done, a `Held` of one record; its end
comes as `Stored`, which `stored` takes. The record of an entry is `outbox/<job>`; an empty record
means that there is none. `load` takes what a former process has left.
Invariants:
  Q1  an entry is told to be queued only once its record is durable, and it is begun only once it
      has a record in Nexus and none here: whatever crashes, one of the two is there;
  Q2  entries are handed over in the order in which they came;
  Q3  at most ENTRIES_MAX entries and BYTES_MAX bytes, in memory and on the disk.
Source: design page of a node's life ("Cut off"), and of the offline edge.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from manifold.kernel.effects import Effect, Held, Persist, Send
from manifold.kernel.errors import Busy
from manifold.kernel.nexus.messages import Answer
from manifold.kernel.scheduler import blocks, records
from manifold.kernel.scheduler.ledger import Job
from manifold.kernel.scheduler.messages import JobId, Number, Origins, Stored, Text
from manifold.vm.kid import Kid, kid_of

PREFIX = "outbox/"
ENTRY_BYTES_MAX = records.CHUNKS_MAX * records.CHUNK_BYTES  # 3.8 MB: a larger job Nexus keeps not
BYTES_MAX = 64 << 20  # seventeen of the largest, or 256 KiB for each entry
ENTRIES_MAX = 256  # at a submission each 10 s, 40 minutes without voters
FULL_RETRY_MS = 5000
LOST_MS = 2000.0  # voters that are away for less are a restart: a supervisor needs a second
REFUSED_MS = 10_000.0  # so long one answer of Nexus counts: two of its requests' timeouts


class Record(msgspec.Struct, frozen=True, array_like=True):
    """One entry on the disk. `head`: spec, program and arguments, as Nexus keeps them."""

    number: Number
    job: JobId
    head: bytes
    client: Text
    detach: bool
    origins: Origins


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Record).decode


@dataclass(slots=True)
class Entry:
    """`handed`: its owner has the job now, which is looked for, recorded, or runs already."""

    number: int
    job: Job
    record: bytes
    stored: bool = False
    handed: bool = False
    leaving: bool = False
    cancelled: bool = False
    reloaded: bool = False


class Outbox:
    """See the module."""

    def __init__(self, me: Kid) -> None:
        self._me = me
        self._number = 0
        self._nbytes = 0
        self.entries: OrderedDict[str, Entry] = OrderedDict()

    def load(self, durable: Mapping[str, bytes], now_ms: float) -> list[str]:
        """Take what a former process left; the names of records that make no entry."""
        found: list[tuple[Record, Job, bytes]] = []
        bad = []
        for name, data in durable.items():
            if not data:
                continue
            try:
                record = _decode(data)
                found.append((record, _job_of(record, now_ms), data))
            except (msgspec.MsgspecError, records.Damaged):
                bad.append(name)
        for record, job, data in sorted(found, key=lambda each: each[0].number):
            self._number = record.number
            self._nbytes += len(data)
            self.entries[job.job] = Entry(record.number, job, data, stored=True, reloaded=True)
        return bad

    def put(self, job: Job, then: Sequence[Effect] = ()) -> Held:
        """Queue it; `then` happens once it is durable. Raises `Busy` where it has no room."""
        record = self._record(job)
        if len(self.entries) >= ENTRIES_MAX or self._nbytes + len(record) > BYTES_MAX:
            raise Busy(
                "This node reaches no majority of the voters, and its outbox is full: "
                f"{len(self.entries)} jobs wait there, {self._nbytes >> 20} MiB.",
                "Submit it at another node, `manifold kill` what waits, or come again when "
                "`manifold nexus status` shows the voters.",
                retry_ms=FULL_RETRY_MS,
            )
        if not records.head_pieces(job) or any(parcel.path for parcel in job.parcels):
            raise Busy(
                "This node reaches no majority of the voters, and the program with its arguments "
                f"is too large to be queued: at most {ENTRY_BYTES_MAX} bytes.",
                "Submit it at another node, or when `manifold nexus status` shows the voters.",
                retry_ms=FULL_RETRY_MS,
            )
        self._number += 1
        self._nbytes += len(record)
        self.entries[job.job] = entry = Entry(self._number, job, record)
        return self._write(entry, then)

    def _record(self, job: Job) -> bytes:
        head = records.encode(records.Head(job.spec, job.ir, job.parcels))
        origins = tuple(dict.fromkeys((*job.origins, self._me)))
        record = Record(self._number + 1, job.job, head, job.client, job.detach, origins)
        return _encode(record)

    def again(self, name: str) -> list[Effect]:
        """The write that an acknowledgement of this entry has to wait for, if any."""
        entry = self.entries.get(name)
        if entry is None or (entry.stored and not entry.leaving):
            return []
        return [self._write(entry, ())]

    def leave(self, entry: Entry, then: Sequence[Effect] = ()) -> Held:
        """Take it out; `then` happens once the disk has forgotten it."""
        entry.leaving = True
        return self._write(entry, then)

    def _write(self, entry: Entry, then: Sequence[Effect]) -> Held:
        name = entry.job.job
        done = Send(self._me, Stored(name, entry.number, entry.leaving))
        return Held(Persist(PREFIX + name, b"" if entry.leaving else entry.record), (done, *then))

    def stored(self, message: Stored) -> Entry | None:
        """A write is over: the entry it was about, where that changes anything."""
        entry = self.entries.get(message.job)
        if entry is None or entry.number != message.number:
            return None  # a former entry of this job, or a copy
        if message.leaves or not message.kept:
            del self.entries[message.job]
            self._nbytes -= len(entry.record)
            return entry
        if entry.stored:
            return None
        entry.stored = True
        return entry

    def next(self, most: int) -> list[Entry]:
        """Q2: those to hand over now, so that at most `most` are on the way."""
        under_way = sum(entry.handed or entry.leaving for entry in self.entries.values())
        waiting = [e for e in self.entries.values() if not e.handed and not e.leaving]
        if any(not entry.stored for entry in waiting[:1]):
            return []
        return [entry for entry in waiting[: max(0, most - under_way)] if entry.stored]

    @property
    def waiting(self) -> bool:
        """Whether there is anything to hand over."""
        return any(not entry.handed and not entry.leaving for entry in self.entries.values())


def _job_of(record: Record, now_ms: float) -> Job:
    """The job of an entry, nothing of it begun; raises `records.Damaged`."""
    head = records.decode_head(record.head)
    if kid_of(head.ir) != head.spec.program:
        raise records.Damaged("the program does not have the KID it claims")
    count = blocks.count(head.spec)
    return Job(
        record.job, head.spec, head.ir, now_ms, count, [None] * count, parcels=head.parcels,
        client=record.client, detach=record.detach, state="queued", origins=record.origins,
    )  # fmt: skip


class Reach:
    """Whether this node reaches a majority of the voters, as far as it knows.

    `seen` says whether membership holds a majority of them for alive; it is right some ten seconds
    after a cut. What Nexus answers tells sooner, where anybody asks.
    """

    def __init__(self) -> None:
        self.seen: Callable[[], bool] = lambda: True
        self._lost_ms = -1.0  # since when they are not seen
        self._refused_ms = float("-inf")  # when Nexus last found no majority

    def heard(self, answer: Answer, now_ms: float) -> None:
        """What Nexus answered a request of ours."""
        if answer.status == "unavailable" and answer.missing:
            self._refused_ms = now_ms
        elif answer.status in ("ok", "no", "refused"):
            self._refused_ms = float("-inf")

    def cut(self, now_ms: float) -> bool:
        """Whether what is submitted now has to wait."""
        if self.seen():
            self._lost_ms = -1.0
        elif self._lost_ms < 0:
            self._lost_ms = now_ms
        lost = 0 <= self._lost_ms <= now_ms - LOST_MS
        return lost or now_ms - self._refused_ms < REFUSED_MS
