"""`nexus`: who votes on what the cluster agrees on, how they are, and changing them.

A change of voters is journalled among the voters themselves (docs/nexus.md): whoever is killed on
the way, the voters finish it, and running the same command again says so.
"""

from __future__ import annotations

import asyncio
import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from manifold.kernel import places
from manifold.kernel.errors import Busy, ManifoldError, Maybe, NotFound, Refused
from manifold.kernel.nexus.messages import Answer, Initialise, SetVoters
from manifold.shells.sdk.voters import Voters, look, rows_of, summary
from manifold.shells.verbs import completing
from manifold.shells.verbs.common import (
    cluster_name,
    connect,
    human_bytes,
    json_option,
    print_json,
    print_table,
)

CHANGE_S = 30.0
STEP_S = 0.2  # between two looks at how far a change is
VOTERS_MAX = 7  # as in kernel/nexus/configs.py
FOLDER = "nexus"  # of a node's state, as in kernel/nexus/storage_driver.py


@click.group()
def nexus() -> None:
    """Agreement: who votes on what the cluster agrees on."""


# -- status ---------------------------------------------------------------------------------------


@nexus.command()
@json_option
@click.pass_context
def status(context: click.Context, as_json: bool) -> None:
    """The voters, how they are, and a change that is under way."""
    with connect(context) as client:
        found = look(client)
    rows = rows_of(found)
    if as_json:
        print_json(summary(found) | {"voters": rows})
        return
    if not found.info.known:
        click.echo("no voters are known: `manifold nexus init NODE…` chooses the first")
        return
    majority = "a majority answers" if found.majority() else "no majority answers"
    click.secho(
        f"epoch {found.info.count}: {_count(len(found.info.voters))}, {majority}",
        fg=None if found.majority() else "red",
    )
    if found.info.old:
        change = f"{found.names(found.info.old)} -> {found.names(found.info.voters)}"
        click.secho(f"a change is under way: {change}", fg="yellow")
    for risk in found.at_risk():
        click.secho(
            f"losing {risk['group']} would lose the majority: {', '.join(risk['voters'])}",
            fg="yellow",
        )
    grouped = any(row["groups"] for row in rows)
    print_table(
        ["voter", "id", "state", *(["groups"] if grouped else []), "keys", "epoch", "note"],
        [
            (
                row["alias"], row["id"][:10], row["state"],
                *([",".join(f"{k}={v}" for k, v in row["groups"].items())] if grouped else []),
                row["keys"], row["epoch"], row["note"],
            )
            for row in rows
        ],
    )  # fmt: skip


def _count(voters: int) -> str:
    return f"{voters} voter{'s' * (voters != 1)}"


# -- who votes ------------------------------------------------------------------------------------


@nexus.command()
@click.argument(
    "nodes", nargs=-1, required=True, metavar="NODE…", shell_complete=completing.aliases
)
@json_option
@click.pass_context
def init(context: click.Context, nodes: tuple[str, ...], as_json: bool) -> None:
    """Make the NODEs (aliases or ids) the first voters; once, and all of them must be there.

    An odd number is best: 3 bear the loss of one, 5 of two. An emulated cluster does this by
    itself (nexus.voters in manifold.yaml).
    """
    with connect(context) as client:
        found = look(client)
        target = _target([found.find(name) for name in nodes])
        if found.info.known and set(target) != set(found.info.voters):
            raise Refused(
                f"There are voters already: {found.names(found.info.voters)}.",
                "Change them with `manifold nexus voters add|remove|replace`.",
            )
        _advise(target)
        if not found.info.known:
            _judge(_asked(client, Initialise(target, CHANGE_S * 1000)), found)
        _tell(client, as_json, "these vote already" if found.info.known else "")


@nexus.group(invoke_without_command=True)
@json_option
@click.pass_context
def voters(context: click.Context, as_json: bool) -> None:
    """Who votes; `add`, `remove` and `replace` change it."""
    if context.invoked_subcommand is None:
        with connect(context) as client:
            _tell(client, as_json)


