"""What a node's Nexus says of itself and of the keys, what it refuses, what it costs at rest."""

from __future__ import annotations

from random import Random
from typing import Any

import msgspec

from manifold.kernel import rendezvous
from manifold.kernel.effects import Persist, Reply, Send, SetTimer
from manifold.kernel.nexus import listing
from manifold.kernel.nexus.ballots import ZERO, Ballot
from manifold.kernel.nexus.configs import Config, Voter, final_epoch, first_config
from manifold.kernel.nexus.context import Pace, Timing
from manifold.kernel.nexus.forwarding import TRIED_MAX
from manifold.kernel.nexus.messages import (
    KNOWN_NAME,
    VOTER_NAME,
    Accept,
    Accepted,
    Answer,
    Changed,
    Forward,
    Forwarded,
    GetNexus,
    Greeting,
    Hello,
    List,
    Listing,
    Nack,
    NexusInfo,
    Operate,
    Prepare,
    Promise,
    Read,
    ReadReply,
    Scan,
    Scanned,
    Seal,
    Sealed,
    Seek,
    SetVoters,
    Stale,
    Tell,
    Watch,
)
from manifold.kernel.nexus.proposer import NO_VOTERS
from manifold.kernel.nexus.protocol import ASK_MOST_MS, ASK_MS, KNOWN_MS, Nexus
from manifold.kernel.nexus.values import FENCED, Add, Change, Effect, Get, Put, Value
from manifold.kernel.nexus.voters import OVERTAKEN
from manifold.vm.kid import Kid, kid_of

ME = kid_of(b"me")
KIDS = tuple(sorted(kid_of(b"voter %d" % number) for number in range(3)))
CONFIG = first_config([Voter(kid, 7) for kid in KIDS])
VALUE = Value(3, 3, 7)


class Bench:
    """One node, its disk, its timer, and what it has said since it was last asked."""

    def __init__(self, *, known: bool = True, me: Kid = ME) -> None:
        self.node = Nexus(me, 1, {}, Random(1), Timing())
        self.now_ms = 0.0
        self.sent: list[Send] = []
        self.replies: list[Any] = []
        self.disk: dict[str, bytes] = {}
        self.timer_ms = float("inf")
        self._carry_out(self.node.start(0.0))
        if known:
            self.hear(KIDS[0], Tell(1, CONFIG))

    def _carry_out(self, effects: list[Any]) -> None:
        assert sum(isinstance(effect, Persist) for effect in effects) <= 1
        for effect in effects:
            match effect:
                case Send():
                    self.sent.append(effect)
                case Reply(message=message):
                    self.replies.append(message)
                case SetTimer(at_ms=at_ms):
                    self.timer_ms = at_ms
                case Persist(name=name, record=record):
                    self.disk[name] = record

    def ask(self, request: Any) -> None:
        self._carry_out(self.node.request(1, request, self.now_ms))

    def operate(self, change: Change, op: str = "o", **named: Any) -> None:
        self.ask(Operate(op, "k", change, **named))  # type: ignore[arg-type]

    def hear(self, source: Kid, message: Any) -> None:
        self._carry_out(self.node.receive(source, message, self.now_ms))

    def up(self, kid: Kid) -> None:
        self._carry_out(self.node.node_up(kid, self.now_ms))

    def down(self, kid: Kid) -> None:
        self._carry_out(self.node.node_down(kid, self.now_ms))

    def wait(self, for_ms: float) -> int:
        """How often it woke."""
        end_ms, ticks = self.now_ms + for_ms, 0
        while self.timer_ms <= end_ms:
            self.now_ms, self.timer_ms = max(self.now_ms, self.timer_ms), float("inf")
            self._carry_out(self.node.tick(self.now_ms))
            ticks += 1
        self.now_ms = end_ms
        return ticks

    def take(self, kind: type) -> list[Any]:
        """Messages of that kind; the rest is forgotten."""
        found = [send.message for send in self.sent if isinstance(send.message, kind)]
        self.sent.clear()
        return found


# -- at rest --------------------------------------------------------------------------------------


