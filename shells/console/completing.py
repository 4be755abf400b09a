"""Completion at the prompt: verbs, their subcommands and options, and what their arguments name.

Interface: `Completer.complete(line)` says what the last word may become. Names of the cluster come
from the model, names in the cluster's namespace from a function that may be slow and is asked last.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click

from manifold.shells.cli.main import manifold
from manifold.shells.cli.table import VERBS

CANDIDATES_MAX = 200  # a menu that nobody reads to its end
NODE_WORDS = ("alias", "node", "nodes")
JOB_WORDS = ("job", "task", "jobs")


@dataclass(frozen=True, slots=True)
class Completion:
    """`candidates` for the text from `start` on."""

    start: int
    candidates: tuple[str, ...] = ()


@dataclass(slots=True)
class Completer:
    """What is known; the fields are replaced as it changes."""

    words: Callable[[], Sequence[str]] = tuple  # builtins of the console
    filters: dict[str, click.Command] = field(default_factory=dict)
    nodes: Callable[[], Iterable[str]] = tuple
    jobs: Callable[[], Iterable[str]] = tuple
    cluster: str = ""

    def complete(self, line: str) -> Completion:
        """What the last word of `line` may become, the likeliest first."""
        words, start, first_stage = _split(line)
        last = line[start:]
        if not words:
            known = [*VERBS, *self.words()] if first_stage else [*self.filters, "less", *VERBS]
            return _matching(start, last, known)
        command = self._command(words[0])
        if command is None:
            return Completion(start)
        command, rest = _descend(command, words[1:])
        if last.startswith("-"):
            return _matching(start, last, _options(command))
        if isinstance(command, click.Group):
            return _matching(start, last, command.list_commands(click.Context(command)))
        return self._argument(command, rest, start, last)

    def _command(self, name: str) -> click.Command | None:
        if name in self.filters and name not in VERBS:
            return self.filters[name]
        if name == "help":
            return click.Group("help", commands={n: click.Command(n) for n in VERBS})
        return manifold.get_command(click.Context(manifold), name) if name in VERBS else None

    def _argument(
        self, command: click.Command, rest: Sequence[str], start: int, last: str
    ) -> Completion:
        option = _pending_option(command, rest)
        if option is not None:
            return self._valued(option, start, last)
        arguments = [p for p in command.params if isinstance(p, click.Argument)]
        given = _positional(command, rest)
        if not arguments:
            return Completion(start)
        at = min(given, len(arguments) - 1)
        if given >= len(arguments) and arguments[-1].nargs != -1:
            return Completion(start)
        return self._valued(arguments[at], start, last)

    def _valued(self, parameter: click.Parameter, start: int, last: str) -> Completion:
        if isinstance(parameter.type, click.Choice):
            return _matching(start, last, [str(each) for each in parameter.type.choices])
        name = parameter.name or ""
        if name in NODE_WORDS:
            return _matching(start, last, self.nodes())
        if name in JOB_WORDS:
            return _matching(start, last, self.jobs())
        return _matching(start, last, [*self._asked(parameter, last), *files(last)])

    def _asked(self, parameter: click.Parameter, last: str) -> list[str]:
        """What the verb itself completes, as for a shell: it may ask the cluster."""
        root = click.Context(manifold, obj={"cluster": self.cluster})
        context = click.Context(click.Command("completion"), parent=root)
        return [item.value for item in parameter.shell_complete(context, last) if item.value]


def files(prefix: str) -> list[str]:
    """Names of files that begin so; folders end in a slash."""
    folder, slash, name = prefix.rpartition("/")
    try:
        with os.scandir(Path(folder or ("/" if slash else ".")).expanduser()) as entries:
            found = [
                folder + slash + entry.name + ("/" if entry.is_dir() else "")
                for entry in entries
                if entry.name.startswith(name) and (name or not entry.name.startswith("."))
            ]
    except OSError:  # no such folder: nothing to offer
        return []
    return sorted(found)


def common(candidates: Sequence[str]) -> str:
    """How they all begin."""
    first, last = min(candidates), max(candidates)
    at = 0
    while at < len(first) and first[at] == last[at]:
        at += 1
    return first[:at]


def _matching(start: int, last: str, known: Iterable[str]) -> Completion:
    found = dict.fromkeys(each for each in known if each.startswith(last))
    return Completion(start, tuple(found)[:CANDIDATES_MAX])


def _split(line: str) -> tuple[list[str], int, bool]:
    """The words before the last of the last stage, where the last begins, whether it is the first
    stage."""
    stage_start = 0
    quote = ""
    word_start = 0
    for at, character in enumerate(line):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character == "|":
            stage_start = word_start = at + 1
        elif character == " ":
            word_start = at + 1
    try:
        words = shlex.split(line[stage_start:word_start])
    except ValueError:  # a quote that is still open
        words = line[stage_start:word_start].split()
    return words, word_start, stage_start == 0


def _descend(command: click.Command, words: Sequence[str]) -> tuple[click.Command, list[str]]:
    rest = list(words)
    while isinstance(command, click.Group) and rest:
        inner = command.get_command(click.Context(command), rest[0])
        if inner is None:
            break
        command, rest = inner, rest[1:]
    return command, rest


def _options(command: click.Command) -> list[str]:
    found = [
        name
        for parameter in command.params
        if isinstance(parameter, click.Option) and not parameter.hidden
        for name in parameter.opts
        if name.startswith("--")
    ]
    return sorted([*found, "--help"])


def _pending_option(command: click.Command, words: Sequence[str]) -> click.Option | None:
    if not words or not words[-1].startswith("-"):
        return None
    for parameter in command.params:
        if isinstance(parameter, click.Option) and words[-1] in parameter.opts:
            return None if parameter.is_flag or parameter.count else parameter
    return None


def _positional(command: click.Command, words: Sequence[str]) -> int:
    count = 0
    skip = False
    for at, word in enumerate(words):
        if skip:
            skip = False
        elif word.startswith("-") and len(word) > 1:
            skip = _pending_option(command, words[: at + 1]) is not None
        else:
            count += 1
    return count
