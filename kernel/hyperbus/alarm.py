"""An alarm at a time of the monotonic clock: a timerfd, which is late by what the loop is late.

Interface rules: from the thread of its loop only, made after the last fork. `at` replaces what was
set before; `NEVER_MS` unsets it. Timers of the loop count in whole milliseconds of a clock that is
read once a turn: one in a hundred is more than 1 ms late on a quiet machine. They are used where
the system has no timerfd, and `precise` says so.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import time
from collections.abc import Callable

NEVER_MS = float("inf")
_NONBLOCK = os.O_NONBLOCK  # TFD_NONBLOCK and TFD_CLOEXEC are these by definition
_CLOEXEC = os.O_CLOEXEC
_ABSOLUTE = 1  # TFD_TIMER_ABSTIME
_COUNT_BYTES = 8  # what a read gives: how often it has gone off
_SOONEST_NS = 1  # 0 would unset it; a time that has passed goes off at once


class _Times(ctypes.Structure):
    """struct itimerspec: the interval, which is not used, and the time."""

    _fields_ = (
        ("every_s", ctypes.c_long),
        ("every_ns", ctypes.c_long),
        ("at_s", ctypes.c_long),
        ("at_ns", ctypes.c_long),
    )


class Alarm:
    """Calls `on_time` at the time that `at` was told last."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        on_time: Callable[[], None],
        *,
        precise: bool = True,
    ) -> None:
        self._loop = loop
        self._on_time = on_time
        self._due_ms = NEVER_MS
        self._timer: asyncio.TimerHandle | None = None
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._create() if precise else -1
        if self._fd >= 0:
            loop.add_reader(self._fd, self._readable)

    def _create(self) -> int:
        create = getattr(self._libc, "timerfd_create", None)
        return int(create(time.CLOCK_MONOTONIC, _NONBLOCK | _CLOEXEC)) if create else -1

    @property
    def precise(self) -> bool:
        return self._fd >= 0

    def at(self, due_ms: float) -> None:
        if due_ms == self._due_ms:
            return
        self._due_ms = due_ms
        if self._fd >= 0:
            at_ns = 0 if due_ms == NEVER_MS else max(_SOONEST_NS, int(due_ms * 1e6))
            times = _Times(0, 0, *divmod(at_ns, 1_000_000_000))
            failed = self._libc.timerfd_settime(self._fd, _ABSOLUTE, ctypes.byref(times), None)
            assert not failed, f"timerfd_settime: errno {ctypes.get_errno()}"
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if due_ms != NEVER_MS:
            self._timer = self._loop.call_later(
                max(0.0, due_ms / 1000 - time.monotonic()), self._fire
            )

    def _readable(self) -> None:
        try:
            os.read(self._fd, _COUNT_BYTES)
        except BlockingIOError:  # it was set anew since the loop saw it
            return
        self._fire()

    def _fire(self) -> None:
        self._due_ms = NEVER_MS
        self._timer = None
        self._on_time()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