def test_a_fresh_node_makes_nothing_durable_and_sets_no_timer() -> None:
    bench = Bench(known=False)
    assert not bench.disk and bench.timer_ms == float("inf") and not bench.sent


def test_it_says_which_voter_it_is_only_once_that_is_durable() -> None:
    bench = Bench(known=False)
    effects = bench.node.receive(KIDS[0], Hello(3), 1.0)
    kinds = [type(effect) for effect in effects]
    assert kinds.index(Persist) < kinds.index(Send)
    (persist,) = (effect for effect in effects if isinstance(effect, Persist))
    again = Nexus(ME, 2, {VOTER_NAME: persist.record}, Random(2), Timing())
    assert again.acceptor.disk == bench.node.acceptor.disk


def test_a_node_without_a_vote_that_knows_the_voters_sleeps_for_ever() -> None:
    bench = Bench()
    assert VOTER_NAME not in bench.disk and KNOWN_NAME not in bench.disk
    bench.wait(KNOWN_MS + 1.0)
    assert KNOWN_NAME in bench.disk
    bench.sent.clear()
    assert bench.wait(3_600_000.0) == 0 and not bench.sent


def test_a_voter_writes_down_who_votes_at_once_and_then_only_looks_after_changes() -> None:
    bench = Bench(known=False)
    config = first_config([Voter(ME, bench.node.acceptor.disk), *CONFIG.new[:2]])
    bench.hear(KIDS[0], Seal(1, config))
    bench.wait(1.0)
    assert KNOWN_NAME in bench.disk and VOTER_NAME in bench.disk
    bench.wait(20_000.0)
    assert bench.wait(600_000.0) < 100 * 120  # mostly the timeouts of looks that nobody answers


def test_after_the_last_operation_it_falls_asleep() -> None:
    bench = Bench()
    bench.operate(Get(), timeout_ms=200.0)
    read = bench.take(Read)[0]
    for kid in KIDS[:2]:
        bench.hear(kid, ReadReply(read.rid, Ballot(1, KIDS[0], 1, 1), VALUE, ZERO))
    assert bench.replies[0].data == 7
    bench.wait(KNOWN_MS + 10.0)
    assert bench.wait(3_600_000.0) == 0


def test_it_asks_for_voters_less_and_less_often_until_somebody_comes_up() -> None:
    bench = Bench(known=False)
    bench.up(KIDS[0])
    bench.wait(60_000.0)
    first = len(bench.take(Seek))
    assert 12 <= first <= 20
    bench.wait(60_000.0)
    assert len(bench.take(Seek)) == 60_000 / ASK_MOST_MS
    bench.up(KIDS[1])
    bench.wait(ASK_MOST_MS + 2 * ASK_MS + 1.0)
    assert len(bench.take(Seek)) >= 2
    bench.hear(KIDS[1], Tell(4, CONFIG))
    bench.wait(60_000.0)
    assert not bench.take(Seek) and bench.node.config == CONFIG


def test_it_asks_who_votes_where_those_that_it_knows_of_have_left() -> None:
    """Voters that leave have others vote; who is not told by then can ask none of them any more."""
    bench = Bench()
    other = kid_of(b"other")
    for kid in (*KIDS, other):
        bench.up(kid)
    bench.down(KIDS[0])
    bench.wait(60_000.0)
    assert not bench.take(Seek), "a majority is there"
    bench.down(KIDS[1])
    bench.wait(ASK_MS + 1.0)
    assert bench.take(Seek)
    later = CONFIG.toward([Voter(other, 9)]).settled()
    bench.hear(other, Tell(2, later))
    assert bench.node.config == later
    bench.take(Seek)
    bench.wait(60_000.0)
    assert not bench.take(Seek)


def test_whoever_knows_the_voters_tells_them_and_the_others_are_silent() -> None:
    bench = Bench()
    bench.sent.clear()
    bench.hear(KIDS[0], Seek(9))
    assert bench.take(Tell) == [Tell(9, CONFIG)] and not bench.disk
    ignorant = Bench(known=False)
    ignorant.hear(KIDS[0], Seek(9))
    assert not ignorant.sent and not ignorant.disk


