"""The loop over a block of indices, and what its results add up to.

Interface: `loop_text(export) -> str` is a WebAssembly module that calls a program's function for
each index and writes the results to a buffer; `Reduction(reduce, results)` takes the buffers
in order, and `partial()` is the same as vm/runtime/results.from_entries of all entries.
The loop is WebAssembly because crossing into it from Python costs 5 us, an index inside it
nanoseconds. It also gives every NaN one spelling.
"""

from __future__ import annotations

from itertools import chain
from typing import TypeVar

from manifold.vm.errors import Exhausted
from manifold.vm.foreign.binary import PAGE_BYTES
from manifold.vm.foreign.program import Export
from manifold.vm.runtime.outcome import OUTPUT_BYTES_MAX
from manifold.vm.runtime.results import Partial, _one_nan, float_best

V = TypeVar("V", int, float)

BUFFER_AT = 8  # below it, the index that runs
BUFFER_VALUES = PAGE_BYTES // 8 - 1  # a page: one crossing for 8191 values
COUNT_BYTES = 4  # an index, in Partial.counts
_MASK = (1 << 64) - 1
LOOP, PROGRAM = "loop", "program"  # names of the export and of the import's module

_INDEX = {"i64": "", "i32": "i32.wrap_i64", "f64": "f64.convert_i64_s"}
_WIDEN = {"i32": "i64.extend_i32_s", "f32": "f64.promote_f32"}  # to what a Partial holds
_ONE_NAN = "(select (f64.const nan) (local.get $f64) (f64.ne (local.get $f64) (local.get $f64)))"


def indices_per_crossing(export: Export) -> int:
    """Whose results fill the buffer."""
    return BUFFER_VALUES // max(1, len(export.signature.results))


def loop_text(export: Export) -> str:
    """`loop(from, to, arguments...)` of one program."""
    parameters, results = export.signature.parameters, export.signature.results
    extra = [f"(param $a{number} {kind})" for number, kind in enumerate(parameters[1:])]
    call = ["(local.get $at)", _INDEX[parameters[0]]]
    call += [f"(local.get $a{number})" for number in range(len(extra))]
    take = [f"(local.set $r{number})" for number in reversed(range(len(results)))]
    store = []
    for number, kind in enumerate(results):
        wide = "i64" if kind in ("i32", "i64") else "f64"
        value = f"(local.get $r{number})"
        widened = f"({_WIDEN[kind]} {value})" if kind in _WIDEN else value
        store.append(f"(local.set ${wide} {widened})")
        kept = _ONE_NAN if wide == "f64" else "(local.get $i64)"
        store.append(f"({wide}.store offset={BUFFER_AT + 8 * number} (local.get $out) {kept})")
    return f"""(module
(import "{PROGRAM}" "entry" (func $entry (param {" ".join(parameters)})
  (result {" ".join(results)})))
(memory (export "memory") 1 1)
(func (export "{LOOP}") (param $at i64) (param $end i64) {" ".join(extra)}
  (local $out i32) (local $i64 i64) (local $f64 f64)
  {" ".join(f"(local $r{number} {kind})" for number, kind in enumerate(results))}
  (block $done (loop $next
    (br_if $done (i64.ge_s (local.get $at) (local.get $end)))
    (i64.store (i32.const 0) (local.get $at))
    {" ".join(call)} (call $entry) {" ".join(take)}
    {" ".join(store)}
    (local.set $out (i32.add (local.get $out) (i32.const {8 * len(results)})))
    (local.set $at (i64.add (local.get $at) (i64.const 1)))
    (br $next)))))"""


class Reduction:
    """Adds up the buffers of one block."""

    def __init__(self, reduce: str, results: tuple[str, ...]) -> None:
        self.reduce = reduce
        self._width = len(results)
        self._is_float = [each in ("f32", "f64") for each in results]
        self._indices = 0
        self._sum_int, self._sum_float = 0, 0.0
        self._best_int: int | None = None
        self._best_float: float | None = None
        self._values: list[bytes] = []

    def add(self, data: bytes, indices: int) -> None:
        """The results of the next `indices`, 8 bytes a value."""
        self._indices += indices
        if self.reduce == "collect":
            if 8 * self._width * self._indices + self._count_bytes() > OUTPUT_BYTES_MAX:
                raise Exhausted(
                    f"More than {OUTPUT_BYTES_MAX} bytes of results in one run.",
                    "Reduce with sum, min, max or count, or return less.",
                )
            self._values.append(data)
        elif self.reduce != "count" and data:
            view = memoryview(data)
            columns = range(self._width)
            ints = [n for n in columns if not self._is_float[n]]
            reals = [n for n in columns if self._is_float[n]]
            if ints:
                self._add_ints(_pick(view.cast("q"), self._width, ints))
            if reals:
                self._add_floats(_pick(view.cast("d"), self._width, reals))

    def _add_ints(self, values: list[int]) -> None:
        if self.reduce == "sum":
            self._sum_int += sum(values)
            return
        pick = min if self.reduce == "min" else max
        best = pick(values)
        self._best_int = best if self._best_int is None else pick(self._best_int, best)

    def _add_floats(self, values: list[float]) -> None:
        if self.reduce == "sum":
            for value in values:  # one by one: sum() compensates from Python 3.12 on
                self._sum_float += value
            return
        best = self._best_float
        for value in values:
            best = value if best is None else float_best(self.reduce, best, value)
        self._best_float = best

    def _count_bytes(self) -> int:
        return 0 if self._width == 1 else COUNT_BYTES * self._indices

    def partial(self) -> Partial:
        emitted = self._width * self._indices
        floats = sum(self._is_float) * self._indices if self.reduce != "count" else 0
        if self.reduce == "collect":
            mixed = 0 < floats < emitted
            counts = self._width.to_bytes(COUNT_BYTES, "little") * self._indices
            return Partial(
                emitted,
                floats,
                values=b"".join(self._values),
                kinds=bytes(self._is_float) * self._indices if mixed else b"",
                counts=b"" if self._width == 1 else counts,
            )
        return Partial(
            emitted,
            floats,
            self._sum_int >> 64,
            self._sum_int & _MASK,
            _one_nan(self._sum_float),
            0 if self._best_int is None else self._best_int,
            0.0 if self._best_float is None else _one_nan(self._best_float),
        )


def _pick(view: memoryview[V], width: int, columns: list[int]) -> list[V]:
    """The values of some columns, in the order in which they were returned."""
    if len(columns) == width:
        return list(view)
    rows = zip(*(view[number::width].tolist() for number in columns), strict=True)
    return list(chain.from_iterable(rows))
