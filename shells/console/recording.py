"""Recordings: the event stream of a session as lines of JSON, and reading them back.

Form: the first line is a `Header`, each other one an event (`messages.py`). Lines are flushed as
they are written, so that whatever ends the writer costs at most the last line; a reader leaves out
a last line that is torn, and refuses anything else that it does not understand, with its number.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from manifold.kernel.errors import ManifoldError, Refused
from manifold.shells.console import messages as e
from manifold.shells.console.model import Model

VERSION = 1
FILE_BYTES_MAX = 1 << 30  # of a recording that is replayed: a week of a busy cluster of 16
LINE_BYTES_MAX = 4 << 20  # an event of 500 log lines of 2 kB, four times over


class Header(msgspec.Struct, frozen=True):
    """What kind of file it is."""

    manifold: str  # "recording"
    version: int
    cluster: str = ""
    at_ms: int = 0


class BadRecording(ManifoldError):
    """The file is not a recording that this version can replay."""

    code = "recording"
    exit_code = 2


EVENTS: msgspec.json.Decoder[e.Event] = msgspec.json.Decoder(e.Event)


class Recorder:
    """Writes events to a file that must not exist yet, or may be overwritten."""

    def __init__(self, path: Path, cluster: str, at_ms: int, *, force: bool = False) -> None:
        flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if force else os.O_EXCL)
        try:
            self._descriptor = os.open(path, flags, 0o600)
        except FileExistsError:
            raise Refused(
                f"{path} is there already.", "Name another file, or add --force."
            ) from None
        except OSError as fault:
            raise Refused(
                f"{path} cannot be written: {fault.strerror}.", "Name another file."
            ) from fault
        self.events = 0
        self._write(Header("recording", VERSION, cluster, at_ms))

    def write(self, events: Sequence[e.Event]) -> None:
        for event in events:
            self._write(event)
            self.events += 1

    def _write(self, what: msgspec.Struct) -> None:
        data = msgspec.json.encode(what) + b"\n"
        while data:
            data = data[os.write(self._descriptor, data) :]

    def close(self) -> None:
        os.fsync(self._descriptor)
        os.close(self._descriptor)


def read(path: Path) -> tuple[Header, list[e.Event]]:
    """A recording."""
    try:
        size = path.stat().st_size
        if size > FILE_BYTES_MAX:
            raise BadRecording(f"{path} has {size:,} bytes, of at most {FILE_BYTES_MAX:,}.")
        data = path.read_bytes()
    except OSError as fault:
        raise BadRecording(
            f"{path} cannot be read: {fault.strerror}.", "Name a file that `record` has written."
        ) from fault
    lines = data.split(b"\n")
    torn = lines.pop()  # what stands behind the last newline: nothing, or half a line
    if not lines and torn:
        lines = [torn]
    header = _header(path, lines[0] if lines else b"")
    events = [_event(path, number, line) for number, line in enumerate(lines[1:], 2)]
    return header, events


def _header(path: Path, line: bytes) -> Header:
    try:
        header = msgspec.json.decode(line, type=Header)
    except (msgspec.DecodeError, UnicodeDecodeError):
        header = Header("", 0)
    if header.manifold != "recording":
        raise BadRecording(
            f"{path} is no recording of a console.", "Name a file that `record` has written."
        )
    if header.version != VERSION:
        raise BadRecording(
            f"{path} is a recording of version {header.version}; this is version {VERSION}.",
            "Replay it with the Manifold that wrote it.",
        )
    return header


def _event(path: Path, number: int, line: bytes) -> e.Event:
    try:
        if len(line) > LINE_BYTES_MAX:
            raise msgspec.DecodeError(f"it has {len(line):,} bytes")
        return EVENTS.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as fault:
        raise BadRecording(
            f"{path}, line {number}: this is no event ({fault}).",
            f"Cut the file before it: head -n {number - 1} {path}",
        ) from None


class Player:
    """A recording with a clock that can stand, run faster and be set; pure."""

    def __init__(self, header: Header, events: Sequence[e.Event], speed: float = 1.0) -> None:
        self.header = header
        self.events = events
        self.speed = speed
        self.paused = False
        self.model = Model()
        self._next = 0
        self.begin_ms = events[0].at_ms if events else header.at_ms
        self.end_ms = max((event.at_ms for event in events), default=self.begin_ms)
        self.now_ms = self.begin_ms

    @property
    def ended(self) -> bool:
        return self._next >= len(self.events)

    def advance(self, elapsed_ms: float) -> list[e.Event]:
        """The events of so much time of the watcher; they have been applied."""
        if self.paused or self.ended:
            return []
        return self._play(self.now_ms + round(elapsed_ms * self.speed))

    def step(self) -> list[e.Event]:
        """On to the end of the next look."""
        at = self._next
        while at < len(self.events) and not isinstance(self.events[at], e.Looked):
            at += 1
        return self._play(self.events[min(at, len(self.events) - 1)].at_ms) if self.events else []

    def seek(self, to_ms: int) -> list[e.Event]:
        """Go to a time. Backwards everything is played anew from the start, into a new model."""
        to_ms = max(self.begin_ms, min(self.end_ms, to_ms))
        if to_ms < self.now_ms:
            self.model, self._next = Model(), 0
        return self._play(to_ms)

    def _play(self, to_ms: int) -> list[e.Event]:
        played = []
        while not self.ended and self.events[self._next].at_ms <= to_ms:
            event = self.events[self._next]
            self.model.apply(event)
            played.append(event)
            self._next += 1
        self.now_ms = min(to_ms, self.end_ms)
        return played