# -- answers --------------------------------------------------------------------------------------


def test_without_voters_whatever_needs_them_says_how_to_make_some() -> None:
    bench = Bench(known=False)
    bench.operate(Get(), timeout_ms=100.0)
    bench.operate(Put(1), "p", timeout_ms=100.0)
    bench.operate(Get(), "s", timeout_ms=100.0, stale=True)
    bench.ask(Watch("k", 100.0))
    bench.ask(List(timeout_ms=100.0))
    bench.wait(1000.0)
    assert len(bench.replies) == 5
    for each in bench.replies:
        assert each.why == NO_VOTERS and each.strength == "none"
        assert isinstance(each, Listing) or each.status == "unavailable"
    assert "`manifold nexus init`" in NO_VOTERS


def test_what_is_unavailable_names_the_voters_that_did_not_answer() -> None:
    bench = Bench()
    bench.operate(Put(1), timeout_ms=100.0)
    bench.ask(Watch("k", 100.0))
    bench.ask(List(timeout_ms=100.0))
    for prepare in bench.take(Prepare)[:1]:
        bench.hear(KIDS[1], Promise(prepare.rid, ZERO, None, ZERO))
    bench.wait(1000.0)
    for each in bench.replies:
        assert {KIDS[0], KIDS[2]} <= set(each.missing) <= set(KIDS) and each.strength == "none"
    assert len(bench.replies) == 3


def test_a_watch_that_cannot_read_what_is_there_ends_with_an_answer() -> None:
    bench = Bench()
    bench.ask(Watch("k", 100.0))
    bench.wait(1000.0)
    (answer,) = bench.replies
    assert isinstance(answer, Answer) and answer.status == "unavailable"
    bench.wait(20_000.0)
    bench.sent.clear()
    bench.wait(20_000.0)
    assert not bench.sent and len(bench.replies) == 1


def test_a_stale_watch_begins_with_what_one_voter_knows_and_goes_on_with_what_is_sure() -> None:
    bench = Bench()
    bench.ask(Watch("k", 5000.0, stale=True))
    one, other = Ballot(9, KIDS[0], 1, 1), Ballot(8, KIDS[1], 1, 1)

    def answer(kid: Kid, ballot: Ballot, value: Value) -> None:
        for read in bench.take(Read):
            bench.hear(kid, ReadReply(read.rid, ballot, value, ZERO))

    answer(KIDS[0], one, Value(9, 9, 99))  # accepted by one, perhaps never chosen
    for _ in range(20):
        bench.wait(50.0)
        if bench.replies:
            break
    (first,) = bench.replies
    assert first == Changed("k", 9, 99, "stale", first.missing) and KIDS[1] in first.missing
    for _ in range(400):
        bench.wait(20.0)
        for send in bench.sent:
            if isinstance(send.message, Read) and send.to in KIDS[1:]:
                reply = ReadReply(send.message.rid, other, Value(8, 8, 88), ZERO)
                bench.hear(Kid(send.to), reply)
            elif isinstance(send.message, Prepare) and send.to in KIDS[1:]:
                bench.hear(Kid(send.to), Promise(send.message.rid, other, Value(8, 8, 88), ZERO))
        bench.sent.clear()
        if len(bench.replies) > 1:
            break
    assert bench.replies[1] == Changed("k", 8, 88)  # though its version is lower


def test_mismatches_and_fences_are_told_apart_by_why() -> None:
    bench = Bench()
    bench.operate(Effect("job", 0, 0, Add(1)))
    prepare = bench.take(Prepare)[0]
    for kid in KIDS[:2]:
        bench.hear(kid, Promise(prepare.rid, ZERO, None, ZERO))
    (answer,) = bench.replies
    assert (answer.status, answer.why, answer.strength) == ("refused", FENCED, "quorum")
    assert not bench.take(Accept)


# -- lists ----------------------------------------------------------------------------------------


