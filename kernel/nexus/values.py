"""What a register holds, and the closed set of changes that can be made to it.

Interface: `change(value, wanted, ballot)` applies a batch in order and says what became of each
operation; it is the only place where data is interpreted. Changes are data, not code.
Effects of programs (`Admit`, `Dismiss`, `Effect`) are not in the ring: marks.py says which of them
were applied, so that anybody may ask for one again, at any time.

Invariants:
  V1  each operation that changes something raises `version` by one; each entry of the ring raised
      `stamp` by one, so entry `i` from the end was made at stamp `stamp - i`;
  V2  an operation whose entry may have left the ring is never applied: `maybe` or `rebase`. Nor is
      one whose base is above the stamp: that base was read from a value that was never chosen, and
      says nothing of what the ring has lost;
  V3  versions and stamps of a key only grow, through deletion as well: an absent register counts
      from `BATCH_MAX * floor.n`, and a value of ballot `n` has at most version `BATCH_MAX * n`;
  V4  an operation of which there may be other copies has its failure in the ring as well: else a
      late copy could succeed after `no` was told;
  V5  an effect is applied at most once by its (job, position, k), whatever its `op`; one that
      fails leaves no mark, so a copy of it may succeed later, and is then what k was.
Bounds of an encoding: data 64 KiB, a ring of 256 entries of 80 B 20 KiB (13 KiB with usual names),
marks 81 KiB: 165 KiB.
Source: Rystsov, "CASPaxos" (2018); design page of Nexus (ring, unknown fate, fencing).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from manifold.kernel.nexus.ballots import COUNTER_MAX, Ballot
from manifold.kernel.nexus.marks import (
    INT_MAX,
    INT_MIN,
    SETTLED_MAX,
    Book,
    Integer,
    JobId,
    Marks,
    Position,
    Range,
)

DATA_BYTES_MAX = 64 << 10  # pack related state in one register, up to this
BATCH_MAX = 64  # operations of one key in one proposal: one of each client of the benchmark's 64
RING_MIN = 16
RING_SHARED = 128  # of a register that several nodes propose to: half a second at 260 a second
RING_FACTOR = 4  # a forwarded operation is at most a few batches late
RING_MAX = 256  # RING_FACTOR * BATCH_MAX; at about 50 B an entry: 13 KiB
TTL_MS_MAX = 3_600_000.0

OpId = Annotated[str, Meta(min_length=1, max_length=64)]
Holder = Annotated[str, Meta(min_length=1, max_length=64)]
Counter = Annotated[int, Meta(ge=0, le=COUNTER_MAX)]
Bytes = Annotated[bytes, Meta(max_length=DATA_BYTES_MAX)]
Ttl = Annotated[float, Meta(gt=0, le=TTL_MS_MAX)]


class Lease(msgspec.Struct, frozen=True, array_like=True):
    """Somebody holds this register; `fence` is the ballot that first proposed the grant."""

    holder: Holder
    ttl_ms: Ttl
    fence: Ballot


Datum = Integer | float | Bytes | Lease | None  # None: absent
Plain = Integer | float | Bytes


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One operation that is over, and its result where that is more than `ok`."""

    op: OpId
    result: Integer | float | Ballot | None = None
    failed: bool = False


class Value(msgspec.Struct, frozen=True, array_like=True):
    """A register. `data` None: absent."""

    version: Counter
    stamp: Counter
    data: Datum
    ring: Annotated[tuple[Entry, ...], Meta(max_length=RING_MAX)] = ()
    marks: Marks | None = None

    @property
    def dead(self) -> bool:
        """A tombstone: nothing is here, and no job may write it."""
        return self.data is None and (self.marks is None or not self.marks.jobs)


# -- changes ------------------------------------------------------------------------------------


class Get(msgspec.Struct, frozen=True, array_like=True, tag="x.get"):
    """Changes nothing."""


class Put(msgspec.Struct, frozen=True, array_like=True, tag="x.put"):
    data: Plain


