"""The table of the namespace: every pattern of a path, what is there, and how it is read.

Interface: `ROWS` is the one source of truth: listing, reading, completion and docs/namespace.md
come from it. In a pattern a word in capitals stands for one name.
Invariants: N1 every row but the root comes after its folder; N2 a file has `read`, a folder whose
names are not in the table has `names`, a tree whose names are data has `mount`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from manifold.kernel import messages as m
from manifold.kernel.errors import Refused
from manifold.kernel.geode.messages import Decision
from manifold.kernel.scheduler.messages import JobStatus
from manifold.shells.escapes import visible_text
from manifold.shells.namespace.entries import Entry, Kind, Parts
from manifold.shells.namespace.mounts import Mount, RegisterTree, ValueTree
from manifold.shells.namespace.source import Source
from manifold.shells.namespace.tables import IDLE, LOAD, job_dict, node_dict, process_dict
from manifold.shells.sdk.globals_calls import FOLDER
from manifold.vm.version import VERSION


@dataclass(frozen=True, slots=True)
class Row:
    """`text` says what is there, with its unit. `hidden`: names of this folder that are not there
    at present; it raises `NotFound` where the folder is not there itself. `show`: the value as text
    where that is not what `text_of` makes of it; `plain`: as JSON."""

    pattern: str
    text: str
    kind: Kind = "folder"
    read: Callable[[Source, Parts], Any] | None = None
    show: Callable[[Any], str] | None = None
    plain: Callable[[Any], Any] | None = None
    names: Callable[[Source], Iterable[Entry]] | None = None
    hidden: Callable[[Source, str], Sequence[str]] | None = None
    mount: Mount | None = None

    @property
    def parts(self) -> Parts:
        return tuple(part for part in self.pattern.split("/") if part)


# -- nodes ----------------------------------------------------------------------------------------


def _node_entries(source: Source) -> list[Entry]:
    return [Entry(node.alias, "folder", _node_line(node)) for node in source.client.nodes()]


def _node_line(node: m.NodeInfo) -> str:
    what = ", ".join((node.state, node.node_class, *node.labels))
    if node.load is None:
        return what
    busy = node.load.slots - node.load.free_slots
    return f"{what}, {busy} of {node.load.slots} slots busy"


def _node_there(source: Source, alias: str) -> Sequence[str]:
    source.seen(alias)
    return ()


def _cpu(node: m.NodeInfo) -> float | None:
    """Of its slots, in percent."""
    load = node.load
    return round(100 * (load.slots - load.free_slots) / load.slots, 1) if load else None


def _load(node: m.NodeInfo) -> dict[str, Any] | None:
    load = node.load
    return {name: getattr(load, name) for name in LOAD} if load is not None else None


def _of_node(pick: Callable[[m.NodeInfo], Any]) -> Callable[[Source, Parts], Any]:
    return lambda source, names: pick(source.node(names[0]))


def _node_file(name: str, text: str, pick: Callable[[m.NodeInfo], Any]) -> Row:
    return Row(f"/nodes/ALIAS/{name}", text, "file", read=_of_node(pick))


NODES = (
    Row("/nodes", "every node that is known, by alias", names=_node_entries),
    Row("/nodes/ALIAS", "one node", hidden=_node_there),
    _node_file("cpu", "how much of its slots computes, in percent", _cpu),
    _node_file("memory", "its memory, in bytes", lambda node: node.memory_bytes),
    _node_file("load", "what it reports: queue in gas, slots, credits, gas per second and slot",
               _load),
    Row("/nodes/ALIAS/state", "as the others see it: ready, suspect, dead or left", "file",
        read=lambda source, names: source.seen(names[0]).state),
    _node_file("class", "its class in the configuration", lambda node: node.node_class),
    _node_file("labels", "its labels, one a line", lambda node: list(node.labels)),
    _node_file("id", "its KID: the hash of its public key", lambda node: node.kid),
    _node_file("pid", "its process", lambda node: node.pid),
    _node_file("boot", "how often it has started", lambda node: node.boot),
    _node_file("uptime", "since it started, in seconds",
               lambda node: round(node.uptime_ms / 1000, 3)),
    _node_file("slots", "how many tasks it runs at a time", lambda node: node.cores),
    _node_file("workers", "its worker processes, a pid a line", lambda node: list(node.workers)),
    _node_file("address", "where it listens", lambda node: node.address),
    Row("/nodes/ALIAS/log", "its log, the newest lines", "log"),
    Row("/nodes/ALIAS/inventory", "its host: processor, memory, disks, GPUs, software",
        mount=ValueTree(lambda source, names: source.inventory(names[0]))),
    Row("/nodes/ALIAS/status", "all of it, also of one that is silent", "file",
        read=lambda source, names: node_dict(source.seen(names[0]))),
)  # fmt: skip


# -- jobs -----------------------------------------------------------------------------------------


def _job_entries(source: Source) -> list[Entry]:
    return [Entry(job.job, "folder", _job_line(job)) for job in source.jobs()]


def _job_line(job: JobStatus) -> str:
    return f"{job.state}, {_progress(job):g} % of {job.total:,}, {job.name or job.program[:10]}"


def _job_hidden(source: Source, name: str) -> Sequence[str]:
    status = source.job(name)
    return () if source.results(status, first=True) is not None else ("result",)


def _progress(job: JobStatus) -> float:
    """In percent; of a job without indices, when it is done."""
    whole = 100.0 if job.state == "done" else 0.0
    return round(100 * job.done / job.total, 2) if job.total else whole


def _result(source: Source, names: Parts) -> Any:
    status = source.job(names[0])
    partials = source.results(status)
    if partials is None:
        doing = "runs still" if status.state == "running" else f"is {status.state}"
        raise Refused(
            f"{names[0]} {doing}: there is no result to print.",
            "Of a job that is done there is one, unless it was made of Python calls.",
        )
    from manifold.vm.runtime.results import Partial, finish

    if status.reduce != "collect":
        return finish(status.reduce, partials[0] if partials else Partial(), 0, status.total)
    found: list[Any] = []
    for at, part in enumerate(partials):
        first = at * status.block
        found += _listed(finish("collect", part, first, min(first + status.block, status.total)))
    return found


def _listed(result: Any) -> list[Any]:
    assert isinstance(result, list), "a collection is a list"
    return result


def _error(job: JobStatus) -> str | None:
    return f"{job.fault.code}: {job.fault.message}" if job.fault else None


def _job_file(name: str, text: str, pick: Callable[[JobStatus], Any]) -> Row:
    return Row(f"/jobs/JOB/{name}", text, "file",
               read=lambda source, names: pick(source.job(names[0])))  # fmt: skip


def _owner(source: Source, names: Parts) -> str:
    return source.alias_of(source.job(names[0]).owner)


def _why_text(decisions: Sequence[Decision]) -> str:
    return visible_text("\n".join(decision.text() for decision in decisions))


def _why_plain(decisions: Sequence[Decision]) -> list[dict[str, Any]]:
    return [decision.to_dict() for decision in decisions]


JOBS = (
    Row("/jobs", "jobs that run or ran, by id", names=_job_entries),
    Row("/jobs/JOB", "one job", hidden=_job_hidden),
    _job_file("state", "queued, running, done, failed or cancelled", lambda job: job.state),
    _job_file("progress", "how much of its indices is done, in percent", _progress),
    Row("/jobs/JOB/result", "what it came to, an entry a line; once it is done", "file",
        read=_result),
    _job_file("shards", "how many parts it was cut into", lambda job: job.shards),
    _job_file("retries", "how many of them were assigned again", lambda job: job.retries),
    Row("/jobs/JOB/owner", "the node that keeps its ledger", "file", read=_owner),
    _job_file("error", "why it failed", _error),
    Row("/jobs/JOB/why", "how its shards were placed, and why there", "file",
        read=lambda source, names: source.why(names[0]), show=_why_text, plain=_why_plain),
    _job_file("status", "all of it", job_dict),
)  # fmt: skip


# -- processes ------------------------------------------------------------------------------------


def _process_entries(source: Source) -> list[Entry]:
    return [Entry(name, "folder", _process_line(each)) for name, each in source.processes().items()]


def _process_line(process: m.Process) -> str:
    if process.state == IDLE:
        return f"{process.node} pid {process.pid}: idle"
    where = f"{process.node} pid {process.pid}" if process.pid else process.node
    return f"{where}: {process.job} shard {process.shard}, {process.state}"


def _process_there(source: Source, name: str) -> Sequence[str]:
    source.process(name)
    return ()


def _process(source: Source, names: Parts) -> dict[str, Any]:
    return process_dict(names[0], source.process(names[0]))


def _process_file(name: str, text: str, key: str) -> Row:
    return Row(f"/proc/PROCESS/{name}", text, "file",
               read=lambda source, names: _process(source, names)[key])  # fmt: skip


PROCESSES = (
    Row("/proc", "workers of all nodes, and shards that wait for one, by id",
        names=_process_entries),
    Row("/proc/PROCESS", "one of them", hidden=_process_there),
    _process_file("node", "where it is", "node"),
    _process_file("pid", "its process there; none of a shard that waits", "pid"),
    _process_file("job", "what it computes for", "job"),
    _process_file("shard", "which part of that job", "shard"),
    _process_file("program", "the program's name, else its KID", "program"),
    _process_file("running", "for how long it has computed this, in milliseconds", "running_ms"),
    Row("/proc/PROCESS/status", "all of it; state is running, waiting or idle", "file",
        read=_process),
)  # fmt: skip


# -- what is agreed, and the rest -----------------------------------------------------------------


def _epoch(source: Source, names: Parts) -> int:
    registers = source.client.calls_of_globals.registers
    return source.client.connection.call(registers.nexus()).count


def _voters(source: Source, names: Parts) -> list[str]:
    registers = source.client.calls_of_globals.registers
    info = source.client.connection.call(registers.nexus())
    return sorted(source.client.connection.call(registers.names_of(info.voters)))


def _nexus(source: Source, names: Parts) -> dict[str, Any]:
    from manifold.shells.sdk.voters import look, rows_of, summary

    found = look(source.client)
    return summary(found) | {"voters": rows_of(found)}


def _nexus_text(found: dict[str, Any]) -> str:
    lines = [f"{key}: {text_of(found[key]) or '-'}" for key in ("known", "epoch", "majority")]
    change = found["changing"]
    lines.append(f"changing: {'from ' + ' '.join(change['from']) if change else 'no'}")
    for voter in found["voters"]:
        note = f", {voter['note']}" if voter["note"] else ""
        lines.append(f"voter.{voter['alias']}: {voter['state']}{note}")
    return "\n".join(lines)


REGISTERS = {
    "/globals": RegisterTree(FOLDER),
    "/cluster": RegisterTree("cluster/"),
    "/registers": RegisterTree(""),
}

ROWS: tuple[Row, ...] = (
    Row("/", "the whole namespace"),
    *NODES,
    *JOBS,
    *PROCESSES,
    Row("/globals", "named values that the whole cluster agrees on", mount=REGISTERS["/globals"]),
    Row("/cluster", "what the cluster agrees on for itself", mount=REGISTERS["/cluster"]),
    Row("/registers", "every register of Nexus, by its whole key", mount=REGISTERS["/registers"]),
    Row("/nexus", "who votes on what is agreed"),
    Row("/nexus/voters", "nodes that vote, an alias a line", "file", read=_voters),
    Row("/nexus/epoch", "how often voters were chosen", "file", read=_epoch),
    Row("/nexus/status", "voters, and whether a majority answers", "file", read=_nexus,
        show=_nexus_text),
    Row("/log", "logs of all nodes, in order of time", "log"),
    Row("/version", "of Manifold, here", "file", read=lambda source, names: VERSION),
)  # fmt: skip


# -- values as text -------------------------------------------------------------------------------


def text_of(value: Any) -> str:
    """A value as `cat` prints it, without the last newline: `-` for null, a line for each entry of
    a list, `key: value` for each of a dict. Control characters are shown (shells/escapes.py)."""
    match value:
        case None:
            return "-"
        case bool():
            return "true" if value else "false"
        case dict():
            return "\n".join(f"{visible_text(key)}: {each}" for key, each in flat(value))
        case list():
            return "\n".join(map(_word, value))
        case _:
            return visible_text(str(value))


def flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Keys and words of a dict; what is nested has a dot in its key."""
    found = []
    for key, each in value.items():
        if isinstance(each, dict):
            found += flat(each, f"{prefix}{key}.")
        else:
            found.append((prefix + key, _word(each)))
    return found


def _word(value: Any) -> str:
    """On one line."""
    if isinstance(value, list | tuple):
        return " ".join(map(_word, value))
    return text_of(value).replace("\n", " ")
