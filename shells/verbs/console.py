"""`console`, `top`, `record`, `replay`: the screens, and recordings of what they show."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from manifold.shells.verbs.common import Finite, cluster_name, json_option, print_json

PANES = ("shell", "nodes", "jobs", "map", "log")

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


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--seconds", type=Finite(0.1), help="So long; else until Ctrl-C.")
@click.option("--force", is_flag=True, help="Write over a file that is there.")
@json_option
@click.pass_context
def record(
    context: click.Context, file: Path, seconds: float | None, force: bool, as_json: bool
) -> int:
    """Record what happens in the cluster into FILE, for `replay`."""
    from manifold.shells.console.record import record as recorded

    def told(event: Any) -> None:
        if not as_json and hasattr(event, "why"):
            click.secho(f"{event.why} Recording goes on.", fg="yellow", err=True)

    name = cluster_name(context)
    if not as_json:
        click.echo(f"recording cluster {name!r} into {file}; Ctrl-C ends it", err=True)
    events = recorded(name, os.environ, file, seconds=seconds, force=force, told=told)
    if as_json:
        print_json({"file": str(file), "events": events})
    else:
        click.echo(f"{file}: {events:,} events")
    return 0


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--speed", type=Finite(0.01, 1000), default=1.0, show_default=True,
    help="How many times as fast as it was.",
)  # fmt: skip
@click.option("--pane", type=click.Choice(PANES), default="nodes", help="Which one to begin with.")
@theme_option
@json_option
def replay(file: Path, speed: float, pane: str, theme: str, as_json: bool) -> int:
    """Show a recording in the console; with --json tell what is in it."""
    from manifold.shells.console.recording import Player, read

    player = Player(*read(file), speed)
    if as_json:
        print_json({
            "cluster": player.header.cluster, "events": len(player.events),
            "begin_ms": player.begin_ms, "end_ms": player.end_ms,
        })  # fmt: skip
        return 0
    from manifold.shells.console.opening import need_terminal
    from manifold.shells.console.replaying import ReplayConsole

    need_terminal()
    app = ReplayConsole(player, pane=pane, theme=theme)
    code = app.run()
    return app.return_code or code or 0
