"""`run script.py`: a Python script as `python script.py` runs it, with a cluster attached.

The process becomes the script: the same pid, terminal and session, so that arguments, exit status,
tracebacks and Ctrl-C are Python's own. `manifold.connect()` in it finds the cluster through
$MANIFOLD_CLUSTER. Where none runs, one is started for it that ends when this process does: the
supervisor watches the process, not the program in it.
"""

from __future__ import annotations

import importlib
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import click

from manifold.kernel.errors import NoCluster
from manifold.shells.verbs.common import cluster_name, connect

NODES = 4  # of a cluster that is there for one script


def run_script(context: click.Context, file: str, arguments: Sequence[str]) -> NoReturn:
    """Become `python FILE ARGUMENTS…`, attached to the cluster that the command line names."""
    try:
        mode = Path(file).stat().st_mode
    except OSError as error:
        raise click.UsageError(f"{file} cannot be read: {error.strerror}.", context) from error
    if not stat.S_ISREG(mode):
        raise click.UsageError(f"{file} is not a file.", context)
    cluster = _cluster(context)
    sys.stdout.flush()
    sys.stderr.flush()
    command = [sys.executable, file, *arguments]
    os.execve(sys.executable, command, os.environ | {"MANIFOLD_CLUSTER": cluster})


def _cluster(context: click.Context) -> str:
    """The name of a cluster that runs: the one that is named, a lasting one with --up, or one for
    this process alone."""
    name = cluster_name(context)
    named = (context.find_root().obj or {}).get("cluster")
    try:
        connect(context).close()
        return name
    except NoCluster as error:
        if named and not context.params["start"]:
            raise NoCluster(
                error.message,
                "Start it with `manifold up --detach`, add --up before the file, or leave out "
                "--cluster: then the script gets one of its own.",
            ) from error
    if context.params["start"]:
        verbs = importlib.import_module("manifold.tools.emulator.verbs")
        click.echo(f"starting cluster {name!r} (`manifold down` ends it)", err=True)
        verbs.start_detached(name)
        return name
    click.echo(
        f"cluster {name!r} does not run: {NODES} nodes are started for this script and end with it",
        err=True,
    )
    owned = importlib.import_module("manifold.tools.emulator.owned").start(NODES)
    return str(owned.name)
