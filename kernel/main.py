"""Boot of a node, in order: one screen, one line per subsystem.

Interface: `boot` is the zygote's entry point; everything it needs is in the `NodeSpec`.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
from pathlib import Path

import msgspec
import uvloop

from manifold.kernel import netns
from manifold.kernel.errors import ManifoldError, ProtocolError
from manifold.kernel.logbook import Logbook
from manifold.kernel.node import serve
from manifold.kernel.nodespec import NodeSpec

GC_THRESHOLD = 20_000  # objects; Python's 700 would collect several times in a short task
SWITCH_S = 0.0005  # a thread that comes back from a sync is not to wait for the loop's 5 ms
_spec_decoder = msgspec.msgpack.Decoder(NodeSpec)  # made once, in the zygote


def boot(payload: bytes, fds: list[int], liveness_fd: int) -> None:
    """Become the node that `payload` describes; `fds` are the channel to the supervisor and, where
    the node has a network of its own, that."""
    spec = _spec_decoder.decode(payload)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # before the loop is up: just end
    sys.setswitchinterval(SWITCH_S)
    gc.set_threshold(GC_THRESHOLD)  # what was imported is frozen; the rest makes few cycles
    logbook = open_log(spec)  # what happens from here on is on record
    control = socket.socket(fileno=fds[0])  # the supervisor's commands
    if spec.line:
        enter_network(fds[1:])
    # identity and boot number, membership, geode, scheduler, hyperbus, workers: `Node`
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            status = runner.run(serve(spec, control, liveness_fd, logbook))
    except ManifoldError as error:  # a damaged record, a folder that is not ours
        logging.getLogger("manifold.main").critical("does not come up: %s", error)
        raise  # to console.log, where the supervisor looks for the reason
    finally:
        logging.shutdown()
    sys.exit(status)


def enter_network(fds: list[int]) -> None:
    """The namespace that was given: outside of one, lines that are not sealed are not served."""
    if len(fds) != 1:
        raise ProtocolError("A node with a TCP line was started without a network namespace.")
    netns.enter(fds[0])
    os.close(fds[0])


def open_log(spec: NodeSpec) -> Logbook:
    """The log file and its ring; what the process prints itself goes to `console.log`."""
    folder = Path(spec.state_dir)
    logbook = Logbook(folder / "node.log")
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(logbook)
    console = os.open(folder / "console.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(console, 1)
    os.dup2(console, 2)
    os.close(console)
    return logbook
