"""The console: from a key to the frame that shows it at 64 nodes, and its idle cost at 16.

Both run the real program on a terminal of ours. The 64 nodes are a recording made here, in which
every node's load changes once a second; the 16 are a real cluster.
"""

from __future__ import annotations

import fcntl
import os
import pty
import random
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

from manifold.shells.console import messages as e
from manifold.shells.console.recording import Recorder
from manifold.tools.bench.harness import Absent, Figure, percentile
from manifold.tools.bench.scratch import environment
from manifold.tools.emulator.testing import TestCluster

KEY_NODES = 64
IDLE_NODES = 16
LOOKS = 600  # seconds of the recording: longer than the benchmark takes
COLUMNS, ROWS = 120, 75  # every node has a row
START_S = 30.0
FRAME_S = 5.0
BETWEEN_S = 0.05  # keys of somebody who types fast; not a multiple of any timer of the console
SETTLE_S = 5.0


class Screen:
    """The program on a terminal: what it writes is read, and kept since the last key."""

    def __init__(self, process: subprocess.Popen[bytes], terminal: int) -> None:
        self.process = process
        self._terminal = terminal

    def key(self, key: str) -> None:
        os.write(self._terminal, key.encode())

    def wait_for(self, text: str, timeout_s: float) -> None:
        """Read until `text` was written."""
        seen = b""
        deadline_s = time.perf_counter() + timeout_s
        while text.encode() not in seen:
            left_s = deadline_s - time.perf_counter()
            if left_s <= 0 or not select.select([self._terminal], [], [], left_s)[0]:
                raise Absent(f"The console did not show {text!r} within {timeout_s:g} s.")
            seen += os.read(self._terminal, 1 << 16)

    def drain(self, seconds: float) -> int:
        """Read whatever it writes for so long; how many bytes."""
        count = 0
        deadline_s = time.perf_counter() + seconds
        while (left_s := deadline_s - time.perf_counter()) > 0:
            if select.select([self._terminal], [], [], left_s)[0]:
                count += len(os.read(self._terminal, 1 << 16))
        return count


@contextmanager
def screen(arguments: list[str], environ: Mapping[str, str]) -> Iterator[Screen]:
    """Run `manifold …` on a terminal of `COLUMNS` by `ROWS`."""
    terminal, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "manifold", *arguments], stdin=other, stdout=other, stderr=other,
        env=dict(environ) | {"TERM": "xterm-256color", "COLORTERM": "truecolor"},
        start_new_session=True,
    )  # fmt: skip
    os.close(other)
    try:
        yield Screen(process, terminal)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
        os.close(terminal)


def recording(path: Path) -> None:
    """A session of `KEY_NODES` nodes whose loads all change once a second."""
    chance = random.Random(64)
    recorder = Recorder(path, "model", 0)
    nodes = [
        e.Node(
            f"K-{at:032x}", f"node-{at:02}", f"kind-{at % 4}", "ready", 1000 + at, 1, 4,
            0.25 * (1 + at % 4), 1 << (29 + at % 4), False, KEY_NODES, 1,
        )
        for at in range(KEY_NODES)
    ]  # fmt: skip
    recorder.write([e.Attached(0, "model", nodes[0].alias, "")])
    recorder.write([e.NodeIs(0, node) for node in nodes])
    for second in range(LOOKS):
        at_ms = second * 1000
        loads = [e.Load(chance.randint(0, 4), chance.random() * 1e9, 1e8, 4) for _ in nodes]
        recorder.write([e.NodeDoes(at_ms, n.kid, x) for n, x in zip(nodes, loads, strict=True)])
        recorder.write([e.Looked(at_ms)])
    recorder.close()


def key_to_paint_s(environ: Mapping[str, str], keys: int) -> list[float]:
    """Seconds from writing a key to having read the row that it chooses."""
    path = Path(environ["MANIFOLD_STATE_HOME"]).parent / "session.jsonl"
    recording(path)
    found = []
    with screen(["replay", str(path)], environ) as console:
        console.wait_for(f"node-{KEY_NODES - 1:02}", START_S)
        console.drain(1.0)
        at, way = 0, 1
        for _ in range(keys):
            console.drain(BETWEEN_S)
            if not 0 <= at + way < KEY_NODES:
                way = -way
            at += way
            began = time.perf_counter()
            console.key("j" if way > 0 else "k")
            console.wait_for(f"node-{at:02}", FRAME_S)
            found.append(time.perf_counter() - began)
    return found


def idle_cpu(environ: Mapping[str, str], pane: str, window_s: float) -> float:
    """Per cent of a core: the console, its threads and the warm parent of its verbs."""
    with screen(["console", "--pane", pane], environ) as console:
        console.wait_for(f"/{IDLE_NODES} nodes", START_S)
        console.drain(SETTLE_S)
        root = psutil.Process(console.process.pid)
        processes = [root, *root.children(recursive=True)]
        began, used = time.perf_counter(), _cpu_s(processes)
        console.drain(window_s)
        return 100 * (_cpu_s(processes) - used) / (time.perf_counter() - began)


def _cpu_s(processes: list[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return sum(each.user + each.system for each in times)


def run(quick: bool = False) -> list[Figure]:
    """Milliseconds from key to frame, and per cent of a core when idle."""
    with environment() as environ:
        paints = key_to_paint_s(environ, 50 if quick else 300)
    window_s = 10.0 if quick else 30.0
    with environment() as environ:
        cluster = TestCluster(IDLE_NODES, environ)
        try:
            threading.Event().wait(SETTLE_S)
            idle = {pane: idle_cpu(environ, pane, window_s) for pane in ("shell", "nodes", "map")}
        finally:
            cluster.close()
    return [
        Figure(
            f"key to paint at {KEY_NODES} nodes", percentile(paints, 99) * 1000, 50.0, "lower",
            "ms (p99)",
            {"p50 ms": percentile(paints, 50) * 1000, "worst ms": max(paints) * 1000,
             "keys": float(len(paints))},
            "the real program; the nodes are a recording: every load changes each second",
        ),
        Figure(
            f"idle console at {IDLE_NODES} nodes", max(idle.values()), 3.0, "lower",
            "% of one core", {f"{pane} %": value for pane, value in idle.items()},
            "the real program on a real cluster; the worst of the panes",
        ),
    ]  # fmt: skip
