"""The prompt's history, across runs: a file of lines that only its user may read.

Interface rules: several consoles may add to one file; each reads it when it starts.
Invariants: H1 at most `ENTRIES_MAX` entries are kept. H2 the file has mode 0600. H3 a file that
cannot be read or written costs the history, not the console; `trouble` says why.
"""

from __future__ import annotations

import os
from pathlib import Path

ENTRIES_MAX = 2_000  # of 100 bytes: 200 kB
ENTRY_CHARS_MAX = 4_096
NAME = "console_history"


class History:
    """`add` what was entered; `older`, `newer` and `search` walk through it."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.entries: list[str] = []
        self.trouble = ""
        self._at = 0
        self._draft = ""
        if path is not None:
            self._read(path)
        self.reset()

    def _read(self, path: Path) -> None:
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return
        except OSError as fault:
            self.trouble = f"history is not kept: {fault.strerror}"
            self._path = None
            return
        lines = [line for line in text.splitlines() if line.strip()]
        self.entries = lines[-ENTRIES_MAX:]
        if len(lines) > 2 * ENTRIES_MAX:
            self._write("w", "".join(f"{line}\n" for line in self.entries))

    def _write(self, mode: str, text: str) -> None:
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if mode == "w" else os.O_APPEND)
            descriptor = os.open(self._path, flags, 0o600)
            with open(descriptor, "a", encoding="utf-8") as file:
                os.fchmod(file.fileno(), 0o600)
                file.write(text)
        except OSError as fault:
            self.trouble = f"history is not kept: {fault.strerror}"
            self._path = None

    def add(self, line: str) -> None:
        """Keep what was entered, unless it is the same as before or begins with a blank."""
        line = line.replace("\n", " ")[:ENTRY_CHARS_MAX]
        if line.strip() and line[0] != " " and self.entries[-1:] != [line]:
            self.entries.append(line)
            del self.entries[:-ENTRIES_MAX]
            self._write("a", line + "\n")
        self.reset()

    def reset(self) -> None:
        self._at, self._draft = len(self.entries), ""

    def older(self, line: str, prefix: str = "") -> str | None:
        """The entry before, that begins with `prefix`; `line` is what stands there now."""
        if self._at == len(self.entries):
            self._draft = line
        for at in range(min(self._at, len(self.entries)) - 1, -1, -1):
            if self.entries[at].startswith(prefix) and self.entries[at] != line:
                self._at = at
                return self.entries[at]
        return None

    def newer(self, line: str, prefix: str = "") -> str | None:
        """The entry after; in the end what stood there first."""
        for at in range(self._at + 1, len(self.entries)):
            if self.entries[at].startswith(prefix) and self.entries[at] != line:
                self._at = at
                return self.entries[at]
        if self._at < len(self.entries):
            self._at = len(self.entries)
            return self._draft
        return None

    def search(self, text: str, before: int | None = None) -> tuple[int, str] | None:
        """The newest entry with `text` in it, older than number `before`."""
        top = len(self.entries) if before is None else before
        for at in range(top - 1, -1, -1):
            if text in self.entries[at]:
                return at, self.entries[at]
        return None

    def suggest(self, prefix: str) -> str:
        """The newest entry that goes on from `prefix`."""
        if prefix:
            for entry in reversed(self.entries):
                if entry.startswith(prefix) and entry != prefix:
                    return entry
        return ""
