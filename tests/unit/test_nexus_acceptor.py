"""One acceptor by hand: the rules of CASPaxos, epochs, floors, restarts."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from manifold.kernel.effects import Persist, Send
from manifold.kernel.nexus import acceptor as acceptor_module
from manifold.kernel.nexus.acceptor import shard_of
from manifold.kernel.nexus.ballots import ZERO, Ballot, following
from manifold.kernel.nexus.configs import Config, Voter, first_config
from manifold.kernel.nexus.context import Timing
from manifold.kernel.nexus.messages import (
    KEY_PREFIX,
    SHARDS,
    Accept,
    Accepted,
    Collapse,
    Drop,
    Full,
    Greeting,
    Hello,
    Nack,
    Prepare,
    Promise,
    Read,
    ReadReply,
    Scan,
    Scanned,
    Seal,
    Sealed,
    Stale,
)
from manifold.kernel.nexus.protocol import Nexus
from manifold.kernel.nexus.values import Value
from manifold.vm.kid import kid_of

ME, OTHER, THIRD = kid_of(b"me"), kid_of(b"other"), kid_of(b"third")
VALUE = Value(1, 1, 5)
DEAD = Value(2, 2, None)


def ballot(n: int, node: str = OTHER) -> Ballot:
    return Ballot(n, node, 1, 9)


class Bench:
    """A node, its disk, and what it answers to `OTHER`."""

    def __init__(self, disk: dict[str, bytes] | None = None) -> None:
        self.disk = dict(disk or {})
        self.node = Nexus(ME, 1, self.disk, Random(1), Timing())
        self._carry_out(self.node.start(0.0))
        acceptor = self.node.acceptor
        self.voters = (Voter(ME, acceptor.disk), Voter(OTHER, 2), Voter(THIRD, 3))
        self.config = acceptor.config or first_config(self.voters)

    def seal(self, config: Config | None = None, floors: tuple[Ballot, ...] = ()) -> Any:
        self.config = config or self.config
        return self.say(Seal(1, self.config, floors))

    def say(self, message: Any, source: Any = OTHER) -> Any:
        """The last answer to who asked; a message to itself is delivered as well."""
        answers = self._carry_out(self.node.receive(source, message, 1.0))
        told = None
        for send in answers:
            if send.to == ME and isinstance(send.message, Drop):
                self.say(send.message, ME)
            elif send.to == source:
                told = send.message
        return told

    def _carry_out(self, effects: list[Any]) -> list[Send]:
        kinds = [type(effect) for effect in effects]
        assert kinds.count(Persist) <= 1, "X1"
        for effect in effects:
            if isinstance(effect, Persist):
                self.disk[effect.name] = effect.record
        return [effect for effect in effects if isinstance(effect, Send)]

    def restart(self) -> Bench:
        return Bench(self.disk)

    def prepare(self, n: int, key: str = "k", **named: Any) -> Any:
        return self.say(Prepare(n, self.config.epoch, key, ballot(n, **named)))

    def accept(self, n: int, value: Value = VALUE, *, key: str = "k", keep: bool = False) -> Any:
        return self.say(Accept(100 + n, self.config.epoch, key, ballot(n), value, keep))

    def read(self, key: str = "k") -> Any:
        return self.say(Read(7, self.config.epoch, key))


@pytest.fixture
def bench() -> Bench:
    made = Bench()
    assert isinstance(made.seal(), Sealed)
    return made


def test_it_promises_a_higher_ballot_once_and_refuses_the_same_and_lower_ones(
    bench: Bench,
) -> None:
    assert bench.prepare(3) == Promise(3, ZERO, None, ZERO)
    assert bench.prepare(3) == Nack(3, ballot(3))
    assert bench.prepare(2) == Nack(2, ballot(3))
    assert isinstance(bench.prepare(4), Promise)


def test_it_accepts_what_it_promised_and_answers_a_copy_again(bench: Bench) -> None:
    bench.prepare(3)
    assert bench.accept(2) == Nack(102, ballot(3))
    assert bench.accept(3) == Accepted(103, ballot(3))
    assert bench.accept(3) == Accepted(103, ballot(3))
    assert bench.accept(5) == Accepted(105, ballot(5))  # the cache's way: no prepare before it
    assert bench.prepare(6) == Promise(6, ballot(5), VALUE, ZERO)
    assert bench.read() == ReadReply(7, ballot(5), VALUE, ZERO)


def test_it_refuses_a_prepare_below_what_it_accepted_without_promising(bench: Bench) -> None:
    """scylladb#6139: both promised and accepted are compared."""
    bench.accept(5)
    assert bench.prepare(5, node="zzz") == Nack(5, ballot(5))  # a larger n is asked for
    assert bench.accept(4) == Nack(104, ballot(5))


