"""Who ought to vote: as far apart as the nodes allow, and as few changes as possible."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from manifold.kernel.nexus.seating import choose, settle
from manifold.vm.kid import Kid, kid_of

KIDS = [kid_of(bytes([number])) for number in range(24)]

nodes = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from("xyz"), st.sampled_from("op")),
    min_size=1,
    max_size=24,
).map(
    lambda rows: [
        (KIDS[at], (f"org={org}", f"rack={rack}", f"site={site}"))
        for at, (site, rack, org) in enumerate(rows)
    ]
)


def group(labels: tuple[str, ...], name: str) -> str:
    return dict(label.split("=") for label in labels)[name]


def counts(candidates, chosen: list[Kid], key) -> Counter:
    return Counter(key(labels) for kid, labels in candidates if kid in chosen)


@given(nodes, st.integers(1, 7))
def test_sites_have_as_many_voters_as_each_other_as_far_as_they_have_nodes(
    candidates, count: int
) -> None:
    chosen = choose(count, candidates)
    assert len(chosen) == len(set(chosen)) == min(count, len(candidates))
    site = lambda labels: group(labels, "site")  # noqa: E731
    taken = counts(candidates, chosen, site)
    most = max(taken.values())
    for kid, labels in candidates:
        if kid not in chosen:
            assert taken[site(labels)] >= most - 1


@given(nodes, st.integers(1, 7))
def test_so_do_the_racks_of_one_site(candidates, count: int) -> None:
    chosen = choose(count, candidates)
    for name in "abc":
        here = [each for each in candidates if group(each[1], "site") == name]
        rack = lambda labels: group(labels, "rack")  # noqa: E731
        taken = counts(here, chosen, rack)
        most = max(taken.values(), default=0)
        for kid, labels in here:
            if kid not in chosen:
                assert taken[rack(labels)] >= most - 1


def test_five_voters_over_three_sites_lie_two_two_one_and_bear_the_loss_of_any_site() -> None:
    candidates = [(KIDS[at], (f"site={'abc'[at // 4]}",)) for at in range(12)]
    chosen = choose(5, candidates)
    taken = counts(candidates, chosen, lambda each: group(each, "site"))
    assert sorted(taken.values()) == [1, 2, 2]
    assert all(2 * (5 - lost) > 5 for lost in taken.values())


def test_a_silent_voter_counts_for_the_site_that_it_is_known_to_be_in() -> None:
    voters = KIDS[:3]
    there = [(KIDS[1], ("site=b",)), (KIDS[3], ("site=a",)), (KIDS[4], ("site=c",))]
    known = {KIDS[0]: ("site=a",), KIDS[2]: ("site=c",)}
    assert settle(voters, {KIDS[2]}, there, known) == [KIDS[1], KIDS[0], KIDS[4]]


def test_without_labels_the_first_ones_vote() -> None:
    assert choose(3, [(kid, ()) for kid in KIDS[:5]]) == KIDS[:3]


def test_five_voters_over_two_sites_and_organisations() -> None:
    candidates = [
        (KIDS[at], (f"org={'ops'[at % 3]}", "rack=r1", f"site={'ab'[at // 4]}")) for at in range(8)
    ]
    chosen = choose(5, candidates)
    assert sorted(counts(candidates, chosen, lambda each: group(each, "site")).values()) == [2, 3]
    assert len(counts(candidates, chosen, lambda each: group(each, "org"))) == 3


@given(nodes, st.integers(1, 7), st.sets(st.sampled_from(KIDS)))
def test_who_leaves_is_replaced_and_who_stays_goes_on(candidates, count: int, leaving) -> None:
    voters = choose(count, candidates)
    staying = [kid for kid, _ in candidates if kid not in leaving]
    then = settle(voters, leaving, candidates)
    assert len(then) == len(set(then))
    assert set(then) <= set(staying)
    kept = [kid for kid in voters if kid not in leaving]
    if len(kept) == len(voters):
        assert then == voters
    elif len(staying) >= len(voters):
        assert len(then) == len(voters)
        assert set(kept) <= set(then)
    else:
        assert len(then) == len(staying) - (len(staying) % 2 == 0) or not staying
        assert set(then) <= set(kept) or set(kept) <= set(then)


def test_a_voter_that_is_silent_for_now_keeps_its_vote() -> None:
    voters = KIDS[:3]
    there = [(kid, ()) for kid in (KIDS[0], KIDS[1], KIDS[3])]
    assert settle(voters, {KIDS[0]}, there) == [KIDS[1], KIDS[2], KIDS[3]]
