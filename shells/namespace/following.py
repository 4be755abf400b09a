"""Follow what is read: lines of a log as they come, and what changes of anything else.

Interface: each way of a `Follower` is an iterator of `(value, text)`: at first what there is, then
what is new. It ends when its `Stop` says so. Registers are told by their node; everything else is
read again every `POLL_S`, logs every `LOG_POLL_S`: so many questions at most, and no line where
nothing changed. Of a file of `key: value` lines only those that changed are told, and clocks
(`CLOCKS`) only with others. A node that is silent for less than `LOST_S` is waited for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

from manifold.kernel.errors import Unavailable
from manifold.shells.escapes import visible_text
from manifold.shells.namespace.logs import Entry, Logs
from manifold.shells.namespace.table import flat
from manifold.shells.namespace.values import bare, plain
from manifold.shells.sdk.client import Client
from manifold.shells.sdk.globals_calls import Reading

POLL_S = 0.5
LOG_POLL_S = 0.3
LOST_S = 5.0  # as of a watch: a supervisor starts a node again within a second or two
CLOCKS = frozenset({"uptime_ms", "elapsed_ms", "running_ms", "load.t_mono_ms"})

T = TypeVar("T")
Change = tuple[object, str]


class Stop(Protocol):
    """Such as a `threading.Event`."""

    def wait(self, timeout: float) -> bool:
        """Wait so long, in seconds, at most; whether it is over."""


class Follower:
    """See the module. Without a `stop` it goes on until Ctrl-C."""

    def __init__(self, client: Client, stop: Stop | None) -> None:
        self._client = client
        self._stop: Stop = threading.Event() if stop is None else stop

    def _readings(self, read: Callable[[], T], pause_s: float) -> Iterator[T]:
        """What is read, again and again."""
        yield read()  # what is wrong with it is raised at once
        lost_s: float | None = None
        while not self._stop.wait(pause_s):
            try:
                found = read()
            except Unavailable:
                lost_s = time.monotonic() if lost_s is None else lost_s
                if time.monotonic() - lost_s > LOST_S:
                    raise
            else:
                lost_s = None
                yield found

    def log(self, logs: Logs, last: int, alone: bool) -> Iterator[Change]:
        """Lines, of all nodes with the node before them."""
        first = True
        for entries in self._readings(logs.more, LOG_POLL_S):
            yield from told(entries[max(0, len(entries) - last) :] if first else entries, alone)
            first = False

    def file(self, read: Callable[[], Change]) -> Iterator[Change]:
        """What it says."""
        before: Change | None = None
        for value, text in self._readings(read, POLL_S):
            if before is None:
                yield value, text
            elif text != before[1]:
                changed = _changed(before[0], value, text)
                if changed:
                    yield value, changed
            before = value, text

    def folder(self, names: Callable[[], list[str]]) -> Iterator[Change]:
        """`+ NAME` of what is there and what comes, `- NAME` of what goes."""
        before: list[str] = []
        for found in self._readings(names, POLL_S):
            for name in before:
                if name not in found:
                    yield {"name": name, "there": False}, f"- {name}"
            for name in found:
                if name not in before:
                    yield {"name": name, "there": True}, f"+ {name}"
            before = found

    def register(self, key: str) -> Iterator[Change]:
        """What it holds."""
        return ((plain(each.value), bare(each.value)) for each in self.states(key))

    def states(self, key: str) -> Iterator[Reading]:
        """Of a register: its node tells of each change."""
        from manifold.shells.sdk.globals import Watch

        with Watch(self._client, key) as states:
            while not self._stop.wait(0):
                try:
                    reading = states.next(POLL_S)
                except TimeoutError:
                    continue
                yield reading


def told(entries: list[Entry], alone: bool) -> list[Change]:
    """Lines of logs with their values; `alone`: of one node."""
    return [
        ({"node": alias, "line": line}, visible_text(line) if alone else log_line((alias, line)))
        for alias, line in entries
    ]


def log_line(entry: Entry) -> str:
    """A line of a merged log."""
    alias, line = entry
    return visible_text(f"{alias:12} {line}")


def _changed(before: Any, now: Any, text: str) -> str:
    """Of a dict the keys that differ, unless they are clocks alone; else the whole."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return text
    old = dict(flat(before))
    differ = {key: each for key, each in flat(now) if old.get(key) != each}
    if all(key in CLOCKS for key in differ):
        return ""
    return "\n".join(f"{visible_text(key)}: {each}" for key, each in differ.items())
