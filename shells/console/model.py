"""What is known of a cluster, learnt from observations; pure.

Interface rules: `observe` turns one look into the events that it amounts to and applies them;
`apply` applies one, as a replay does. Nothing here asks what time it is.
Invariants: M1 a model that applies the events of another ends up equal to it. M2 what is known
stays when the cluster is lost; only its age grows. M3 everything kept is bounded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from manifold.kernel.messages import NodeInfo, Process
from manifold.kernel.scheduler.messages import JobStatus
from manifold.shells.console import messages as e

HISTORY_MAX = 240  # samples of a sparkline: four minutes at a look a second, wider than any screen
LOG_LINES_MAX = 5_000  # merged, of 200 bytes: 1 MB; older ones are read from the files
MOVES_MAX = 512  # shards shown on their way at once; a map of 64 nodes is a blur long before
START_SLACK_MS = 2_000  # a start computed from an uptime jitters by what the answer took
FREE_MEMORY_UNKNOWN = 1 << 60  # the default of a load report


class Observation(msgspec.Struct, frozen=True):
    """One look at a cluster. None: it was not looked at."""

    nodes: tuple[NodeInfo, ...] | None = None
    jobs: tuple[JobStatus, ...] | None = None
    processes: tuple[Process, ...] | None = None
    silent: tuple[str, ...] = ()


@dataclass(slots=True)
class Model:
    """See the module. Dictionaries keep the order in which things were first seen."""

    nodes: dict[str, e.Node] = field(default_factory=dict)  # by KID
    loads: dict[str, e.Load] = field(default_factory=dict)
    busy: dict[str, deque[float]] = field(default_factory=dict)  # share of slots, per look
    jobs: dict[str, e.Job] = field(default_factory=dict)
    progress: dict[str, e.Progress] = field(default_factory=dict)
    rates: dict[str, deque[float]] = field(default_factory=dict)  # indices/s, per look
    runs: dict[str, tuple[e.Run, ...]] = field(default_factory=dict)  # by alias
    logs: deque[tuple[str, str]] = field(default_factory=lambda: deque(maxlen=LOG_LINES_MAX))
    log_numbers: dict[str, int] = field(default_factory=dict)
    moves: deque[e.Moved] = field(default_factory=lambda: deque(maxlen=MOVES_MAX))
    agreement: e.Agreement | None = None
    attached: e.Attached | None = None
    lost: e.Lost | None = None
    looked_ms: int = 0
    silent: tuple[str, ...] = ()
    _counted: dict[str, tuple[int, int]] = field(default_factory=dict)  # job: (at_ms, done)

    # -- learning -----------------------------------------------------------------------------

    def observe(self, seen: Observation, now_ms: int) -> list[e.Event]:
        """The events that `seen` amounts to; they have been applied."""
        events: list[e.Event] = []
        if seen.nodes is not None:
            events += self._nodes(seen.nodes, now_ms)
        if seen.jobs is not None:
            events += self._jobs(seen.jobs, now_ms, whole=not seen.silent)
        if seen.processes is not None:
            events += self._processes(seen.processes, now_ms, seen.silent)
        events.append(e.Looked(now_ms, seen.silent))
        for event in events:
            self.apply(event)
        return events

    def _nodes(self, nodes: Sequence[NodeInfo], now_ms: int) -> Iterable[e.Event]:
        for info in nodes:
            node, load = self._node(info, now_ms), _load(info)
            if node != self.nodes.get(node.kid):
                yield e.NodeIs(now_ms, node)
            answered = info.pid > 0  # else it is silent, and what it said stays
            if answered and load != self.loads.get(node.kid, e.Load()):
                yield e.NodeDoes(now_ms, node.kid, load)
        for kid in self.nodes.keys() - {info.kid for info in nodes}:
            yield e.NodeGone(now_ms, kid)

    def _node(self, info: NodeInfo, now_ms: int) -> e.Node:
        known = self.nodes.get(info.kid)
        started_ms = now_ms - round(info.uptime_ms) if info.pid else 0
        pid, boot = info.pid, info.boot
        if known is not None:
            if abs(known.started_ms - started_ms) < START_SLACK_MS:
                started_ms = known.started_ms
            if not pid and boot == known.boot:  # silent: what it said stays
                pid, started_ms = known.pid, known.started_ms
        return e.Node(
            info.kid, info.alias, info.node_class, info.state, pid, boot, info.cores,
            info.compute, info.memory_bytes, info.gpu, info.alive, started_ms, info.throttle,
            info.bad_messages, info.labels,
        )  # fmt: skip

    def _jobs(self, jobs: Sequence[JobStatus], now_ms: int, whole: bool) -> Iterable[e.Event]:
        """Where somebody was silent (not `whole`), a job that nobody told of is not forgotten."""
        seen: dict[str, JobStatus] = {}
        for status in jobs:  # two nodes may tell of one that was taken over: who runs it knows
            if status.job not in seen or status.state == "running":
                seen[status.job] = status
        for status in seen.values():
            job, progress = self._job(status, now_ms), _progress(status)
            if job != self.jobs.get(status.job):
                yield e.JobIs(now_ms, job)
            if progress != self.progress.get(status.job):
                yield e.JobDoes(now_ms, status.job, progress)
        if whole:
            for job_id in self.jobs.keys() - seen.keys():
                yield e.JobGone(now_ms, job_id)

    def _job(self, status: JobStatus, now_ms: int) -> e.Job:
        known = self.jobs.get(status.job)
        started_ms = now_ms - round(status.elapsed_ms)
        if known is not None and (
            status.state != "running" or abs(known.started_ms - started_ms) < START_SLACK_MS
        ):
            started_ms = known.started_ms
        return e.Job(
            status.job, status.state, status.program, status.name, status.owner, status.total,
            status.reduce, started_ms, status.fault.message if status.fault else "",
        )  # fmt: skip

    def _processes(
        self, processes: Sequence[Process], now_ms: int, silent: Sequence[str]
    ) -> Iterable[e.Event]:
        found: dict[str, list[e.Run]] = {}
        for each in processes:
            found.setdefault(each.node, []).append(self._run(each, now_ms))
        before = {(run.job, run.shard): alias for alias, runs in self.runs.items() for run in runs}
        for alias in {**self.runs, **found}:
            runs = tuple(found.get(alias, ()))
            if runs != self.runs.get(alias, ()) and alias not in silent:
                yield e.NodeRuns(now_ms, alias, runs)
        for alias, each_runs in found.items():
            for run in each_runs:
                source = before.get((run.job, run.shard))
                if source != alias:
                    yield e.Moved(now_ms, run.job, run.shard, source or "", alias)

    def _run(self, each: Process, now_ms: int) -> e.Run:
        since_ms = now_ms - round(each.running_ms) if each.slot >= 0 else 0
        for known in self.runs.get(each.node, ()):
            if (known.job, known.shard, known.slot) == (each.job, each.shard, each.slot) and abs(
                known.since_ms - since_ms
            ) < START_SLACK_MS:
                since_ms = known.since_ms
        return e.Run(
            each.job, each.shard, each.attempt, each.slot, each.pid, each.first, each.last,
            since_ms, each.program,
        )  # fmt: skip

    # -- applying -----------------------------------------------------------------------------

    def apply(self, event: e.Event) -> None:
        """Learn one event."""
        match event:
            case e.Attached():
                self.attached, self.lost = event, None
            case e.Lost():
                self.lost = event
            case e.Agreement():
                self.agreement = event
            case e.NodeIs(node=node):
                self.nodes[node.kid] = node
                self.busy.setdefault(node.kid, deque(maxlen=HISTORY_MAX))
            case e.NodeDoes(kid=kid, load=load):
                self.loads[kid] = load
            case e.NodeGone(kid=kid):
                gone = self.nodes.pop(kid, None)
                self.loads.pop(kid, None)
                self.busy.pop(kid, None)
                if gone is not None and self.find(gone.alias) is None:
                    self.runs.pop(gone.alias, None)
                    self.log_numbers.pop(gone.alias, None)
            case e.JobIs(job=job):
                self.jobs[job.job] = job
                self.rates.setdefault(job.job, deque(maxlen=HISTORY_MAX))
            case e.JobDoes(job=job_id, progress=progress):
                self.progress[job_id] = progress
            case e.JobGone(job=job_id):
                for table in (self.jobs, self.progress, self.rates, self._counted):
                    table.pop(job_id, None)
            case e.NodeRuns(node=alias, runs=runs):
                self.runs[alias] = runs
            case e.Moved():
                self.moves.append(event)
            case e.Logged():
                self.log_numbers.update(event.numbers)
                self.logs.extend(event.lines)
            case e.Looked():
                self._looked(event)

    def _looked(self, event: e.Looked) -> None:
        self.looked_ms, self.silent = event.at_ms, event.silent
        for kid, history in self.busy.items():
            history.append(self.share(kid))
        for job_id, rates in self.rates.items():
            done = self.progress.get(job_id, e.Progress()).done
            at_ms, before = self._counted.get(job_id, (event.at_ms, done))
            self._counted[job_id] = (event.at_ms, done)
            if self.jobs[job_id].state == "running" and event.at_ms > at_ms:
                rates.append(max(0, done - before) * 1000 / (event.at_ms - at_ms))

    # -- asking -------------------------------------------------------------------------------

    def find(self, alias: str) -> e.Node | None:
        """A node by its alias; the living one where two have had it."""
        found = [node for node in self.nodes.values() if node.alias == alias]
        return min(found, key=lambda node: node.state != "ready", default=None)

    def name(self, kid: str) -> str:
        """A node's alias, or the beginning of its KID."""
        node = self.nodes.get(kid)
        return node.alias if node is not None else kid[:10]

    def share(self, kid: str) -> float:
        """How much of a node is busy, 0 to 1; 0 where it is not ready."""
        node, load = self.nodes.get(kid), self.loads.get(kid)
        if node is None or load is None or node.state != "ready" or not node.cores:
            return 0.0
        return min(1.0, load.busy / node.cores)

    def count(self, state: str) -> int:
        return sum(node.state == state for node in self.nodes.values())

    def slots(self) -> tuple[int, int]:
        """Busy ones, and all, of nodes that are ready."""
        ready = [node for node in self.nodes.values() if node.state == "ready"]
        busy = sum(self.loads.get(node.kid, e.Load()).busy for node in ready)
        return busy, sum(node.cores for node in ready)

    def running(self) -> list[e.Job]:
        return [job for job in self.jobs.values() if job.state == "running"]

    def total_busy(self) -> list[float]:
        """The history of the whole cluster's load, the newest last: slots weigh their number."""
        histories = [
            (self.nodes[kid].cores, list(history))
            for kid, history in self.busy.items()
            if kid in self.nodes and history
        ]
        longest = max((len(history) for _, history in histories), default=0)
        found = []
        for back in range(longest, 0, -1):
            here = [(cores, h[-back]) for cores, h in histories if len(h) >= back]
            weight = sum(cores for cores, _ in here)
            found.append(sum(c * share for c, share in here) / weight if weight else 0.0)
        return found

    def shards(self, job_id: str) -> list[tuple[str, e.Run]]:
        """Where the shards of a job are now."""
        return [(a, run) for a, runs in self.runs.items() for run in runs if run.job == job_id]

    def age_ms(self, now_ms: int) -> int:
        """How old what is known is."""
        return max(0, now_ms - self.looked_ms) if self.looked_ms else 0


def _load(info: NodeInfo) -> e.Load:
    load = info.load
    if load is None:
        return e.Load()
    free = load.free_memory_bytes
    return e.Load(
        load.slots - load.free_slots, round(load.queued_gas), round(load.gas_per_s),
        len(info.workers), free if free < FREE_MEMORY_UNKNOWN else -1,
    )  # fmt: skip


def _progress(status: JobStatus) -> e.Progress:
    return e.Progress(status.done, status.shards, status.retries, round(status.elapsed_ms))
