"""Links and forwarding: sections "Topology" and "Assert" of the design page of geode."""

from __future__ import annotations

from collections import Counter
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from manifold.kernel.config import GeodeConfig
from manifold.kernel.geode.features import Features, Static
from manifold.kernel.geode.geode import Geode
from manifold.kernel.geode.links import POOL_MAX, Links, distance
from manifold.kernel.geode.messages import Demand, LoadReport
from manifold.kernel.geode.routing import Action, next_hop
from manifold.vm.kid import Kid, kid_of

CONFIG = GeodeConfig()
ME = kid_of(b"me")


def kid(number: int) -> Kid:
    return kid_of(b"node %d" % number)


def at(compute: float) -> Features:
    return Features(compute, 0.5, 0.5, 0.5)


def line(count: int, seed: int = 0) -> Links:
    """Node i lies at distance i/count of this one."""
    links = Links(ME, CONFIG, Random(seed))
    links.heard(ME, at(0.0))
    for number in Random(seed).sample(range(1, count + 1), count):
        links.heard(kid(number), at(number / count))
    return links


# --- links ------------------------------------------------------------------------------------


def test_the_eight_nearest_of_all_that_were_heard_of_are_near_links() -> None:
    for seed in range(5):
        links = line(1000, seed)
        assert links.near == tuple(kid(number) for number in range(1, 9))
        assert len(links.far) == 8


def test_long_links_are_drawn_with_p_proportional_to_1_over_rank() -> None:
    ranks = Counter[int]()
    links = line(108)  # 8 near, so ranks 1 to 100 are left for long links
    number = {kid(each): each - 8 for each in range(1, 109)}
    for _ in range(4000):
        links.refresh()
        ranks[number[links.far[-1]]] += 1
    early = sum(ranks[rank] for rank in range(1, 11))
    late = sum(ranks[rank] for rank in range(91, 101))
    harmonic = sum(1 / rank for rank in range(1, 101))
    # The seven other long links are often among the first ranks, so less than 1/rank is left there.
    assert 0.6 < early / 4000 / (sum(1 / r for r in range(1, 11)) / harmonic) < 1.05
    assert 0.7 < late / 4000 / (sum(1 / r for r in range(91, 101)) / harmonic) < 2.0


def test_equal_machines_are_not_all_linked_to_the_same_ones() -> None:
    seen = set()
    for owner in range(12):
        links = Links(kid(owner), CONFIG, Random(owner))
        links.heard(kid(owner), at(0.5))
        for number in range(12, 100):
            links.heard(kid(number), at(0.5))
        seen.update(links.near)
    assert len(seen) > 40


steps = st.lists(st.tuples(st.sampled_from("hhhfrm"), st.integers(0, 40)), max_size=120)


@settings(deadline=None)
@given(steps, st.integers(0, 9))
def test_links_are_bounded_without_repeats_and_never_to_the_dead(
    history: list[tuple[str, int]], seed: int
) -> None:
    links = Links(ME, CONFIG, Random(seed))
    links.heard(ME, at(0.3))
    alive: dict[Kid, Features] = {}
    for step, number in history:
        where = at(number / 40)
        if step == "f":
            links.forget(kid(number))
            alive.pop(kid(number), None)
        elif step == "r":
            links.refresh()
        else:
            where = at(1 - number / 40) if step == "m" else where
            links.heard(kid(number), where)
            alive[kid(number)] = where
        everyone = [*links.near, *links.far]
        assert len(everyone) == len(set(everyone)) == min(16, len(alive))
        assert set(everyone) <= set(alive)
        nearest = sorted(distance(at(0.3), each) for each in alive.values())[:8]
        assert [distance(at(0.3), alive[each]) for each in links.near] == nearest


def test_what_is_kept_is_bounded_and_the_pool_is_an_even_sample() -> None:
    hits = Counter[bool]()
    near_half = {kid(number) for number in range(1, 1001)}
    for seed in range(6):
        links = line(2000, seed)
        assert len(links._pool) == POOL_MAX
        assert len(links._features) <= POOL_MAX + 16
        hits.update(each in near_half for each in links._pool)
    assert 0.44 < hits[True] / hits.total() < 0.56


# --- one hop ----------------------------------------------------------------------------------


def test_a_hop_must_save_five_percent() -> None:
    worth = next_hop(1.0, {kid(1): 0.94, kid(2): 0.97}, [], 0, (), CONFIG, Random(0))
    assert (worth.action, worth.to) == (Action.FORWARD, kid(1))
    stay = next_hop(1.0, {kid(1): 0.96}, [], 0, (), CONFIG, Random(0))
    assert stay.action is Action.EXECUTE


def test_a_node_that_may_not_run_it_sends_it_to_one_that_may_or_searches() -> None:
    may = next_hop(None, {kid(1): 9.0}, [kid(2)], 0, (), CONFIG, Random(0))
    assert (may.action, may.to) == (Action.FORWARD, kid(1))
    search = next_hop(None, {}, [kid(2), kid(3)], 0, (kid(2),), CONFIG, Random(0))
    assert (search.action, search.to) == (Action.FORWARD, kid(3))
    lost = next_hop(None, {}, [kid(2)], 0, (kid(2),), CONFIG, Random(0))
    assert lost.action is Action.REJECT


kids = st.sampled_from([kid(number) for number in range(6)])
costs = st.floats(0.001, 1e6)


@given(
    st.none() | costs,
    st.dictionaries(kids, costs),
    st.lists(kids),
    st.integers(0, 9),
    st.lists(kids),
)
def test_hops_never_exceed_the_limit_and_never_go_back(
    here: float | None, around: dict[Kid, float], links: list[Kid], hops: int, visited: list[Kid]
) -> None:
    found = next_hop(here, around, links, hops, visited, CONFIG, Random(0))
    if found.action is Action.FORWARD:
        assert hops < CONFIG.hops and found.to is not None and found.to not in visited
    elif found.action is Action.EXECUTE:
        assert here is not None
    else:
        assert here is None
    if here is not None:
        assert found.action is not Action.REJECT  # a local optimum never loses a task


# --- in geode ---------------------------------------------------------------------------------


def wide(count: int) -> Geode:
    geode = Geode(kid(0), GeodeConfig(full_view=32), Random(1))
    for number in range(count):
        static = Static(compute=1.0, gpu=number == 5, latency_ms=0.0)
        geode.node_up(kid(number), f"node-{number}", "c", static, 0.0)
    return geode


def test_up_to_full_view_every_node_is_a_candidate_and_above_only_the_links() -> None:
    assert len(wide(32).candidates(Demand(1.0), 0.0)) == 32
    geode = wide(200)
    found = {each.kid for each in geode.candidates(Demand(1.0), 0.0)}
    assert found == {kid(0), *geode.links()} and len(found) == 17


def test_geode_forwards_to_the_least_loaded_link() -> None:
    geode = wide(200)
    for number in (0, *range(1, 200)):
        queued = 0.0 if kid(number) == geode.links()[3] else 1e12
        geode.report(kid(number), LoadReport(queued_gas=queued), 1.0)
    found = geode.next_hop(Demand(1e6), 1.0, 0, (kid(0),))
    assert (found.action, found.to) == (Action.FORWARD, geode.links()[3])
    assert geode.next_hop(Demand(1e6), 1.0, 6, (kid(0),)).action is Action.EXECUTE
    pinned = Demand(1e6, node="nobody")
    assert geode.next_hop(pinned, 1.0, 0, (kid(0),)).action is Action.FORWARD
    assert geode.next_hop(pinned, 1.0, 6, (kid(0),)).action is Action.REJECT
