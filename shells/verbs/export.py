"""`export`: a whole table for other programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import IO, Any

import click
import msgspec

from manifold.shells.escapes import visible_json
from manifold.shells.namespace.tables import TABLES
from manifold.shells.verbs.common import connect, for_reader
from manifold.shells.verbs.output import STDOUT, Output


@click.command()
@click.argument("table", type=click.Choice(list(TABLES)))
@click.option("--csv", "form", flag_value="csv", help="CSV with a header (the default).")
@click.option("--json", "form", flag_value="json", help="A JSON array of objects.")
@click.option(
    "-o", "--output", metavar="FILE", default=STDOUT, show_default=False,
    help="Write FILE instead of standard output; .json decides for JSON.",
)  # fmt: skip
@click.pass_context
def export(context: click.Context, table: str, form: str | None, output: str) -> None:
    """Write a TABLE of the cluster, as CSV or JSON."""
    target = Output(output)
    with connect(context) as client:
        rows = TABLES[table].rows(client, lambda said: click.secho(said, fg="yellow", err=True))
    form = form or ("json" if output.endswith(".json") else "csv")
    text = io.StringIO(newline="")
    _write(text, form, TABLES[table].columns, rows)
    target.write(text.getvalue() if output != STDOUT else for_reader(text.getvalue()))


def _write(
    file: IO[Any], form: str, columns: Sequence[str], rows: Sequence[dict[str, Any]]
) -> None:
    if form == "json":
        text = msgspec.json.format(msgspec.json.encode(rows), indent=1).decode()
        file.write(visible_json(text) + "\n")
    else:
        write_csv(file, columns, rows)


def write_csv(file: IO[str], columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """A header and a line for each row: nothing for null, lists with blanks between."""
    file.write(_line(columns))
    for row in rows:
        file.write(_line([_cell(row, column) for column in columns]))


def _line(cells: Sequence[Any]) -> str:
    """Ends in a newline alone; the module quotes a carriage return only where it ends lines so."""
    line = io.StringIO(newline="")
    csv.writer(line, lineterminator="\r\n").writerow(cells)
    return line.getvalue().removesuffix("\r\n") + "\n"


def _cell(row: dict[str, Any], column: str) -> Any:
    value: Any = row
    for part in column.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, bool):
        return "true" if value else "false"
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else value
