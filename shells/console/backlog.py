"""Older lines of the nodes' logs, from their files on this host: as far back as the disk has them.

Interface: `Backlog.older(count)` gives the next older lines of all nodes, in order of time. Files
are read backwards, a block at a time, so that memory does not depend on how long they are. Of nodes
of another host there is nothing here.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from manifold.kernel import places
from manifold.kernel.errors import ManifoldError

BLOCK_BYTES = 64 << 10
LINE_BYTES_MAX = 64 << 10  # a longer one is cut: its beginning is shown as a line
FILES = ("node.log", "node.log.1")  # the newest first
Entry = tuple[str, str]  # alias, line


class Backlog:
    """From before `before`, the oldest entries that are shown already (all of one time)."""

    def __init__(
        self, cluster: str, environ: Mapping[str, str], before: str, shown: frozenset[Entry]
    ) -> None:
        self._entries = _merged(folders(cluster, environ))
        self._before = before
        self._shown = shown

    def older(self, count: int) -> list[Entry]:
        """At most about `count` lines, the oldest first; none when there are no more."""
        found: list[list[Entry]] = []
        lines = 0
        for moment, entry in self._entries:
            if self._before and (moment > self._before or self._shown.issuperset(entry)):
                continue
            found.append(entry)
            lines += len(entry)
            if lines >= count:
                break
        return [line for entry in reversed(found) for line in entry]


def folders(cluster: str, environ: Mapping[str, str]) -> list[Path]:
    """Those of nodes that have a log on this host."""
    try:
        top = places.cluster_dir(cluster, environ)
        return sorted(path.parent for path in top.glob(f"*/{FILES[0]}"))
    except (OSError, ManifoldError):  # nothing is here, or it is not ours to read
        return []


def _merged(nodes: list[Path]) -> Iterator[tuple[str, list[Entry]]]:
    """Entries of all nodes, the newest first: (time, the line and those that continue it)."""
    streams = [_entries(folder) for folder in nodes]
    return heapq.merge(*streams, key=lambda each: each[0], reverse=True)


def _entries(folder: Path) -> Iterator[tuple[str, list[Entry]]]:
    held: list[Entry] = []
    for name in FILES:
        for line in backwards(folder / name):
            held.append((folder.name, line))
            if line[23:24] == "Z":
                yield line[:24], held[::-1]
                held = []
    if held:
        yield "", held[::-1]


def backwards(path: Path) -> Iterator[str]:
    """The lines of a file, the last first."""
    try:
        file = path.open("rb")
    except OSError:  # there is none, or it has gone since
        return
    with file:
        end = file.seek(0, os.SEEK_END)
        rest = b""
        while end > 0:
            start = max(0, end - BLOCK_BYTES)
            file.seek(start)
            block = file.read(end - start) + rest
            end = start
            lines = block.split(b"\n")
            rest = lines.pop(0)
            for line in reversed(lines):
                if line:
                    yield line.decode(errors="replace")
            if len(rest) > LINE_BYTES_MAX:
                yield rest.decode(errors="replace")
                rest = b""
        if rest:
            yield rest.decode(errors="replace")
