"""Carries frames over emulated links: a wire a peer, and one alarm for all of them.

Interface rules: of one bus, on the thread of its loop. While `engaged`, the bus asks `wire` where
its frames go; None is a link that is whole. `land` is given a frame that has arrived, and says
whether it was taken; where one was not, somebody calls `resume` when more is taken. `fill` is told
when there is room again for who was refused.
Invariants: E1 what a wire holds arrives before what is sent after it: a wire whose rule is gone is
used until it is empty. E2 without a rule nothing here is asked, and nothing is armed.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

from manifold.kernel.effects import Plane
from manifold.kernel.hyperbus.filter import WHOLE, Filter
from manifold.kernel.hyperbus.wire import NEVER_MS, Wire
from manifold.kernel.limits import PEERS_MAX

if TYPE_CHECKING:
    from manifold.kernel.hyperbus.alarm import Alarm

Parcel = tuple[str, Plane, bytes]  # to whom, on which line, which frame
Names = tuple[str, str]  # of a peer: its identity and its alias, as far as they are known
NAMES_MAX = 2 * PEERS_MAX  # each by its identity and by its address


@dataclass(slots=True, eq=False)
class Wired:
    """A wire and what this driver knows of it."""

    wire: Wire[Parcel]
    to: str  # one of the names the bus has for the peer
    number: int
    armed_ms: float = NEVER_MS
    lost: int = 0  # of the wire's, as far as they are counted
    refused: dict[Plane, dict[str, None]] = field(default_factory=dict)  # who wants room


class Emulation:
    """See the module. `names` tells who is meant by what a bus sends to."""

    def __init__(
        self,
        rules: Filter,
        random: Random,
        loop: asyncio.AbstractEventLoop,
        names: Callable[[str], Names],
        land: Callable[[str, Plane, bytes], bool],
        fill: Callable[[str, Plane], None],
        counters: Counter[str],
    ) -> None:
        self._filter = rules
        self._random = random
        self._loop = loop
        self._names = names
        self._land = land
        self._fill = fill
        self._counters = counters
        self._wires: dict[str, Wired] = {}  # by alias, or by identity where none is known
        self._known: dict[str, Wired | None] = {}  # by what the bus sends to
        self._deaf: dict[str, bool] = {}  # by identity: whether what it sends is cut here
        self._armed: list[tuple[float, int]] = []  # a heap: when something happens on which wire
        self._numbered: dict[int, Wired] = {}
        self._next_number = 0
        self._alarm: Alarm | None = None
        self.precise = True  # without: by the loop's timers, to compare
        self.engaged = False
        rules.on_change = self.rules_changed

    @property
    def held_bytes(self) -> int:
        return sum(each.wire.held_bytes for each in self._wires.values())

    # -- which wire ---------------------------------------------------------------------------

    def wire(self, to: str) -> Wired | None:
        """Where frames to `to` go; None: straight to its socket."""
        if to in self._known:
            return self._known[to]
        peer, alias = self._names(to)
        link, _ = self._filter.link(peer, alias)
        key = alias or peer or to
        wired = self._wires.get(key)
        if wired is None and link != WHOLE:
            wired = Wired(Wire(self._random), to, self._next_number)
            self._next_number += 1
            self._wires[key] = self._numbered[wired.number] = wired
        if wired is not None:
            wired.to = to
            self._set(wired)
        if len(self._known) >= NAMES_MAX:
            self._known.clear()
        self._known[to] = wired
        return wired

    def _set(self, wired: Wired) -> None:
        link, rule = self._filter.link(*self._names(wired.to))
        tally, wire = self._filter.tally(rule), wired.wire
        if link != wire.link or tally is not wire.tally:
            now_ms = time.monotonic() * 1000
            self._counters["frames_cut"] += wire.set(link, tally, now_ms)
            self._turn(wired, now_ms)

    def hears(self, peer: str) -> bool:
        """Whether a frame from `peer` may pass."""
        deaf = self._deaf.get(peer)
        if deaf is None:
            alias = self._names(peer)[1]
            deaf = self._filter.link(peer, alias)[0].cut_from
            if alias and len(self._deaf) < NAMES_MAX:
                self._deaf[peer] = deaf
        if deaf:
            self._counters["frames_cut"] += 1
            self._filter.tally(self._filter.rule_from(*self._names(peer))).cut += 1
        return not deaf

    def learned(self, peer: str, address: str) -> None:
        """The bus knows now who is at an address: another rule may hold."""
        self._known.pop(peer, None)
        self._known.pop(address, None)
        self._deaf.pop(peer, None)

    def rules_changed(self) -> None:
        """Look every rule up again."""
        self._known.clear()
        self._deaf.clear()
        for wired in list(self._wires.values()):
            self._set(wired)
        self._drop_idle()

    def _drop_idle(self) -> None:
        """E1."""
        for key, wired in list(self._wires.items()):
            if wired.wire.empty and wired.wire.link == WHOLE:
                del self._wires[key], self._numbered[wired.number]
                self._known.clear()
        self.engaged = self._filter.active or bool(self._wires)

    # -- sending ------------------------------------------------------------------------------

    def room(self, wired: Wired, to: str, plane: Plane) -> bool:
        """Whether `offer` may be called; where not, `fill` is told when it may."""
        if wired.wire.room(plane, time.monotonic() * 1000):
            return True
        wired.refused.setdefault(plane, {})[to] = None
        self._arm(wired)
        return False

    def offer(self, wired: Wired, to: str, plane: Plane, frame: bytes) -> None:
        now_ms = time.monotonic() * 1000
        if wired.wire.link.cut_to:
            self._counters["frames_cut"] += 1
        wired.wire.offer(plane, (to, plane, frame), len(frame), now_ms)
        self._turn(wired, now_ms)

    def resume(self, to: str) -> None:
        """`land` would take frames to `to` again."""
        wired = self.wire(to)
        if wired is not None:
            wired.wire.unblock()
            self._turn(wired, time.monotonic() * 1000)

    def _turn(self, wired: Wired, now_ms: float) -> None:
        """Whatever is due on a wire."""
        wire = wired.wire
        wire.advance(now_ms)
        self._counters["frames_lost"] += wire.lost - wired.lost
        wired.lost = wire.lost
        while (found := wire.landed(now_ms)) is not None:
            plane, due_ms, size, parcel = found
            if not self._land(*parcel):
                wire.keep(plane, due_ms, size, parcel)
        for plane in wire.roomy(now_ms):
            for to in wired.refused.pop(plane, {}):
                self._fill(to, plane)
        self._arm(wired)

    # -- time ---------------------------------------------------------------------------------

    def _arm(self, wired: Wired) -> None:
        due_ms = wired.wire.next_ms()
        if due_ms == wired.armed_ms:
            return
        wired.armed_ms = due_ms
        if due_ms != NEVER_MS:
            heapq.heappush(self._armed, (due_ms, wired.number))
        self._ring()

    def _next(self) -> tuple[float, Wired] | None:
        """What happens next; entries that were replaced by others are dropped."""
        while self._armed:
            due_ms, number = self._armed[0]
            wired = self._numbered.get(number)
            if wired is not None and wired.armed_ms == due_ms:
                return due_ms, wired
            heapq.heappop(self._armed)
        return None

    def _ring(self) -> None:
        found = self._next()
        if self._alarm is None:
            if found is None:
                return
            from manifold.kernel.hyperbus.alarm import Alarm  # ctypes: for who emulates alone

            self._alarm = Alarm(self._loop, self._on_time, precise=self.precise)
        self._alarm.at(found[0] if found is not None else NEVER_MS)

    def _on_time(self) -> None:
        now_ms = time.monotonic() * 1000
        while (found := self._next()) is not None and found[0] <= now_ms:
            found[1].armed_ms = NEVER_MS
            self._turn(found[1], now_ms)
        if not self._filter.active:
            self._drop_idle()
        self._ring()

    def close(self) -> None:
        """What is on its way is lost."""
        self._wires.clear()
        self._known.clear()
        self._numbered.clear()
        if self._alarm is not None:
            self._alarm.close()
            self._alarm = None