class CasVersion(msgspec.Struct, frozen=True, array_like=True, tag="x.cas-version"):
    """`version` 0 expects an absent register."""

    version: Counter
    data: Plain


class CasValue(msgspec.Struct, frozen=True, array_like=True, tag="x.cas"):
    """`expected` None expects an absent register."""

    expected: Plain | None
    data: Plain


class Add(msgspec.Struct, frozen=True, array_like=True, tag="x.add"):
    """Fetch and add; an absent register counts as zero."""

    amount: Integer | float


class Delete(msgspec.Struct, frozen=True, array_like=True, tag="x.delete"):
    """Of an absent register: `no`."""


class Grant(msgspec.Struct, frozen=True, array_like=True, tag="x.grant"):
    """Take an absent register, or the lease whose `broken` version stood still for its TTL."""

    holder: Holder
    ttl_ms: Ttl
    broken: Counter = 0


class Renew(msgspec.Struct, frozen=True, array_like=True, tag="x.renew"):
    holder: Holder
    fence: Ballot


class Release(msgspec.Struct, frozen=True, array_like=True, tag="x.release"):
    holder: Holder
    fence: Ballot


class Admit(msgspec.Struct, frozen=True, array_like=True, tag="x.admit"):
    """From now on effects of this job are applied here; `refused` once it was dismissed.

    May be repeated by anybody. An absent register stays absent, and is kept. `busy`, where 64 jobs
    are admitted: `data` names them (`crowd`), so that those that are over can be dismissed.
    """

    job: JobId


class Dismiss(msgspec.Struct, frozen=True, array_like=True, tag="x.dismiss"):
    """The job is over: its late effects, and late `Admit`s, are `refused`. May be repeated."""

    job: JobId


class Propose(msgspec.Struct, frozen=True, array_like=True, tag="x.propose"):
    """Compare and swap by value; an absent register counts as zero of the type of `expected`."""

    expected: Integer | float
    data: Integer | float


class Effect(msgspec.Struct, frozen=True, array_like=True, tag="x.effect"):
    """The k-th write of this register at `position` of a job. May be repeated by anybody.

    `ok`: applied, now or before. `Add` tells what was there before it, `Propose` what it found,
    with `no` as well; `Put` nothing. `refused`, and nothing done: see the `why`s below. `busy`: too
    many effects here wait for their blocks to be counted. `settled`: ranges of positions of this
    job, the first and the one after the last, whose blocks its owner has counted durably.
    """

    job: JobId
    position: Position
    k: Position
    wish: Put | Propose | Add
    settled: Annotated[tuple[Range, ...], Meta(max_length=SETTLED_MAX)] = ()


class Rewrite(msgspec.Struct, frozen=True, array_like=True, tag="x.rewrite"):
    """Propose what is there again; `dead`: only a tombstone. Used by nodes, not by clients."""

    dead: bool = False


Marked = Admit | Dismiss | Effect  # marks decide, not the ring
Ringed = Get | Put | CasVersion | CasValue | Add | Delete | Grant | Renew | Release | Rewrite
Change = Ringed | Marked
Status = Literal["ok", "no", "maybe", "rebase", "unavailable", "busy", "refused"]


# The `why` of a refused change: compare with these.
FENCED = "This job is not admitted here: it is over, or the global was deleted meanwhile."
COUNTED = "The block of this position is counted already: this run of it came too late."
MISMATCH = "The register holds a value of another type."
OVERFLOW = "The sum is outside of 64 bits."
CROWDED = "As many jobs as a global takes write it: wait until one is over."
FULL = "Too many effects of blocks that are not counted yet: wait until some are."

_NAMES = msgspec.msgpack.Decoder(tuple[str, ...])


