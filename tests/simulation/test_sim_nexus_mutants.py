"""Planted bugs of consensus, each of which must be caught within a bounded number of schedules.

The first eleven are those of the design; the others are bugs of our own additions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from manifold.kernel.effects import Effect
from manifold.kernel.nexus import proposer as proposer_module
from manifold.kernel.nexus import rounds as rounds_module
from manifold.kernel.nexus import values
from manifold.kernel.nexus.acceptor import Acceptor, Row
from manifold.kernel.nexus.configs import Config, Voter
from manifold.kernel.nexus.context import Context
from manifold.kernel.nexus.forwarding import Forwarding
from manifold.kernel.nexus.messages import KEY_PREFIX, Forward
from manifold.kernel.nexus.proposer import Proposer
from manifold.kernel.nexus.protocol import Nexus
from manifold.kernel.nexus.rounds import Cache, Operation, Phase, Register, Round
from manifold.kernel.nexus.values import BATCH_MAX, Value, Wanted, change
from manifold.kernel.nexus.voters import Drive, Drivers
from manifold.tools.simulator.faults import Faults
from manifold.tools.simulator.nexus import Plan, draw, run

Patch = pytest.MonkeyPatch
Plant = Callable[[Patch], type[Nexus] | None]


def answers_from_the_cache(patch: Patch) -> None:
    """A failed compare-and-swap, or a read in a batch, told from what was chosen some time ago."""
    proposes = Proposer._propose_cached

    def cached(
        self: Proposer, register: Register, cache: Cache, batch: list[Operation], config: Config
    ) -> None:
        new, results = change(cache.value, [each.wanted() for each in batch], cache.ballot)
        if new is not cache.value:
            proposes(self, register, cache, batch, config)
            return
        register.cache = cache
        self._tell(batch, results)
        self._kick(register)

    patch.setattr(Proposer, "_propose_cached", cached)


def does_not_write_back(patch: Patch) -> None:
    patch.setattr(Round, "agreed", lambda self: True)


def does_not_check_epochs(patch: Patch) -> None:
    patch.setattr(Acceptor, "_current", lambda self, epoch: self.votes)


def swaps_voters_directly(patch: Patch) -> None:
    def toward(self: Config, voters: list[Voter]) -> Config:
        return Config(self.epoch + 1, (), tuple(voters))

    patch.setattr(Config, "toward", toward)


def does_not_write_keys_again(patch: Patch) -> None:
    rewrite = Drivers._rewrite

    def skips(self: Drivers, drive: Drive) -> None:
        drive.keys.clear()
        rewrite(self, drive)

    patch.setattr(Drivers, "_rewrite", skips)


def has_no_ring(patch: Patch) -> None:
    def forgets(value: Value, wanted: list[Wanted], ballot: Any) -> Any:
        bare = Value(value.version, value.stamp, value.data)
        return change(bare, [replace(each, base=None) for each in wanted], ballot)

    patch.setattr(proposer_module, "change", forgets)


def uses_a_ballot_again(patch: Patch) -> None:
    """Keeps ballot and value after lost Accepts (Gryadka)."""
    failed = Proposer._failed

    def keeps(self: Proposer, register: Register, begun: Round, *, wait: bool = True) -> None:
        if begun.phase is Phase.ACCEPT and not begun.refused and begun.value is not None:
            register.cache = Cache(begun.ballot, begun.value, begun.config.epoch)
            for operation in begun.batch:
                operation.sent = False
        failed(self, register, begun, wait=wait)

    patch.setattr(Proposer, "_failed", keeps)


def collects_with_a_majority(patch: Patch) -> None:
    patch.setattr(Round, "enough", lambda self, kids: self.config.quorum(kids))


def drops_without_a_floor(patch: Patch) -> None:
    def drops(self: Acceptor, key: str, row: Row) -> None:
        del self.rows[key]
        self._fading.pop(key, None)
        self._context.persist(KEY_PREFIX + key, b"")

    patch.setattr(Acceptor, "_raise_floor", drops)


class SameBoot(Nexus):
    """Each process calls itself as the one before did, and numbers its requests like it."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.context.boot = self.context.nonce = self.context._rid = 1


def has_the_same_boot(patch: Patch) -> type[Nexus]:
    return SameBoot


def answers_before_the_sync(patch: Patch) -> None:
    take = Context.take

    def hasty(self: Context) -> list[Effect]:
        self._sent += self._after
        self._after = []
        return take(self)

    patch.setattr(Context, "take", hasty)


def starts_voting_with_old_records(patch: Patch) -> None:
    """A node that voted long ago votes again with what it had then (A5)."""
    patch.setattr(Acceptor, "_goes_on", lambda self, config: True)