def test_keep_promises_the_following_ballot_to_the_same_proposer(bench: Bench) -> None:
    assert bench.accept(5, keep=True) == Accepted(105, following(ballot(5)))
    assert bench.prepare(6, node="A") == Nack(6, ballot(6))
    assert bench.accept(6) == Accepted(106, ballot(6))


def test_each_answer_stands_after_the_record_it_tells_of(bench: Bench) -> None:
    for message in (
        Prepare(1, bench.config.epoch, "k", ballot(3)),
        Prepare(2, bench.config.epoch, "k", ballot(2)),
        Accept(3, bench.config.epoch, "k", ballot(3), VALUE, False),
        Read(4, bench.config.epoch, "k"),
        Read(5, bench.config.epoch, "missing"),
        Hello(6),
    ):
        kinds = [type(effect) for effect in bench.node.receive(OTHER, message, 1.0)]
        assert kinds.index(Persist) < kinds.index(Send)


def test_promises_and_values_survive_a_restart(bench: Bench) -> None:
    bench.accept(5, keep=True)
    again = bench.restart()
    assert again.prepare(6) == Nack(6, ballot(6))
    assert again.read() == ReadReply(7, ballot(5), VALUE, ZERO)


def test_it_answers_its_own_epoch_only(bench: Bench) -> None:
    for epoch in (bench.config.epoch - 1, bench.config.epoch + 1):
        answer = bench.say(Prepare(1, epoch, "k", ballot(9)))
        assert answer == Stale(1, bench.config, bench.node.acceptor.disk)
    joint = bench.config.toward(bench.voters[:2])
    assert isinstance(bench.seal(joint), Sealed)
    assert isinstance(bench.say(Seal(2, first_config(bench.voters))), Stale)  # never back
    assert bench.say(Accept(3, joint.epoch - 1, "k", ballot(9), VALUE, False)).config == joint


def test_a_node_that_is_not_listed_with_its_disk_does_not_vote(bench: Bench) -> None:
    fresh = Bench()
    fresh.config = first_config((Voter(ME, 12345), Voter(OTHER, 2)))
    assert isinstance(fresh.seal(), Stale)
    assert isinstance(fresh.prepare(3), Stale)
    lost = Bench()  # the same node with an empty disk
    lost.disk.clear()
    other = Nexus(ME, 2, {}, Random(99), Timing())
    other.start(0.0)
    answer = other.receive(OTHER, Seal(1, bench.config), 1.0)[-1]
    assert isinstance(answer, Send) and isinstance(answer.message, Stale)


def test_a_second_cluster_cannot_take_a_voter_over(bench: Bench) -> None:
    foreign = first_config((bench.voters[0], Voter(kid_of(b"elsewhere"), 8)))
    assert foreign.origin != bench.config.origin
    assert bench.say(Seal(2, foreign)) == Stale(2, bench.config, bench.node.acceptor.disk)


def test_records_stay_through_a_change_that_keeps_the_voter(bench: Bench) -> None:
    bench.accept(5)
    joint = bench.config.toward(bench.voters[:2])
    bench.seal(joint)
    bench.seal(joint.settled())
    assert bench.read() == ReadReply(7, ballot(5), VALUE, ZERO)


def test_a_voter_that_missed_an_epoch_or_was_out_starts_without_records(bench: Bench) -> None:
    """A5: nobody counted on it meanwhile, and what it has may be long deleted."""
    bench.accept(5)
    joint = bench.config.toward(bench.voters[:2])
    bench.seal(joint.settled())
    assert bench.read() == ReadReply(7, ZERO, None, ZERO)
    again = bench.restart()  # on disk the old record still lies there
    assert again.disk[KEY_PREFIX + "k"] and again.read() == ReadReply(7, ZERO, None, ZERO)


