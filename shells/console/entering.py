"""What happens when a line is entered at the prompt: builtins, verbs, pipes, the pager.

Interface: `Entering.enter` for a line, `interrupt` for Ctrl-C, `act` for what a key does. It
writes to what `Desk` says, so that it knows nothing of widgets. One line runs at a time.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Mapping, Sequence
from typing import Protocol

from manifold.kernel.errors import ManifoldError
from manifold.shells.cli.table import GROUPS, VERBS
from manifold.shells.console.runner import Runner, Running
from manifold.shells.console.terminal import Terminal
from manifold.shells.console.theme import Line, plain
from manifold.shells.pipeline import parse
from manifold.shells.verbs.filters import FILTERS

PAGERS = ("less", "more")
PANES = {
    "shell": "The prompt.", "nodes": "Nodes, live.", "map": "Nodes by what they are made of.",
    "log": "Every node's log.", "top": "The same as nodes.",
}  # fmt: skip
BUILTINS = {
    "help": "This list; `help VERB` is the same as `VERB --help`.",
    "history": "What was entered.", "clear": "An empty screen.",
    "theme": "dark or light.", "exit": "Leave the console.", "quit": "The same.",
} | PANES  # fmt: skip
# What a console that only looks may run; whatever is not named here is refused.
READING = frozenset({
    "status", "jobs", "ps", "why", "get", "ls", "cat", "tail", "watch", "logs", "export", "metrics",
    "trace", "version", "completion", "asm", "disasm", "sim", "record", "nexus status",
    "nexus verify", "node ls", "node inspect",
})  # fmt: skip


class Sink(Protocol):
    """Where a line's output goes."""

    def add(self, lines: Sequence[Line], tail: Line = ()) -> None: ...


class Desk(Protocol):
    """What the console offers to a line."""

    def print(self, lines: Sequence[Line], tail: Line = ()) -> None: ...
    def clear(self) -> None: ...
    def page(self, title: str, lines: Sequence[Line]) -> Sink: ...
    def echo(self, line: str) -> None: ...
    def builtin(self, words: Sequence[str]) -> None: ...
    def began(self) -> None: ...
    def ended(self, line: str, code: int, last: str) -> None: ...
    def size_of_output(self) -> tuple[int, int]: ...
    def refusal(self) -> str: ...


class _ToDesk:
    def __init__(self, desk: Desk) -> None:
        self.add = desk.print


