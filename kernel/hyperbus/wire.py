"""One direction of an emulated link: frames leave at a rate, are on their way, may be lost.

Interface rules: pure, time is `now_ms` and never goes back. Ask `room` before each `offer`; at
`next_ms`, call `advance`, then `landed` until it gives nothing; what the receiver does not take is
given back by `keep`. Sizes are those of the frames; a rate counts nothing else.
The rate is one for both planes. Control goes before data, also in the midst of a frame, as packets
of the two would take turns on a real link: a frame of control is delayed by control alone, and
delays what is left of the data by the time it takes.
Invariants: W1 frames of a plane arrive in their order, whatever the jitter, but those that
`reorder` lets overtake. W2 over any time no more than `rate_bps` times that time leaves, and a
frame; while there is something to send, no less. W3 a lane that has room holds at most
`WAITING_BYTES_MAX` or `WAITING_MS_MAX` of frames that have not left and `FLIGHT_BYTES_MAX` on
their way, and then a single frame more.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field
from itertools import count
from random import Random
from typing import Generic, TypeVar

from manifold.kernel.effects import Plane
from manifold.kernel.hyperbus.filter import WHOLE, Link, Tally
from manifold.kernel.limits import FRAME_BYTES_MAX, MIB

WAITING_BYTES_MAX = FRAME_BYTES_MAX  # a frame waits while another leaves: the rest is the outbox's
WAITING_MS_MAX = (
    50.0  # ten times what a busy loop is late: the link is never idle for want of a frame
)
# What is on its way: 1.3 Gbit/s at 100 ms. A link of more holds its sender back.
FLIGHT_BYTES_MAX = 16 * MIB
FRAME_COST_BYTES = 512  # what a frame takes beside its bytes: at most 32 768 are on their way
PACE_MS = 10.0  # a frame takes at most so long to leave, where its messages can be divided
NEVER_MS = float("inf")

T = TypeVar("T")


@dataclass(slots=True)
class _Lane(Generic[T]):
    """One plane. Frames that wait have the time at which they will have left, less `shift_ms`."""

    waiting: deque[tuple[float, float, int, T]] = field(default_factory=deque)
    flight: list[tuple[float, int, int, T]] = field(default_factory=list)  # a heap, by due time
    waiting_bytes: int = 0
    flight_bytes: int = 0
    free_ms: float = 0.0  # when all that waits has left, less `shift_ms`
    shift_ms: float = 0.0
    last_ms: float = 0.0  # when the last of those in order arrives
    wanted: bool = False  # somebody was told that there is no room
    blocked: bool = False  # the receiver took nothing more


class Wire(Generic[T]):
    """See the module. What it carries is none of its business."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._numbers = count()
        self._lanes: dict[Plane, _Lane[T]] = {Plane.CONTROL: _Lane(), Plane.DATA: _Lane()}
        self.link = WHOLE
        self.tally = Tally()
        self.lost = 0  # under whatever rule

    @property
    def held_bytes(self) -> int:
        return sum(lane.waiting_bytes + lane.flight_bytes for lane in self._lanes.values())

    @property
    def empty(self) -> bool:
        return not any(lane.waiting or lane.flight for lane in self._lanes.values())

    @property
    def pace_bytes(self) -> int:
        """The most a frame should have, where messages can be divided."""
        rate_bps = self.link.rate_bps
        return int(rate_bps * PACE_MS / 8000) if rate_bps else FRAME_BYTES_MAX

    def set(self, link: Link, tally: Tally, now_ms: float) -> int:
        """Change the link. A cut loses what it holds: the number of those frames."""
        self.advance(now_ms)
        self.link, self.tally = link, tally
        cut = 0
        for plane, lane in self._lanes.items():
            waiting, lane.waiting, lane.waiting_bytes = lane.waiting, deque(), 0
            lane.free_ms, lane.shift_ms = now_ms, 0.0
            if link.cut_to:
                cut += len(waiting) + len(lane.flight)
                lane.flight, lane.flight_bytes, lane.last_ms = [], 0, now_ms
                continue
            for _, offered_ms, size, item in waiting:
                self._queue(plane, item, size, offered_ms, now_ms)
        tally.cut += cut
        self.advance(now_ms)
        return cut

    def room(self, plane: Plane, now_ms: float) -> bool:
        """Whether a frame may be offered; where not, `roomy` tells when there is room again."""
        lane = self._lanes[plane]
        lane.wanted = not self._has_room(lane, now_ms)
        return not lane.wanted

    def roomy(self, now_ms: float) -> list[Plane]:
        """Planes that have room again for who was refused."""
        return [
            plane
            for plane, lane in self._lanes.items()
            if lane.wanted and self._has_room(lane, now_ms)
        ]

    def _has_room(self, lane: _Lane[T], now_ms: float) -> bool:
        """W3."""
        if lane.flight_bytes >= FLIGHT_BYTES_MAX or lane.waiting_bytes >= WAITING_BYTES_MAX:
            return False
        return not lane.waiting or lane.free_ms + lane.shift_ms - now_ms < WAITING_MS_MAX

    def offer(self, plane: Plane, item: T, size_bytes: int, now_ms: float) -> None:
        """Send a frame."""
        if self.link.cut_to:
            self.tally.cut += 1
            return
        self.advance(now_ms)
        self._queue(plane, item, size_bytes, now_ms, now_ms)
        self.advance(now_ms)

    def _queue(
        self, plane: Plane, item: T, size_bytes: int, offered_ms: float, now_ms: float
    ) -> None:
        rate_bps = self.link.rate_bps
        takes_ms = size_bytes * 8000 / rate_bps if rate_bps else 0.0
        control, data = self._lanes[Plane.CONTROL], self._lanes[Plane.DATA]
        lane = self._lanes[plane]
        begins_ms = max(now_ms, control.free_ms, lane.free_ms + lane.shift_ms)
        if lane is control:
            data.shift_ms += takes_ms
        lane.free_ms = begins_ms + takes_ms - lane.shift_ms
        lane.waiting.append((lane.free_ms, offered_ms, size_bytes, item))
        lane.waiting_bytes += size_bytes

    def advance(self, now_ms: float) -> None:
        """What has left is on its way."""
        for lane in self._lanes.values():
            while lane.waiting and lane.waiting[0][0] + lane.shift_ms <= now_ms:
                left_ms, offered_ms, size, item = lane.waiting.popleft()
                lane.waiting_bytes -= size
                self._fly(lane, item, size, left_ms + lane.shift_ms, offered_ms)

    def _fly(self, lane: _Lane[T], item: T, size: int, left_ms: float, offered_ms: float) -> None:
        link, random = self.link, self._random.random
        if link.loss and random() < link.loss:
            self.tally.lost += 1
            self.lost += 1
            return
        due_ms = left_ms + link.latency_ms
        if link.jitter_ms:
            due_ms = max(left_ms, due_ms + link.jitter_ms * (2 * random() - 1))
        if link.reorder and random() < link.reorder:
            due_ms = left_ms + (due_ms - left_ms) * random()
            self.tally.reordered += due_ms < lane.last_ms
        else:  # W1
            lane.last_ms = due_ms = max(due_ms, lane.last_ms)
        self.tally.sent += 1
        self.tally.delayed += due_ms > offered_ms
        heapq.heappush(lane.flight, (due_ms, next(self._numbers), size, item))
        lane.flight_bytes += size + FRAME_COST_BYTES

    def landed(self, now_ms: float) -> tuple[Plane, float, int, T] | None:
        """The next frame that has arrived, with what `keep` wants to know of it."""
        for plane, lane in self._lanes.items():
            if lane.flight and not lane.blocked and lane.flight[0][0] <= now_ms:
                due_ms, _, size, item = heapq.heappop(lane.flight)
                lane.flight_bytes -= size + FRAME_COST_BYTES
                return plane, due_ms, size, item
        return None

    def keep(self, plane: Plane, due_ms: float, size: int, item: T) -> None:
        """The receiver did not take what has `landed`: its plane waits for `unblock`."""
        lane = self._lanes[plane]
        lane.blocked = True
        heapq.heappush(lane.flight, (due_ms, -next(self._numbers), size, item))  # the first again
        lane.flight_bytes += size + FRAME_COST_BYTES

    def unblock(self) -> None:
        for lane in self._lanes.values():
            lane.blocked = False

    def next_ms(self) -> float:
        """When something happens next."""
        return min(self._next_of(lane) for lane in self._lanes.values())

    def _next_of(self, lane: _Lane[T]) -> float:
        found = NEVER_MS
        if lane.flight and not lane.blocked:
            found = lane.flight[0][0]
        if lane.waiting:
            left_ms = lane.waiting[0][0] + lane.shift_ms
            # Nobody looks at when it leaves but who waits for room, so it may be done later.
            sure_ms = 0.0 if self.link.reorder else self.link.latency_ms - self.link.jitter_ms
            found = min(found, left_ms + (0.0 if lane.wanted else max(0.0, sure_ms)))
        return found
