"""What a register holds, and the closed set of changes that can be made to it.

Interface: `change(value, wanted, ballot)` applies a batch in order and says what became of each
operation; it is the only place where data is interpreted. Changes are data, not code.

Invariants:
  V1  each operation that changes something raises `version` by one; each entry of the ring raised
      `stamp` by one, so entry `i` from the end was made at stamp `stamp - i`;
  V2  an operation whose entry may have left the ring is never applied: `maybe` or `rebase`;
  V3  versions and stamps of a key only grow, through deletion as well: an absent register counts
      from `BATCH_MAX * floor.n`, and a value of ballot `n` has at most version `BATCH_MAX * n`;
  V4  an operation of which there may be other copies has its failure in the ring as well: else a
      late copy could succeed after `no` was told.
Source: Rystsov, "CASPaxos" (2018); design page of Nexus (ring, unknown fate, fencing).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from manifold.kernel.nexus.ballots import COUNTER_MAX, Ballot

DATA_BYTES_MAX = 64 << 10  # pack related state in one register, up to this
BATCH_MAX = 64  # operations of one key in one proposal: one of each client of the benchmark's 64
RING_MIN = 16
RING_FACTOR = 4  # a forwarded operation is at most a few batches late
RING_MAX = 256  # RING_FACTOR * BATCH_MAX; at about 50 B an entry: 13 KiB
INT_MIN, INT_MAX = -(1 << 63), (1 << 63) - 1
TTL_MS_MAX = 3_600_000.0

OpId = Annotated[str, Meta(min_length=1, max_length=64)]
Holder = Annotated[str, Meta(min_length=1, max_length=64)]
Counter = Annotated[int, Meta(ge=0, le=COUNTER_MAX)]
Integer = Annotated[int, Meta(ge=INT_MIN, le=INT_MAX)]
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
    """A register. `data` None is a tombstone."""

    version: Counter
    stamp: Counter
    data: Datum
    ring: Annotated[tuple[Entry, ...], Meta(max_length=RING_MAX)] = ()


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


class Rewrite(msgspec.Struct, frozen=True, array_like=True, tag="x.rewrite"):
    """Propose what is there again; `dead`: only a tombstone. Used by nodes, not by clients."""

    dead: bool = False


Change = Get | Put | CasVersion | CasValue | Add | Delete | Grant | Renew | Release | Rewrite
Status = Literal["ok", "no", "maybe", "rebase", "unavailable", "busy", "refused"]


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
    version, data = value.version, value.data
    results: list[Result] = []
    added: list[Entry] = []
    for each in wanted:
        if each.op in known:
            results.append(_again(known[each.op], version, data))
            continue
        if each.base is not None and each.base < oldest and not isinstance(each.change, _PLAIN):
            results.append(Result("rebase" if each.rebase else "maybe"))  # V2
            continue
        done, data_after = _apply(each.change, version, data, ballot)
        if isinstance(done, Result):
            results.append(done)
            if each.base is None or done.status == "ok":
                continue
            entry = Entry(each.op, None, True)  # V4
        else:
            version, data = version + 1, data_after  # V1
            entry = Entry(each.op, done.value)
            results.append(_again(entry, version, data))
        added.append(entry)
        known[each.op] = entry
    stamp = value.stamp + len(added)
    results = [replace(result, stamp=stamp) for result in results]
    if not added:
        return value, results
    keep = max(RING_MIN, RING_FACTOR * len(added), len(value.ring) - len(added))
    ring = (*value.ring, *added)[-keep:]
    return Value(version, stamp, data, ring), results


_PLAIN = (Get, Rewrite)  # as often as one likes


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
    wanted: Change, version: int, data: Datum, ballot: Ballot
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
