"""What there is to do so that the registers say what membership says, and when.

Interface: `steps` compares; `when` says when to act; `rings_after` and `aliases_after` do the steps
to a copy. All of it depends on its arguments alone, and what has been done is no step any more:
whoever holds the lease starts from what it finds.
Invariants:
  D1  nobody leaves the ring but who left in good order, was dead for `retire_ms`, or is forgotten;
  D2  an alias is taken from nobody but who left, goes by another, or is forgotten;
  D3  steps that fall due within a `settle_ms` of each other are done together, and none waits for
      others for more than `BATCH_SETTLES` of them.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from manifold.kernel.limits import ALIAS_CHARS_MAX
from manifold.kernel.membership.messages import State
from manifold.kernel.registry.messages import (
    ALIASES_MAX,
    KINDS_MAX,
    MEMBERS_MAX,
    Fence,
    Kind,
    Timing,
)
from manifold.kernel.registry.placing import weight_of
from manifold.kernel.registry.records import Alias, Aliases, Rings
from manifold.kernel.registry.view import Seen, View
from manifold.vm.kid import Kid

BATCH_SETTLES = 4
AT_ONCE_MS = float("-inf")

Action = Literal["put", "drop", "give", "take"]


@dataclass(frozen=True, slots=True)
class Step:
    """`put` and `drop` are of the ring; `give` and `take` of `alias`."""

    at_ms: float
    action: Action
    kid: Kid
    alias: str = ""


def steps(
    rings: Rings, aliases: Aliases, view: View, forgotten: Container[Kid], timing: Timing
) -> list[Step]:
    """All there is to do, also what is not due yet."""
    found = list(_of_ring(rings, view, forgotten, timing))
    found += _of_aliases(aliases, view, forgotten, timing)
    return found


def _of_ring(rings: Rings, view: View, forgotten: Container[Kid], timing: Timing) -> Iterator[Step]:
    kinds = dict.fromkeys(rings.members.values())
    for kid, seen in view.nodes.items():
        kind = rings.members.get(kid)
        if seen.alive:
            wanted = kind_of(seen, kind)
            if wanted != kind and _fits(kid, wanted, rings.members, kinds):
                yield Step(seen.since_ms + timing.settle_ms, "put", kid)
        elif kind is not None:
            if kid in forgotten:
                yield Step(AT_ONCE_MS, "drop", kid)
                continue
            left = seen.state == State.LEFT
            wait_ms = timing.settle_ms if left else timing.retire_ms
            yield Step(seen.since_ms + wait_ms, "drop", kid)  # D1


def _fits(kid: Kid, kind: Kind, members: Mapping[Kid, Kind], kinds: Mapping[Kind, None]) -> bool:
    known = kind in kinds or len(kinds) < KINDS_MAX
    return known and (kid in members or len(members) < MEMBERS_MAX)


def _of_aliases(
    aliases: Aliases, view: View, forgotten: Container[Kid], timing: Timing
) -> Iterator[Step]:
    for alias, owner in aliases.owners.items():
        seen = view.nodes.get(owner.kid)
        if seen is None:
            continue
        if owner.kid in forgotten:
            yield Step(AT_ONCE_MS, "take", owner.kid, alias)
        elif seen.state == State.LEFT or (seen.alive and _goes_by(seen) != alias):  # D2
            yield Step(seen.since_ms + timing.settle_ms, "take", owner.kid, alias)
    if len(aliases.owners) >= ALIASES_MAX:
        return
    for kid, seen in view.nodes.items():
        alias = _goes_by(seen)
        if seen.alive and 0 < len(alias) <= ALIAS_CHARS_MAX and alias not in aliases.owners:
            yield Step(seen.since_ms + timing.settle_ms, "give", kid, alias)


def _goes_by(seen: Seen) -> str:
    return seen.meta.alias if seen.meta is not None else ""


def full(rings: Rings, aliases: Aliases, view: View) -> bool:
    """Whether a living node finds no room in the ring or for its alias."""
    if len(rings.members) >= MEMBERS_MAX or len(aliases.owners) >= ALIASES_MAX:
        return any(
            seen.alive and (kid not in rings.members or _goes_by(seen) not in aliases.owners)
            for kid, seen in view.nodes.items()
        )
    return False


def kind_of(seen: Seen, before: Kind | None) -> Kind:
    assert seen.meta is not None, "who is alive has been described"
    weight = weight_of(seen.meta.memory_bytes, before.weight if before is not None else None)
    return Kind(seen.meta.node_class, seen.meta.gpu, weight)


def when(found: Sequence[Step], now_ms: float, timing: Timing) -> float:
    """When to act next, which may be now or before; infinity: never, as things are (D3)."""
    first_ms = min((step.at_ms for step in found), default=float("inf"))
    if first_ms > now_ms:
        return first_ms
    near_ms = max(step.at_ms for step in found if step.at_ms <= now_ms + timing.settle_ms)
    return min(near_ms, first_ms + BATCH_SETTLES * timing.settle_ms)


def rings_after(rings: Rings, due: Sequence[Step], view: View, epoch: int, fence: Fence) -> Rings:
    """The same object where nothing changes."""
    members = dict(rings.members)
    for step in due:
        if step.action == "drop":
            members.pop(step.kid, None)
    kinds = dict.fromkeys(members.values())
    for step in due:
        if step.action != "put":
            continue
        kind = kind_of(view.nodes[step.kid], members.get(step.kid))
        if _fits(step.kid, kind, members, kinds):
            members[step.kid] = kind
            kinds[kind] = None
    if members == rings.members:
        return rings
    return Rings(epoch, fence, {kid: members[kid] for kid in sorted(members)})


def aliases_after(aliases: Aliases, due: Sequence[Step], epoch: int, fence: Fence) -> Aliases:
    """The same object where nothing changes. Of two who want one alias the first has it."""
    owners = dict(aliases.owners)
    for step in due:
        if step.action == "take":
            owners.pop(step.alias, None)
    owning = {owner.kid: None for owner in owners.values()}
    for step in sorted(due, key=lambda each: (each.at_ms, each.kid)):
        if step.action != "give" or len(owners) >= ALIASES_MAX:
            continue
        if step.alias not in owners and step.kid not in owning:
            owners[step.alias] = Alias(step.kid, epoch)
            owning[step.kid] = None
    if owners == aliases.owners:
        return aliases
    return Aliases(fence, owners)
