"""Descriptors of a supervisor: raised where that is allowed, else refused with the number."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator

import pytest

from manifold.kernel.errors import Refused
from manifold.tools.emulator import room


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """What the process may have, as the last of a list; nothing is really changed."""
    had = [(0, 0)]
    monkeypatch.setattr(resource, "getrlimit", lambda which: had[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda which, both: had.append(both))
    yield had


def used() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_limit_that_is_high_enough_is_left_alone(limits: list[tuple[int, int]]) -> None:
    for enough in (20_000, resource.RLIM_INFINITY):
        limits[:] = [(enough, enough)]
        room.make(128)
        assert len(limits) == 1


def test_a_soft_limit_is_raised_as_far_as_needed(limits: list[tuple[int, int]]) -> None:
    limits[:] = [(256, 4096)]
    room.make(128)
    soft, hard = limits[-1]
    assert hard == 4096
    assert used() + room.PER_NODE * 128 <= soft <= used() + room.PER_NODE * 128 + room.SPARE + 1


def test_too_many_nodes_are_refused_with_as_many_as_would_do(
    limits: list[tuple[int, int]],
) -> None:
    limits[:] = [(256, 1024)]
    with pytest.raises(Refused, match=r"^1000 nodes take \d+ descriptors .* may have 1024") as told:
        room.make(1000)
    most = int(told.value.next_step.split("at most ")[1].split()[0])
    assert 200 < most < 342
    room.make(most)
    with pytest.raises(Refused):
        room.make(most + 1)
