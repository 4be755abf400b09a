"""`node`: what nodes there are (`ls`, `inspect`), and those that change them, on this machine.

The changing ones ask the supervisor of the cluster, at its control socket.
"""

from __future__ import annotations

import os
import sys

import click

from manifold.shells.verbs import completing
from manifold.shells.verbs.cluster import node_inspect, node_label, node_ls
from manifold.shells.verbs.common import (
    Finite,
    cluster_name,
    json_option,
    label_option,
    print_json,
)
from manifold.tools.emulator import messages as m

SLOW_MIN = 0.01  # as in changes.py


@click.group()
def node() -> None:
    """Nodes of the cluster: who is there, and who comes and goes."""


node.add_command(node_ls)
node.add_command(node_inspect)
node.add_command(node_label)

force_option = click.option(
    "--force", is_flag=True, help="Also where then nothing can be agreed any more."
)


def _ask(context: click.Context, request: m.Request) -> m.Changed:
    from manifold.tools.emulator.control import ask  # `node ls` does not need it

    return ask(cluster_name(context), os.environ, request)


def _tell(done: m.Changed, what: str, as_json: bool) -> None:
    if as_json:
        print_json({"nodes": done.nodes, "aliases": done.aliases})
    else:
        click.echo(what)


def _some(aliases: tuple[str, ...]) -> str:
    """All of a few names; of many how many, and the ends."""
    if len(aliases) <= 8:
        return ", ".join(aliases)
    return f"{len(aliases)} nodes, {aliases[0]} to {aliases[-1]},"


@node.command("add")
@click.argument("kind", metavar="[CLASS]", required=False, default="")
@click.option("--count", type=click.IntRange(1, 4096), default=1, show_default=True)
@label_option
@json_option
@click.pass_context
def add(
    context: click.Context, kind: str, count: int, labels: tuple[str, ...], as_json: bool
) -> None:
    """Add nodes of CLASS (of manifold.yaml; the first one if none), and wait until they are there.

    Their names are new: one that was given out is not given out again while the cluster is up.
    """
    done = _ask(context, m.AddNodes(kind, count, labels))
    verb = "is" if len(done.aliases) == 1 else "are"
    _tell(done, f"{_some(done.aliases)} {verb} there: {done.nodes} nodes now", as_json)


@node.command("remove")
@click.argument(
    "aliases", nargs=-1, required=True, metavar="ALIAS…", shell_complete=completing.aliases
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option(
    "--timeout",
    "timeout_s",
    type=Finite(0.0, m.SETTLE_S_MAX, min_open=True),
    default=m.SETTLE_S,
    show_default=True,
    help="Seconds to go on trying that others vote in their place.",
)
@force_option
@json_option
@click.pass_context
def remove(
    context: click.Context,
    aliases: tuple[str, ...],
    yes: bool,
    timeout_s: float,
    force: bool,
    as_json: bool,
) -> None:
    """Let nodes leave well: what they compute, own and vote on is handed over first."""
    if not yes and sys.stdin.isatty() and not as_json:
        click.confirm(f"Remove {_some(aliases)} from {cluster_name(context)!r}?", abort=True)
    done = _ask(context, m.RemoveNodes(aliases, force, timeout_s))
    verb = "has" if len(done.aliases) == 1 else "have"
    left = f"{done.nodes} node{'s' * (done.nodes != 1)} now"
    _tell(done, f"{_some(done.aliases)} {verb} left: {left}", as_json)


@node.command("kill")
@click.argument("alias", shell_complete=completing.aliases)
@click.option("--stay-down", is_flag=True, help="It is not started again until `node start`.")
@force_option
@json_option
@click.pass_context
def kill(context: click.Context, alias: str, stay_down: bool, force: bool, as_json: bool) -> None:
    """Kill a node's process, as a power cut would; it is started again at once."""
    done = _ask(context, m.KillNode(alias, stay_down, force))
    then = "stays down until `manifold node start`" if stay_down else "is started again"
    _tell(done, f"{alias} was killed, and {then}", as_json)


@node.command("start")
@click.argument("alias", shell_complete=completing.aliases)
@json_option
@click.pass_context
def start(context: click.Context, alias: str, as_json: bool) -> None:
    """Start a node again that was to stay down."""
    _tell(_ask(context, m.StartNode(alias)), f"{alias} is started", as_json)


@node.command("pause")
@click.argument("alias", shell_complete=completing.aliases)
@force_option
@json_option
@click.pass_context
def pause(context: click.Context, alias: str, force: bool, as_json: bool) -> None:
    """Stop a node's process where it stands: the others will hold it for dead."""
    _tell(_ask(context, m.PauseNode(alias, force)), f"{alias} is paused", as_json)


@node.command("resume")
@click.argument("alias", shell_complete=completing.aliases)
@json_option
@click.pass_context
def resume(context: click.Context, alias: str, as_json: bool) -> None:
    """Let a paused node go on."""
    _tell(_ask(context, m.ResumeNode(alias)), f"{alias} goes on", as_json)


@node.command("slow")
@click.argument("alias", shell_complete=completing.aliases)
@click.option(
    "--to", type=Finite(SLOW_MIN, 1.0), required=True, metavar="PART",
    help="Of the compute share of its class, from 0.01 on; 1 undoes it.",
)  # fmt: skip
@json_option
@click.pass_context
def slow(context: click.Context, alias: str, to: float, as_json: bool) -> None:
    """Let a node compute at a part of its speed: of the share of a core that its class has."""
    what = "computes at its own speed" if to == 1 else f"computes at {to:g} of its speed"
    _tell(_ask(context, m.SlowNode(alias, to)), f"{alias} {what}", as_json)
