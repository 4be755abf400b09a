"""Sentences of the two papers, each as a test.

SWIM: Das, Gupta, Motivala, "SWIM: Scalable Weakly-consistent Infection-style Process Group
Membership Protocol" (2002). Lifeguard: Dadgar, Phillips, Currey, "Lifeguard: Local Health
Awareness for More Accurate Failure Detection" (2018).
"""

from __future__ import annotations

import math
from itertools import pairwise
from random import Random
from typing import Any

import pytest

from manifold.kernel.config import MembershipConfig
from manifold.kernel.effects import Send
from manifold.kernel.membership.messages import (
    Ack,
    Gossip,
    Me,
    Nack,
    Ping,
    PingReq,
    State,
    Update,
)
from manifold.kernel.membership.probing import SCORE_MAX
from manifold.kernel.membership.protocol import Membership
from manifold.kernel.membership.suspicion import timeout_ms
from manifold.vm.kid import kid_of

CONFIG = MembershipConfig()
ME = kid_of(b"me")
PEERS = [kid_of(b"peer %d" % number) for number in range(7)]


def node(peers: int = 7, **changes: Any) -> Membership:
    made = Membership(
        Me(ME, 1, "me", "node", ("sim://me",)),
        MembershipConfig(**changes),
        Random(3),
        incarnation=0,
        seeds=(),
    )
    made.start(0.0)
    news = [
        Update(kid, 1, 1, 0, "", Me(kid, 1, kid[2:8], "node", (f"sim://{kid}",)).meta)
        for kid in PEERS[:peers]
    ]
    made.receive(PEERS[0], Gossip(1, tuple(news)), 0.5)
    return made


def sent(effects: list[Any], kind: type[Any]) -> list[Any]:
    return [e for e in effects if isinstance(e, Send) and isinstance(e.message, kind)]


def until(made: Membership, kind: type[Any]) -> tuple[list[Any], float]:
    """Tick on until a message of that kind leaves."""
    for _ in range(1000):
        now_ms = made._armed_ms
        found = sent(made.tick(now_ms), kind)
        if found:
            return found, now_ms
    raise AssertionError("it never left")


def suspect(kid: str, by: str, state: State = State.SUSPECT) -> Gossip:
    return Gossip(1, (Update(kid, 1, 1, state, by),))


def test_swim_3_1_a_silent_target_is_probed_through_k_members_selected_at_random() -> None:
    """'M_i selects k members at random and sends each a ping-req(M_j) message.'"""
    made = node()
    (ping,), begun_ms = until(made, Ping)
    asked, now_ms = until(made, PingReq)
    assert now_ms - begun_ms == pytest.approx(CONFIG.ack_ms)
    assert len({a.to for a in asked}) == CONFIG.indirect
    assert ping.to not in [a.to for a in asked]
    assert all(a.message.target == ping.to for a in asked)


def test_swim_3_1_an_answer_by_a_relay_counts() -> None:
    """'...either directly or indirectly through one of the k members.'"""
    made = node()
    asked, now_ms = until(made, PingReq)
    made.receive(asked[0].to, Ack(asked[0].message.seq, 1), now_ms + 10)
    target = made.get(asked[0].message.target)
    made.tick(made._armed_ms)
    assert target is not None and target.state == State.ALIVE
    assert not made._suspicions


def test_swim_3_1_an_answer_by_a_stranger_does_not_count() -> None:
    made = node()
    asked, now_ms = until(made, PingReq)
    strangers = [k for k in PEERS if k not in [a.to for a in asked] + [asked[0].message.target]]
    made.receive(strangers[0], Ack(asked[0].message.seq, 1), now_ms + 10)
    assert made._probe is not None


def test_swim_4_2_without_an_answer_the_target_is_suspected_and_not_yet_failed() -> None:
    """'...marks M_j as a suspected member in its local membership list at M_i.'"""
    made = node()
    asked, _ = until(made, PingReq)
    made.tick(made._probe.end_ms)  # type: ignore[union-attr]
    target = made.get(asked[0].message.target)
    assert target is not None and target.state == State.SUSPECT


@pytest.mark.parametrize(
    ("first", "second", "stays"),
    [
        ((State.ALIVE, 1), (State.SUSPECT, 1), State.SUSPECT),  # suspect i overrides alive j, i>=j
        ((State.SUSPECT, 2), (State.ALIVE, 2), State.SUSPECT),  # alive i overrides suspect j, i>j
        ((State.SUSPECT, 2), (State.ALIVE, 3), State.ALIVE),
        ((State.ALIVE, 3), (State.SUSPECT, 2), State.ALIVE),
        ((State.DEAD, 2), (State.SUSPECT, 2), State.DEAD),  # confirm overrides
        ((State.DEAD, 2), (State.ALIVE, 2), State.DEAD),
    ],
)
def test_swim_4_2_the_order_of_preference(
    first: tuple[State, int], second: tuple[State, int], stays: State
) -> None:
    """'{Alive M_l, inc=i} overrides {Suspect M_l, inc=j} and {Alive M_l, inc=j}, i > j', ..."""
    made = node()
    for now_ms, (state, incarnation) in enumerate((first, second)):
        update = Update(PEERS[1], 1, incarnation, state, PEERS[2])
        made.receive(PEERS[0], Gossip(1, (update,)), 1.0 + now_ms)
    member = made.get(PEERS[1])
    assert member is not None and member.state == stays


