"""How many nodes one host bears: seconds to converge, memory, threads, descriptors, idle time.

Clusters of 16, 32, 64 and 128 nodes of one core, each beside as many bare processes that a
forkserver starts with the same imports. When all nodes see each other they are counted and weighed,
left alone for a while, and given a job whose result is known. The share of each of the host's
limits that is used says what ends first; it grows in proportion to the nodes, but for the seconds.
Then a cluster grows from 4 nodes to 64 (16 with `--quick`) and back while jobs run: none may be
lost. None of the last four nodes is among the first.
"""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from manifold.kernel.errors import ManifoldError
from manifold.shells.sdk import Client
from manifold.tools.bench.boot import bare_forkserver, pss_bytes
from manifold.tools.bench.harness import Figure
from manifold.tools.bench.idle import cpu_s
from manifold.tools.bench.scratch import COLLATZ, environment, uniform
from manifold.tools.emulator.cluster import converge_s
from manifold.tools.emulator.testing import TestCluster

SIZES = (16, 32, 64, 128)
QUICK_SIZES = (16, 32)
BARE_NODES_MAX = 64  # more are more of the same
LAST = 300_001
STEPS_SUM = 35_669_725  # of Collatz's steps of 1 <= n < LAST, as a plain loop says too
SETTLE_S = 10.0  # news of the boot is still gossiped
WINDOW_S = 20.0
QUICK_WINDOW_S = 5.0
NODE_MB_GOAL = 16.0
LEAST, MOST, MOST_QUICK = 4, 64, 16  # nodes, of a cluster that grows and shrinks
REMOVE_S = 120.0  # until others vote: a host with 64 nodes that work is overloaded
# Emits its index after a pause: jobs of it take time, and leave the processor to the nodes.
PAUSING = """
.cells 1
    SLEEP 0.01
    LOAD 0
    EMIT
    HALT
"""
INDICES = 500


@dataclass(frozen=True, slots=True)
class Weighed:
    """What the processes of a cluster take, all together, and the greatest of them."""

    processes: int
    pss_mb: float
    threads: int
    descriptors: int
    descriptors_most: int


def weigh(pids: list[int]) -> Weighed:
    found = [psutil.Process(pid) for pid in pids]
    descriptors = [each.num_fds() for each in found]
    return Weighed(
        len(pids),
        sum(pss_bytes(pid) for pid in pids) / 1e6,
        sum(each.num_threads() for each in found),
        sum(descriptors),
        max(descriptors),
    )


def processes_of(cluster: TestCluster) -> list[int]:
    """The zygote, and everything that it has forked."""
    zygote = psutil.Process(cluster.pid(cluster.aliases[0])).parent()
    assert zygote is not None, "nodes are its children"
    return [zygote.pid, *(each.pid for each in zygote.children(recursive=True))]


@dataclass(frozen=True, slots=True)
class Limit:
    """One that the host has, and how much of it is used."""

    name: str
    used: float
    most: float

    @property
    def share(self) -> float:
        return self.used / self.most


def limits(weighed: Weighed, fork_limit: int) -> list[Limit]:
    """What may end first."""
    return [
        Limit("memory MB", weighed.pss_mb, psutil.virtual_memory().total / 1e6),
        Limit("threads", weighed.threads, _number("/proc/sys/kernel/threads-max")),
        Limit("process numbers", weighed.threads, _number("/proc/sys/kernel/pid_max")),
        Limit("open files", weighed.descriptors, _number("/proc/sys/fs/file-max")),
        Limit("descriptors of one node", weighed.descriptors_most, fork_limit),
    ]


def _number(path: str) -> float:
    return float(Path(path).read_text())


def descriptors_of(pid: int) -> int:
    """How many that process may have."""
    soft, _ = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    return soft


@dataclass(frozen=True, slots=True)
class Measured:
    nodes: int
    forked_s: float
    converged_s: float
    bare_s: float
    weighed: Weighed
    worked: Weighed  # with a worker on each node that had work
    idle_percent: float
    first_job_s: float
    second_job_s: float
    close_s: float
    limits: list[Limit]


def measure(nodes: int, window_s: float) -> Measured:
    """One cluster, from its start to its end."""
    with environment() as environ:
        file = Path(environ["MANIFOLD_STATE_HOME"]).parent / "manifold.yaml"
        file.write_text(f"classes:\n  node: {{count: {nodes}, cores: 1, compute: 1}}\n")
        bare_s = bare_forkserver(min(nodes, BARE_NODES_MAX))
        began = time.perf_counter()
        cluster = TestCluster(nodes, environ, config=file, converge=False)
        try:
            forked_s = time.perf_counter() - began
            cluster.wait_converged(converge_s(nodes))
            converged_s = time.perf_counter() - began
            threading.Event().wait(SETTLE_S)
            pids = processes_of(cluster)
            idle = _idle_percent(pids, window_s)
            weighed = weigh(pids)
            job = _job(cluster)
            first_s, second_s = job(), job()
            worked = weigh(processes_of(cluster))
            found = limits(worked, descriptors_of(cluster.pid(cluster.aliases[0])))
            began = time.perf_counter()
        finally:
            cluster.close()
        close_s = time.perf_counter() - began
    return Measured(
        nodes, forked_s, converged_s, bare_s, weighed, worked, idle, first_s, second_s, close_s,
        found,
    )  # fmt: skip


