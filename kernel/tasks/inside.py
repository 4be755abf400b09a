"""Whether this is a task process, for code that runs in one as well as elsewhere.

Interface rules: `lend()` says that the present call waits for calls of its own, so that its slot
may be used for them; the SDK says so when it submits. Elsewhere it does nothing.
"""

from __future__ import annotations

from collections.abc import Callable

_lend: Callable[[], None] | None = None


def inside() -> bool:
    """Whether this is a task process."""
    return _lend is not None


def lend() -> None:
    """The present call waits for others."""
    if _lend is not None:
        _lend()


def lend_by(function: Callable[[], None]) -> None:
    """What `lend` is to do here: this is a task process."""
    global _lend
    _lend = function
