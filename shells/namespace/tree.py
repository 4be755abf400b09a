"""The namespace: everything that can be read of a cluster, as one tree of names.

Interface: see `Namespace`. It keeps nothing between calls; every answer is of now, and one file
asks only what it needs. Errors: `NotFound` names the nearest name there is, `Refused` says that a
folder is listed and not read, `Unavailable` names the node that is silent.
Source: Plan 9 from Bell Labs (Pike and others, 1995): resources as files that `cat` reads.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from manifold.kernel import messages as m
from manifold.kernel.errors import ManifoldError, NotFound
from manifold.shells.namespace.entries import (
    Entry,
    Kind,
    Parts,
    is_file,
    is_folder,
    missing,
    parts_of,
    path_of,
)
from manifold.shells.namespace.following import Follower, Stop, told
from manifold.shells.namespace.logs import Warn
from manifold.shells.namespace.mounts import Mount, RegisterTree
from manifold.shells.namespace.source import Source
from manifold.shells.namespace.table import ROWS, Row, text_of
from manifold.shells.namespace.values import bare, plain
from manifold.shells.sdk.client import Client
from manifold.shells.sdk.globals_calls import Reading
from manifold.shells.sdk.registers import TIMEOUT_S

T = TypeVar("T")


class Namespace:
    """Paths of one cluster, over a client of it; may be used from any thread.

    `stale`: what one voter knows of a register will do. `timeout_s` is that of registers. `warn` is
    called with one sentence where a node is missing from an answer.

    >>> space = Namespace(client)
    >>> space.list("/nodes"), space.read("/nodes/rpi4-01/cpu"), space.complete("/nodes/rp")
    """

    def __init__(
        self,
        client: Client,
        *,
        stale: bool = False,
        timeout_s: float = TIMEOUT_S,
        warn: Warn = lambda sentence: None,
    ) -> None:
        self._source = Source(client, stale, timeout_s, warn)

    # -- what there is ----------------------------------------------------------------------------

    def list(self, path: str) -> builtins.list[Entry]:
        """What is in a folder, in order; of a file its own entry."""
        return self._guided(path, self._list)

    def read(self, path: str) -> str:
        """A file's text, as `cat` prints it: with a newline at its end, unless it is empty."""
        value, text = self._guided(path, self._read)
        return "" if value == [] else f"{text}\n"

    def value(self, path: str) -> object:
        """The same as JSON has it: numbers, text, null, lists, objects."""
        value, _ = self._guided(path, self._read)
        return value

    def kind(self, path: str) -> Kind:
        """What is there; `NotFound` where nothing is. A slash at the end asks for a folder."""
        return self._guided(path, self._folder if path.endswith("/") else self._kind)

    def follow(self, path: str, *, last: int = 10, stop: Stop | None = None) -> Iterator[str]:
        """Lines of a log as they come, after the `last` there are; of anything else what there is
        now, then what has changed (following.py). It ends when `stop` is set."""
        return (text for _, text in self.changes(path, last=last, stop=stop))

    def changes(
        self, path: str, *, last: int = 10, stop: Stop | None = None
    ) -> Iterator[tuple[object, str]]:
        """As `follow`, each with its value: of a log a dict of `node` and `line`, of a folder one
        of `name` and `there`."""
        kind = self.kind(path)
        row, names, rest = self._find(parts_of(path))
        follower = Follower(self._source.client, stop)
        if kind == "log":
            logs = self._source.logs(names[0] if names else "", max(last, 1))
            return follower.log(logs, last, bool(names))
        if kind == "folder":
            return follower.folder(lambda: [entry.name for entry in self.list(path)])
        if isinstance(row.mount, RegisterTree):
            return follower.register(row.mount.key(rest))
        return follower.file(lambda: self._guided(path, self._read))

    def last(self, path: str, count: int) -> builtins.list[tuple[object, str]]:
        """The last lines of a log or of a file's text, as `changes` has them."""
        kind = self.kind(path)
        if kind == "log":
            _, names, _ = self._find(parts_of(path))
            node = names[0] if names else ""
            entries = self._source.logs(node, max(count, 1)).more()
            return told(entries[max(0, len(entries) - count) :], bool(node))
        lines: builtins.list[tuple[object, str]] = [
            (line, line) for line in self.read(path).splitlines()
        ]
        return lines[max(0, len(lines) - count) :]

    def register(self, path: str) -> str | None:
        """The key of the register at a path; None where there can be none. Asks nobody."""
        try:
            row, _, rest = self._find(parts_of(path))
        except NotFound:
            return None
        return row.mount.key(rest) if isinstance(row.mount, RegisterTree) and rest else None

    def complete(self, prefix: str) -> builtins.list[str]:
        """Paths that begin with `prefix`, one part further; folders end in a slash. Nothing where
        nobody answers."""
        if prefix and not prefix.startswith("/"):
            return []
        head, _, begin = prefix.rpartition("/")
        try:
            found = self._names(parts_of(head or "/"), begin)
        except (ManifoldError, KeyError):
            return []
        return sorted(f"{head}/{name}" for name in found if name.startswith(begin))

    # -- the walk ---------------------------------------------------------------------------------

    def _find(self, parts: Parts) -> tuple[Row, Parts, Parts]:
        """The row of a path, the names that stand for its capitals, and what a tree has to find."""
        at = TREE
        names: builtins.list[str] = []
        for depth, part in enumerate(parts):
            if at.row.mount is not None:
                return at.row, tuple(names), parts[depth:]
            if part in at.inside:
                at = at.inside[part]
            elif at.any is not None:
                at = at.any
                names.append(part)
            else:
                raise NotFound(f"There is no {path_of(parts[: depth + 1])}.")
        return at.row, tuple(names), ()

    def _guided(self, path: str, do: Callable[[Parts], T]) -> T:
        """What is missing is told with the nearest name there is."""
        parts = parts_of(path)
        try:
            return do(parts)
        except (NotFound, KeyError) as error:
            raise self._nearest(parts, error) from None

    def _nearest(self, parts: Parts, error: NotFound | KeyError) -> ManifoldError:
        for depth, part in enumerate(parts):
            try:
                entries = {entry.name: entry for entry in self._list(parts[:depth])}
            except KeyError:
                break  # it has gone meanwhile
            entry = entries.get(f"{part}/", entries.get(part))
            if entry is None:
                return missing(parts, depth, entries)
            if entry.kind != "folder" and depth + 1 < len(parts):
                return is_file(parts[: depth + 1])
        return error if isinstance(error, NotFound) else NotFound(f"There is no {path_of(parts)}.")

    def _list(self, parts: Parts) -> builtins.list[Entry]:
        row, names, rest = self._find(parts)
        source = self._source
        if row.mount is not None:
            entries = row.mount.entries(source, names, rest)
            if entries is not None:
                return entries
            row.mount.value(source, names, rest)  # it is a file, or missing
            return [Entry(parts[-1], "file", row.text)]
        if row.names is not None:
            return builtins.list(row.names(source))
        hidden = self._hidden(row, names)
        if row.kind != "folder":
            if parts[-1] in hidden:
                raise NotFound(f"There is no {path_of(parts)}.")
            return [Entry(parts[-1], row.kind, row.text)]
        inside = _branch(row).inside
        return [
            Entry(name, each.row.kind, each.row.text)
            for name, each in inside.items()
            if name not in hidden
        ]

    def _hidden(self, row: Row, names: Parts) -> Sequence[str]:
        """Names that are not there in the folder that `names` end with, which has to be there."""
        for outer in (row, _branch(row).outer):
            if names and outer is not None and outer.hidden is not None:
                return outer.hidden(self._source, names[-1])
        return ()

    def _folder(self, parts: Parts) -> Kind:
        row, names, rest = self._find(parts)
        if row.mount is None or not rest:
            return self._kind(parts)
        return "file" if row.mount.entries(self._source, names, rest) is None else "folder"

    def _kind(self, parts: Parts) -> Kind:
        row, names, rest = self._find(parts)
        if row.mount is None:
            self._hidden(row, names)
            return row.kind
        if not rest:
            return "folder"
        try:
            row.mount.value(self._source, names, rest)
        except KeyError:
            if row.mount.entries(self._source, names, rest) is None:
                raise
            return "folder"
        return "file"

    def _read(self, parts: Parts) -> tuple[object, str]:
        """A file's value and its text."""
        row, names, rest = self._find(parts)
        source = self._source
        if row.mount is not None:
            return self._read_mount(row.mount, names, rest, parts)
        if row.kind == "log":
            node = names[0] if names else ""
            entries = source.logs(node, m.LOG_LINES_MAX).more()
            lines = [text for _, text in told(entries, bool(node))]
            return lines, "\n".join(lines)
        if row.read is None:
            self._hidden(row, names)
            raise is_folder(parts)
        raw = row.read(source, names)
        value = raw if row.plain is None else row.plain(raw)
        return value, text_of(raw) if row.show is None else row.show(raw)

    def _read_mount(
        self, mount: Mount, names: Parts, rest: Parts, parts: Parts
    ) -> tuple[object, str]:
        try:
            found = mount.value(self._source, names, rest) if rest else None
        except KeyError:
            if mount.entries(self._source, names, rest) is None:
                raise
            raise is_folder(parts) from None
        if not rest:
            raise is_folder(parts)
        if isinstance(found, Reading):
            return plain(found.value), bare(found.value)
        return found, text_of(found)

    def _names(self, parts: Parts, begin: str) -> builtins.list[str]:
        """For completion."""
        row, names, rest = self._find(parts)
        if row.mount is not None:
            return row.mount.names(self._source, names, rest, begin)
        if row.kind != "folder":
            return []
        entries = self._list(parts)
        return [e.name if e.kind != "folder" else e.name.rstrip("/") + "/" for e in entries]


# -- the table as a tree --------------------------------------------------------------------------


@dataclass(slots=True)
class Branch:
    """A row, what lies in its folder, and the row of the folder it lies in."""

    row: Row
    outer: Row | None
    inside: dict[str, Branch] = field(default_factory=dict)
    any: Branch | None = None  # of whatever name


def _grown(rows: Iterable[Row]) -> tuple[Branch, dict[str, Branch]]:
    """N1: a row comes after its folder."""
    root: Branch | None = None
    found: dict[str, Branch] = {}
    for row in rows:
        if root is None:
            root = found[row.pattern] = Branch(row, None)
            continue
        outer = found[path_of(row.parts[:-1])]
        branch = found[row.pattern] = Branch(row, outer.row)
        if row.parts[-1].isupper():
            outer.any = branch
        else:
            outer.inside[row.parts[-1]] = branch
    assert root is not None, "the table is empty"
    return root, found


TREE, BRANCHES = _grown(ROWS)


def _branch(row: Row) -> Branch:
    return BRANCHES[row.pattern]
