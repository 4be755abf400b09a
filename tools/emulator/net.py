"""`net`: links between nodes while the cluster runs: slow, lossy, cut, whole again."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click
import msgspec

from manifold.kernel import config_units as units
from manifold.kernel import messages as m
from manifold.kernel import places
from manifold.kernel.config_loader import nearest
from manifold.kernel.errors import NoCluster
from manifold.kernel.hyperbus.rules import (
    LATENCY_MS_MAX,
    RATE_BPS_MAX,
    LabelsOf,
    LinkRule,
    class_of,
    has,
    unlabelled,
)
from manifold.shells.sdk.connection import doors
from manifold.shells.verbs import completing
from manifold.shells.verbs.common import (
    cluster_name,
    connect,
    json_option,
    print_json,
    print_table,
)
from manifold.tools.emulator import orders
from manifold.tools.emulator.orders import Rules

F = TypeVar("F", bound=Callable[..., Any])


class Amount(click.ParamType[float]):
    """A number with its unit, from 0 to `most`, in the base unit."""

    def __init__(self, unit: str, most: float) -> None:
        self.unit = unit
        self.most = most
        self.name = units.unit_name(unit)

    def convert(self, value: Any, parameter: Any, context: Any) -> float:
        if isinstance(value, float):
            return value
        try:
            found = float(units.parse(value, "float", self.unit))
        except units.WrongValue as wrong:
            self.fail(f"it {wrong}.", parameter, context)
        if not 0 <= found <= self.most:
            most = units.show(self.most, self.unit)
            self.fail(f"it is {value}; it must be at most {most}, and not below 0.", parameter)
        return found


class Share(click.ParamType[float]):
    """`2%` or `0.02`."""

    name = "share"

    def convert(self, value: Any, parameter: Any, context: Any) -> float:
        if isinstance(value, float):
            return value
        percent = value.endswith("%")
        try:
            number = float(units.parse(value.removesuffix("%"), "float", ""))
        except units.WrongValue:
            self.fail(f"{value!r} is no share; write 2% or 0.02.", parameter, context)
        found = number / 100 if percent else number
        if not 0 <= found <= 1:
            self.fail(f"{value!r} is not from 0% to 100%; write 2% or 0.02.", parameter, context)
        return found


def sides(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Aliases, also after a comma."""
    before, comma, word = incomplete.rpartition(",")
    return [f"{before}{comma}{each}" for each in completing.aliases(context, parameter, word)]


def side(name: str, **how: Any) -> Callable[[F], F]:
    """An argument that names nodes."""
    return click.argument(name, shell_complete=sides, **how)


one_way_option = click.option("--one-way", is_flag=True, help="Only what the first sends.")


