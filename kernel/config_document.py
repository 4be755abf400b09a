"""Writes the configuration's own documents from the metadata, so that they cannot drift.

Interface: `yaml_text(config)` is a whole manifold.yaml with a comment on every key; `table_text`
is the table of docs/configuration.md. `python -m manifold.kernel.config_document` prints the
first, `… --table` the second; a test compares both with the files.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from manifold.kernel import config_loader as loader
from manifold.kernel import config_units as units
from manifold.kernel import labels
from manifold.kernel.config import SCHEMA, Config, LinkRow, NodeClass

HEADER = """\
# The default cluster: 16 emulated nodes in 4 classes. Every key is here with its default; a file
# of your own needs only the keys that differ. Each comment reads: default; range: what it is.
#
# Times (us ms s min h d), sizes (B KiB MiB GiB TiB) and rates (bit/s kbit/s Mbit/s Gbit/s Tbit/s)
# carry their unit; counts, weights and shares are plain numbers. A variable or a flag overrides
# a key: MANIFOLD_SCHEDULER_GRAIN=10ms, or scheduler.grain=10ms. See docs/configuration.md.
"""
CLASSES_HEADER = """\
# Kinds of machines. The emulator enforces these figures, those of the network where `links.classes`
# is on; a board measures its own. A file that has `classes` has exactly the classes it names.
"""


def yaml_text(config: Config) -> str:
    """`config` as a documented manifold.yaml that loads to an equal `Config`."""
    lines = [HEADER, *_keys(loader.keys_of(Config).values(), config, ""), ""]
    lines += [CLASSES_HEADER + _class_comments(), "classes:"]
    lines += [_class_line(each) for each in config.classes]
    for name, table in SCHEMA.sections.items():
        lines += ["", f"# {_first_line(table)}", f"{name}:"]
        lines += _keys(loader.keys_of(table).values(), getattr(config, name), "  ")
        for section, key in SCHEMA.lists:
            lines += _list(section, key, config) if section == name else ()
    return "\n".join(lines) + "\n"


def table_text() -> str:
    """Every key as a Markdown table."""
    lines = ["| key | unit | default | range | what |", "|---|---|---|---|---|"]
    for path in loader.paths(SCHEMA, {"classes": ["NAME"], "links.rules": ["N"]}):
        table = {1: Config, 2: SCHEMA.sections.get(path[0]), 3: NodeClass, 4: LinkRow}[len(path)]
        assert table is not None, path
        key = loader.keys_of(table)[path[-1]]
        cells = [
            f"`{'.'.join(path)}`",
            units.unit_name(key.unit),
            units.show(key.default, key.unit) or "none",
            loader.allowed(key),
            key.doc,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def comment_of(key: loader.Key) -> str:
    """Default, range and meaning of a key, as the comment behind it says."""
    default = units.show(key.default, key.unit) or "none"
    unit = f" {key.unit}" if key.unit and key.unit not in units.SCALES else ""
    return f"{default}{unit}; {loader.allowed(key)}: {key.doc}"


def _keys(keys: Iterable[loader.Key], table: Any, indent: str) -> Iterator[str]:
    for key in keys:
        value = f"{indent}{key.name}: {units.show(getattr(table, key.field), key.unit)}"
        yield f"{value:<26}# {comment_of(key)}"


def _list(section: str, key: str, config: Config) -> Iterator[str]:
    """A list of rows, its keys in comments before it."""
    keys = loader.keys_of(SCHEMA.lists[section, key])
    yield "  # Each rule is a line of its own, in braces behind a dash, with the keys it needs:"
    yield from (f"  #   {each.name:<11}{comment_of(each)}" for each in keys.values())
    yield "  # such as  - {between: [rpi4, server], latency: 10ms, rate: 10Mbit/s, loss: 0.01}"
    rows = getattr(getattr(config, section), key)
    yield f"  {key}:{'' if rows else ' []'}"
    for row in rows:
        texts = {
            name: "[{}, {}]".format(*map(_quoted, str(value).split())) if each.pair else value
            for name, each in keys.items()
            if (value := getattr(row, each.field)) != each.default
        }
        shown = ", ".join(
            f"{name}: {text if keys[name].pair else _quoted(units.show(text, keys[name].unit))}"
            for name, text in texts.items()
        )
        yield f"    - {{{shown}}}"


def _quoted(text: str) -> str:
    """As it stands in braces: a comma or a star means something else there."""
    return f'"{text}"' if set(text) & set(",*") else text


def _class_comments() -> str:
    keys = [key for name, key in loader.keys_of(NodeClass).items() if name != "name"]
    return "\n".join(f"#   {key.name:<11}{comment_of(key)}" for key in keys)


def _class_line(row: NodeClass) -> str:
    figures = ", ".join(
        f"{name}: {_figure(row, key)}"
        for name, key in loader.keys_of(NodeClass).items()
        if name != "name"
    )
    return f"  {row.name}: {{{figures}}}"


def _figure(row: NodeClass, key: loader.Key) -> str:
    if key.layout:
        return labels.show_layout(labels.read_layout(getattr(row, key.field)))
    return units.show(getattr(row, key.field), key.unit)


def _first_line(table: type) -> str:
    return (table.__doc__ or "").strip().splitlines()[0]


if __name__ == "__main__":
    sys.stdout.write(table_text() if "--table" in sys.argv[1:] else yaml_text(Config()))
