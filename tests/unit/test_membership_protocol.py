"""One membership machine, message by message: each trap of the design page has its test."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import msgspec
import pytest

from manifold.kernel.config import MembershipConfig
from manifold.kernel.effects import Notify, Persist, Plane, Send, SetTimer
from manifold.kernel.errors import ProtocolError
from manifold.kernel.membership.dissemination import News, retransmits
from manifold.kernel.membership.messages import (
    META_BYTES_MAX,
    Ack,
    Gossip,
    Leave,
    Me,
    MemberChanged,
    Message,
    Nack,
    Ping,
    PingReq,
    PushPull,
    Refuted,
    State,
    Superseded,
    Update,
    saved_incarnation,
)
from manifold.kernel.membership.probing import smooth_rtt
from manifold.kernel.membership.protocol import Membership
from manifold.vm.kid import Kid, kid_of

CONFIG = MembershipConfig()
ME, OTHER, THIRD = (kid_of(name) for name in (b"me", b"other", b"third"))


def me(kid: str = ME, boot: int = 1) -> Me:
    return Me(kid, boot, f"n-{kid[2:6]}", "node", (f"sim://{kid[2:6]}",))


def alive(kid: str, boot: int = 1, incarnation: int = 1) -> Update:
    return Update(kid, boot, incarnation, State.ALIVE, "", me(kid, boot).meta)


def accused(kid: str, state: State, incarnation: int = 1, by: str = THIRD) -> Update:
    return Update(kid, 1, incarnation, state, by)


def machine(*others: str, boot: int = 1, saved: int = 0, seeds: Any = ()) -> Membership:
    made = Membership(me(boot=boot), CONFIG, Random(1), incarnation=saved, seeds=seeds)
    made.start(0.0)
    made.receive(THIRD, Gossip(1, tuple(alive(kid) for kid in others)), 1.0)
    return made


def sends(effects: list[Any], kind: type[Any]) -> list[Send]:
    return [e for e in effects if isinstance(e, Send) and isinstance(e.message, kind)]


def told(effects: list[Any], kind: type[Any]) -> list[Any]:
    return [e.event for e in effects if isinstance(e, Notify) and isinstance(e.event, kind)]


def run(node: Membership, until_ms: float, now_ms: float = 1.0) -> list[Any]:
    """Let time pass, tick by tick, nobody answering."""
    seen: list[Any] = []
    while node._armed_ms <= until_ms:
        now_ms = max(now_ms, node._armed_ms)
        seen += node.tick(now_ms)
    return seen


def test_the_incarnation_is_durable_before_the_first_message() -> None:
    """habitat#5581."""
    node = Membership(me(), CONFIG, Random(1), incarnation=6, seeds=["sim://a"])
    effects = node.start(0.0)
    kinds = [type(effect) for effect in effects]
    assert kinds.index(Persist) < kinds.index(Send)
    record = next(e.record for e in effects if isinstance(e, Persist))
    assert saved_incarnation(record) == node.incarnation == 7
    assert saved_incarnation(None) == 0


def test_a_refutation_is_durable_before_it_leaves_and_notifications_do_not_wait() -> None:
    node = machine(OTHER, THIRD)
    effects = node.receive(OTHER, Ping(5, 1, False, (accused(ME, State.SUSPECT),)), 2.0)
    kinds = [type(effect) for effect in effects]
    assert kinds.index(Notify) < kinds.index(Persist) < kinds.index(Send)
    assert told(effects, Refuted) == [Refuted(2, THIRD)]
    ack = sends(effects, Ack)[0].message
    assert any(u.kid == ME and u.incarnation == 2 and u.state == State.ALIVE for u in ack.updates)


