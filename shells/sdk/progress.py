"""Progress on a terminal, one line on standard error that is redrawn; and what waits share."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WIDTH = 30
PROGRESS_S = 0.2  # between two looks
QUEUED = (
    "{job} is queued, on the disk of the node it was submitted to: no majority of the voters "
    "answers there. It runs when they are back; `manifold kill {job}` takes it out."
)

Shown = Callable[[Any], None] | bool | None  # a progress bar: a function, or True for ours


def is_queued(future: Any) -> bool:
    """Whether its job waits in the outbox of a node that reaches no majority of the voters."""
    status = getattr(future, "status", None)
    return status is not None and status.state == "queued"


def is_program(source: Any) -> bool:
    """Whether it is run by the virtual machine: a program, a path, a text or a kernel."""
    if isinstance(source, (str, Path)):
        return True
    return hasattr(source, "kid") or hasattr(source, "program")


def remaining_s(deadline_s: float | None) -> float | None:
    """Time left until a deadline of the monotonic clock; None where there is none."""
    return None if deadline_s is None else max(0.0, deadline_s - time.monotonic())


@contextmanager
def shown(progress: Shown) -> Iterator[Callable[[Any], None] | None]:
    """What to call with a future: ours for True, which goes away in the end, or the caller's."""
    if progress is not True:
        yield progress or None
        return
    bar = ProgressBar()
    try:
        yield bar
    finally:
        bar.clear()


def human_ms(milliseconds: float) -> str:
    """A time for people."""
    if milliseconds < 1000:
        return f"{milliseconds:.0f} ms"
    seconds = milliseconds / 1000
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


class ProgressBar:
    """Called with whatever has `progress()`."""

    def __init__(self) -> None:
        self._shown = False
        self._told = False
        self._enabled = sys.stderr.isatty()

    def __call__(self, future: Any) -> None:
        if not self._told and is_queued(future):
            self._told = True
            self.clear()
            sys.stderr.write(QUEUED.format(job=future.job) + "\n")
        progress = future.progress()
        if progress is None or not progress.total or not self._enabled:
            return
        share = progress.done / progress.total
        filled = int(share * WIDTH)
        bar = "#" * filled + "." * (WIDTH - filled)
        rate = progress.done / max(progress.elapsed_ms, 1) * 1000
        left_ms = (progress.total - progress.done) / rate * 1000 if rate else 0.0
        retries = f"  {progress.retries} retries" if progress.retries else ""
        sys.stderr.write(
            f"\r[{bar}] {share:4.0%}  {rate:,.0f}/s  {human_ms(left_ms)} left{retries}\x1b[K"
        )
        sys.stderr.flush()
        self._shown = True

    def clear(self) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
