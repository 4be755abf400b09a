"""Results: what a block of indices leaves, how blocks merge, what the user gets.

Interface: `merge(reduce, partials) -> Partial`, in the order given; `finish(reduce, partial, lo,
hi)` is the Python value. `from_entries` is the reference: the partial of lists of values.
Invariants:
  R1  a sum of i64 values is exact, whatever their number: 128 bits travel, Python adds;
  R2  merging only joins what is adjacent, so the caller's tree alone decides the order of float
      additions; floats of one block were added one by one, in order, starting from 0.0;
  R3  min and max compare i64 with f64 exactly; a NaN anywhere makes the result NaN; -0.0 < 0.0;
      where an i64 and an f64 are equal the i64 is the result.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from typing import Annotated

import msgspec

from manifold.vm.errors import Exhausted, ManifoldError

REDUCTIONS = ("sum", "min", "max", "count", "collect")
COLLECT_BYTES_MAX = 256 << 20  # of values in one merged result: 32 Mi values
_MASK = (1 << 64) - 1
_I64_MAX = (1 << 63) - 1
JSON_NUMBERS, FLAT = 1, 2  # flags

Value = int | float
Result = int | float | list[int | float | list[int | float] | None] | None

_Signed = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=_I64_MAX)]
_Natural = Annotated[int, msgspec.Meta(ge=0, le=_I64_MAX)]


class Partial(msgspec.Struct, frozen=True, array_like=True, tag="v.partial"):
    """What some adjacent indices left. Which fields count depends on the reduction.

    `values` holds 8 bytes a value, little-endian; `kinds` a byte each (1: f64), or nothing if all
    are of one type (f64 exactly if `floats`); `counts` 4 bytes an index, or nothing if every index
    emitted exactly one value. `flags`: JSON_NUMBERS prints whole floats as integers, FLAT says
    that values belong to a range and not to indices.
    """

    emitted: _Natural = 0
    floats: _Natural = 0
    sum_high: _Signed = 0
    sum_low: Annotated[int, msgspec.Meta(ge=0)] = 0
    sum_float: float = 0.0
    int_best: _Signed = 0
    float_best: float = 0.0
    values: bytes = b""
    kinds: bytes = b""
    counts: bytes = b""
    flags: int = 0

    @property
    def nbytes(self) -> int:
        """About how many bytes it takes, in memory and on the wire."""
        return 64 + len(self.values) + len(self.kinds) + len(self.counts)

    @property
    def sum_int(self) -> int:
        return (self.sum_high << 64) + self.sum_low


def float_best(reduce: str, left: float, right: float) -> float:
    """R3 among floats."""
    if left != left or right != right:
        return math.nan
    if left == right:  # only zeros differ in sign while equal
        negative = math.copysign(1.0, left) < 0 or math.copysign(1.0, right) < 0
        positive = math.copysign(1.0, left) > 0 or math.copysign(1.0, right) > 0
        if reduce == "min":
            return -abs(left) if left == 0 and negative else left
        return abs(left) if left == 0 and positive else left
    return min(left, right) if reduce == "min" else max(left, right)


def merge(reduce: str, partials: Sequence[Partial]) -> Partial:
    """The partial of everything in `partials`, which stand in the order of their indices."""
    if len(partials) == 1:
        return partials[0]
    if not partials:
        return Partial()
    emitted = sum(each.emitted for each in partials)
    floats = sum(each.floats for each in partials)
    flags = partials[0].flags
    if reduce == "collect":
        return _merge_collected(partials, emitted, floats, flags)
    if reduce == "sum":
        total = sum(each.sum_int for each in partials)
        added = partials[0].sum_float
        for each in partials[1:]:
            added += each.sum_float
        return Partial(emitted, floats, total >> 64, total & _MASK, _one_nan(added), flags=flags)
    best, real = 0, 0.0
    if reduce != "count":
        pick = min if reduce == "min" else max
        best = pick((e.int_best for e in partials if e.emitted > e.floats), default=0)
        reals = [each.float_best for each in partials if each.floats]
        real = reals[0] if reals else 0.0
        for other in reals[1:]:
            real = float_best(reduce, real, other)
    return Partial(emitted, floats, int_best=best, float_best=_one_nan(real), flags=flags)


def _one_nan(value: float) -> float:
    """NaNs have one spelling in results, whatever the processor made of them."""
    return math.nan if value != value else value


def _merge_collected(partials: Sequence[Partial], emitted: int, floats: int, flags: int) -> Partial:
    size = sum(len(each.values) for each in partials)
    if size > COLLECT_BYTES_MAX:
        raise Exhausted(
            f"The collected values take {size} bytes; the limit is {COLLECT_BYTES_MAX}.",
            "Reduce with sum, min, max or count, or run a part of the range.",
        )
    kinds = counts = b""
    if 0 < floats < emitted:
        kinds = b"".join(each.kinds or _uniform_kinds(each) for each in partials)
    if any(each.counts for each in partials):
        one = (1).to_bytes(4, "little")
        counts = b"".join(each.counts or one * each.emitted for each in partials)
    values = b"".join(each.values for each in partials)
    return Partial(emitted, floats, values=values, kinds=kinds, counts=counts, flags=flags)


def _uniform_kinds(partial: Partial) -> bytes:
    return (b"\1" if partial.floats else b"\0") * partial.emitted


def finish(reduce: str, partial: Partial, lo: int, hi: int) -> Result:
    """The result of `[lo, hi)` as Python values.

    sum and count of nothing are 0, min and max None. `collect` of a per-index program has one entry
    an index: its value, a list of several, or None; of a range program all values in order.
    """
    whole = bool(partial.flags & JSON_NUMBERS)
    ints = partial.emitted - partial.floats
    if reduce == "count":
        return partial.emitted
    if reduce == "sum":
        if not partial.floats:
            return partial.sum_int
        total = partial.sum_float + float(partial.sum_int) if ints else partial.sum_float
        return as_number(total) if whole else total
    if reduce in ("min", "max"):
        if not partial.floats:
            return partial.int_best if ints else None
        real = partial.float_best
        if ints and real == real:
            better = partial.int_best <= real if reduce == "min" else partial.int_best >= real
            if better:
                return partial.int_best
        return as_number(real) if whole else real
    return _collected(partial, lo, hi, whole)


def as_number(value: float) -> Value:
    """A whole float as an int: how the JSON dialect prints."""
    return int(value) if value - value == 0 and value == int(value) else value


def _collected(partial: Partial, lo: int, hi: int, whole: bool) -> Result:
    values = values_of(partial, whole)
    if partial.flags & FLAT:
        return list(values)
    counts = _counts(partial)
    if (len(values) if counts is None else len(counts)) != hi - lo:
        raise ManifoldError(
            f"The collected result does not cover the indices {lo} to {hi}.",
            "Run it again; if it happens twice, a node is sending wrong results.",
        )
    if counts is None:
        return list(values)
    entries: list[int | float | list[int | float] | None] = []
    at = 0
    for count in counts:
        if count == 1:
            entries.append(values[at])
        else:
            entries.append(values[at : at + count] if count else None)
        at += count
    return entries


def _counts(partial: Partial) -> list[int] | None:
    import numpy as np

    if not partial.counts:
        return None
    counts: list[int] = np.frombuffer(partial.counts, "<u4").tolist()
    if sum(counts) * 8 != len(partial.values):
        raise ManifoldError("The collected result contradicts itself.", "Run it again.")
    return counts


def values_of(partial: Partial, whole: bool = False) -> list[Value]:
    """The collected values; `whole` turns whole floats into ints."""
    import numpy as np

    if len(partial.values) % 8:
        raise ManifoldError("The collected result is cut off.", "Run it again.")
    if not partial.floats:
        ints: list[Value] = np.frombuffer(partial.values, "<i8").tolist()
        return ints
    array = np.frombuffer(partial.values, "<f8")
    if not partial.kinds:
        if not whole:
            reals: list[Value] = array.tolist()
            return reals
        if bool(np.all(np.abs(array) < 2.0**62)) and bool(np.all(array == np.floor(array))):
            wholes: list[Value] = array.astype(np.int64).tolist()
            return wholes
        return [as_number(each) for each in array.tolist()]
    pairs = zip(
        array.tolist(), np.frombuffer(partial.values, "<i8").tolist(), partial.kinds, strict=True
    )
    return [real if kind else integer for real, integer, kind in pairs]


def from_entries(
    reduce: str, entries: Iterable[Sequence[Value]], *, json: bool, flat: bool
) -> Partial:
    """The reference reduction: `entries` are the values of each index, in order."""
    listed = [list(each) for each in entries]
    values = [value for each in listed for value in each]
    reals = [each for each in values if isinstance(each, float)]
    ints = [each for each in values if isinstance(each, int)]
    flags = (JSON_NUMBERS if json else 0) | (FLAT if flat else 0)
    counted = len(reals) if reduce != "count" else 0
    if reduce == "count":
        return Partial(len(values), counted, flags=flags)
    if reduce == "sum":
        added = 0.0
        for each in reals:
            added += each
        total = sum(ints)
        return Partial(
            len(values), counted, total >> 64, total & _MASK, _one_nan(added), flags=flags
        )
    if reduce in ("min", "max"):
        best = (min if reduce == "min" else max)(ints, default=0)
        real = reals[0] if reals else 0.0
        for each in reals:
            real = float_best(reduce, real, each)
        return Partial(len(values), counted, int_best=best, float_best=_one_nan(real), flags=flags)
    packed = b"".join(
        struct.pack("<q", v) if isinstance(v, int) else struct.pack("<d", _one_nan(v))
        for v in values
    )
    kinds = bytes(isinstance(v, float) for v in values) if reals and ints else b""
    counts = b""
    if not flat and any(len(each) != 1 for each in listed):
        counts = b"".join(len(each).to_bytes(4, "little") for each in listed)
    return Partial(len(values), counted, values=packed, kinds=kinds, counts=counts, flags=flags)
