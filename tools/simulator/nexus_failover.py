"""How long clients wait when a voter dies: latencies of a local network, timing of production.

Interface: `failover(seed, load, victim) -> Gaps` kills one node of five, three of which vote, and
measures eight clients at the other four: the longest time in which none of them, and in which one
of them, was told anything. The members' news of the death comes seconds later. `spikes(seed, load,
timing)` kills nobody; instead syncs take long now and then, and it counts what was done.
`python -m manifold.tools.simulator.nexus_failover SEEDS` prints a table.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random
from typing import Any, Literal

from manifold.kernel import rendezvous
from manifold.kernel.nexus.context import Timing
from manifold.kernel.nexus.messages import Answer, Operate
from manifold.kernel.nexus.protocol import Nexus
from manifold.kernel.nexus.values import Add
from manifold.tools.simulator.faults import Faults
from manifold.tools.simulator.nexus import Harness, Plan
from manifold.tools.simulator.world import Node
from manifold.vm.kid import Kid

ONE_WAY_MS = 0.15
SYNC_MS = 3.0
SLOW_SYNC_MS = 30.0
SLOW_EVERY_MS = 250.0
CLIENTS = 8
WARM_MS = 600.0  # long enough for pace and preferred proposer to be known
NEWS_MS = 2500.0  # when members hear of the death
AFTER_MS = 500.0
Load = Literal["one key", "own keys"]
LOADS: tuple[Load, ...] = ("one key", "own keys")

QUIET = Plan(
    nodes=5,
    voters=3,
    faults=Faults(delay=(ONE_WAY_MS, ONE_WAY_MS), sync=(SYNC_MS, SYNC_MS)),
    duration_ms=0.0,
    operations=0,
    changes=0,
    core=False,
    deletes=0.0,
)


@dataclass(frozen=True, slots=True)
class Gaps:
    """Of all clients together, of the worst client, and operations a second before and after."""

    all_ms: float
    one_ms: float
    before_s: float
    after_s: float


class Load8(Harness):
    """Eight clients that add, each as soon as its last operation was answered."""

    def __init__(self, seed: int, load: Load, timing: Timing, victim: int = -1) -> None:
        self.timing = timing
        super().__init__(seed, Nexus, QUIET)
        nodes = [node for node in self.world.nodes if node.index != victim]
        self._attached = [nodes[number % len(nodes)] for number in range(CLIENTS)]
        key = self._key(victim)
        self._keys = [key if load == "one key" else f"own {n}" for n in range(CLIENTS)]
        self.told: list[tuple[float, int]] = []  # when, and which client
        self._count = 0

    def _key(self, victim: int) -> str:
        """A key whose preferred proposer is the victim, where there is one."""
        names = (f"key {n}" for n in range(1000))
        if victim < 0:
            return next(names)
        kid = self.world.nodes[victim].kid
        return next(name for name in names if rendezvous.first(name, sorted(self.kids)) == kid)

    def _boot(
        self, kid: Kid, boot: int, durable: dict[str, bytes], random: Random, _now_ms: float
    ) -> Nexus:
        machine = Nexus(kid, boot, durable, random, self.timing)
        for each in self.kids:
            machine.forwarding.node_up(each)
        return machine

    def load(self) -> None:
        for number in range(CLIENTS):
            self.world.at(self.random.random(), self._next, number)

    def _next(self, number: int) -> None:
        self._count += 1
        wish = Operate(f"o{self._count}", self._keys[number], Add(1))

        def told(_handle: int, answer: Any) -> None:
            assert isinstance(answer, Answer)
            if answer.status == "ok":
                self.told.append((self.world.now_ms, number))
            self._next(number)

        self.ask(self._attached[number], wish, told)

    def down(self, victim: Node) -> None:
        """The news: nobody forwards to it any more."""
        for node in self.world.nodes:
            if node.up:
                self.world.call(node, lambda machine, now: machine.node_down(victim.kid, now))

    def gaps(self, begin_ms: float, end_ms: float) -> tuple[float, float]:
        """The longest silence of all, and of one client."""
        times = [each for each in self.told if begin_ms <= each[0] <= end_ms]
        silences = [_longest([t for t, _ in times], begin_ms, end_ms)]
        for number in range(CLIENTS):
            silences.append(_longest([t for t, n in times if n == number], begin_ms, end_ms))
        return silences[0], max(silences[1:])

    def rate(self, begin_ms: float, end_ms: float) -> float:
        done = sum(begin_ms <= t <= end_ms for t, _ in self.told)
        return 1000.0 * done / (end_ms - begin_ms)


def _longest(times: Sequence[float], begin_ms: float, end_ms: float) -> float:
    marks = [begin_ms, *times, end_ms]
    return max(after - before for before, after in pairwise(marks))


def failover(
    seed: int,
    load: Load,
    victim: int,
    timing: Timing | None = None,
    *,
    pause: bool = False,
    news_ms: float = NEWS_MS,
) -> Gaps:
    """Kill (or stop, as by SIGSTOP) one node; `victim` below 3 votes."""
    harness = Load8(seed, load, timing or Timing(), victim)
    harness.begin()
    harness.load()
    world = harness.world
    world.run(WARM_MS + harness.random.random() * 20.0)
    node, died_ms = world.nodes[victim], world.now_ms
    if pause:
        world.pause(node, news_ms + AFTER_MS)
    else:
        world.crash(node)
    world.run(news_ms)
    harness.down(node)
    world.run(AFTER_MS)
    assert not harness.observer.failures, harness.observer.failures
    all_ms, one_ms = harness.gaps(died_ms, world.now_ms)
    before_s = harness.rate(died_ms - WARM_MS / 2, died_ms)
    return Gaps(all_ms, one_ms, before_s, harness.rate(world.now_ms - AFTER_MS / 2, world.now_ms))


def spikes(seed: int, load: Load, timing: Timing | None = None, *, for_ms: float = 3000.0) -> float:
    """Operations a second where each 250 ms all syncs of 5 ms take 30 ms."""
    harness = Load8(seed, load, timing or Timing())
    harness.begin()
    harness.load()
    world, quick = harness.world, QUIET.faults
    slow = replace(quick, sync=(SLOW_SYNC_MS, SLOW_SYNC_MS))

    def change(faults: Faults, next_ms: float) -> None:
        world.faults = faults
        other = quick if faults is slow else slow
        world.at(next_ms, change, other, 5.0 if other is slow else SLOW_EVERY_MS)

    world.at(100.0, change, slow, 5.0)
    world.run(WARM_MS)
    begun_ms = world.now_ms
    world.run(for_ms)
    return harness.rate(begun_ms, world.now_ms)


def main(arguments: Sequence[str]) -> int:
    """The table of docs/nexus.md."""
    seeds = range(int(arguments[0]) if arguments else 5)
    for load in LOADS:
        for victim in range(4):
            for pause in (False, True):
                found = [failover(seed, load, victim, pause=pause) for seed in seeds]
                what = "stopped" if pause else "killed"
                print(
                    f"{load}, node {victim} {what}: none was told anything for at most "
                    f"{max(each.all_ms for each in found):.1f} ms, one client "
                    f"{max(each.one_ms for each in found):.1f} ms; "
                    f"{min(each.before_s for each in found):.0f} operations/s before, "
                    f"{min(each.after_s for each in found):.0f} after"
                )
        patient = Timing(timeout_ms=500.0)
        quick = sum(spikes(seed, load) for seed in seeds)
        slow = sum(spikes(seed, load, patient) for seed in seeds)
        print(f"{load}, slow syncs: {quick / slow:.3f} of what timeouts of 500 ms get")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
