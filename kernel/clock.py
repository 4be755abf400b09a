"""The clock of a node: its loop's, which tests may make faster, slower, or jump ahead.

Interface rules: everything that a protocol is told of time comes from `now_ms`, and what it asks to
be woken at goes through `loop_s`. Invariant: C1 it never goes back: protocols rely on a monotonic
clock (clock_gettime(2), CLOCK_MONOTONIC), and read no other.
"""

from __future__ import annotations

import asyncio

RATE_MIN, RATE_MAX = 0.1, 10.0  # real oscillators are off by 0.0002; a virtual machine's by more
JUMP_MS_MAX = 7 * 86_400_000.0  # a week


class Clock:
    """Milliseconds since some moment; as many as pass on the loop's clock until it is skewed."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._scale = 1000.0
        self._shift_ms = 0.0

    def now_ms(self) -> float:
        return self._loop.time() * self._scale + self._shift_ms

    def loop_s(self, at_ms: float) -> float:
        """When that will be on the loop's clock, for `call_at`."""
        return (at_ms - self._shift_ms) / self._scale

    def skew(self, jump_ms: float, rate: float) -> None:
        """Go `jump_ms` ahead now, and from now on `rate` times as fast as the loop's clock."""
        assert 0.0 <= jump_ms <= JUMP_MS_MAX and RATE_MIN <= rate <= RATE_MAX, "C1"
        now_ms = self.now_ms() + jump_ms
        self._scale = 1000.0 * rate
        self._shift_ms = now_ms - self._loop.time() * self._scale
