"""Greedy forwarding over links: one decision of one node for one task on its way.

A hop must save at least `hop_gain` of the predicted cost here; otherwise the task stays and is
executed. A node that may not run the task (a constraint, no credit) sends it on to whoever may,
or, if no neighbour may, searches: one unvisited link at random. When the hops are used up the
task goes back to its origin, which still holds it: a local optimum costs time, never a task.

Interface rules: costs are of nodes that passed the filter, this node's own apart (None: it may
not run the task); `visited` travels with the task and nobody in it is forwarded to again.
Invariants: G4 a forward never exceeds `hops`; G7 a forward never goes back along the path.
Source: the design page of geode, "Topology"; Kleinberg, "The Small-World Phenomenon" (2000).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from random import Random

from manifold.kernel.config import GeodeConfig
from manifold.vm.kid import Kid


class Action(Enum):
    EXECUTE = "execute"
    FORWARD = "forward"
    REJECT = "reject"  # to the origin, which queues it or asks again


@dataclass(frozen=True, slots=True)
class Hop:
    action: Action
    to: Kid | None
    reason: str


def next_hop(
    here: float | None,
    costs: Mapping[Kid, float],
    search: Sequence[Kid],
    hops: int,
    visited: Sequence[Kid],
    config: GeodeConfig,
    random: Random,
) -> Hop:
    fresh = [kid for kid in costs if kid not in visited]
    if hops >= config.hops:
        if here is not None:
            return Hop(Action.EXECUTE, None, f"{hops} hops made, the limit")
        return Hop(Action.REJECT, None, f"{hops} hops made and this node may not run it")
    best = min(fresh, key=costs.__getitem__, default=None)
    if here is not None:
        if best is None or costs[best] > (1.0 - config.hop_gain) * here:
            return Hop(Action.EXECUTE, None, "no link saves enough")
        return _forward(best, hops, visited, config, "cheaper there")
    if best is not None:
        return _forward(best, hops, visited, config, "this node may not run it")
    unseen = [kid for kid in search if kid not in visited]
    if not unseen:
        return Hop(Action.REJECT, None, "nobody left to ask")
    return _forward(random.choice(unseen), hops, visited, config, "searching")


def _forward(to: Kid, hops: int, visited: Sequence[Kid], config: GeodeConfig, reason: str) -> Hop:
    assert hops + 1 <= config.hops, "G4"
    assert to not in visited, "G7"
    return Hop(Action.FORWARD, to, reason)
