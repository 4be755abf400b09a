"""Emulated links, the pure half: which rule holds, and what a wire does with frames."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifold.kernel.config import Config, LinkRow, LinksConfig, NodeClass
from manifold.kernel.effects import Plane
from manifold.kernel.hyperbus.filter import WHOLE, Filter, Link
from manifold.kernel.hyperbus.rules import LinkRule, Plan, fits, holding
from manifold.kernel.hyperbus.wire import (
    FLIGHT_BYTES_MAX,
    FRAME_COST_BYTES,
    NEVER_MS,
    WAITING_MS_MAX,
    Wire,
)
from manifold.kernel.limits import FRAME_BYTES_MAX, MIB
from manifold.kernel.link_rules import of_config

MBIT = 1e6
planes = st.sampled_from([Plane.CONTROL, Plane.DATA])


def wire_of(link: Link, seed: int = 1) -> Wire[int]:
    wire: Wire[int] = Wire(Random(seed))
    wire.set(link, wire.tally, 0.0)
    return wire


def land(wire: Wire[int], until_ms: float = NEVER_MS) -> list[tuple[float, Plane, int]]:
    """When what arrives, driven as the driver does: at `next_ms` and at no other time."""
    found = []
    while (now_ms := wire.next_ms()) <= until_ms and now_ms != NEVER_MS:
        wire.advance(now_ms)
        while (landed := wire.landed(now_ms)) is not None:
            found.append((now_ms, landed[0], landed[3]))
    return found


# -- rules ----------------------------------------------------------------------------------------


def test_a_side_is_an_alias_a_class_a_list_or_everybody() -> None:
    for side in ("rpi4-01", "rpi4", "server,rpi4-01", "*"):
        assert fits(LinkRule(side, "server"), "rpi4-01", "server-01"), side
        assert fits(LinkRule(side, "server"), "server-01", "rpi4-01"), side
    assert not fits(LinkRule("rpi4-02", "server"), "rpi4-01", "server-01")
    assert not fits(LinkRule("*", "*"), "rpi4-01", "rpi4-01"), "nobody has a link to itself"
    assert fits(LinkRule("rpi4", "rpi4"), "rpi4-01", "rpi4-02")


def test_a_label_with_its_value_is_a_side_too() -> None:
    labels = {"a-01": ("site=x", "ssd"), "a-02": ("site=y",), "b-01": ("site=y",)}

    def labels_of(alias: str) -> tuple[str, ...]:
        return labels.get(alias, ())

    rule = LinkRule("site=x", "site=y", cut=True)
    assert fits(rule, "a-01", "a-02", labels_of)
    assert fits(rule, "b-01", "a-01", labels_of)
    assert not fits(rule, "a-02", "b-01", labels_of), "both are on the same side"
    assert not fits(rule, "a-01", "c-01", labels_of), "of whom nothing is known"
    assert not fits(LinkRule("ssd", "*"), "a-01", "a-02", labels_of), "a bare one is none"
    everywhere, inside = LinkRule("*", "*", latency_ms=40), LinkRule("site=y", "site=y")
    plan = Plan("a-02", (everywhere, inside), (), labels_of)
    assert plan.outgoing("a-01") is everywhere
    assert plan.outgoing("b-01") is inside


def test_a_one_way_rule_is_about_what_the_first_side_sends() -> None:
    rule = LinkRule("a-01", "b-01", one_way=True, cut=True)
    assert fits(rule, "a-01", "b-01")
    assert not fits(rule, "b-01", "a-01")


def test_the_last_rule_that_fits_holds_and_orders_go_before_the_file() -> None:
    slow, cut, lossy = (
        LinkRule("*", "*", latency_ms=10), LinkRule("a-01", "*", cut=True),
        LinkRule("a-01", "b-01", loss=0.5),
    )  # fmt: skip
    assert holding([slow, cut], "a-01", "b-01") is cut
    assert holding([cut, slow], "a-01", "b-01") is slow
    assert Plan("a-01", (slow, cut), (lossy,)).outgoing("b-01") is lossy
    assert Plan("a-01", (slow, cut), (lossy,)).outgoing("b-02") is cut
    lifted = LinkRule("a-01", "b-01", lifted=True)
    assert Plan("a-01", (slow,), (lossy, lifted)).outgoing("b-01") is slow
    assert Plan("a-01", (), (lossy, lifted)).outgoing("b-01") is None


def test_rules_have_the_same_ends_whichever_side_is_named_first_but_for_one_way() -> None:
    both, there = LinkRule("a", "b"), LinkRule("a", "b", one_way=True)
    assert both.same_ends(LinkRule("b", "a", loss=0.1))
    assert there.same_ends(LinkRule("a", "b", one_way=True, cut=True))
    assert not there.same_ends(LinkRule("b", "a", one_way=True))
    assert not there.same_ends(both)


def test_classes_become_rules_of_what_both_their_links_do_where_that_is_wanted() -> None:
    classes = (
        NodeClass("fast", 2, bandwidth=1e9, latency=0.2),
        NodeClass("slow", 2, bandwidth=1e7, latency=5.0),
    )
    row = LinkRow(between="fast-01 slow", loss=0.1)
    assert of_config(Config(classes=classes)) == ()
    rules = of_config(Config(classes=classes, links=LinksConfig("on", (row,))))
    plan = Plan("fast-01", rules)
    between = plan.outgoing("fast-02")
    assert between is not None
    assert (between.latency_ms, between.rate_bps) == (0.4, 1e9)
    within = Plan("slow-01", rules).outgoing("slow-02")
    assert within is not None
    assert (within.latency_ms, within.rate_bps) == (10.0, 1e7)
    assert plan.outgoing("slow-02") == LinkRule("fast-01", "slow", loss=0.1)


# -- the filter -----------------------------------------------------------------------------------


def test_a_filter_without_rules_is_not_active_and_every_link_is_whole() -> None:
    clear = Filter()
    assert not clear.active
    assert clear.link("K-a", "a-01") == (WHOLE, None)
    clear.set_plan(Plan("b-01"))
    assert not clear.active


def test_a_cut_is_one_way_and_a_peers_own_rule_goes_before_the_rule_of_all() -> None:
    rules = Filter()
    rules.set("*", Link(cut_to=True))
    rules.set("K-a", Link(cut_from=True))
    assert rules.link("K-b", "")[0] == Link(cut_to=True)
    assert rules.link("K-a", "")[0] == Link(cut_from=True)
    rules.set("K-a", WHOLE)
    assert rules.link("K-a", "")[0] == Link(cut_to=True)
    rules.clear()
    assert rules.link("K-b", "")[0] == WHOLE
    assert not rules.active


def test_what_a_node_was_told_of_a_peer_goes_before_the_plan() -> None:
    rules = Filter()
    rules.set_plan(Plan("a-01", (LinkRule("a-01", "b-01", loss=0.5),)))
    assert rules.link("K-b", "b-01")[0] == Link(loss=0.5)
    rules.set("K-b", Link(loss=0.1))
    assert rules.link("K-b", "b-01") == (Link(loss=0.1), None)
    rules.clear()
    assert rules.link("K-b", "b-01")[0] == Link(loss=0.5)


def test_a_one_way_cut_is_seen_at_both_of_its_ends() -> None:
    rule = LinkRule("a-01", "b-01", one_way=True, cut=True)
    sender, receiver = Filter(), Filter()
    sender.set_plan(Plan("a-01", (rule,)))
    receiver.set_plan(Plan("b-01", (rule,)))
    assert sender.link("K-b", "b-01") == (Link(cut_to=True), rule)
    assert receiver.link("K-a", "a-01") == (Link(cut_from=True), None)
    assert receiver.rule_from("K-a", "a-01") is rule


def test_a_client_has_no_link() -> None:
    rules = Filter()
    rules.set("*", Link(cut_to=True))
    rules.set_plan(Plan("a-01", (LinkRule("*", "*", cut=True),)))
    assert rules.link("C-0123", "c0123") == (WHOLE, None)


def test_tallies_of_rules_that_are_gone_are_dropped() -> None:
    rules, rule = Filter(), LinkRule("a-01", "b-01", loss=0.5)
    rules.set_plan(Plan("a-01", (rule,)))
    rules.tally(rule).lost += 1
    rules.set_plan(Plan("a-01", (rule, LinkRule("*", "*", cut=True))))
    assert rules.tally(rule).lost == 1
    rules.set_plan(Plan("a-01"))
    assert rules.tallies == {}


# -- a wire ---------------------------------------------------------------------------------------


def test_a_frame_is_on_its_way_for_the_latency() -> None:
    wire = wire_of(Link(latency_ms=10))
    wire.offer(Plane.CONTROL, 1, 100, 5.0)
    assert wire.landed(14.9) is None
    assert land(wire) == [(15.0, Plane.CONTROL, 1)]
    assert wire.empty
    assert wire.tally.sent == wire.tally.delayed == 1


def test_frames_leave_one_after_the_other_at_the_rate() -> None:
    wire = wire_of(Link(latency_ms=5, rate_bps=10 * MBIT))
    for number in range(3):
        wire.offer(Plane.DATA, number, 12_500, 0.0)  # 10 ms each
    assert land(wire) == [(15.0, Plane.DATA, 0), (25.0, Plane.DATA, 1), (35.0, Plane.DATA, 2)]
    wire.offer(Plane.DATA, 3, 12_500, 100.0)  # it was idle: nothing is saved up
    assert land(wire) == [(115.0, Plane.DATA, 3)]


def test_control_goes_before_data_and_delays_what_is_left_of_it() -> None:
    wire = wire_of(Link(rate_bps=8 * MBIT))  # 1000 bytes a millisecond
    wire.offer(Plane.DATA, 1, 1_000_000, 0.0)
    wire.offer(Plane.DATA, 2, 10_000, 0.0)
    wire.offer(Plane.CONTROL, 3, 2_000, 500.0)
    assert land(wire) == [
        (502.0, Plane.CONTROL, 3), (1002.0, Plane.DATA, 1), (1012.0, Plane.DATA, 2)
    ]  # fmt: skip


def test_a_cut_loses_what_it_holds_and_what_is_sent() -> None:
    wire = wire_of(Link(latency_ms=10, rate_bps=MBIT))
    wire.offer(Plane.DATA, 1, 10_000, 0.0)
    wire.offer(Plane.CONTROL, 2, 10, 0.0)
    assert wire.set(Link(cut_to=True), wire.tally, 5.0) == 2
    wire.offer(Plane.CONTROL, 3, 10, 6.0)
    assert wire.empty
    assert wire.tally.cut == 3
    wire.set(WHOLE, wire.tally, 7.0)
    wire.offer(Plane.CONTROL, 4, 10, 8.0)
    assert land(wire) == [(8.0, Plane.CONTROL, 4)]


def test_what_a_link_held_when_it_was_mended_arrives_first() -> None:
    wire = wire_of(Link(latency_ms=50, rate_bps=MBIT))
    wire.offer(Plane.DATA, 1, 125, 0.0)  # a millisecond
    wire.offer(Plane.DATA, 2, 125_000, 0.0)  # a second
    wire.set(WHOLE, wire.tally, 10.0)
    wire.offer(Plane.DATA, 3, 10, 10.0)
    assert land(wire) == [(51.0, Plane.DATA, 1), (51.0, Plane.DATA, 2), (51.0, Plane.DATA, 3)]


def test_a_frame_that_the_receiver_does_not_take_is_the_next_again() -> None:
    wire = wire_of(Link(latency_ms=1))
    wire.offer(Plane.DATA, 1, 10, 0.0)
    wire.offer(Plane.DATA, 2, 10, 0.0)
    landed = wire.landed(1.0)
    assert landed is not None
    wire.keep(*landed)
    assert wire.landed(1.0) is None
    assert wire.next_ms() == NEVER_MS, "nothing to do until somebody unblocks it"
    wire.offer(Plane.CONTROL, 3, 10, 1.0)
    assert [each[2] for each in land(wire)] == [3], "control does not wait for data"
    wire.unblock()
    assert [each[2] for each in land(wire)] == [1, 2]


def test_a_wire_that_is_full_says_so_and_when_it_is_not() -> None:
    wire = wire_of(Link(latency_ms=1000, rate_bps=8 * MBIT))
    number = 0
    while wire.room(Plane.DATA, 0.0):
        wire.offer(Plane.DATA, number, 10_000, 0.0)  # 10 ms
        number += 1
    assert number == WAITING_MS_MAX / 10
    assert wire.room(Plane.CONTROL, 0.0), "control has room of its own"
    now_ms = wire.next_ms()
    wire.advance(now_ms)
    assert (now_ms, wire.roomy(now_ms)) == (10.0, [Plane.DATA])


def test_without_a_rate_what_is_on_its_way_is_bounded() -> None:
    wire = wire_of(Link(latency_ms=1000))
    number = 0
    while wire.room(Plane.DATA, 0.0):
        wire.offer(Plane.DATA, number, MIB, 0.0)
        number += 1
    assert number == -(-FLIGHT_BYTES_MAX // (MIB + FRAME_COST_BYTES))
    assert wire.next_ms() == 1000.0
    assert wire.landed(1000.0) is not None
    assert wire.roomy(1000.0) == [Plane.DATA]


def test_a_slow_wire_takes_small_frames_and_a_fast_one_large_ones() -> None:
    assert wire_of(Link(rate_bps=8 * MBIT)).pace_bytes == 10_000
    assert wire_of(Link(latency_ms=5)).pace_bytes == FRAME_BYTES_MAX


def test_a_loss_loses_that_share_and_what_is_lost_has_taken_its_time() -> None:
    wire = wire_of(Link(loss=0.3, rate_bps=8 * MBIT))
    found = []
    for number in range(5000):
        wire.offer(Plane.DATA, number, 1000, float(number))
        found += land(wire)
    assert 0.27 < wire.tally.lost / 5000 < 0.33
    assert wire.tally.sent == len(found) == 5000 - wire.lost
    assert all(at_ms == number + 1.0 for at_ms, _, number in found)


def test_some_frames_overtake_others_and_the_rest_keep_their_order() -> None:
    wire = wire_of(Link(latency_ms=50, reorder=0.1))
    for number in range(2000):
        wire.offer(Plane.DATA, number, 10, float(number))
    order = [number for _, _, number in land(wire)]
    assert sorted(order) == list(range(2000))
    early = sum(later < number for number, later in pairwise(order))
    assert 100 < early < 300
    assert 100 < wire.tally.reordered < 300


@given(
    st.floats(0, 50), st.floats(0, 50), st.sampled_from([0.0, MBIT, 100 * MBIT]),
    st.floats(0, 0.5), st.integers(0, 99),
    st.lists(st.tuples(planes, st.integers(1, 20_000), st.floats(0, 20)), max_size=60),
)  # fmt: skip
def test_frames_of_a_plane_arrive_in_order_and_none_is_early(
    latency_ms: float, jitter_ms: float, rate_bps: float, loss: float, seed: int,
    offers: list[tuple[Plane, int, float]],
) -> None:  # fmt: skip
    """W1, with jitter of any size; each frame arrives once or is counted as lost."""
    wire = wire_of(Link(latency_ms, jitter_ms, rate_bps, loss), seed)
    now_ms, found, offered_ms = 0.0, [], []
    for number, (plane, size, pause_ms) in enumerate(offers):
        found += land(wire, now_ms)
        wire.offer(plane, number, size, now_ms)
        offered_ms.append(now_ms)
        now_ms += pause_ms
    found += land(wire)
    for plane in Plane:
        order = [number for _, each, number in found if each is plane]
        assert order == sorted(order)
    for at_ms, _, number in found:
        assert at_ms - offered_ms[number] >= max(0.0, latency_ms - jitter_ms) - 1e-6
    assert len(found) + wire.lost == len(offers)
    assert wire.empty


@given(
    st.sampled_from([MBIT, 10 * MBIT, 1000 * MBIT]),
    st.lists(st.tuples(planes, st.integers(100, 50_000)), min_size=1, max_size=80),
)
def test_a_wire_that_has_something_to_send_sends_at_its_rate(
    rate_bps: float, offers: list[tuple[Plane, int]]
) -> None:
    """W2, with frames offered as room is made, on both planes."""
    wire = wire_of(Link(rate_bps=rate_bps))
    left, now_ms, sent_bytes = list(enumerate(offers)), 0.0, 0
    while left or not wire.empty:
        while left and wire.room(left[0][1][0], now_ms):
            number, (plane, size) = left.pop(0)
            wire.offer(plane, number, size, now_ms)
        now_ms = wire.next_ms()
        wire.advance(now_ms)
        while (landed := wire.landed(now_ms)) is not None:
            sent_bytes += landed[2]
        allowed = now_ms * rate_bps / 8000
        assert sent_bytes <= allowed + 1
    assert now_ms == pytest.approx(sum(size for _, size in offers) * 8000 / rate_bps, rel=1e-6)


@given(st.lists(st.tuples(planes, st.integers(100, 50_000), st.floats(0, 30)), max_size=60))
def test_control_is_not_delayed_by_data(offers: list[tuple[Plane, int, float]]) -> None:
    """What control would do on a link of its own, it does beside data."""
    rate_bps = 10 * MBIT
    both, alone = wire_of(Link(rate_bps=rate_bps)), wire_of(Link(rate_bps=rate_bps))
    now_ms, found, wanted = 0.0, [], []
    for number, (plane, size, pause_ms) in enumerate(offers):
        found += land(both, now_ms)
        wanted += land(alone, now_ms)
        both.offer(plane, number, size, now_ms)
        if plane is Plane.CONTROL:
            alone.offer(plane, number, size, now_ms)
        now_ms += pause_ms
    found += land(both)
    wanted += land(alone)
    control = [(number, at_ms) for at_ms, plane, number in found if plane is Plane.CONTROL]
    assert [each for each, _ in control] == [number for _, _, number in wanted]
    for (_, at_ms), (wanted_ms, _, _) in zip(control, wanted, strict=True):
        assert at_ms == pytest.approx(wanted_ms)
