"""A node's metrics, read from it when somebody asks.

Interface rules: `gather` runs on the loop's thread, changes nothing and takes, with its text, 0.4
ms; nothing is measured while nobody asks, but what a `Tally` counts. What the host does not tell is
left out.
"""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from manifold.kernel.membership.messages import State
from manifold.kernel.observe import families
from manifold.kernel.observe.messages import Family, Sample
from manifold.kernel.scheduler.messages import ATTEMPT_BITS
from manifold.vm.version import VERSION

if TYPE_CHECKING:
    from manifold.kernel.node import Node

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
STATES = ("alive", "suspect", "dead", "left")
ENDS = ("done", "failed", "cancelled")
LOST = ("cut", "dropped", "torn", "lost")

Values = dict[str, "float | tuple[Sample, ...]"]


def gather(node: Node) -> tuple[Family, ...]:
    """Every metric that has a value, in the order of the table."""
    found: Values = {}
    parts = (_node, _process, _bus, _cluster, _runner, _owner, _workers, _nexus, _observe)
    for part in parts:
        found |= part(node)
    assert found.keys() <= families.DEFINITIONS.keys(), "the table has every name"
    return tuple(
        families.family(name, value if isinstance(value, tuple) else (Sample(float(value)),))
        for name in families.DEFINITIONS
        if (value := found.get(name)) is not None
    )


def _by(label: str, counts: Mapping[str, int], values: Iterable[str]) -> tuple[Sample, ...]:
    """One sample for each possible value of a label, also where nothing was counted."""
    return tuple(Sample(float(counts.get(each, 0)), ((label, each),)) for each in values)


def _node(node: Node) -> Values:
    spec = node.spec
    who = {
        "alias": spec.alias, "node_class": spec.node_class, "identity": node.identity.kid,
        "cluster_name": spec.config.cluster, "version": VERSION, "machine": os.uname().machine,
    }  # fmt: skip
    return {
        "manifold_node": (Sample(1.0, tuple(who.items())),),
        "manifold_node_uptime_seconds": (node.now_ms() - node.started_ms) / 1000,
        "manifold_node_boots": node.boot,
    }


def _process(node: Node) -> Values:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return {
        "manifold_process_cpu_seconds": time.process_time(),
        "manifold_process_max_fds": soft,
        "manifold_loop_lag_seconds": node.tally.lag.samples(),
        **_told("manifold_process_resident_memory_bytes", lambda: resident_bytes(os.getpid())),
        **_told("manifold_process_open_fds", lambda: len(os.listdir("/proc/self/fd"))),
        **_told("manifold_process_threads", lambda: len(os.listdir("/proc/self/task"))),
        **_told("manifold_process_storage_written_bytes", _written_bytes),
    }


def _told(name: str, look: Callable[[], float]) -> Values:
    """What `look` finds, nothing where the host does not tell.

    Not every kernel accounts for everything, and to look takes a descriptor, of which a node that
    is flooded with connections has none left.
    """
    with contextlib.suppress(OSError):
        return {name: look()}
    return {}


def _written_bytes() -> int:
    with open("/proc/self/io") as file:
        lines = dict(line.split(":") for line in file)
    return int(lines["write_bytes"])


def resident_bytes(pid: int) -> int:
    """Resident memory of a process, 0 where it is gone."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * PAGE_BYTES
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _bus(node: Node) -> Values:
    bus, counters = node.bus, node.bus.counters
    lost = {reason: counters[f"frames_{reason}"] for reason in LOST}
    return {
        "manifold_bus_frames_sent": counters["frames_sent"],
        "manifold_bus_frames_received": counters["frames_received"],
        "manifold_bus_sent_bytes": counters["bytes_sent"],
        "manifold_bus_received_bytes": counters["bytes_received"],
        "manifold_bus_frames_lost": _by("reason", lost, LOST),
        "manifold_bus_bad_messages": counters["bad"],
        "manifold_bus_sends_dropped": counters["sends_dropped"],
        "manifold_bus_replies_dropped": counters["replies_dropped"],
        "manifold_bus_late_replies": counters["late_replies"],
        "manifold_bus_connections_closed": counters["connections_closed"],
        "manifold_bus_peers": bus.dialed,
        "manifold_bus_clients": len(bus.clients()),
        "manifold_bus_requests_in_flight": bus.in_flight,
        "manifold_bus_queued_bytes": bus.queued_bytes,
    }


def _cluster(node: Node) -> Values:
    registry = node.core.registry
    states = Counter(State(each.state).name.lower() for each in node.core.membership.members())
    return {
        "manifold_members": _by("state", states, STATES),
        "manifold_registry_epoch": registry.epoch,
        "manifold_registry_registrar": registry.registrar,
    }


def _runner(node: Node) -> Values:
    runner = node.core.scheduler.runner
    load = runner.load()
    running, waiting = len(runner.running()), len(runner.waiting())
    attempts = {"running": running, "waiting": waiting, "ended": runner.held - running - waiting}
    return {
        "manifold_scheduler_slots": load.slots,
        "manifold_scheduler_slots_free": load.free_slots,
        "manifold_scheduler_credits": load.credits,
        "manifold_scheduler_slot_gas_per_second": load.gas_per_s,
        "manifold_scheduler_attempts": _by("state", attempts, attempts),
        "manifold_scheduler_runs": runner.runs,
    }


def _owner(node: Node) -> Values:
    owner, events = node.core.scheduler.owner, node.tally.job_events
    return {
        "manifold_scheduler_jobs_running": len(owner.jobs),
        "manifold_scheduler_jobs_kept": len(owner.shelf.jobs),
        "manifold_scheduler_jobs_submitted": events["submitted"],
        "manifold_scheduler_jobs_ended": _by("state", events, ENDS),
        "manifold_scheduler_jobs_taken_over": events["taken over"],
        "manifold_scheduler_shards": owner.drawn & ((1 << ATTEMPT_BITS) - 1),
        "manifold_scheduler_retries": events["retry"],
        "manifold_scheduler_results_bytes": owner.shelf.held_bytes,
    }


def _workers(node: Node) -> Values:
    programs, calls = tuple(node.pool.pids().values()), node.tasks.every_pid()
    workers = {"program": len(programs), "call": len(calls)}
    return {
        "manifold_workers": _by("kind", workers, workers),
        "manifold_workers_lost": node.tally.runs_lost,
        **_told(
            "manifold_workers_resident_memory_bytes",
            lambda: sum(map(resident_bytes, (*programs, *calls))),
        ),
    }


def _nexus(node: Node) -> Values:
    nexus, config = node.core.nexus, node.core.nexus.config
    return {
        "manifold_nexus_voters": len(config.kids()) if config is not None else 0,
        "manifold_nexus_votes": nexus.acceptor.votes,
        "manifold_nexus_epoch": config.count if config is not None else 0,
        "manifold_nexus_keys": len(nexus.acceptor.rows),
        "manifold_nexus_operations": nexus.proposer.operations,
        "manifold_nexus_waiting": node.consulting.waiting,
        "manifold_nexus_commits": node.commits.batches,
        "manifold_nexus_syncs": node.commits.syncs,
        "manifold_nexus_commit_seconds": node.tally.commit.samples(),
    }


def _observe(node: Node) -> Values:
    levels = node.logbook.levels
    return {
        "manifold_http_requests": node.observatory.http_requests(),
        "manifold_log_messages": _by("level", levels, levels),
        "manifold_profiles": node.tally.profiles,
    }
