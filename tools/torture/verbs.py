"""`torture`."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from pathlib import Path

import click
import msgspec

from manifold.kernel.nexus.configs import VOTERS_MAX
from manifold.shells.verbs.common import Finite, json_option, print_json
from manifold.tools.torture.report import Report
from manifold.tools.torture.run import Options, torture


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
    if voters > nodes or voters % 2 == 0:
        raise click.UsageError("Give an odd number of voters, and at least as many nodes.")
    options = Options(seed, seconds, nodes, voters, Path(), keep)
    report = asyncio.run(_interruptible(options, as_json))
    if as_json:
        print_json(msgspec.to_builtins(report) | {"command": report.command})
    else:
        for line in summary(report):
            click.echo(line)
    return 1 if report.failures else 0


async def _interruptible(options: Options, quiet: bool) -> Report:
    """SIGTERM and SIGHUP end it as Ctrl-C does: leaving nothing."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None, "it runs in one"
    for number in (signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, task.cancel)
    try:
        return await torture(options, (lambda line: None) if quiet else click.echo)
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
        f"faults: {faults}",
        f"longest time without progress while a majority lived: {report.stalled_ms / 1000:.2f} s, "
        f"from {report.stalled_at_ms / 1000:.2f} s on",
        f"after healing: {report.up_ms / 1000:.2f} s until every node was up, "
        f"{report.healed_ms / 1000:.2f} s until all keys were read and written",
    ]
    lines += [f"note: {each}" for each in report.crashed]
    if not report.failures:
        return [*lines, "linearizable; nothing acknowledged was lost"]
    lines += [f"FAILED: {failure}" for failure in report.failures]
    if report.history:
        lines.append(f"the history: {report.history}")
    return [*lines, f"the same plan: {report.command}"]