def test_a_tombstone_collapses_to_its_floor_and_late_accepts_die_on_it(bench: Bench) -> None:
    bench.accept(5, DEAD)
    bench.prepare(8)
    bench.say(Collapse(bench.config.epoch, "k", ballot(4)))
    assert bench.read().accepted == ballot(5)  # it is not that tombstone any more
    bench.say(Collapse(bench.config.epoch, "k", ballot(5)))
    assert bench.disk[KEY_PREFIX + "k"] == b""
    assert bench.read() == ReadReply(7, ZERO, None, ballot(8))
    assert bench.accept(7) == Nack(107, ballot(8))
    again = bench.restart()
    assert again.prepare(8, node="zzz") == Nack(8, ballot(8))
    assert again.prepare(9) == Promise(9, ZERO, None, ballot(8))


def test_the_floor_is_durable_before_the_record_goes(bench: Bench) -> None:
    bench.accept(5, DEAD)
    effects = bench.node.receive(OTHER, Collapse(bench.config.epoch, "k", ballot(5)), 1.0)
    persist, drop = (each for each in effects if isinstance(each, Persist | Send))
    assert isinstance(persist, Persist) and persist.name == "x.voter"
    assert isinstance(drop, Send) and drop.to == ME and isinstance(drop.message, Drop)
    bench.say(drop.message)  # it obeys that only from itself
    assert bench.read().value == DEAD


def test_nothing_collapses_while_voters_change_or_lives(bench: Bench) -> None:
    bench.accept(5)
    bench.say(Collapse(bench.config.epoch, "k", ballot(5)))
    assert bench.read().value == VALUE
    bench.accept(6, DEAD)
    bench.seal(bench.config.toward(bench.voters[:2]))
    bench.say(Collapse(bench.config.epoch, "k", ballot(6)))
    assert bench.read().value == DEAD


def test_floors_are_installed_and_only_rise(bench: Bench) -> None:
    floors = tuple(ballot(4) if shard == shard_of("k") else ZERO for shard in range(SHARDS))
    assert bench.seal(floors=floors).floors == floors
    assert bench.seal(floors=(ZERO,) * SHARDS).floors == floors
    assert bench.prepare(4, node="zzz") == Nack(4, ballot(4))
    assert isinstance(bench.prepare(5), Promise)


def test_a_scan_lists_accepted_keys_in_pages(bench: Bench) -> None:
    for number in range(600):
        bench.accept(1, key=f"{number:04}")
    bench.prepare(3, key="promised-only")
    first = bench.say(Scan(1, bench.config.epoch, ""))
    assert isinstance(first, Scanned) and len(first.keys) == 512 and not first.last
    rest = bench.say(Scan(2, bench.config.epoch, first.keys[-1]))
    assert (len(rest.keys), rest.last) == (88, True)


def test_a_promise_that_nobody_used_becomes_a_floor(bench: Bench) -> None:
    bench.prepare(6)
    assert bench.node.acceptor.sweep(0.0) is None
    for effect in bench.node._close():
        if isinstance(effect, Persist):
            bench.disk[effect.name] = effect.record
        elif isinstance(effect, Send) and isinstance(effect.message, Drop):
            bench.say(effect.message, ME)
    assert "k" not in bench.node.acceptor.rows
    assert bench.prepare(6) == Nack(6, ballot(6))


def test_a_voter_that_is_full_takes_no_further_keys_and_goes_on_with_those_it_has(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.accept(5, key="one")
    monkeypatch.setattr(acceptor_module, "ROWS_MAX", 1)
    assert bench.prepare(6, key="two") == Full(6)
    assert isinstance(bench.prepare(6, key="one"), Promise)


def test_after_a_failed_sync_it_is_silent(bench: Bench) -> None:
    bench.node.storage_failed(1.0)
    assert bench.prepare(3) is None and bench.say(Hello(1)) is None


def test_a_greeting_tells_the_disk_and_what_is_sealed(bench: Bench) -> None:
    acceptor = bench.node.acceptor
    assert bench.say(Hello(4)) == Greeting(4, acceptor.disk, bench.config)
    assert bench.restart().node.acceptor.disk == acceptor.disk
