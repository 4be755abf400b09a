"""What a node and its own processes say to each other, over a socket pair that nobody else has.

Interface rules: a worker computes programs in the sandbox: the node sends `Compute`, then at most
`Limit` and `Abort` for that run; the worker answers with `Blocks` (in order), `Limited` for each
`Limit`, and exactly one `Ended`. For a global it sends a `GlobalCall`, one at a time, and waits for
the `GlobalDone` of that run and number, or for an `Abort`. A task process runs Python functions and
answers `Calls` in the same way, besides `Lend`; it is not asked to abort, it is ended. Messages are
MessagePack behind a length of four bytes, big-endian.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from manifold.kernel.tasks.messages import Parcel
from manifold.vm.kid import Kid
from manifold.vm.runtime.results import Partial
from manifold.vm.syntax.program import GLOBAL_LENGTH_MAX, I64_MAX, I64_MIN

LENGTH_BYTES = 4
# The largest message is one block's result: a block's output is bounded by the VM below this.
LOCAL_BYTES_MAX = 256 << 20
FAULT_CELLS_MAX = 1024  # every cell a program can have

OUTPUT_CHARS_MAX = 128 << 10  # kept of what one call printed, each of stdout and stderr
PATHS_MAX = 256
SETUP_BYTES_MAX = 1 << 20

Text = Annotated[str, Meta(max_length=4096)]
Natural = Annotated[int, Meta(ge=0, le=I64_MAX)]
Integer = Annotated[int, Meta(ge=I64_MIN, le=I64_MAX)]
Number = Integer | float
Output = Annotated[str, Meta(max_length=OUTPUT_CHARS_MAX)]


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


class Value(msgspec.Struct, frozen=True, array_like=True, tag="s.value"):
    """What one call left: its result, or (not `ok`) its exception; and what it printed.

    `status` 1: its process could not be initialized. Of a WASI program the parcel holds a
    `CommandOutput`.
    """

    parcel: Parcel
    ok: bool = True
    busy_ms: float = 0.0
    stdout: Output = ""
    stderr: Output = ""
    status: int = 0

    @property
    def nbytes(self) -> int:
        return 64 + self.parcel.nbytes + len(self.stdout) + len(self.stderr)


# Of one block. A Fault only in a job whose tasks are isolated, a Value of a call or a WASI program.
Result = Partial | Fault | Value


class Session(msgspec.Struct, frozen=True, array_like=True):
    """Whose calls may share a task process, and what such a process is to look like.

    `folder` and `paths` are the client's working folder and `sys.path`, taken over where they
    exist; `setup` is a pickled function and its arguments, called once in each process.
    """

    session: Annotated[str, Meta(pattern=r"^S-[0-9a-f]{16}$")]
    client: Annotated[str, Meta(pattern=r"^C-[0-9a-f]{16}$")]
    folder: Text = ""
    paths: Annotated[tuple[Text, ...], Meta(max_length=PATHS_MAX)] = ()
    setup: Annotated[bytes, Meta(max_length=SETUP_BYTES_MAX)] = b""


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
    wasm: bool = False  # `ir` is a WebAssembly module
    entry: str = ""  # of its exported functions the one to call
    commands: tuple[Parcel, ...] = ()  # what a WASI program is given, one for each block


class Calls(msgspec.Struct, frozen=True, array_like=True, tag="w.calls"):
    """Call a Python function for blocks `[first, last)`, with one of `calls` each.

    `code` is an encoded `Parcel`, empty where this process was sent the function before.
    """

    run: int
    session: Session
    function: Kid
    code: bytes
    calls: tuple[Parcel, ...]
    first: int
    last: int


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


class GlobalCall(msgspec.Struct, frozen=True, array_like=True, tag="w.global"):
    """Index `index` of block `block` (of a range program the block's start) wants a global.

    `k` is the number of its writes before this one; a `propose` that does not find what is
    `expected` is none. `float`: the program declares it f64, so an absent one counts as 0.0.
    """

    run: int
    number: Natural  # of the call, within the process
    index: Integer
    k: Natural
    op: Literal["load", "store", "propose", "add"]
    name: Annotated[str, Meta(min_length=1, max_length=GLOBAL_LENGTH_MAX)]
    float: bool
    expected: Number = 0
    value: Number = 0
    block: Natural = 0  # that is being computed


class GlobalDone(msgspec.Struct, frozen=True, array_like=True, tag="w.global-done"):
    """`found` is what it held before (`load`: holds). `ok`: it was done; if not, a `propose` found
    something else than what is `expected`, and the sum of an `add` is no i64."""

    run: int
    number: Natural
    ok: bool
    found: Number = 0
    fault: Fault | None = None


class Lend(msgspec.Struct, frozen=True, array_like=True, tag="w.lend"):
    """The call waits for calls of its own: somebody else may have its slot."""

    run: int


class Pace(msgspec.Struct, frozen=True, array_like=True, tag="w.pace"):
    """From now on have this share of a core, by pauses."""

    share: Annotated[float, Meta(gt=0, le=1)]


ToWorker = Compute | Limit | Abort | GlobalDone | Pace
ToNode = Blocks | Limited | Ended | GlobalCall
ToTask = Calls | Limit | Pace
FromTask = Blocks | Limited | Ended | Lend


class WorkerSpec(msgspec.Struct, frozen=True):
    """What a worker is told when it is forked."""

    alias: str
    slot: int
    memory_bytes: int
    slice_ms: float
    share: float  # of a core; enforced by pacing where `cgroup` is empty
    cgroup: str
    log: str
    memory_cgroup: str = ""


class TaskSpec(msgspec.Struct, frozen=True):
    """What a task process is told when it is forked."""

    alias: str
    share: float
    cgroup: str
    memory_bytes: int  # of data; more is a MemoryError
    spool: str
    environ: dict[str, str]  # that connects it to its own cluster
    memory_cgroup: str = ""
