"""What a node and its worker processes say to each other, over a socket pair that nobody else has.

Interface rules: the node sends `Compute`, then at most `Limit` and `Abort` for that run; the worker
answers with `Blocks` (in order), `Limited` for each `Limit`, and exactly one `Ended`. Messages are
MessagePack behind a length of four bytes, big-endian.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from manifold.vm.kid import Kid
from manifold.vm.runtime.results import Partial

LENGTH_BYTES = 4
# The largest message is one block's result: a block's output is bounded by the VM below this.
LOCAL_BYTES_MAX = 256 << 20
FAULT_CELLS_MAX = 1024  # every cell a program can have

Text = Annotated[str, Meta(max_length=4096)]


class Fault(msgspec.Struct, frozen=True, array_like=True, tag="s.fault"):
    """Why a program, a shard or a job failed, with everything its user needs to find it."""

    code: Text
    message: Text
    next_step: Text = ""
    line: int = 0
    instruction: Text = ""
    cells: Annotated[tuple[int | float, ...], Meta(max_length=FAULT_CELLS_MAX)] = ()
    index: int | None = None
    node: Text = ""


Result = Partial | Fault  # of one block; a Fault only in a job whose tasks are isolated


class Compute(msgspec.Struct, frozen=True, array_like=True, tag="w.compute"):
    """Blocks `[first, last)` of a grid: block b holds indices `[lo + b*size, …)` up to `hi`.

    `indices`, where given, are those of blocks `first`, `first+1`, … (one each). `ir` is empty
    where this worker was sent the program before.
    """

    run: int
    program: Kid
    ir: bytes
    reduce: Literal["sum", "min", "max", "count", "collect"]
    arguments: tuple[int | float, ...]
    isolate: bool
    lo: int
    hi: int
    size: int
    first: int
    last: int
    indices: tuple[int, ...] = ()


class Limit(msgspec.Struct, frozen=True, array_like=True, tag="w.limit"):
    """Stop before block `last`, or after the present one if that is past it already."""

    run: int
    last: int


class Abort(msgspec.Struct, frozen=True, array_like=True, tag="w.abort"):
    run: int


class Blocks(msgspec.Struct, frozen=True, array_like=True, tag="w.blocks"):
    """Results of the blocks from `first` (none: alive within a block); gas and time since last."""

    run: int
    first: int
    results: tuple[Result, ...]
    gas: int
    busy_ms: float


class Limited(msgspec.Struct, frozen=True, array_like=True, tag="w.limited"):
    run: int
    last: int


class Ended(msgspec.Struct, frozen=True, array_like=True, tag="w.ended"):
    run: int
    fault: Fault | None


ToWorker = Compute | Limit | Abort
ToNode = Blocks | Limited | Ended


class WorkerSpec(msgspec.Struct, frozen=True):
    """What a worker is told when it is forked."""

    alias: str
    slot: int
    memory_bytes: int
    slice_ms: float
    share: float  # of a core; enforced by pacing where `cgroup` is empty
    cgroup: str
    log: str
