"""The node's side of its workers: forks them through the zygote when they are first needed,
passes runs to them, and replaces those that die or misbehave.

Interface rules: used from the loop's thread. `events` is told what workers did, by slot.
Invariants: L1 a slot has at most one process; L2 a process that ignores an `Abort` for `grace_ms`,
or says nothing for `SILENCE_S` while it computes, is killed: no program can hold a slot. Time in
which the host had no processor for it does not count, up to `STARVED_S_MAX`.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import msgspec

from manifold.kernel.process.child import ENDED, Child
from manifold.kernel.process.memory import Memory
from manifold.kernel.process.messages import (
    Abort,
    Blocks,
    Compute,
    Ended,
    Fault,
    GlobalCall,
    GlobalDone,
    Limit,
    Limited,
    Pace,
    Result,
    ToNode,
    WorkerSpec,
)
from manifold.kernel.process.starving import Patience
from manifold.vm.kid import Kid

log = logging.getLogger("manifold.process")

WORKER_ENTRY = "manifold.kernel.process.worker:main"
SILENCE_S = 5.0  # a worker speaks every 0.1 s; on a host 50 times overcommitted it still makes this
# 128 nodes on two cores that begin at once: each of their workers waits for 98 % of the time, and
# the 0.3 s in which one compiles its first program take 20 s.
STARVED_S_MAX = 60.0
CHECK_S = 0.25
LATE_S = 1.0  # a node that was starved itself first reads what its workers have said meanwhile
PROGRAMS_SENT_MAX = 200  # remembered per worker; fewer than it keeps


class Events(Protocol):
    """What the pool tells."""

    def run_blocks(
        self, slot: int, run: int, first: int, results: Sequence[Result], gas: float, busy_ms: float
    ) -> None: ...

    def run_limited(self, slot: int, run: int, last: int) -> None: ...

    def run_ended(self, slot: int, run: int, fault: Fault | None) -> None: ...

    def run_lost(self, slot: int, run: int, reason: str) -> None: ...

    def global_call(self, slot: int, call: GlobalCall) -> None:
        """Carry it out, and say what came of it with `Pool.global_done`."""


@dataclass(slots=True)
class _Run:
    next: int  # block, of which no result was told
    last: int
    isolate: bool
    aborted_s: float = 0.0  # when it was told to, or 0


@dataclass(slots=True)
class _Worker:
    slot: int
    child: Child[ToNode] = field(init=False)
    runs: dict[int, _Run] = field(default_factory=dict)  # not ended; the first one computes
    programs: OrderedDict[Kid, None] = field(default_factory=OrderedDict)
    evicted: bool = False  # memory was short
    patience: Patience = field(default_factory=lambda: Patience(STARVED_S_MAX))

    def silent_s(self, now_s: float) -> float:
        """Since it was heard, less what excuses it; 0 before it was forked."""
        if not self.child.pid:
            return 0.0
        return self.patience.spent(self.child.pid, self.child.heard_s, now_s)


class Pool:
    """See the module. `template.slot` is replaced for each worker."""

    def __init__(
        self,
        zygote: str,
        template: WorkerSpec,
        grace_ms: float,
        events: Events,
        memory: Memory | None = None,
    ) -> None:
        self._zygote = zygote
        self._template = template
        self._grace_s = grace_ms / 1000
        self._events = events
        self._loop = asyncio.get_running_loop()
        self._workers: dict[int, _Worker] = {}
        self._memory = memory or Memory(template.alias, 0, "")
        self._memory.join(self)
        self._check: asyncio.TimerHandle | None = None

    # -- runs ---------------------------------------------------------------------------------

    def compute(self, slot: int, compute: Compute) -> None:
        """Start a run on `slot`."""
        worker = self._workers.get(slot) or self._spawn(slot)
        worker.runs[compute.run] = _Run(compute.first, compute.last, compute.isolate)
        worker.child.heard_s = self._loop.time()
        if compute.program in worker.programs:
            compute = msgspec.structs.replace(compute, ir=b"")
        else:
            worker.programs[compute.program] = None
            if len(worker.programs) > PROGRAMS_SENT_MAX:
                worker.programs.popitem(last=False)
        worker.child.post(compute)
        self._memory.begun()
        if self._check is None:
            self._check_soon()

    def limit(self, slot: int, run: int, last: int) -> None:
        worker = self._workers.get(slot)
        if worker is not None and run in worker.runs:
            worker.child.post(Limit(run, last))

    def abort(self, slot: int, run: int) -> None:
        worker = self._workers.get(slot)
        if worker is not None and run in worker.runs:
            worker.runs[run].aborted_s = self._loop.time()
            worker.child.post(Abort(run))

    def pace(self, share: float) -> None:
        """Workers have this share of a core from now on, those to come as well."""
        self._template = msgspec.structs.replace(self._template, share=share)
        for worker in self._workers.values():
            worker.child.post(Pace(share))

    def global_done(self, slot: int, done: GlobalDone) -> None:
        """The answer to a `GlobalCall`; dropped if that run is not there any more."""
        worker = self._workers.get(slot)
        if worker is not None and done.run in worker.runs:
            worker.child.post(done)

    def pids(self) -> dict[int, int]:
        """Slot to process, of the workers that are up."""
        return {slot: w.child.pid for slot, w in sorted(self._workers.items()) if w.child.pid}

    def tenants(self) -> Iterator[tuple[int, bool]]:
        """See `memory.Tenants`."""
        return ((each.child.pid, bool(each.runs)) for each in self._workers.values())

    def evict(self, pid: int) -> None:
        """See `memory.Tenants`."""
        worker = next(each for each in self._workers.values() if each.child.pid == pid)
        worker.evicted = True
        self._kill(worker, "memory was short and it was killed")

    # -- processes ----------------------------------------------------------------------------

    def _spawn(self, slot: int) -> _Worker:
        spec = msgspec.msgpack.encode(msgspec.structs.replace(self._template, slot=slot))
        worker = _Worker(slot)
        self._workers[slot] = worker
        worker.child = Child(
            self._zygote, WORKER_ENTRY, spec, ToNode,
            partial(self._said, worker), partial(self._lost, worker),
        )  # fmt: skip
        return worker

    def _said(self, worker: _Worker, messages: list[ToNode]) -> None:
        for message in messages:
            match message:
                case Blocks():
                    if message.run in worker.runs:
                        worker.runs[message.run].next = message.first + len(message.results)
                    self._events.run_blocks(
                        worker.slot, message.run, message.first, message.results,
                        float(message.gas), message.busy_ms,
                    )  # fmt: skip
                case Limited(run=run, last=last):
                    if run in worker.runs:
                        worker.runs[run].last = last
                    self._events.run_limited(worker.slot, run, last)
                case Ended(run=run, fault=fault):
                    worker.runs.pop(run, None)
                    self._events.run_ended(worker.slot, run, fault)
                case GlobalCall(run=run):
                    if run in worker.runs:
                        self._events.global_call(worker.slot, message)

    def _lost(self, worker: _Worker, reason: str, code: int | None) -> None:
        if self._workers.get(worker.slot) is worker:
            del self._workers[worker.slot]
            log.warning("worker %d (pid %d): %s", worker.slot, worker.child.pid, reason)
            ended = bool(worker.runs) and reason == ENDED
            short = worker.evicted or (ended and self._memory.killed())
            for run, state in list(worker.runs.items()):  # none: it was idle, the slot is another's
                if short and not state.aborted_s and state.next < state.last:
                    short = False  # the others only waited behind it
                    self._fail(worker.slot, run, state)
                else:
                    self._events.run_lost(worker.slot, run, reason)

    def _fail(self, slot: int, run: int, state: _Run) -> None:
        """The block that it was at needed too much memory; others of an isolated job go on."""
        fault = self._memory.fault()
        if state.isolate:
            self._events.run_blocks(slot, run, state.next, [fault], 0.0, 0.0)
        self._events.run_ended(slot, run, None if state.isolate else fault)

    def _kill(self, worker: _Worker, reason: str) -> None:
        worker.child.signal(signal.SIGKILL)
        worker.child.close()
        self._lost(worker, reason, None)

    def _check_soon(self) -> None:
        self._check = self._loop.call_later(CHECK_S, self._supervise)

    def _supervise(self) -> None:
        """L2."""
        assert self._check is not None, "it is why we are here"
        now_s = self._loop.time()
        late = now_s - self._check.when() > LATE_S
        self._check = None
        for worker in list(self._workers.values()):
            if not worker.runs:
                continue
            if self._check is None:
                self._check_soon()
            if late:
                continue
            told_s = (each.aborted_s for each in worker.runs.values() if each.aborted_s)
            aborted_s = min(told_s, default=now_s)
            if now_s - aborted_s > self._grace_s:
                self._kill(worker, "it ignored being cancelled and was killed")
            elif worker.silent_s(now_s) > SILENCE_S:
                self._kill(worker, f"it was silent for {SILENCE_S:g} s and was killed")

    def close(self) -> None:
        """End every worker: they end when their channel closes."""
        if self._check is not None:
            self._check.cancel()
        for worker in self._workers.values():
            worker.child.signal(signal.SIGKILL)
            worker.child.close(final=True)
        self._workers.clear()
