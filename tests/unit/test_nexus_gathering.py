"""A round waits a moment for those that the last one has answered, if that has paid before."""

from __future__ import annotations

from random import Random
from statistics import median
from typing import Any

import pytest

from manifold.kernel.nexus.gathering import GATHER_MS, VAIN_MAX, Gathering
from manifold.kernel.nexus.messages import Operate
from manifold.kernel.nexus.protocol import Nexus
from manifold.kernel.nexus.values import BATCH_MAX, Add
from manifold.tools.simulator.faults import Faults
from manifold.tools.simulator.nexus import Harness, Plan

DELAY_MS, SYNC_MS = 0.2, 0.5
PLAN = Plan(
    nodes=4, voters=3, faults=Faults(delay=(DELAY_MS, DELAY_MS), sync=(SYNC_MS, SYNC_MS)),
    duration_ms=0.0, operations=0, changes=0, core=False, deletes=0.0,
)  # fmt: skip
CLIENTS = 8
TURN_MS = (0.05, 0.2)  # from an answer to the next request


def crowd(answered: int, waiting: int) -> Gathering:
    gathering = Gathering()
    gathering.ended(answered, waiting, BATCH_MAX)
    return gathering


def test_the_first_waits_until_as_many_are_there_as_before() -> None:
    gathering = crowd(1, 7)
    assert [gathering.waits(n) for n in range(1, 9)] == [True] * 7 + [False]
    gathering.ended(8, 0, BATCH_MAX)
    assert gathering.waits(7) and not gathering.waits(8)


def test_whoever_asks_alone_never_waits() -> None:
    assert not Gathering().waits(1)
    assert not crowd(1, 0).waits(1)


def test_no_more_are_waited_for_than_a_round_takes() -> None:
    assert not crowd(BATCH_MAX, 3 * BATCH_MAX).waits(BATCH_MAX)


def test_where_nobody_comes_waits_become_rare_and_once_they_pay_frequent_again() -> None:
    gathering = Gathering()

    def rounds_until_it_waits() -> int:
        rounds = 0
        while True:
            gathering.ended(2, 0, BATCH_MAX)
            if gathering.waits(1):
                return rounds
            rounds += 1

    spared = []
    for _ in range(VAIN_MAX + 2):
        spared.append(rounds_until_it_waits())
        gathering.missed()
    assert spared == [0, *((1 << n) - 1 for n in range(1, VAIN_MAX + 1)), (1 << VAIN_MAX) - 1]
    rounds_until_it_waits()
    assert not gathering.waits(2)  # the other one has come
    assert rounds_until_it_waits() == 0


class Loops:
    """Clients of one key that send the next operation right after the last answer."""

    def __init__(self, clients: int, pause_ms: tuple[float, float] = TURN_MS) -> None:
        self.harness = Harness(5, Nexus, PLAN)
        self.harness.begin()
        self.world = self.harness.world
        self.random = Random(7)
        self.pause_ms = pause_ms
        self.spans: list[float] = []
        self.until_ms = self.world.now_ms + 400.0
        self.numbers = 0
        for _ in range(clients):
            self.world.at(self.random.uniform(0.0, 2.0), self.ask)

    def ask(self) -> None:
        if self.world.now_ms >= self.until_ms:
            return
        self.numbers += 1
        began_ms = self.world.now_ms

        def answered(_handle: int, answer: Any) -> None:
            assert answer.status == "ok"
            self.spans.append(self.world.now_ms - began_ms)
            self.world.at(self.random.uniform(*self.pause_ms), self.ask)

        request = Operate(f"o{self.numbers}", "k", Add(1))
        self.harness.ask(self.world.nodes[0], request, answered)

    def median_ms(self) -> float:
        assert self.world.run_until(lambda: self.world.now_ms > self.until_ms + 20.0, 1000.0, 5.0)
        assert len(self.spans) == self.numbers
        return median(self.spans)


def nobody_waits(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Gathering, "waits", lambda self, queued: False)


def test_clients_in_closed_loops_share_a_round_instead_of_waiting_for_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone_ms, together_ms = Loops(1).median_ms(), Loops(CLIENTS).median_ms()
    nobody_waits(monkeypatch)
    assert Loops(1).median_ms() == alone_ms
    apart_ms = Loops(CLIENTS).median_ms()
    assert alone_ms < together_ms < 0.75 * apart_ms


def test_clients_that_come_whenever_they_like_lose_next_to_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spread_ms = (0.0, 12.0)
    waits_ms = Loops(CLIENTS, spread_ms).median_ms()
    nobody_waits(monkeypatch)
    assert waits_ms < Loops(CLIENTS, spread_ms).median_ms() + GATHER_MS / 4
