"""A table with a page of the chosen row: beside it where there is room, else by Enter."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal
from textual.message import Message
from textual.widgets import Input

from manifold.shells.console.model import Model
from manifold.shells.console.theme import Line, plain
from manifold.shells.console.view import Column, Row, Table, TextView

BESIDE_COLUMNS_MIN = 150  # the table's 95 and a page of 55


class Page(TextView):
    """What is written for its width, and so again when that is another."""

    class Resized(Message):
        """It has another size now."""

    def on_resize(self, event: events.Resize) -> None:
        super().on_resize(event)
        self.post_message(self.Resized())


class ListingPane(Horizontal):
    """What nodes and jobs have in common; a subclass says what rows and pages are."""

    DEFAULT_CSS = """
    ListingPane { background: $background; }
    ListingPane Table { width: 1fr; }
    ListingPane .page { width: 1fr; display: none; }
    ListingPane.-beside .page {
        display: block; width: 40%; border-left: solid $rule; padding: 0 1;
    }
    ListingPane.-open .page { display: block; padding: 0 1; }
    ListingPane.-open Table, ListingPane.-open .left { display: none; }
    ListingPane .left { width: 1fr; }
    ListingPane .filter {
        display: none; dock: bottom; height: 1; border: none; padding: 0 1; background: $panel;
    }
    ListingPane .filter.-shown { display: block; }
    """
    BINDINGS: ClassVar[list[Any]] = [
        Binding("slash", "filter"), Binding("escape", "back"), Binding("r", "reverse"),
        Binding("y", "copy"),
    ]  # fmt: skip
    columns: tuple[Column, ...] = ()

    def __init__(self, id: str, model: Callable[[], Model], now_ms: Callable[[], int]) -> None:
        super().__init__(id=id)
        self.model = model
        self.now_ms = now_ms
        self._sort: tuple[str, bool] = ("", False)
        self._filter = ""
        # Kept by name: rows are shown also while the screen is built or taken down.
        self.table = Table(self.columns, id=f"{id}-table")
        self.page = Page(id=f"{id}-page", wrap=False)
        self.page.add_class("page")
        self.field = Input(id=f"{id}-filter", placeholder="filter", compact=True)
        self.field.add_class("filter")

    def compose(self) -> ComposeResult:
        yield self.table
        yield from self.compose_page()

    def compose_page(self) -> ComposeResult:
        """The page of a row, and the field of the filter."""
        yield self.page
        yield self.field

    # -- what a subclass says ---------------------------------------------------------------------

    @abstractmethod
    def rows(self) -> list[tuple[str, Row]]:
        """The key and the cells of each."""

    @abstractmethod
    def sort_key(self, column: str) -> Callable[[str], Any]:
        """What rows are sorted by, of a key."""

    @abstractmethod
    def page_of(self, key: str, width: int) -> list[Line]:
        """The page of a row."""

    @abstractmethod
    def empty(self) -> tuple[Line, ...]:
        """What stands there where no row is."""

    # -- showing ----------------------------------------------------------------------------------

    def on_mount(self) -> None:
        self.page.follow = False

    def focus_pane(self) -> None:
        self.screen.set_focus(self.page if self.opened else self.table)

    def update_rows(self) -> None:
        """Show what is known now; only what differs is painted."""
        key = self.sort_key(self._sort[0])
        rows = sorted(self.rows(), key=lambda each: key(each[0]), reverse=self._sort[1])
        wanted = self._filter.lower()
        if wanted:
            rows = [
                (k, row) for k, row in rows
                if any(wanted in plain(cell).lower() for cell in row.values())
            ]  # fmt: skip
        nothing = ((f"  nothing has {wanted!r}; ", "dim"), ("esc", "key"), (" shows all", "dim"))
        self.table.empty = (nothing,) if wanted else self.empty()
        self.table.show(rows)
        self._show_page()

    def _show_page(self) -> None:
        page = self.page
        if page.display:
            width = max(20, page.size.width - 2)
            lines = self.page_of(self.table.chosen, width) if self.table.chosen else []
            if lines != page.lines:
                page.show(lines, keep=True)

    def on_resize(self, event: events.Resize) -> None:
        self.set_class(event.size.width >= BESIDE_COLUMNS_MIN, "-beside")
        self.call_after_refresh(self.update_rows)

    def on_page_resized(self, event: Page.Resized) -> None:
        event.stop()
        self._show_page()

    @property
    def opened(self) -> bool:
        """Whether the page alone is shown."""
        return self.has_class("-open")

    # -- keys -------------------------------------------------------------------------------------

    @on(Table.SortBy)
    def _sort_by(self, event: Table.SortBy) -> None:
        event.stop()
        self.action_sort(event.column)

    def action_sort(self, column: str) -> None:
        """By a column; again: the other way round."""
        same = self._sort[0] == column
        self._sort = (column, not self._sort[1] if same else False)
        self.table.sort_mark(*self._sort)
        self.update_rows()

    def action_reverse(self) -> None:
        self._sort = (self._sort[0], not self._sort[1])
        self.table.sort_mark(*self._sort)
        self.update_rows()

    def on_key(self, event: events.Key) -> None:
        """A capital letter sorts by the column that has it."""
        if isinstance(self.app.focused, Input) or not event.character:
            return
        for column in self.columns:
            if column.letter and column.letter.upper() == event.character:
                event.stop()
                self.action_sort(column.key)

    @on(Table.Opened)
    def _open(self, event: Table.Opened) -> None:
        event.stop()
        self.add_class("-open")
        self.page.focus()
        self.page.scroll_home(animate=False)
        self.call_after_refresh(self._show_page)
        self.post_message(self.Turned())

    @on(Table.Chosen)
    def _chosen(self, event: Table.Chosen) -> None:
        event.stop()
        self._show_page()

    class Turned(Message):
        """The page was opened or closed: other keys have a meaning."""

    def action_back(self) -> None:
        """Close the page, or take back the filter, or go back to the shell."""
        field = self.field
        if field.has_class("-shown"):
            field.value = ""
            field.remove_class("-shown")
            self._filter = ""
            self.update_rows()
            self.table.focus()
        elif self.opened:
            self.remove_class("-open")
            self.table.focus()
            self.post_message(self.Turned())
        else:
            self.app.call_later(self.app.run_action, "pane('shell')")

    def action_filter(self) -> None:
        field = self.field
        field.add_class("-shown")
        field.focus()

    @on(Input.Changed)
    def _filtered(self, event: Input.Changed) -> None:
        event.stop()
        self._filter = event.value
        self.update_rows()

    @on(Input.Submitted)
    def _filter_done(self, event: Input.Submitted) -> None:
        event.stop()
        self.table.focus()
        if not event.value:
            event.input.remove_class("-shown")

    def action_copy(self) -> None:
        text = (
            "\n".join(plain(line) for line in self.page.lines) if self.opened else self.table.text()
        )
        self.app.copy_to_clipboard(text)
        self.app.notify("copied")