def test_a_list_is_the_union_of_what_a_quorum_holds_in_order() -> None:
    bench = Bench()
    bench.ask(List("a/"))
    scans = bench.take(Scan)
    assert [(each.prefix, each.after) for each in scans] == [("a/", "")] * 3
    rid = scans[0].rid
    bench.hear(KIDS[0], Scanned(rid, ("a/1", "a/3"), True))
    bench.hear(kid_of(b"nobody"), Scanned(rid, ("a/9",), True))
    assert not bench.replies
    bench.hear(KIDS[2], Scanned(rid, ("a/2", "a/3"), True))
    assert bench.replies == [Listing(("a/1", "a/2", "a/3"))]
    bench.hear(KIDS[1], Scanned(rid, ("a/4",), True))
    assert len(bench.replies) == 1


def test_a_list_ends_where_the_first_page_does_and_at_its_limit() -> None:
    bench = Bench()
    bench.ask(List(limit=3))
    rid = bench.take(Scan)[0].rid
    bench.hear(KIDS[0], Scanned(rid, ("a", "b"), False))  # after b it may hold more
    bench.hear(KIDS[1], Scanned(rid, ("a", "c"), True))
    assert bench.replies == [Listing(("a", "b"), True)]
    bench.ask(List(after="b", limit=1))
    scan = bench.take(Scan)[0]
    assert scan.after == "b"
    bench.hear(KIDS[0], Scanned(scan.rid, ("d",), True))
    bench.hear(KIDS[1], Scanned(scan.rid, ("c",), True))
    assert bench.replies[1] == Listing(("c",), True)


def test_a_list_is_answered_by_one_voter_only_when_that_was_asked_for_and_says_so() -> None:
    bench = Bench()
    bench.ask(List(timeout_ms=2000.0, stale=True))
    rid = bench.take(Scan)[0].rid
    bench.hear(KIDS[0], Scanned(rid, ("a",), True))
    assert not bench.replies
    bench.wait(500.0)
    assert bench.replies == [Listing(("a",), False, "stale", KIDS[1:])]


def test_a_list_begins_again_where_voters_have_changed() -> None:
    bench = Bench()
    bench.ask(List())
    old = bench.take(Scan)[0]
    bench.hear(KIDS[0], Scanned(old.rid, ("a",), True))
    joint = CONFIG.toward(CONFIG.new[:2])
    bench.hear(KIDS[1], Tell(1, joint))
    bench.wait(100.0)
    new = bench.take(Scan)[0]
    assert new.epoch == joint.epoch and new.rid != old.rid
    bench.hear(KIDS[1], Scanned(old.rid, ("b",), True))
    assert not bench.replies


def test_too_many_lists_are_busy() -> None:
    bench = Bench()
    for _ in range(listing.LISTS_MAX + 1):
        bench.ask(List(timeout_ms=50.0))
    assert [each.why for each in bench.replies] == [listing.BUSY]
    bench.wait(500.0)
    assert len(bench.replies) == listing.LISTS_MAX + 1
    bench.ask(List())
    assert len(bench.replies) == listing.LISTS_MAX + 1


# -- status and changes of voters -----------------------------------------------------------------


def test_the_status_tells_what_this_node_knows() -> None:
    bench = Bench(known=False)
    bench.ask(GetNexus())
    assert bench.replies.pop() == NexusInfo(False)
    mine = Voter(ME, bench.node.acceptor.disk)
    config = first_config([mine, *CONFIG.new[:2]])
    bench.hear(KIDS[0], Seal(1, config))
    bench.hear(KIDS[0], Accept(2, config.epoch, "k", Ballot(1, KIDS[0], 1, 1), VALUE, False))
    bench.operate(Put(1))
    bench.ask(GetNexus())
    info = bench.replies.pop()
    voters = tuple(voter.kid for voter in config.new)
    assert info == NexusInfo(True, config.epoch, 1, (), voters, True, False, "", 1, 1, info.step)
    bench._carry_out(bench.node.storage_failed(1.0, "No space left."))
    bench.ask(SetVoters(KIDS))
    bench.ask(GetNexus())
    info = bench.replies.pop()
    assert (info.votes, info.stopped, info.why, info.step) == (
        False,
        True,
        "No space left.",
        "read",
    )


