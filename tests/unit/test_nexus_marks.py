"""Effects of programs on one register: what is applied, what is told, what is remembered."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold.kernel.nexus.ballots import ZERO, Ballot
from manifold.kernel.nexus.marks import (
    GONE_MAX,
    INT_MAX,
    INT_MIN,
    JOBS_MAX,
    MARKS_MAX,
    RANGES_MAX,
    Book,
    Marks,
)
from manifold.kernel.nexus.messages import Operate, Request
from manifold.kernel.nexus.values import (
    COUNTED,
    CROWDED,
    FENCED,
    FULL,
    MISMATCH,
    OVERFLOW,
    RING_MIN,
    Add,
    Admit,
    Change,
    Delete,
    Dismiss,
    Effect,
    Grant,
    Propose,
    Put,
    Result,
    Rewrite,
    Value,
    Wanted,
    absent,
    change,
    crowd,
)

B1 = Ballot(1, "n", 1, 7)


class Register:
    """A register that is written one operation after the other."""

    def __init__(self, *changes: Change) -> None:
        self.value = absent(ZERO)
        self.count = 0
        for each in changes:
            self.do(each)

    def do(self, each: Change, base: int | None = None) -> Result:
        self.count += 1
        wanted = Wanted(f"o{self.count}", each, base)
        self.value, (result,) = change(self.value, [wanted], B1)
        return result

    def effect(self, wish: Any, at: int = 0, k: int = 0, *settled: tuple[int, int]) -> Result:
        return self.do(Effect("job", at, k, wish, settled))

    @property
    def effects(self) -> list[tuple[int, int]]:
        assert self.value.marks is not None
        return [(at, k) for job in self.value.marks.jobs for at, k, _ in job.effects]


def admitted(*before: Change) -> Register:
    return Register(*before, Admit("job"))


def told(result: Result) -> tuple[str, Any]:
    return result.status, result.data


def test_an_effect_is_applied_once_and_its_first_result_is_told_whatever_happened_since() -> None:
    register = admitted(Put(40))
    assert told(register.effect(Add(2))) == ("ok", 40)
    register.do(Put(7))
    assert told(register.effect(Add(2))) == ("ok", 40)
    assert told(register.effect(Add(99))) == ("ok", 40)  # a run that wants something else by now
    assert register.value.data == 7
    assert told(register.effect(Add(2), 0, 1)) == ("ok", 7)
    assert told(register.effect(Add(2), 1, 0)) == ("ok", 9)
    assert register.value.data == 11


@pytest.mark.parametrize(
    ("before", "wish", "status", "found", "after"),
    [
        ([], Add(5), "ok", 0, 5),
        ([], Add(0.5), "ok", 0.0, 0.5),
        ([Put(1)], Add(-3), "ok", 1, -2),
        ([Put(0.1)], Add(0.2), "ok", 0.1, 0.1 + 0.2),
        ([], Propose(0, 7), "ok", 0, 7),
        ([], Propose(0.0, 7.5), "ok", 0.0, 7.5),
        ([], Propose(1, 7), "no", 0, None),
        ([], Propose(1.0, 7.0), "no", 0.0, None),
        ([Put(3)], Propose(3, 4), "ok", 3, 4),
        ([Put(3)], Propose(2, 4), "no", 3, 3),
        ([], Put(3), "ok", None, 3),
        ([Put(3)], Put(4), "ok", None, 4),
        ([Put(b"x")], Put(b"y"), "ok", None, b"y"),
    ],
)
def test_each_wish_tells_what_was_there_exactly(
    before: list[Change], wish: Any, status: str, found: Any, after: Any
) -> None:
    register = admitted(*before)
    result = register.effect(wish)
    assert told(result) == (status, found) and type(result.data) is type(found)
    assert register.value.data == after
    again = register.effect(wish)
    assert told(again) == (status, found) and register.value.data == after


def test_what_was_there_is_told_bit_by_bit() -> None:
    register = admitted(Put(-0.0))
    found = register.effect(Add(1.0)).data
    assert isinstance(found, float) and math.copysign(1.0, found) == -1.0
    assert math.isnan(float(admitted(Put(math.nan)).effect(Propose(math.nan, 1.0)).data))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("held", "wish"),
    [
        (Put(1), Add(1.0)),
        (Put(1.0), Add(1)),
        (Put(b"x"), Add(1)),
        (Grant("me", 50.0), Add(1)),
        (Put(1), Propose(1.0, 2.0)),
        (Put(1.0), Propose(1, 2)),
        (Put(b"1"), Propose(1, 2)),
        (Put(1), Propose(1, 2.0)),
        (Put(1), Put(1.0)),
        (Put(1.0), Put(1)),
        (Put(1), Put(b"x")),
        (Grant("me", 50.0), Put(1)),
    ],
)
def test_another_type_is_refused_says_why_and_leaves_no_mark(held: Change, wish: Any) -> None:
    register = admitted(held)
    before = register.value
    result = register.effect(wish)
    assert (result.status, result.why) == ("refused", MISMATCH)
    assert register.value is before


@pytest.mark.parametrize(("there", "amount"), [(INT_MAX, 1), (INT_MIN, -1)])
def test_a_sum_outside_of_64_bits_is_refused_and_changes_nothing(there: int, amount: int) -> None:
    register = admitted(Put(there))
    result = register.effect(Add(amount))
    assert (result.status, result.why, result.data) == ("refused", OVERFLOW, there)
    assert register.value.data == there and not register.effects


def test_a_failed_propose_is_no_effect_and_the_next_try_of_the_same_k_counts() -> None:
    register = admitted(Put(5))
    before = register.value
    assert told(register.effect(Propose(4, 9))) == ("no", 5) and register.value is before
    assert told(register.effect(Propose(5, 6))) == ("ok", 5) and register.value.data == 6


def test_jobs_that_are_not_admitted_are_refused_before_and_after() -> None:
    register = Register()
    assert register.effect(Add(1)).why == FENCED
    for _ in range(2):
        assert register.do(Admit("job")).status == "ok"
    register.effect(Add(1))
    for _ in range(2):
        assert register.do(Dismiss("job")).status == "ok"
    assert (register.effect(Add(1)).status, register.effect(Add(1)).why) == ("refused", FENCED)
    assert register.effect(Add(1), 5).why == FENCED
    assert register.value.data == 1


def test_a_late_admit_does_not_admit_again_whether_the_first_came_before_or_not() -> None:
    register = admitted(Put(1), Dismiss("never came"))
    register.do(Dismiss("job"))
    for job in ("job", "never came"):
        result = register.do(Admit(job))
        assert (result.status, result.why) == ("refused", FENCED)
    assert register.effect(Add(1)).why == FENCED


def test_settled_positions_lose_their_marks_and_are_refused_from_then_on() -> None:
    register = admitted()
    for at in range(6):
        register.effect(Add(1), at)
    assert told(register.effect(Add(1), 6, 0, (0, 2), (4, 5))) == ("ok", 6)
    assert register.effects == [(2, 0), (3, 0), (5, 0), (6, 0)]
    for at in (0, 1, 4):
        assert register.effect(Add(1), at).why == COUNTED
        assert register.effect(Add(1), at, 3).why == COUNTED
    assert told(register.effect(Add(1), 2)) == ("ok", 2)
    assert register.value.data == 7
    assert register.effect(Add(1), 7, 0, (7, 8)).why == COUNTED  # by what it brings itself


def test_settled_ranges_are_of_one_job() -> None:
    register = admitted(Admit("other"))
    register.effect(Add(1), 0, 0, (0, 100))
    assert register.do(Effect("other", 5, 0, Add(1))).status == "ok"
    assert register.effect(Add(1), 5).why == COUNTED


def test_a_register_full_of_marks_is_busy_until_something_settles() -> None:
    register = admitted()
    jobs = Marks(tuple(), ())
    book = Book(jobs)
    book.admit("job")
    for at in range(MARKS_MAX):
        book.mark("job", at, 0, at)
    register.value = Value(1, 1, MARKS_MAX, (), book.marks())
    result = register.effect(Add(1), MARKS_MAX)
    assert (result.status, result.why) == ("busy", FULL) and register.value.data == MARKS_MAX
    assert register.effect(Add(1), 5).status == "ok"  # it was applied before
    assert register.effect(Propose(0, 1), MARKS_MAX).status == "no"
    assert register.effect(Add(1), MARKS_MAX, 0, (0, 1)).status == "ok"
    assert register.value.data == MARKS_MAX + 1


def test_a_65th_job_waits_and_is_told_who_is_there() -> None:
    names = [f"j{n}" for n in range(JOBS_MAX)]
    register = Register(*(Admit(name) for name in names))
    result = register.do(Admit("late"))
    assert (result.status, result.why, crowd(result.data)) == ("busy", CROWDED, tuple(names))
    assert register.do(Effect("late", 0, 0, Add(1))).why == FENCED
    assert register.do(Admit("j0")).status == "ok"  # it is there already
    register.do(Dismiss("j7"))
    assert register.do(Admit("j7")).why == FENCED
    assert register.do(Admit("late")).status == "ok"
    assert register.do(Effect("late", 0, 0, Add(1))).status == "ok"
    assert register.do(Effect("j0", 0, 0, Add(1))).status == "ok"


def test_what_another_release_says_there_names_nobody() -> None:
    assert crowd(None) == crowd(b"\xc1") == crowd(b"\x01") == crowd(7) == ()


def test_deleting_a_register_ends_what_jobs_may_do_to_it() -> None:
    register = admitted(Put(3))
    register.effect(Add(1))
    register.do(Delete())
    assert register.value.dead
    assert register.effect(Add(1)).why == FENCED and register.do(Admit("job")).why == FENCED
    assert register.do(Admit("another")).status == "ok" and not register.value.dead


def test_an_absent_register_that_a_job_may_write_is_no_tombstone() -> None:
    register = admitted()
    assert register.value.data is None and not register.value.dead
    assert register.do(Rewrite(dead=True)).status == "no"
    register.do(Dismiss("job"))
    assert register.value.dead and register.do(Rewrite(dead=True)).status == "ok"


def test_ordinary_operations_and_their_ring_go_on_beside_marks() -> None:
    register = admitted(Put(1))
    register.effect(Add(1))
    assert told(register.do(Add(5))) == ("ok", 7)
    value, (again,) = change(register.value, [Wanted("o1", Put(1), base=0)], B1)
    assert value is register.value and again.status == "ok"  # it is in the ring still
    assert [entry.op for entry in value.ring] == ["o1", "o4"]  # effects are not
    assert (value.version, value.stamp) == (3, 2)


def test_an_effect_may_come_again_where_an_ordinary_operation_could_only_be_looked_up() -> None:
    register = admitted()
    for _ in range(RING_MIN + 5):
        register.do(Add(1))
    for base in (-1, 0, None):
        assert register.do(Effect("job", 3, 0, Add(1)), base).status == "ok"
    assert register.value.data == RING_MIN + 6
    assert register.do(Add(1), -1).status == "maybe"


def test_a_batch_of_effects_and_others_is_applied_in_order() -> None:
    batch = [
        Admit("job"),
        Effect("job", 0, 0, Add(2)),
        Add(3),
        Effect("job", 0, 0, Add(2)),
        Dismiss("job"),
    ]
    value, results = change(
        absent(ZERO), [Wanted(f"o{n}", each) for n, each in enumerate(batch)], B1
    )
    assert [told(each) for each in results[1:4]] == [("ok", 0), ("ok", 5), ("ok", 0)]
    assert value.data == 5 and value.version == 2 and value.marks and not value.marks.jobs


@settings(deadline=None)  # the machine may be busy
@given(
    st.lists(
        st.tuples(
            st.integers(0, 9),  # position
            st.integers(0, 1),  # k
            st.integers(1, 3),  # amount
            st.lists(st.tuples(st.integers(0, 10), st.integers(0, 10)), max_size=2),
        ),
        max_size=60,
    )
)
def test_whatever_is_asked_how_often_each_effect_is_applied_once(
    asked: list[tuple[int, int, int, list[tuple[int, int]]]],
) -> None:
    """Against a plain model that never forgets."""
    register, applied, settled, total = admitted(), {}, set(), 0
    for at, k, amount, ranges in asked:
        settled |= {place for first, after in ranges for place in range(first, after)}
        result = register.effect(Add(amount), at, k, *ranges)
        if at in settled:
            assert result.why == COUNTED
            continue
        assert told(result) == ("ok", applied.setdefault((at, k), total))
        total = max(total, applied[(at, k)] + amount) if applied[(at, k)] == total else total
    assert register.value.data == (total if applied else None)
    marks = register.value.marks
    assert marks is not None
    job = marks.jobs[0]
    assert all(first < after for first, after in job.settled)  # M3
    assert all(a[1] < b[0] for a, b in zip(job.settled, job.settled[1:], strict=False))
    assert {at for at, _ in register.effects} == {at for at, _ in applied} - settled


def test_the_largest_value_is_what_its_comment_says_and_survives_the_wire() -> None:
    book = Book(None)
    for number in range(GONE_MAX):
        book.dismiss(f"{number:064}")
    names = [f"{number:064}" for number in range(GONE_MAX, GONE_MAX + JOBS_MAX)]
    assert [book.admit(name) for name in names] == ["ok"] * JOBS_MAX
    high = (1 << 62) - 1
    for place, name in enumerate(names):
        each = [
            (high - 10_000 - 4 * n, high - 9_998 - 4 * n) for n in range(RANGES_MAX // JOBS_MAX)
        ]
        book.settle(name, each)
        for n in range(MARKS_MAX // JOBS_MAX):
            book.mark(name, high - n, high - place, 0.1)
    book.settle(names[0], [(5, 6)])  # no room: what does not fit keeps its marks
    assert not book.counted(names[0], 5) and book.full
    marks = book.marks()
    assert marks is not None and len(marks.gone) == GONE_MAX and len(marks.jobs) == JOBS_MAX
    encoded = msgspec.msgpack.encode(Value(1, 1, None, (), marks))
    assert 75 << 10 < len(encoded) < 81 << 10
    assert msgspec.msgpack.decode(encoded, type=Value).marks == marks


def test_a_value_from_before_there_were_marks_is_read() -> None:
    old = msgspec.msgpack.encode([3, 4, 7, []])
    assert msgspec.msgpack.decode(old, type=Value) == Value(3, 4, 7)


def test_requests_are_bounded() -> None:
    decoder = msgspec.msgpack.Decoder(Request)
    good = Operate("o", "k", Effect("job", 0, 0, Propose(0, 1), ((0, 4),)))
    assert decoder.decode(msgspec.msgpack.encode(good)) == good
    for bad in (
        Effect("", 0, 0, Add(1)),
        Effect("job", -1, 0, Add(1)),
        Effect("job", 0, -1, Add(1)),
        Effect("job", 0, 0, Add(1), tuple((n, n + 1) for n in range(65))),
        Effect("job", 0, 0, Delete()),  # type: ignore[arg-type]
        Admit("j" * 65),
    ):
        with pytest.raises(msgspec.ValidationError):
            decoder.decode(msgspec.msgpack.encode(Operate("o", "k", bad)))
