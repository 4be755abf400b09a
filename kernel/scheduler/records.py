"""What Nexus keeps of a job, so that another node can take it over. Pure data.

A job has one small register, `jobs/<job>`, that is changed by compare-and-swap alone: whoever
changed it last owns the job (a claim raises `generation`). What is large lies in chunks beside it,
`jobs/<job>/<generation>.<number>`, each written once, by the owner of that generation, before the
register tells of it: first the head (spec, program, arguments) in pieces, then results of blocks,
of which the latest are in the register itself.
`owners/<kid>` lists the jobs that a node keeps so, for whoever looks after them when it is dead.
Bounds: CHUNKS_MAX chunks of CHUNK_BYTES, so a job of 3.8 MB with its results; a larger one is not
kept (its head) or not kept further (its results).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from manifold.kernel.process.messages import Fault, Result
from manifold.kernel.scheduler import blocks, outcome
from manifold.kernel.scheduler.ledger import Job
from manifold.kernel.scheduler.messages import (
    INDICES_EXPLICIT_MAX,
    JobId,
    JobSpec,
    Ms,
    Number,
    Origins,
    Parcels,
    State,
    Text,
)
from manifold.vm.kid import Kid, kid_of

CHUNK_BYTES = 60_000  # a register holds 64 KiB
CHUNKS_MAX = 64
TAIL_BYTES = 12_000  # of results in the register: more are put in a chunk first
RESULTS_BYTES_MAX = 32_000  # of a job that has ended, within its register
OWNED_MAX = 2500  # jobs that one node keeps at a time: 20 B each in one register

Run = tuple[int, int]  # blocks, half-open
_Results = Annotated[tuple[Result, ...], Meta(max_length=INDICES_EXPLICIT_MAX)]


class JobRecord(msgspec.Struct, frozen=True, array_like=True):
    """Who owns a job and how far it is. `chunks`: how many of each generation, in order."""

    job: JobId
    owner: Kid
    boot: Number
    generation: Number
    seq: Number  # of the writes of this owner
    state: State
    detach: bool
    client: Text
    elapsed_ms: Ms
    chunks: Annotated[tuple[tuple[Number, Number], ...], Meta(max_length=CHUNKS_MAX)]
    retries: Number = 0
    fault: Fault | None = None
    results: _Results | None = None  # of a job that has ended, where they are small
    tail: bytes = b""  # an encoded chunk: the results that are in no other
    origins: Origins = ()  # nodes whose outbox may have the job: Q4 in queueing.py


class Head(msgspec.Struct, frozen=True, array_like=True):
    """What was submitted."""

    spec: JobSpec
    ir: bytes
    parcels: Parcels


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """A piece of the head, or results of runs of blocks, each with its first block."""

    head: bytes = b""
    runs: tuple[tuple[Number, _Results], ...] = ()


class Owned(msgspec.Struct, frozen=True, array_like=True):
    jobs: Annotated[tuple[JobId, ...], Meta(max_length=OWNED_MAX)]


encode = msgspec.msgpack.Encoder().encode
decode_record = msgspec.msgpack.Decoder(JobRecord).decode
decode_chunk = msgspec.msgpack.Decoder(Chunk).decode
decode_owned = msgspec.msgpack.Decoder(Owned).decode
decode_head = msgspec.msgpack.Decoder(Head).decode


def job_key(job: str) -> str:
    return f"jobs/{job}"


def chunk_key(job: str, generation: int, number: int) -> str:
    return f"jobs/{job}/{generation}.{number}"


def chunk_keys(job: str, chunks: Iterable[tuple[int, int]]) -> list[str]:
    """All of them, in the order in which they were written."""
    return [chunk_key(job, generation, n) for generation, count in chunks for n in range(count)]


def owned_key(node: Kid) -> str:
    return f"owners/{node}"


def head_pieces(job: Job) -> list[bytes]:
    """The head in pieces of a chunk each; none where it is too large to be kept."""
    data = encode(Head(job.spec, job.ir, job.parcels))
    pieces = [data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES)]
    return pieces if len(pieces) < CHUNKS_MAX else []


def take_results(job: Job, fresh: Sequence[Run], most: int) -> tuple[bytes, list[Run]]:
    """An encoded chunk of the first of the `fresh` blocks that fit in `most` bytes, and which.

    Nothing where not even the first fits.
    """
    taken: list[tuple[int, tuple[Result, ...]]] = []
    spans: list[Run] = []
    left = most
    for first, last in fresh:
        results: list[Result] = []
        for block in range(first, last):
            result = job.results[block]
            assert result is not None, "it is counted"
            left -= 16 + outcome.nbytes((result,))
            if left < 0:
                break
            results.append(result)
        if results:
            taken.append((first, tuple(results)))
            spans.append((first, first + len(results)))
        if left < 0:
            break
    data = encode(Chunk(b"", tuple(taken))) if taken else b""
    return (data, spans) if len(data) <= CHUNK_BYTES else (b"", [])


def covers(spans: Sequence[Run], runs: Sequence[Run]) -> bool:
    """Whether every block of `runs` is in `spans`; both sorted and merged."""
    return all(any(low <= first and last <= high for low, high in spans) for first, last in runs)


def merge_runs(runs: Sequence[Run], more: Iterable[Run]) -> list[Run]:
    """The union, sorted, without runs that touch."""
    merged: list[Run] = []
    for first, last in sorted([*runs, *more]):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return merged


def without(runs: Sequence[Run], gone: Sequence[Run]) -> list[Run]:
    """What of `runs` is not in `gone`; both sorted, without overlaps of their own."""
    left: list[Run] = []
    for first, last in runs:
        at = first
        for low, high in gone:
            if high <= at or low >= last:
                continue
            if low > at:
                left.append((at, low))
            at = high
        if at < last:
            left.append((at, last))
    return left


def positions(spec: JobSpec, runs: Sequence[Run], most: int) -> tuple[tuple[int, int], ...]:
    """Positions of the longest `most` runs of blocks, in order."""
    longest = sorted(runs, key=lambda run: run[0] - run[1])[:most]
    return tuple(
        (blocks.positions(spec, first)[0], blocks.positions(spec, last - 1)[1])
        for first, last in sorted(longest)
    )


class Damaged(ValueError):
    """Chunks that do not make a job."""


def restore(record: JobRecord, chunks: Sequence[bytes], now_ms: float) -> tuple[Job, list[Run]]:
    """The job as it was kept, nothing of it assigned, and the blocks whose results were kept."""
    try:
        every = [*chunks, record.tail] if record.tail else chunks
        parts = [decode_chunk(data) for data in every]
        head = decode_head(b"".join(part.head for part in parts))
    except msgspec.MsgspecError as error:
        raise Damaged(str(error)) from error
    spec = head.spec
    if kid_of(head.ir) != spec.program:
        raise Damaged("the program does not have the KID it claims")
    count = blocks.count(spec)
    job = Job(
        record.job, spec, head.ir, now_ms - record.elapsed_ms, count, [None] * count,
        parcels=head.parcels, client=record.client, detach=record.detach,
        origins=record.origins,
    )  # fmt: skip
    job.retries = record.retries
    runs: list[Run] = []
    for part in parts:
        for first, results in part.runs:
            if first + len(results) > count:
                raise Damaged("results beyond its end")
            job.results[first : first + len(results)] = results
            runs.append((first, first + len(results)))
    return job, fill(job, runs)


def runs_of(chunk: bytes) -> list[Run]:
    """The blocks whose results an encoded chunk holds."""
    if not chunk:
        return []
    parts = decode_chunk(chunk).runs
    return merge_runs([(first, first + len(results)) for first, results in parts], ())


def fill(job: Job, runs: Sequence[Run]) -> list[Run]:
    """Count what `job.results` hold, and cut the rest into pending shards."""
    counted = merge_runs(runs, ())
    job.counted = sum(last - first for first, last in counted)
    spans = positions(job.spec, counted, len(counted))
    job.done = sum(high - low for low, high in spans)
    at = 0
    for first, last in [*counted, (job.blocks, job.blocks)]:
        if at < first:
            job.cut(at, first)
        at = last
    job.check()
    return counted
