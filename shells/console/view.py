"""Two widgets that everything is shown in: lines of text, and rows of a table.

Both draw only the lines that are visible, keep what was drawn, and repaint single lines.
Interface rules: both are given spans (`theme.py`), never markup; a table is given all of its rows
and repaints those that differ, cell by cell. Control characters are shown, never obeyed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.selection import Selection
from textual.strip import Strip

from manifold.shells.console.theme import Line, Look, Span, harmless, plain, wrapped

LINES_MAX = 20_000  # of a view; of 200 bytes they are 4 MB


def look_of(widget: ScrollView) -> Look:
    """The look of the app that the widget is in."""
    look = getattr(widget.app, "look", None)
    assert isinstance(look, Look), "only the console's apps have such widgets"
    return look


def strip_of(line: Line, width: int, look: Look, base: Style) -> Strip:
    """A line, as wide as it is asked to be."""
    line = harmless(line)
    segments = [Segment(text, look.over(base, name)) for text, name in line]
    length = sum(cell_len(text) for text, _ in line)
    if length < width:
        segments.append(Segment(" " * (width - length), base))
        length = width
    strip = Strip(segments, length)
    return strip if length == width else strip.adjust_cell_length(width, base)


class TextView(ScrollView, can_focus=True):
    """Lines of text: wraps, follows the end, finds, is selected with the mouse."""

    ALLOW_SELECT = True
    DEFAULT_CSS = """
    TextView {
        background: $background; scrollbar-size-vertical: 1; overflow-x: hidden;
        scrollbar-gutter: stable;
    }
    """

    @dataclass
    class Scrolled(Message):
        """What is seen of it is another part."""

        view: TextView

        @property
        def control(self) -> TextView:
            return self.view

    def __init__(self, *, wrap: bool = True, id: str | None = None) -> None:
        super().__init__(id=id)
        self.wrap = wrap
        self.follow = True
        self._lines: list[Line] = []
        self._rows: list[Line] = []
        self._row_counts: list[int] = []
        self._tail: Line = ()
        self._tail_rows = 0
        self._width = 0
        self._found = ""

    # -- what it shows ----------------------------------------------------------------------------

    @property
    def lines(self) -> list[Line]:
        """All of them, the one that has not ended included."""
        return [*self._lines, self._tail] if self._tail else list(self._lines)

    @property
    def row_count(self) -> int:
        return len(self._rows)

    def add(self, lines: Sequence[Line], tail: Line = ()) -> None:
        """Append lines; `tail` is the line that has not ended, instead of the one before."""
        self._drop_tail()
        for line in lines:
            self._append(line)
        excess = len(self._lines) - LINES_MAX
        if excess > 0:
            del self._rows[: sum(self._row_counts[:excess])]
            del self._lines[:excess], self._row_counts[:excess]
        if tail:
            rows = self._wrapped(tail)
            self._tail, self._tail_rows = tail, len(rows)
            self._rows += rows
        self._changed()

    def _append(self, line: Line) -> None:
        rows = self._wrapped(line)
        self._lines.append(line)
        self._row_counts.append(len(rows))
        self._rows += rows

    def _drop_tail(self) -> None:
        if self._tail_rows:
            del self._rows[-self._tail_rows :]
        self._tail, self._tail_rows = (), 0

    def show(self, lines: Iterable[Line], *, keep: bool = False) -> None:
        """These lines instead of all; with `keep` where it is scrolled to stays."""
        self._lines = list(lines)[-LINES_MAX:]
        self._tail, self._tail_rows = (), 0
        self._rewrap()
        if not keep and not self.follow:
            self.scroll_home(animate=False)

    def prepend(self, lines: Sequence[Line]) -> None:
        """Older lines above; what is seen stays where it is. The newest go where it is too much."""
        before = len(self._rows)
        y = self.scroll_offset.y
        kept = [*lines, *self._lines][:LINES_MAX]
        self.follow = False
        self._lines = kept
        self._drop_tail()
        self._rewrap()
        self.scroll_to(y=y + max(0, len(self._rows) - before), animate=False, force=True)

    def clear(self) -> None:
        self.show(())

    def _wrapped(self, line: Line) -> list[Line]:
        line = harmless(line)
        return wrapped(line, self._width) if self.wrap and self._width else [line]

    def _rewrap(self) -> None:
        self._rows, self._row_counts = [], []
        lines, self._lines = self._lines, []
        for line in lines:
            self._append(line)
        if self._tail:
            rows = self._wrapped(self._tail)
            self._tail_rows = len(rows)
            self._rows += rows
        self._changed()

    def _changed(self) -> None:
        widest = 0 if self.wrap else max((len(plain(row)) for row in self._rows), default=0)
        self.virtual_size = Size(widest, len(self._rows))
        if self.follow:
            self.scroll_end(animate=False, force=True, immediate=True, x_axis=False)
        self.refresh()

    def on_resize(self, event: events.Resize) -> None:
        width = self.scrollable_content_region.width
        if width != self._width:
            self._width = width
            self._rewrap()
        elif self.follow:
            self.scroll_end(animate=False, force=True, immediate=True, x_axis=False)

    def _upwards(self, by: int) -> None:
        """Scroll; who is at the top already says so, for there may be older lines."""
        if self.scroll_offset.y > 0:
            self.scroll_relative(y=-by, animate=False, force=True)
        else:
            self.follow = False
            self.post_message(self.Scrolled(self))

    def action_scroll_up(self) -> None:
        self._upwards(1)

    def action_page_up(self) -> None:
        self._upwards(max(1, self.size.height - 1))

    def action_scroll_home(self) -> None:
        self._upwards(len(self._rows))

    def action_scroll_end(self) -> None:
        self.follow = True
        self.scroll_end(animate=False, force=True, immediate=True, x_axis=False)
        self.post_message(self.Scrolled(self))

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        if self.scroll_offset.y <= 0:
            self._upwards(1)

    # -- finding ----------------------------------------------------------------------------------

    def find(self, text: str, *, backwards: bool = False, again: bool = False) -> bool:
        """Scroll to the next row with `text`, in either case; whether there is one."""
        self._found = text.lower()
        self.refresh()
        if not text or not self._rows:
            return not text
        here = self.scroll_offset.y + (-1 if backwards else 1) * again
        count = len(self._rows)
        ways = range(here, here - count, -1) if backwards else range(here, here + count)
        for at in ways:
            if self._found in plain(self._rows[at % count]).lower():
                self.follow = False
                self.scroll_to(y=at % count, animate=False, force=True)
                return True
        return False

    # -- drawing ----------------------------------------------------------------------------------

    def render_line(self, y: int) -> Strip:
        scroll_x, scroll_y = self.scroll_offset
        at = scroll_y + y
        width = self.size.width
        look = look_of(self)
        base = look.ground
        if at >= len(self._rows):
            return Strip.blank(width, base)
        row = self._rows[at]
        if self._found:
            row = marked(row, self._found, "match")
        selection = self.text_selection
        span = selection.get_span(at) if selection is not None else None
        if span is not None:
            end = len(plain(row)) if span[1] == -1 else span[1]
            row = restyled(row, span[0], end, "select")
        strip = strip_of(row, max(width + scroll_x, 1), look, base)
        return strip.crop(scroll_x, scroll_x + width).apply_offsets(scroll_x, at)

    def get_selection(self, selection: Selection) -> tuple[str, str] | None:
        return selection.extract("\n".join(map(plain, self._rows))), "\n"

    def selection_updated(self, selection: Selection | None) -> None:
        self.refresh()

    def watch_scroll_y(self, old: float, new: float) -> None:
        super().watch_scroll_y(old, new)
        if new < old:
            self.follow = self.follow and self.max_scroll_y <= new
        elif new >= self.max_scroll_y:
            self.follow = True
        if new != old:
            self.post_message(self.Scrolled(self))


def marked(line: Line, found: str, style: str) -> Line:
    """The line with every occurrence of `found` (lower case) in a style."""
    text = plain(line).lower()
    at = text.find(found)
    while at >= 0:
        line = restyled(line, at, at + len(found), style)
        at = text.find(found, at + len(found))
    return line


def restyled(line: Line, start: int, end: int, style: str) -> Line:
    """The line with characters `[start, end)` in another style as well."""
    spans: list[Span] = []
    at = 0
    for text, name in line:
        cuts = sorted({0, len(text), *(c - at for c in (start, end) if 0 < c - at < len(text))})
        for low, high in itertools.pairwise(cuts):
            inside = start <= at + low and at + high <= end
            spans.append((text[low:high], f"{name} {style}".strip() if inside else name))
        at += len(text)
    return tuple(spans)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table. The one that `grows` takes what is left; low `rank`s are left out
    first where the screen is narrow."""

    key: str
    title: str
    width: int
    right: bool = False
    rank: int = 9
    grows: bool = False
    letter: str = ""  # the key that sorts by it


