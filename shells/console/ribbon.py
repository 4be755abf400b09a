"""A line of the screen with parts that can be clicked: the bar above, the keys below."""

from __future__ import annotations

from collections.abc import Sequence

from textual import events
from textual.strip import Strip
from textual.widget import Widget

from manifold.shells.console.theme import Line, Look, Span, plain
from manifold.shells.console.view import strip_of

Part = tuple[Line, str]  # what it shows, and the action of a click, if any


class Ribbon(Widget):
    """Parts at the left and parts at the right, which go first where it is narrow."""

    DEFAULT_CSS = """
    Ribbon { height: 1; background: $panel; }
    """

    def __init__(self, *, id: str, on_ground: bool = False) -> None:
        super().__init__(id=id)
        self._on_ground = on_ground
        self._left: tuple[Part, ...] = ()
        self._right: tuple[Part, ...] = ()

    def show(self, left: Sequence[Part], right: Sequence[Part] = ()) -> None:
        """Repaints only where it differs."""
        if (tuple(left), tuple(right)) != (self._left, self._right):
            self._left, self._right = tuple(left), tuple(right)
            self.refresh()

    @property
    def text(self) -> str:
        return plain(self._line()[0])

    def _line(self) -> tuple[Line, list[tuple[int, int, str]]]:
        spans: list[Span] = []
        zones = []
        at = 0
        right = list(self._right)
        used = sum(len(plain(line)) for line, _ in self._left)
        while right and used + sum(len(plain(line)) for line, _ in right) > self.size.width:
            right.pop(0)
        blank = self.size.width - used - sum(len(plain(line)) for line, _ in right)
        middle: Part = (((" " * max(0, blank), ""),), "")
        for line, action in (*self._left, middle, *right):
            spans += line
            width = len(plain(line))
            if action:
                zones.append((at, at + width, action))
            at += width
        return tuple(spans), zones

    def render_line(self, y: int) -> Strip:
        look = getattr(self.app, "look", None)
        assert isinstance(look, Look)
        base = look.ground if self._on_ground else look.panel
        return strip_of(self._line()[0], self.size.width, look, base)

    async def on_click(self, event: events.Click) -> None:
        for start, end, action in self._line()[1]:
            if start <= event.x < end:
                await self.app.run_action(action)
