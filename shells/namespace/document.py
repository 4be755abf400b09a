"""Writes the tables of docs/namespace.md from the tables of the code, so that they cannot drift.

`python -m manifold.shells.namespace.document` prints them; a test compares them with the page.
"""

from __future__ import annotations

import sys

import click

from manifold.shells.namespace.table import ROWS
from manifold.shells.namespace.tables import TABLES
from manifold.shells.pipeline import parse
from manifold.shells.verbs.filters import FILTERS

# Each is parsed, and its filters have to be there.
EXAMPLES = (
    ("ls -l /jobs | grep running | wc -l", "how many jobs run"),
    ("cat /log | grep -i 'suspect|dead' | tail -n 5", "the last that were doubted"),
    ("cat /log | cut -f 1 | sort | uniq -c", "how many lines each node has"),
    ("tail -f /log | grep WARNING", "warnings as they come"),
)


def paths_text() -> str:
    """Every pattern of a path."""
    lines = ["| path | kind | what |", "|---|---|---|"]
    for row in ROWS:
        path = f"{row.pattern}/…" if row.mount is not None else row.pattern
        lines.append(f"| `{path}` | {row.kind} | {row.text} |")
    return "\n".join(lines) + "\n"


def tables_text() -> str:
    """What `export` writes."""
    lines = ["| table | columns |", "|---|---|"]
    lines += [f"| `{name}` | {' '.join(table.columns)} |" for name, table in TABLES.items()]
    return "\n".join(lines) + "\n"


def filters_text() -> str:
    """What may stand behind a `|` in the console."""
    lines = ["| filter | what |", "|---|---|"]
    for name, command in FILTERS.items():
        usage = " ".join((name, *map(_usage, command.params)))
        lines.append(f"| `{usage}` | {(command.help or '').splitlines()[0]} |")
    return "\n".join(lines) + "\n"


def _usage(parameter: click.Parameter) -> str:
    if isinstance(parameter, click.Argument):
        return parameter.human_readable_name
    assert isinstance(parameter, click.Option)
    value = "" if parameter.is_flag else " N"
    return parameter.opts[0] + value if parameter.required else f"[{parameter.opts[0]}{value}]"


def examples_text() -> str:
    """Lines for the console."""
    lines = []
    for line, what in EXAMPLES:
        _, *filters = parse(line)
        unknown = [words[0] for words in filters if words[0] not in FILTERS]
        assert not unknown, f"no filters: {unknown}"
        lines.append(f"    {line:<52}# {what}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write("\n".join((paths_text(), tables_text(), filters_text(), examples_text())))
