"""What clients, owners, runners and workers of the scheduler say to each other.

Roles: a client submits a job to any node, which becomes its owner; the owner assigns shards (runs
of blocks) to runners; a runner lets its workers compute them. Every node is owner and runner.
Interface rules: all requests are idempotent: a job by its id, a shard by `(job, shard, attempt)`,
a result by its block. Indices are 64-bit, blocks are numbered from 0 within their job.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from manifold.kernel.geode.messages import Decision, Demand, LoadReport
from manifold.kernel.process.messages import Fault, Result, Session
from manifold.kernel.tasks.messages import Parcel
from manifold.vm.kid import Kid

# 64 Ki instructions with their source lines are 8 MiB at most; a WebAssembly binary has twice that.
PROGRAM_BYTES_MAX = 16 << 20
ARGUMENTS_MAX = 64
INDICES_EXPLICIT_MAX = 65_536  # tasks in one batch; the list is at most 576 KiB encoded
REPORTS_MAX = 4096
RESULTS_PER_REPORT_MAX = 65_536
BLOCK_MAX = 1 << 17
# Inline parcels of one job: the message that carries them all stays under a quarter of the largest.
PARCELS_BYTES_MAX = 18 << 20
HOPS_MAX = 64  # the largest `geode.hops` that a configuration may have
# An attempt's number is the boot of its owner and a count. They share 62 bits: 2^40 attempts are 3
# years at 10 000 a second, and after 2^22 boots nobody remembers the first.
ATTEMPT_BITS = 40
BOOT_MASK = (1 << 22) - 1

EFFECTS_MAX = 64  # globals that one program writes
TRACE_CHARACTERS_MAX = 64  # a traceparent has 55
SETTLED_MAX = 64  # runs of positions in one acknowledgement
ORIGINS_MAX = 8  # nodes that one submission may be queued at: a client has tried more than seven

GlobalName = Annotated[str, Meta(min_length=1, max_length=128)]
JobId = Annotated[str, Meta(pattern=r"^J-[0-9a-f]{16}$")]
Index = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Block = Annotated[int, Meta(ge=0, le=BLOCK_MAX)]
Number = Annotated[int, Meta(ge=0, lt=1 << 62)]
Ms = Annotated[float, Meta(ge=0, le=1e15)]
Gas = Annotated[float, Meta(ge=0, le=1e24)]
Text = Annotated[str, Meta(max_length=4096)]
Reduction = Literal["sum", "min", "max", "count", "collect"]
Kind = Literal["entangle", "python", "wasm"]
Parcels = Annotated[tuple[Parcel, ...], Meta(max_length=INDICES_EXPLICIT_MAX)]
Origins = Annotated[tuple[Kid, ...], Meta(max_length=ORIGINS_MAX)]


class JobSpec(msgspec.Struct, frozen=True, array_like=True):
    """What to run: `program` over `[lo, hi)`, or over `indices` where those are given.

    `isolate`: each index is a task of its own, with its own result or fault. `timeout_ms` 0: none.
    `serial`: one after another, in one place. Of kind `python`, the program is a function and each
    index a call of it in a task process of `session`; of kind `wasm` it is a WebAssembly module,
    of which `entry` is called, or a WASI program, run once for each index. `effects`: the globals
    that the program may write. `trace`: a W3C `traceparent`, "" where the job is not traced.
    """

    program: Kid
    lo: Index
    hi: Index
    reduce: Reduction
    arguments: Annotated[tuple[int | float, ...], Meta(max_length=ARGUMENTS_MAX)] = ()
    isolate: bool = False
    indices: Annotated[tuple[Index, ...], Meta(max_length=INDICES_EXPLICIT_MAX)] = ()
    timeout_ms: Ms = 0.0
    name: Text = ""
    demand: Demand = Demand()
    kind: Kind = "entangle"
    serial: bool = False
    entry: Text = ""
    session: Session | None = None
    effects: Annotated[tuple[GlobalName, ...], Meta(max_length=EFFECTS_MAX)] = ()
    trace: Annotated[str, Meta(max_length=TRACE_CHARACTERS_MAX)] = ""


# -- client and owner ---------------------------------------------------------------------------


class SubmitJob(msgspec.Struct, frozen=True, array_like=True, tag="s.submit"):
    """Answered by `JobStatus`; submitting a job id again answers with that job as it stands."""

    job: JobId
    spec: JobSpec
    ir: Annotated[bytes, Meta(max_length=PROGRAM_BYTES_MAX)]
    watch: bool = True  # push `JobStatus` to the submitter on progress and at the end
    parcels: Parcels = ()  # arguments of calls and programs, one for each index
    detach: bool = False  # it goes on when the submitter has gone
    again: bool = False  # it was submitted before: somebody may have taken it over
    origins: Origins = ()  # where it is queued, as far as the submitter knows


# `queued`: in the outbox of a node that cannot reach the voters, on its disk; nothing of it runs.
State = Literal["queued", "running", "done", "failed", "cancelled"]


class ShardStatus(msgspec.Struct, frozen=True, array_like=True):
    shard: Number
    attempt: Number
    node: Text
    first: Block
    last: Block
    counted: Block


class JobStatus(msgspec.Struct, frozen=True, array_like=True, tag="s.status"):
    """A job as its owner sees it. `results` hold the outcome where it is small enough to travel
    along; else `parts` is the number of blocks to fetch with `FetchResult`."""

    job: JobId
    state: State
    program: Text
    name: Text
    owner: Kid
    done: Number  # indices
    total: Number
    elapsed_ms: Ms
    shards: Number
    retries: Number
    block: Number = 1  # indices in a block
    reduce: Reduction = "collect"
    fault: Fault | None = None
    results: tuple[Result, ...] | None = None
    parts: Number = 0
    live: tuple[ShardStatus, ...] = ()


class WatchJob(msgspec.Struct, frozen=True, array_like=True, tag="s.watch"):
    """Answered by `JobStatus`; the asker is pushed the following ones."""

    job: JobId


class KillJob(msgspec.Struct, frozen=True, array_like=True, tag="s.kill"):
    """Answered by `JobStatus`. `moved`: somebody else has it now, so it is only dropped here."""

    job: JobId
    moved: bool = False


class FetchResult(msgspec.Struct, frozen=True, array_like=True, tag="s.fetch"):
    """Answered by `ResultPart`: the results of the blocks from `first`, as many as fit."""

    job: JobId
    first: Block


class ResultPart(msgspec.Struct, frozen=True, array_like=True, tag="s.part"):
    first: Block
    results: tuple[Result, ...]


class ListJobs(msgspec.Struct, frozen=True, array_like=True, tag="s.jobs"):
    """Answered by `JobList`: the jobs this node owns, newest last."""


class JobList(msgspec.Struct, frozen=True, array_like=True, tag="s.joblist"):
    jobs: tuple[JobStatus, ...]


class WhyTask(msgspec.Struct, frozen=True, array_like=True, tag="s.why"):
    """Answered by `WhyAnswer`: the decisions of `task` (`J-…` or `J-…/SHARD`)."""

    task: Text


class WhyAnswer(msgspec.Struct, frozen=True, array_like=True, tag="s.because"):
    decisions: tuple[Decision, ...]


# -- owner and runner ---------------------------------------------------------------------------


class AssignShard(msgspec.Struct, frozen=True, array_like=True, tag="s.assign"):
    """Compute blocks `[first, last)`. `ir` is empty where the runner should have it already.

    `attempt` is unique over all assignments that the owner ever makes, and grows; `tries` counts
    those of the shard, for people.
    """

    job: JobId
    shard: Number
    attempt: Number
    spec: JobSpec
    first: Block
    last: Block
    ir: Annotated[bytes, Meta(max_length=PROGRAM_BYTES_MAX)] = b""
    tries: Number = 1
    work_gas: Gas = 0.0  # predicted, of all its blocks
    path: Annotated[tuple[Kid, ...], Meta(max_length=HOPS_MAX)] = ()  # who sent it on
    parcels: Parcels = ()  # of its blocks, where the job has them


class Shrink(msgspec.Struct, frozen=True, array_like=True, tag="s.shrink"):
    """Stop before block `last`; answered by `Shrunk` with the boundary it really stops at."""

    job: JobId
    shard: Number
    attempt: Number
    last: Block


class Shrunk(msgspec.Struct, frozen=True, array_like=True, tag="s.shrunk"):
    job: JobId
    shard: Number
    attempt: Number
    last: Block


class DropShard(msgspec.Struct, frozen=True, array_like=True, tag="s.drop"):
    """The attempt is over (counted, cancelled or fenced): stop it and forget it."""

    job: JobId
    shard: Number
    attempt: Number


class Rejected(msgspec.Struct, frozen=True, array_like=True, tag="s.reject"):
    """Not admitted: no credit. Come again after `retry_ms`, or go elsewhere.

    `forward` is where: above `full_view` nodes a runner sends a shard on to the link of its own
    that finishes it sooner. The owner assigns it there: there is one writer. `load` says that
    there is no credit to those who thought so.
    """

    job: JobId
    shard: Number
    attempt: Number
    retry_ms: Ms
    forward: Kid | None = None
    load: LoadReport | None = None


class NeedProgram(msgspec.Struct, frozen=True, array_like=True, tag="s.need"):
    """The runner of this attempt does not have the program: send `AssignShard` with its IR."""

    job: JobId
    shard: Number
    attempt: Number


class Report(msgspec.Struct, frozen=True, array_like=True, tag="s.report"):
    """Where an attempt stands; results of blocks `[first, first + len(results))`.

    Sent when blocks are done and at least every `progress_ms`: it is the heartbeat. `lost` says
    that the attempt ended without finishing and without being the program's fault.
    """

    job: JobId
    shard: Number
    attempt: Number
    first: Block
    results: Annotated[tuple[Result, ...], Meta(max_length=RESULTS_PER_REPORT_MAX)]
    running: bool
    gas: Gas  # used by this attempt so far: a lost report loses nothing of it
    busy_ms: Ms  # of a worker, by this attempt so far
    load: LoadReport
    fault: Fault | None = None
    lost: Text = ""


class ReportAck(msgspec.Struct, frozen=True, array_like=True, tag="s.ack"):
    """Everything before block `counted` of this attempt is safe with the owner.

    `missing`: the report began later than that; what lies between has to be sent again.
    `settled`: positions of the job that no attempt will ever have again, of a job with effects.
    """

    job: JobId
    shard: Number
    attempt: Number
    counted: Block
    missing: bool = False
    settled: Annotated[tuple[tuple[Number, Number], ...], Meta(max_length=SETTLED_MAX)] = ()


class Stored(msgspec.Struct, frozen=True, array_like=True, tag="s.stored"):
    """A node to itself: what its outbox has of the job is on the disk, or (`kept` false) refused.

    `number`: of the entry; `leaves`: that there is none any more is what the disk knows.
    """

    job: JobId
    number: Number
    leaves: bool = False
    kept: bool = True


Message = (
    SubmitJob
    | JobStatus
    | WatchJob
    | KillJob
    | FetchResult
    | ResultPart
    | ListJobs
    | JobList
    | WhyTask
    | WhyAnswer
    | AssignShard
    | Shrink
    | Shrunk
    | DropShard
    | Rejected
    | NeedProgram
    | Report
    | ReportAck
    | Stored
)


# -- runner and its workers (effects of this node, never on the wire) -----------------------------


@dataclass(frozen=True, slots=True)
class StartRun:
    """Let worker `worker` compute blocks `[first, last)`; answered by the `run_…` events."""

    worker: int
    run: int
    spec: JobSpec
    ir: bytes
    first: int
    last: int
    parcels: tuple[Parcel, ...] = ()


@dataclass(frozen=True, slots=True)
class LimitRun:
    """Stop run `run` before block `last` (its present block is finished in any case)."""

    worker: int
    run: int
    last: int


@dataclass(frozen=True, slots=True)
class AbortRun:
    """End run `run` at once, within its block."""

    worker: int
    run: int


@dataclass(frozen=True, slots=True)
class JobEvent:
    """For the node's log, metrics and traces."""

    what: str
    job: str
    detail: str
    trace: str = ""


@dataclass(frozen=True, slots=True)
class Placed:
    """Of a traced job: a shard was given to a node."""

    job: str
    shard: int
    attempt: int
    tries: int
    alias: str
    first: int
    last: int
    work_gas: float
    note: str
    at_ms: float


@dataclass(frozen=True, slots=True)
class Counted:
    """Of a traced job: every block is counted, and the reduction follows."""

    job: str
    blocks: int
    at_ms: float


WorkerEffect = StartRun | LimitRun | AbortRun
