"""One node's Nexus among voters that are played by hand: rounds, cache, answers, forwarding."""

from __future__ import annotations

from random import Random
from typing import Any

from manifold.kernel import rendezvous
from manifold.kernel.effects import Persist, Reply, Send, SetTimer
from manifold.kernel.nexus.ballots import ZERO, Ballot, following
from manifold.kernel.nexus.configs import Config, Voter, first_config
from manifold.kernel.nexus.context import Timing
from manifold.kernel.nexus.messages import (
    CONFIG_KEY,
    Accept,
    Accepted,
    Answer,
    Forward,
    Forwarded,
    Full,
    Nack,
    Operate,
    Prepare,
    Promise,
    Read,
    ReadReply,
    Seal,
    SetVoters,
    Stale,
)
from manifold.kernel.nexus.protocol import Nexus
from manifold.kernel.nexus.values import Add, CasValue, Change, Get, Put, Value
from manifold.vm.kid import Kid, kid_of

ME = kid_of(b"me")
KIDS = tuple(sorted(kid_of(b"voter %d" % number) for number in range(3)))
CONFIG = first_config([Voter(kid, 7) for kid in KIDS])


class Bench:
    """The node, and what it has said since it was last asked."""

    def __init__(self) -> None:
        self.node = Nexus(ME, 1, {}, Random(1), Timing())
        self.now_ms = 0.0
        self.sent: list[Send] = []
        self.replies: list[Answer] = []
        self.timer_ms = 0.0
        self._carry_out(self.node.start(0.0))
        self.node.proposer.adopt(CONFIG)

    def _carry_out(self, effects: list[Any]) -> None:
        assert sum(isinstance(effect, Persist) for effect in effects) <= 1
        for effect in effects:
            if isinstance(effect, Send):
                self.sent.append(effect)
            elif isinstance(effect, Reply):
                assert isinstance(effect.message, Answer)
                self.replies.append(effect.message)
            elif isinstance(effect, SetTimer):
                self.timer_ms = effect.at_ms

    def ask(self, change: Change, op: str = "o", key: str = "k", **named: Any) -> None:
        request = Operate(op, key, change, **named)  # type: ignore[arg-type]
        self._carry_out(self.node.request(1, request, self.now_ms))

    def hear(self, source: Kid, message: Any) -> None:
        self._carry_out(self.node.receive(source, message, self.now_ms))

    def wait(self, for_ms: float) -> None:
        end_ms = self.now_ms + for_ms
        while self.timer_ms <= end_ms:
            self.now_ms = max(self.now_ms, self.timer_ms)
            self.timer_ms = float("inf")  # unless it asks for another
            self._carry_out(self.node.tick(self.now_ms))
        self.now_ms = end_ms

    def take(self, kind: type) -> list[Any]:
        """Messages of that kind to voters; the rest is forgotten."""
        found = [send.message for send in self.sent if isinstance(send.message, kind)]
        self.sent.clear()
        return found

    def promise(self, prepare: Prepare, value: Value | None = None, n: int = 0) -> None:
        accepted = Ballot(n, KIDS[0], 1, 1) if n else ZERO
        for kid in KIDS[:2]:
            self.hear(kid, Promise(prepare.rid, accepted, value, ZERO))

    def accept(self, accept: Accept, *, kept: bool = True) -> None:
        promised = following(accept.ballot) if kept else accept.ballot
        for kid in KIDS[:2]:
            self.hear(kid, Accepted(accept.rid, promised))


def test_a_write_prepares_accepts_and_is_answered_by_a_quorum() -> None:
    bench = Bench()
    bench.ask(Put(5))
    (prepare, *others) = bench.take(Prepare)
    assert len(others) == 2 and prepare.epoch == CONFIG.epoch
    bench.promise(prepare)
    accept = bench.take(Accept)[0]
    assert accept.value.data == 5 and accept.ballot == prepare.ballot and not bench.replies
    bench.hear(KIDS[0], Accepted(accept.rid, accept.ballot))
    bench.hear(KIDS[0], Accepted(accept.rid, accept.ballot))
    assert not bench.replies  # one voter twice is one voter
    bench.hear(KIDS[2], Accepted(accept.rid, accept.ballot))
    (answer,) = bench.replies
    assert (answer.status, answer.version, answer.strength) == ("ok", 1, "quorum")


