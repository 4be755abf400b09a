"""A stage of a line: a verb of the command line, or a filter; run in a process of its own."""

from __future__ import annotations

import click

from manifold.shells.cli.main import run
from manifold.shells.cli.table import VERBS
from manifold.shells.escapes import visible_text
from manifold.shells.verbs.filters import FILTERS

# What opens a screen of its own, and has none to open here.
OUTSIDE = {
    "console": "This is the console.",
    "top": "The key 2, or the pane `nodes`, shows the same.",
    "replay": "Leave with `exit`, then run it from your shell.",
    "web": "Leave with `exit`, then run it from your shell.",
}


def run_stage(arguments: list[str], first: bool = True) -> int:
    """Run it; its exit code. Behind a `|` a filter goes before the verb of the same name."""
    name = arguments[0]
    if name in OUTSIDE:
        click.echo(f"error: `{name}` makes no sense in the console. {OUTSIDE[name]}", err=True)
        return 2
    if name in FILTERS and not (first and name in VERBS):
        return run_filter(FILTERS[name], arguments)
    return run(arguments)


def run_filter(command: click.Command, arguments: list[str]) -> int:
    """As `run`, for a command that the table of verbs does not have."""
    try:
        result = command.main(args=arguments[1:], prog_name=arguments[0], standalone_mode=False)
    except click.ClickException as error:
        if isinstance(error, click.UsageError) and error.ctx is not None:
            click.echo(error.ctx.get_usage(), err=True)
        click.echo(visible_text(f"error: {error.format_message()}"), err=True)
        return 2
    return result if isinstance(result, int) else 0