@dataclass(frozen=True, slots=True)
class Result:
    """What became of an operation; for `no`, the present state."""

    status: Status
    version: int = 0
    data: Datum = None
    fence: Ballot | None = None
    stamp: int = 0
    strength: str = "quorum"
    missing: tuple[str, ...] = ()
    why: str = ""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One operation of a batch. `base` is a stamp chosen before it can have been applied.

    None: nobody else has it, and it was not proposed yet. -1: unknown, so it is only looked up.
    `rebase`: where its entry may have left the ring, nobody can have applied it all the same.
    """

    op: str
    change: Change
    base: int | None = None
    rebase: bool = False


def absent(floor: Ballot) -> Value:
    """The value of a key without a record, where `floor` is the highest of a quorum (V3)."""
    return Value(BATCH_MAX * floor.n, BATCH_MAX * floor.n, None)


def change(value: Value, wanted: Sequence[Wanted], ballot: Ballot) -> tuple[Value, list[Result]]:
    """The next value (the same object where nothing changes) and a result for each operation."""
    oldest = value.stamp - len(value.ring)
    known = {entry.op: entry for entry in value.ring}
    version, data, book = value.version, value.data, Book(value.marks)
    results: list[Result] = []
    added: list[Entry] = []
    for each in wanted:
        if isinstance(each.change, Marked):
            result, data_after = _mark(each.change, version, data, book)
            if data_after is not None:
                version, data = version + 1, data_after  # V1
                result = replace(result, version=version)
            results.append(result)
            continue
        plain = isinstance(each.change, _PLAIN)
        if each.op in known:
            results.append(_again(known[each.op], version, data))
            continue
        if not (each.base is None or oldest <= each.base <= value.stamp or plain):
            again = each.rebase and each.base < oldest
            results.append(Result("rebase" if again else "maybe"))  # V2
            continue
        if isinstance(each.change, Rewrite) and each.change.dead and book.jobs:
            results.append(Result("no", version, data))
            continue
        done, data_after = _apply(each.change, version, data, ballot)
        if isinstance(done, Result):
            results.append(done)
            if each.base is None or done.status == "ok":
                continue
            entry = Entry(each.op, None, True)  # V4
        else:
            version, data = version + 1, data_after  # V1
            if isinstance(each.change, Delete):
                book.clear()
            entry = Entry(each.op, done.value)
            results.append(_again(entry, version, data))
        added.append(entry)
        known[each.op] = entry
    stamp = value.stamp + len(added)
    results = [_stamped(result, stamp) for result in results]
    marks = book.marks()
    if not added and version == value.version and marks is value.marks:
        return value, results
    least = RING_MIN if all(each.base is None for each in wanted) else RING_SHARED
    keep = max(least, RING_FACTOR * len(added), len(value.ring) - len(added))
    ring = (*value.ring, *added)[-keep:]
    return Value(version, stamp, data, ring, marks), results


_PLAIN = (Get, Rewrite)  # as often as one likes


def _stamped(result: Result, stamp: int) -> Result:
    """`replace` takes five times as long, and each operation passes here twice."""
    return Result(
        result.status, result.version, result.data, result.fence, stamp, result.strength,
        result.missing, result.why,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Done:
    """It changes the register; `value` is what the ring remembers."""

    value: int | float | Ballot | None = None


def _again(entry: Entry, version: int, data: Datum) -> Result:
    """The result from what the ring holds of it; `version` is the present one."""
    if entry.failed:
        return Result("no", version, data)
    if isinstance(entry.result, tuple):
        return Result("ok", version, None, entry.result)
    return Result("ok", version, entry.result)


def _apply(
    wanted: Ringed, version: int, data: Datum, ballot: Ballot
) -> tuple[_Done | Result, Datum]:
    """`_Done` and the data after it, or the result of what changes nothing."""
    refused = Result("no", version, data)
    match wanted:
        case Get():
            return Result("ok", version, data), None
        case Rewrite(dead=dead):
            return (refused if dead and data is not None else Result("ok", version)), None
        case Put(data=new):
            return _Done(), new
        case CasVersion(version=expected, data=new):
            met = expected == version if data is not None else expected == 0
            return (_Done(), new) if met else (refused, None)
        case CasValue(expected=value, data=new):
            return (_Done(), new) if same(value, data) else (refused, None)
        case Add(amount=amount):
            return _add(amount, data, refused)
        case Delete():
            return (_Done(), None) if data is not None else (refused, None)
        case Grant(holder=holder, ttl_ms=ttl_ms, broken=broken):
            free = data is None or (isinstance(data, Lease) and version == broken)
            return (_Done(ballot), Lease(holder, ttl_ms, ballot)) if free else (refused, None)
        case Renew(holder=holder, fence=fence):
            return (_Done(fence), data) if _holds(data, holder, fence) else (refused, None)
        case Release(holder=holder, fence=fence):
            return (_Done(), None) if _holds(data, holder, fence) else (refused, None)


def _mark(wanted: Marked, version: int, data: Datum, book: Book) -> tuple[Result, Datum]:
    """The result of an operation that marks decide, and the new data where it has changed some."""
    if isinstance(wanted, Admit):
        return _admit(wanted, version, book), None
    if isinstance(wanted, Dismiss):
        book.dismiss(wanted.job)
        return Result("ok", version), None
    job, position, k = wanted.job, wanted.position, wanted.k
    if not book.admits(job):
        return Result("refused", version, why=FENCED), None
    book.settle(job, wanted.settled)
    if book.counted(job, position):
        return Result("refused", version, why=COUNTED), None
    if book.seen(job, position, k):
        return Result("ok", version, book.found(job, position, k)), None
    result, data_after = _wish(wanted.wish, version, data)
    if data_after is not None:
        if book.full:
            return Result("busy", version, why=FULL), None
        book.mark(job, position, k, result.data if isinstance(result.data, int | float) else None)
    return result, data_after


def _admit(wanted: Admit, version: int, book: Book) -> Result:
    match book.admit(wanted.job):
        case "ok":
            return Result("ok", version)
        case "refused":
            return Result("refused", version, why=FENCED)
        case "busy":
            return Result("busy", version, msgspec.msgpack.encode(book.names), why=CROWDED)


def crowd(data: Datum) -> tuple[str, ...]:
    """The jobs that a `busy` answer to `Admit` names."""
    try:
        return _NAMES.decode(data) if isinstance(data, bytes) else ()
    except msgspec.MsgspecError:
        return ()  # of a release that says something else there


def _wish(wish: Put | Propose | Add, version: int, data: Datum) -> tuple[Result, Datum]:
    """What an effect does that was not applied before."""
    if isinstance(wish, Put):
        if data is not None and type(data) is not type(wish.data):
            return Result("refused", version, data, why=MISMATCH), None
        return Result("ok", version), wish.data
    operand = wish.amount if isinstance(wish, Add) else wish.expected
    found = type(operand)(0) if data is None else data
    new = wish.data if isinstance(wish, Propose) else None
    if type(found) is not type(operand) or type(new) not in (type(operand), type(None)):
        return Result("refused", version, data, why=MISMATCH), None
    if isinstance(wish, Propose):
        if not same(wish.expected, found):
            return Result("no", version, found), None
        return Result("ok", version, found), new
    assert isinstance(found, int | float), "it has the type of the amount"
    total = found + wish.amount
    if isinstance(total, int) and not INT_MIN <= total <= INT_MAX:
        return Result("refused", version, found, why=OVERFLOW), None
    return Result("ok", version, found), total


def _add(amount: int | float, data: Datum, refused: Result) -> tuple[_Done | Result, Datum]:
    total: int | float
    if data is None:
        total = amount
    elif type(data) is type(amount):
        assert isinstance(data, int | float)
        total = data + amount
    else:
        return refused, None
    if isinstance(total, int) and not INT_MIN <= total <= INT_MAX:
        return refused, None
    return _Done(total), total


def _holds(data: Datum, holder: str, fence: Ballot) -> bool:
    return isinstance(data, Lease) and data.holder == holder and data.fence == fence


def same(one: Datum, other: Datum) -> bool:
    """Equal in type as well: 1 is not 1.0. A NaN is equal to itself here."""
    if type(one) is not type(other):
        return False
    return one == other or (one != one and other != other)
