"""The benchmark of a member's death: what counts as time without progress."""

from __future__ import annotations

import asyncio
import time

import pytest

from manifold.kernel.errors import Unavailable
from manifold.tools.bench import failover
from manifold.tools.bench.failover import Progress


@pytest.mark.parametrize(
    "times, gap",
    [
        ([], 10.0),  # nothing ever again
        ([1.0, 2.0], 8.0),  # to the end
        ([9.0], 9.0),  # from the beginning
        ([3.0, 1.0, 9.0], 6.0),  # in whatever order clients tell
        ([-5.0, 5.0, 12.0], 5.0),  # what was before and after does not count
    ],
)
def test_the_gap_reaches_from_the_kill_to_the_end(times: list[float], gap: float) -> None:
    assert failover.gap_s(times, 0.0, 10.0) == gap


def test_progress_is_anybodys_and_the_longest_wait_is_one_clients() -> None:
    progress = Progress([[1.0, 3.0], [2.0, 4.0]], began=0.0, killed=1.5, ends=4.0)
    assert progress.gap_ms() == 1000.0
    assert progress.client_gap_ms() == 2000.0
    assert progress.quiet_ms() == 1000.0


class Failing:
    """Refuses, then is silent, then answers; says `no` once, so that clients take what is there."""

    def __init__(self) -> None:
        self.calls = 0
        self.expected: list[int | None] = []

    async def read(self, key: str) -> int | None:
        self.calls += 1
        if self.calls == 1:
            raise Unavailable("no quorum")
        if self.calls == 2:
            await asyncio.sleep(3600)
        return 7

    async def swap(self, key: str, expected: int | None, new: int) -> tuple[bool, int | None]:
        await asyncio.sleep(0)
        self.expected.append(expected)
        return len(self.expected) > 1, 40


def test_a_client_goes_on_after_refusals_and_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failover, "ATTEMPT_S", 0.01)
    monkeypatch.setattr(failover, "SHARED_KEYS", 1)
    session = Failing()
    progress = Progress()
    progress.began = time.perf_counter()
    progress.ends = progress.began + 0.2
    asyncio.run(failover.client(0, session, progress))
    assert len(progress.completed[0]) == len(session.expected) > 3
    assert session.expected[0] == 7 and 40 in session.expected