class Entering:
    """See the module."""

    def __init__(
        self, desk: Desk, runner: Runner, cluster: str, *, read_only: bool = False
    ) -> None:
        self._desk = desk
        self._runner = runner
        self._cluster = cluster
        self._read_only = read_only
        self.running: Running | None = None
        self._waiting: list[tuple[str, bool]] = []
        self._interrupts = 0

    def enter(self, line: str) -> None:
        """Run a line, or give it to the one that runs."""
        if self.running is not None:
            self.running.write(line + "\n")
            return
        self._desk.echo(line)
        if line.strip():
            self._begin(line, quiet=False)

    def act(self, line: str, *, page: bool = False) -> None:
        """Run a line that a key stands for; behind the one that runs, if any."""
        line = f"{line} | less" if page else line
        if self.running is not None:
            self._waiting.append((line, True))
            return
        self._desk.echo(line)
        self._begin(line, quiet=True)

    def _begin(self, line: str, *, quiet: bool) -> None:
        try:
            stages = parse(line)
            if stages:
                self._dispatch(line, stages)
        except ManifoldError as error:
            self._fail(line, error.message, error.next_step, error.exit_code)

    def _dispatch(self, line: str, stages: list[list[str]]) -> None:
        paged = stages[-1][0] in PAGERS and len(stages) > 1
        if paged:
            stages.pop()
        words = stages[0]
        if len(stages) == 1 and words[0] in BUILTINS and not self._is_help_of_verb(words):
            if words[0] == "help":
                self._give(line, help_lines(), paged)
                return
            self._desk.builtin(words)
            return
        if self._is_help_of_verb(words):
            stages[0] = [*words[1:], "--help"]
        for at, stage in enumerate(stages):
            self._check(stage, first=at == 0)
        self._run(line, stages, paged)

    @staticmethod
    def _is_help_of_verb(words: Sequence[str]) -> bool:
        return words[0] == "help" and len(words) > 1 and words[1] in {**VERBS, **FILTERS}

    def _give(self, line: str, lines: Sequence[Line], paged: bool) -> None:
        if paged:
            self._desk.page(line, lines)
        else:
            self._desk.print(lines)

    def _check(self, stage: list[str], *, first: bool) -> None:
        """Refuse what is not there, or may not be done."""
        if self._desk.refusal():
            raise _Wrong(self._desk.refusal(), "")
        name = stage[0]
        if name == "manifold" and len(stage) > 1:
            del stage[0]  # as it is typed in a shell
            name = stage[0]
        if name in PAGERS:
            raise _Wrong(f"`{name}` comes last: LINE | {name}.", "")
        if name not in VERBS and not (name in FILTERS and not first):
            if name in FILTERS:
                raise _Wrong(f"`{name}` filters what comes before a `|`.", f"ls / | {name} …")
            near = difflib.get_close_matches(name, [*VERBS, *BUILTINS, *FILTERS], n=1, cutoff=0.5)
            hint = f"Did you mean `{near[0]}`?" if near else "`help` lists all."
            raise _Wrong(f"There is no verb {name!r}. {hint}", "")
        filters = name in FILTERS and not first
        if self._read_only and not filters and changes(stage):
            error = _Wrong(f"`{name}` changes something, and this console only looks.",
                           "Start it without --read-only.")  # fmt: skip
            error.exit_code = 4
            raise error

    def _fail(self, line: str, message: str, next_step: str, code: int) -> None:
        lines: list[Line] = [(("error: ", "bad"), (message, ""))]
        if next_step:
            lines.append((("  next: ", "dim"), (next_step, "")))
        self._desk.print(lines)
        self._desk.ended(line, code, message)

    # -- running ----------------------------------------------------------------------------------

    def _run(self, line: str, stages: list[list[str]], paged: bool) -> None:
        terminal = Terminal()
        sink: Sink = self._desk.page(line, ()) if paged else _ToDesk(self._desk)
        last = ""

        def on_text(text: str) -> None:
            nonlocal last
            lines = terminal.feed(text)
            if terminal.cleared:
                terminal.cleared = False
                if not paged:
                    self._desk.clear()
            for each in reversed(lines):
                if plain(each).strip():
                    last = plain(each).strip()
                    break
            sink.add(lines, terminal.current)

        def on_end(code: int) -> None:
            if terminal.current:
                sink.add([terminal.current])
            if code and not paged:
                self._desk.print([(("exit ", "faint"), (str(code), "warn"))])
            self.running = None
            self._desk.ended(line, code, last)
            if self._waiting and self.running is None:
                self.act(self._waiting.pop(0)[0])

        columns, rows = self._desk.size_of_output()
        self._interrupts = 0
        self.running = self._runner.begin(
            stages, on_text, on_end, columns=columns, rows=rows, environ=self._environ()
        )
        self._desk.began()

    def _environ(self) -> Mapping[str, str]:
        return {"MANIFOLD_CLUSTER": self._cluster, "MANIFOLD_CONSOLE": "1"}

    def interrupt(self) -> bool:
        """Ctrl-C; whether a line heard it. The third time it is killed."""
        if self.running is None:
            return False
        self._interrupts += 1
        if self._interrupts >= 3:
            self.running.kill()
        else:
            self.running.interrupt()
        return True

    def end_of_input(self) -> None:
        """Ctrl-D, for a line that reads."""
        if self.running is not None:
            self.running.write("\x04")


class _Wrong(ManifoldError):
    """The line cannot be run."""

    code = "usage"
    exit_code = 2


def changes(stage: Sequence[str]) -> bool:
    """Whether it changes anything in the cluster; asking for help never does."""
    if {"--help", "-h"} & set(stage):
        return False
    words = [word for word in stage if not word.startswith("-")]
    return stage[0] not in READING and " ".join(words[:2]) not in READING


def help_lines() -> list[Line]:
    """What there is to say, by groups."""
    lines: list[Line] = []
    for title, verbs in GROUPS.items():
        lines.append(((title, "head"),))
        lines += [_entry(name, says) for name, (_, says) in verbs.items()]
    lines.append((("filters, behind a |", "head"),))
    lines += [_entry(name, filter_.get_short_help_str(60)) for name, filter_ in FILTERS.items()]
    lines.append(_entry("less", "Read it in the pager."))
    lines.append((("console", "head"),))
    lines += [_entry(name, says) for name, says in BUILTINS.items()]
    return lines


def _entry(name: str, says: str) -> Line:
    return ((f"  {name:<11}", "accent"), (says, ""))


def quoted(*words: str) -> str:
    """A line of words."""
    return shlex.join(words)
