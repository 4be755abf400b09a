"""`status`, and what `node` shows: `ls` and `inspect`."""

from __future__ import annotations

import json

import click

from manifold.kernel import labels
from manifold.kernel import messages as m
from manifold.kernel.errors import ConfigError
from manifold.shells.escapes import visible_text
from manifold.shells.namespace.tables import node_dict
from manifold.shells.verbs import completing
from manifold.shells.verbs.common import (
    cluster_name,
    connect,
    human_bytes,
    human_ms,
    json_option,
    print_json,
    print_table,
)


@click.command()
@json_option
@click.pass_context
def status(context: click.Context, as_json: bool) -> None:
    """How the cluster is: nodes, workers, jobs."""
    with connect(context) as client:
        nodes = client.nodes()
        jobs = client.jobs().jobs
    states = [node.state for node in nodes]
    running = [job for job in jobs if job.state == "running"]
    found = {
        "cluster": cluster_name(context),
        "nodes": len(nodes),
        "ready": states.count("ready"),
        "suspect": states.count("suspect"),
        "dead": states.count("dead"),
        "slots": sum(node.cores for node in nodes if node.state == "ready"),
        "workers": sum(len(node.workers) for node in nodes),
        "jobs_running": len(running),
        "jobs_known": len(jobs),
        "converged": all(n.alive == states.count("ready") for n in nodes if n.state == "ready"),
        "uptime_ms": max((node.uptime_ms for node in nodes), default=0.0),
        "network": "namespaces" if any(node.line for node in nodes) else "host",
    }
    if as_json:
        print_json(found)
        return
    converged = "converged" if found["converged"] else "not converged"
    uptime = human_ms(max((n.uptime_ms for n in nodes), default=0.0))
    ready = f"{found['ready']} of {found['nodes']} nodes ready"
    click.echo(f"cluster {found['cluster']}: {ready}, {converged}, up {uptime}")
    click.echo(f"workers: {found['workers']} processes for {found['slots']} slots")
    if found["network"] == "namespaces":
        click.echo("network: each node in a namespace of its own, joined by TCP")
    click.echo(f"jobs: {found['jobs_running']} running, {found['jobs_known']} known")
    lost = [node.alias for node in nodes if node.state in ("suspect", "dead")]
    if lost:
        click.secho(f"not well: {', '.join(lost)}", fg="yellow")


@click.command("ls")
@json_option
@click.pass_context
def node_ls(context: click.Context, as_json: bool) -> None:
    """Every node that is known, with its class, state and load."""
    with connect(context) as client:
        nodes = client.nodes()
    if as_json:
        print_json([node_dict(each) for each in nodes])
        return
    # Columns that are only wide where there is nothing in them.
    labels = ["labels"] if any(node.labels for node in nodes) else []
    lines = ["line"] if any(node.line for node in nodes) else []
    print_table(
        ["alias", "id", "class", "state", "pid", "slots", "busy", "core", "memory", "sees", "up",
         *labels, *lines],
        [
            (
                n.alias, n.kid[:10], n.node_class, n.state, n.pid or None, n.cores,
                n.load.slots - n.load.free_slots if n.load else None, n.compute,
                human_bytes(n.memory_bytes), n.alive or None,
                human_ms(n.uptime_ms) if n.pid else None,
                *([",".join(n.labels)] if labels else []), *([n.line or None] if lines else []),
            )
            for n in nodes
        ],
    )  # fmt: skip


@click.command("inspect")
@click.argument("alias", shell_complete=completing.aliases)
@json_option
@click.pass_context
def node_inspect(context: click.Context, alias: str, as_json: bool) -> None:
    """What a node says of itself, and what the host it runs on is."""
    with connect(context) as client:
        found = node_dict(client.ask(m.GetNode(), alias))
        found["host"] = json.loads(client.ask(m.GetInventory(), alias).json)
    if as_json:
        print_json(found)
        return
    for name, value in found.items():
        if not isinstance(value, dict):
            click.echo(visible_text(f"{name + ':':14}{value}"))
            continue
        click.echo(f"{name}:")
        for inner, each in value.items():
            click.echo(visible_text(f"  {inner + ':':18}{each}"))


@click.command("label")
@click.argument("alias", shell_complete=completing.aliases)
@click.argument("changes", nargs=-1, metavar="[KEY=VALUE | KEY | KEY-]…")
@json_option
@click.pass_context
def node_label(context: click.Context, alias: str, changes: tuple[str, ...], as_json: bool) -> None:
    """Give a running node labels, or take them away (KEY-); without any, print what it has.

    It keeps them when it starts again. What runs or waits there goes on.
    """
    taken = [each for each in changes if each.endswith("-") and "=" not in each]
    given = [each for each in changes if each not in taken]
    try:
        keys = [labels.check(each[:-1]) for each in taken]
        wish = m.SetLabels(labels.read(given), tuple(dict.fromkeys(keys))[: labels.LABELS_MAX])
    except ConfigError as refusal:
        raise click.BadParameter(str(refusal)) from None
    with connect(context) as client:
        info = client.ask(wish if changes else m.GetNode(), alias)
    if as_json:
        print_json({"alias": info.alias, "labels": list(info.labels)})
    else:
        click.echo(visible_text(f"{info.alias}: {', '.join(info.labels) or 'no labels'}"))
