"""False deaths where links are bad but nobody is gone: one-way cuts, flapping, loss, stolen time.

Interface: `WEATHERS` names what links are like; `watch(scene, episodes)` counts the processes that
some node held dead while they ran, and the node-hours; `detect` times the deaths that are true, in
the same weather. Everything from seeds; an episode is a cluster of its own, so the
random links differ between episodes.

A death is false where the process runs and, in every span as long as the least suspicion, a
message could have got from it to each other node and back, through at most one other node each
way. All `WEATHERS` but those with `beyond` keep to that, so each death in them is false.
Source: docs/membership.md, "False deaths".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random

from manifold.kernel.config import MembershipConfig
from manifold.kernel.membership.messages import MemberChanged, Refuted, State
from manifold.kernel.membership.protocol import Membership
from manifold.tools.simulator.faults import Faults
from manifold.tools.simulator.membership import membership_only
from manifold.tools.simulator.protocols import Protocols, Roster
from manifold.tools.simulator.run import build
from manifold.tools.simulator.world import Node, World

FALSE_DEATHS_PER_NODE_HOUR_MAX = 0.05  # documented: docs/membership.md
FOR_EVER_MS = 1e12
CONVERGE_MS = 10_000.0
EPISODE_MS = 600_000.0
HOUR_MS = 3_600_000.0
SETTLE_MS = 30_000.0  # of bad weather before a node is killed in it
GONE_MS = 120_000.0  # four times the longest suspicion of 16 nodes
EXAMPLES_MAX = 3
STEAL = 0.3
STALL_PERIOD_MS = (200.0, 1400.0)  # a stall is STEAL of it: 60 to 420 ms, on both sides of lag_ms

Lay = Callable[[World, Random], None]


@dataclass(frozen=True, slots=True)
class Weather:
    """What links are like; `lay` does it to a cluster that has converged."""

    name: str
    lay: Lay
    loss: float = 0.0
    beyond: bool = False  # a node is out of reach for longer than the least suspicion


def _pairs(world: World) -> list[tuple[int, int]]:
    count = len(world.nodes)
    return [(a, b) for a in range(count) for b in range(count) if a != b]


def _nothing(world: World, random: Random) -> None:
    """Links are well."""


def one_way(links: float) -> Lay:
    """`links`: how many a node, in the mean; 0: a single one in the cluster."""

    def lay(world: World, random: Random) -> None:
        count = round(links * len(world.nodes)) or 1
        for source, target in random.sample(_pairs(world), count):
            world.network.cut(source, target, FOR_EVER_MS)

    return lay


def unheard(part: float) -> Lay:
    """One node hears all, and is heard by all but this part of them; by one at least."""

    def lay(world: World, random: Random) -> None:
        victim, *others = random.sample(range(len(world.nodes)), len(world.nodes))
        for other in others[: min(round(part * len(others)), len(others) - 1)]:
            world.network.cut(victim, other, FOR_EVER_MS)

    return lay


def unhearing(part: float) -> Lay:
    """One node is heard by all, and hears all but this part of them; one at least."""

    def lay(world: World, random: Random) -> None:
        victim, *others = random.sample(range(len(world.nodes)), len(world.nodes))
        for other in others[: min(round(part * len(others)), len(others) - 1)]:
            world.network.cut(other, victim, FOR_EVER_MS)

    return lay


def flapping(links: float, period_ms: float, down_ms: float) -> Lay:
    """This part of all directed links, each with a phase of its own."""

    def lay(world: World, random: Random) -> None:
        pairs = _pairs(world)
        for source, target in random.sample(pairs, round(links * len(pairs))):
            phase_ms = random.random() * period_ms
            world.network.flap(source, target, period_ms, down_ms, phase_ms)

    return lay


def flapping_node(period_ms: float, down_ms: float) -> Lay:
    """All links of one node at once: it is alone for `down_ms` of each period."""

    def lay(world: World, random: Random) -> None:
        victim = random.randrange(len(world.nodes))
        for other in range(len(world.nodes)):
            if other != victim:
                world.network.flap(victim, other, period_ms, down_ms)
                world.network.flap(other, victim, period_ms, down_ms)

    return lay


def together(*lays: Lay) -> Lay:
    def lay(world: World, random: Random) -> None:
        for each in lays:
            each(world, random)

    return lay


WEATHERS = (
    Weather("links are well", _nothing),
    Weather("one one-way cut", one_way(0)),
    Weather("one-way cuts, one a node", one_way(1)),
    Weather("one-way cuts, three a node", one_way(3)),
    Weather("one node unheard by half", unheard(0.5)),
    Weather("one node unheard by all but one", unheard(1)),
    Weather("one node deaf to half", unhearing(0.5)),
    Weather("one node deaf to all but one", unhearing(1)),
    Weather("a tenth of links flap, 5 of 10 s", flapping(0.1, 10_000, 5_000)),
    Weather("half of links flap, 5 of 10 s", flapping(0.5, 10_000, 5_000)),
    Weather("half of links flap, 30 of 60 s", flapping(0.5, 60_000, 30_000)),
    Weather("one node off 1 of 2 s", flapping_node(2_000, 1_000)),
    Weather("one node off 3 of 6 s", flapping_node(6_000, 3_000)),
    Weather("one node off 4 of 5 s", flapping_node(5_000, 4_000)),
    Weather("one node off 15 of 30 s", flapping_node(30_000, 15_000), beyond=True),
    Weather("1 % lost", _nothing, 0.01),
    Weather("5 % lost", _nothing, 0.05),
    Weather("10 % lost", _nothing, 0.10),
    Weather("20 % lost", _nothing, 0.20),
    Weather(
        "one-way cuts, one a node, a tenth of links flap, 5 % lost",
        together(one_way(1), flapping(0.1, 10_000, 5_000)),
        0.05,
    ),
)


@dataclass(slots=True)
class Count:
    """What was seen in so many node-hours."""

    node_hours: float = 0.0
    deaths: int = 0  # processes held dead while they ran, once for each of their incarnations
    views: int = 0  # by how many nodes, all together
    suspicions: int = 0  # alive -> suspect, in each view
    refuted: int = 0
    messages: int = 0
    examples: list[str] = field(default_factory=list)

    @property
    def per_node_hour(self) -> float:
        return self.deaths / self.node_hours


class Witness:
    """Counts what nodes tell of processes that run."""

    def __init__(self, world: World, count: Count) -> None:
        self._world = world
        self._count = count
        self._dead: set[tuple[str, int, int]] = set()
        world.on_notify.setdefault(MemberChanged, []).append(self._changed)
        world.on_notify.setdefault(Refuted, []).append(self._refuted)

    def _changed(self, viewer: Node, event: MemberChanged) -> None:
        member, count = event.member, self._count
        subject = self._world.node(member.kid)
        if not subject.up or subject.boot != member.boot:
            return
        if member.state == State.SUSPECT and event.previous_state == State.ALIVE:
            count.suspicions += 1
        if member.state != State.DEAD:
            return
        count.views += 1
        death = (member.kid, member.boot, member.incarnation)
        if death not in self._dead:
            self._dead.add(death)
            count.deaths += 1
            if len(count.examples) < EXAMPLES_MAX:
                when = f"seed {self._world.seed}, t={self._world.now_ms:.0f} ms"
                count.examples.append(f"{when}: node {viewer.index} buries node {subject.index}")

    def _refuted(self, node: Node, event: Refuted) -> None:
        self._count.refuted += 1


def steal(world: World, random: Random) -> None:
    """From now on each node stands still for `STEAL` of the time, in pieces."""

    def stall(node: Node) -> None:
        period_ms = random.uniform(*STALL_PERIOD_MS)
        if node.up:
            world.pause(node, period_ms * STEAL)
        world.at(period_ms, stall, node)

    for node in world.nodes:
        world.at(random.uniform(0.0, STALL_PERIOD_MS[1]), stall, node)


@dataclass(frozen=True, slots=True)
class Scene:
    """A cluster and what is done to it. A mutant of `machine` must show in the counts."""

    weather: Weather
    nodes: int = 16
    stolen: bool = False
    machine: type[Membership] = Membership

    def begin(self, seed: int) -> World:
        """A cluster that has converged, and is out in the weather."""
        settings = MembershipConfig()

        def unchecked(roster: Roster) -> Protocols:
            """No checkers: theirs is what follows when faults end, and these stay."""
            return replace(membership_only(roster, settings, self.machine), checkers=())

        faults = Faults(drop=self.weather.loss)
        world, _ = build(seed, self.nodes, faults, unchecked)
        world.start_all()
        world.run(CONVERGE_MS)
        random = Random(f"{self.weather.name} {seed}")
        self.weather.lay(world, random)
        world.break_things()
        if self.stolen:
            steal(world, random)
        return world


def watch(scene: Scene, episodes: int, *, seed: int = 1, episode_ms: float = EPISODE_MS) -> Count:
    """Count deaths told in `episodes` clusters in which nobody dies."""
    count = Count()
    for number in range(seed, seed + episodes):
        world = scene.begin(number)
        Witness(world, count)
        before = world.network.sent
        world.run(episode_ms)
        count.messages += world.network.sent - before
        count.node_hours += scene.nodes * episode_ms / HOUR_MS
    return count


def detect(scene: Scene, kills: int, *, seed: int = 1) -> tuple[list[float], list[float]]:
    """Seconds from a true end until the first and until every other node holds it for dead.

    Sorted; infinite where that is not within `GONE_MS`. A node that hears few may be the last.
    """
    took = [_kill_one(scene.begin(number), number) for number in range(seed, seed + kills)]
    return sorted(first for first, _ in took), sorted(every for _, every in took)


def _kill_one(world: World, seed: int) -> tuple[float, float]:
    world.run(SETTLE_MS)
    victim = Random(seed).choice(world.nodes)
    world.crash(victim)
    ended_ms = world.now_ms
    known_s: dict[int, float] = {}

    def changed(viewer: Node, event: MemberChanged) -> None:
        if event.member.kid == victim.kid and event.member.state == State.DEAD:
            known_s.setdefault(viewer.index, (world.now_ms - ended_ms) / 1000)

    world.on_notify.setdefault(MemberChanged, []).append(changed)
    took = world.run_until(lambda: len(known_s) == len(world.nodes) - 1, GONE_MS)
    every_s = max(known_s.values()) if took is not None else math.inf
    return min(known_s.values(), default=math.inf), every_s
