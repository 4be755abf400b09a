"""Clusters too large for a full view: a constraint that no link meets is met by somebody else."""

from __future__ import annotations

from random import Random

from manifold.kernel.config import GeodeConfig
from manifold.kernel.geode.features import Static
from manifold.kernel.geode.geode import Geode
from manifold.kernel.geode.messages import Demand
from manifold.vm.kid import kid_of

ME = kid_of(b"me")


def wide(seed: int) -> Geode:
    geode = Geode(ME, GeodeConfig(full_view=20, near_links=3, far_links=2), Random(seed))
    geode.node_up(ME, "me", "plain", Static(), 0.0)
    for number in range(200):
        kind = "rare" if number % 50 == 0 else "plain"
        geode.node_up(kid_of(b"%d" % number), f"n-{number}", kind, Static(), 0.0)
    return geode


def test_a_class_that_no_link_has_is_looked_for_among_all() -> None:
    for seed in range(10):
        geode = wide(seed)
        found = geode.ranked(Demand(node_class="rare"), 0.0)
        assert found and all(each.entry.node.node_class == "rare" for each in found)
        assert len(geode.ranked(Demand(), 0.0)) == 6, "without a constraint the links are enough"


def test_the_candidates_found_so_are_no_more_than_a_full_view() -> None:
    geode = wide(1)
    for kid in geode.links():
        geode.node_down(kid)
    excluded = (ME, *geode.links())
    assert len(geode.ranked(Demand(exclude=excluded), 0.0)) == 20
