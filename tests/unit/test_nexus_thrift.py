"""A proposal goes to a quorum at first; who was not needed hears of it a little later."""

from __future__ import annotations

from collections import Counter
from random import Random

from manifold.kernel.effects import Send
from manifold.kernel.nexus.ballots import Ballot
from manifold.kernel.nexus.configs import Voter, first_config
from manifold.kernel.nexus.context import Context, Timing
from manifold.kernel.nexus.messages import Accept, Operate
from manifold.kernel.nexus.protocol import Nexus
from manifold.kernel.nexus.thrift import (
    BEHIND_MAX,
    ENDED_MAX,
    LATE_MS,
    TELL_GAP_MS,
    TELL_MAX,
    Left,
    Thrift,
)
from manifold.kernel.nexus.values import Get, Put, Value
from manifold.tools.simulator.faults import Faults
from manifold.tools.simulator.nexus import Harness, Plan
from manifold.vm.kid import Kid, kid_of

KIDS = tuple(sorted(kid_of(b"voter %d" % number) for number in range(5)))
THREE = first_config([Voter(kid, 7) for kid in KIDS[:3]])
FIVE = first_config([Voter(kid, 7) for kid in KIDS])
TIMING = Timing(doubt_ms=100.0, doubt_most_ms=400.0, behind_ms=50.0)


def thrift(me: Kid = KIDS[0]) -> tuple[Thrift, Context]:
    """Its first round has asked everybody, and so has one each second since."""
    context = Context(me, 1, 1, Random(1), TIMING)
    asks = Thrift(context)
    assert asks.few("k", THREE) is None
    asks.begun(1)
    return asks, context


def sent(context: Context, at_ms: float) -> list[Send]:
    """What leaves when the timers of that time have come."""
    context.now_ms = at_ms
    for action in context.due():
        action(at_ms)
    return [effect for effect in context.take() if isinstance(effect, Send)]


def left(number: int, *kids: Kid) -> Left:
    return Left(kids, THREE.epoch, Ballot(number, KIDS[0], 1, 1), Value(number, number, number))


# -- who is asked ---------------------------------------------------------------------------------


def test_a_voter_asks_itself_and_who_is_missing_for_a_quorum() -> None:
    asks, _ = thrift()
    for config, size in ((THREE, 2), (FIVE, 3)):
        asks.few("k", config)
        few = asks.few("k", config)
        assert few is not None and few[0] == KIDS[0] and len({*few}) == size
        assert config.quorum(few)


def test_keys_are_dealt_to_all_voters_also_by_who_does_not_vote() -> None:
    for me, alone in ((KIDS[0], KIDS[0]), (kid_of(b"nobody"), None)):
        asks, _ = thrift(me)
        asked = Counter(kid for n in range(600) for kid in asks.few(f"k{n}", FIVE) or ())
        others = [asked[kid] for kid in KIDS if kid != alone]
        assert min(others) > 0.8 * max(others)


def test_everybody_is_asked_while_voters_change() -> None:
    asks, _ = thrift()
    joint = THREE.toward([Voter(kid, 7) for kid in KIDS[1:4]])
    assert [asks.few("k", joint) for _ in range(3)] == [None] * 3
    assert asks.few("k", joint.settled()) is None, "it does not know them yet"
    assert asks.few("k", joint.settled()) is not None


def test_who_is_silent_is_passed_over_for_longer_and_longer_until_it_answers() -> None:
    asks, context = thrift()
    first, second = (asks.few("k", THREE) or ())[1], KIDS[1]
    if first == second:
        second = KIDS[2]
    spans = []
    asks.silent(first)
    context.now_ms += LATE_MS
    for _ in range(4):
        asks.silent(first)
        begun_ms = context.now_ms
        while chosen(asks) == (KIDS[0], second):
            context.now_ms += 10.0
        assert chosen(asks) == (KIDS[0], first), "it has another try"
        spans.append(context.now_ms - begun_ms)
    assert spans == [100.0, 200.0, 400.0, 400.0]
    asks.heard(first, 1.0)
    asks.silent(first)
    context.now_ms += LATE_MS
    asks.silent(first)
    context.now_ms += 100.0
    assert chosen(asks) == (KIDS[0], first), "it began anew"


def test_a_stall_is_no_reason_to_pass_anybody_over() -> None:
    """Of a busy machine all processes stall now and then."""
    asks, context = thrift()
    before = chosen(asks)
    for _ in range(20):
        for kid in KIDS[1:3]:
            asks.silent(kid)
        context.now_ms += LATE_MS - 1.0
        for kid in KIDS[1:3]:
            asks.silent(kid)
            asks.heard(kid, 1.0)
        assert chosen(asks) == before


