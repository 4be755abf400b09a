"""The nodes pane."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical

from manifold.shells.console.model import Model
from manifold.shells.console.panes.listing import ListingPane, Page
from manifold.shells.console.tables import (
    NODE_COLUMNS,
    cluster_chart,
    node_page,
    node_rows,
    node_sort,
)
from manifold.shells.console.theme import Line
from manifold.shells.console.view import Row

CHART_ROWS_MIN, CHART_ROWS_MAX = 5, 16


class NodesPane(ListingPane):
    """Every node that is known, how it is and what it does."""

    columns = NODE_COLUMNS
    BINDINGS: ClassVar[list[Any]] = [
        Binding("i", "app.inspect"), Binding("l", "app.node_log"), Binding("p", "app.node_ps"),
    ]  # fmt: skip

    def __init__(self, id: str, model: Callable[[], Model], now_ms: Callable[[], int]) -> None:
        super().__init__(id, model, now_ms)
        self.chart = Page(id="nodes-chart", wrap=False)

    def compose(self) -> ComposeResult:
        with Vertical(classes="left"):
            yield self.table
            yield self.chart
        yield from self.compose_page()

    def on_mount(self) -> None:
        super().on_mount()
        self.chart.can_focus = False

    def update_rows(self) -> None:
        """Beneath the rows, where there is room, how the whole cluster is."""
        super().update_rows()
        chart = self.chart
        room = self.size.height - len(self.table.keys) - 2
        height = min(CHART_ROWS_MAX, room) if room >= CHART_ROWS_MIN and self.table.keys else 0
        chart.styles.height = height
        if height and chart.size.width:
            lines = cluster_chart(self.model(), chart.size.width, height)
            if lines != chart.lines:
                chart.show(lines, keep=True)

    def on_page_resized(self, event: Page.Resized) -> None:
        self.update_rows()

    def rows(self) -> list[tuple[str, Row]]:
        return node_rows(self.model(), self.now_ms())

    def sort_key(self, column: str) -> Callable[[str], Any]:
        return node_sort(self.model(), column)

    def page_of(self, key: str, width: int) -> list[Line]:
        return node_page(self.model(), key, self.now_ms(), width)

    def empty(self) -> tuple[Line, ...]:
        return (
            (("  No node is known.", "dim"),),
            (("  Start a cluster at the prompt: ", "dim"), ("up --nodes 4 --detach", "accent")),
        )
