"""The pager: a screen of text with search, for `… | less` and for what a key asks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding
from textual.screen import ModalScreen
from textual.widgets import Input

from manifold.shells.console.ribbon import Part, Ribbon
from manifold.shells.console.theme import Line, plain
from manifold.shells.console.view import TextView


class Pager(ModalScreen[None]):
    """Lines are added while what prints them runs."""

    DEFAULT_CSS = """
    Pager { background: $background; }
    Pager #pager-find {
        display: none; border: none; height: 1; padding: 0 1; background: $panel; dock: bottom;
    }
    Pager #pager-find.-open { display: block; }
    Pager #pager-keys { dock: bottom; }
    """
    BINDINGS: ClassVar[list[Any]] = [
        Binding("q,escape", "leave"), Binding("slash", "find"), Binding("n", "again(1)"),
        Binding("N", "again(-1)"), Binding("g,home", "edge(-1)"), Binding("G,end", "edge(1)"),
        Binding("space,pagedown,f", "page(1)"), Binding("b,pageup", "page(-1)"),
        Binding("j,down", "line(1)"), Binding("k,up", "line(-1)"), Binding("w", "wrap"),
        Binding("y", "copy"), Binding("ctrl+c", "stop"), Binding("left", "side(-1)"),
        Binding("right", "side(1)"),
    ]  # fmt: skip

    def __init__(self, title: str, lines: Sequence[Line] = ()) -> None:
        super().__init__()
        self._title = title
        self._first = lines
        self._found = ""
        self.running = False
        # Kept by name: lines come also while the screen is built or taken down.
        self.text = TextView(id="pager-text")
        self._head, self._keys = Ribbon(id="pager-title"), Ribbon(id="pager-keys")

    def compose(self) -> ComposeResult:
        yield self._head
        yield self.text
        yield Input(id="pager-find", placeholder="find", compact=True)
        yield self._keys

    def on_mount(self) -> None:
        self.text.follow = False
        self.text.show([*self._first, *self.text.lines])  # some may have come already
        self.text.focus()
        self.tell()

    def add(self, lines: Sequence[Line], tail: Line = ()) -> None:
        self.text.add(lines, tail)
        self.tell()

    def on_resize(self, event: events.Resize) -> None:
        self.call_after_refresh(self.tell)

    @on(TextView.Scrolled)
    def _scrolled(self) -> None:
        self.tell()

    def tell(self) -> None:
        """Where in the text it is, and the keys."""
        count = self.text.row_count
        bottom = min(count, self.text.scroll_offset.y + self.text.size.height)
        state = "running" if self.running else "end" if bottom >= count else ""
        where = f"{bottom}/{count} {state} "
        title: list[Part] = [(((f" $ {self._title} ", "bold"),), "")]
        self._head.show(title, [(((where, "dim"),), "")])
        keys = [("q", "leave"), ("/", "find"), ("n", "next"), ("w", "wrap"), ("y", "copy")]
        actions = {"q": "leave", "/": "find", "n": "again(1)", "w": "wrap", "y": "copy"}
        parts: list[Part] = [
            (((f" {key}", "key"), (f" {label} ", "dim")), f"screen.{actions[key]}")
            for key, label in keys
        ]
        self._keys.show(parts)

    # -- keys -------------------------------------------------------------------------------------

    def action_leave(self) -> None:
        find = self.query_one("#pager-find", Input)
        if find.has_class("-open"):
            find.remove_class("-open")
            self.text.focus()
        else:
            self.dismiss()

    def action_stop(self) -> None:
        if self.screen.get_selected_text():
            self.screen.action_copy_text()
        else:
            self.dismiss()

    def action_find(self) -> None:
        find = self.query_one("#pager-find", Input)
        find.value = ""
        find.add_class("-open")
        find.focus()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        event.input.remove_class("-open")
        self.text.focus()
        self._found = event.value
        if not self.text.find(event.value):
            self.app.bell()
        self.tell()

    def action_again(self, by: int) -> None:
        if not self.text.find(self._found, backwards=by < 0, again=True):
            self.app.bell()
        self.tell()

    def action_edge(self, by: int) -> None:
        view = self.text
        view.scroll_home(animate=False) if by < 0 else view.scroll_end(animate=False)
        self.call_after_refresh(self.tell)

    def action_page(self, by: int) -> None:
        self.action_line(by * max(1, self.text.size.height - 1))

    def action_line(self, by: int) -> None:
        self.text.scroll_relative(y=by, animate=False, force=True)
        self.call_after_refresh(self.tell)

    def action_side(self, by: int) -> None:
        self.text.scroll_relative(x=8 * by, animate=False, force=True)

    def action_wrap(self) -> None:
        self.text.wrap = not self.text.wrap
        self.text.show(self.text.lines, keep=True)

    def action_copy(self) -> None:
        self.app.copy_to_clipboard("\n".join(plain(line) for line in self.text.lines))
        self.app.notify("copied")
