"""The merge of beliefs: a maximum over (boot, incarnation, state)."""

from __future__ import annotations

from itertools import permutations
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from manifold.kernel.membership import table as table_module
from manifold.kernel.membership.messages import Meta, State, Update
from manifold.kernel.membership.table import FORGET_MS, Table
from manifold.vm.kid import kid_of

KIDS = [kid_of(b"%d" % number) for number in range(3)]


def meta(boot: int, version: int = 0) -> Meta:
    labels = (f"v={version}",)
    return Meta(f"node-{boot}", "node", (f"sim://{boot}",), labels=labels, version=version)


def update(
    kid: int, boot: int, incarnation: int, state: int, described: bool = True, version: int = 0
) -> Update:
    told = meta(boot, version) if described else None
    return Update(KIDS[kid], boot, incarnation, state, "", told)


updates = st.builds(
    update,
    st.integers(0, 2),
    st.integers(1, 3),
    st.integers(0, 3),
    st.integers(0, 3),
    st.booleans(),
    st.integers(0, 2),
)


def summary(table: Table) -> list[tuple[object, ...]]:
    """What is believed, and which description of which boot is known."""
    rows = [
        (r.kid, r.belief, r.meta_boot, r.meta.version if r.meta else -1) for r in table.records()
    ]
    assert all(r.meta is None or r.meta.labels == (f"v={r.meta.version}",) for r in table.records())
    return sorted(rows)


@given(st.lists(updates, max_size=5))
@settings(max_examples=150, deadline=None)
def test_the_merge_is_commutative(news: list[Update]) -> None:
    results = []
    for order in list(permutations(news))[:24]:
        table = Table()
        for item in order:
            table.merge(item, 0.0)
        results.append(summary(table))
    assert all(result == results[0] for result in results)


@given(st.lists(updates, max_size=8))
@settings(max_examples=150, deadline=None)
def test_the_merge_is_idempotent(news: list[Update]) -> None:
    table = Table()
    for item in news:
        table.merge(item, 0.0)
    before = summary(table)
    for item in news:
        assert not table.merge(item, 1.0)[2]
    assert summary(table) == before


class Merging(RuleBasedStateMachine):
    """Whatever arrives in whatever order, beliefs only grow and the living are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Table()
        self.best: dict[str, tuple[int, int, int]] = {}

    @rule(item=updates)
    def hear(self, item: Update) -> None:
        self.table.merge(item, 0.0)
        belief = (item.boot, item.incarnation, item.state)
        self.best[item.kid] = max(belief, self.best.get(item.kid, (-1, 0, 0)))

    @invariant()
    def each_belief_is_the_largest_heard(self) -> None:
        assert {r.kid: r.belief for r in self.table.records()} == self.best

    @invariant()
    def the_living_are_counted(self) -> None:
        living = [belief for belief in self.best.values() if belief[2] <= State.SUSPECT]
        assert self.table.live == len(living)


TestMerging = Merging.TestCase
TestMerging.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)


def test_dead_yields_only_to_a_later_incarnation() -> None:
    table = Table()
    table.merge(update(0, 1, 5, State.DEAD), 0.0)
    assert not table.merge(update(0, 1, 5, State.ALIVE), 1.0)[2]
    assert not table.merge(update(0, 1, 4, State.ALIVE), 1.0)[2]
    assert table.merge(update(0, 1, 6, State.ALIVE), 1.0)[2]


def test_a_larger_boot_beats_dead_of_the_older_whatever_the_incarnation() -> None:
    table = Table()
    table.merge(update(0, 1, 99, State.DEAD), 0.0)
    record, previous, grew = table.merge(update(0, 2, 1, State.ALIVE), 1.0)
    assert grew and previous == State.DEAD and record is not None and record.live


def test_the_highest_incarnation_is_kept_even_if_the_state_stays() -> None:
    """al8n/memberlist#197: a dead node came back by an alive older than one already heard."""
    table = Table()
    table.merge(update(0, 1, 1, State.ALIVE), 0.0)
    table.merge(update(0, 1, 7, State.ALIVE), 0.0)
    table.merge(update(0, 1, 7, State.DEAD), 0.0)
    assert not table.merge(update(0, 1, 6, State.ALIVE), 1.0)[2]
    dead_again = table.merge(update(0, 1, 9, State.DEAD), 1.0)
    assert dead_again[2] and not table.merge(update(0, 1, 8, State.ALIVE), 1.0)[2]


def test_a_name_that_is_no_kid_is_not_remembered() -> None:
    table = Table()
    assert table.merge(Update("x" * 34, 1, 1, 0, "", meta(1)), 0.0) == (None, None, False)
    assert len(table) == 0


def test_a_full_table_forgets_the_longest_dead_and_none_of_the_living(monkeypatch) -> None:
    monkeypatch.setattr(table_module, "MEMBERS_MAX", 2)
    table = Table()
    table.merge(update(0, 1, 1, State.DEAD), 0.0)
    table.merge(update(1, 1, 1, State.ALIVE), 0.0)
    assert table.merge(update(2, 1, 1, State.ALIVE), 1.0)[2]
    assert table.get(KIDS[0]) is None
    assert table.merge(update(0, 1, 1, State.ALIVE), 2.0) == (None, None, False)
    assert len(table) == 2


def test_the_dead_are_forgotten_after_a_bound() -> None:
    table = Table()
    table.merge(update(0, 1, 1, State.DEAD), 0.0)
    table.merge(update(1, 1, 1, State.ALIVE), 0.0)
    assert table.expired(FORGET_MS) == []
    assert [record.kid for record in table.expired(FORGET_MS + 1)] == [KIDS[0]]


def test_drawing_never_yields_the_dead_the_excluded_or_the_undescribed() -> None:
    table = Table()
    for number in range(100):
        kid = kid_of(b"n%d" % number)
        state = State.DEAD if number % 2 else State.ALIVE
        table.merge(Update(kid, 1, 1, state, "", meta(1) if number % 3 else None), 0.0)
    banned = kid_of(b"n2")
    for seed in range(50):
        drawn = table.draw(Random(seed), 3, without=banned)
        assert len({record.kid for record in drawn}) == len(drawn) == 3
        assert all(r.live and r.meta is not None and r.kid != banned for r in drawn)