def fitted(columns: Sequence[Column], width: int) -> list[tuple[Column, int]]:
    """The columns that fit, with their widths; a blank between any two."""
    chosen = list(columns)
    while len(chosen) > 1 and sum(c.width for c in chosen) + 2 * len(chosen) > width:
        chosen.remove(min(chosen, key=lambda c: c.rank))
    left = width - sum(c.width for c in chosen) - 2 * len(chosen)
    growing = [column for column in chosen if column.grows]
    return [(c, c.width + (left // len(growing) if c.grows and left > 0 else 0)) for c in chosen]


Row = dict[str, Line]  # by column


class Table(ScrollView, can_focus=True):
    """Rows by key, in an order; a cursor that stays with its row; clicks and columns that sort."""

    DEFAULT_CSS = """
    Table { background: $background; scrollbar-size-vertical: 1; overflow-x: hidden; }
    """

    @dataclass
    class Opened(Message):
        """Enter, or a double click, on a row."""

        table: Table
        key: str

        @property
        def control(self) -> Table:
            return self.table

    @dataclass
    class Chosen(Message):
        """The cursor has come to a row."""

        table: Table
        key: str

        @property
        def control(self) -> Table:
            return self.table

    @dataclass
    class SortBy(Message):
        """A column's title was clicked."""

        table: Table
        column: str

        @property
        def control(self) -> Table:
            return self.table

    BINDINGS: ClassVar[list[Any]] = [
        ("up,k", "move(-1)"), ("down,j", "move(1)"), ("pageup", "page(-1)"),
        ("pagedown", "page(1)"), ("home,g", "edge(-1)"), ("end,G", "edge(1)"), ("enter", "open"),
    ]  # fmt: skip

    def __init__(self, columns: Sequence[Column], *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.columns = tuple(columns)
        self.sorted_by = ("", False)  # column, and whether the greatest comes first
        self.empty: tuple[Line, ...] = ()
        self._keys: list[str] = []
        self._rows: dict[str, Row] = {}
        self._chosen = ""
        self._fitted: tuple[int, list[tuple[Column, int]]] = (-1, [])
        self._drawn: dict[str, tuple[object, Strip]] = {}

    @property
    def chosen(self) -> str:
        """The key of the row under the cursor; empty where there is none."""
        return self._chosen if self._chosen in self._rows else ""

    @property
    def keys(self) -> list[str]:
        return list(self._keys)

    def show(self, rows: Sequence[tuple[str, Row]]) -> None:
        """All rows, in order; what is drawn already is left alone."""
        keys = [key for key, _ in rows]
        same_order = keys == self._keys
        before, self._rows, old_keys = self._rows, dict(rows), self._keys
        self._keys = keys
        if self._chosen not in self._rows:
            at = old_keys.index(self._chosen) if self._chosen in old_keys else 0
            self._chosen = keys[min(at, len(keys) - 1)] if keys else ""
            if self._chosen:
                self.post_message(self.Chosen(self, self._chosen))
        if not same_order:
            self._drawn = {key: drawn for key, drawn in self._drawn.items() if key in self._rows}
            self.virtual_size = Size(0, len(keys) + 1)
            self.refresh()
            return
        for at, (key, row) in enumerate(rows):
            if row != before[key]:
                self._repaint(at, row, before[key])

    def _repaint(self, at: int, row: Row, before: Row) -> None:
        y = at + 1 - self.scroll_offset.y
        if not 1 <= y < self.size.height:
            return
        x = 1
        for column, width in self._fit(self.size.width - 1):
            if row.get(column.key) != before.get(column.key):
                self.refresh(Region(x, y, width, 1))
            x += width + 2

    def sort_mark(self, column: str, descending: bool) -> None:
        self.sorted_by = (column, descending)
        self.refresh()

    # -- the cursor -------------------------------------------------------------------------------

    def choose(self, key: str) -> None:
        """Put the cursor on a row."""
        if key not in self._rows:
            return
        old, self._chosen = self._chosen, key
        for each in (old, key):
            if each in self._rows:
                self.refresh(Region(0, self._keys.index(each) + 1 - self.scroll_offset.y,
                                    self.size.width, 1))  # fmt: skip
        at = self._keys.index(key)
        top, room = self.scroll_offset.y, max(1, self.size.height - 1)
        if at < top or at >= top + room:
            self.scroll_to(y=at if at < top else at - room + 1, animate=False, force=True)
        if old != key:
            self.post_message(self.Chosen(self, key))

    def action_move(self, by: int) -> None:
        if self._keys:
            at = self._keys.index(self.chosen) if self.chosen else 0
            self.choose(self._keys[max(0, min(len(self._keys) - 1, at + by))])

    def action_page(self, by: int) -> None:
        self.action_move(by * max(1, self.size.height - 2))

    def action_edge(self, by: int) -> None:
        self.action_move(by * len(self._keys))

    def action_open(self) -> None:
        if self.chosen:
            self.post_message(self.Opened(self, self.chosen))

    def on_click(self, event: events.Click) -> None:
        if event.y == 0:
            x = 1
            for column, width in self._fit(self.size.width - 1):
                if x <= event.x < x + width + 2:
                    self.post_message(self.SortBy(self, column.key))
                x += width + 2
            return
        at = event.y - 1 + self.scroll_offset.y
        if at < len(self._keys):
            self.choose(self._keys[at])
            if event.chain == 2:
                self.action_open()

    # -- drawing ----------------------------------------------------------------------------------

    def render_line(self, y: int) -> Strip:
        look = look_of(self)
        base = look.ground
        width = self.size.width
        fit = self._fit(width - 1)
        if y == 0:
            return strip_of(self._titles(fit), width, look, base)
        at = y - 1 + self.scroll_offset.y
        if not self._keys and y - 2 in range(len(self.empty)):
            return strip_of(self.empty[y - 2], width, look, base)
        if at >= len(self._keys):
            return Strip.blank(width, base)
        key = self._keys[at]
        row = self._rows[key]
        if key == self._chosen:
            name = "select" if self.has_focus or look.palette is None else "marked"
            base = look.over(base, name)
        what = (row, width, look, base)
        drawn = self._drawn.get(key)
        if drawn is None or drawn[0] != what:
            drawn = self._drawn[key] = what, strip_of(_row_line(row, fit), width, look, base)
        return drawn[1]

    def _fit(self, width: int) -> list[tuple[Column, int]]:
        if self._fitted[0] != width:
            self._fitted = width, fitted(self.columns, width)
        return self._fitted[1]

    def _titles(self, fit: Sequence[tuple[Column, int]]) -> Line:
        line: list[Span] = [(" ", "")]
        for column, width in fit:
            mark = ""
            if self.sorted_by[0] == column.key:
                mark = "▾" if self.sorted_by[1] else "▴"
            title = (column.title + mark)[:width]
            padded = title.rjust(width) if column.right else title.ljust(width)
            line += [(padded, "accent bold" if mark else "head"), ("  ", "")]
        return tuple(line)

    def on_focus(self) -> None:
        self.refresh()

    def on_blur(self) -> None:
        self.refresh()

    def text(self) -> str:
        """What it shows, as text."""
        fit = fitted(self.columns, max(self.size.width, 20) - 1)
        lines = [self._titles(fit), *(_row_line(self._rows[key], fit) for key in self._keys)]
        return "\n".join(plain(line).rstrip() for line in lines)


def _row_line(row: Row, fit: Sequence[tuple[Column, int]]) -> Line:
    line: list[Span] = [(" ", "")]
    for column, width in fit:
        cell = harmless(row.get(column.key, ()))
        length = sum(len(text) for text, _ in cell)
        if length > width:
            cell, length = _cut(cell, width), width
        blank = (" " * (width - length), "")
        line += [blank, *cell] if column.right else [*cell, blank]
        line.append(("  ", ""))
    return tuple(line)


def _cut(cell: Line, width: int) -> Line:
    spans: list[Span] = []
    room = width - 1
    for text, style in cell:
        spans.append((text[:room], style))
        room -= len(text[:room])
    return (*spans, ("…", "faint"))
