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
from typing import Any

from manifold.tools.simulator.faults import Faults, parse
from manifold.tools.simulator.protocols import Checker, Factory, Protocols, Roster
from manifold.tools.simulator.world import Node, World
from manifold.vm.kid import Kid

FAILURES_MAX = 20  # kept and printed; the first one is what matters
STEP_MS = 250.0  # how often a cluster of 100 is looked at while it settles
STEPS = 10  # how often `tell` hears of a run
PREFIX = "manifold sim"


Tell = Callable[[str], None]


@dataclass(slots=True)
class Report:
    """What happened. `failures` is empty when all went well."""

    seed: int
    nodes: int
    faults: str
    duration_ms: float | None = None  # None: what the protocols ask for
    core: bool = False
    only: str = ""  # "membership": nothing else ran
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
            parts.append(f"--duration {self.duration_ms / 1000:g}")
        if self.core:
            parts.append("--core")
        if self.only:
            parts.append(f"--only {self.only}")
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
    tell: Tell | None = None,
) -> Report:
    """Run one cluster from `seed`: safety for `duration_ms`, then liveness.

    Without `protocols` only membership runs. `tell` hears now and then how far it is.
    """
    only = ""
    if protocols is None:
        from manifold.tools.simulator.membership import membership_only

        protocols, only = membership_only, "membership"
    begun_s = time.perf_counter()
    collects = gc.isenabled()
    gc.disable()  # a large cluster is a million rows that stay: scanning them takes half the time
    try:
        report = Report(seed, nodes, faults, duration_ms, core, only)
        _simulate(report, protocols, tell or (lambda line: None))
    finally:
        if collects:
            gc.enable()
    report.wall_s = time.perf_counter() - begun_s
    return report


def _simulate(report: Report, protocols: Factory, tell: Tell) -> None:
    plan = parse(report.faults)
    world, made = build(report.seed, report.nodes, plan, protocols)
    world.start_all()
    made.workload(world)
    if not plan.quiet:
        world.break_things()
    duration_ms = made.duration_ms if report.duration_ms is None else report.duration_ms
    for step in range(STEPS):
        world.run((step + 1) * duration_ms / STEPS - world.now_ms)
        tell(f"{world.now_ms / 1000:.1f} of {duration_ms / 1000:g} s, {world.events} events")
    tell("healed: everything has to settle")
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