def _idle_percent(pids: list[int], window_s: float) -> float:
    began, used = time.perf_counter(), cpu_s(pids)
    threading.Event().wait(window_s)
    return 100 * (cpu_s(pids) - used) / (time.perf_counter() - began)


def _job(cluster: TestCluster) -> Callable[[], float]:
    client = cluster.client()

    def timed() -> float:
        began = time.perf_counter()
        total = client.parallel_for(COLLATZ, 1, LAST, reduce="sum")
        seconds = time.perf_counter() - began
        assert total == STEPS_SUM, total
        return seconds

    return timed


def figures(found: Measured) -> list[Figure]:
    """Of one size."""
    n, weighed, worked = found.nodes, found.weighed, found.worked
    scarce = max(found.limits, key=lambda limit: limit.share)
    bare = min(n, BARE_NODES_MAX)
    return [
        Figure(f"{n} nodes, start to converged", found.converged_s, None, "lower", "s",
               {"forked s": found.forked_s, "closed s": found.close_s}),
        Figure(f"{n} nodes, a node / a bare process",
               (found.converged_s / n) / (found.bare_s / bare), None, "lower", "x",
               {f"{bare} bare processes s": found.bare_s}),
        Figure(f"{n} nodes, memory of a node", weighed.pss_mb / n, NODE_MB_GOAL, "lower", "MB PSS",
               {"all, idle": weighed.pss_mb, "all, with workers": worked.pss_mb}),
        Figure(f"{n} nodes, idle", found.idle_percent, None, "lower", "% of one core"),
        Figure(f"{n} nodes, threads and descriptors of a node", weighed.threads / n, None, "lower",
               "threads", {"descriptors of a node": weighed.descriptors / n,
                           "most of any": weighed.descriptors_most, "threads": weighed.threads,
                           "descriptors": weighed.descriptors}),
        Figure(f"{n} nodes, a job", found.second_job_s, None, "lower", "s",
               {"the first time s": found.first_job_s, "processes then": worked.processes}),
        Figure(f"{n} nodes, share of the scarcest limit", scarce.share, 1.0, "lower", "",
               {each.name: f"{each.used:.0f} of {each.most:.0f}" for each in found.limits},
               f"the scarcest: {scarce.name}, which would last for {n / scarce.share:.0f} nodes"),
    ]  # fmt: skip


class Jobs:
    """Jobs one after the other, each with a known sum, until `stop`."""

    def __init__(self, cluster: TestCluster) -> None:
        self.done = 0
        self.lost: list[str] = []
        self._cluster = cluster
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def _work(self) -> None:
        with Client(self._cluster.name, environ=self._cluster.environ) as client:
            while not self._over.is_set():
                try:
                    found = client.parallel_for(PAUSING, 0, INDICES, reduce="sum")
                except ManifoldError as error:
                    self.lost.append(str(error))
                    continue
                if found != sum(range(INDICES)):
                    self.lost.append(f"the sum was {found}")
                self.done += 1

    def stop(self) -> None:
        self._over.set()
        self._thread.join()


def growth(most: int) -> list[Figure]:
    """From `LEAST` nodes to `most` and back, with jobs running throughout."""
    with uniform(LEAST) as cluster:
        first = list(cluster.aliases)
        jobs = Jobs(cluster)
        try:
            began = time.perf_counter()
            added = cluster.add("bench", most - LEAST)
            grown_s = time.perf_counter() - began
            began = time.perf_counter()
            cluster.remove(*first, *added[:-LEAST], timeout_s=REMOVE_S)
            shrunk_s = time.perf_counter() - began
            assert sorted(cluster.aliases) == sorted(added[-LEAST:]), cluster.aliases
        finally:
            jobs.stop()
    return [
        Figure(f"growth {LEAST} to {most} to {LEAST}, jobs lost", len(jobs.lost), 0.0, "lower", "",
               {"jobs done": jobs.done, "up s": grown_s, "down s": shrunk_s},
               "; ".join(jobs.lost[:3])),
        Figure(f"growth {LEAST} to {most}", grown_s, None, "lower", "s"),
        Figure(f"growth {most} to {LEAST}", shrunk_s, None, "lower", "s"),
    ]  # fmt: skip


def run(quick: bool = False) -> list[Figure]:
    """Of each size, with the host's limits; then of one that grows and shrinks."""
    window_s = QUICK_WINDOW_S if quick else WINDOW_S
    sizes = QUICK_SIZES if quick else SIZES
    found = [figure for nodes in sizes for figure in figures(measure(nodes, window_s))]
    return found + growth(MOST_QUICK if quick else MOST)
