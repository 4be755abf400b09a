"""The jobs pane."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from textual.binding import Binding

from manifold.shells.console.panes.listing import ListingPane
from manifold.shells.console.tables import JOB_COLUMNS, job_page, job_rows, job_sort
from manifold.shells.console.theme import Line
from manifold.shells.console.view import Row


class JobsPane(ListingPane):
    """Jobs that run, and those that ended and are remembered."""

    columns = JOB_COLUMNS
    BINDINGS: ClassVar[list[Any]] = [Binding("w", "app.why"), Binding("x,delete", "app.kill")]

    def rows(self) -> list[tuple[str, Row]]:
        return job_rows(self.model(), self.now_ms())

    def sort_key(self, column: str) -> Callable[[str], Any]:
        return job_sort(self.model(), column)

    def page_of(self, key: str, width: int) -> list[Line]:
        return job_page(self.model(), key, self.now_ms(), width)

    def empty(self) -> tuple[Line, ...]:
        return (
            (("  No job is known.", "dim"),),
            (
                ("  Run one at the prompt: ", "dim"),
                ("run examples/collatz.ent --range 1:1000000 --reduce sum", "accent"),
            ),
        )
