"""The table of nodes and the one rule by which beliefs about a node are merged.

A belief is `(boot, incarnation, state)`, compared in that order, and the larger one stays: the
merge is a maximum, hence commutative, idempotent and monotone. Identity is (kid, boot): a larger
boot replaces whatever was believed of a smaller one, also that it was dead. The description
(`meta`) belongs to a boot, and to a version within it, and is filled in whenever it arrives.

Invariants:
  T1  the belief about a node never decreases;
  T2  dead(i) of a boot yields only to a later incarnation or boot of the node itself;
  T3  at most `MEMBERS_MAX` nodes are kept, and none of the living is dropped for a newcomer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from random import Random

from manifold.kernel.membership.messages import Member, Meta, State, Update
from manifold.vm.kid import Kid, is_kid

MEMBERS_MAX = 8192  # nodes remembered, the dead included: about 1 kB each, 8 MB
FORGET_MS = 3_600_000.0  # the dead are remembered for an hour: stale news is younger than that
_SCAN_BELOW = 33  # up to here choosing nodes at random looks at all of them
_TRIES = 12  # above, random draws per wanted node before giving up

Belief = tuple[int, int, int]
_STATES = tuple(State)  # indexed: calling the enum costs ten times as much


class Record:
    """One node's row. `meta` may be of an older boot, or None: then it is not shown."""

    __slots__ = (
        "boot",
        "heard_ms",
        "incarnation",
        "kid",
        "meta",
        "meta_boot",
        "rtt_ms",
        "since_ms",
        "state",
    )

    def __init__(self, kid: Kid, now_ms: float) -> None:
        self.kid = kid
        self.boot = -1
        self.incarnation = 0
        self.state = State.ALIVE
        self.meta: Meta | None = None
        self.meta_boot = -1
        self.since_ms = now_ms
        self.rtt_ms: float | None = None
        self.heard_ms = -math.inf  # when its last message came

    @property
    def belief(self) -> Belief:
        return (self.boot, self.incarnation, self.state)

    @property
    def live(self) -> bool:
        return self.state <= State.SUSPECT

    def member(self) -> Member:
        assert self.meta is not None, "only described nodes are shown"
        return Member(
            self.kid,
            self.boot,
            self.incarnation,
            self.state,
            self.meta,
            self.since_ms,
            self.rtt_ms,
        )

    def update(self, by: str = "", *, whole: bool = False) -> Update:
        """What to tell of this node; the description only where the reader may lack it."""
        describe = (whole or self.state == State.ALIVE) and self.meta_boot == self.boot
        meta = self.meta if describe else None
        return Update(self.kid, self.boot, self.incarnation, self.state, by, meta)


class Table:
    """All nodes but this one."""

    def __init__(self) -> None:
        self._records: dict[str, Record] = {}
        self._order: list[Kid] = []  # to draw from at random, and to iterate in a fixed order
        self.live = 0

    def __len__(self) -> int:
        return len(self._order)

    def get(self, kid: str) -> Record | None:
        return self._records.get(kid)

    def records(self) -> Iterable[Record]:
        return self._records.values()

    def merge(self, update: Update, now_ms: float) -> tuple[Record | None, State | None, bool]:
        """Merge one belief: (the row, the state before, whether the belief grew).

        The state before is None for a node that was not known. The row is None where a newcomer
        finds the table full (T3) or its name is not a KID.
        """
        record = self._records.get(update.kid)
        previous: State | None = None
        if record is None:
            if not is_kid(update.kid) or not self._room():
                return None, None, False
            record = Record(Kid(update.kid), now_ms)
            self._records[record.kid] = record
            self._order.append(record.kid)
        else:
            previous = record.state
        if update.meta is not None:
            version = record.meta.version if record.meta is not None else -1
            if (update.boot, update.meta.version) > (record.meta_boot, version):
                record.meta, record.meta_boot = update.meta, update.boot
        theirs = (update.boot, update.incarnation, update.state)
        if theirs <= record.belief:
            return record, previous, False
        self._raise(record, theirs, previous, now_ms)
        return record, previous, True

    def _raise(self, record: Record, theirs: Belief, previous: State | None, now_ms: float) -> None:
        assert theirs > record.belief, "T1"
        if previous is not None and record.live:
            self.live -= 1
        if theirs[0] > record.boot:
            record.rtt_ms = None
        if theirs[2] != previous or theirs[0] > record.boot:
            record.since_ms = now_ms
        record.boot, record.incarnation = theirs[0], theirs[1]
        record.state = _STATES[theirs[2]]
        if record.live:
            self.live += 1

    def _room(self) -> bool:
        """Make room for a newcomer by forgetting who has been dead for longest (T3)."""
        if len(self._order) < MEMBERS_MAX:
            return True
        gone = [record for record in self._records.values() if not record.live]
        if not gone:
            return False
        self.forget(min(gone, key=lambda record: (record.since_ms, record.kid)))
        return True

    def forget(self, record: Record) -> None:
        assert not record.live, "T3"
        del self._records[record.kid]
        self._order.remove(record.kid)

    def expired(self, now_ms: float) -> list[Record]:
        return [r for r in self.records() if not r.live and now_ms - r.since_ms > FORGET_MS]

    def draw(
        self,
        random: Random,
        count: int,
        *,
        without: str = "",
        dead_since_ms: float | None = None,
        alive: bool = False,
    ) -> list[Record]:
        """Up to `count` different reachable nodes at random, never `without`.

        Living ones (`alive`: none that is suspect), and those that died after `dead_since_ms`
        where that is given.
        """

        def fits(record: Record) -> bool:
            if record.meta is None or record.kid == without:
                return False
            if record.live:
                return not alive or record.state == State.ALIVE
            recent = dead_since_ms is not None and record.since_ms >= dead_since_ms
            return recent and record.state == State.DEAD

        if len(self._order) < _SCAN_BELOW:
            fitting = [record for record in self._records.values() if fits(record)]
            return random.sample(fitting, min(count, len(fitting)))
        drawn: list[Record] = []
        for _ in range(_TRIES * count):
            record = self._records[self._order[int(random.random() * len(self._order))]]
            if record not in drawn and fits(record):
                drawn.append(record)
                if len(drawn) == count:
                    break
        return drawn

    def draw_dead(self, random: Random) -> Record | None:
        """One of the dead (not of those who left) at random."""
        dead = [r for r in self.records() if r.state == State.DEAD and r.meta is not None]
        return random.choice(dead) if dead else None
