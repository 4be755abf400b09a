"""What a box office does while everything is well. One cluster serves all of these tests."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from box_office import BoxOffice


@pytest.fixture
def offices(manifold_shared_cluster, request):
    """One at each node, for a show of this test alone."""
    cluster = manifold_shared_cluster
    return [BoxOffice(cluster.client(alias), request.node.name) for alias in cluster.aliases]


def test_a_seat_is_sold_once(offices):
    assert offices[0].sell(1, "ada")
    assert not offices[1].sell(1, "bob")
    assert [office.holder(1) for office in offices] == ["ada"] * len(offices)


def test_who_asks_again_still_has_the_seat(offices):
    assert offices[0].sell(1, "ada")
    assert offices[1].sell(1, "ada")


def test_a_seat_that_is_taken_back_is_sold_again(offices):
    assert offices[0].sell(1, "ada")
    assert not offices[0].take_back(1, "bob")
    assert offices[1].take_back(1, "ada")
    assert offices[0].sell(1, "bob")
    assert offices[0].sold() == {1: "bob"}


def test_of_many_who_want_the_same_seats_each_seat_goes_to_one(offices):
    def rush(number):
        office = offices[number % len(offices)]
        return [seat for seat in range(10) if office.sell(seat, f"customer {number}")]

    with ThreadPoolExecutor(6) as pool:
        bought = list(pool.map(rush, range(6)))
    assert sorted(seat for seats in bought for seat in seats) == list(range(10))
    assert offices[0].sold() == {
        seat: f"customer {number}" for number, seats in enumerate(bought) for seat in seats
    }
