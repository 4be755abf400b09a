"""What comes out of a job: its status, the reduction of its blocks, how they reach the client."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from manifold.kernel.errors import PeerError
from manifold.kernel.process.messages import Fault, Result
from manifold.kernel.scheduler import blocks
from manifold.kernel.scheduler.ledger import Job
from manifold.kernel.scheduler.messages import JobStatus, ShardStatus
from manifold.kernel.tasks.messages import Parcel
from manifold.vm.kid import Kid
from manifold.vm.runtime.results import Partial, merge

INLINE_BYTES_MAX = 2 << 20  # results up to this size travel with the final status, in chunks
LIVE_MAX = 256  # shards in one status
PART_BYTES_MAX = 768 << 10  # of one fetched part: under a frame with its overhead


def nbytes(results: Sequence[Result]) -> int:
    """About how many bytes results take, in memory and on the wire."""
    return sum(512 if isinstance(r, Fault) else r.nbytes for r in results)


def parcels_nbytes(parcels: Sequence[Parcel]) -> int:
    """The same of arguments."""
    return sum(parcel.nbytes for parcel in parcels)


def reduce(job: Job) -> None:
    """Replace the blocks' results by the reduction's single one; a collection stays as it is."""
    if job.spec.isolate or job.spec.reduce == "collect" or not job.blocks:
        return
    partials = [r for r in job.results if isinstance(r, Partial)]
    if len(partials) != job.blocks:  # only a node that is broken, or not one of ours, reports such
        raise PeerError("A node reported results that are none of a reduction.", "Run it again.")
    how = job.spec.reduce
    whole = blocks.tree_reduce(partials, lambda group: merge(how, list(group)))
    job.results = [whole]


def inline(job: Job) -> tuple[tuple[Result, ...] | None, int]:
    """The results to send with the status, or None and how many there are to fetch."""
    if job.state != "done":
        return None, 0
    done = [r for r in job.results if r is not None]
    if nbytes(done) <= INLINE_BYTES_MAX:
        return tuple(done), 0
    return None, len(done)


def part(job: Job, first: int) -> tuple[Result, ...]:
    """Results from `first` on, as many as fit in one part (at least one)."""
    found: list[Result] = []
    size = 0
    for result in job.results[first:]:
        if result is None:
            break
        size += nbytes((result,))
        if found and size > PART_BYTES_MAX:
            break
        found.append(result)
    return tuple(found)


def status(
    job: Job, owner: Kid, alias: Callable[[Kid | None], str], now_ms: float, *, brief: bool
) -> JobStatus:
    """The job as it stands; `brief` leaves results out."""
    results, parts = (None, 0) if brief else inline(job)
    live: tuple[ShardStatus, ...] = ()
    if job.state == "running":
        live = tuple(
            ShardStatus(s.number, s.attempts, alias(s.node), s.first, s.last, s.counted)
            for s in itertools.islice(job.shards.values(), LIVE_MAX)
        )
    return JobStatus(
        job.job, job.state, job.spec.program, job.spec.name, owner, job.done,
        blocks.total(job.spec), (job.ended_ms or now_ms) - job.started_ms, job.next_shard,
        job.retries, blocks.block_indices(job.spec), job.spec.reduce, job.fault, results, parts,
        live,
    )  # fmt: skip