class Cluster:
    """The cluster of a command line, its nodes, and what was ordered in it."""

    def __init__(self, context: click.Context, as_json: bool) -> None:
        self.name = cluster_name(context)
        self._context = context
        self._as_json = as_json
        self.runtime = places.runtime_path(self.name, os.environ)
        found = [address.rpartition("/")[2] for address in doors(self.name, os.environ)]
        if not found:
            raise NoCluster(
                f"Cluster {self.name!r} is not running here.",
                "Start it with `manifold up`, or name another with --cluster.",
            )
        self.aliases = found
        self._labels: dict[str, tuple[str, ...]] = {}  # known once a label was named

    def labels_of(self, alias: str) -> tuple[str, ...]:
        return self._labels.get(alias, ())

    def check(self, *named: str) -> None:
        """Refuse what names no node of the cluster."""
        unknown = self._unknown(named)
        if unknown:  # perhaps one that is down, or a label
            self._look()
            unknown = self._unknown(named)
        if unknown:
            known = sorted(self._known() - {"*"})
            near = nearest(unknown[0], known) or "`manifold node ls` lists them."
            what = "label of any node" if "=" in unknown[0] else "node and no class"
            raise click.UsageError(
                f"{unknown[0][:60]!r} is no {what} of cluster {self.name!r}. {near}"
            )

    def _look(self) -> None:
        """Ask the cluster for all its nodes, and their labels."""
        with connect(self._context) as client:
            nodes = client.nodes()
        self.aliases = sorted({*self.aliases, *(node.alias for node in nodes)})
        self._labels = {node.alias: node.labels for node in nodes}

    def _known(self) -> set[str]:
        labels = {each for labels in self._labels.values() for each in labels if "=" in each}
        return {"*", *self.aliases, *map(class_of, self.aliases), *labels}

    def _unknown(self, named: Sequence[str]) -> list[str]:
        known = self._known()
        return [name for each in named for name in each.split(",") if name not in known]

    def order(self, changed: Any) -> int:
        """Change the rules, tell the nodes they are about, and say what was done."""
        before, after = orders.change(self.runtime, changed)
        new = [rule for rule in after.rules if rule not in before.rules]
        gone = [rule for rule in before.rules if rule not in after.rules]
        told = orders.concerned(before.rules, after.rules, self.aliases)
        silent = orders.tell(self.name, os.environ, after, told)
        if self._as_json:
            print_json(
                {
                    "rules": [rule_dict(each) for each in after.rules],
                    "told": [alias for alias in told if alias not in silent],
                    "silent": silent,
                }
            )
            return 0
        for rule in (each for each in gone if not each.lifted):
            click.echo(f"lifted  {ends(rule)}: {effect(rule)}")
        for rule in new:
            click.echo(f"now     {ends(rule)}: {effect(rule)}")
        if not new and not gone:
            click.echo("nothing to change")
        if silent:
            click.secho(
                f"did not answer: {', '.join(silent)}; each has the rules when it is back",
                fg="yellow", err=True,
            )  # fmt: skip
        return 0


def ends(rule: LinkRule) -> str:
    return f"{rule.a} {'->' if rule.one_way else '<->'} {rule.b}"


def effect(rule: LinkRule) -> str:
    """What a rule does, in words."""
    if rule.lifted:
        return "as the configuration says"
    if rule.cut:
        return "cut"
    figures = [
        (rule.latency_ms, f"latency {units.show(rule.latency_ms, 'ms')}"),
        (rule.jitter_ms, f"jitter {units.show(rule.jitter_ms, 'ms')}"),
        (rule.rate_bps, f"rate {units.show(rule.rate_bps, 'bit/s')}"),
        (rule.loss, f"loss {rule.loss * 100:g}%"),
        (rule.reorder, f"reorder {rule.reorder * 100:g}%"),
    ]
    return ", ".join(text for value, text in figures if value) or "whole"


def rule_dict(rule: LinkRule) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.to_builtins(rule)
    return found


@click.group()
def net() -> None:
    """Links between nodes.

    A side is an alias, a class, a label (site=a), '*' for every node, or several of them with
    commas between. Of several rules that fit two nodes the latest holds. All are forgotten when
    the cluster ends.
    """


@net.command()
@side("a")
@side("b")
@one_way_option
@json_option
@click.pass_context
def cut(context: click.Context, a: str, b: str, one_way: bool, as_json: bool) -> int:
    """Nothing passes between A and B."""
    cluster = Cluster(context, as_json)
    cluster.check(a, b)
    rule = LinkRule(a, b, one_way, cut=True)
    return cluster.order(lambda rules: orders.added(rules, [rule]))


@net.command()
@side("a")
@side("b")
@click.option("--latency", type=Amount("ms", LATENCY_MS_MAX), default=0.0, help="One way: 40ms.")
@click.option("--jitter", type=Amount("ms", LATENCY_MS_MAX), default=0.0, help="More or less: 5ms.")
@click.option("--rate", type=Amount("bit/s", RATE_BPS_MAX), default=0.0, help="Such as 10Mbit/s.")
@click.option("--loss", type=Share(), default=0.0, help="Share of frames that are lost: 2%.")
@click.option("--reorder", type=Share(), default=0.0, help="Share that overtakes others: 1%.")
@one_way_option
@json_option
@click.pass_context
def slow(
    context: click.Context,
    a: str,
    b: str,
    latency: float,
    jitter: float,
    rate: float,
    loss: float,
    reorder: float,
    one_way: bool,
    as_json: bool,
) -> int:
    """What passes between A and B is late, slow, lost or out of order."""
    if not any((latency, jitter, rate, loss, reorder)):
        raise click.UsageError("say how: --latency, --jitter, --rate, --loss or --reorder.")
    cluster = Cluster(context, as_json)
    cluster.check(a, b)
    rule = LinkRule(a, b, one_way, latency, jitter, rate, loss, reorder)
    return cluster.order(lambda rules: orders.added(rules, [rule]))


