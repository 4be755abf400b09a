"""`logs`."""

from __future__ import annotations

import sys

import click

from manifold.kernel import messages as m
from manifold.shells.namespace.following import Follower
from manifold.shells.namespace.logs import Logs
from manifold.shells.verbs import completing
from manifold.shells.verbs.common import connect, json_option, print_json
from manifold.shells.verbs.pipes import Reader


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Go on as lines come.")
@click.option(
    "--node", "node", default="", help="Of this node only.", shell_complete=completing.aliases
)
@click.option("--grep", "contains", default="", metavar="TEXT", help="Lines that contain TEXT.")
@click.option("-n", "--lines", "count", type=click.IntRange(1, 100_000), default=200)
@json_option
@click.pass_context
def logs(
    context: click.Context, follow: bool, node: str, contains: str, count: int, as_json: bool
) -> None:
    """Logs of every node, merged in order of time."""
    with connect(context) as client, Reader() as reader:
        source = Logs(
            client, node, contains=contains, lines=min(count, m.LOG_LINES_MAX), warn=_warn
        )
        stop = reader if follow else _Once()
        for entry, line in Follower(client, stop).log(source, count, alone=False):
            if as_json:
                print_json(entry)
            else:
                click.echo(line)
            if follow:
                sys.stdout.flush()


def _warn(sentence: str) -> None:
    click.secho(sentence, fg="yellow", err=True)


class _Once:
    """Follow what is there, and nothing more."""

    def wait(self, timeout: float) -> bool:
        return True
