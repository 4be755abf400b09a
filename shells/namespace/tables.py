"""Rows of what a cluster has: nodes, jobs, processes, globals, voters, log; as JSON says them.

Interface: `node_dict`, `job_dict` and `process_dict` make a row of what a node answers;
`TABLES[name].rows(client)` asks for all of them, each with at least the table's columns.
Process ids: a worker is `K-` and the first 12 hex digits of the BLAKE3 of its node's KID, the boot
of that node and its pid; a shard that no worker has yet, of its job, shard and attempt. So an id
is the same for whoever asks, for as long as that worker lives or that shard waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import blake3
import msgspec

from manifold.kernel import messages as m
from manifold.kernel.scheduler.messages import JobStatus
from manifold.shells.namespace.logs import Logs, Warn, silent_warning
from manifold.shells.sdk.client import Client

ID_HEX_DIGITS = 12  # 48 bits: among 100 000 processes, one chance in 56 000 that two are alike
IDLE = "idle"


# -- one row --------------------------------------------------------------------------------------


def node_dict(node: m.NodeInfo) -> dict[str, Any]:
    """A node: `id`, `alias`, `class`, `state`, `pid`, `address`, `load`, and more."""
    plain = msgspec.to_builtins(node)
    assert isinstance(plain, list)
    found: dict[str, Any] = dict(zip(node.__struct_fields__, plain[1:], strict=False))
    found["id"] = found.pop("kid")
    found["class"] = found.pop("node_class")
    found["pid"] = node.pid or None
    found["labels"] = list(node.labels)
    if node.load is not None:
        found["load"] = {name: getattr(node.load, name) for name in node.load.__struct_fields__}
    return found


def job_dict(job: JobStatus) -> dict[str, Any]:
    """A job as its owner sees it."""
    return {
        "job": job.job, "state": job.state, "program": job.program, "name": job.name,
        "owner": job.owner, "done": job.done, "total": job.total, "reduce": job.reduce,
        "elapsed_ms": job.elapsed_ms, "shards": job.shards, "retries": job.retries,
        "error": {"code": job.fault.code, "message": job.fault.message} if job.fault else None,
    }  # fmt: skip


def process_dict(name: str, process: m.Process) -> dict[str, Any]:
    """What a worker computes, or a shard that waits for one."""
    computes = process.state != IDLE
    return {
        "id": name,
        "node": process.node,
        "slot": process.slot if process.slot >= 0 else None,
        "pid": process.pid or None,
        "state": process.state,
        "job": process.job or None,
        "shard": process.shard if computes else None,
        "attempt": process.attempt if computes else None,
        "program": process.program or None,
        "running_ms": process.running_ms,
    }


# -- processes ------------------------------------------------------------------------------------


def _id(*parts: object) -> str:
    text = "\0".join(map(str, parts))
    return "K-" + blake3.blake3(text.encode()).hexdigest()[:ID_HEX_DIGITS]


def worker_id(kid: str, boot: int, pid: int) -> str:
    """Of a worker process."""
    return _id("worker", kid, boot, pid)


def waiting_id(job: str, shard: int, attempt: int) -> str:
    """Of a shard that no worker has yet."""
    return _id("waiting", job, shard, attempt)


def named(nodes: tuple[m.NodeInfo, ...], listed: m.Processes) -> dict[str, m.Process]:
    """Every process by its id, idle workers included, in order of nodes."""
    by_alias = {node.alias: node for node in nodes}
    found: dict[str, m.Process] = {}
    for process in listed.processes:
        node = by_alias.get(process.node)
        if node is None or not process.pid:
            found[waiting_id(process.job, process.shard, process.attempt)] = process
        else:
            found[worker_id(node.kid, node.boot, process.pid)] = process
    for node in nodes:
        for pid in node.workers:
            idle = m.Process(node.alias, -1, pid, "", 0, 0, 0, 0, 0.0, "", IDLE)
            found.setdefault(worker_id(node.kid, node.boot, pid), idle)
    return dict(sorted(found.items(), key=lambda each: (each[1].node, each[1].pid, each[0])))


def processes(client: Client, warn: Warn) -> dict[str, m.Process]:
    """What runs, by id. The workers and what they compute are two questions, put at once."""

    async def ask() -> list[Any]:
        questions = (m.AllNodes(), m.AllProcesses())
        return await asyncio.gather(*map(client.connection.request, questions))

    nodes, listed = client.connection.call(ask())
    silent_warning(warn, listed.silent)
    return named(nodes.nodes, listed)


# -- tables ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Table:
    """`columns`: in order, for CSV; a dot reaches into a nested value."""

    columns: tuple[str, ...]
    rows: Callable[[Client, Warn], list[dict[str, Any]]]


def _nodes(client: Client, warn: Warn) -> list[dict[str, Any]]:
    return [node_dict(node) for node in client.nodes()]


def _jobs(client: Client, warn: Warn) -> list[dict[str, Any]]:
    found = client.jobs()
    silent_warning(warn, found.silent)
    return [job_dict(job) for job in found.jobs]


def _processes(client: Client, warn: Warn) -> list[dict[str, Any]]:
    return [process_dict(name, each) for name, each in processes(client, warn).items()]


def _globals(client: Client, warn: Warn) -> list[dict[str, Any]]:
    from manifold.shells.namespace.values import reading_dict
    from manifold.shells.sdk.globals_calls import FOLDER
    from manifold.shells.sdk.registers import TIMEOUT_S

    items = client.calls_of_globals.items(FOLDER, TIMEOUT_S, False)
    found, _ = client.connection.call(items)
    return [reading_dict(key, reading) for key, reading in found]


def _voters(client: Client, warn: Warn) -> list[dict[str, Any]]:
    from manifold.shells.sdk.voters import look, rows_of

    return rows_of(look(client))


def _log(client: Client, warn: Warn) -> list[dict[str, Any]]:
    return [{"node": alias, "line": line} for alias, line in Logs(client, warn=warn).more()]


LOAD = ("queued_gas", "slots", "free_slots", "credits", "gas_per_s")

TABLES: dict[str, Table] = {
    "nodes": Table(
        ("alias", "id", "class", "state", "pid", "boot", "address", "cores", "compute",
         "memory_bytes", "gpu", "alive", "uptime_ms", "throttle", "workers",
         "labels", *(f"load.{name}" for name in LOAD), "bad_messages"),
        _nodes,
    ),
    "jobs": Table(
        ("job", "state", "program", "name", "owner", "done", "total", "reduce", "elapsed_ms",
         "shards", "retries", "error.code", "error.message"),
        _jobs,
    ),
    "processes": Table(
        ("id", "node", "slot", "pid", "state", "job", "shard", "attempt", "program",
         "running_ms"),
        _processes,
    ),
    "globals": Table(("name", "value", "type", "version", "strength"), _globals),
    "voters": Table(
        ("alias", "id", "state", "votes", "keys", "epoch", "stopped", "note",
         "groups.site", "groups.rack", "groups.org"),
        _voters,
    ),
    "log": Table(("node", "line"), _log),
}  # fmt: skip