@net.command()
@side("groups", metavar="NODES…", nargs=-1, required=True)
@json_option
@click.pass_context
def partition(context: click.Context, groups: tuple[str, ...], as_json: bool) -> int:
    """Cut the nodes of each group off those of the others; a single group off all the rest."""
    cluster = Cluster(context, as_json)
    cluster.check(*groups)
    members = [members_of(group, cluster.aliases, cluster.labels_of) for group in groups]
    if len(groups) == 1:
        rest = [alias for alias in cluster.aliases if alias not in members[0]]
        members.append(rest)
        groups = (*groups, ",".join(rest))
    for at, one in enumerate(members):
        twice = [alias for other in members[at + 1 :] for alias in other if alias in one]
        if twice:
            raise click.UsageError(f"{twice[0]} is in two groups; a node can be in one.")
        if not one:
            raise click.UsageError("there must be nodes on both sides.")
    rules = orders.partition(groups)
    return cluster.order(lambda before: orders.added(before, rules))


def members_of(group: str, aliases: Sequence[str], labels_of: LabelsOf = unlabelled) -> list[str]:
    """The nodes of a side."""
    return [alias for alias in aliases if has(group, alias, labels_of)]


@net.command()
@side("a", required=False)
@side("b", required=False)
@json_option
@click.pass_context
def heal(context: click.Context, a: str | None, b: str | None, as_json: bool) -> int:
    """Links are again as the configuration says: all, or those between A and B."""
    cluster = Cluster(context, as_json)
    if a is None:
        return cluster.order(lambda rules: ())
    if b is None:
        raise click.UsageError("name both sides, or none to heal every link.")
    one, other = a, b
    cluster.check(one, other)

    def healed(rules: Rules) -> Rules:
        return orders.healed(rules, one, other, cluster.aliases, cluster.labels_of)

    return cluster.order(healed)


@net.command("ls")
@json_option
@click.pass_context
def net_ls(context: click.Context, as_json: bool) -> int:
    """Every rule, and what became of the frames that it was about."""
    cluster = Cluster(context, as_json)
    answers = orders.ask(cluster.name, os.environ, m.GetLinks(), cluster.aliases)
    found: dict[tuple[bool, int, LinkRule], list[int]] = {
        (True, place, rule): [0] * 5
        for place, rule in enumerate(orders.read(cluster.runtime).rules)
    }
    silent = [alias for alias, answer in answers.items() if not isinstance(answer, m.Links)]
    for answer in answers.values():
        for each in answer.tallies if isinstance(answer, m.Links) else ():
            key = (each.ordered, each.place, each.rule)
            more = (each.sent, each.delayed, each.lost, each.reordered, each.cut)
            counts = found.get(key, [0] * 5)
            found[key] = [a + b for a, b in zip(counts, more, strict=True)]
    titles = ("sent", "delayed", "lost", "reordered", "cut")
    rows = sorted(found.items(), key=lambda each: each[0][:2])
    if as_json:
        print_json(
            {
                "links": [
                    rule_dict(rule) | {"from": "net" if ordered else "file"}
                    | {"frames": dict(zip(titles, counts, strict=True))}
                    for (ordered, _, rule), counts in rows
                ],
                "silent": silent,
            }
        )  # fmt: skip
        return 0
    if rows:
        print_table(
            ["nodes", "link", "from", *titles],
            [
                (ends(rule), effect(rule), "net" if ordered else "file", *counts)
                for (ordered, _, rule), counts in rows
            ],
        )
    else:
        click.echo("every link is whole")
    if silent:
        click.secho(f"did not answer: {', '.join(silent)}", fg="yellow", err=True)
    return 0