def test_every_list_carries_the_persist_until_an_answer_proves_it() -> None:
    node = machine(OTHER)
    first = node.receive(OTHER, Ping(1, 1), 2.0)
    assert any(isinstance(effect, Persist) for effect in first)
    probe = sends(run(node, 1500.0), Ping)[0].message
    node.receive(OTHER, Ack(probe.seq, 1), node._armed_ms - 1)
    later = node.receive(OTHER, Ping(2, 1), node._armed_ms - 1)
    assert not any(isinstance(effect, Persist) for effect in later)


@pytest.mark.parametrize("state", [State.SUSPECT, State.DEAD])
def test_only_the_subject_raises_its_incarnation_and_only_above_the_accusation(
    state: State,
) -> None:
    node = machine(OTHER)
    node.receive(OTHER, Gossip(1, (accused(ME, state, incarnation=41),)), 2.0)
    assert node.incarnation == 42
    node.receive(OTHER, Gossip(1, (accused(ME, state, incarnation=41),)), 3.0)
    assert node.incarnation == 42
    before = node.get(OTHER)
    node.receive(THIRD, Gossip(1, (accused(OTHER, state),)), 4.0)
    after = node.get(OTHER)
    assert before is not None and after is not None and after.incarnation == before.incarnation


def test_a_stale_alive_makes_the_accusation_be_told_again() -> None:
    """memberlist#311."""
    node = machine(OTHER, THIRD)
    node.receive(THIRD, Gossip(1, (accused(OTHER, State.DEAD, 3),)), 2.0)
    run(node, 20_000.0)
    assert OTHER not in node._news
    node.receive(THIRD, Gossip(1, (alive(OTHER, incarnation=2),)), 20_001.0)
    assert OTHER in node._news
    other = node.get(OTHER)
    assert other is not None and other.state == State.DEAD


@pytest.mark.parametrize("state", [State.SUSPECT, State.DEAD])
def test_an_accusation_of_an_unknown_node_is_passed_on_and_not_shown(state: State) -> None:
    """memberlist#311: else those behind us never hear of it."""
    node = machine(THIRD)
    effects = node.receive(THIRD, Gossip(1, (accused(OTHER, state, 4),)), 2.0)
    assert not told(effects, MemberChanged) and node.get(OTHER) is None
    passed = [u for s in sends(run(node, 400.0, 2.0), Gossip) for u in s.message.updates]
    assert (OTHER, state) in [(u.kid, u.state) for u in passed]
    node.receive(THIRD, Gossip(1, (alive(OTHER, incarnation=3),)), 500.0)
    late = node.get(OTHER)
    assert late is not None and late.state == state


def test_a_restart_replaces_the_old_process_at_once() -> None:
    """libnetwork#2256: a new process at an old address is not flapping."""
    node = machine(OTHER, THIRD)
    node.receive(THIRD, Gossip(1, (accused(OTHER, State.DEAD, 9),)), 2.0)
    effects = node.receive(OTHER, Gossip(2, (alive(OTHER, boot=2, incarnation=1),)), 3.0)
    (event,) = told(effects, MemberChanged)
    assert (event.member.boot, event.member.state) == (2, State.ALIVE)
    assert event.previous_state == State.DEAD
    node.receive(THIRD, Gossip(1, (accused(OTHER, State.DEAD, 50),)), 4.0)
    other = node.get(OTHER)
    assert other is not None and other.state == State.ALIVE


def test_only_the_living_of_a_snapshot_are_loaded() -> None:
    """foca#29."""
    known = (alive(OTHER), msgspec.structs.replace(alive(THIRD), state=State.DEAD))
    node = Membership(me(), CONFIG, Random(1), incarnation=0, seeds=(), known=known)
    node.start(0.0)
    assert node.get(OTHER) is not None and node.get(THIRD) is None
    assert [update.kid for update in node.snapshot()] == [OTHER]


