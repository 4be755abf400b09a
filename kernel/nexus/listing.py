"""Lists of keys: the union of what the voters of a quorum hold.

Interface: `ask(wish, done)` for one page, answered once by a `Listing`; `receive(source, page)`
takes `Scanned`s and says whether they were for a list. Invariants:
  K1  a key that was written before the list was asked for, and not deleted, is in it: a quorum
      that accepted it shares a voter with the quorum that was heard, of one configuration;
  K2  pages of voters end at different keys; what is told ends where the first of them does.
Keys that were deleted, or whose write was not chosen, may be told as well: who lists reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from manifold.kernel.nexus.configs import Config
from manifold.kernel.nexus.context import Context
from manifold.kernel.nexus.messages import List, Listing, Scan, Scanned, Strength
from manifold.kernel.nexus.proposer import NO_VOTERS, Proposer
from manifold.vm.kid import Kid

LISTS_MAX = 256  # under way at one node: 7 pages of 128 KiB each
STALE_TIMEOUTS = 2  # as a round: then a minority may answer
BUSY = "Too many lists are under way at this node: ask again."
TOO_FEW = "Too few voters have answered in time."

Told = Callable[[Listing], None]


@dataclass(slots=True)
class _Asked:
    """One page."""

    wish: List
    done: Told
    deadline_ms: float
    config: Config | None = None
    rid: int = 0
    said: int = 0  # times
    heard: dict[Kid, Scanned] = field(default_factory=dict)
    over: bool = False


class Lister:
    """See the module."""

    def __init__(self, context: Context, proposer: Proposer) -> None:
        self._context = context
        self._proposer = proposer
        self._asked: dict[int, _Asked] = {}
        self._count = 0

    def ask(self, wish: List, done: Told) -> None:
        if self._count >= LISTS_MAX:
            done(Listing((), strength="none", why=BUSY))
            return
        self._count += 1
        self._say(_Asked(wish, done, self._context.now_ms + wish.timeout_ms))

    def _say(self, asked: _Asked) -> None:
        """Ask who has not answered, of the configuration that is known now; then once more."""
        if asked.over:
            return
        config = self._proposer.config
        if config != asked.config:
            self._asked.pop(asked.rid, None)
            asked.config, asked.rid = config, self._context.rid()
            asked.heard.clear()
            self._asked[asked.rid] = asked
        if self._context.now_ms >= asked.deadline_ms:
            self._unavailable(asked)
            return
        if asked.wish.stale and asked.heard and asked.said >= STALE_TIMEOUTS:
            self._tell(asked, "stale")
            return
        asked.said += 1
        for kid in config.kids() if config is not None else ():
            if kid not in asked.heard:
                wish = asked.wish
                assert config is not None
                scan = Scan(asked.rid, config.epoch, wish.after, wish.prefix)
                self._context.send(kid, scan)
        left_ms = asked.deadline_ms - self._context.now_ms
        wait_ms = min(self._context.timeout_ms(asked.said), left_ms)
        self._context.later(wait_ms, lambda _now: self._say(asked))

    def receive(self, source: Kid, page: Scanned) -> bool:
        asked = self._asked.get(page.rid)
        if asked is None:
            return False
        assert asked.config is not None, "nobody was asked"
        if source in asked.config.kids():
            asked.heard[source] = page
            if asked.config.quorum(asked.heard):
                self._tell(asked, "quorum")
        return True

    def _missing(self, asked: _Asked) -> tuple[str, ...]:
        kids = asked.config.kids() if asked.config is not None else ()
        return tuple(str(kid) for kid in kids if kid not in asked.heard)

    def _unavailable(self, asked: _Asked) -> None:
        why = NO_VOTERS if asked.config is None else TOO_FEW
        missing = self._missing(asked)
        self._end(asked, Listing((), strength="none", missing=missing, why=why))

    def _tell(self, asked: _Asked, strength: Strength) -> None:
        pages = list(asked.heard.values())
        ends = [page.keys[-1] for page in pages if not page.last and page.keys]
        until = min(ends, default="")  # K2
        keys = sorted({k: None for page in pages for k in page.keys if not ends or k <= until})
        limit = asked.wish.limit
        more = bool(ends) or len(keys) > limit
        missing = self._missing(asked) if strength == "stale" else ()
        self._end(asked, Listing(tuple(keys[:limit]), more, strength, missing))

    def _end(self, asked: _Asked, listing: Listing) -> None:
        asked.over = True
        self._asked.pop(asked.rid, None)
        self._count -= 1
        asked.done(listing)
