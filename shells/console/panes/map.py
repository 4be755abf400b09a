"""The map pane: draws `mapping.py`, and shards as they move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from textual import events
from textual.binding import Binding
from textual.message import Message
from textual.strip import Strip
from textual.timer import Timer
from textual.widget import Widget

from manifold.shells.console import messages as e
from manifold.shells.console.mapping import Chart, chart, disc
from manifold.shells.console.model import Model
from manifold.shells.console.tables import load_style
from manifold.shells.console.theme import Line, Look, Span
from manifold.shells.console.view import restyled, strip_of

MOVE_MS = 900  # a shard is on its way so long
FRAME_S = 1 / 15
DOT = "•"


class MapPane(Widget, can_focus=True):
    """See the module. Still, it costs nothing: a timer runs only while a shard moves."""

    DEFAULT_CSS = """
    MapPane { background: $background; }
    """
    BINDINGS: ClassVar[list[Any]] = [
        Binding("escape", "app.pane('shell')"), Binding("left,up,h,k", "walk(-1)"),
        Binding("right,down,l,j", "walk(1)"), Binding("enter", "open"),
    ]  # fmt: skip

    class Opened(Message):
        def __init__(self, kid: str) -> None:
            super().__init__()
            self.kid = kid

    def __init__(self, model: Callable[[], Model], now_ms: Callable[[], int]) -> None:
        super().__init__(id="map")
        self._model = model
        self._now_ms = now_ms
        self._chart = Chart()
        self._charted: object = None
        self._lines: list[Line] = []
        self._chosen = ""
        self._timer: Timer | None = None

    def focus_pane(self) -> None:
        self.screen.set_focus(self)

    def update_rows(self) -> None:
        """Draw what is known now; repaints the rows that differ."""
        model = self._model()
        nodes = list(model.nodes.values())
        width, height = self.size.width, self.size.height
        what = [(n.kid, n.alias, n.cores, n.compute, n.memory_bytes, n.gpu) for n in nodes]
        if (what, width, height) != self._charted:
            self._charted = (what, width, height)
            self._chart = chart(nodes, width, max(0, height - 2))
        lines = self._drawn(model)
        for y, line in enumerate(lines):
            if y >= len(self._lines) or line != self._lines[y]:
                self.refresh_lines_at(y)
        self._lines = lines
        self._keep_moving(model)

    def refresh_lines_at(self, y: int) -> None:
        from textual.geometry import Region

        self.refresh(Region(0, y, self.size.width, 1))

    def on_resize(self, event: events.Resize) -> None:
        self._lines = []
        self.call_after_refresh(self.update_rows)

    def _moving(self, model: Model) -> list[tuple[e.Moved, float]]:
        now_ms = self._now_ms()
        return [
            (move, (now_ms - move.at_ms) / MOVE_MS)
            for move in model.moves
            if 0 <= now_ms - move.at_ms < MOVE_MS
        ]

    def _keep_moving(self, model: Model) -> None:
        moving = bool(self._moving(model)) and self.is_on_screen
        if moving and self._timer is None:
            self._timer = self.set_interval(FRAME_S, self.update_rows)
        elif not moving and self._timer is not None:
            self._timer.stop()
            self._timer = None

    # -- drawing ----------------------------------------------------------------------------------

    def _drawn(self, model: Model) -> list[Line]:
        width, height = self._chart.width, self._chart.height
        if not model.nodes:
            return [(), (("  Nothing to show: no node is known.", "dim"),)]
        pieces: dict[int, list[tuple[int, str, str]]] = {}
        for spot in self._chart.spots.values():
            node = model.nodes.get(spot.kid)
            if node is None:
                continue
            share = model.share(spot.kid)
            style = _state_style(node.state)
            if node.state == "ready":
                style = load_style(share) if share else "dim"
            for row, text in enumerate(disc(spot, share, node.state)):
                pieces.setdefault(spot.y + row, []).append((spot.x, text, style))
            if spot.label:
                label = spot.label.center(spot.width)
                weight = "tab" if spot.kid == self._chosen else "" if share else "dim"
                weight = weight if node.state == "ready" or spot.kid == self._chosen else style
                pieces.setdefault(spot.y + spot.height, []).append((spot.x, label, weight))
        for x, y in self._dots(model):
            pieces.setdefault(y, []).append((x, DOT, "other bold"))
        lines = [_row(pieces.get(y, ()), width) for y in range(height)]
        return [*lines, self._chosen_line(model), self._legend()]

    def _dots(self, model: Model) -> list[tuple[int, int]]:
        found = []
        spots = {
            model.nodes[kid].alias: spot
            for kid, spot in self._chart.spots.items()
            if kid in model.nodes
        }
        for move, share in self._moving(model):
            target = spots.get(move.to)
            job = model.jobs.get(move.job)
            source = spots.get(move.source or (model.name(job.owner) if job else ""))
            if target is None or source is None or target is source:
                continue
            (x0, y0), (x1, y1) = source.centre, target.centre
            found.append((int(x0 + (x1 - x0) * share), int(y0 + (y1 - y0) * share)))
        return found

    def _chosen_line(self, model: Model) -> Line:
        node = model.nodes.get(self._chosen)
        if node is None:
            up = f"↑ {self._chart.up}  " if self._chart.up else ""
            right = f"→ {self._chart.right}" if self._chart.right else ""
            more = f"  {self._chart.unplaced} nodes have no room" if self._chart.unplaced else ""
            return ((f" {up}{right}", "faint"), (more, "warn"))
        load = model.loads.get(node.kid, e.Load())
        runs = len(model.runs.get(node.alias, ()))
        return (
            (f" {node.alias}", "bold"), (f"  {node.node_class}  {node.state}  ", "dim"),
            (f"{load.busy}/{node.cores} busy, {runs} shards", ""),
        )  # fmt: skip

    def _legend(self) -> Line:
        return (
            (" ○ idle  ", "dim"), ("◒ fills with load  ", "accent"), ("● full  ", "ok"),
            ("◌ suspect  ", "warn"),
            ("✕ dead  ", "bad"), (f"{DOT} a shard moves", "other"),
        )  # fmt: skip

    def render_line(self, y: int) -> Strip:
        look = getattr(self.app, "look", None)
        assert isinstance(look, Look)
        line = self._lines[y] if y < len(self._lines) else ()
        return strip_of(line, self.size.width, look, look.ground)

    # -- choosing ---------------------------------------------------------------------------------

    def action_walk(self, by: int) -> None:
        kids = list(self._chart.spots)
        if kids:
            at = kids.index(self._chosen) + by if self._chosen in kids else 0
            self._chosen = kids[at % len(kids)]
            self.update_rows()

    def action_open(self) -> None:
        if self._chosen:
            self.post_message(self.Opened(self._chosen))

    def on_click(self, event: events.Click) -> None:
        kid = self._chart.at(event.x, event.y)
        if kid:
            self._chosen = kid
            self.update_rows()
            if event.chain == 2:
                self.action_open()


def _state_style(state: str) -> str:
    return {"suspect": "warn", "dead": "bad"}.get(state, "faint")


def _row(pieces: list[tuple[int, str, str]] | tuple[()], width: int) -> Line:
    text = [" "] * width
    for x, piece, _ in pieces:
        for at, character in enumerate(piece, x):
            if 0 <= at < width and character != " ":
                text[at] = character
    line: tuple[Span, ...] = (("".join(text), ""),)
    for x, piece, style in pieces:
        if style and piece.strip():
            line = restyled(line, x, x + len(piece), style)
    return line
