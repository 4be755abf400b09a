"""A task process: calls Python functions of one session, one at a time, for one node.

Interface rules: forked by the zygote and leader of a process group of its own; its only connection
is the channel to its node. The main thread calls functions, so that signals and libraries find what
they expect; another one listens to the channel, since a call may take any time.
Invariants: T1 a result is told before the next call begins, so that the end of this process is
never blamed on another call and no finished call is repeated; T2 exactly one `Ended` for each
`Calls`; T3 when the node is gone, this process and what it started are gone at once.
A call is not trusted not to harm its process; it is trusted with what this user may do.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import queue
import resource
import signal
import socket
import sys
import threading
import time
import types
from pathlib import Path

import msgspec

from manifold.kernel.errors import PeerError
from manifold.kernel.process import speed, throttle
from manifold.kernel.process.calling import Caller
from manifold.kernel.process.channel import Channel, Closed
from manifold.kernel.process.messages import (
    Blocks,
    Calls,
    Ended,
    Lend,
    Limit,
    Limited,
    Pace,
    TaskSpec,
    ToTask,
)
from manifold.kernel.process.output import Printed
from manifold.kernel.tasks.inside import lend_by

# One slot is one core: libraries that start a thread for each core would fight over it.
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class TaskProcess:
    """See the module."""

    def __init__(self, channel: Channel[ToTask], spec: TaskSpec, printed: Printed) -> None:
        self._channel = channel
        self._caller = Caller(spec.spool, printed)
        self._gas_per_ms = speed.gas_per_ms() * min(1.0, spec.share)
        self._pacer: throttle.Pacer | None = None
        if spec.share < 1.0 and not (spec.cgroup and throttle.join(spec.cgroup)):
            self._pacer = throttle.Pacer(spec.share)
        self._inbox: queue.SimpleQueue[Calls] = queue.SimpleQueue()
        self._lock = threading.Lock()  # over what follows, and over sending
        self._run = 0
        self._begun = 0  # calls before this block have begun
        self._last = 0
        self._lent = False
        self._leaving = False
        self._pid = os.getpid()
        signal.signal(signal.SIGTERM, self._leave)

    def _leave(self, number: int, frame: types.FrameType | None) -> None:
        """Let the call clean up after itself, which it has `tasks.grace` for."""
        self._leaving = True
        sys.exit(128 + number)

    def serve(self) -> None:
        """Until the node closes the channel, or tells us to end."""
        threading.Thread(target=self._listen, name="manifold-node", daemon=True).start()
        lend_by(self._lend)
        prepared = False
        while True:
            calls = self._inbox.get()
            if not prepared:
                self._caller.prepare(calls.session)
                prepared = True
            self._caller.remember(calls)
            self._serve(calls)
            del calls

    def _serve(self, calls: Calls) -> None:
        block = calls.first
        more = self._begin(calls.run, block)
        while more:
            cpu_s = time.thread_time()
            value = self._caller.call(calls, calls.calls[block - calls.first])
            if self._leaving:
                sys.exit(0)
            if os.getpid() != self._pid:  # a copy that the call has forked: it does not answer
                os._exit(0)
            gas = int(value.busy_ms * self._gas_per_ms)
            told = Blocks(calls.run, block, (value,), gas, value.busy_ms)
            block += 1
            with self._lock:
                more = block < self._last
                if more:
                    self._begun = block + 1
                    self._channel.send(told)  # T1
                else:
                    self._run = 0
                    self._channel.send(told, Ended(calls.run, None))
            pacer = self._pacer  # another thread may set it meanwhile
            if pacer is not None:
                pause_s = pacer.pause_s(time.thread_time() - cpu_s)
                if pause_s > 0:
                    before_s = time.monotonic()
                    time.sleep(pause_s)  # this is what a slower machine would do
                    pacer.paused(time.monotonic() - before_s)

    def _begin(self, run: int, block: int) -> bool:
        """Whether there is a call to make at all: a limit may have come first."""
        with self._lock:
            self._lent = False
            self._begun = block + 1
            if block < self._last:
                return True
            self._run = 0
            self._channel.send(Ended(run, None))
            return False

    def _listen(self) -> None:
        try:
            while True:
                for message in self._channel.wait():
                    with self._lock:
                        self._hear(message)
        except (Closed, PeerError):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(0, signal.SIGKILL)  # T3

    def _hear(self, message: ToTask) -> None:
        match message:
            case Calls():
                self._run, self._last, self._begun = message.run, message.last, message.first
                self._inbox.put(message)
            case Limit(run=run, last=last) if run == self._run:
                self._last = min(self._last, max(last, self._begun))
                self._channel.send(Limited(run, self._last))
            case Limit():
                pass  # it came after its run's end
            case Pace(share=share):
                self._gas_per_ms = speed.gas_per_ms() * share
                self._pacer = throttle.Pacer(share) if share < 1.0 else None

    def _lend(self) -> None:
        with self._lock:
            if self._run and not self._lent:
                self._lent = True
                self._channel.send(Lend(self._run))


def _settle(spec: TaskSpec) -> None:
    """Make this fork of the zygote a process in which a stranger's code can feel at home."""
    os.setsid()
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = main
    sys.argv[:] = [""]
    os.environ.update(spec.environ)
    for name in THREADS:
        os.environ.setdefault(name, "1")
    throttle.be_the_first_victim()
    if spec.memory_cgroup:
        throttle.join(spec.memory_cgroup)
    if spec.memory_bytes:
        _bound_data(spec.memory_bytes)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.enable(file=2, all_threads=False)


def _bound_data(memory_bytes: int) -> None:
    """Private memory beyond what the fork has already, which it shares: more is a MemoryError."""
    status = Path("/proc/self/status").read_text()
    here = next(line for line in status.splitlines() if line.startswith("VmData:"))
    most = (int(here.split()[1]) << 10) + memory_bytes
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard == resource.RLIM_INFINITY or most < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def main(payload: bytes, fds: list[int], liveness_fd: int) -> None:
    """The zygote's entry: `payload` is a `TaskSpec`; the channel, and files for what is printed."""
    os.close(liveness_fd)
    spec = msgspec.msgpack.decode(payload, type=TaskSpec)
    channel_fd, out_fd, err_fd = fds
    printed = Printed(out_fd, err_fd)
    _settle(spec)
    channel: Channel[ToTask] = Channel(socket.socket(fileno=channel_fd), ToTask)
    TaskProcess(channel, spec, printed).serve()
