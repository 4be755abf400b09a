"""What is judged of the registry from outside: what was chosen, what each node shows and believes.

Interface: `Judge(world, observer, timing, beliefs)`; `writes` when a ring is to be written, `look`
as often as possible, `judge` at the end; what is wrong is told to the observer. Registers are
decoded here anew, as plain lists.
  K1  the epoch that a process shows only grows;
  K2  nodes that show one epoch show one ring, and it is the one that was chosen;
  K3  chosen rings are a chain: each version has the epoch after the one before, fences do not go
      back, no KID is there twice;
  K4  in no version an alias has two KIDs or a KID two aliases, and fences do not go back; an alias
      leaves a KID only when that node left, goes by another name or was forgotten;
  K5  nobody leaves the ring but who left in good order, was forgotten, or was dead for
      `retire_ms` in the eyes of the registrar that wrote it, while that was running.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from manifold.kernel.nexus.values import Value
from manifold.kernel.registry.messages import ALIASES_KEY, KID_BYTES, RINGS_KEY, Timing
from manifold.tools.simulator.nexus_checks import Observer
from manifold.tools.simulator.world import Node, World

CLOCK_PART = 0.8  # clocks run a tenth too slow or too fast, and beliefs are looked at in steps
RECENT_MS = 50.0  # a belief that ended so short ago may still be what a write was made from


@dataclass(slots=True)
class Belief:
    """What one process makes of one node. `gone_ms`: how long, running, it held it for gone."""

    state: str = "unknown"
    boot: int = 0
    gone_ms: float = 0.0
    before_ms: float = 0.0  # `gone_ms` of the time before, which ended at
    ended_ms: float = float("-inf")

    def alive(self, now_ms: float) -> None:
        if self.gone_ms:
            self.before_ms, self.ended_ms, self.gone_ms = self.gone_ms, now_ms, 0.0

    def longest_ms(self, now_ms: float) -> float:
        recent = now_ms - self.ended_ms <= RECENT_MS
        return max(self.gone_ms, self.before_ms if recent else 0.0)


Beliefs = dict[tuple[int, int], Belief]  # by the index of who believes, and of whom
Members = dict[bytes, tuple[Any, ...]]


class Judge:
    """See the module."""

    def __init__(self, world: World, observer: Observer, timing: Timing, beliefs: Beliefs) -> None:
        self._world = world
        self._beliefs = beliefs
        self._observer = observer
        self._timing = timing
        self.left: dict[bytes, None] = {}  # who has left in good order, ever
        self.renamed: dict[bytes, None] = {}  # who has gone by more than one alias
        self.forgotten: dict[bytes, None] = {}
        self.epochs = 0
        self.twice = 0  # times that two nodes believed to be registrar
        self._shown: dict[tuple[int, int], int] = {}
        self._rings: dict[int, Any] = {}
        self._gone: dict[bytes, dict[bytes, float]] = {}  # of what is written: K5's figures

    def fail(self, what: str) -> None:
        self._observer.fail(what)

    def look(self) -> None:
        registrars = 0
        for node in self._world.nodes:
            if node.up:
                self._look_at(node)
                registrars += node.machine.registry.registrar
        self.twice += registrars > 1

    def writes(self, writer: int, data: bytes) -> None:
        """Keep what the registrar believes when it asks for its write; it may die of it."""
        self._gone[data] = {
            bytes.fromhex(self._world.nodes[subject].kid[2:]): belief.longest_ms(self._world.now_ms)
            for (viewer, subject), belief in self._beliefs.items()
            if viewer == writer
        }

    def _look_at(self, node: Node) -> None:
        registry = node.machine.registry
        epoch = registry.epoch
        if epoch < self._shown.get((node.index, node.boot), 0):
            self.fail(f"K1 node {node.index} shows epoch {epoch} after a later one")
        self._shown[(node.index, node.boot)] = epoch
        if epoch:
            shown = tuple(registry.rings.members.items())
            if self._rings.setdefault(epoch, shown) != shown:
                self.fail(f"K2 node {node.index} shows another ring of epoch {epoch}")

    def _chain(self, key: str) -> list[tuple[int, Value]]:
        """Data of each version that was chosen, in order."""
        chosen = self._observer.chosen.get(key, {})
        versions = {v.version: v for v in chosen.values() if v.data is not None}
        return sorted(versions.items())

    def _retired(self, before: Members, after: Members, gone: dict[bytes, float]) -> None:
        for kid in before:
            if kid in after or kid in self.left or kid in self.forgotten:
                continue
            if gone.get(kid, 0.0) < CLOCK_PART * self._timing.retire_ms:
                index = self._world.node("K-" + kid.hex()).index
                self.fail(f"K5 node {index} was retired after {gone.get(kid, 0.0):.0f} ms")

    # -- at the end -------------------------------------------------------------------------------

    def judge(self) -> None:
        self._judge_rings()
        self._judge_aliases()

    def _judge_rings(self) -> None:
        last, last_fence = 0, (0, "", 0, 0)
        before: Members = {}
        chosen: dict[int, Members] = {}
        for version, value in self._chain(RINGS_KEY):
            epoch, fence, members = _rings(value)
            if epoch != last + 1:
                self.fail(f"K3 epoch {epoch} follows {last} at version {version}")
            if fence < last_fence:
                self.fail(f"K3 epoch {epoch} has fence {fence} after {last_fence}")
            self._retired(before, members, self._gone[_bytes(value)])
            last, last_fence, before = epoch, fence, members
            chosen[epoch] = members
        self.epochs = last
        for epoch, shown in self._rings.items():
            if [bytes.fromhex(kid[2:]) for kid, _ in shown] != list(chosen.get(epoch, ())):
                self.fail(f"K2 what was shown of epoch {epoch} was never chosen")

    def _judge_aliases(self) -> None:
        owners: dict[str, bytes] = {}
        last_fence = (0, "", 0, 0)
        for version, value in self._chain(ALIASES_KEY):
            raw_fence, entries = msgspec.msgpack.decode(_bytes(value))
            fence = tuple(raw_fence)
            now = {alias: kid for alias, kid, _ in entries}
            if not len(now) == len(dict.fromkeys(now.values())) == len(entries):
                self.fail(f"K4 version {version} of the aliases names somebody twice")
            if fence < last_fence:
                self.fail(f"K4 version {version} of the aliases has an older fence")
            for alias, kid in owners.items():
                reason = kid in self.left or kid in self.renamed or kid in self.forgotten
                if now.get(alias) != kid and not reason:
                    self.fail(f"K4 {alias} was taken from its owner at version {version}")
            owners, last_fence = now, fence

    def settled(self, core: Sequence[Node], names: dict[int, str]) -> str:
        """What is not yet as it should be; "" when all of `core` agree that they are the ring."""
        kids = sorted(node.kid for node in core)
        if not all(node.up for node in core):
            return "a node is down"
        epochs = {node.machine.registry.epoch: None for node in core}
        for node in core:
            if list(node.machine.registry.ring()) != kids:
                return f"node {node.index} shows a ring of {len(node.machine.registry.ring())}"
        if len(epochs) > 1:
            return f"epochs {list(epochs)}"
        for node in core:
            wanted = names[node.index]
            owner = core[0].machine.registry.kid_of(wanted)
            if owner is None:
                return f"nobody has alias {wanted}"
            for other in core:
                registry = other.machine.registry
                if registry.kid_of(wanted) != owner or registry.alias_of(owner) != wanted:
                    return f"node {other.index} does not know {wanted}"
        return ""


def _bytes(value: Value) -> bytes:
    assert isinstance(value.data, bytes), "registers of the registry hold bytes"
    return value.data


def _rings(value: Value) -> tuple[int, tuple[Any, ...], Members]:
    """Epoch, fence, and the kinds of the KIDs."""
    epoch, fence, kinds, kids, places = msgspec.msgpack.decode(_bytes(value))
    members = {
        kids[KID_BYTES * at : KID_BYTES * (at + 1)]: tuple(kinds[place])
        for at, place in enumerate(places)
    }
    assert len(members) == len(places) and len(kids) == KID_BYTES * len(places), "K3"
    return epoch, tuple(fence), members