def test_the_second_write_takes_one_round_and_a_failed_one_still_asks_the_voters() -> None:
    bench = Bench()
    bench.ask(Put(5), "a")
    bench.promise(bench.take(Prepare)[0])
    first = bench.take(Accept)[0]
    bench.accept(first)
    bench.ask(CasValue(99, 1), "b")
    second = bench.take(Accept)[0]
    assert second.ballot == following(first.ballot) and second.value == first.value
    assert len(bench.replies) == 1  # P2: the cache does not answer
    bench.accept(second)
    assert (bench.replies[1].status, bench.replies[1].data) == ("no", 5)


def test_without_a_kept_promise_of_a_quorum_there_is_no_second_round_saved() -> None:
    bench = Bench()
    bench.ask(Put(5), "a")
    bench.promise(bench.take(Prepare)[0])
    bench.accept(bench.take(Accept)[0], kept=False)
    bench.ask(Put(6), "b")
    assert bench.take(Prepare)


def test_after_a_lost_accept_the_ballot_is_burnt_and_the_operation_found_in_the_ring() -> None:
    """Gryadka's bug: the cached ballot is used again with another value."""
    bench = Bench()
    bench.ask(Add(1), "a")
    bench.promise(bench.take(Prepare)[0])
    lost = bench.take(Accept)[0]
    bench.wait(80.0)
    again = bench.take(Prepare)[0]
    assert again.ballot > lost.ballot
    bench.promise(again, lost.value, lost.ballot.n)  # it had been accepted after all
    assert (bench.replies[0].status, bench.replies[0].data) == ("ok", 1)
    assert not bench.take(Accept)  # and both report it with one ballot


def test_a_read_is_answered_in_one_round_only_where_a_quorum_agrees() -> None:
    value = Value(3, 3, 7)
    one, other = Ballot(4, KIDS[0], 1, 1), Ballot(5, KIDS[1], 1, 1)
    bench = Bench()
    bench.ask(Get())
    read = bench.take(Read)[0]
    bench.hear(KIDS[0], ReadReply(read.rid, one, value, ZERO))
    bench.hear(KIDS[1], ReadReply(read.rid, other, Value(4, 4, 8), ZERO))
    assert not bench.replies
    bench.hear(KIDS[2], ReadReply(read.rid, one, value, ZERO))
    prepare = bench.take(Prepare)[0]  # the newest may be chosen or not: it is written back
    for kid, ballot, data in ((KIDS[0], one, value), (KIDS[1], other, Value(4, 4, 8))):
        bench.hear(kid, Promise(prepare.rid, ballot, data, ZERO))
    accept = bench.take(Accept)[0]
    assert accept.value == Value(4, 4, 8)
    bench.accept(accept)
    assert bench.replies[0].data == 8


def test_an_unknown_fate_is_maybe_and_what_was_never_proposed_is_unavailable() -> None:
    bench = Bench()
    bench.ask(Put(1), "a", timeout_ms=100.0)
    bench.wait(400.0)
    assert bench.replies.pop().status == "unavailable"
    bench.take(Prepare)
    bench.ask(Put(1), "b", timeout_ms=100.0)
    bench.promise(bench.take(Prepare)[0])
    assert bench.take(Accept)
    bench.wait(2000.0)
    answer = bench.replies.pop()
    assert (answer.status, answer.strength) == ("maybe", "none")
    assert set(answer.missing) == set(KIDS)


def test_a_new_key_is_refused_where_a_majority_is_full() -> None:
    bench = Bench()
    bench.ask(Put(1))
    rid = bench.take(Prepare)[0].rid
    bench.hear(KIDS[0], Full(rid))
    assert not bench.replies
    bench.hear(KIDS[1], Full(rid))
    assert bench.replies[0].status == "busy"


def test_a_retry_without_a_base_is_only_looked_up() -> None:
    bench = Bench()
    bench.ask(Add(1), "a", retry=True)
    bench.promise(bench.take(Prepare)[0])
    assert not bench.take(Accept) and bench.replies[0].status == "maybe"


def test_it_follows_a_voter_that_is_ahead_and_seals_one_that_is_behind() -> None:
    bench = Bench()
    ahead = CONFIG.toward([Voter(kid, 7) for kid in KIDS[:2]])
    bench.ask(Put(1))
    rid = bench.take(Prepare)[0].rid
    bench.hear(KIDS[0], Stale(rid, ahead, 7))
    assert bench.node.config == ahead
    assert bench.take(Prepare)[0].epoch == ahead.epoch
    bench.hear(KIDS[1], Stale(rid, CONFIG, 7))
    assert [each.config for each in bench.take(Seal)] == [ahead]
    bench.hear(KIDS[1], Stale(rid, CONFIG, 8))  # another disk: no voter of ours
    bench.hear(KIDS[1], Stale(rid, Config(5, (), ahead.new), 7))  # another cluster
    assert not bench.take(Seal)


