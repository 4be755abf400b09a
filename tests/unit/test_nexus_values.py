"""Changes of a register: what each does, what the ring remembers, what is never applied twice."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold.kernel.nexus.ballots import ZERO, Ballot, following
from manifold.kernel.nexus.messages import Accept, Message, Operate, Request
from manifold.kernel.nexus.values import (
    BATCH_MAX,
    INT_MAX,
    RING_FACTOR,
    RING_MAX,
    RING_MIN,
    Add,
    CasValue,
    CasVersion,
    Change,
    Delete,
    Get,
    Grant,
    Lease,
    Put,
    Release,
    Renew,
    Rewrite,
    Value,
    Wanted,
    absent,
    change,
    same,
)

B1 = Ballot(1, "n", 1, 7)
B2 = Ballot(2, "n", 1, 7)
NOTHING = absent(ZERO)


def after(*changes: Change, value: Value = NOTHING) -> Value:
    for place, each in enumerate(changes):
        value, _ = change(value, [Wanted(f"o{value.stamp}.{place}", each)], B1)
    return value


def result_of(each: Change, value: Value = NOTHING, ballot: Ballot = B1) -> Any:
    return change(value, [Wanted("x", each)], ballot)[1][0]


@pytest.mark.parametrize(
    ("before", "each", "status", "data"),
    [
        (NOTHING, Put(3), "ok", 3),
        (after(Put(1)), Put(b"x"), "ok", b"x"),
        (NOTHING, CasValue(None, 5), "ok", 5),
        (after(Put(1)), CasValue(None, 5), "no", 1),
        (after(Put(1)), CasValue(1, 5), "ok", 5),
        (after(Put(1)), CasValue(1.0, 5), "no", 1),
        (NOTHING, CasVersion(0, 5), "ok", 5),
        (after(Put(1)), CasVersion(1, 5), "ok", 5),
        (after(Put(1), Put(1)), CasVersion(1, 5), "no", 1),
        (after(Put(1)), CasVersion(0, 5), "no", 1),
        (after(Put(1), Delete()), CasVersion(0, 5), "ok", 5),
        (after(Put(1), Delete()), CasVersion(2, 5), "no", None),
        (NOTHING, Add(2), "ok", 2),
        (after(Put(40)), Add(2), "ok", 42),
        (after(Put(0.5)), Add(0.25), "ok", 0.75),
        (after(Put(1)), Add(0.5), "no", 1),
        (after(Put(b"x")), Add(1), "no", b"x"),
        (after(Put(INT_MAX)), Add(1), "no", INT_MAX),
        (after(Put(1)), Delete(), "ok", None),
        (NOTHING, Delete(), "no", None),
        (after(Put(1)), Get(), "ok", 1),
    ],
)
def test_each_change_does_what_it_says(
    before: Value, each: Change, status: str, data: object
) -> None:
    new, (result,) = change(before, [Wanted("x", each)], B1)
    assert (result.status, new.data) == (status, data)
    changed = status == "ok" and not isinstance(each, Get)
    assert new.version == before.version + changed and (new is not before) is changed
    if status == "no":
        assert result.data == before.data  # a failure tells what is there


def test_a_batch_is_applied_in_order_and_each_sees_those_before_it() -> None:
    wanted = [Wanted("a", Add(1)), Wanted("b", Add(1)), Wanted("c", CasValue(2, 9))]
    new, results = change(NOTHING, [*wanted, Wanted("d", Get())], B1)
    assert [result.data for result in results] == [1, 2, None, 9]
    assert (new.version, new.stamp, new.data) == (3, 3, 9)


def test_an_operation_in_the_ring_has_its_old_result_and_no_effect() -> None:
    value, (first,) = change(NOTHING, [Wanted("a", Add(5))], B1)
    value = after(Add(1), value=value)
    new, (again,) = change(value, [Wanted("a", Add(5), base=0)], B2)
    assert new is value and (again.status, again.data) == ("ok", first.data) == ("ok", 5)


def test_two_copies_in_one_batch_are_one_operation() -> None:
    new, results = change(NOTHING, [Wanted("a", Add(1)), Wanted("a", Add(1))], B1)
    assert new.data == 1 and [each.data for each in results] == [1, 1]


def test_what_may_have_left_the_ring_is_not_applied() -> None:
    value = after(*[Add(1)] * (RING_MIN + 5))
    oldest = value.stamp - len(value.ring)
    assert oldest == 5 and len(value.ring) == RING_MIN
    for base, status in ((oldest, "ok"), (oldest - 1, "maybe"), (-1, "maybe"), (None, "ok")):
        new, (result,) = change(value, [Wanted("late", Add(1), base)], B2)
        assert result.status == status and (new is value) is (status == "maybe")
    assert change(value, [Wanted("late", Add(1), 0, rebase=True)], B2)[1][0].status == "rebase"


def test_a_register_that_vanished_counts_from_its_floor_so_old_bases_are_too_old() -> None:
    base = after(Put(1), Put(2)).stamp
    floor = Ballot(9, "m", 1, 1)
    assert absent(floor).stamp == absent(floor).version == BATCH_MAX * 9 > base
    _, (result,) = change(absent(floor), [Wanted("late", Put(3), base)], Ballot(10, "m", 1, 1))
    assert result.status == "maybe"


def test_the_failure_of_what_may_have_copies_is_kept_and_told_again() -> None:
    value = after(Put(1))
    kept, (first,) = change(value, [Wanted("a", CasValue(2, 3), base=0)], B1)
    assert first.status == "no" and kept.stamp == value.stamp + 1
    assert (kept.version, kept.data) == (value.version, value.data)
    now = after(Put(2), value=kept)
    _, (again,) = change(now, [Wanted("a", CasValue(2, 3), base=0)], B2)
    assert again.status == "no"  # though it would succeed now
    unkept, _ = change(value, [Wanted("a", CasValue(2, 3))], B1)
    assert unkept is value


def test_the_ring_holds_four_times_the_largest_batch_and_shrinks_slowly() -> None:
    batch = [Wanted(f"b{n}", Add(1)) for n in range(BATCH_MAX)]
    value = NOTHING
    for _ in range(5):
        value, _ = change(value, [Wanted(f"{each.op}.{value.stamp}", Add(1)) for each in batch], B1)
        assert len(value.ring) <= RING_MAX
    assert len(value.ring) == RING_FACTOR * BATCH_MAX == RING_MAX
    assert len(after(Add(1), value=value).ring) == RING_MAX - 1


def test_a_lease_is_granted_once_and_broken_only_at_the_version_that_was_seen() -> None:
    held, (granted,) = change(NOTHING, [Wanted("a", Grant("me", 50.0))], B1)
    assert granted.fence == B1 and held.data == Lease("me", 50.0, B1)
    assert result_of(Grant("you", 50.0), held).status == "no"
    renewed = after(Renew("me", B1), value=held)
    assert result_of(Grant("you", 50.0, held.version), renewed).status == "no"
    broken, (taken,) = change(renewed, [Wanted("b", Grant("you", 50.0, renewed.version))], B2)
    assert taken.fence == B2 > B1
    assert result_of(Renew("me", B1), broken).status == "no"
    assert result_of(Release("me", B1), broken).status == "no"
    assert after(Release("you", B2), value=broken).data is None


def test_a_rewrite_changes_nothing_and_refuses_the_living_where_it_wants_the_dead() -> None:
    value = after(Put(1))
    assert result_of(Rewrite(), value).status == "ok"
    assert result_of(Rewrite(dead=True), value).status == "no"
    assert result_of(Rewrite(dead=True), after(Put(1), Delete())).status == "ok"


def test_equal_is_equal_in_type_and_a_nan_is_itself() -> None:
    assert same(math.nan, math.nan) and not same(1, 1.0) and same(b"", b"") and not same(None, 0)


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.lists(st.integers(-3, 3), min_size=1, max_size=20), max_size=30))
def test_versions_are_bounded_by_ballots_and_stamps_count_entries(batches: list[list[int]]) -> None:
    """V1, V3: whatever the batches are, over deletions as well."""
    value, ballot = NOTHING, B1
    for number, batch in enumerate(batches):
        wanted = [
            Wanted(f"{number}.{place}", Delete() if n == 0 else Add(n), base=value.stamp)
            for place, n in enumerate(batch)
        ]
        before = value
        value, results = change(value, wanted, ballot)
        assert value.stamp == before.stamp + len(batch) == results[0].stamp
        assert before.version <= value.version <= BATCH_MAX * ballot.n
        if value.data is None:
            value = absent(ballot)  # collected: the floor is at least the tombstone's ballot
        ballot = following(ballot)


def test_messages_survive_the_wire_and_bounds_are_checked() -> None:
    accept = Accept(1, 2, "k", B1, after(Put(1.5), Grant("h", 5.0), Delete()), True)
    decoder = msgspec.msgpack.Decoder(Message)
    assert decoder.decode(msgspec.msgpack.encode(accept)) == accept
    request = msgspec.msgpack.Decoder(Request)
    for bad in (
        Operate("", "k", Get()),
        Operate("o", "", Get()),
        Operate("o", "k" * 257, Get()),
        Operate("o", "k", Put(b"x" * 65_537)),
        Operate("o", "k", Put(1 << 63)),
        Operate("o", "k", Get(), -1.0),
    ):
        with pytest.raises((msgspec.ValidationError, OverflowError)):
            request.decode(msgspec.msgpack.encode(bad))
