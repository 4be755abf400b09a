"""The table of a node's metrics: every name with its kind, unit and meaning. Pure data.

Interface rules: names follow OpenMetrics: base units, the unit last, `_total` added when a counter
is written. `Histogram` and `Tally` are what a node counts as it runs; the rest is read when asked.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

from manifold.kernel.observe.messages import Family, Kind, Sample
from manifold.kernel.observe.render import number

# Name: (kind, unit, help). The order is that of the text.
DEFINITIONS: dict[str, tuple[Kind, str, str]] = {
    "manifold_node": ("info", "", "Who the node is."),
    "manifold_node_uptime_seconds": ("gauge", "seconds", "Time since its process began to serve."),
    "manifold_node_boots": ("counter", "", "Processes the node has had, this one included."),
    "manifold_process_cpu_seconds": ("counter", "seconds", "Processor time of the node's process."),
    "manifold_process_resident_memory_bytes": ("gauge", "bytes", "Resident memory of the process."),
    "manifold_process_open_fds": ("gauge", "", "Open descriptors."),
    "manifold_process_max_fds": ("gauge", "", "The most descriptors it may open."),
    "manifold_process_threads": ("gauge", "", "Threads of the process."),
    "manifold_process_storage_written_bytes": (
        "counter", "bytes", "Bytes the process has caused to be written to storage."),
    "manifold_loop_lag_seconds": (
        "histogram", "seconds", "How late timers of the event loop were."),
    "manifold_bus_frames_sent": ("counter", "", "Frames that left for nodes and clients."),
    "manifold_bus_frames_received": ("counter", "", "Frames that came."),
    "manifold_bus_sent_bytes": ("counter", "bytes", "Bytes of the frames that left."),
    "manifold_bus_received_bytes": ("counter", "bytes", "Bytes of the frames that came."),
    "manifold_bus_frames_lost": (
        "counter", "", "Frames that were cut or lost by a rule of a link, dropped, torn or lost."),
    "manifold_bus_bad_messages": ("counter", "", "Inputs that did not decode or did not belong."),
    "manifold_bus_sends_dropped": ("counter", "", "Messages that could not be queued."),
    "manifold_bus_replies_dropped": ("counter", "", "Answers that could not be queued."),
    "manifold_bus_late_replies": ("counter", "", "Answers that came after their deadline."),
    "manifold_bus_connections_closed": ("counter", "", "Connections closed to make room."),
    "manifold_bus_peers": ("gauge", "", "Nodes and clients that are dialed."),
    "manifold_bus_clients": ("gauge", "", "Clients that are attached."),
    "manifold_bus_requests_in_flight": ("gauge", "", "Requests that wait for an answer."),
    "manifold_bus_queued_bytes": ("gauge", "bytes", "Bytes that wait for a socket."),
    "manifold_members": ("gauge", "", "Members of the cluster as this node sees them, by state."),
    "manifold_scheduler_slots": ("gauge", "", "Slots of this node: one program runs in each."),
    "manifold_scheduler_slots_free": ("gauge", "", "Slots that nothing runs in or waits for."),
    "manifold_scheduler_credits": ("gauge", "", "Shards that would be admitted now."),
    "manifold_scheduler_slot_gas_per_second": ("gauge", "", "Measured speed of a slot; 0: none."),
    "manifold_scheduler_attempts": ("gauge", "", "Attempts of shards held here, by state."),
    "manifold_scheduler_runs": ("counter", "", "Runs that were given to a slot."),
    "manifold_scheduler_jobs_running": ("gauge", "", "Jobs that this node owns and that run."),
    "manifold_scheduler_jobs_kept": ("gauge", "", "Ended jobs kept for clients that ask."),
    "manifold_scheduler_jobs_submitted": ("counter", "", "Jobs submitted to this node."),
    "manifold_scheduler_jobs_ended": ("counter", "", "Jobs that ended here, by how."),
    "manifold_scheduler_jobs_taken_over": ("counter", "", "Jobs taken over from other owners."),
    "manifold_scheduler_shards": ("counter", "", "Shards this node has assigned, as an owner."),
    "manifold_scheduler_retries": ("counter", "", "Shards that were lost and assigned again."),
    "manifold_scheduler_results_bytes": ("gauge", "bytes", "Arguments and results held."),
    "manifold_workers": ("gauge", "", "Worker processes: of programs, and of Python calls."),
    "manifold_workers_resident_memory_bytes": ("gauge", "bytes", "Resident memory of all workers."),
    "manifold_workers_lost": ("counter", "", "Runs whose process ended under them."),
    "manifold_nexus_voters": ("gauge", "", "Voters of the configuration known here."),
    "manifold_nexus_votes": ("gauge", "", "1 where this node votes."),
    "manifold_nexus_epoch": ("gauge", "", "How often the voters changed, as known here."),
    "manifold_nexus_keys": ("gauge", "", "Registers this node holds as a voter."),
    "manifold_nexus_operations": ("gauge", "", "Operations this node is carrying out."),
    "manifold_nexus_waiting": ("gauge", "", "Requests of clients not answered yet, and watches."),
    "manifold_nexus_commits": ("counter", "", "Batches of records made durable."),
    "manifold_nexus_syncs": ("counter", "", "Syncs of files and folders: what wears storage."),
    "manifold_nexus_commit_seconds": ("histogram", "seconds", "Time to make a batch durable."),
    "manifold_registry_epoch": ("gauge", "", "Epoch of the ring known here."),
    "manifold_registry_registrar": ("gauge", "", "1 where this node keeps the ring."),
    "manifold_http_requests": ("counter", "", "Requests to the HTTP server of the metrics."),
    "manifold_log_messages": ("counter", "", "Lines logged, by level, from INFO up."),
    "manifold_profiles": ("counter", "", "Profiles that were taken of this node."),
}  # fmt: skip

LAG_S = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)  # 0.2: above it none is accused
COMMIT_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.2, 1.0)  # an SSD, an SD card


class Histogram:
    """Counts of observations, by upper bound."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def samples(self) -> tuple[Sample, ...]:
        """Cumulative buckets, the sum and the count."""
        found, below = [], 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            below += count
            edge = "+Inf" if bound == float("inf") else number(bound)
            found.append(Sample(float(below), (("le", edge),), "_bucket"))
        return (*found, Sample(self.sum, (), "_sum"), Sample(float(below), (), "_count"))


class Tally:
    """What a node counts as it runs, beside what its parts count themselves."""

    def __init__(self) -> None:
        self.lag = Histogram(LAG_S)
        self.commit = Histogram(COMMIT_S)
        self.job_events: Counter[str] = Counter()  # by `JobEvent.what`, a small fixed set
        self.runs_lost = 0
        self.profiles = 0


def family(name: str, samples: tuple[Sample, ...]) -> Family:
    """`name` with what the table says of it."""
    kind, unit, text = DEFINITIONS[name]
    return Family(name, kind, unit, text, samples)