def contended() -> tuple[Bench, Kid]:
    """A node that knows that somebody else proposes the key, and whom to ask."""
    bench = Bench()
    other = next(
        kid for kid in (kid_of(b"peer %d" % n) for n in range(100)) if _prefers(bench, kid)
    )
    bench.node.node_up(other, 0.0)
    bench.ask(Put(1), "first")
    prepare = bench.take(Prepare)[0]
    for kid in KIDS[:2]:
        bench.hear(kid, Nack(prepare.rid, Ballot(9, other, 1, 1)))
    return bench, other


def _prefers(bench: Bench, kid: Kid) -> bool:
    return rendezvous.first("k", sorted([ME, kid])) == kid


def test_a_contended_key_is_forwarded_with_a_base_that_is_learnt_first() -> None:
    bench, other = contended()
    (first,) = bench.take(Forward)
    assert (first.op, first.base, first.process) == ("first", -1, 0)
    bench.hear(other, Forwarded(first.number, 77, "rebase", 12, 20))
    (second,) = bench.take(Forward)
    assert (second.base, second.process) == (20, 77) and second.number > first.number
    bench.hear(other, Forwarded(second.number, 77, "ok", 13, 21))
    assert (bench.replies[0].status, bench.replies[0].version) == ("ok", 13)
    bench.ask(Add(1), "next")
    assert bench.take(Forward)[0].base == 21


def test_a_rebase_is_not_obeyed_once_the_operation_may_have_been_applied() -> None:
    """F2: from another process than the one that was asked, or with two transmissions out."""
    bench, other = contended()
    bench.hear(other, Forwarded(bench.take(Forward)[0].number, 77, "rebase", 12, 20))
    (sent,) = bench.take(Forward)
    bench.hear(other, Forwarded(sent.number, 78, "rebase", 400, 400))
    assert not bench.take(Forward)
    bench.wait(2 * 60.0 + 1.0)
    (again,) = bench.take(Forward)
    bench.hear(other, Forwarded(again.number, 77, "rebase", 400, 400))
    assert not bench.take(Forward)


def test_after_two_timeouts_it_proposes_itself() -> None:
    bench, _ = contended()
    bench.take(Forward)
    bench.wait(130.0)
    assert len(bench.take(Forward)) == 1
    bench.wait(130.0)
    assert bench.take(Prepare)


def test_a_node_that_is_down_gives_its_operations_back_at_once() -> None:
    bench, other = contended()
    bench.take(Forward)
    bench._carry_out(bench.node.node_down(other, bench.now_ms))
    bench.wait(20.0)  # the back-off of its own refused round
    assert bench.take(Prepare)


def test_a_forwarded_operation_is_applied_only_by_the_process_that_it_names() -> None:
    bench = Bench()
    peer, nonce = kid_of(b"peer"), bench.node.context.nonce
    bench.hear(peer, Forward(1, nonce + 1, "o", "k", Put(3), 0, 500.0))
    bench.promise(bench.take(Prepare)[0])
    (told,) = bench.take(Forwarded)
    assert (told.status, told.process) == ("rebase", nonce)
    bench.hear(peer, Forward(2, nonce, "o", "k", Put(3), told.stamp, 500.0))
    bench.promise(bench.take(Prepare)[0])
    accept = bench.take(Accept)[0]
    assert accept.value.data == 3
    bench.accept(accept)
    assert [each.status for each in bench.take(Forwarded)] == ["ok"]


def test_the_config_register_is_not_for_clients_to_write() -> None:
    bench = Bench()
    bench.ask(Put(1), key=CONFIG_KEY)
    assert bench.replies[0].status == "refused" and not bench.take(Prepare)


def test_voters_cannot_be_changed_before_there_are_some() -> None:
    node = Nexus(ME, 1, {}, Random(1), Timing())
    node.start(0.0)
    (reply,) = (each for each in node.request(3, SetVoters(KIDS), 0.0) if isinstance(each, Reply))
    assert isinstance(reply.message, Answer) and reply.message.status == "refused"
