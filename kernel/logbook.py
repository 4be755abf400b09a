"""A node's log: a bounded file on disk for the operator, and the newest lines for `manifold logs`.

Interface rules: a reader who follows passes the number of the newest line it was given, and gets
what came after it; 0 asks from the start.
Invariants: G1 the file and its one predecessor together hold at most `2 * FILE_BYTES_MAX`; G2 the
ring holds at most `LINES_MAX` lines; G3 a line's number is made of its own time, in microseconds,
and rises: it is the same after a restart that reads it from the file, so that a reader who follows
misses none and sees none twice.
"""

from __future__ import annotations

import logging
import logging.handlers
import time
from collections import deque
from datetime import UTC, datetime, timedelta
from pathlib import Path

FILE_BYTES_MAX = 8 << 20
LINES_MAX = 10_000
TAIL_BYTES = 64 << 10
LINE_CHARACTERS_MAX = 2000
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def _microseconds(line: str) -> int:
    """The time a line begins with; 0 where it continues another."""
    if line[23:24] != "Z":
        return 0
    try:
        moment = datetime.fromisoformat(line[:24])
    except ValueError:
        return 0
    return (moment - EPOCH) // timedelta(microseconds=1)


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
        self.lines: deque[tuple[int, str]] = deque(maxlen=LINES_MAX)  # G2
        self.newest = 0
        self.levels = {"info": 0, "warning": 0, "error": 0, "critical": 0}  # lines logged since
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if path.exists():
            with path.open("rb") as file:
                skipped = max(0, path.stat().st_size - TAIL_BYTES)
                file.seek(skipped)
                old = file.read().decode(errors="replace").splitlines()
            for line in old[1 if skipped else 0 :]:  # the first may have lost its beginning
                self._keep(line)
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
        level = record.levelname.lower()
        if level in self.levels:
            self.levels[level] += 1
        for line in self.format(record).splitlines():
            self._keep(line)

    def _keep(self, line: str) -> None:
        """G3."""
        self.newest = max(self.newest + 1, _microseconds(line))
        self.lines.append((self.newest, line[:LINE_CHARACTERS_MAX]))

    def read(self, after: int, contains: str, limit: int) -> tuple[int, list[str]]:
        """The number of the newest line, and the newest `limit` after `after` with a text."""
        found = [line for number, line in self.lines if number > after and contains in line]
        return self.newest, found[-limit:]

    def close(self) -> None:
        self._file.close()
        super().close()