def test_late_answers_count_for_the_pace_else_only_the_quick_would() -> None:
    asks, context = thrift()
    for kid in KIDS[1:3]:
        asks.heard(kid, 1.0)
    quick_ms = asks.hedge_ms()
    for rid in range(10, 10 + ENDED_MAX):
        asks.ended(rid, context.now_ms, KIDS[1:3])
        context.now_ms += 20.0
        for kid in KIDS[1:3]:
            asks.heard_late(kid, rid)
    assert quick_ms < 20.0 < asks.hedge_ms()
    asks.ended(9, context.now_ms, KIDS[1:2])
    context.now_ms += 2000.0
    late_ms = asks.hedge_ms()
    asks.heard_late(KIDS[1], 10)  # so long ago that it is forgotten
    asks.heard_late(KIDS[2], 9)  # it was asked later: nobody knows how long it took
    assert asks.hedge_ms() == late_ms


def chosen(asks: Thrift) -> tuple[Kid, ...] | None:
    """Whom a round asks that is not one of those that ask everybody, to see."""
    return asks.few("k", THREE) or asks.few("k", THREE)


def test_once_a_second_everybody_is_asked_so_that_each_pace_is_known() -> None:
    asks, context = thrift()
    everybody = []
    for _ in range(3000):
        context.now_ms += 1.0
        if asks.few("k", THREE) is None:
            everybody.append(context.now_ms)
    assert everybody == [1000.0, 2000.0, 3000.0]


def test_the_others_are_asked_as_soon_as_the_fastest_would_have_answered() -> None:
    asks, context = thrift()
    context.now_ms = 1.0
    asks.heard(KIDS[1], 1.0)
    context.now_ms = 30.0
    asks.heard_late(KIDS[2], 99)  # of no round that is known
    assert asks.hedge_ms() == 3.0
    asks.ended(1, 0.0, KIDS[2:3])
    asks.heard_late(KIDS[2], 1)  # slow from the beginning, and still no measure for itself
    assert asks.hedge_ms() == 3.0
    for _ in range(50):
        asks.heard(KIDS[1], 40.0)
    assert asks.hedge_ms() > 30.0, "all of them are slow"


def test_where_too_many_are_silent_everybody_is_asked() -> None:
    asks, context = thrift()
    for _ in range(2):
        asks.silent(KIDS[1])
        asks.silent(KIDS[2])
        context.now_ms += LATE_MS
    assert [asks.few("k", THREE) for _ in range(3)] == [None] * 3


# -- who was left out -----------------------------------------------------------------------------


def test_who_was_left_out_is_told_the_latest_value_once() -> None:
    asks, context = thrift()
    for number in (1, 2, 3):
        asks.chosen("k", left(number, KIDS[2]))
    assert not sent(context, 49.0)
    (told,) = sent(context, 50.0)
    assert told.to == KIDS[2] and isinstance(told.message, Accept)
    assert told.message.value == Value(3, 3, 3) and not told.message.keep
    assert not sent(context, 1000.0)


def test_a_value_that_everybody_has_is_not_told_again() -> None:
    asks, context = thrift()
    asks.chosen("k", left(1, KIDS[2]))
    asks.caught_up("k")
    assert not sent(context, 50.0)


def test_what_is_noted_is_bounded_and_the_oldest_is_told_at_once() -> None:
    asks, context = thrift()
    for number in range(BEHIND_MAX + 3):
        asks.chosen(f"k{number}", left(1, KIDS[2]))
    assert [send.message.key for send in sent(context, 0.0)] == ["k0", "k1", "k2"]  # type: ignore[attr-defined]
    portions = []
    while told := sent(context, context.now_ms + TELL_GAP_MS):
        portions.append(len(told))
        assert len(portions) < 100
    assert not portions, "not before their time"
    context.now_ms = 45.0
    while told := sent(context, context.now_ms + TELL_GAP_MS):
        portions.append(len(told))
    assert sum(portions) == BEHIND_MAX and max(portions) == TELL_MAX, "as much as a queue takes"


# -- in a cluster ---------------------------------------------------------------------------------


def test_every_voter_has_a_value_soon_after_it_was_chosen_and_nobody_is_asked_twice() -> None:
    plan = Plan(
        nodes=3, voters=3, faults=Faults(sync=(0.2, 1.0)), duration_ms=500.0, operations=0,
        changes=0, core=False, deletes=0.0, keys=("a",),
    )  # fmt: skip
    harness = Harness(3, Nexus, plan)
    harness.begin()
    node = harness.world.nodes[0]
    told: list[object] = []
    for number in range(10):  # the first of them asks everybody, to see
        harness.ask(node, Operate(f"p{number}", "a", Put(number)), lambda _h, a: told.append(a))
        assert harness.world.run_until(lambda n=number: len(told) > n, 1000.0, 0.2) is not None
    behind = [each for each in harness.world.nodes if _holds(each) != 9]
    assert len(behind) == 1, "a quorum has it"
    harness.world.run(100.0)
    assert [_holds(each) for each in harness.world.nodes] == [9, 9, 9]
    harness.ask(behind[0], Operate("r", "a", Get()), lambda _h, a: told.append(a))
    assert harness.world.run_until(lambda: len(told) > 10, 1000.0, 0.2) is not None
    assert told[-1].data == 9  # type: ignore[attr-defined]


def _holds(node: object) -> object:
    row = node.machine.acceptor.rows.get("a")  # type: ignore[attr-defined]
    return row.value.data if row is not None and row.value is not None else None
