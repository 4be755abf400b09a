"""`torture`."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from manifold.kernel.nexus.configs import VOTERS_MAX
from manifold.shells.verbs.common import Finite, json_option, print_json
from manifold.tools.torture import cluster_run
from manifold.tools.torture.report import ClusterReport, Options, Report
from manifold.tools.torture.run import torture
from manifold.tools.torture.stage import Say

R = TypeVar("R")


@click.group("torture")
def verb() -> None:
    """Hurt a private cluster of real processes, and judge what its clients saw."""


@verb.command()
@click.option("--seed", type=int, default=1, show_default=True, help="Of the nemesis' plan.")
@click.option(
    "--seconds", type=Finite(1.0, 86_400.0), default=30.0, show_default=True,
    help="Until everything is healed.",
)  # fmt: skip
@click.option("--nodes", type=click.IntRange(1, 16), default=7, show_default=True, help="How many.")
@click.option(
    "--voters", type=click.IntRange(1, VOTERS_MAX), default=5, show_default=True,
    help="How many of them vote in the beginning: 1, 3, 5 or 7.",
)  # fmt: skip
@click.option("--keep", is_flag=True, help="Keep the nodes' logs and disks.")
@json_option
def nexus(seed: int, seconds: float, nodes: int, voters: int, keep: bool, as_json: bool) -> int:
    """Kill, pause, cut and replace voters whose disks lose what was not synced.

    Clients at every node read and change a few keys meanwhile. In the end every history has to be
    linearizable, all that was acknowledged has to be there, and every node has to get on. A
    failure prints the command that repeats the plan, and writes down the history of a key.
    """
    _refuse_voters(voters, nodes)
    options = Options(seed, seconds, nodes, voters, Path(), keep)
    say: Say = (lambda line: None) if as_json else click.echo
    return _tell(asyncio.run(_interruptible(torture(options, say))), as_json)


@verb.command()
@click.option("--seed", type=int, default=1, show_default=True, help="Of the nemesis' plan.")
@click.option(
    "--minutes", type=Finite(0.05, 1440.0), default=1.0, show_default=True,
    help="Until everything is healed.",
)  # fmt: skip
@click.option("--nodes", type=click.IntRange(2, 64), default=7, show_default=True, help="How many.")
@click.option(
    "--voters", type=click.IntRange(1, VOTERS_MAX),
    help="How many of them vote in the beginning: 1, 3, 5 or 7. 5 of 5 nodes or more, else 3 or 1.",
)  # fmt: skip
@click.option("--keep", is_flag=True, help="Keep the nodes' logs and disks.")
@json_option
def cluster(
    seed: int, minutes: float, nodes: int, voters: int | None, keep: bool, as_json: bool
) -> int:
    """Mix every fault while jobs run and globals change; check every result and every history.

    Nodes, workers and owners of jobs are killed, one, several, all at once; nodes stopped; links
    cut, flapping, slow, lossy; voters replaced; disks lose what was not synced. Meanwhile clients
    at every node run jobs whose results are known, programs that count in globals, and Python
    functions. In the end each result has to be right, each effect there once, each history of a
    global linearizable, and everybody has to get on. A failure prints the command that repeats the
    plan.
    """
    voters = voters or (5 if nodes >= 5 else 3 if nodes >= 3 else 1)
    _refuse_voters(voters, nodes)
    options = Options(seed, minutes * 60, nodes, voters, Path(), keep)
    say: Say = (lambda line: None) if as_json else click.echo
    report = asyncio.run(_interruptible(cluster_run.torture_cluster(options, say)))
    return _tell(report, as_json)


def _refuse_voters(voters: int, nodes: int) -> None:
    if voters > nodes or voters % 2 == 0:
        raise click.UsageError("Give an odd number of voters, and at least as many nodes.")


def _tell(report: Report, as_json: bool) -> int:
    if as_json:
        print_json(msgspec.to_builtins(report) | {"command": report.command})
    else:
        for line in summary(report):
            click.echo(line)
    return 1 if report.failures else 0


async def _interruptible(run: Coroutine[Any, Any, R]) -> R:
    """SIGTERM and SIGHUP end it as Ctrl-C does: leaving nothing."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None, "it runs in one"
    for number in (signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, task.cancel)
    try:
        return await run
    except asyncio.CancelledError:
        with contextlib.suppress(ValueError):
            task.uncancel()
        raise KeyboardInterrupt from None


def summary(report: Report) -> list[str]:
    """What a run came to, for people."""
    count = report.operations
    faults = ", ".join(f"{number} {what}" for what, number in sorted(report.faults.items()))
    lines = [
        f"seed {report.seed}: {sum(count.values())} operations on {report.keys} keys: "
        f"{count['ok']} ok, {count['no']} no, {count['maybe']} maybe, "
        f"{count['unavailable']} unavailable, {count['busy']} busy",
        *(_worked(report) if isinstance(report, ClusterReport) else ()),
        f"faults: {faults}",
        f"longest time without progress while a majority lived: {report.stalled_ms / 1000:.2f} s, "
        f"from {report.stalled_at_ms / 1000:.2f} s on",
        f"after healing: {report.up_ms / 1000:.2f} s until every node was up, "
        f"{report.healed_ms / 1000:.2f} s until all keys were read and written",
    ]
    lines += [f"note: {each}" for each in report.crashed]
    if not report.failures:
        right = "every result right; every effect there once; " * isinstance(report, ClusterReport)
        return [*lines, f"{right}linearizable; nothing acknowledged was lost"]
    lines += [f"FAILED: {failure}" for failure in report.failures]
    if report.history:
        lines.append(f"the history: {report.history}")
    if isinstance(report, ClusterReport) and report.work:
        lines.append(f"the work: {report.work}")
    return [*lines, f"the same plan: {report.command}"]


def _worked(report: ClusterReport) -> list[str]:
    """What became of the work."""
    known = ("ok", "trap", "cancelled", "left")
    other = ", ".join(f"{n} {what}" for what, n in sorted(report.jobs.items()) if what not in known)
    kinds = ", ".join(f"{n} {what}" for what, n in sorted(report.kinds.items()))
    jobs = report.jobs
    return [
        f"work: {sum(jobs.values())} pieces ({kinds})",
        f"of these: {jobs['ok']} ok, {jobs['trap']} trapped as they should, "
        f"{jobs['cancelled']} cancelled, {jobs['left']} left behind; not known or not done: "
        f"{other or 'none'}; {report.effects} effects of programs",
        f"after healing: {report.work_ms / 1000:.2f} s until every client had had work of each "
        f"kind done, {report.idle_ms / 1000:.2f} s until nothing ran any more",
    ]
