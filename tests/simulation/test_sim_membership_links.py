"""Bad links bury nobody who runs, and keep nobody from being found who does not.

The bound is that of docs/membership.md, "False deaths"; planted bugs must break it.
"""

from __future__ import annotations

from statistics import median

import pytest

from manifold.kernel.config import MembershipConfig
from manifold.kernel.membership.messages import State, Update
from manifold.kernel.membership.protocol import Membership
from manifold.kernel.membership.suspicion import least_ms
from manifold.kernel.membership.table import Record
from manifold.tools.simulator.bad_links import (
    FALSE_DEATHS_PER_NODE_HOUR_MAX,
    WEATHERS,
    Count,
    Scene,
    Weather,
    detect,
    watch,
)
from manifold.vm.kid import Kid

NODES = 16
EPISODE_MS = 120_000.0
WITHIN = [weather for weather in WEATHERS if not weather.beyond]
NAMED = {weather.name: weather for weather in WEATHERS}


def name_of(weather: object) -> str:
    return weather.name.replace(" ", "-") if isinstance(weather, Weather) else ""


def watched(
    weather: Weather, episodes: int, *, stolen: bool = False, machine: type[Membership] = Membership
) -> Count:
    return watch(Scene(weather, NODES, stolen, machine), episodes, episode_ms=EPISODE_MS)


@pytest.mark.parametrize("stolen", [False, True], ids=["", "stolen"])
@pytest.mark.parametrize("weather", WITHIN, ids=name_of)
def test_nobody_who_can_be_reached_is_buried(weather: Weather, stolen: bool) -> None:
    count = watched(weather, 1 if stolen else 2, stolen=stolen)
    assert count.per_node_hour <= FALSE_DEATHS_PER_NODE_HOUR_MAX, count.examples


@pytest.mark.parametrize(
    "name",
    ["one-way cuts, three a node", "half of links flap, 5 of 10 s", "20 % lost"],
)
def test_who_is_gone_is_found_as_soon_in_bad_weather(name: str) -> None:
    config = MembershipConfig()
    first_s, _ = detect(Scene(NAMED[name], NODES), 7)
    expected_s = (config.probe_ms * 1.582 + least_ms(config, NODES)) / 1000
    assert median(first_s) < expected_s + 3 * config.probe_ms / 1000
    assert first_s[-1] < 2.5 * expected_s


def test_who_is_out_of_reach_for_longer_than_a_suspicion_is_buried_and_found_again() -> None:
    """The limit of what is promised, and that the count can count."""
    weather = NAMED["one node off 15 of 30 s"]
    scene = Scene(weather, NODES)
    count = watch(scene, 1, episode_ms=EPISODE_MS)
    assert 2 <= count.deaths <= 5  # one for each time; the others bury nobody else
    world = scene.begin(1)
    world.run(EPISODE_MS)
    world.heal()
    world.run(30_000.0)
    states = {member.state for node in world.nodes for member in node.machine.members()}
    assert states == {State.ALIVE}


class AsksNobody(Membership):
    """No indirect probe, no relay in a hearing."""

    def _relays_for(self, target: str, *, suspects: bool = False) -> tuple[()]:
        return ()


class HearsNobody(Membership):
    """A suspicion that runs out is a verdict."""

    def _hearing_ms(self) -> float:
        return 0.0

    def _begin_hearing(self, record: Record, now_ms: float) -> None:
        dead = Update(record.kid, record.boot, record.incarnation, State.DEAD, self.me.kid)
        self._apply(dead, now_ms)


class SaysNothingOfRefutations(Membership):
    """Who still tells an accusation that was refuted is left in that belief."""

    def _correct(self, source: Kid, update: Update, now_ms: float) -> None:
        return


class NeverRefutes(Membership):
    def _about_me(self, update: Update, now_ms: float) -> None:
        return


class TrustsItself(Membership):
    """Judges although no relay answers it."""

    def _hears(self, now_ms: float) -> bool:
        return False


@pytest.mark.parametrize(
    "mutant",
    [AsksNobody, HearsNobody, SaysNothingOfRefutations, NeverRefutes, TrustsItself],
    ids=lambda value: value.__name__,
)
def test_each_planted_bug_breaks_the_bound(mutant: type[Membership]) -> None:
    count = watched(NAMED["one node unheard by all but one"], 2, machine=mutant)
    assert count.per_node_hour > FALSE_DEATHS_PER_NODE_HOUR_MAX, mutant.__name__
