"""What a box office does while machines and links fail. Each test has a cluster of its own."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from box_office import BoxOffice

import manifold


@pytest.mark.manifold(nodes=5)
def test_a_minority_sells_nothing_and_the_majority_goes_on(manifold_cluster):
    cluster = manifold_cluster
    few, many = BoxOffice(cluster.client(0), "show"), BoxOffice(cluster.client(4), "show")
    assert few.sell(1, "ada")
    cluster.partition({0, 1}, {2, 3, 4})
    with pytest.raises(manifold.Unavailable):
        few.sell(2, "bob")
    assert many.sell(2, "cleo")
    cluster.heal()
    cluster.wait_converged()
    assert few.sold() == many.sold() == {1: "ada", 2: "cleo"}


@pytest.mark.manifold(nodes=3)
def test_no_sale_is_lost_when_every_machine_loses_power(manifold_cluster):
    cluster = manifold_cluster
    office = BoxOffice(cluster.client(), "show")
    assert all(office.sell(seat, "ada") for seat in range(20))
    for alias in cluster.aliases:
        cluster.kill(alias)
    cluster.wait_converged()
    assert BoxOffice(cluster.client(), "show").sold() == dict.fromkeys(range(20), "ada")


@pytest.mark.manifold(nodes=5)
def test_in_a_rush_nothing_is_sold_twice_while_machines_die(manifold_cluster):
    cluster = manifold_cluster
    offices = [BoxOffice(cluster.client(alias), "show") for alias in cluster.aliases]

    def rush(number):
        bought = []
        for seat in range(40):
            try:
                if offices[number].sell(seat, f"customer {number}"):
                    bought.append(seat)
            except manifold.ManifoldError:
                pass  # this customer goes home without that seat
        return bought

    with ThreadPoolExecutor(5) as pool:
        selling = [pool.submit(rush, number) for number in range(5)]
        for _ in range(3):
            cluster.restart(cluster.random.choice(cluster.aliases))
        bought = [each.result() for each in selling]
    cluster.wait_converged()
    sold = BoxOffice(cluster.client(), "show").sold()
    for number, seats in enumerate(bought):
        for seat in seats:
            assert sold[seat] == f"customer {number}"
    assert sum(map(len, bought)) > 0


@pytest.mark.manifold(nodes=3)
def test_far_away_it_takes_longer_and_is_as_right(manifold_cluster):
    cluster = manifold_cluster
    for peer in (1, 2):
        cluster.slow(0, peer, latency_ms=50)
    office = BoxOffice(cluster.client(0), "show")
    began_s = time.monotonic()
    assert office.sell(1, "ada")
    assert time.monotonic() - began_s > 0.1  # there and back
    assert office.sold() == {1: "ada"}


@pytest.mark.manifold(nodes=3)
def test_a_full_disk_and_a_wrong_clock_stop_no_sale(manifold_cluster):
    cluster = manifold_cluster
    cluster.fill_disk(1)
    cluster.clock_skew(2, jump_ms=3_600_000, rate=1.5)
    office = BoxOffice(cluster.client(0), "show")
    assert all(office.sell(seat, "ada") for seat in range(10))
    cluster.free_disk(1)
    cluster.restart(1)
    assert len(BoxOffice(cluster.client(1), "show").sold()) == 10
