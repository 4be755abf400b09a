"""The filter that drops, delays and cuts, for tests and for link emulation.

Interface rules: pure; the driver asks `outgoing_ms` for each frame that leaves and `incoming` for
each one that arrives. A cut is one-way: `cut_to` stops what this node sends, `cut_from` what it
receives.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

CUT = -1.0


@dataclass(frozen=True, slots=True)
class Link:
    """What happens to frames to one peer ("*" is every peer without a rule of its own)."""

    drop: float = 0.0  # probability
    delay_ms: float = 0.0
    cut_to: bool = False
    cut_from: bool = False


class Filter:
    def __init__(self, random: Random) -> None:
        self._random = random
        self.links: dict[str, Link] = {}

    def set(self, peer: str, link: Link) -> None:
        """Replace the rule of `peer`; a rule that does nothing removes it."""
        if link == Link():
            self.links.pop(peer, None)
        else:
            self.links[peer] = link

    def clear(self) -> None:
        self.links.clear()

    def outgoing_ms(self, peer: str) -> float:
        """Milliseconds to hold a frame to `peer`, or `CUT`."""
        link = self._link(peer)
        if link is None:
            return 0.0
        if link.cut_to or (link.drop and self._random.random() < link.drop):
            return CUT
        return link.delay_ms

    def incoming(self, peer: str) -> bool:
        """Whether a frame from `peer` may pass."""
        link = self._link(peer)
        return link is None or not link.cut_from

    def _link(self, peer: str) -> Link | None:
        if not self.links:
            return None
        return self.links.get(peer) or self.links.get("*")
