"""What a cluster of sixteen nodes that does nothing costs, in processor time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

import psutil

from manifold.tools.bench.harness import Figure
from manifold.tools.bench.scratch import environment
from manifold.tools.emulator.testing import TestCluster

NODES = 16
SETTLE_S = 3.0  # news of the boot is still gossiped


def cpu_s(pids: Iterable[int]) -> float:
    """Processor time used so far by processes, user and system, their threads included."""
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return sum(each.user + each.system for each in times)


def run(quick: bool = False) -> list[Figure]:
    """Per cent of one core, of all node processes and the zygote together."""
    window_s = 10.0 if quick else 30.0
    with environment() as environ:
        cluster = TestCluster(NODES, environ)
        try:
            pids = [cluster.pid(alias) for alias in cluster.aliases]
            pids.append(psutil.Process(pids[0]).ppid())
            threading.Event().wait(SETTLE_S)
            began, used = time.perf_counter(), cpu_s(pids)
            threading.Event().wait(window_s)
            seconds, used = time.perf_counter() - began, cpu_s(pids) - used
            deaths = sum("alive -> suspect" in cluster.logs(alias) for alias in cluster.aliases)
        finally:
            cluster.close()
    return [
        Figure(
            f"idle cluster of {NODES}", 100 * used / seconds, 5.0, "lower", "% of one core",
            {"cpu s": used, "window s": seconds},
        ),
        Figure("nodes that suspected another", float(deaths), 0.0, "lower", "nodes"),
    ]  # fmt: skip
