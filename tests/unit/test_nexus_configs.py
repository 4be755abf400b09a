"""Configurations: quorums that meet, epochs that follow, the preferred proposer."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold.kernel import rendezvous
from manifold.kernel.nexus.configs import Voter, first_config, majority
from manifold.vm.kid import kid_of

KIDS = [kid_of(b"%d" % number) for number in range(7)]
VOTERS = [Voter(kid, number + 1) for number, kid in enumerate(KIDS)]
some_voters = st.lists(st.sampled_from(VOTERS), min_size=1, max_size=5, unique=True)


def quorums(config: object, kids: list[str]) -> list[frozenset[str]]:
    return [
        frozenset(group)
        for size in range(1, len(kids) + 1)
        for group in combinations(kids, size)
        if config.quorum(group)  # type: ignore[attr-defined]
    ]


@settings(deadline=None)  # the machine may be busy
@given(some_voters, some_voters)
def test_quorums_of_configurations_that_follow_each_other_always_meet(
    old: list[Voter], new: list[Voter]
) -> None:
    first = first_config(old)
    joint = first.toward(new)
    last = joint.settled()
    for one, other in ((first, first), (first, joint), (joint, joint), (joint, last), (last, last)):
        kids = sorted({*one.kids(), *other.kids()})
        for each in quorums(one, kids):
            assert all(each & another for another in quorums(other, kids))


@settings(deadline=None)  # the machine may be busy
@given(some_voters)
def test_whoever_initialises_the_same_voters_makes_the_same_configuration(
    voters: list[Voter],
) -> None:
    config = first_config(voters)
    assert config == first_config(voters[::-1]) and config.count == 1 and not config.joint
    assert 0 < config.epoch < 1 << 62


def test_epochs_count_up_within_an_origin_and_one_change_is_made_at_a_time() -> None:
    first = first_config(VOTERS[:3])
    joint = first.toward(VOTERS[:5])
    last = joint.settled()
    assert [each.count for each in (first, joint, last)] == [1, 2, 3]
    assert first.origin == joint.origin == last.origin != first_config(VOTERS[:4]).origin
    with pytest.raises(AssertionError):
        joint.toward(VOTERS[:1])
    with pytest.raises(AssertionError):
        last.settled()


def test_a_voter_is_a_node_with_its_disk() -> None:
    config = first_config(VOTERS[:3])
    assert config.is_voter(KIDS[0], 1) and not config.is_voter(KIDS[0], 2)
    assert not config.is_voter(KIDS[4], 5)


@pytest.mark.parametrize(("count", "needed"), [(1, 1), (2, 2), (3, 2), (4, 3), (5, 3), (7, 4)])
def test_a_majority_is_more_than_half(count: int, needed: int) -> None:
    assert majority(VOTERS[:count], KIDS[:needed])
    assert not majority(VOTERS[:count], KIDS[: needed - 1])


def test_the_preferred_proposer_moves_only_when_it_goes() -> None:
    keys = [f"key {number}" for number in range(300)]
    before = {key: rendezvous.first(key, KIDS) for key in keys}
    assert rendezvous.first("k", []) is None
    shares = [list(before.values()).count(kid) for kid in KIDS]
    assert min(shares) > 20
    for key in keys:
        after = rendezvous.first(key, KIDS[1:])
        assert after == before[key] or before[key] == KIDS[0]
