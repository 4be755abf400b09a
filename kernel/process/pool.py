"""The node's side of its workers: forks them through the zygote when they are first needed,
passes runs to them, and replaces those that die or misbehave.

Interface rules: used from the loop's thread. `events` is told what workers did, by slot.
Invariants: L1 a slot has at most one process; L2 a process that ignores an `Abort` for `grace_ms`,
or says nothing for `SILENCE_S` while it computes, is killed: no program can hold a slot.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from manifold.kernel.errors import ManifoldError, PeerError, Unavailable
from manifold.kernel.process.channel import Channel, Closed
from manifold.kernel.process.messages import (
    Abort,
    Blocks,
    Compute,
    Ended,
    Fault,
    Limit,
    Limited,
    Result,
    ToNode,
    WorkerSpec,
)
from manifold.kernel.process.zygote import read_forked, request_fork
from manifold.vm.kid import Kid

log = logging.getLogger("manifold.process")

WORKER_ENTRY = "manifold.kernel.process.worker:main"
SILENCE_S = 5.0  # a worker speaks every 0.1 s; on a host 50 times overcommitted it still makes this
CHECK_S = 0.25
RETRY_S = 0.2  # after the zygote could not fork
RETRIES_MAX = 50  # 10 s: a zygote that is restarted is back in one
PROGRAMS_SENT_MAX = 200  # remembered per worker; fewer than it keeps


class Events(Protocol):
    """What the pool tells."""

    def run_blocks(
        self, slot: int, run: int, first: int, results: Sequence[Result], gas: float, busy_ms: float
    ) -> None: ...

    def run_limited(self, slot: int, run: int, last: int) -> None: ...

    def run_ended(self, slot: int, run: int, fault: Fault | None) -> None: ...

    def slot_lost(self, slot: int, reason: str) -> None: ...


@dataclass(slots=True)
class _Worker:
    slot: int
    channel: Channel[ToNode]
    pid: int = 0  # 0 until the zygote has answered
    pidfd: int = -1
    runs: dict[int, float] = field(default_factory=dict)  # not ended: when told to abort, or 0
    heard_s: float = 0.0
    programs: OrderedDict[Kid, None] = field(default_factory=OrderedDict)
    writing: bool = False
    retries: int = 0


class Pool:
    """See the module. `template.slot` is replaced for each worker."""

    def __init__(self, zygote: str, template: WorkerSpec, grace_ms: float, events: Events) -> None:
        self._zygote = zygote
        self._template = template
        self._grace_s = grace_ms / 1000
        self._events = events
        self._loop = asyncio.get_running_loop()
        self._workers: dict[int, _Worker] = {}
        self._check: asyncio.TimerHandle | None = None
        self._forking: dict[socket.socket, socket.socket] = {}  # asked for; the child's end

    # -- runs ---------------------------------------------------------------------------------

    def compute(self, slot: int, compute: Compute) -> None:
        """Start a run on `slot`."""
        worker = self._workers.get(slot) or self._spawn(slot)
        worker.runs[compute.run] = 0.0
        worker.heard_s = self._loop.time()
        if compute.program in worker.programs:
            compute = msgspec.structs.replace(compute, ir=b"")
        else:
            worker.programs[compute.program] = None
            if len(worker.programs) > PROGRAMS_SENT_MAX:
                worker.programs.popitem(last=False)
        self._post(worker, compute)
        if self._check is None:
            self._check = self._loop.call_later(CHECK_S, self._supervise)

    def limit(self, slot: int, run: int, last: int) -> None:
        worker = self._workers.get(slot)
        if worker is not None and run in worker.runs:
            self._post(worker, Limit(run, last))

    def abort(self, slot: int, run: int) -> None:
        worker = self._workers.get(slot)
        if worker is not None and run in worker.runs:
            worker.runs[run] = self._loop.time()
            self._post(worker, Abort(run))

    def pids(self) -> dict[int, int]:
        """Slot to process, of the workers that are up."""
        return {slot: w.pid for slot, w in sorted(self._workers.items()) if w.pid}

    def _post(self, worker: _Worker, message: msgspec.Struct) -> None:
        if worker.channel.post(message) and not worker.writing:
            worker.writing = True
            self._loop.add_writer(worker.channel.socket, self._writable, worker)

    def _writable(self, worker: _Worker) -> None:
        if not worker.channel.flush():
            worker.writing = False
            self._loop.remove_writer(worker.channel.socket)

    # -- processes ----------------------------------------------------------------------------

    def _spawn(self, slot: int) -> _Worker:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        worker = _Worker(slot, Channel(ours, ToNode), heard_s=self._loop.time())
        self._workers[slot] = worker
        self._loop.add_reader(ours, self._readable, worker)
        self._ask(worker, theirs)
        return worker

    def _ask(self, worker: _Worker, theirs: socket.socket) -> None:
        spec = msgspec.msgpack.encode(msgspec.structs.replace(self._template, slot=worker.slot))
        if self._workers.get(worker.slot) is not worker:  # given up while it waited to be forked
            theirs.close()
            return
        try:
            connection = request_fork(self._zygote, WORKER_ENTRY, spec, [theirs.fileno()])
        except Unavailable as error:
            worker.retries += 1
            if worker.retries > RETRIES_MAX:
                theirs.close()  # the reader sees it, and the slot is lost
                log.error("worker %d: %s", worker.slot, error)
                return
            self._loop.call_later(RETRY_S, self._ask, worker, theirs)
            return
        self._forking[connection] = theirs
        self._loop.add_reader(connection, self._forked, worker, connection, theirs)

    def _forked(self, worker: _Worker, connection: socket.socket, theirs: socket.socket) -> None:
        self._loop.remove_reader(connection)
        del self._forking[connection]
        theirs.close()  # only the child has it now: its end closes this channel
        try:
            worker.pid = read_forked(connection)
        except ManifoldError as error:
            log.error("worker %d was not started: %s", worker.slot, error)
            return
        with contextlib.suppress(ProcessLookupError):  # gone already: the channel tells
            worker.pidfd = os.pidfd_open(worker.pid)
        worker.heard_s = self._loop.time()
        if self._workers.get(worker.slot) is not worker:  # lost while it was forked
            self._kill(worker)
            self._forget_process(worker)

    def _readable(self, worker: _Worker) -> None:
        try:
            messages = worker.channel.take()
        except Closed:
            self._lose(worker, "its worker process ended")
            return
        except PeerError as error:
            self._kill(worker)
            self._lose(worker, f"it broke the protocol and was killed: {error.message}")
            return
        worker.heard_s = self._loop.time()
        for message in messages:
            match message:
                case Blocks():
                    self._events.run_blocks(
                        worker.slot, message.run, message.first, message.results,
                        float(message.gas), message.busy_ms,
                    )  # fmt: skip
                case Limited(run=run, last=last):
                    self._events.run_limited(worker.slot, run, last)
                case Ended(run=run, fault=fault):
                    worker.runs.pop(run, None)
                    self._events.run_ended(worker.slot, run, fault)

    def _lose(self, worker: _Worker, reason: str) -> None:
        self._loop.remove_reader(worker.channel.socket)
        if worker.writing:
            self._loop.remove_writer(worker.channel.socket)
        worker.channel.socket.close()
        self._forget_process(worker)
        if self._workers.get(worker.slot) is worker:
            del self._workers[worker.slot]
            log.warning("worker %d (pid %d): %s", worker.slot, worker.pid, reason)
            self._events.slot_lost(worker.slot, reason)

    def _kill(self, worker: _Worker) -> None:
        """By descriptor, not by number: a number may belong to another process by now."""
        if worker.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(worker.pidfd, signal.SIGKILL)

    def _forget_process(self, worker: _Worker) -> None:
        if worker.pidfd >= 0:
            os.close(worker.pidfd)
            worker.pidfd = -1

    def _supervise(self) -> None:
        """L2."""
        now_s = self._loop.time()
        self._check = None
        for worker in list(self._workers.values()):
            if not worker.runs:
                continue
            self._check = self._check or self._loop.call_later(CHECK_S, self._supervise)
            aborted_s = min((at for at in worker.runs.values() if at), default=now_s)
            if now_s - aborted_s > self._grace_s:
                self._kill(worker)
                self._lose(worker, "it ignored being cancelled and was killed")
            elif worker.pid and now_s - worker.heard_s > SILENCE_S:
                self._kill(worker)
                self._lose(worker, f"it was silent for {SILENCE_S:g} s and was killed")

    def close(self) -> None:
        """End every worker: they end when their channel closes."""
        if self._check is not None:
            self._check.cancel()
        for worker in list(self._workers.values()):
            self._loop.remove_reader(worker.channel.socket)
            if worker.writing:
                self._loop.remove_writer(worker.channel.socket)
            worker.channel.socket.close()
            self._kill(worker)
            self._forget_process(worker)
        self._workers.clear()
        for connection, theirs in self._forking.items():
            self._loop.remove_reader(connection)
            connection.close()
            theirs.close()
        self._forking.clear()
