"""`console`, `top`, `record`, `replay`: the screens, and recordings of what they show."""

from __future__ import annotations

from typing import Any

import click

from manifold.shells.verbs.common import cluster_name

PANES = ("shell", "nodes", "jobs", "map", "log")
F = Any

read_only_option = click.option("--read-only", is_flag=True, help="Refuse what changes anything.")
theme_option = click.option(
    "--theme", type=click.Choice(["dark", "light"]), default="dark", show_default=True,
    help="$NO_COLOR takes colours away.",
)  # fmt: skip


@click.command()
@click.option("--pane", type=click.Choice(PANES), default="shell", help="Which one to begin with.")
@read_only_option
@theme_option
@click.pass_context
def console(context: click.Context, pane: str, read_only: bool, theme: str) -> int:
    """The console: every verb at a prompt, and live panes."""
    return _open(context, pane, read_only, theme)


@click.command()
@read_only_option
@theme_option
@click.pass_context
def top(context: click.Context, read_only: bool, theme: str) -> int:
    """The console, on the nodes."""
    return _open(context, "nodes", read_only, theme)


def _open(context: click.Context, pane: str, read_only: bool, theme: str) -> int:
    from manifold.shells.console.app import Console
    from manifold.shells.console.opening import need_terminal

    need_terminal()
    app = Console(cluster_name(context), read_only=read_only, pane=pane, theme=theme)
    code = app.run()
    return app.return_code or code or 0
