"""The prompt: a line with history, search through it, completion and a ghost of what comes."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, ClassVar

from textual import events, work
from textual.binding import Binding
from textual.message import Message
from textual.suggester import Suggester
from textual.widgets import Input

from manifold.shells.console.completing import Completer, Completion, common
from manifold.shells.console.history import History


class _Ghost(Suggester):
    def __init__(self, history: History) -> None:
        super().__init__(use_cache=False, case_sensitive=True)
        self._history = history

    async def get_suggestion(self, value: str) -> str | None:
        return self._history.suggest(value) or None


class Prompt(Input):
    """See the module. While a line runs, what is entered goes to it instead."""

    DEFAULT_CSS = """
    Prompt, Prompt:focus {
        border: none; padding: 0; height: 1; background: $background; width: 1fr;
        background-tint: transparent;
    }
    Prompt .input--suggestion { color: $faint; }
    """
    BINDINGS: ClassVar[list[Any]] = [
        Binding("up", "older"), Binding("down", "newer"), Binding("tab", "complete(1)"),
        Binding("shift+tab", "complete(-1)"), Binding("ctrl+r", "search"),
        Binding("ctrl+c", "interrupt", priority=True), Binding("ctrl+d", "end_of_input"),
        Binding("ctrl+l", "clear_screen"), Binding("escape", "leave"),
        Binding("pageup", "scroll(-1)"), Binding("pagedown", "scroll(1)"),
    ]  # fmt: skip

    @dataclass
    class Entered(Message):
        line: str

    @dataclass
    class Interrupted(Message):
        """Ctrl-C. `empty`: there was nothing on the line to take back."""

        empty: bool

    @dataclass
    class EndOfInput(Message):
        """Ctrl-D on an empty line."""

    @dataclass
    class ClearScreen(Message):
        """Ctrl-L."""

    @dataclass
    class Offered(Message):
        """What the last word may become, for a menu; none to take it away."""

        candidates: tuple[str, ...]
        at: int = -1

    @dataclass
    class Searching(Message):
        """Ctrl-R: what is looked for in the history; None when it is over."""

        text: str | None

    @dataclass
    class Scroll(Message):
        by: int

    @dataclass
    class NextPane(Message):
        """Tab on an empty line."""

        by: int

    def __init__(self, history: History, completer: Completer, *, id: str) -> None:
        super().__init__(id=id, suggester=_Ghost(history), select_on_focus=False, compact=True)
        self.history = history
        self.completer = completer
        self.passing = False  # a line runs: what is entered is for it
        self._typed = ""  # what Up was pressed on
        self._offered: Completion | None = None
        self._offered_at = -1
        self._search: str | None = None
        self._search_at: int | None = None
        self._own = ""  # what we put there ourselves

    # -- entering ---------------------------------------------------------------------------------

    async def action_submit(self) -> None:
        line = self.value
        self._end_search()
        self._withdraw()
        if self.passing:
            self.put("")
            self.post_message(self.Entered(line))
            return
        self.history.add(line)
        self._typed = ""
        self.put("")
        self.post_message(self.Entered(line))

    def put(self, text: str) -> None:
        """Replace the line; the cursor goes to its end."""
        self._withdraw()
        self._own = text
        self.value = text
        self.cursor_position = len(text)

    def on_input_changed(self, event: Input.Changed) -> None:
        event.stop()
        if event.value != self._own:
            self._typed = event.value
            self.history.reset()
            self._withdraw()
        self._own = event.value

    def action_interrupt(self) -> None:
        if self.selected_text:
            self.app.copy_to_clipboard(self.selected_text)
            return
        self._end_search()
        self._withdraw()
        empty = not self.value
        if not self.passing:
            self.put("")
        self.post_message(self.Interrupted(empty))

    def action_end_of_input(self) -> None:
        if self.value:
            self.action_delete_right()
        else:
            self.post_message(self.EndOfInput())

    def action_clear_screen(self) -> None:
        self.post_message(self.ClearScreen())

    def action_scroll(self, by: int) -> None:
        self.post_message(self.Scroll(by))

    def action_leave(self) -> None:
        """Take away the menu, or the search, or what was typed."""
        if self._search is not None:
            self._end_search()
        elif self._offered is not None:
            self._withdraw()
        else:
            self.put("")

    # -- history ----------------------------------------------------------------------------------

    def action_older(self) -> None:
        if self._offered is not None:
            self.action_complete(-1)
            return
        found = self.history.older(self.value, self._typed)
        if found is not None:
            self.put(found)

    def action_newer(self) -> None:
        if self._offered is not None:
            self.action_complete(1)
            return
        found = self.history.newer(self.value, self._typed)
        if found is not None:
            self.put(found)

    def action_search(self) -> None:
        """Ctrl-R: search; again: the one before."""
        if self._search is None:
            self._search, self._search_at = "", None
            self.post_message(self.Searching(""))
        else:
            self._search_again(self._search_at)

    def _search_again(self, before: int | None) -> None:
        assert self._search is not None
        found = self.history.search(self._search, before) if self._search else None
        if found is not None:
            self._search_at = found[0]
            self.put(found[1])
        self.post_message(self.Searching(self._search))

    def _end_search(self) -> None:
        if self._search is not None:
            self._search = None
            self.post_message(self.Searching(None))

    async def _on_key(self, event: events.Key) -> None:
        if self._search is not None:
            if event.key == "backspace":
                self._search = self._search[:-1]
            elif event.is_printable and event.character:
                self._search += event.character
            elif event.key not in ("ctrl+r", "enter", "escape", "ctrl+c"):
                self._end_search()
                await super()._on_key(event)
                return
            else:
                await super()._on_key(event)
                return
            event.stop()
            event.prevent_default()
            self._search_again(None)
            return
        await super()._on_key(event)

    # -- completion -------------------------------------------------------------------------------

    def action_complete(self, by: int) -> None:
        if not self.value.strip():
            self.post_message(self.NextPane(by))
        elif self._offered is not None:
            self._walk(by)
        else:
            self._ask(self.value[: self.cursor_position])

    @work(exclusive=True)
    async def _ask(self, line: str) -> None:
        found = await asyncio.to_thread(self.completer.complete, line)
        if line != self.value[: self.cursor_position]:
            return  # it was typed on meanwhile
        if not found.candidates:
            self.app.bell()
            return
        begin = common(found.candidates)
        rest = self.value[self.cursor_position :]
        if len(found.candidates) == 1:
            only = found.candidates[0]
            self._replace(found.start, only + ("" if only.endswith(("/", "=")) else " "), rest)
            return
        if len(begin) > len(line) - found.start:
            self._replace(found.start, begin, rest)
        self._offered, self._offered_at = found, -1
        self.post_message(self.Offered(found.candidates))

    def _walk(self, by: int) -> None:
        assert self._offered is not None
        count = len(self._offered.candidates)
        at = self._offered_at + by
        self._offered_at = at % count if self._offered_at >= 0 or by > 0 else count - 1
        self._replace(self._offered.start, self._offered.candidates[self._offered_at], "")
        self.post_message(self.Offered(self._offered.candidates, self._offered_at))

    def _replace(self, start: int, text: str, rest: str) -> None:
        self._own = self.value[:start] + text + rest
        self.value = self._own
        self.cursor_position = start + len(text)

    def _withdraw(self) -> None:
        if self._offered is not None:
            self._offered = None
            self.post_message(self.Offered(()))
