"""The shell: what was printed, and beneath it the prompt, as on the console of a machine."""

from __future__ import annotations

from collections.abc import Sequence

from textual import events, on
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.message import Message
from textual.widgets import Static

from manifold.shells.console.completing import Completer
from manifold.shells.console.history import History
from manifold.shells.console.prompt import Prompt
from manifold.shells.console.theme import Line, Span, harmless
from manifold.shells.console.view import TextView

MENU_ROWS_MAX = 5
MENU_GAP = 2


class Lines(Static):
    """A few lines of spans."""

    DEFAULT_CSS = """
    Lines { height: auto; background: $panel; display: none; }
    """

    def show(self, lines: Sequence[Line]) -> None:
        from rich.text import Text

        look = getattr(self.app, "look")  # noqa: B009
        text = Text("\n").join(
            Text.assemble(*((part, look.style(style)) for part, style in harmless(line)))
            for line in lines
        )
        text.no_wrap = True
        self.display = bool(lines)
        self.update(text)


class ShellPane(Vertical):
    """See the module. The output is as high as what was printed, until it fills the pane."""

    DEFAULT_CSS = """
    ShellPane { background: $background; }
    ShellPane #output { height: 0; }
    ShellPane #prompt-row { height: 1; }
    ShellPane #prompt-label { width: auto; height: 1; }
    ShellPane .rest { height: 1fr; }
    """

    class Printed(Message):
        """Something was printed."""

    def __init__(self, history: History, completer: Completer) -> None:
        super().__init__(id="shell")
        self._offered: tuple[tuple[str, ...], int] = ((), -1)
        # Kept by name: lines are printed also while the screen is built or taken down.
        self.output = TextView(id="output")
        self.prompt = Prompt(history, completer, id="prompt")
        self.menu = Lines(id="menu")
        self._label = Static("", id="prompt-label")

    def compose(self) -> ComposeResult:
        yield self.output
        with Horizontal(id="prompt-row"):
            yield self._label
            yield self.prompt
        yield self.menu
        yield Vertical(classes="rest")

    def on_mount(self) -> None:
        self.output.can_focus = False

    def focus_pane(self) -> None:
        self.screen.set_focus(self.prompt)

    # -- printing ---------------------------------------------------------------------------------

    def print(self, lines: Sequence[Line], tail: Line = ()) -> None:
        """Add lines; `tail` is one that has not ended."""
        self.output.add(lines, tail)
        self.fit()

    def clear(self) -> None:
        self.output.clear()
        self.output.follow = True
        self.fit()

    def fit(self) -> None:
        """As high as what was printed, as far as there is room."""
        room = self.size.height - 1 - (self._menu_rows() if self.menu.display else 0)
        height = max(0, min(self.output.row_count, room))
        if self.output.styles.height is None or self.output.styles.height.value != height:
            self.output.styles.height = height

    def on_resize(self, event: events.Resize) -> None:
        self.call_after_refresh(self.fit)
        self._draw_menu()

    def label(self, spans: Sequence[Span]) -> None:
        """What stands before the line."""
        from rich.text import Text

        look = getattr(self.app, "look")  # noqa: B009
        text = Text.assemble(*((part, look.style(style)) for part, style in spans))
        self._label.update(text)

    # -- the menu of completion -------------------------------------------------------------------

    @on(Prompt.Offered)
    def _offer(self, event: Prompt.Offered) -> None:
        event.stop()
        self._offered = event.candidates, event.at
        self._draw_menu()
        self.fit()

    def _menu_rows(self) -> int:
        candidates, _ = self._offered
        per_row, _ = _grid(candidates, self.size.width)
        return min(MENU_ROWS_MAX, -(-len(candidates) // per_row)) if candidates else 0

    def _draw_menu(self) -> None:
        candidates, at = self._offered
        self.menu.show(menu_lines(candidates, at, self.size.width))

    @on(Prompt.Scroll)
    def _scroll(self, event: Prompt.Scroll) -> None:
        event.stop()
        by = event.by * max(1, self.output.size.height - 1)
        self.output.scroll_relative(y=by, animate=False, force=True)


def _grid(candidates: Sequence[str], width: int) -> tuple[int, int]:
    widest = max((len(each) for each in candidates), default=0) + MENU_GAP
    return max(1, (width - 1) // widest), widest


def menu_lines(candidates: Sequence[str], at: int, width: int) -> list[Line]:
    """The candidates in columns; the rows around the chosen one where they are too many."""
    if not candidates:
        return []
    per_row, widest = _grid(candidates, width)
    rows = [candidates[i : i + per_row] for i in range(0, len(candidates), per_row)]
    here = max(0, at) // per_row
    top = max(0, min(here - MENU_ROWS_MAX // 2, len(rows) - MENU_ROWS_MAX))
    found: list[Line] = []
    for number, row in enumerate(rows[top : top + MENU_ROWS_MAX], top):
        spans: list[Span] = [(" ", "")]
        for column, each in enumerate(row):
            chosen = number * per_row + column == at
            shown = each if len(each) < width - 1 else each[: width - 2] + "…"
            spans.append((shown, "tab" if chosen else ""))
            spans.append((" " * (widest - len(shown)), ""))
        found.append(tuple(spans))
    if len(rows) > MENU_ROWS_MAX:
        found[-1] = (*found[-1][:-1], (f" … {len(candidates)}", "faint"))
    return found
