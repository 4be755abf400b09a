"""The nodes pane."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from textual.binding import Binding

from manifold.shells.console.panes.listing import ListingPane
from manifold.shells.console.tables import NODE_COLUMNS, node_page, node_rows, node_sort
from manifold.shells.console.theme import Line
from manifold.shells.console.view import Row


class NodesPane(ListingPane):
    """Every node that is known, how it is and what it does."""

    columns = NODE_COLUMNS
    hints = (
        ("enter", "open", "node_open"), ("/", "filter", "node_filter"),
        ("i", "inspect", "inspect"), ("l", "log", "node_log"), ("B", "by busy", "node_busy"),
    )  # fmt: skip
    BINDINGS: ClassVar[list[Any]] = [
        Binding("i", "app.inspect"), Binding("l", "app.node_log"), Binding("p", "app.node_ps"),
    ]  # fmt: skip

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
