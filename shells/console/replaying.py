"""The console on a recording: the same panes, a clock that can stand, and no cluster."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, ClassVar

from textual.binding import Binding

from manifold.shells.console import messages as e
from manifold.shells.console.app import Console
from manifold.shells.console.boot import Boot
from manifold.shells.console.figures import age
from manifold.shells.console.model import Model
from manifold.shells.console.recording import Player
from manifold.shells.console.ribbon import Part
from manifold.shells.console.theme import Line

FRAME_S = 0.1
SEEK_MS = 10_000
SPEEDS = (0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 100.0)
TRACK = 24  # cells of the bar that shows where it is


class ReplayConsole(Console):
    """See the module. Verbs are refused: there is nobody to run them."""

    BINDINGS: ClassVar[list[Any]] = [
        Binding("space", "pause"), Binding("right", "seek(1)"), Binding("left", "seek(-1)"),
        Binding("full_stop", "step"), Binding("plus,equals_sign", "faster(1)"),
        Binding("minus", "faster(-1)"),
    ]  # fmt: skip

    def __init__(
        self,
        player: Player,
        environ: Mapping[str, str] | None = None,
        *,
        pane: str = "nodes",
        theme: str = "dark",
    ) -> None:
        environ = dict(os.environ if environ is None else environ)
        self.player = player
        super().__init__(
            player.header.cluster or "recording", environ, read_only=True, pane=pane, theme=theme
        )
        self._frame_s = time.monotonic()

    def boot(self) -> Boot:
        attached = (each for each in self.player.events if isinstance(each, e.Attached))
        first = next(attached, None)
        when = datetime.fromtimestamp(self.player.begin_ms / 1000, UTC)
        return Boot(first.version if first else "", f"recorded {when:%Y-%m-%d %H:%M} UTC")

    def start_source(self) -> None:
        self._play(self.player.seek(self.player.begin_ms))
        self.set_interval(FRAME_S, self._frame)

    def now_ms(self) -> int:
        return self.player.now_ms

    def _frame(self) -> None:
        now_s = time.monotonic()
        elapsed_ms, self._frame_s = (now_s - self._frame_s) * 1000, now_s
        self._play(self.player.advance(elapsed_ms))

    def _play(self, events: Sequence[e.Event]) -> None:
        """Show what was played: the player's model has it already."""
        before, self.model = self.model, self.player.model
        if events:
            self.learnt(events, before if before is not self.model else Model())
        self.show_banner()

    def banner_line(self) -> Line:
        player = self.player
        span = max(1, player.end_ms - player.begin_ms)
        at = player.now_ms - player.begin_ms
        full = round(TRACK * at / span)
        word = " ■ END " if player.ended else " ‖ STOPPED " if player.paused else " ▶ REPLAY "
        return (
            (word, "caution" if player.paused or player.ended else "tab"),
            (f" {age(at)} ", ""), ("━" * full, "accent"), ("━" * (TRACK - full), "faint"),
            (f" {age(span)}  {player.speed:g}x  ", "dim"),
        )  # fmt: skip

    def key_parts(self) -> tuple[list[Part], list[Part]]:
        keys = (("space", "stop, go on", "app.pause"), ("←→", "10 s", ""),
                (".", "step", "app.step"), ("+-", "speed", ""), ("⏎", "open", ""),
                ("?", "help", "app.help"), ("^Q", "leave", "app.quit"))  # fmt: skip
        return [(((f" {k}", "key"), (f" {label} ", "dim")), a) for k, label, a in keys], []

    def refusal(self) -> str:
        return "This is a recording: there is nobody to run verbs."

    def action_pause(self) -> None:
        self.player.paused = not self.player.paused
        self.show_banner()

    def action_step(self) -> None:
        """Stop, and go on by one look."""
        self.player.paused = True
        self._play(self.player.step())

    def action_seek(self, by: int) -> None:
        self._play(self.player.seek(self.player.now_ms + by * SEEK_MS))

    def action_seek_to(self, after_ms: int) -> None:
        """Go to a time after the beginning."""
        self._play(self.player.seek(self.player.begin_ms + after_ms))

    def action_faster(self, by: int) -> None:
        at = min(range(len(SPEEDS)), key=lambda i: abs(SPEEDS[i] - self.player.speed)) + by
        self.player.speed = SPEEDS[max(0, min(len(SPEEDS) - 1, at))]
        self.show_banner()