def test_an_older_process_of_ours_is_told_and_falls_silent() -> None:
    node = machine(OTHER)
    effects = node.receive(OTHER, Gossip(1, (alive(ME, boot=2),)), 2.0)
    assert told(effects, Superseded) == [Superseded(2)]
    assert not sends(effects, object) and node.tick(9_000.0) == []
    peer = machine(OTHER)
    peer.receive(OTHER, Gossip(2, (alive(OTHER, boot=2),)), 2.0)
    answer = sends(peer.receive(OTHER, Ping(1, 1), 3.0), Ack)[0].message
    assert any(u.kid == OTHER and u.boot == 2 for u in answer.updates)


def test_whoever_is_held_for_dead_and_talks_is_told_so() -> None:
    node = machine(OTHER, THIRD)
    node.receive(THIRD, Gossip(1, (accused(OTHER, State.DEAD),)), 2.0)
    answer = sends(node.receive(OTHER, Ping(1, 1), 3.0), Ack)[0].message
    assert answer.updates[0].kid == OTHER and answer.updates[0].state == State.DEAD
    contradiction = sends(node.receive(OTHER, Gossip(1), 4.0), Gossip)
    assert [s.to for s in contradiction] == [OTHER]


def test_an_unknown_sender_is_asked_who_it_is() -> None:
    node = machine()
    asked = sends(node.receive(OTHER, Ping(1, 1), 2.0), PushPull)
    assert [s.to for s in asked] == [OTHER] and not asked[0].message.reply


def test_the_end_of_a_process_is_believed_and_told_at_once() -> None:
    node = machine(OTHER, THIRD)
    effects = node.process_ended(OTHER, 1, 2.0)
    (event,) = told(effects, MemberChanged)
    assert (event.member.state, event.previous_state) == (State.DEAD, State.ALIVE)
    assert OTHER in node._news
    node.receive(THIRD, Gossip(1, (alive(OTHER, incarnation=2),)), 3.0)  # it had just refuted
    after = node.get(OTHER)
    assert after is not None and (after.state, after.incarnation) == (State.DEAD, 2)
    node.process_ended(OTHER, 0, 4.0)
    node.receive(THIRD, Gossip(1, (alive(OTHER, boot=2),)), 5.0)
    after = node.get(OTHER)
    assert after is not None and after.state == State.ALIVE


@pytest.mark.parametrize("told_by_driver", [True, False])
def test_a_late_event_loop_accuses_nobody(told_by_driver: bool) -> None:
    """clio-core#895: starvation reads as death."""
    node = machine(OTHER, THIRD)
    run(node, 1_400.0)
    assert node._probe is not None
    late_ms = node._armed_ms + 5_000.0
    effects = node.loop_lag(5_000.0, late_ms) if told_by_driver else node.tick(late_ms)
    assert node._probe is None and node.health.score >= 1
    assert not told(effects, MemberChanged)
    assert not told(node.tick(late_ms + 1), MemberChanged)


def test_the_accused_get_back_the_time_that_we_were_stopped() -> None:
    node = machine(OTHER, THIRD)
    node.receive(THIRD, Gossip(1, (accused(OTHER, State.SUSPECT),)), 2.0)
    deadline_ms = node._suspicions[OTHER].deadline_ms
    effects = node.tick(deadline_ms + 60_000.0)
    assert not told(effects, MemberChanged)
    assert node._suspicions[OTHER].deadline_ms > deadline_ms + 60_000.0


def test_a_small_lag_is_not_worth_telling() -> None:
    node = machine(OTHER)
    node.loop_lag(CONFIG.lag_ms / 10, 2.0)
    assert node.health.score == 0


def test_our_own_address_among_the_seeds_is_not_called() -> None:
    node = Membership(me(), CONFIG, Random(1), incarnation=0, seeds=me().addresses)
    assert not sends(node.start(0.0), PushPull)
    other_name = Membership(me(), CONFIG, Random(1), incarnation=0, seeds=["tcp://localhost"])
    (call,) = sends(other_name.start(0.0), PushPull)
    other_name.receive(ME, call.message, 1.0)  # it came back to us
    assert not sends(run(other_name, 120_000.0), PushPull)


