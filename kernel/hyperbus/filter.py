"""Which link there is to a peer: what rules say of latency, rate, loss and cuts, pure.

Interface rules: what `set` was told of a peer, or of all ("*"), goes before the `Plan`, and a
peer's own rule before that of all. Only nodes have links: a client is on the host of its node. A
cut is one-way: `cut_to` stops what this node sends, `cut_from` what it receives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from manifold.kernel.hyperbus.messages import CLIENT_PREFIX
from manifold.kernel.hyperbus.rules import LinkRule, Plan


@dataclass(frozen=True, slots=True)
class Link:
    """What happens to frames to one peer."""

    latency_ms: float = 0.0  # one way
    jitter_ms: float = 0.0  # up to so much more or less
    rate_bps: float = 0.0  # of both planes together; 0: as fast as it goes
    loss: float = 0.0  # probability
    reorder: float = 0.0  # probability that a frame overtakes those on their way
    cut_to: bool = False
    cut_from: bool = False


WHOLE = Link()


@dataclass(slots=True)
class Tally:
    """What became of frames under one rule."""

    sent: int = 0
    delayed: int = 0
    lost: int = 0
    reordered: int = 0
    cut: int = 0


@dataclass(slots=True)
class Filter:
    """The rules of one node. `on_change` is called after they have changed."""

    links: dict[str, Link] = field(default_factory=dict)  # told of a peer itself
    plan: Plan | None = None
    tallies: dict[LinkRule | None, Tally] = field(default_factory=dict)
    active: bool = False  # whether there is any rule: what every frame asks
    on_change: Callable[[], None] = lambda: None

    def set(self, peer: str, link: Link) -> None:
        """Replace the rule of `peer`; a rule that does nothing removes it."""
        if link == WHOLE:
            self.links.pop(peer, None)
        else:
            self.links[peer] = link
        self._changed()

    def clear(self) -> None:
        """Drop what was told of peers; the plan stays."""
        self.links.clear()
        self._changed()

    def set_plan(self, plan: Plan) -> None:
        self.plan = plan
        known = {*plan.rules, *plan.orders}
        self.tallies = {
            rule: tally for rule, tally in self.tallies.items() if rule is None or rule in known
        }
        self._changed()

    def _changed(self) -> None:
        self.active = bool(self.links) or (self.plan is not None and self.plan.active)
        self.on_change()

    def link(self, peer: str, alias: str) -> tuple[Link, LinkRule | None]:
        """The link to a peer, and its rule in the plan. A name that is not known is ""."""
        if peer.startswith(CLIENT_PREFIX):
            return WHOLE, None
        told = self.links.get(peer) or self.links.get("*")
        if told is not None:
            return told, None
        if self.plan is None or not alias:
            return WHOLE, None
        there, back = self.plan.outgoing(alias), self.plan.incoming(alias)
        cut_from = back is not None and back.cut
        if there is None:
            return Link(cut_from=cut_from), None
        link = Link(
            there.latency_ms, there.jitter_ms, there.rate_bps, there.loss, there.reorder,
            there.cut, cut_from,
        )  # fmt: skip
        return link, there

    def rule_from(self, peer: str, alias: str) -> LinkRule | None:
        """The plan's rule of frames from a peer."""
        if peer in self.links or "*" in self.links or self.plan is None:
            return None
        return self.plan.incoming(alias)

    def tally(self, rule: LinkRule | None) -> Tally:
        """Where to count what becomes of frames under `rule`."""
        return self.tallies.setdefault(rule, Tally())
