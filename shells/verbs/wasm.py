"""`run prog.wasm`: a WASI program, once, with its own arguments and standard input.

What it writes is written here, and its exit status is ours, as if it ran on this machine. A module
without `_start` is not for this: it runs over a range of indices, like the programs of Entangle.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from manifold.kernel.errors import ManifoldError
from manifold.kernel.geode.messages import Demand
from manifold.kernel.tasks.messages import STDIN_BYTES_MAX
from manifold.shells.sdk.placing import demand_of
from manifold.shells.sdk.wasm import Finished, foreign_of
from manifold.shells.verbs.common import attached, print_json

STATUS_MASK = 0xFF  # of a status, what a shell sees


def is_command(file: str) -> bool:
    """Whether it is a program with arguments; refused, with the reason, where it is none at all."""
    return foreign_of(Path(file)).kind == "command"


def run_command(context: click.Context, file: str, arguments: Sequence[str]) -> int:
    """Run FILE on some node; its exit status."""
    options = context.params
    asked = Demand(
        node_class=options["node_class"], node=options["on_node"], needs_gpu=options["gpu"]
    )
    demand = demand_of(asked, options["where"])
    with attached(context, options["start"]) as client:
        future = client.command(
            file, arguments, stdin=_stdin(), timeout_ms=options["timeout"] * 1000,
            demand=demand, detach=options["detach"],
        )  # fmt: skip
        if options["detach"]:
            while future.status is None and not future.done():
                client.status(future.job)
            print_json({"job": future.job}) if options["as_json"] else click.echo(future.job)
            return 0
        try:
            done = client.wait(future)
        except ManifoldError as error:
            _write(getattr(error, "stdout", b""), getattr(error, "stderr", b""))
            raise
    if options["as_json"]:
        print_json(
            {
                "job": future.job, "status": done.status,
                "stdout": done.stdout.decode(errors="replace"),
                "stderr": done.stderr.decode(errors="replace"),
            }
        )  # fmt: skip
    else:
        _write(done.stdout, done.stderr)
    return _status(done)


def _status(done: Finished) -> int:
    return done.status & STATUS_MASK or (1 if done.status else 0)


def _stdin() -> bytes:
    """Standard input where somebody has put something there: a pipe or a file, not a terminal."""
    try:
        mode = os.fstat(0).st_mode
    except OSError:  # it is closed
        return b""
    if not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode)):
        return b""
    return sys.stdin.buffer.read(STDIN_BYTES_MAX + 1)


def _write(out: bytes, err: bytes) -> None:
    sys.stdout.buffer.write(out)
    sys.stdout.buffer.flush()
    sys.stderr.buffer.write(err)
    sys.stderr.buffer.flush()
