"""Planted bugs of the registry: each must be caught within a bounded number of schedules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from manifold.kernel.nexus.values import Put
from manifold.kernel.registry import plan
from manifold.kernel.registry.cell import Cell
from manifold.kernel.registry.messages import Fence, Timing
from manifold.kernel.registry.plan import Step
from manifold.kernel.registry.protocol import Registry
from manifold.kernel.registry.records import Alias, Aliases
from manifold.tools.simulator.registry import TIMING, Duel, rough, schedule

Patch = pytest.MonkeyPatch
Plant = Callable[[Patch], Timing | None]


def has_no_fences(patch: Patch) -> None:
    """A registrar that lost its lease goes on where a later one has written."""
    patch.setattr(Registry, "_fenced", lambda self, value: False)


def writes_without_comparing(patch: Patch) -> None:
    write = Cell.write

    def puts(self: Cell[Any], value: Any, token: int) -> Put:
        return Put(write(self, value, token).data)

    patch.setattr(Cell, "write", puts)


def retires_at_once(patch: Patch) -> Timing:
    return replace(TIMING, retire_ms=0.0)


def releases_the_aliases_of_the_dead(patch: Patch) -> None:
    of_aliases = plan._of_aliases

    def eager(aliases: Any, view: Any, forgotten: Any, timing: Timing) -> Any:
        yield from of_aliases(aliases, view, forgotten, timing)
        for alias, owner in aliases.owners.items():
            seen = view.nodes.get(owner.kid)
            if seen is not None and not seen.alive:
                yield Step(seen.since_ms + timing.settle_ms, "take", owner.kid, alias)

    patch.setattr(plan, "_of_aliases", eager)


def gives_an_alias_to_everybody_who_wants_it(patch: Patch) -> None:
    """The last one wins: it is taken from its owner, and owners keep their old ones."""

    def generous(aliases: Aliases, due: Sequence[Step], epoch: int, fence: Fence) -> Aliases:
        owners = dict(aliases.owners)
        for step in due:
            if step.action == "give":
                owners[step.alias] = Alias(step.kid, epoch)
        return aliases if owners == aliases.owners else Aliases(fence, owners)

    patch.setattr(plan, "aliases_after", generous)


def shows_what_it_means_to_write(patch: Patch) -> None:
    """G1: takes its own ring for chosen before it is."""
    write = Registry._write

    def hasty(self: Registry, cell: Any, due: Any, fence: Fence) -> None:
        write(self, cell, due, fence)
        if cell.token:
            self._show(cell.wanted, self._last_ms)

    patch.setattr(Registry, "_write", hasty)


PLANTED: list[tuple[Plant, int]] = [
    (writes_without_comparing, 60),
    (retires_at_once, 5),
    (releases_the_aliases_of_the_dead, 5),
    (gives_an_alias_to_everybody_who_wants_it, 20),
    (shows_what_it_means_to_write, 20),
]


@pytest.mark.parametrize(("plant", "most"), PLANTED, ids=lambda each: getattr(each, "__name__", ""))
def test_a_planted_bug_is_caught(plant: Plant, most: int, monkeypatch: Patch) -> None:
    timing = plant(monkeypatch) or TIMING
    for seed in range(most):
        if schedule(seed, timing=timing, drawn=rough, judged=TIMING).failures:
            return
    raise AssertionError(f"{plant.__name__} was not caught in {most} schedules")


def test_a_registrar_without_fences_is_caught(monkeypatch: Patch) -> None:
    has_no_fences(monkeypatch)
    assert any(Duel(seed).play().failures for seed in range(120))  # one in fifteen, about
