"""Two small screens: a question before what cannot be undone, and the keys."""

from __future__ import annotations

from typing import Any, ClassVar

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.screen import ModalScreen

from manifold.shells.console.panes.shell import Lines
from manifold.shells.console.ribbon import Ribbon
from manifold.shells.console.theme import Line

KEYS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("everywhere", (
        ("F2 … F6", "shell, nodes, jobs, map, log; also Alt-1 … Alt-5"),
        ("Tab, ⇧Tab", "the next pane, the one before"),
        ("^P", "the palette: everything by name"), ("^T", "dark, light"),
        ("^C", "copy what is selected; stop what runs"), ("^Q", "leave"),
    )),
    ("at the prompt", (
        ("Tab", "complete; again: walk through the menu"), ("→", "take the grey suggestion"),
        ("↑ ↓", "history with the same beginning"), ("^R", "search in it"),
        ("^L  PgUp", "clear; scroll what was printed"), ("LINE | less", "the pager"),
    )),
    ("in a pane", (
        ("⏎  esc", "open the page of the row; close it"), ("/", "filter; in the pager find"),
        ("⇧letter", "sort by the column with that letter; r turns it round"),
        ("i  l  p", "inspect, log, processes of a node"), ("w  x", "why and kill a job"),
        ("f  PgUp", "log: follow; older lines, as far back as the disk has them"),
        ("y", "copy what is shown"),
    )),
)  # fmt: skip


class Confirm(ModalScreen[bool]):
    """Asks; `y` alone is yes."""

    DEFAULT_CSS = """
    Confirm { align: center bottom; background: $background 60%; }
    Confirm > Vertical {
        width: 100%; max-width: 72; height: auto; background: $panel; border: round $warning;
        padding: 0 1; margin: 0 0 1 0;
    }
    """
    BINDINGS: ClassVar[list[Any]] = [
        Binding("y", "answer(True)"), Binding("n,escape,q,enter,ctrl+c", "answer(False)"),
    ]  # fmt: skip

    def __init__(self, question: str, line: str) -> None:
        super().__init__()
        self._question = question
        self._line = line

    def compose(self) -> ComposeResult:
        with Vertical():
            yield Lines(id="question")
            yield Ribbon(id="answers")

    def on_mount(self) -> None:
        self.query_one("#question", Lines).show([
            ((self._question, "bold"),), (("runs ", "dim"), (f"$ {self._line}", "accent")),
        ])  # fmt: skip
        self.query_one("#answers", Ribbon).show([
            ((("y", "key"), (" yes   ", "dim")), "screen.answer(True)"),
            ((("n", "key"), (" no", "dim")), "screen.answer(False)"),
        ])  # fmt: skip

    def action_answer(self, yes: bool) -> None:
        self.dismiss(yes)


class Help(ModalScreen[None]):
    """The keys; any key closes it."""

    DEFAULT_CSS = """
    Help { align: center middle; background: $background 60%; }
    Help > Vertical {
        width: 76; max-width: 100%; height: auto; max-height: 100%; background: $panel;
        padding: 0 1; overflow-y: auto;
    }
    """
    BINDINGS: ClassVar[list[Any]] = [Binding("escape,q,enter,question_mark,f1,ctrl+c", "leave")]

    def __init__(self, pane: str) -> None:
        super().__init__()
        self._pane = pane

    def compose(self) -> ComposeResult:
        with Vertical():
            yield Lines(id="help-keys")

    def on_mount(self) -> None:
        lines: list[Line] = []
        for title, keys in KEYS:
            lines.append(((title, "head"),))
            lines += [((f"  {key:<12}", "accent"), (says, "")) for key, says in keys]
        self.query_one("#help-keys", Lines).show(lines)

    def action_leave(self) -> None:
        self.dismiss()

    def on_click(self, event: Any) -> None:
        self.dismiss()
