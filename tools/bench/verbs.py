"""`bench`."""

from __future__ import annotations

import click

from manifold.shells.verbs.common import json_option
from manifold.tools.bench.harness import names, run_benchmarks, summary


@click.command()
@click.argument("wanted", metavar="NAME…", nargs=-1)
@click.option("--check", is_flag=True, help="Exit with 1 where a goal is missed.")
@click.option("--quick", is_flag=True, help="Fewer rounds: a look, not a figure to quote.")
@json_option
def bench(wanted: tuple[str, ...], check: bool, quick: bool, as_json: bool) -> int:
    """Measure: ratios against peers and limits, in one run. Without a NAME, list them."""
    if not wanted:
        for name in names():
            click.echo(f"{name:18}{summary(name)}")
        return 0
    return run_benchmarks(wanted, quick=quick, as_json=as_json, check=check)
