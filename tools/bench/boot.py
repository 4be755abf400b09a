"""Sixteen nodes up and converged, against a bare forkserver and against Dask's LocalCluster.

Converged: every node sees sixteen alive. Memory is the proportional set size of the node processes.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time
from pathlib import Path

from manifold.kernel.config import load
from manifold.tools.bench import peers
from manifold.tools.bench.harness import Absent, Figure, interleave
from manifold.tools.bench.scratch import environment
from manifold.tools.emulator import cluster
from manifold.tools.emulator.supervisor import PRELOAD, Supervisor

NODES = 16
CONVERGE_S = 60.0

# The least that sixteen processes with the same imports cost: started, and each said so.
BARE = """
import multiprocessing, sys, time

def ready(pipe):
    pipe.send(1)
    pipe.recv()

if __name__ == "__main__":
    began = time.perf_counter()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(sys.argv[2:])
    pairs = [context.Pipe() for _ in range(int(sys.argv[1]))]
    children = [context.Process(target=ready, args=(far,)) for _, far in pairs]
    for child in children:
        child.start()
    for near, _ in pairs:
        near.recv()
    print(time.perf_counter() - began)
    for near, _ in pairs:
        near.send(0)
    for child in children:
        child.join()
"""


def pss_bytes(pid: int) -> int:
    """The proportional set size of a process: shared pages are divided among who shares them."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    assert found is not None, "the kernel says so of every process"
    return int(found[1]) * 1024


class Boots:
    """Boots of the default cluster, each in a folder of its own; remembers memory."""

    def __init__(self) -> None:
        self.pss_mb = 0.0

    def __call__(self) -> float:
        with environment() as environ:
            return asyncio.run(self._boot(environ))

    async def _boot(self, environ: dict[str, str]) -> float:
        config = load(None, {}, {"cluster": environ["MANIFOLD_CLUSTER"]})
        began = time.perf_counter()
        supervisor = await cluster.up(config, NODES, environ, lambda _: None)
        try:
            if not await supervisor.converged(CONVERGE_S):
                raise Absent(f"{NODES} nodes did not converge within {CONVERGE_S:g} s.")
            seconds = time.perf_counter() - began
            self.pss_mb = _mean_pss_mb(supervisor)
        finally:
            await supervisor.stop()
        return seconds


def _mean_pss_mb(supervisor: Supervisor) -> float:
    sizes = [pss_bytes(node.pid) for node in supervisor.nodes.values()]
    return sum(sizes) / len(sizes) / 1e6


def bare_forkserver(nodes: int = NODES) -> float:
    """Seconds in which multiprocessing's forkserver starts as many processes, imports included."""
    with environment() as environ:
        script = Path(environ["MANIFOLD_STATE_HOME"]).parent / "bare.py"
        script.write_text(BARE)
        command = [sys.executable, str(script), str(nodes), *PRELOAD]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout)


def run(quick: bool = False) -> list[Figure]:
    """Seconds, the ratio to a bare forkserver, megabytes a node, and Dask beside it."""
    boots = Boots()
    pair = interleave(boots, bare_forkserver, 2 if quick else 5)
    figures = [
        Figure("16 nodes converged", pair.a, 1.0, "lower", "s"),
        Figure(
            "boot / bare forkserver", pair.ratio, 2.0, "lower", "x",
            pair.raw("boot", "forkserver"), "the forkserver opens no socket and joins nothing",
        ),
        Figure("memory of a node", boots.pss_mb, 12.0, "lower", "MB PSS"),
    ]  # fmt: skip
    try:
        dask = peers.noop("dask", tasks=10, trips=5)
    except Absent as reason:
        figures.append(Figure("boot / Dask LocalCluster(2)", float("nan"), None, "lower", "x",
                              note=str(reason)))  # fmt: skip
        return figures
    figures.append(
        Figure(
            "boot / Dask LocalCluster(2)", pair.a / dask.boot_s, None, "lower", "x",
            {"Dask s": dask.boot_s},
        )
    )  # fmt: skip
    return figures
