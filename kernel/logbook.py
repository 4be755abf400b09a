"""A node's log: a bounded file on disk for the operator, and the newest lines for `manifold logs`.

Invariants: G1 the file and its one predecessor together hold at most `2 * FILE_BYTES_MAX`; G2 the
ring holds at most `LINES_MAX` lines, numbered from 1 since the process started (older lines of the
file have numbers up to 0, so that a reader who follows misses none and sees none twice).
"""

from __future__ import annotations

import logging
import logging.handlers
import time
from collections import deque
from pathlib import Path

FILE_BYTES_MAX = 8 << 20
LINES_MAX = 10_000
TAIL_BYTES = 64 << 10
LINE_CHARACTERS_MAX = 2000


class _Format(logging.Formatter):
    @staticmethod
    def converter(seconds: float | None) -> time.struct_time:
        return time.gmtime(seconds)

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        return line.replace("\n", "\n    ")


class Logbook(logging.Handler):
    """Install once per process with `logging.getLogger().addHandler`."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.lines: deque[str] = deque(maxlen=LINES_MAX)  # G2
        self.count = 0
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if path.exists():
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - TAIL_BYTES))
                old = file.read().decode(errors="replace").splitlines()
            self.lines.extend(old[-LINES_MAX:])
        self._file = logging.handlers.RotatingFileHandler(
            path, maxBytes=FILE_BYTES_MAX, backupCount=1, encoding="utf-8"
        )  # G1
        form = _Format(
            "%(asctime)s.%(msecs)03dZ %(levelname)-8s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S"
        )
        self.setFormatter(form)
        self._file.setFormatter(form)

    def emit(self, record: logging.LogRecord) -> None:
        self._file.emit(record)
        for line in self.format(record).splitlines():
            self.lines.append(line[:LINE_CHARACTERS_MAX])
            self.count += 1

    def read(self, after: int, contains: str, limit: int) -> tuple[int, list[str]]:
        """The number of the newest line, and those after `after` that contain a text."""
        first = self.count - len(self.lines) + 1
        start = max(0, after + 1 - first) if after else 0
        found = [line for i, line in enumerate(self.lines) if i >= start and contains in line]
        return self.count, found[-limit:]

    def close(self) -> None:
        self._file.close()
        super().close()
