"""`up`, `down`, `agent`: the verbs that start and end processes on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from typing import Any

import click

from manifold.kernel import places
from manifold.kernel.config import PROFILES, Config, load
from manifold.kernel.errors import ManifoldError, NoCluster, Refused, Unavailable
from manifold.kernel.messages import Drain
from manifold.kernel.process.remains import answers
from manifold.shells.verbs.common import (
    cluster_name,
    config_path,
    json_option,
    label_option,
    print_json,
)
from manifold.tools.emulator import cluster, owned, record
from manifold.tools.emulator.changes import DRAIN_S
from manifold.tools.emulator.members import node_spec
from manifold.tools.emulator.supervisor import STOP_S, Supervisor
from manifold.vm.version import VERSION


def _config(context: click.Context, file: str, sets: tuple[str, ...], profile: str = "") -> Config:
    overrides = {"profile": profile} if profile else {}
    for each in sets:
        key, equals, value = each.partition("=")
        if not equals:
            raise click.BadParameter(f"{each!r}: write KEY=VALUE, such as scheduler.grain=10ms.")
        overrides[key] = value
    root = context.find_root().obj or {}
    named = root.get("cluster") or os.environ.get("MANIFOLD_CLUSTER", "")
    if named:
        overrides.setdefault("cluster", named)
    return load(config_path(file), os.environ, overrides)


@click.command()
@click.option("--nodes", "count", type=click.IntRange(1, 4096), help="Spread over the classes.")
@click.option("--config", "file", default="", metavar="FILE", help="Instead of ./manifold.yaml.")
@click.option(
    "--profile",
    type=click.Choice(PROFILES),
    default=None,
    help="Classes and links of that kind, instead of the file's.",
)
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override one key.")
@click.option("--netns", is_flag=True, help="Nodes in network namespaces, joined by TCP (root).")
@click.option("--detach", is_flag=True, help="Return once it is up; `manifold down` ends it.")
@click.option("--report-fd", type=int, default=-1, hidden=True)
@click.option("--while-fd", type=int, default=-1, hidden=True, help="A pidfd: end when it does.")
@click.option("--private", is_flag=True, hidden=True, help="In the end remove the state, too.")
@click.option("--whole", is_flag=True, hidden=True, help="Nodes share this machine, unslowed.")
@json_option
@click.pass_context
def up(
    context: click.Context,
    count: int | None,
    file: str,
    profile: str | None,
    sets: tuple[str, ...],
    netns: bool,
    detach: bool,
    report_fd: int,
    while_fd: int,
    private: bool,
    whole: bool,
    as_json: bool,
) -> int:
    """Start a cluster on this machine, one process per node, and stay until Ctrl-C."""
    report = _Report(report_fd, as_json)
    try:
        config = _config(context, file, sets, profile or "")
        if whole and count and config_path(file) is None and config.profile == "none":
            config = cluster.sharing_this_machine(config, count)
    except ManifoldError as error:
        report.failed(error)
        raise
    folder = places.cluster_dir(config.cluster, os.environ)
    count = count or sum(kind.count for kind in config.classes)
    found = record.holder(folder)
    if found is not None and report_fd < 0:
        _say_up(config.cluster, found, as_json)
        return 0
    if detach:
        flags = [*(["--config", file] if file else []), *(x for s in sets for x in ("--set", s))]
        flags += ["--netns"] if netns else []
        flags += ["--profile", profile] if profile else []
        event = start_detached(config.cluster, count, flags)
        if as_json:
            print_json(event)
        else:
            click.echo(_converged_line(event))
        return 0
    status = asyncio.run(_supervise(config, count, report, while_fd, netns))
    if private:
        shutil.rmtree(folder, ignore_errors=True)  # its last process has ended
    return status


def _say_up(name: str, found: record.Record, as_json: bool) -> None:
    if as_json:
        print_json({"cluster": name, "already": True, "pid": found.pid, "nodes": found.nodes})
    else:
        click.echo(
            f"cluster {name!r} is up already: {found.nodes} nodes, supervisor {found.pid}; "
            "nothing was changed"
        )


def _converged_line(event: dict[str, Any]) -> str:
    return (
        f"cluster {event['cluster']!r} is up: {event['nodes']} nodes see each other after "
        f"{event['seconds']:.2f} s ({event['classes']}; {event['throttle']})"
        + (f"; not up: {', '.join(event['failing'])}" if event["failing"] else "")
    )


class _Report:
    """Tells what happens: to a person, or to the command that detached us."""

    def __init__(self, fd: int, as_json: bool) -> None:
        self._fd = fd
        self._as_json = as_json

    def line(self, text: str) -> None:
        if self._fd < 0 and not self._as_json:
            click.echo(text)
        elif self._fd >= 0:
            print(text, flush=True)  # the detached supervisor's log

    def event(self, **fields: Any) -> None:
        if self._fd >= 0:
            with contextlib.suppress(BrokenPipeError):  # the command that waited was interrupted
                os.write(self._fd, json.dumps(fields).encode() + b"\n")
        elif self._as_json:
            print_json(fields)

    def failed(self, error: ManifoldError) -> None:
        """To the command that waits; a person is told by the command line itself."""
        if self._fd >= 0:
            told = {"code": error.code, "message": error.message, "next": error.next_step}
            self.event(error=told)


async def _supervise(
    config: Config, count: int, report: _Report, while_fd: int, netns: bool
) -> int:
    began_s = time.monotonic()
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stopped.set)
    if while_fd >= 0:
        loop.add_reader(while_fd, stopped.set)
    kinds = Counter(kind.name for _, kind in config.spread(count))
    classes = ", ".join(f"{n} {name}" for name, n in kinds.items())
    report.line(f"manifold {VERSION}: cluster {config.cluster!r}, {count} nodes ({classes})")
    try:
        supervisor = await cluster.up(config, count, os.environ, report.line, netns=netns)
    except ManifoldError as error:
        report.failed(error)
        raise
    patience_s = cluster.converge_s(count)
    try:
        waiting = asyncio.ensure_future(supervisor.converged(patience_s))
        ending = asyncio.ensure_future(stopped.wait())
        await asyncio.wait({waiting, ending}, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done() and waiting.result():
            event = {
                "cluster": config.cluster, "nodes": count - len(supervisor.failing),
                "classes": classes,
                "seconds": round(time.monotonic() - began_s, 3), "pid": os.getpid(),
                "throttle": throttle_notice(supervisor) + network_notice(supervisor),
                "failing": supervisor.failing,
            }  # fmt: skip
            report.event(**event)
            report.line(_converged_line(event))
        elif not ending.done():
            message = f"{count} nodes did not see each other within {patience_s:g} s."
            if len(supervisor.failing) == count:
                message = f"None of {count} nodes comes up."
            next_step = "`manifold logs`, and the console.log of each node, say why."
            report.event(error={"code": "unavailable", "message": message, "next": next_step})
            raise Unavailable(message, next_step)
        waiting.cancel()
        await ending
        report.line("stopping")
    finally:
        await supervisor.stop()
    report.line("every node has ended; nothing is left")
    return 0


def throttle_notice(supervisor: Supervisor) -> str:
    """How compute shares are enforced here, for people."""
    shared = [spec for spec in supervisor.specs if spec.compute < 1.0]
    bounded = all(spec.memory_cgroup for spec in supervisor.specs)
    books = "" if bounded else "; memory is watched by the nodes"
    if not shared:
        return f"no compute share to enforce{books}"
    if all(spec.cgroup for spec in shared):
        return f"compute shares by cgroup{books}"
    return f"compute shares by slice pacing: this host allows no cgroup{books}"


def network_notice(supervisor: Supervisor) -> str:
    """What `--netns` does to links here, for people."""
    if supervisor.network is None:
        return ""
    latency = "by the bus" if supervisor.specs[0].config.links.classes == "on" else "none"
    return f"; in network namespaces: rates of the classes by tbf, latency {latency}"


def start_detached(name: str, count: int | None = None, flags: list[str] | None = None) -> Any:
    """Start a supervisor of its own session and wait until its cluster has converged."""
    nodes = ["--nodes", str(count)] if count else []
    folder = places.cluster_dir(name, os.environ)
    patience_s = owned.START_S - cluster.CONVERGE_S + cluster.converge_s(count or 0)
    process, event = owned.launch(
        name, [*nodes, *(flags or [])], folder, os.environ, patience_s=patience_s
    )
    process.returncode = 0  # it goes on without us: no warning that it still runs
    return event


@click.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@click.pass_context
def down(context: click.Context, yes: bool, as_json: bool) -> int:
    """End the cluster: every process, socket and lock of it."""
    name = cluster_name(context)
    if not yes and sys.stdin.isatty() and not as_json:
        running = _running_jobs(name)
        if running:
            click.confirm(f"{running} jobs are running. End cluster {name!r}?", abort=True)
    began_s = time.monotonic()
    ended = cluster.down(name, os.environ)
    if as_json:
        print_json({"cluster": name, "was_up": ended})
    elif ended:
        click.echo(f"cluster {name!r} ended in {time.monotonic() - began_s:.1f} s; nothing is left")
    else:
        click.echo(f"cluster {name!r} is not up")
    return 0


def _running_jobs(name: str) -> int:
    from manifold.shells.sdk.client import Client

    try:
        with Client(name) as client:
            return sum(job.state == "running" for job in client.jobs().jobs)
    except NoCluster:
        return 0


@click.command()
@click.option("--alias", default="agent-01", show_default=True, help="Its name in the cluster.")
@click.option("--class", "kind_name", default="", help="Its class; the first of the file if none.")
@click.option("--config", "file", default="", metavar="FILE")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE")
@label_option
@click.pass_context
def agent(
    context: click.Context,
    alias: str,
    kind_name: str,
    file: str,
    sets: tuple[str, ...],
    labels: tuple[str, ...],
) -> int:
    """Run one node in the foreground, joining whatever nodes of the cluster are here."""
    # Who votes is the others' business: voters of its own would be another cluster's.
    config = _config(context, file, (*sets, "nexus.voters=off"))
    kinds = {kind.name: kind for kind in config.classes}
    kind = kinds.get(kind_name) if kind_name else config.classes[0]
    if kind is None:
        raise click.BadParameter(f"there is no class {kind_name!r}; there are {', '.join(kinds)}.")
    return asyncio.run(_agent(config, alias, kind, labels))


async def _agent(config: Config, alias: str, kind: Any, labels: tuple[str, ...]) -> int:
    runtime = places.runtime_dir(config.cluster, os.environ)
    lock = record.Lock(places.state_dir(config.cluster, alias, os.environ))
    if not lock.acquire(1, str(runtime)):
        raise Refused(f"A node {alias!r} runs here already.", "Choose another --alias.")
    if answers(runtime / f"{alias}.d"):
        lock.release()
        raise Refused(f"The cluster has a node {alias!r} already.", "Choose another --alias.")
    if (runtime / places.NETNS).exists():
        lock.release()
        raise Refused(
            f"The nodes of cluster {config.cluster!r} are in network namespaces: an agent cannot "
            "reach them.",
            "Start the cluster without --netns.",
        )
    seeds = tuple(f"ipc://{str(path)[:-2]}" for path in sorted(runtime.glob("*.d")))
    zygote = str(runtime / f"zygote-{alias}")
    spec = node_spec(config, alias, kind, runtime, seeds, os.environ, zygote, more_labels=labels)
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stopped.set)
    supervisor = Supervisor([spec], runtime, lock, whole_dir=False, on_event=click.echo)
    try:
        await supervisor.start()
        click.echo(f"node {alias} ({kind.name}) of cluster {config.cluster!r}; Ctrl-C ends it")
        await stopped.wait()
        stopped.clear()
        await _hand_over(supervisor, stopped)
    finally:
        await supervisor.stop()
    click.echo(f"node {alias} has left")
    return 0


async def _hand_over(supervisor: Supervisor, again: asyncio.Event) -> None:
    """What its node has goes to others, as far as that is done in time; `again`: end at once."""
    (node,) = supervisor.nodes.values()
    node.leaving = True
    supervisor.tell(node, Drain(DRAIN_S * 1000))
    late_s = asyncio.get_running_loop().time() + DRAIN_S + STOP_S
    waits = {asyncio.ensure_future(each) for each in (supervisor.gone(node, late_s), again.wait())}
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for each in waits:
        each.cancel()
