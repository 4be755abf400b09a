"""`logs`."""

from __future__ import annotations

import heapq
import threading
from typing import Any

import click

from manifold.kernel.errors import ManifoldError
from manifold.shells.verbs.common import connect, json_option, print_json

FOLLOW_S = 0.3


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Go on as lines come.")
@click.option("--node", "node", default="", help="Of this node only.")
@click.option("--grep", "contains", default="", metavar="TEXT", help="Lines that contain TEXT.")
@click.option("-n", "--lines", "count", type=click.IntRange(1, 100_000), default=200)
@json_option
@click.pass_context
def logs(
    context: click.Context, follow: bool, node: str, contains: str, count: int, as_json: bool
) -> None:
    """Logs of every node, merged in order of time."""
    with connect(context) as client:
        aliases = [node] if node else [n.alias for n in client.nodes() if n.state == "ready"]
        after: dict[str, int] = {}
        entries = _gather(client, aliases, after, contains)
        _print(entries[-count:], as_json)
        quiet = threading.Event()  # never set: it is how to wait and still hear Ctrl-C
        while follow:
            quiet.wait(FOLLOW_S)
            _print(_gather(client, aliases, after, contains), as_json)


def _gather(
    client: Any, aliases: list[str], after: dict[str, int], contains: str
) -> list[tuple[str, str]]:
    streams = []
    for alias in aliases:
        try:
            answer = client.log(alias, after.get(alias, 0), contains)
        except ManifoldError as error:
            if len(aliases) == 1 and alias not in after:
                raise  # it was asked for by name
            if alias not in after:
                click.secho(f"{alias}: {error.message}", fg="yellow", err=True)
                after[alias] = 0
            continue
        first = alias not in after or after[alias] == 0
        if first or answer.next != after[alias]:
            streams.append([(line, alias) for line in answer.lines])
        after[alias] = answer.next
    # Lines start with their time, so merging what is ordered orders everything; a line that
    # continues another starts with blanks and must stay behind it.
    return [(alias, line) for line, alias in heapq.merge(*streams, key=_time)]


def _time(entry: tuple[str, str]) -> str:
    return entry[0][:24]


def _print(entries: list[tuple[str, str]], as_json: bool) -> None:
    for alias, line in entries:
        if as_json:
            print_json({"node": alias, "line": line})
        else:
            click.echo(f"{alias:12} {line}")
