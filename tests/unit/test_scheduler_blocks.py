"""Blocks: a grid that covers each index once, a tree that gives the same bits every time."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifold.kernel.scheduler import blocks
from manifold.kernel.scheduler.messages import INDICES_EXPLICIT_MAX, JobSpec
from manifold.vm.kid import kid_of

Leaf = tuple[int, tuple[int, ...]]  # depth of the tree beneath it, its leaves in order
PROGRAM = kid_of(b"program")


def spec(lo: int, hi: int, **more: object) -> JobSpec:
    return JobSpec(PROGRAM, lo, hi, "sum", **more)  # type: ignore[arg-type]


@given(st.integers(-(1 << 62), 1 << 62), st.integers(0, 10**12))
def test_blocks_cover_a_range_once_and_in_order(lo: int, total: int) -> None:
    job = spec(lo, lo + total)
    count = blocks.count(job)
    assert count <= blocks.BLOCKS_MAX
    at = lo
    for block in range(count):
        low, high = blocks.bounds(job, block)
        assert low == at and high > low
        at = high
    assert at == lo + total


def test_a_range_of_nothing_has_no_blocks() -> None:
    assert blocks.count(spec(5, 5)) == 0


def test_isolated_indices_are_blocks_of_their_own() -> None:
    job = spec(0, 0, isolate=True, indices=(7, 3, 7))
    assert [blocks.bounds(job, b) for b in range(blocks.count(job))] == [(7, 8), (3, 4), (7, 8)]
    assert blocks.count(spec(0, 1000, isolate=True)) == 1000


def test_the_grid_depends_on_the_range_alone() -> None:
    one = spec(10, 10_010, arguments=(1,), name="a")
    other = spec(10, 10_010, arguments=(2,), name="b")
    assert [blocks.bounds(one, b) for b in range(512)][:501] == [
        blocks.bounds(other, b) for b in range(512)
    ][:501]


def test_the_widest_range_there_is_fits() -> None:
    job = spec(-(1 << 63), (1 << 63) - 1)
    low, _ = blocks.bounds(job, 0)
    _, high = blocks.bounds(job, blocks.count(job) - 1)
    assert (low, high) == (-(1 << 63), (1 << 63) - 1)


@pytest.mark.parametrize("leaves", [1, 2, 7, 8, 9, 63, 64, 65, 512, INDICES_EXPLICIT_MAX])
def test_the_tree_has_arity_eight_and_keeps_the_order(leaves: int) -> None:
    def merge(parts: Sequence[Leaf]) -> Leaf:
        assert 1 <= len(parts) <= blocks.ARITY
        joined = tuple(value for _, values in parts for value in values)
        return max(depth for depth, _ in parts) + 1, joined

    every: list[Leaf] = [(0, (n,)) for n in range(leaves)]
    depth, values = blocks.tree_reduce(every, merge)
    assert values == tuple(range(leaves))
    assert blocks.ARITY ** (depth - 1) < leaves <= blocks.ARITY**depth or leaves == 1
