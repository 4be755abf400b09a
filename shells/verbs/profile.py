"""`profile`."""

from __future__ import annotations

from typing import Any

import click

from manifold.kernel.observe.messages import (
    PROFILE_HZ_MAX,
    PROFILE_S_MAX,
    PROFILE_S_MIN,
    Profile,
)
from manifold.shells.verbs.common import Finite, connect, json_option, print_json, print_table
from manifold.shells.verbs.output import STDOUT, Output

TOP = 10  # functions in the table


@click.command()
@click.argument("node")
@click.option(
    "--seconds", type=Finite(PROFILE_S_MIN, PROFILE_S_MAX), default=10.0,
    show_default=True, help="How long to look.",
)  # fmt: skip
@click.option(
    "--hz", type=click.IntRange(1, PROFILE_HZ_MAX), default=100, show_default=True,
    help="How often in a second.",
)  # fmt: skip
@click.option("-o", "--output", default=None, metavar="FILE", help="Instead of NODE-profile.svg.")
@click.option("--folded", is_flag=True, help="Print folded stacks, for other tools.")
@json_option
@click.pass_context
def profile(
    context: click.Context,
    node: str,
    seconds: float,
    hz: int,
    output: str | None,
    folded: bool,
    as_json: bool,
) -> None:
    """A flame graph of NODE's kernel, taken while it goes on serving.

    The graph is one SVG file, for any browser. Programs are not in it: they run in worker
    processes; `manifold ps` shows those.
    """
    if folded and as_json:
        raise click.UsageError("--json and --folded are two formats: choose one.")
    if output == STDOUT and (folded or as_json):
        raise click.UsageError("Standard output is taken: name a FILE with -o.")
    drawn = output is not None or not (folded or as_json)
    if drawn:
        Output(output if output is not None else _default(node))  # refused before it is worth it
    with connect(context) as client:
        if not (folded or as_json):
            click.echo(f"looking at {node} for {seconds:g} s", err=True)
        found = client.profile(node, seconds, hz)
    name = output if output is not None else _default(found.alias)
    if drawn:
        Output(name).write(svg(found))
    if as_json:
        print_json(as_dict(found))
    elif folded:
        for stack in found.stacks:
            click.echo(f"{stack.frames} {stack.count}")
    elif output != STDOUT:
        _say(found, name)


def _default(node: str) -> str:
    """The file of a node, in this folder whatever the node is called."""
    return f"{node.replace('/', '_')}-profile.svg"


def _stacks(found: Profile) -> list[tuple[str, int]]:
    return [(stack.frames, stack.count) for stack in found.stacks]


def _used(found: Profile) -> str:
    return f"{100 * found.cpu_s / found.seconds:.1f} % of a core" if found.seconds else "nothing"


def svg(found: Profile) -> str:
    """The flame graph of a profile."""
    from manifold.shells.verbs.flame import busy, flame_graph

    drawn = busy(_stacks(found))
    count = sum(each for _, each in drawn)
    note = (
        f"{count:,} of {found.samples:,} samples in {found.seconds:.1f} s; else it waited. "
        f"The process used {_used(found)}."
    )
    return flame_graph(f"{found.alias}: what the node's kernel did", note, drawn, found.samples)


def as_dict(found: Profile) -> dict[str, Any]:
    """A profile for `--json`."""
    return {
        "node": found.alias,
        "id": found.kid,
        "seconds": found.seconds,
        "samples": found.samples,
        "cpu_s": found.cpu_s,
        "truncated": found.truncated,
        "stacks": [{"frames": s.frames.split(";"), "count": s.count} for s in found.stacks],
    }


def _say(found: Profile, path: str) -> None:
    from manifold.shells.verbs.flame import busy, hot

    rows = [
        (f"{100 * inner:.1f}", f"{100 * whole:.1f}", name)
        for name, inner, whole in hot(busy(_stacks(found)), found.samples)[:TOP]
    ]
    if rows:
        print_table(["self %", "total %", "function"], rows)
    else:
        click.echo("it did nothing but wait whenever it was looked at")
    click.echo(
        f"{found.samples:,} samples in {found.seconds:.1f} s, of which it used {_used(found)}"
    )
    if found.truncated:
        click.secho(f"{found.truncated} samples had one stack too many", fg="yellow", err=True)
    click.echo(f"flame graph: {path}")
