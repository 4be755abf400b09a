"""Blocks: the fixed grid of a job, and the fixed tree that reduces over it.

Invariants: K1 blocks depend on the job's range alone; K2 the tree depends on the number of blocks
alone, so a floating-point sum has the same bits however the work was spread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from manifold.kernel.scheduler.messages import JobSpec

# A block costs a worker about 30 us beyond its indices: 512 of them are 15 ms, 5 % of the smallest
# job worth spreading (0.3 s); and 512 blocks give each of 64 slots 8 to share with a faster one.
BLOCKS_MAX = 512
ARITY = 8

T = TypeVar("T")


def total(spec: JobSpec) -> int:
    """How many indices the job has."""
    return len(spec.indices) if spec.indices else spec.hi - spec.lo


def block_indices(spec: JobSpec) -> int:
    """Indices in a block (the last may have fewer); 1 where each index is a task of its own."""
    return 1 if spec.isolate else max(1, -(-total(spec) // BLOCKS_MAX))


def count(spec: JobSpec) -> int:
    """How many blocks the job has."""
    return -(-total(spec) // block_indices(spec))


def positions(spec: JobSpec, block: int) -> tuple[int, int]:
    """The half-open range of positions (0 is the job's first index) of `block`."""
    size = block_indices(spec)
    return block * size, min((block + 1) * size, total(spec))


def bounds(spec: JobSpec, block: int) -> tuple[int, int]:
    """The half-open range of indices of `block`."""
    low, high = positions(spec, block)
    if spec.indices:
        assert high == low + 1, "explicit indices are tasks of their own"
        return spec.indices[low], spec.indices[low] + 1
    return spec.lo + low, spec.lo + high


def tree_reduce(leaves: Sequence[T], merge: Callable[[Sequence[T]], T]) -> T:
    """Reduce `leaves` (at least one) by groups of `ARITY`, level by level."""
    level = list(leaves)
    while len(level) > 1:
        level = [merge(level[at : at + ARITY]) for at in range(0, len(level), ARITY)]
    return level[0]
