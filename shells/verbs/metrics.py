"""`metrics`."""

from __future__ import annotations

import json
from typing import Any

import click

from manifold.kernel.messages import NodeInfo
from manifold.kernel.observe.messages import Metrics
from manifold.shells.verbs.common import cluster_name, connect, json_option
from manifold.shells.verbs.output import STDOUT, Output

ID_CHARACTERS = 10  # of a KID, as `manifold node ls` shows it: enough to tell nodes apart


@click.command()
@click.argument("node", default="")
@click.option("--targets", is_flag=True, help="Every node's address, for Prometheus to scrape.")
@click.option("--openmetrics", is_flag=True, help="As OpenMetrics 1.0.")
@click.option(
    "-o", "--output", default=STDOUT, metavar="FILE", help="Write FILE, all of it at once."
)
@json_option
@click.pass_context
def metrics(
    context: click.Context, node: str, targets: bool, openmetrics: bool, output: str, as_json: bool
) -> None:
    """The metrics of NODE (of the one we are attached to), as text for Prometheus.

    With --targets: the nodes themselves, as JSON for Prometheus's file_sd or http_sd.
    """
    if targets and (node or openmetrics):
        raise click.UsageError("--targets lists every node: it takes no NODE and no other format.")
    if as_json and openmetrics:
        raise click.UsageError("--json and --openmetrics are two formats: choose one.")
    target = Output(output)
    with connect(context) as client:
        if targets:
            nodes = client.nodes()
            found = scrape_targets(nodes, cluster_name(context))
            silent = [n.alias for n in nodes if not n.pid and n.state in ("ready", "suspect")]
            if silent:
                click.secho(f"no answer from {', '.join(silent)}", fg="yellow", err=True)
            if any(node.line for node in nodes):
                click.secho(
                    "the nodes are in network namespaces: only from within each is its address "
                    "reached; `manifold metrics NODE` goes by its door",
                    fg="yellow", err=True,
                )  # fmt: skip
            text = json.dumps(found, indent=None if as_json else 2) + "\n"
        elif as_json:
            text = json.dumps(as_dict(client.metrics(node, "families"))) + "\n"
        else:
            text = client.metrics(node, "openmetrics" if openmetrics else "text").text
    target.write(text)


def scrape_targets(nodes: tuple[NodeInfo, ...], cluster: str) -> list[dict[str, Any]]:
    """One target for each node that serves its metrics, with the labels of its series."""
    return [
        {
            "targets": [node.metrics],
            "labels": {
                "node": node.alias, "class": node.node_class, "kid": node.kid[:ID_CHARACTERS],
                "cluster": cluster,
            },
        }
        for node in nodes
        if node.metrics
    ]  # fmt: skip


def as_dict(found: Metrics) -> dict[str, Any]:
    """A node's metrics for `--json`: each sample by the name that queries use."""
    return {
        "node": found.alias,
        "id": found.kid,
        "address": found.address,
        "metrics": [
            {
                "name": family.name,
                "type": family.kind,
                "unit": family.unit,
                "help": family.help,
                "samples": [
                    {
                        "name": family.sample_name(sample),
                        "labels": dict(sample.labels),
                        "value": sample.value,
                    }
                    for sample in family.samples
                ],
            }
            for family in found.families
        ],
    }
