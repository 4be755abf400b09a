"""`run`, `jobs`, `ps`, `kill`, `why`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from manifold.kernel.errors import ManifoldError, NoCluster
from manifold.kernel.geode.messages import Demand
from manifold.kernel.scheduler.messages import JobStatus
from manifold.shells.verbs.common import (
    ProgressBar,
    cluster_name,
    connect,
    human_ms,
    json_option,
    print_json,
    print_table,
)

SHOWN_MAX = 20  # entries of a collected result printed on a terminal
INDEX_LIMIT = 1 << 63
SECONDS_MAX = 365 * 86_400.0


class Range(click.ParamType[Any]):
    """`A:B`, half-open; underscores may group digits."""

    name = "A:B"

    def convert(self, value: Any, parameter: Any, context: Any) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        low, colon, high = str(value).partition(":")
        try:
            found = int(low), int(high)
        except ValueError:
            self.fail(f"{value!r} is not a range: write A:B, such as 1:1000000.")
        if not colon or found[1] < found[0]:
            self.fail(f"the range {value} ends before it starts: A:B has A at most B.")
        if not -INDEX_LIMIT <= found[0] <= found[1] < INDEX_LIMIT:
            self.fail(f"the range {value} does not fit in 64 bits.")
        return found


class Numbers(click.ParamType[Any]):
    """Comma-separated integers and floats."""

    name = "X,Y,…"

    def convert(self, value: Any, parameter: Any, context: Any) -> tuple[int | float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(_number(part) for part in str(value).split(",") if part.strip())
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers: write them like 3,0.5.")


class Seconds(click.ParamType[Any]):
    """A time from 0 to a year, in seconds."""

    name = "SECONDS"

    def convert(self, value: Any, parameter: Any, context: Any) -> float:
        try:
            found = float(value)
        except ValueError:
            found = -1.0
        if not 0 <= found <= SECONDS_MAX:
            self.fail(f"{value!r} is not a time: write seconds, such as 2.5.")
        return found


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


@click.command()
@click.argument("file")
@click.option("--range", "span", type=Range(), default="0:1", help="Indices, half-open.")
@click.option(
    "--reduce",
    "how",
    type=click.Choice(["sum", "min", "max", "count", "collect"]),
    default="collect",
    show_default=True,
)
@click.option("--args", "arguments", type=Numbers(), default="", help="Cells after the index.")
@click.option("--timeout", type=Seconds(), default=0.0, help="Seconds; 0 is none.")
@click.option("--class", "node_class", default="", help="Only on nodes of this class.")
@click.option("--on", "on_node", default="", metavar="NODE", help="Only on this node.")
@click.option("--gpu", is_flag=True, help="Only on nodes with a GPU.")
@click.option("--why", "explain", is_flag=True, help="Then say how each shard was placed.")
@click.option("--detach", is_flag=True, help="Print the job's id and do not wait.")
@click.option("--up", "start", is_flag=True, help="Start a cluster first where none runs.")
@json_option
@click.pass_context
def run(
    context: click.Context,
    file: str,
    span: tuple[int, int],
    how: Any,
    arguments: tuple[int | float, ...],
    timeout: float,
    node_class: str,
    on_node: str,
    gpu: bool,
    explain: bool,
    detach: bool,
    start: bool,
    as_json: bool,
) -> None:
    """Run FILE (.ent, or .json in the seed's dialect) over a range of indices."""
    from manifold.shells.sdk.programs import program_of

    program = program_of(Path(file))
    demand = Demand(node_class=node_class, node=on_node, needs_gpu=gpu)
    with _client(context, start) as client:
        future = client.job(
            program, *span, reduce=how, arguments=arguments, timeout_ms=timeout * 1000,
            demand=demand, name=file,
        )  # fmt: skip
        if detach:
            while future.status is None and not future.done():
                client.status(future.job)
            print_json({"job": future.job}) if as_json else click.echo(future.job)
            return
        bar = ProgressBar()
        try:
            result = client.wait(future, bar)
        except ManifoldError as error:
            bar.clear()
            _explain_trap(error, as_json)
            raise
        finally:
            bar.clear()
        decisions = client.why(future.job) if explain else ()
    _show(future, result, decisions, as_json)


def _client(context: click.Context, start: bool) -> Any:
    try:
        return connect(context)
    except NoCluster as error:
        if not start:
            raise NoCluster(
                error.message, "Start one with `manifold up --detach`, or add --up."
            ) from error
    import importlib

    # `up` lives on a floor above; it is found by name, as the table of verbs finds it.
    verbs = importlib.import_module("manifold.tools.emulator.verbs")
    click.echo(f"starting cluster {cluster_name(context)!r} (`manifold down` ends it)", err=True)
    verbs.start_detached(cluster_name(context))
    return connect(context)


def _explain_trap(error: ManifoldError, as_json: bool) -> None:
    cells = getattr(error, "cells", ())
    if cells and not as_json:
        shown = ", ".join(f"{n}: {value}" for n, value in enumerate(cells[:16]))
        click.echo(f"cells: {shown}", err=True)


def _show(future: Any, result: Any, decisions: Any, as_json: bool) -> None:
    status = future.status
    if as_json:
        found = {
            "job": future.job,
            "state": "done",
            "result": result,
            "indices": status.total,
            "elapsed_ms": round(status.elapsed_ms, 3),
            "shards": status.shards,
            "retries": status.retries,
        }
        if decisions:
            found["why"] = [decision.to_dict() for decision in decisions]
        print_json(found)
        return
    if isinstance(result, list):
        shown = result if not sys.stdout.isatty() else result[:SHOWN_MAX]
        for entry in shown:
            click.echo(entry if not isinstance(entry, list) else " ".join(map(str, entry)))
        if len(shown) < len(result):
            click.echo(f"… and {len(result) - len(shown):,} more (`--json`, or a pipe, has all)")
    else:
        click.echo(result)
    click.echo(
        f"{future.job}: {status.total:,} indices in {human_ms(status.elapsed_ms)}, "
        f"{status.shards} shards, {status.retries} retries",
        err=True,
    )
    for decision in decisions:
        click.echo(decision.text())


def _job_row(job: JobStatus) -> tuple[Any, ...]:
    share = f"{job.done / job.total:.0%}" if job.total else "-"
    return (
        job.job, job.state, share, f"{job.total:,}", job.reduce, job.shards, job.retries,
        human_ms(job.elapsed_ms), job.name or job.program[:10],
    )  # fmt: skip


def job_dict(job: JobStatus) -> dict[str, Any]:
    """A job for `--json`."""
    return {
        "job": job.job, "state": job.state, "program": job.program, "name": job.name,
        "owner": job.owner, "done": job.done, "total": job.total, "reduce": job.reduce,
        "elapsed_ms": job.elapsed_ms, "shards": job.shards, "retries": job.retries,
        "error": {"code": job.fault.code, "message": job.fault.message} if job.fault else None,
    }  # fmt: skip


@click.command()
@click.option("--all", "everything", is_flag=True, help="Ended ones too.")
@json_option
@click.pass_context
def jobs(context: click.Context, everything: bool, as_json: bool) -> None:
    """Jobs that run (with --all, or --json, those that ended too)."""
    with connect(context) as client:
        found = client.jobs()
    listed = [j for j in found.jobs if everything or as_json or j.state == "running"]
    if as_json:
        print_json([job_dict(job) for job in listed])
    elif listed:
        titles = ["job", "state", "done", "indices", "reduce", "shards", "retries", "time", "what"]
        print_table(titles, map(_job_row, listed))
    else:
        click.echo(f"no job runs ({len(found.jobs)} ended: `manifold jobs --all`)")
    if found.silent:
        click.secho(f"no answer from {', '.join(found.silent)}", fg="yellow", err=True)


@click.command()
@json_option
@click.pass_context
def ps(context: click.Context, as_json: bool) -> None:
    """What every worker computes now, and which shards wait for one."""
    with connect(context) as client:
        found = client.processes()
    if as_json:
        print_json(
            [
                {name: getattr(process, name) for name in process.__struct_fields__}
                for process in found.processes
            ]
        )
    elif found.processes:
        print_table(
            ["node", "slot", "pid", "job", "shard", "try", "block", "of", "state", "for", "what"],
            [
                (
                    p.node, p.slot if p.slot >= 0 else None, p.pid or None, p.job, p.shard,
                    p.attempt, p.first, p.last, p.state, human_ms(p.running_ms), p.program[:24],
                )
                for p in found.processes
            ],
        )  # fmt: skip
    else:
        click.echo("every worker is idle")
    if found.silent:
        click.secho(f"no answer from {', '.join(found.silent)}", fg="yellow", err=True)


@click.command()
@click.argument("job")
@json_option
@click.pass_context
def kill(context: click.Context, job: str, as_json: bool) -> None:
    """Cancel JOB."""
    with connect(context) as client:
        status = client.kill(_job_id(job))
    if as_json:
        print_json(job_dict(status))
    elif status.state == "cancelled":
        click.echo(f"{job} cancelled after {status.done:,} of {status.total:,} indices")
    else:
        click.echo(f"{job} had ended already: {status.state}")


@click.command()
@click.argument("task")
@json_option
@click.pass_context
def why(context: click.Context, task: str, as_json: bool) -> None:
    """Why the shards of a job (J-…), or one of them (J-…/3), were placed where they were."""
    _job_id(task.partition("/")[0])
    with connect(context) as client:
        decisions = client.why(task)
    if as_json:
        print_json([decision.to_dict() for decision in decisions])
        return
    for decision in decisions:
        click.echo(decision.text())


def _job_id(text: str) -> str:
    digits = text.removeprefix("J-")
    if len(digits) != 16 or not text.startswith("J-") or set(digits) - set("0123456789abcdef"):
        raise click.BadParameter(f"{text!r} is not a job: they look like J-0123456789abcdef.")
    return text
