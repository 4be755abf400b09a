"""The console: puts panes, prompt, feed and runner together; all else is in their own files.

Interface: `Console(cluster, …).run()`; `replaying.py` has the one that plays a recording. The model
is changed on the app's own loop only.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from textual import events, on
from textual.app import App, ComposeResult
from textual.binding import Binding
from textual.message import Message
from textual.screen import ModalScreen
from textual.widgets import ContentSwitcher

from manifold.kernel import places
from manifold.shells.console import messages as e
from manifold.shells.console.boot import Boot, changed
from manifold.shells.console.completing import Completer
from manifold.shells.console.dialogs import Confirm, Help
from manifold.shells.console.entering import BUILTINS, Entering, quoted
from manifold.shells.console.feed import Feed, clock_ms
from manifold.shells.console.history import NAME, History
from manifold.shells.console.model import Model, Observation
from manifold.shells.console.pager import Pager
from manifold.shells.console.palette import Actions
from manifold.shells.console.panes.jobs import JobsPane
from manifold.shells.console.panes.log import LogPane
from manifold.shells.console.panes.map import MapPane
from manifold.shells.console.panes.nodes import NodesPane
from manifold.shells.console.panes.shell import ShellPane
from manifold.shells.console.prompt import Prompt
from manifold.shells.console.ribbon import Part, Ribbon
from manifold.shells.console.runner import Runner
from manifold.shells.console.status import banner, keys_of, status_bar
from manifold.shells.console.theme import PALETTES, Line, Look, textual_theme
from manifold.shells.verbs.filters import FILTERS
from manifold.vm.version import VERSION

PANES = ("shell", "nodes", "jobs", "map", "log")
TICK_S = 1.0  # ages and uptimes are of whole seconds


@dataclass
class Fed(Message):
    """Something was seen of the cluster."""

    seen: Observation | e.Event


class Console(App[int]):
    """See the module."""

    TITLE = "manifold"
    CSS = """
    ContentSwitcher { height: 1fr; }
    #banner { display: none; }
    CommandPalette SearchIcon { display: none; }
    #banner.-shown { display: block; }
    """
    ENABLE_COMMAND_PALETTE = True
    COMMANDS: ClassVar[set[Any]] = {Actions}
    BINDINGS: ClassVar[list[Any]] = [
        # First of all widgets: what is typed behind it has to reach the pane that it opens.
        *(Binding(f"f{n + 2},alt+{n + 1}", f"pane('{p}')", priority=True)
          for n, p in enumerate(PANES)),
        *(Binding(f"{n + 1}", f"pane('{p}')") for n, p in enumerate(PANES)),
        Binding("tab", "turn(1)"), Binding("shift+tab", "turn(-1)"),
        Binding("f1,question_mark", "help"), Binding("colon", "pane('shell')"),
        Binding("ctrl+q", "quit", priority=True), Binding("q", "pane('shell')"),
        Binding("ctrl+t", "theme"), Binding("ctrl+c", "copy_or_interrupt", priority=False),
    ]  # fmt: skip

    def __init__(
        self,
        cluster: str,
        environ: Mapping[str, str] | None = None,
        *,
        read_only: bool = False,
        pane: str = "shell",
        theme: str = "dark",
    ) -> None:
        self._environ_of = dict(os.environ if environ is None else environ)
        plain = "NO_COLOR" in self._environ_of
        super().__init__(ansi_color=True if plain else None)
        self.look = Look(None if plain else PALETTES[theme])
        for palette in PALETTES.values():
            self.register_theme(textual_theme(palette))
        self.theme = f"manifold-{theme}"
        self.cluster = cluster
        self.read_only = read_only
        self.model = Model()
        self.runner = Runner(self._environ_of)
        self.entering = Entering(self, self.runner, cluster, read_only=read_only)
        self.feed: Feed | None = None
        self._boot = self.boot()
        self._told = ""  # what the last line that a key stood for has said
        self._pager: Pager | None = None
        self.history = History(self._history_path())
        self.completer = Completer(
            words=lambda: tuple(BUILTINS), filters=FILTERS,
            nodes=lambda: sorted(node.alias for node in self.model.nodes.values()),
            jobs=lambda: list(reversed(self.model.jobs)), cluster=cluster,
        )  # fmt: skip

        # Kept by name: what is shown is told to them also while the screen is built or taken down.
        self.bar, self.banner, self.keys = Ribbon(id="bar"), Ribbon(id="banner"), Ribbon(id="keys")
        self.switcher = ContentSwitcher(initial=pane)
        self.shell = ShellPane(self.history, self.completer)
        self.nodes = NodesPane("nodes", lambda: self.model, self.now_ms)
        self.jobs = JobsPane("jobs", lambda: self.model, self.now_ms)
        self.map = MapPane(lambda: self.model, self.now_ms)
        self.log_pane = LogPane(lambda: self.model, cluster, self._environ_of)
        self.panes: dict[str, ShellPane | NodesPane | JobsPane | MapPane | LogPane] = {
            "shell": self.shell, "nodes": self.nodes, "jobs": self.jobs, "map": self.map,
            "log": self.log_pane,
        }  # fmt: skip

    def boot(self) -> Boot:
        """What the boot messages begin with."""
        return Boot(VERSION, f"Python {platform.python_version()}, {platform.machine()}")

    def _history_path(self) -> Path:
        return places.state_home(self._environ_of) / NAME

    # -- life -------------------------------------------------------------------------------------

    def compose(self) -> ComposeResult:
        yield self.bar
        yield self.banner
        with self.switcher:
            yield self.shell
            yield self.nodes
            yield self.jobs
            yield self.map
            yield self.log_pane
        yield self.keys

    def on_mount(self) -> None:
        self.runner.start()
        self.shell.label(self._label())
        self.shell.print(self._boot.first())
        if self.history.trouble:
            self.shell.print([((self.history.trouble, "warn"),)])
        self.start_source()
        self.set_interval(TICK_S, self.tick)
        self.call_after_refresh(self._begin)

    def _begin(self) -> None:
        """The first pane, or the one that a fast key has asked for meanwhile, has the keys."""
        self.action_pane(self.pane)

    def start_source(self) -> None:
        """Begin to look at the cluster."""
        self.feed = Feed(self.cluster, self._environ_of, self._deliver)
        self.feed.start()

    def _deliver(self, seen: Observation | e.Event) -> None:
        self.post_message(Fed(seen))

    async def on_unmount(self) -> None:
        import asyncio

        self.runner.close()
        if self.feed is not None:
            await asyncio.to_thread(self.feed.stop)

    def now_ms(self) -> int:
        """The clock of what is shown."""
        return clock_ms()

    # -- learning ---------------------------------------------------------------------------------

    @on(Fed)
    def fed(self, event: Fed) -> None:
        """Learn what the feed saw, and show it."""
        if isinstance(event.seen, Observation):
            before = Model(nodes=dict(self.model.nodes), looked_ms=self.model.looked_ms)
            self.learnt(self.model.observe(event.seen, self.now_ms()), before)
        else:
            self.model.apply(event.seen)
            self.learnt([event.seen], self.model)

    def learnt(self, learnt: Sequence[e.Event], before: Model) -> None:
        """Say what an operator wants to be told of, and repaint what is seen."""
        lines = [line for line in (changed(before, each) for each in learnt) if line is not None]
        lines += self._boot.lines(self.model, self.now_ms())
        if lines:
            self.shell.print(lines)
        for each in learnt:
            if isinstance(each, e.Logged):
                self.log_pane.logged(each.lines)
        if not isinstance(learnt[-1], e.Logged):
            self.tick()

    def tick(self) -> None:
        """Repaint what has changed; time alone changes ages."""
        if not self.is_running or not self.screen_stack:
            return
        width = self.size.width
        self.bar.show(*status_bar(self.model, self.pane, width, read_only=self.read_only))
        self.show_banner()
        shown = self.panes[self.pane]
        if isinstance(shown, ShellPane):
            shown.fit()
        else:
            shown.update_rows()
        self.show_keys()

    def show_banner(self) -> None:
        warning = self.banner_line()
        self.banner.set_class(bool(warning), "-shown")
        self.banner.show([(warning, "")] if warning else [])

    def banner_line(self) -> Line:
        """What stands above everything; nothing where all is well."""
        return banner(self.model, self.now_ms())

    def show_keys(self) -> None:
        self.keys.show(*self.key_parts())

    def key_parts(self) -> tuple[list[Part], list[Part]]:
        """The keys, and the verb that the last one ran."""
        return keys_of(
            self.pane, self._told, busy=self.entering.running is not None,
            opened=self._opened(), read_only=self.read_only,
        )  # fmt: skip

    def refusal(self) -> str:
        """Why no verb can be run here; empty where they can."""
        return ""

    def _opened(self) -> bool:
        shown = self.panes[self.pane]
        return isinstance(shown, NodesPane | JobsPane) and shown.opened

    # -- panes ------------------------------------------------------------------------------------

    @property
    def pane(self) -> str:
        """The name of the one that is shown."""
        return self.switcher.current or "shell"

    def action_pane(self, name: str) -> None:
        """Show a pane; what lies above it is closed."""
        if isinstance(self.screen, ModalScreen) and len(self.screen_stack) > 1:
            self.screen.dismiss()
        self.switcher.current = name
        self.panes[name].focus_pane()
        self._want_logs()
        self.call_after_refresh(self.tick)

    def action_turn(self, by: int) -> None:
        """The next pane."""
        self.action_pane(PANES[(PANES.index(self.pane) + by) % len(PANES)])

    def _want_logs(self) -> None:
        if self.feed is not None:
            self.feed.want_logs(self.pane == "log" or self._opened())

    @on(NodesPane.Turned)
    def _turned(self) -> None:
        self._want_logs()
        self.tick()

    def on_resize(self, event: events.Resize) -> None:
        if self.entering.running is not None:
            self.entering.running.resize(*self.size_of_output())
        self.call_after_refresh(self.tick)

    def action_help(self) -> None:
        self.push_screen(Help(self.pane))

    def action_theme(self) -> None:
        """Dark, light."""
        now = self.look.palette
        if now is not None:
            self.set_palette("light" if now.dark else "dark")

    def set_palette(self, name: str) -> None:
        self.look = Look(PALETTES[name])
        self.theme = f"manifold-{name}"
        self.shell.label(self._label())
        for screen in self.screen_stack:
            for widget in screen.walk_children():
                widget.refresh()

    # -- the prompt (the `Desk` of entering.py) ---------------------------------------------------

    def _label(self) -> list[tuple[str, str]]:
        mark = " (looks only)" if self.read_only else ""
        return [(self.cluster, "accent bold"), (mark, "dim"), (" ❯ ", "dim")]

    def print(self, lines: Sequence[Line], tail: Line = ()) -> None:
        self.shell.print(lines, tail)

    def clear(self) -> None:
        self.shell.clear()

    def echo(self, line: str) -> None:
        self.shell.print([(*self._label(), (line, "bold"))])

    def page(self, title: str, lines: Sequence[Line]) -> Pager:
        self._pager = Pager(title.rpartition("|")[0].strip() or title, lines)
        self.push_screen(self._pager, self._paged)
        return self._pager

    def _paged(self, _: None) -> None:
        self._pager = None
        self.entering.interrupt()  # nobody reads what still runs
        self.tick()

    def size_of_output(self) -> tuple[int, int]:
        return max(20, self.size.width - 1), max(4, self.size.height - 4)

    def began(self) -> None:
        self.shell.label([])
        self.shell.prompt.passing = True
        self._told = ""
        self.show_keys()

    def ended(self, line: str, code: int, last: str) -> None:
        self.shell.prompt.passing = False
        self.shell.label(self._label())
        self._told = f"$ {line}" + (f" → {last}" if last and self.pane != "shell" else "")
        if self._pager is not None:
            self._pager.running = False
            self._pager.tell()
        if self.feed is not None:
            self.feed.poke()
        self.show_keys()

    def builtin(self, words: Sequence[str]) -> None:
        """Those that are the console's own."""
        match words[0]:
            case "exit" | "quit":
                self.exit(0)
            case "clear":
                self.clear()
            case "history":
                count = len(self.history.entries)
                self.print([
                    ((f"{number:>5}  ", "faint"), (entry, ""))
                    for number, entry in enumerate(self.history.entries[-500:], max(1, count - 499))
                ])  # fmt: skip
            case "theme":
                wanted = words[1] if len(words) > 1 else ""
                if self.look.palette is None:
                    self.print([(("NO_COLOR is set: there are no colours.", "dim"),)])
                elif wanted in PALETTES:
                    self.set_palette(wanted)
                else:
                    self.print([(("usage: ", "dim"), (f"theme {'|'.join(PALETTES)}", ""))])
            case "top":
                self.action_pane("nodes")
            case pane:
                self.action_pane(pane)

    @on(Prompt.Entered)
    def _entered(self, event: Prompt.Entered) -> None:
        self.entering.enter(event.line)

    @on(Prompt.Interrupted)
    def _interrupted(self, event: Prompt.Interrupted) -> None:
        if not self.entering.interrupt() and event.empty:
            self.shell.print([(*self._label(), ("^C", "faint"))])

    @on(Prompt.EndOfInput)
    def _end_of_input(self) -> None:
        if self.entering.running is not None:
            self.entering.end_of_input()
        else:
            self.exit(0)

    @on(Prompt.ClearScreen)
    def _clear_screen(self) -> None:
        self.clear()

    @on(Prompt.NextPane)
    def _next_pane(self, event: Prompt.NextPane) -> None:
        self.action_turn(event.by)

    @on(Prompt.Searching)
    def _searching(self, event: Prompt.Searching) -> None:
        if event.text is None:
            self.shell.label(self._label())
        else:
            self.shell.label([("search ", "dim"), (event.text, "warn bold"), (" ❯ ", "dim")])

    def action_copy_or_interrupt(self) -> None:
        """Copy what is selected, else Ctrl-C to what runs."""
        if self.screen.get_selected_text():
            self.screen.action_copy_text()
        elif not self.entering.interrupt():
            self.notify("ctrl+q leaves the console")

    # -- what keys do to what is chosen -----------------------------------------------------------

    def _node(self) -> str:
        node = self.model.nodes.get(self.nodes.table.chosen)
        return node.alias if node is not None else ""

    def _job(self) -> str:
        found: str = self.jobs.table.chosen
        return found

    def chosen_node(self) -> str:
        """For the palette."""
        return self._node()

    def chosen_job(self) -> str:
        return self._job()

    def put_on_prompt(self, text: str) -> None:
        """Begin a line, for somebody to go on."""
        self.action_pane("shell")
        self.shell.prompt.put(text)

    def action_inspect(self) -> None:
        if self._node():
            self.entering.act(quoted("node", "inspect", self._node()), page=True)

    def action_node_ps(self) -> None:
        if self._node():
            self.entering.act(f"{quoted('ps')} | {quoted('grep', self._node())}", page=True)

    def action_node_log(self) -> None:
        if self._node():
            self.log_pane.only(self._node())
            self.action_pane("log")

    def action_why(self) -> None:
        if self._job():
            self.entering.act(quoted("why", self._job()), page=True)

    def action_kill(self) -> None:
        """Ask, then cancel the chosen job."""
        job = self._job()
        if not job:
            return
        line = quoted("kill", job)
        if self.read_only:
            self.entering.act(line)  # it is refused, and says why
            return

        def answered(yes: bool | None) -> None:
            if yes:
                self.entering.act(line)

        self.push_screen(Confirm(f"Cancel {job}?", line), answered)

    @on(MapPane.Opened)
    def _map_opened(self, event: MapPane.Opened) -> None:
        self.action_pane("nodes")
        nodes = self.nodes
        nodes.table.choose(event.kid)
        nodes.table.action_open()