def journal(bench: Bench, config: Config) -> None:
    """The config register holds that; answers to whatever reads it."""
    value = Value(config.count, config.count, msgspec.msgpack.encode(config))
    ballot = Ballot(config.count, KIDS[0], 1, 1)
    for read in bench.take(Read)[:1]:
        for kid in KIDS[:2]:
            bench.hear(kid, ReadReply(read.rid, ballot, value, ZERO))


def test_a_change_that_was_computed_from_what_is_over_is_refused() -> None:
    other = CONFIG.toward(CONFIG.new[:2]).settled()
    bench = Bench()
    bench.ask(SetVoters((*KIDS, ME), epoch=CONFIG.epoch))
    journal(bench, other)
    (answer,) = bench.replies
    assert (answer.status, answer.why) == ("refused", OVERTAKEN)


def test_a_change_that_somebody_else_has_begun_meanwhile_is_not_ours() -> None:
    joint = CONFIG.toward(CONFIG.new[:2])
    bench = Bench()
    bench.ask(SetVoters((*KIDS, ME), epoch=CONFIG.epoch))
    journal(bench, joint)
    assert bench.replies[0].why == OVERTAKEN


def test_a_change_goes_on_where_nothing_came_between_or_the_same_was_done() -> None:
    joint = CONFIG.toward(CONFIG.new[:2])
    for epoch, found in ((CONFIG.epoch, CONFIG), (-1, joint), (CONFIG.epoch, joint)):
        bench = Bench()
        bench.ask(SetVoters(KIDS[:2], epoch=epoch))
        journal(bench, found)
        assert not bench.replies
        said = bench.take(Hello) if found is CONFIG else bench.take(Seal)
        assert said
    bench = Bench()
    bench.ask(SetVoters(KIDS[:2], epoch=CONFIG.epoch))
    journal(bench, joint.settled())
    seal = bench.take(Seal)[0]
    for kid in KIDS[:2]:
        bench.hear(kid, Sealed(seal.rid, seal.config.epoch, ()))
    assert bench.replies[0].status == "ok"


def test_a_change_that_somebody_else_brings_further_is_read_again_at_once() -> None:
    """Voters answer the newest epoch only: who repeats an older step would wait in vain."""
    joint = CONFIG.toward(CONFIG.new[:2])
    bench = Bench()
    bench.ask(SetVoters(KIDS[:2], epoch=CONFIG.epoch))
    journal(bench, joint)
    seal = bench.take(Seal)[0]
    bench.hear(KIDS[0], Stale(seal.rid, joint.settled(), 7))
    while not any(isinstance(send.message, Read) for send in bench.sent):
        assert bench.now_ms < 2_000.0, "it does not look again"
        bench.wait(20.0)
    journal(bench, joint.settled())
    again = bench.take(Seal)[-1]
    assert again.config == joint.settled()
    for kid in KIDS[:2]:
        bench.hear(kid, Sealed(again.rid, again.config.epoch, ()))
    assert [answer.status for answer in bench.replies] == ["ok"]


def seen_half_done(bench: Bench) -> float:
    """How long after it has first read a joint configuration it goes on with it, in seconds."""
    joint = CONFIG.toward(CONFIG.new[:2])
    bench.hear(KIDS[0], Tell(5, joint))
    bench.sent.clear()
    found_ms: list[float] = []
    while not any(isinstance(send.message, Seal) for send in bench.sent):
        assert bench.now_ms < 300_000.0, "it never goes on"
        if any(isinstance(send.message, Read) for send in bench.sent):
            found_ms.append(bench.now_ms)
            journal(bench, joint)
        else:
            bench.sent.clear()
            bench.wait(5.0)
    return (bench.now_ms - found_ms[0]) / 1000


def test_who_finds_a_change_half_done_takes_turns_with_the_others() -> None:
    """Else all of them write every key again at once, and on a busy host none comes to an end."""
    alone, last = Bench(), Bench()
    assert seen_half_done(alone) < 1.0
    for kid in KIDS:
        last.up(kid)
    assert 35.0 <= seen_half_done(last) < 50.0  # three voters before it: 5 s * (2^3 - 1)