def forgets_at_every_change(patch: Patch) -> None:
    """A voter that goes on voting starts without records as well (A5, the other way round)."""
    patch.setattr(Acceptor, "_goes_on", lambda self, config: False)


def tells_failures_without_keeping_them(patch: Patch) -> None:
    """V4: a copy of an operation succeeds after `no` was told."""

    def unkept(value: Value, wanted: list[Wanted], ballot: Any) -> Any:
        new, results = change(value, wanted, ballot)
        ring = tuple(entry for entry in new.ring if not entry.failed)
        if new is value or len(ring) == len(new.ring):
            return new, results
        if len(ring) == len(value.ring) and new.version == value.version:
            return value, results
        stamp = value.stamp + new.version - value.version
        return Value(new.version, stamp, new.data, ring), results

    patch.setattr(proposer_module, "change", unkept)


def applies_copies_of_any_age(patch: Patch) -> None:
    """F1: what was forwarded is applied whatever has left the ring."""
    receive = Forwarding.receive

    def careless(self: Forwarding, source: Any, message: Any) -> None:
        if isinstance(message, Forward):
            message = Forward(
                message.number,
                self._context.nonce,
                message.op,
                message.key,
                message.change,
                (1 << 62) - 1,
                message.left_ms,
            )
        receive(self, source, message)

    patch.setattr(Forwarding, "receive", careless)
    patch.setattr(values, "RING_MIN", 1)
    patch.setattr(values, "RING_SHARED", 1)
    patch.setattr(values, "RING_FACTOR", 1)


def counts_from_nothing(patch: Patch) -> None:
    """V3: a key that was deleted counts its versions from one again."""
    patch.setattr(rounds_module, "absent", lambda floor: Value(0, 0, None))


def busy(seed: int) -> Plan:
    """More changes of voters, more deletions."""
    plan = draw(seed)
    plan = replace(plan, duration_ms=300.0, operations=4)
    return replace(plan, nodes=5, voters=3, changes=3, core=False, deletes=0.3, keys=("a",))


def still(seed: int) -> Plan:
    """No changes of voters; one key, everybody at it."""
    return replace(draw(seed), nodes=5, voters=3, changes=0, operations=9, deletes=0.2, keys=("a",))


def falling(seed: int) -> Plan:
    """Nodes that crash all the time and are back before the answers to their former process."""
    plan = draw(seed)
    faults = replace(
        Faults(), crash=1500.0, down=(0.5, 3.0), drop=0.05, dup=0.1, reorder=0.1, delay=(5.0, 10.0)
    )
    faults = replace(faults, sync=(0.1, 0.5), clock=plan.faults.clock, jump=plan.faults.jump)
    return replace(
        plan, nodes=5, voters=3, changes=0, deletes=0.0, keys=("a",), operations=10, faults=faults
    )


def copied(seed: int) -> Plan:
    """Answers get lost and messages come twice or late: there are copies of many operations."""
    plan = still(seed)
    faults = replace(plan.faults, drop=0.2, dup=0.15, reorder=0.15, delay=(0.2, 8.0))
    return replace(plan, deletes=0.4, faults=faults, duration_ms=300.0)


MUTANTS: list[tuple[Plant, Callable[[int], Plan], int]] = [
    (answers_from_the_cache, still, 150),
    (does_not_write_back, still, 200),
    (does_not_check_epochs, busy, 60),
    (swaps_voters_directly, busy, 60),
    (does_not_write_keys_again, busy, 100),
    (has_no_ring, still, 60),
    (uses_a_ballot_again, still, 60),
    (collects_with_a_majority, still, 60),
    (drops_without_a_floor, still, 60),
    (has_the_same_boot, falling, 400),
    (answers_before_the_sync, still, 60),
    (starts_voting_with_old_records, busy, 300),
    (forgets_at_every_change, busy, 60),
    (tells_failures_without_keeping_them, copied, 250),
    (applies_copies_of_any_age, still, 60),
    (counts_from_nothing, still, 60),
]


@pytest.mark.parametrize(
    ("plant", "plans", "most"), MUTANTS, ids=[plant.__name__ for plant, _, _ in MUTANTS]
)
def test_each_planted_bug_is_caught(
    plant: Plant, plans: Callable[[int], Plan], most: int, monkeypatch: Patch
) -> None:
    machine = plant(monkeypatch) or Nexus
    summary = run(0, most, machine, plans)
    assert summary.failed is not None, f"{plant.__name__} survived: {summary.text()}"


@pytest.mark.parametrize("plans", [busy, still])
def test_the_unchanged_machine_passes_where_the_mutants_are_caught(
    plans: Callable[[int], Plan],
) -> None:
    summary = run(0, 60, Nexus, plans)
    assert summary.failed is None, summary.text()
    assert BATCH_MAX * 4 <= values.RING_MAX
