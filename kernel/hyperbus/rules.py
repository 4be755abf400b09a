"""Rules of links between nodes, by alias, class and label, and which of them holds. Pure.

Interface rules: a side of a rule is names with commas between: an alias, a class, a label with its
value (`site=a`), or `*` for every node; the class of `rpi4-01` is `rpi4`. Who asks says which
labels a node has. Of several rules that fit two nodes the last one holds, and it alone. Rules made
while the cluster runs (orders) go before those of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta

SIDE_CHARS_MAX = 1 << 17  # 4096 aliases of 29 characters with their commas
RULES_MAX = 256  # made at run time: a partition into 16 groups takes 120, slow links as many
LATENCY_MS_MAX = 60_000.0
RATE_BPS_MAX = 1e12

LabelsOf = Callable[[str], Sequence[str]]  # of the node with an alias
Side = Annotated[str, Meta(min_length=1, max_length=SIDE_CHARS_MAX)]
Probability = Annotated[float, Meta(ge=0, le=1)]
Time = Annotated[float, Meta(ge=0, le=LATENCY_MS_MAX)]
Rate = Annotated[float, Meta(ge=0, le=RATE_BPS_MAX)]


class LinkRule(msgspec.Struct, frozen=True):
    """What happens to frames from `a` to `b` and, but for `one_way`, from `b` to `a`."""

    a: Side
    b: Side
    one_way: bool = False
    latency_ms: Time = 0.0
    jitter_ms: Time = 0.0
    rate_bps: Rate = 0.0  # 0: no limit
    loss: Probability = 0.0
    reorder: Probability = 0.0
    cut: bool = False
    lifted: bool = False  # an order: as the file says, whatever orders before it say

    def same_ends(self, other: LinkRule) -> bool:
        """Whether the two are about the same frames, by the names they use."""
        mine, theirs = (self.a, self.b), (other.a, other.b)
        if self.one_way or other.one_way:
            return mine == theirs and self.one_way == other.one_way
        return mine in (theirs, theirs[::-1])


def class_of(alias: str) -> str:
    """`rpi4` of `rpi4-01`."""
    return alias.rpartition("-")[0]


def unlabelled(alias: str) -> Sequence[str]:
    """The labels of nodes that have none."""
    return ()


def has(side: str, alias: str, labels_of: LabelsOf = unlabelled) -> bool:
    """Whether a side of a rule names the node."""
    names = side.split(",")
    if alias in names or "*" in names or class_of(alias) in names:
        return True
    return "=" in side and any(label in names for label in labels_of(alias) if "=" in label)


def fits(rule: LinkRule, source: str, target: str, labels_of: LabelsOf = unlabelled) -> bool:
    """Whether a rule is about frames from one node to another."""
    if source == target:
        return False
    if has(rule.a, source, labels_of) and has(rule.b, target, labels_of):
        return True
    return not rule.one_way and has(rule.b, source, labels_of) and has(rule.a, target, labels_of)


def holding(
    rules: Iterable[LinkRule], source: str, target: str, labels_of: LabelsOf = unlabelled
) -> LinkRule | None:
    """The last of `rules` that fits."""
    found = None
    for rule in rules:
        if fits(rule, source, target, labels_of):
            found = rule
    return found


@dataclass(frozen=True, slots=True)
class Plan:
    """Every rule, as the node `alias` sees them."""

    alias: str
    rules: tuple[LinkRule, ...] = ()
    orders: tuple[LinkRule, ...] = ()
    labels_of: LabelsOf = unlabelled

    @property
    def active(self) -> bool:
        return bool(self.rules or self.orders)

    def outgoing(self, peer: str) -> LinkRule | None:
        """The rule of frames to `peer`."""
        return self._between(self.alias, peer)

    def incoming(self, peer: str) -> LinkRule | None:
        """The rule of frames from `peer`."""
        return self._between(peer, self.alias)

    def _between(self, source: str, target: str) -> LinkRule | None:
        order = holding(self.orders, source, target, self.labels_of)
        if order is not None and not order.lifted:
            return order
        return holding(self.rules, source, target, self.labels_of)
