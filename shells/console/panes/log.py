"""The log pane: every node's log in order of time; follows, filters, scrolls back without end."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.widgets import Input

from manifold.shells.console.backlog import Backlog
from manifold.shells.console.model import Model
from manifold.shells.console.ribbon import Ribbon
from manifold.shells.console.tables import log_line
from manifold.shells.console.theme import plain
from manifold.shells.console.view import LINES_MAX, TextView

OLDER_LINES = 2_000  # read at a time when it is scrolled to the top


class LogPane(Vertical):
    """See the module. Memory holds `LINES_MAX` lines; further ones are read when scrolled to."""

    DEFAULT_CSS = """
    LogPane { background: $background; }
    LogPane TextView { height: 1fr; }
    LogPane #log-filter {
        display: none; height: 1; border: none; padding: 0 1; background: $panel;
    }
    LogPane #log-filter.-shown { display: block; }
    LogPane #log-state { background: $background; }
    """
    BINDINGS: ClassVar[list[Any]] = [
        Binding("slash", "filter"), Binding("escape", "back"), Binding("f,G", "follow"),
        Binding("b", "older"), Binding("space", "newer"), Binding("g", "top"),
        Binding("y", "copy"), Binding("w", "wrap"),
    ]  # fmt: skip

    def __init__(
        self, model: Callable[[], Model], cluster: str, environ: Mapping[str, str]
    ) -> None:
        super().__init__(id="log")
        self._model = model
        self._cluster = cluster
        self._environ = environ
        self._entries: deque[tuple[str, str]] = deque(maxlen=LINES_MAX)
        self._shown_until: tuple[str, str] | None = None
        self._backlog: Backlog | None = None
        self._exhausted = False
        self._filter = ""
        self.node = ""
        self.text = TextView(id="log-text", wrap=False)
        self.field = Input(id="log-filter", placeholder="lines with", compact=True)
        self._state = Ribbon(id="log-state", on_ground=True)

    def compose(self) -> ComposeResult:
        yield self._state
        yield self.text
        yield self.field

    def focus_pane(self) -> None:
        self.screen.set_focus(self.text)

    # -- lines ------------------------------------------------------------------------------------

    def logged(self, entries: tuple[tuple[str, str], ...]) -> None:
        """New lines have come."""
        self._entries.extend(entries)
        shown = [log_line(*entry) for entry in entries if self._wanted(entry)]
        if shown and not self._paused:
            self.text.add(shown)
        self.update_rows()

    @property
    def _paused(self) -> bool:
        """Scrolled back so far that the newest lines had to go."""
        return self._backlog is not None and len(self.text.lines) >= LINES_MAX

    def _wanted(self, entry: tuple[str, str]) -> bool:
        alias, line = entry
        return (not self.node or alias == self.node) and (
            not self._filter or self._filter in f"{alias} {line}".lower()
        )

    def rebuild(self) -> None:
        """Everything anew: the filter is another, or it goes back to the newest."""
        self._backlog, self._exhausted = None, False
        self.text.follow = True
        self.text.show([log_line(*entry) for entry in self._entries if self._wanted(entry)])
        self.update_rows()

    def update_rows(self) -> None:
        """What stands above the lines."""
        state = "following" if self.text.follow else "held: f follows again"
        style = "ok" if self.text.follow else "warn"
        what = self.node or "every node"
        about = f"  {what}" + (f"  with {self._filter!r}" if self._filter else "")
        count = len(self.text.lines)
        right = (f"{count:,} lines" if count else "no line yet") + (
            ", from the first" if self._exhausted else ""
        )
        self._state.show(
            [(((f" {state}", style), (about, "dim")), "")], [(((f"{right} ", "faint"),), "")]
        )

    @work(exclusive=True)
    async def _older(self) -> None:
        if self._exhausted:
            return
        if self._backlog is None:
            oldest = next((line[:24] for _, line in self._entries if line[23:24] == "Z"), "")
            shown = frozenset(each for each in self._entries if each[1][:24] == oldest)
            self._backlog = Backlog(self._cluster, self._environ, oldest, shown)
        found = await asyncio.to_thread(self._backlog.older, OLDER_LINES)
        if not found:
            self._exhausted = True
        wanted = [log_line(*entry) for entry in found if self._wanted(entry)]
        if wanted:
            self.text.prepend(wanted)
        self.update_rows()
        if found and not wanted:
            self._older()

    # -- keys -------------------------------------------------------------------------------------

    @on(TextView.Scrolled)
    def _scrolled(self, event: TextView.Scrolled) -> None:
        """By whatever key or wheel; at the top older lines are read."""
        event.stop()
        if event.view.scroll_offset.y <= 0 and not event.view.follow:
            self._older()
        self.update_rows()

    def action_older(self) -> None:
        self.text.action_page_up()

    def action_newer(self) -> None:
        self.text.action_page_down()

    def action_top(self) -> None:
        self.text.action_scroll_home()

    def action_follow(self) -> None:
        self.rebuild()

    def action_filter(self) -> None:
        self.field.add_class("-shown")
        self.field.focus()

    @on(Input.Changed)
    def _filtered(self, event: Input.Changed) -> None:
        event.stop()
        self._filter = event.value.lower()
        self.rebuild()

    @on(Input.Submitted)
    def _filter_done(self, event: Input.Submitted) -> None:
        event.stop()
        event.input.set_class(bool(event.value), "-shown")
        self.text.focus()

    def only(self, alias: str) -> None:
        """The log of one node, or (empty) of all."""
        self.node = alias
        self.rebuild()

    def action_back(self) -> None:
        field = self.field
        if field.has_class("-shown"):
            field.remove_class("-shown")
            field.value = ""
            self.text.focus()
        elif self.node:
            self.only("")
        else:
            self.app.call_later(self.app.run_action, "pane('shell')")

    def action_wrap(self) -> None:
        self.text.wrap = not self.text.wrap
        self.text.show(self.text.lines, keep=True)

    def action_copy(self) -> None:
        self.app.copy_to_clipboard("\n".join(plain(line) for line in self.text.lines))
        self.app.notify("copied")