def test_everybody_who_is_up_is_told_who_votes_now() -> None:
    bench = Bench()
    others = {kid_of(b"one"), kid_of(b"two")}
    for kid in (*KIDS, *others):
        bench.up(kid)
    bench.ask(SetVoters(KIDS[:2], epoch=CONFIG.epoch))
    settled = CONFIG.toward(CONFIG.new[:2]).settled()
    journal(bench, settled)
    seal = bench.take(Seal)[0]
    for kid in KIDS[:2]:
        bench.hear(kid, Sealed(seal.rid, settled.epoch, ()))
    told = {send.to for send in bench.sent if send.message == Tell(send.message.rid, settled)}
    assert told == {*KIDS, *others}


def test_a_joint_configuration_stands_for_the_one_it_leads_to() -> None:
    joint = CONFIG.toward(CONFIG.new[:2])
    assert final_epoch(CONFIG.epoch) == CONFIG.epoch
    assert final_epoch(joint.epoch) == joint.settled().epoch
    bench = Bench()
    bench.ask(SetVoters((*KIDS, ME), epoch=joint.epoch))
    journal(bench, joint.settled())
    assert not bench.replies


def test_a_change_that_is_not_done_in_time_names_who_is_missing() -> None:
    bench = Bench()
    bench.ask(SetVoters((KIDS[0], ME), 200.0))
    journal(bench, CONFIG)
    hello = bench.take(Hello)[0]
    bench.hear(KIDS[0], Greeting(hello.rid, 7, CONFIG))
    bench.wait(1000.0)
    (answer,) = bench.replies
    assert (answer.status, answer.missing) == ("maybe", (ME,))


# -- pace and failover ----------------------------------------------------------------------------


def test_timeouts_follow_the_mean_and_the_deviation_and_double_with_each_failure() -> None:
    timing, pace = Timing(), Pace(5.0, 2.5)
    assert pace.timeout_ms(timing) == timing.timeout_ms  # 15 ms, and the least is 20
    for _ in range(50):
        pace.took(40.0)
    assert 40.0 < pace.timeout_ms(timing) < 45.0
    pace.took(140.0)
    assert pace.timeout_ms(timing) > 140.0
    assert Pace(5.0, 5.0).timeout_ms(timing, 1) == 50.0
    assert Pace(5.0, 5.0).timeout_ms(timing, 99) == 400.0
    assert Pace(500.0, 5.0).timeout_ms(timing, 99) == timing.timeout_most_ms


def test_a_voter_that_is_down_delays_neither_a_refusal_nor_a_disagreement() -> None:
    bench = Bench()
    bench.operate(Put(1))
    prepare = bench.take(Prepare)[0]
    bench.hear(KIDS[0], Promise(prepare.rid, ZERO, None, ZERO))
    bench.hear(KIDS[1], Nack(prepare.rid, Ballot(8, ME, 1, 1)))  # the third says nothing
    bench.wait(15.0)
    assert bench.take(Prepare)[0].ballot.n > 8
    bench = Bench()
    bench.operate(Get())
    read = bench.take(Read)[0]
    bench.hear(KIDS[0], ReadReply(read.rid, Ballot(4, KIDS[0], 1, 1), VALUE, ZERO))
    bench.hear(KIDS[1], ReadReply(read.rid, Ballot(5, KIDS[0], 1, 1), VALUE, ZERO))
    bench.wait(6.0)
    assert bench.take(Prepare)


def test_a_slow_answer_is_waited_for_and_what_can_be_said_twice_is() -> None:
    bench = Bench()
    bench.operate(Put(1))
    prepare = bench.take(Prepare)[0]
    for kid in KIDS[:2]:
        bench.hear(kid, Promise(prepare.rid, ZERO, None, ZERO))
    accept = bench.take(Accept)[0]
    bench.hear(KIDS[0], Accepted(accept.rid, accept.ballot))
    bench.wait(25.0)
    again = [send.to for send in bench.sent if send.message == accept]
    assert again == list(KIDS[1:]) and not bench.take(Prepare)
    bench.wait(5.0)  # a sync took 30 ms
    bench.hear(KIDS[1], Accepted(accept.rid, accept.ballot))
    assert bench.replies[0].status == "ok"


