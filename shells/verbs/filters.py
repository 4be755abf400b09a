"""Filters for the console's pipes: `grep`, `head`, `tail`, `sort`, `uniq`, `wc`, `cut`.

The console has no shell around it; a shell has filters of its own, so these are no verbs of the
command line. Interface: each in `FILTERS` is a click command that reads lines from `sys.stdin` and
writes lines to `sys.stdout` as soon as they are known, so that they filter what is followed. Each
keeps at most the lines it has to: `KEPT_LINES_MAX`. A field is what blanks separate, from 1.
"""

from __future__ import annotations

import re
import sys
from collections import deque
from collections.abc import Iterator
from typing import Any

import click

from manifold.kernel.errors import Exhausted

KEPT_LINES_MAX = 1_000_000  # of `sort`: 100 MB of lines of 100 characters
TAKEN_LINES_MAX = 100_000  # of `head` and `tail`
NUMBER = re.compile(r"\s*([+-]?(?:[0-9][0-9,]*\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)")

taken = click.option(
    "-n", "count", type=click.IntRange(0, TAKEN_LINES_MAX), default=10, show_default=True,
    help="Lines.",
)  # fmt: skip


def _lines() -> Iterator[str]:
    """Without their ends."""
    for line in sys.stdin:
        yield line.removesuffix("\n")


def _put(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


@click.command()
@click.option("-i", "any_case", is_flag=True, help="Upper and lower case are the same.")
@click.option("-v", "inverted", is_flag=True, help="Lines that do not match.")
@click.option("-c", "counted", is_flag=True, help="Only how many there are.")
@click.argument("pattern")
def grep(pattern: str, any_case: bool, inverted: bool, counted: bool) -> None:
    """Lines in which PATTERN, a regular expression, is found."""
    try:
        expression = re.compile(pattern, re.IGNORECASE if any_case else 0)
    except re.error as error:
        raise click.BadParameter(
            f"{pattern!r} is no regular expression: {error}. A \\ makes the next character plain."
        ) from None
    found = 0
    for line in _lines():
        if (expression.search(line) is None) is inverted:
            found += 1
            if not counted:
                _put(line)
    if counted:
        _put(str(found))


@click.command()
@taken
def head(count: int) -> None:
    """The first lines."""
    if count == 0:
        return
    for number, line in enumerate(_lines(), 1):
        _put(line)
        if number == count:
            return  # what comes is not waited for


@click.command()
@taken
def tail(count: int) -> None:
    """The last lines, once there are no more."""
    for line in deque(_lines(), maxlen=count):
        _put(line)


class _Fields(click.ParamType[tuple[int, ...]]):
    """`2` or `1,3`."""

    name = "N"

    def convert(self, value: Any, parameter: Any, context: Any) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        if not all(part.isascii() and part.isdigit() and 0 < int(part) < 10_000 for part in parts):
            self.fail(f"{value!r} is no field: they are counted from 1, such as 2 or 1,3.")
        return tuple(map(int, parts))


def _field(line: str, number: int) -> str:
    fields = line.split()
    return fields[number - 1] if number <= len(fields) else ""


def _number(text: str) -> float:
    """What it begins with; text that begins with no number comes first, as in other `sort`s."""
    match = NUMBER.match(text)
    return float(match[1].replace(",", "")) if match else float("-inf")


@click.command()
@click.option("-n", "numeric", is_flag=True, help="By the numbers that they begin with.")
@click.option("-r", "reverse", is_flag=True, help="The last one first.")
@click.option("-k", "field", type=click.IntRange(1, 9999), default=None, help="By this field.")
def sort(numeric: bool, reverse: bool, field: int | None) -> None:
    """Lines in order, once there are no more. Equal ones stay as they were."""
    kept: list[str] = []
    for line in _lines():
        if len(kept) == KEPT_LINES_MAX:
            raise Exhausted(
                f"sort keeps at most {KEPT_LINES_MAX:,} lines.", "Put `grep` or `head` before it."
            )
        kept.append(line)

    def key(line: str) -> Any:
        text = line if field is None else _field(line, field)
        return _number(text) if numeric else text

    for line in sorted(kept, key=key, reverse=reverse):
        _put(line)


@click.command()
@click.option("-c", "counted", is_flag=True, help="With how often each came.")
def uniq(counted: bool) -> None:
    """Of equal lines that follow each other, one."""
    before: str | None = None
    count = 0
    for line in _lines():
        if line == before:
            count += 1
            continue
        if counted and before is not None:
            _put(f"{count:7} {before}")
        if not counted:
            _put(line)
        before, count = line, 1
    if counted and before is not None:
        _put(f"{count:7} {before}")


@click.command()
@click.option("-l", "lines_only", is_flag=True, help="Lines alone.")
def wc(lines_only: bool) -> None:
    """How many lines, words and characters there are."""
    lines = words = characters = 0
    for line in _lines():
        lines += 1
        words += len(line.split())
        characters += len(line) + 1
    _put(str(lines) if lines_only else f"{lines} {words} {characters}")


@click.command()
@click.option("-f", "fields", type=_Fields(), required=True, metavar="N", help="Such as 2 or 1,3.")
def cut(fields: tuple[int, ...]) -> None:
    """These fields of each line, with a blank between them; nothing where there is none."""
    for line in _lines():
        _put(" ".join(_field(line, number) for number in fields))


FILTERS: dict[str, click.Command] = {
    "grep": grep, "head": head, "tail": tail, "sort": sort, "uniq": uniq, "wc": wc, "cut": cut,
}  # fmt: skip