def test_seeds_are_called_for_ever_ever_more_rarely() -> None:
    node = Membership(me(), CONFIG, Random(1), incarnation=0, seeds=["sim://x"])
    node.start(0.0)
    early = len(sends(run(node, 5_000.0), PushPull))
    late = len(sends(run(node, 3_600_000.0), PushPull))
    assert 4 <= early <= 12 and 120 <= late <= 260


def test_leaving_is_told_at_once_and_stays_told() -> None:
    node = machine(OTHER, THIRD)
    assert {s.to for s in sends(node.leave(2.0), Leave)} == {OTHER, THIRD}
    assert node.leave(3.0) == []
    peer = machine(OTHER, THIRD)
    effects = peer.receive(OTHER, Leave(1, 1), 2.0)
    assert told(effects, MemberChanged)[0].member.state == State.LEFT
    peer.process_ended(OTHER, 1, 3.0)
    other = peer.get(OTHER)
    assert other is not None and other.state == State.LEFT


def test_a_table_travels_whole_in_bounded_parts() -> None:
    others = [kid_of(b"many %d" % number) for number in range(600)]
    node = machine()
    node.receive(THIRD, Gossip(1, tuple(alive(kid) for kid in others)), 2.0)
    answer = sends(node.receive(THIRD, PushPull(7, 1, False, True), 3.0), PushPull)
    parts = [s.message for s in answer if s.message.reply]
    assert [p.last for p in parts] == [False, False, True] and {p.seq for p in parts} == {7}
    assert {u.kid for p in parts for u in p.updates} >= {ME, *others}
    codec = msgspec.msgpack.Decoder(Message)
    assert all(codec.decode(msgspec.msgpack.encode(part)) == part for part in parts)


@pytest.mark.parametrize("sample_ms", [-1.0, math.nan, 10_001.0, math.inf, -math.inf])
def test_impossible_round_trips_change_nothing(sample_ms: float) -> None:
    """consul#3023, #3789."""
    assert smooth_rtt(5.0, sample_ms) == 5.0
    assert smooth_rtt(None, sample_ms) is None


def test_round_trips_are_smoothed_and_never_zero() -> None:
    assert smooth_rtt(None, 0.0) == 0.001
    assert smooth_rtt(8.0, 4.0) == 7.0


def test_a_description_too_long_for_a_packet_is_refused() -> None:
    with pytest.raises(ProtocolError, match="takes"):
        _ = Me(ME, 1, "n", "c", tuple("a" * 128 for _ in range(4))).meta
    assert len(msgspec.msgpack.encode(me().meta)) < META_BYTES_MAX


