"""Where things lie in the linear memory of a compiled program, for compiler and runtime alike.

    0       control words, below            16 KiB     (collect) VALUES_MAX values, 8 bytes each
    256     arguments, 8 bytes each         528 KiB    (collect) their types, a byte each
    1024    cells, written at a fault       592 KiB    (collect) values per index, 4 bytes each
    16 KiB or 848 KiB: the program's arrays

The control words are all 8 bytes, little-endian, in the order of `CONTROL`.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from manifold.vm.syntax.program import Program

PAGE_BYTES = 65_536
ARGUMENTS_AT = 256
CELLS_AT = 1024
FREE_AT = 16_384
VALUES_MAX = 65_536  # values (and indices) buffered between two flushes: 512 KiB of values
VALUES_AT = FREE_AT
KINDS_AT = VALUES_AT + 8 * VALUES_MAX
COUNTS_AT = KINDS_AT + VALUES_MAX
COLLECT_END = COUNTS_AT + 4 * VALUES_MAX

CONTROL = struct.Struct("<7qd1q1d3q")
WORDS = (
    *("fault", "index", "gas", "emitted", "floats", "sum_low", "sum_high"),
    *("sum_float", "int_best", "float_best", "buffered", "ended", "here"),
)
OFFSET = {name: 8 * at for at, name in enumerate(WORDS)}

# Fault words: the low 4 bits say what, the rest is the instruction. 4 and up are isa.Fault.
HALTED, STOPPED, OUTPUT_FULL = 1, 2, 3


class Control(NamedTuple):
    """The control words after a run."""

    fault: int
    at_index: int
    gas: int
    emitted: int
    floats: int
    sum_low: int
    sum_high: int
    sum_float: float
    int_best: int
    float_best: float
    buffered: int
    ended: int
    here: int


def array_offsets(program: Program, reduce: str) -> tuple[list[int], int]:
    """Where each array starts, and the bytes of memory needed in all."""
    at = COLLECT_END if reduce == "collect" else FREE_AT
    starts = []
    for each in program.arrays:
        starts.append(at)
        at += 8 * each.length
    return starts, -(-at // PAGE_BYTES) * PAGE_BYTES
