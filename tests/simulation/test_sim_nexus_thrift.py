"""Asking a quorum first costs nothing where one voter is not as the others are."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from statistics import median
from typing import Any

import pytest

from manifold.kernel.nexus.acceptor import SHARDS, Acceptor, shard_of
from manifold.kernel.nexus.ballots import ZERO, Ballot
from manifold.kernel.nexus.configs import Voter, first_config
from manifold.kernel.nexus.context import Context, Timing
from manifold.kernel.nexus.marks import Marks
from manifold.kernel.nexus.messages import Nack, Operate, Prepare, Promise, Seal
from manifold.kernel.nexus.protocol import Nexus
from manifold.kernel.nexus.rounds import Phase, Round
from manifold.kernel.nexus.values import Entry, Put, Value
from manifold.tools.simulator.faults import Faults
from manifold.tools.simulator.nexus import Harness, Plan
from manifold.tools.simulator.world import Node, World
from manifold.vm.kid import Kid, kid_of

PLAN = Plan(
    nodes=4, voters=3, faults=Faults(delay=(0.15, 0.15), sync=(1.0, 1.0)), duration_ms=0.0,
    operations=0, changes=0, core=False, deletes=0.0,
)  # fmt: skip
KEYS = tuple(f"q{number}" for number in range(4))
KIDS = tuple(kid_of(b"voter %d" % number) for number in range(3))
CONFIG = first_config([Voter(kid, 7) for kid in KIDS])


class Patient(Harness):
    """As in production: the timing is not that of short schedules."""

    def _boot(
        self, kid: Kid, boot: int, durable: Mapping[str, bytes], random: Random, now_ms: float
    ) -> Any:
        machine = Nexus(kid, boot, durable, random, Timing())
        for each in self.kids:
            machine.forwarding.node_up(each)
        return machine


def spans_ms(harness: Harness, node: Node, rounds: int) -> list[float]:
    """How long each of so many writes of each key takes, one after the other."""
    spans = []
    world = harness.world
    for number in range(rounds):
        for key in KEYS:
            told: list[float] = []
            began_ms = world.now_ms
            request = Operate(f"{key}.{number}", key, Put(number))
            harness.ask(node, request, lambda _h, _a, told=told: told.append(world.now_ms))
            assert world.run_until(lambda told=told: bool(told), 2000.0, 0.05) is not None
            spans.append(told[0] - began_ms)
    return spans


@pytest.mark.parametrize("proposer", [0, 3])
@pytest.mark.parametrize("slow_ms", [5.0, 10.0, 14.0, 30.0])
def test_a_voter_that_is_slow_from_the_beginning_slows_no_key(
    slow_ms: float, proposer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Patient(5, Nexus, PLAN)
    harness.begin()
    slow = harness.world.nodes[2]
    persist = World._persist

    def persisted(world: World, node: Node, *rest: Any) -> None:
        sync, world.faults = world.faults, PLAN.faults
        if node is slow:
            world.faults = Faults(delay=(0.15, 0.15), sync=(slow_ms, slow_ms))
        try:
            persist(world, node, *rest)
        finally:
            world.faults = sync

    monkeypatch.setattr(World, "_persist", persisted)
    spans = spans_ms(harness, harness.world.nodes[proposer], 100)
    assert median(spans) < 2.0
    assert sum(span > 4.0 for span in spans) < 12, "a try now and then"


@pytest.mark.parametrize("proposer", [0, 3])
def test_a_voter_that_has_promised_more_costs_one_prepare(proposer: int) -> None:
    harness = Patient(5, Nexus, PLAN)
    harness.begin()
    ahead = harness.world.nodes[2]
    for shard in range(SHARDS):
        ahead.machine.acceptor.floors[shard] = Ballot(100_000, harness.kids[3], 1, 7)
    spans = spans_ms(harness, harness.world.nodes[proposer], 60)
    assert sum(span > 2.0 for span in spans) < 3 * len(KEYS)


def test_a_refusal_tells_the_floor_that_it_is_for() -> None:
    context = Context(KIDS[2], 1, 1, Random(1), Timing())
    acceptor = Acceptor(context, {})
    config = first_config([Voter(KIDS[0], 1), Voter(KIDS[1], 1), Voter(KIDS[2], acceptor.disk)])
    acceptor.receive(KIDS[0], Seal(1, config))
    context.take()
    acceptor.receive(KIDS[0], Prepare(2, config.epoch, "k", Ballot(1, KIDS[0], 1, 1)))
    context.take()
    acceptor.floors[shard_of("k")] = floor = Ballot(1000, KIDS[0], 1, 1)  # by another key
    acceptor.receive(KIDS[1], Prepare(3, config.epoch, "k", Ballot(900, KIDS[1], 1, 1)))
    told = [effect.message for effect in context.take() if hasattr(effect, "message")]
    assert told == [Nack(3, floor)]


def heard(tombstone: Ballot, floor: Ballot) -> Round:
    """One voter has a tombstone, another nothing but a floor."""
    begun = Round(1, Phase.PREPARE, CONFIG, Ballot(99, KIDS[0], 1, 1), [], 0.0)
    value = Value(7, 7, None, (Entry("delete"),), Marks((), (11, 12)))
    begun.heard = {
        KIDS[0]: Promise(1, tombstone, value, ZERO),
        KIDS[1]: Promise(1, ZERO, None, floor),
    }
    return begun


def test_a_tombstone_above_every_floor_was_dropped_by_nobody() -> None:
    present = heard(Ballot(9, KIDS[0], 1, 1), Ballot(8, KIDS[1], 1, 1)).present()
    assert (present.stamp, present.ring) == (7, (Entry("delete"),))


def test_one_that_may_have_been_dropped_counts_on_and_still_knows_which_jobs_are_over() -> None:
    present = heard(Ballot(9, KIDS[0], 1, 1), Ballot(20, KIDS[1], 1, 1)).present()
    assert (present.stamp, present.data) == (64 * 20, None)
    assert present.marks == Marks((), (11, 12))
