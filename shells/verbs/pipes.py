"""The reader of what a verb prints without end: `manifold tail -f /log | head -1`.

A verb that waits for news would notice only with its next line that nobody reads any more; a
`Reader` notices at once. It is the `Stop` of what is followed (shells/namespace/following.py).
"""

from __future__ import annotations

import io
import select
import sys
import threading
from types import TracebackType


class Reader:
    """Of standard output. Where that is no file of the system, it never goes."""

    def __init__(self) -> None:
        self._poll: select.poll | None = None
        try:
            output = sys.stdout.fileno()
        except io.UnsupportedOperation:
            self._quiet = threading.Event()  # never set: it is how to wait and still hear Ctrl-C
        else:
            self._poll = select.poll()
            self._poll.register(output, 0)  # errors and hang-ups are always told

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._poll = None

    def wait(self, timeout: float) -> bool:
        """Wait so long, in seconds; whether nobody reads any more."""
        if self._poll is None:
            return self._quiet.wait(timeout)
        return bool(self._poll.poll(timeout * 1000))
