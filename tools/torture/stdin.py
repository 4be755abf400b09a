"""When whoever started a process of clients wants its end, or has ended: its standard input ends.

Interface: `when_stdin_ends(loop)` gives an event that is set then.
"""

from __future__ import annotations

import asyncio
import os

READ_BYTES = 4096  # nothing is said there


def when_stdin_ends(loop: asyncio.AbstractEventLoop) -> asyncio.Event:
    """Belongs to the running loop, which must not read standard input otherwise."""
    ended = asyncio.Event()

    def heard() -> None:
        if not os.read(0, READ_BYTES):
            loop.remove_reader(0)
            ended.set()

    loop.add_reader(0, heard)
    return ended