@voters.command("add")
@click.argument("node", shell_complete=completing.aliases)
@json_option
@click.pass_context
def add(context: click.Context, node: str, as_json: bool) -> None:
    """Let NODE (alias or id) vote as well."""
    with connect(context) as client:
        found = _known(client)
        kid = found.find(node)
        _change(client, found, [*found.info.voters, kid], as_json)


@voters.command("remove")
@click.argument("node", shell_complete=completing.aliases)
@json_option
@click.pass_context
def remove(context: click.Context, node: str, as_json: bool) -> None:
    """Let NODE (alias or id) vote no more. It may be dead; a majority of the others must not."""
    with connect(context) as client:
        found = _known(client)
        kid = found.find(node)
        _change(client, found, [each for each in found.info.voters if each != kid], as_json)


@voters.command("replace")
@click.argument("old", shell_complete=completing.aliases)
@click.argument("new", shell_complete=completing.aliases)
@json_option
@click.pass_context
def replace(context: click.Context, old: str, new: str, as_json: bool) -> None:
    """Let NEW vote instead of OLD, in one change. Run again after a crash, it goes on."""
    with connect(context) as client:
        found = _known(client)
        gone, come = found.find(old), found.find(new)
        voting = found.info.voters
        if gone not in voting and come not in voting:
            raise NotFound(f"{old} does not vote.", "`manifold nexus voters` lists who does.")
        _change(client, found, [*(k for k in voting if k not in (gone, come)), come], as_json)


def _known(client: Any) -> Voters:
    found = look(client)
    if not found.info.known:
        raise Refused("No voters are known.", "`manifold nexus init NODE…` chooses the first.")
    return found


def _target(kids: Sequence[str]) -> tuple[str, ...]:
    """Whom we want, each once, as many as there may be."""
    wanted = tuple(dict.fromkeys(kids))
    if not wanted:
        raise Refused("Somebody has to vote: this is the last voter.", "Add another one first.")
    if len(wanted) > VOTERS_MAX:
        raise Refused(
            f"{len(wanted)} voters are too many: at most {VOTERS_MAX}.",
            "3 or 5 are usual: more cost time and save nothing.",
        )
    return wanted


def _advise(target: Sequence[str]) -> None:
    if len(target) % 2 == 0:
        advice = f"{_count(len(target))} bear no more failures than {len(target) - 1}"
        click.secho(f"{advice}: an odd number is better", fg="yellow", err=True)


def _change(client: Any, found: Voters, kids: Sequence[str], as_json: bool) -> None:
    """From the voters there are to those, step by step, and say what came of it."""
    target = _target(kids)
    there = set(target) == set(found.info.voters)
    if there and not found.info.old:
        _tell(client, as_json, "nothing to change")
        return
    _advise(target)
    before = found.info.old or found.info.voters
    if not as_json:
        resumed = "goes on" if found.info.old else "begins"
        click.echo(f"{found.names(before)} -> {found.names(target)}: the change {resumed}")
    wish = SetVoters(target, CHANGE_S * 1000, found.info.epoch)
    _judge(_asked(client, wish, quiet=as_json), found)
    _tell(client, as_json)


def _asked(client: Any, wish: Initialise | SetVoters, *, quiet: bool = True) -> Answer:
    """What came of it; meanwhile its steps are told."""

    async def ask() -> Answer:
        registers = client.calls_of_globals.registers
        answer = asyncio.ensure_future(registers.ask(wish, CHANGE_S))
        step = ""
        while not (await asyncio.wait((answer,), timeout=STEP_S))[0]:
            info = await registers.nexus()
            if info.step and info.step != step and not quiet:
                step = info.step
                click.echo(f"  epoch {info.count}: {step}")
        found: Answer = await answer
        return found

    done: Answer = client.connection.call(ask())
    return done


