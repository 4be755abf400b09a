"""`sim`."""

from __future__ import annotations

import sys
import time

import click
import msgspec

from manifold.kernel.errors import ConfigError
from manifold.kernel.limits import NODES_MAX
from manifold.shells.verbs.common import Finite, json_option, print_json
from manifold.tools.simulator.run import Report, simulate

QUIET_S = 2.0  # progress is told this often at most


@click.command()
@click.option("--seed", type=int, default=1, show_default=True, help="Of everything random.")
@click.option(
    "--nodes", type=click.IntRange(2, NODES_MAX), default=16, show_default=True, help="How many."
)
@click.option(
    "--faults",
    default="light",
    show_default=True,
    help="none, light or heavy, and KEY=VALUE behind commas: light,drop=0.1,crash=6.",
)
@click.option(
    "--duration",
    type=Finite(0.0, min_open=True),
    help="Seconds of virtual time until all is healed.",
)
@click.option("--core", is_flag=True, help="Heal a random majority only.")
@click.option("--only", type=click.Choice(["membership"]), help="Leave the other protocols out.")
@click.option(
    "--runs", type=click.IntRange(1), default=1, show_default=True, help="Seeds, from --seed on."
)
@json_option
def sim(
    seed: int,
    nodes: int,
    faults: str,
    duration: float | None,
    core: bool,
    only: str | None,
    runs: int,
    as_json: bool,
) -> int:
    """Simulate a cluster from a seed: the kernel's own protocols, under faults.

    Membership, placement and the scheduler run unchanged; jobs are submitted, killed, and lose
    their nodes and workers. First everything is checked while faults happen, then they end and
    everything has to come to rest. A failure prints the command that repeats it.
    """
    failed: list[Report] = []
    for number in range(seed, seed + runs):
        report = _one(number, nodes, faults, duration, core, only)
        if report.failures:
            failed.append(report)
        if as_json:
            print_json(msgspec.to_builtins(report) | {"command": report.command})
        elif runs == 1 or report.failures:
            click.echo(report.text())
    if runs > 1 and not as_json:
        click.echo(f"{runs} runs, {len(failed)} failed")
    return 1 if failed else 0


def _one(
    seed: int, nodes: int, faults: str, duration: float | None, core: bool, only: str | None
) -> Report:
    """One run; where a node's own assertion ends it, what repeats it is told all the same."""
    from manifold.tools.simulator.jobs import composite

    duration_ms = None if duration is None else duration * 1000
    report = Report(seed, nodes, faults, duration_ms, core, only or "")
    over = False
    try:
        protocols = None if only else composite
        tell = _Progress(seed)
        report = simulate(seed, nodes, faults, duration_ms, protocols, core=core, tell=tell)
        over = True
    except ConfigError:
        over = True
        raise
    finally:
        if not over:
            click.echo(f"reproduce with: {report.command}", err=True)
    return report


class _Progress:
    """Lines on stderr, not too many: a run that is over at once says nothing on the way."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._told_s = time.monotonic()

    def __call__(self, line: str) -> None:
        now_s = time.monotonic()
        if now_s - self._told_s >= QUIET_S:
            self._told_s = now_s
            sys.stderr.write(f"seed {self._seed}: {line}\n")
            sys.stderr.flush()
