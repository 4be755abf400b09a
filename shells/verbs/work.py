"""`jobs`, `ps`, `kill`, `why`."""

from __future__ import annotations

from typing import Any

import click

from manifold.kernel.scheduler.messages import JobStatus
from manifold.shells.escapes import visible_text
from manifold.shells.namespace.tables import job_dict
from manifold.shells.verbs import completing
from manifold.shells.verbs.common import (
    connect,
    human_ms,
    json_option,
    print_json,
    print_table,
)


def _job_row(job: JobStatus) -> tuple[Any, ...]:
    share = f"{job.done / job.total:.0%}" if job.total else "-"
    return (
        job.job, job.state, share, f"{job.total:,}", job.reduce, job.shards, job.retries,
        human_ms(job.elapsed_ms), job.name or job.program[:10],
    )  # fmt: skip


@click.command()
@click.option("--all", "everything", is_flag=True, help="Ended ones too.")
@json_option
@click.pass_context
def jobs(context: click.Context, everything: bool, as_json: bool) -> None:
    """Jobs that run or are queued (with --all, or --json, those that ended too)."""
    with connect(context) as client:
        found = client.jobs()
    goes_on = ("queued", "running")
    listed = [j for j in found.jobs if everything or as_json or j.state in goes_on]
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
@click.argument("job", shell_complete=completing.jobs)
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
@click.argument("task", shell_complete=completing.jobs)
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
        click.echo(visible_text(decision.text()))


def _job_id(text: str) -> str:
    digits = text.removeprefix("J-")
    if len(digits) != 16 or not text.startswith("J-") or set(digits) - set("0123456789abcdef"):
        raise click.BadParameter(f"{text!r} is not a job: they look like J-0123456789abcdef.")
    return text