@pytest.mark.parametrize(
    "bad", [b"\x95\xa6m.ping", b"\xc0", msgspec.msgpack.encode(["m.ping", -1, 1])]
)
def test_what_does_not_validate_does_not_decode(bad: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        msgspec.msgpack.decode(bad, type=Message)


def test_a_packet_stays_within_its_budget_and_news_within_its_count() -> None:
    news = News()
    for number in range(300):
        news.put(alive(kid_of(b"news %d" % number)))
    limit, rounds, count = retransmits(4, 16), 0, {}
    while len(news):
        packet = news.take(1300, 1, limit)
        assert sum(len(msgspec.msgpack.encode(u)) for u in packet) <= 1300
        for item in packet:
            count[item.kid] = count.get(item.kid, 0) + 1
        rounds += 1
        assert rounds < 10_000
    assert set(count.values()) == {limit} and len(count) == 300


def test_a_newer_update_replaces_what_waits() -> None:
    news = News()
    news.put(alive(OTHER))
    news.put(accused(OTHER, State.DEAD))
    assert [u.state for u in news.take(1300, 1, 8)] == [State.DEAD] and len(news) == 1


def test_an_idle_node_only_probes() -> None:
    node = machine(OTHER)
    probes = gossip = 0
    for _ in range(300):
        now_ms = node._armed_ms
        effects = node.tick(now_ms)
        assert any(isinstance(effect, SetTimer) for effect in effects)
        gossip += len(sends(effects, Gossip)) if now_ms > 5_000.0 else 0
        for ping in sends(effects, Ping):
            probes += 1
            node.receive(OTHER, Ack(ping.message.seq, 1), now_ms + 1)
    assert probes > 100 and gossip == 0 and now_ms / probes > 900


def test_a_relay_answers_for_its_target_and_says_nack_in_time() -> None:
    node = machine(OTHER, THIRD)
    asked = node.receive(THIRD, PingReq(77, 1, OTHER, 400.0), 10.0)
    (ping,) = sends(asked, Ping)
    assert ping.to == OTHER
    nacked = sends(run(node, 420.0, 10.0), Nack)
    assert [(s.to, s.message.seq) for s in nacked] == [(THIRD, 77)]
    late = sends(node.receive(OTHER, Ack(ping.message.seq, 1), 500.0), Ack)
    assert [(s.to, s.message.seq) for s in late] == [(THIRD, 77)]
    unknown = node.receive(THIRD, PingReq(78, 1, kid_of(b"nobody"), 400.0), 501.0)
    assert sends(unknown, Nack)


def test_the_second_try_of_a_probe_uses_the_other_plane() -> None:
    node = machine(OTHER, THIRD)
    later = [s for s in sends(run(node, 2_000.0), Ping) if s.message.data]
    assert later and all(s.plane is Plane.DATA for s in later)
    answer = sends(node.receive(OTHER, Ping(9, 1, True), 2_001.0), Ack)
    assert answer[0].plane is Plane.DATA


# -- labels that change ---------------------------------------------------------------------------


def labels_of(node: Membership, kid: str) -> tuple[str, ...]:
    member = node.get(Kid(kid))
    assert member is not None
    return member.meta.labels


def test_other_labels_are_told_with_a_higher_incarnation_that_is_durable_first() -> None:
    node = machine(OTHER)
    before = node.incarnation
    effects = node.relabel(("site=b",), 10.0)
    effects += run(node, 1000.0, 10.0)
    assert node.incarnation == before + 1
    assert labels_of(node, ME) == ("site=b",)
    kept = next(at for at, each in enumerate(effects) if isinstance(each, Persist))
    gossip = next(at for at, each in enumerate(effects) if sends([each], Gossip))
    assert kept < gossip, "M2"
    news = [
        update
        for each in sends(effects, Gossip)
        for update in each.message.updates
        if update.kid == ME
    ]
    assert {(u.incarnation, u.meta.labels, u.meta.version) for u in news if u.meta} == {
        (before + 1, ("site=b",), 1)
    }


def test_news_of_other_labels_is_told_to_the_rest_of_the_node_and_passed_on_once() -> None:
    node = machine(OTHER)
    meta = msgspec.structs.replace(me(OTHER).meta, labels=("site=b",), version=1)
    news = Update(OTHER, 1, 2, State.ALIVE, "", meta)
    (change,) = told(node.receive(THIRD, Gossip(1, (news,)), 5.0), MemberChanged)
    assert (change.member.meta.labels, change.previous_state) == (("site=b",), State.ALIVE)
    assert not told(node.receive(THIRD, Gossip(1, (news,)), 6.0), MemberChanged)
    old = Update(OTHER, 1, 3, State.ALIVE, "", me(OTHER).meta)  # from who had not heard of it
    assert not told(node.receive(THIRD, Gossip(1, (old,)), 7.0), MemberChanged)
    assert labels_of(node, OTHER) == ("site=b",)
    (again,) = told(node.receive(THIRD, Gossip(1, (alive(OTHER, boot=2),)), 8.0), MemberChanged)
    assert again.member.meta.labels == (), "another process says it anew"


def test_who_has_left_tells_no_labels_any_more() -> None:
    node = machine(OTHER)
    node.leave(5.0)
    assert node.relabel(("site=b",), 6.0) == []