def _judge(answer: Answer, found: Voters) -> None:
    """Return where it came about."""
    if answer.status == "ok":
        return
    missing = f" No answer from {found.names(answer.missing)}." if answer.missing else ""
    why = answer.why or "no reason was told."
    if answer.status == "busy":
        raise Busy(f"Voters are not changed now: {why}{missing}", "Come again.")
    if answer.status in ("maybe", "unavailable"):
        raise Maybe(
            f"The change has not come to its end: {why}{missing}",
            "Run it again, it goes on: `manifold nexus status` shows how far it is.",
        )
    raise Refused(f"Voters were not changed: {why}{missing}", "See `manifold nexus status`.")


def _tell(client: Any, as_json: bool, why: str = "") -> None:
    """Who votes now."""
    found = look(client)
    if as_json:
        rows = rows_of(found)
        print_json(summary(found) | {"voters": rows})
        return
    strength = "quorum" if found.majority() else "no majority answers"
    names = found.names(found.info.voters)
    prefix = f"{why}: " if why else ""
    click.echo(f"{prefix}voters: {names}  (epoch {found.info.count}, {strength})")
    if found.info.old:
        click.secho(f"a change is under way, from {found.names(found.info.old)}", fg="yellow")


# -- what is on the disks -------------------------------------------------------------------------


@nexus.command()
@click.argument("path", required=False, type=click.Path(path_type=Path))
@json_option
@click.pass_context
def verify(context: click.Context, path: Path | None, as_json: bool) -> None:
    """Read the records of every node of this cluster on this host, or those in PATH.

    Nothing is changed, and the cluster may run. Exit status 1 where anything is damaged.
    """
    # Shells have no business in a voter's storage; this one only looks.
    storage = importlib.import_module("manifold.kernel.nexus.storage")
    reports = []
    for name, folder in _folders(context, path):
        try:
            reports.append((name, storage.verify(folder)))
        except ManifoldError as error:
            raise Refused(f"{name}: {error.message}", error.next_step) from error
    if as_json:
        print_json([_report_dict(name, report) for name, report in reports])
    else:
        print_table(
            ["node", "records", "bytes", "file", "batches", "torn", "result"],
            [
                (
                    name, r.records, human_bytes(r.live_bytes), human_bytes(r.file_bytes),
                    r.batches, human_bytes(r.torn_bytes) if r.torn_bytes else None,
                    "sound" if r.sound else "damaged",
                )
                for name, r in reports
            ],
        )  # fmt: skip
        for _, report in reports:
            if not report.sound:
                click.secho(str(report), fg="red", err=True)
    if not all(report.sound for _, report in reports):
        context.exit(1)


def _folders(context: click.Context, path: Path | None) -> list[tuple[str, Path]]:
    """Each folder of records with a name for people."""
    if path is not None:
        inner = path / FOLDER
        folder = inner if inner.is_dir() else path
        if not folder.is_dir():
            raise NotFound(f"There is no folder {folder}.", "Name the state folder of a node.")
        return [(str(path), folder)]
    home = places.cluster_dir(cluster_name(context), os.environ)
    # What a node has put aside as damaged is named `nexus.damaged-BOOT`.
    found = sorted(each for each in home.glob(f"*/{FOLDER}*") if each.is_dir())
    if not found:
        raise NotFound(
            f"No node of this cluster keeps records in {home}.",
            "Name a folder, or the cluster with --cluster.",
        )
    return [(_named(each), each) for each in found]


def _named(folder: Path) -> str:
    alias = folder.parent.name
    return alias if folder.name == FOLDER else f"{alias}/{folder.name}"


def _report_dict(name: str, report: Any) -> dict[str, Any]:
    return {
        "node": name,
        "folder": str(report.folder),
        "sound": report.sound,
        "damage": report.damage,
        "records": report.records,
        "live_bytes": report.live_bytes,
        "file_bytes": report.file_bytes,
        "batches": report.batches,
        "torn_bytes": report.torn_bytes,
    }