def test_swim_4_3_between_two_probes_of_one_member_lies_at_most_twice_the_group() -> None:
    """'...time-bounded completeness: successive selections are at most (2 n - 1) periods apart.'"""
    made = node()
    order: list[str] = []
    while len(order) < 70:
        now_ms = made._armed_ms
        for ping in sent(made.tick(now_ms), Ping):
            order.append(ping.to)
            made.receive(ping.to, Ack(ping.message.seq, 1), now_ms + 1)
    for kid in PEERS:
        places = [place for place, other in enumerate(order) if other == kid]
        gaps = [after - before for before, after in pairwise(places)]
        assert max(gaps) <= 2 * len(PEERS) - 1
    assert all(len(set(order[turn : turn + 7])) == 7 for turn in range(7, 63, 7))


def test_swim_4_1_news_rides_on_pings_and_acks() -> None:
    """'...piggybacking this information on the ping, ping-req and ack messages.'"""
    made = node()
    made.receive(PEERS[0], suspect(PEERS[1], PEERS[2]), 1.0)
    (answer,) = sent(made.receive(PEERS[3], Ping(1, 1), 1.5), Ack)
    assert PEERS[1] in [update.kid for update in answer.message.updates]


def test_lifeguard_4_1_the_multiplier_grows_with_missed_nacks_and_shrinks_with_successes() -> None:
    """'Probe with missed nack: +1 ... Successful probe: -1', saturating at S."""
    made = node()
    asked, now_ms = until(made, PingReq)
    made.receive(asked[0].to, Nack(asked[0].message.seq), now_ms + 1)
    made.receive(asked[0].to, Nack(asked[0].message.seq), now_ms + 2)  # the same one twice
    made.tick(made._probe.end_ms)  # type: ignore[union-attr]
    assert made.health.score == 2
    (ping,), now_ms = until(made, Ping)
    made.receive(ping.to, Ack(ping.message.seq, 1), now_ms + 1)
    assert made.health.score == 1
    for _ in range(20):
        made.health.add(3)
    assert made.health.score == SCORE_MAX == 7


def test_lifeguard_4_1_refuting_a_suspicion_of_oneself_costs_health() -> None:
    """'Refuting a suspect message about self: +1.'"""
    made = node()
    made.receive(PEERS[0], suspect(ME, PEERS[1]), 1.0)
    assert made.health.score == 1


def test_lifeguard_4_1_interval_and_timeout_are_scaled_by_the_multiplier() -> None:
    """'ProbeInterval = BaseProbeInterval (LHM(S)+1); ProbeTimeout = BaseProbeTimeout (LHM(S)+1)'"""
    made = node()
    made.health.add(2)
    until(made, Ping)
    probe = made._probe
    assert probe is not None
    assert probe.ack_due_ms - probe.sent_ms == 3 * CONFIG.ack_ms
    assert probe.end_ms - probe.sent_ms == 3 * CONFIG.probe_ms


@pytest.mark.parametrize("nodes", [16, 64, 1000])
def test_lifeguard_4_2_the_timeout_falls_from_max_to_min_with_log_of_confirmations(
    nodes: int,
) -> None:
    """'SuspicionTimeout = max(Min, Max - (Max - Min) log(C+1)/log(K+1))'"""
    least = 4 * max(1.0, math.log10(nodes)) * 1000
    most = 6 * least
    values = [timeout_ms(CONFIG, nodes, count) for count in range(4)]
    assert values[0] == pytest.approx(most)
    assert values[1] == pytest.approx(most - (most - least) * math.log(2) / math.log(3))
    assert values[2] == values[3] == pytest.approx(least)


def test_lifeguard_4_2_a_cluster_too_small_to_confirm_does_not_wait_for_it() -> None:
    assert timeout_ms(CONFIG, 3, 0) == 4000.0


def test_lifeguard_4_2_the_first_k_independent_suspicions_are_told_on_and_no_more() -> None:
    """'...re-gossips the first K independent suspicions received'; the same accuser is not news."""
    made = node()
    deadlines = []
    for by in (1, 1, 2, 3, 4):
        made._news.drop(PEERS[6])
        made.receive(PEERS[0], suspect(PEERS[6], PEERS[by]), 1.0 + by)
        deadlines.append((PEERS[6] in made._news, made._suspicions[PEERS[6]].deadline_ms))
    assert [told for told, _ in deadlines] == [True, False, True, True, False]
    assert deadlines[0][1] > deadlines[2][1] > deadlines[3][1] == deadlines[4][1]


def test_lifeguard_4_3_the_buddy_system_a_suspect_learns_of_it_from_the_ping_itself() -> None:
    """'...the suspect message is prioritised and piggybacked on any ping to a suspected member.'"""
    made = node(peers=2)
    made.receive(PEERS[0], suspect(PEERS[1], PEERS[0]), 1.0)
    made._news.drop(PEERS[1])
    for _ in range(10):
        pings, _ = until(made, Ping)
        to_suspect = [ping for ping in pings if ping.to == PEERS[1]]
        if to_suspect:
            about = to_suspect[0].message.updates[0]
            assert (about.kid, about.state) == (PEERS[1], State.SUSPECT)
            return
    raise AssertionError("the suspect was never probed")
