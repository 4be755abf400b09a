"""What comes out of a job: the reduction of its blocks, and how it reaches the client."""

from __future__ import annotations

from collections.abc import Sequence

from manifold.kernel.process.messages import Result
from manifold.kernel.scheduler import blocks
from manifold.kernel.scheduler.ledger import Job
from manifold.vm.runtime.results import Partial, merge

INLINE_BYTES_MAX = 2 << 20  # results up to this size travel with the final status, in chunks
PART_BYTES_MAX = 768 << 10  # of one fetched part: under a frame with its overhead


def nbytes(results: Sequence[Result]) -> int:
    """About how many bytes results take, in memory and on the wire."""
    return sum(r.nbytes if isinstance(r, Partial) else 512 for r in results)


def held(job: Job) -> int:
    """Bytes of results that an ended job holds."""
    return nbytes([r for r in job.results if r is not None])


def reduce(job: Job) -> None:
    """Replace the blocks' results by the reduction's single one; a collection stays as it is."""
    if job.spec.isolate or job.spec.reduce == "collect" or not job.blocks:
        return
    partials = [r for r in job.results if isinstance(r, Partial)]
    assert len(partials) == job.blocks, "every block of a job that is done has a result"
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