def test_a_ballot_that_was_refused_leaps_ahead_of_who_proposes_each_round_trip() -> None:
    bench = Bench()
    bench.operate(Put(1))
    leaps = []
    for tries in range(4):
        prepare = bench.take(Prepare)[0]
        high = 100 * (tries + 1)
        for kid in KIDS[:2]:
            bench.hear(kid, Nack(prepare.rid, Ballot(high, ME, 1, 1)))
        while not bench.sent:
            bench.wait(1.0)
        leaps.append(bench.sent[0].message.ballot.n - high)  # type: ignore[attr-defined]
    assert leaps[0] == 3 and leaps == sorted(leaps) and leaps[-1] >= 9


def forwarding() -> tuple[Bench, list[Kid]]:
    """A contended key; peers in the order in which they are asked, all before this node."""
    names = (kid_of(b"peer %d" % number) for number in range(100))
    peers = [kid for kid in names if rendezvous.first("k", [ME, kid]) == kid][:3]
    ordered = []
    left = list(peers)
    while left:
        first = rendezvous.first("k", sorted(left))
        assert first is not None
        ordered.append(first)
        left.remove(first)
    bench = Bench()
    for kid in peers:
        bench.up(kid)
    bench.operate(Put(1), "first")
    prepare = bench.take(Prepare)[0]
    for kid in KIDS[:2]:
        bench.hear(kid, Nack(prepare.rid, Ballot(9, ordered[0], 1, 1)))
    return bench, ordered


def to_whom(bench: Bench) -> list[str]:
    found = [send.to for send in bench.sent if isinstance(send.message, Forward)]
    bench.sent.clear()
    return found


def test_all_that_was_sent_to_a_silent_node_goes_to_the_next_one_before_its_death_is_news() -> None:
    bench, peers = forwarding()
    for number in range(5):
        bench.operate(Effect("job", number, 0, Add(1)), f"e{number}")
    assert to_whom(bench) == [peers[0]] * 6
    for _ in range(60):
        bench.wait(1.0)
        asked = to_whom(bench)
        if peers[1] in asked:
            break
    assert asked.count(peers[1]) == 6 and bench.now_ms < 100.0
    bench.operate(Put(2), "later")
    assert to_whom(bench) == [peers[1]]
    bench.wait(1000.0)
    to_whom(bench)
    for number in range(3):
        bench.operate(Put(2), f"much later {number}")
    assert to_whom(bench).count(peers[0]) <= 1  # one finds out whether it is back


def test_after_two_silent_nodes_it_proposes_itself_and_an_answer_ends_a_doubt() -> None:
    assert TRIED_MAX == 2
    bench, peers = forwarding()
    for _ in range(300):
        bench.wait(1.0)
        if bench.take(Prepare):
            break
    else:
        raise AssertionError("it never proposes itself")
    bench.wait(2000.0)
    bench.operate(Put(3), "again")
    sent = [send for send in bench.sent if isinstance(send.message, Forward)][-1]
    assert sent.to == peers[0]
    assert isinstance(sent.message, Forward)
    bench.hear(peers[0], Forwarded(sent.message.number, 5, "ok", 3, 3))
    bench.sent.clear()
    for number in range(3):
        bench.operate(Put(3), f"and again {number}")
    assert to_whom(bench) == [peers[0]] * 3


def test_the_failure_of_an_effect_that_was_forwarded_is_not_reported() -> None:
    """F3: whoever got it may propose it."""
    bench, _peers = forwarding()
    bench.operate(Effect("job", 0, 0, Add(1)), "e", timeout_ms=50.0)
    bench.operate(Put(4), "p", timeout_ms=50.0)  # nobody applies it before it has a base
    bench.wait(1000.0)
    assert [each.status for each in bench.replies[:2]] == ["maybe", "unavailable"]
