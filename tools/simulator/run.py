"""One run of the simulator from a seed: what `manifold sim` calls.

Interface: `simulate(seed, nodes, faults, duration_ms, protocols) -> Report`. `protocols` says
what runs on a node and how it is judged: a `Protocols` made by a factory from the `Roster`. Give
another factory to run a composite machine, with more checkers. Two modes in one run: *safety*
(faults throughout; checkers watch), then *liveness* (all of the nodes, or with `core` a random
majority of them, are well for ever, and every checker must settle within its limit).

Source: design page of testing; TigerBeetle's VOPR (safety, then liveness).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol

from manifold.tools.simulator.faults import Faults, parse
from manifold.tools.simulator.world import Boot, Node, World
from manifold.vm.kid import Kid

FAILURES_MAX = 20  # kept and printed; the first one is what matters
STEP_MS = 250.0  # how often a cluster of 100 is looked at while it settles
PREFIX = "manifold sim"


class Checker(Protocol):
    """Judges from outside. `failures` grows during the run; `settled` is what liveness waits for.

    `name` says what is checked, for the report; `settle_ms` how long settling may take.
    """

    name: str
    settle_ms: float
    failures: list[str]

    def watch(self, world: World, faults: Faults) -> None:
        """Register with the world, before any node starts."""

    def settled(self, world: World, well: Sequence[Node]) -> str:
        """Why the well part of the cluster is not yet as it should be; "" when it is."""

    def summary(self) -> str:
        """What was checked, with figures, for the report."""


@dataclass(frozen=True, slots=True)
class Roster:
    """Who will take part, for the factory."""

    kids: tuple[Kid, ...]
    addresses: tuple[str, ...]
    seed: int

    def index(self, kid: Kid) -> int:
        return self.kids.index(kid)


@dataclass(frozen=True, slots=True)
class Protocols:
    """What runs, what it says, who judges it, and what is done to it."""

    boot: Boot
    messages: Any  # the union of all message types
    checkers: Sequence[Checker]
    workload: Callable[[World], None] = lambda world: None
    duration_ms: float = 60_000.0


Factory = Callable[[Roster], Protocols]


@dataclass(slots=True)
class Report:
    """What happened. `failures` is empty when all went well."""

    seed: int
    nodes: int
    faults: str
    duration_ms: float | None = None  # None: what the protocols ask for
    core: bool = False
    events: int = 0
    messages: int = 0
    virtual_s: float = 0.0
    wall_s: float = 0.0
    digest: str = ""
    checked: list[str] = field(default_factory=list)
    settled_ms: float | None = None
    failures: list[str] = field(default_factory=list)

    @property
    def command(self) -> str:
        """What reproduces this run."""
        parts = [f"{PREFIX} --seed {self.seed} --nodes {self.nodes} --faults {self.faults}"]
        if self.duration_ms is not None:
            parts.append(f"--duration-ms {self.duration_ms:g}")
        if self.core:
            parts.append("--core")
        return " ".join(parts)

    def text(self) -> str:
        rate = self.events / self.wall_s if self.wall_s else 0.0
        lines = [
            f"seed {self.seed}: {self.nodes} nodes, faults {self.faults}",
            f"{self.events} events, {self.messages} messages in {self.virtual_s:.1f} s of virtual "
            f"time; {self.wall_s:.1f} s of wall clock ({rate:.0f} events/s)",
            f"digest {self.digest}",
        ]
        if self.settled_ms is not None:
            lines.append(f"settled {self.settled_ms / 1000:.1f} s after healing")
        lines += [f"checked: {name}" for name in self.checked]
        lines += [f"FAILED: {failure}" for failure in self.failures]
        if self.failures:
            lines.append(f"reproduce with: {self.command}")
        return "\n".join(lines)


def simulate(
    seed: int,
    nodes: int,
    faults: str = "light",
    duration_ms: float | None = None,
    protocols: Factory | None = None,
    *,
    core: bool = False,
) -> Report:
    """Run one cluster from `seed`: safety for `duration_ms`, then liveness."""
    if protocols is None:
        from manifold.tools.simulator.membership import membership_only

        protocols = membership_only
    begun_s = time.perf_counter()
    collects = gc.isenabled()
    gc.disable()  # a large cluster is a million rows that stay: scanning them takes half the time
    try:
        report = _simulate(Report(seed, nodes, faults, duration_ms, core), protocols)
    finally:
        if collects:
            gc.enable()
    report.wall_s = time.perf_counter() - begun_s
    return report


def _simulate(report: Report, protocols: Factory) -> Report:
    plan = parse(report.faults)
    world, made = build(report.seed, report.nodes, plan, protocols)
    world.start_all()
    made.workload(world)
    if not plan.quiet:
        world.break_things()
    world.run(made.duration_ms if report.duration_ms is None else report.duration_ms)
    well = world.majority() if report.core else list(world.nodes)
    world.heal(well if report.core else None)
    report.settled_ms = settle(world, made.checkers, well, report.failures)
    report.checked = [checker.summary() for checker in made.checkers]
    for checker in made.checkers:
        report.failures.extend(checker.failures)
    del report.failures[FAILURES_MAX:]
    report.events, report.messages = world.events, world.network.sent
    report.virtual_s = world.now_ms / 1000
    report.digest = world.digest()
    return report


def build(seed: int, nodes: int, faults: Faults, protocols: Factory) -> tuple[World, Protocols]:
    """A world in which nothing has happened yet, with its checkers watching."""
    made: list[Protocols] = []

    def boot(kid: Kid, number: int, durable: dict[str, bytes], random: Random, now: float) -> Any:
        return made[0].boot(kid, number, durable, random, now)

    world = World(seed, faults, nodes, boot)
    kids = tuple(node.kid for node in world.nodes)
    roster = Roster(kids, tuple(node.address for node in world.nodes), seed)
    made.append(protocols(roster))
    world.speak(made[0].messages)
    for checker in made[0].checkers:
        checker.watch(world, faults)
    return world, made[0]


def settle(
    world: World, checkers: Sequence[Checker], well: Sequence[Node], failures: list[str]
) -> float | None:
    """Run on until every checker is content; what it lacked where its time is over."""
    begun_ms = world.now_ms
    slowest_ms = 0.0
    for checker in checkers:
        left_ms = checker.settle_ms - (world.now_ms - begun_ms)

        def content(checker: Checker = checker) -> bool:
            return not checker.settled(world, well)

        step_ms = STEP_MS * max(1, len(world.nodes) // 100)
        took_ms = world.run_until(content, max(0.0, left_ms), step_ms)
        if took_ms is None:
            why = checker.settled(world, well)
            failures.append(
                f"{checker.name}: not within {checker.settle_ms:g} ms of healing: {why}"
            )
        slowest_ms = world.now_ms - begun_ms
    return None if failures else slowest_ms
