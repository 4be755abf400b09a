"""The node's side of its task processes: warm ones are used again within their session.

Interface rules: used from the loop's thread; `events` is told what calls came to, by slot and run.
A run of calls has one process to itself; a process serves one session, and one run at a time.
Invariants: L1 at most one process computes for a slot, and at most `PARKED_MAX` wait beyond the
slots for calls of their own; L2 a process that dies fails the call it was at and no other: the
rest of its run goes to another process; L3 a run that is aborted has `grace_ms` to clean up, then
its process and all that it started are killed; L4 idle processes are at most `IDLE_MAX` beyond one
for each slot, and end after `IDLE_S`, or with their client.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import msgspec

from manifold.kernel.process.child import Child
from manifold.kernel.process.memory import Memory
from manifold.kernel.process.messages import (
    Blocks,
    Calls,
    Ended,
    Fault,
    FromTask,
    Lend,
    Limit,
    Limited,
    Pace,
    Result,
    TaskSpec,
)
from manifold.kernel.process.output import kept
from manifold.vm.kid import Kid

log = logging.getLogger("manifold.process")

TASK_ENTRY = "manifold.kernel.process.tasks:main"
IDLE_S = 30.0  # a process costs 15 MB while it waits and 20 ms to start
IDLE_MAX = 2
CHECK_S = 0.25
PARKED_MAX = 64  # calls that wait for their own: 64 * 15 MB are a gigabyte
FUNCTIONS_SENT_MAX = 200  # remembered per process; fewer than it keeps
LAST_WORDS_BYTES = 3000  # of standard error, in the message about a process that died
PRINTED_BYTES_MAX = 64 << 20  # by one call, kept in memory until it ends


class Events(Protocol):
    """What the pool tells."""

    def run_blocks(
        self, slot: int, run: int, first: int, results: Sequence[Result], gas: float, busy_ms: float
    ) -> None: ...

    def run_limited(self, slot: int, run: int, last: int) -> None: ...

    def run_ended(self, slot: int, run: int, fault: Fault | None) -> None: ...

    def run_moved(self, slot: int, run: int, to: int) -> None: ...

    def run_lost(self, slot: int, run: int, reason: str) -> None: ...


@dataclass(slots=True, eq=False)
class _Process:
    session: str
    client: str
    out_fd: int
    err_fd: int
    child: Child[FromTask] = field(init=False)
    run: int = 0  # 0: idle
    slot: int = -1
    next: int = 0  # the first block whose value was not told
    idle_s: float = 0.0
    aborted_s: float = 0.0
    verdict: str = ""  # why we end it, where we do
    evicted: bool = False  # memory was short
    functions: OrderedDict[Kid, None] = field(default_factory=OrderedDict)


class TaskPool:
    """See the module. `slots` are those of the node; parked runs get numbers from there on."""

    def __init__(
        self,
        zygote: str,
        spec: TaskSpec,
        slots: int,
        grace_ms: float,
        events: Events,
        memory: Memory | None = None,
    ) -> None:
        self._zygote = zygote
        self._spec = spec
        self._slots = slots
        self._grace_s = grace_ms / 1000
        self._events = events
        self._loop = asyncio.get_running_loop()
        self._processes: list[_Process] = []  # the idle ones in the order in which they became so
        self._runs: dict[int, _Process] = {}
        self._memory = memory or Memory(spec.alias, 0, "")
        self._memory.join(self)
        self._check: asyncio.TimerHandle | None = None

    # -- runs ---------------------------------------------------------------------------------

    def compute(self, slot: int, calls: Calls) -> None:
        """Start a run on `slot`."""
        process = self._idle(calls.session.session) or self._start(calls)
        process.run, process.slot, process.next = calls.run, slot, calls.first
        process.aborted_s = 0.0
        self._runs[calls.run] = process
        if calls.function in process.functions:
            process.functions.move_to_end(calls.function)
            calls = msgspec.structs.replace(calls, code=b"")
        else:
            process.functions[calls.function] = None
            if len(process.functions) > FUNCTIONS_SENT_MAX:
                process.functions.popitem(last=False)
        process.child.post(calls)
        self._memory.begun()
        self._watch()

    def has(self, run: int) -> bool:
        return run in self._runs

    def limit(self, run: int, last: int) -> None:
        self._runs[run].child.post(Limit(run, last))

    def abort(self, run: int) -> None:
        """L3."""
        process = self._runs[run]
        process.aborted_s = self._loop.time()
        process.verdict = "it was cancelled"
        process.child.signal(signal.SIGTERM)

    def pace(self, share: float) -> None:
        """Calls have this share of a core from now on, those of processes to come as well."""
        self._spec = msgspec.structs.replace(self._spec, share=share)
        for process in self._processes:
            process.child.post(Pace(share))

    def pids(self) -> dict[int, int]:
        """Slot to process, of those that compute."""
        return {each.slot: each.child.pid for each in self._runs.values() if each.child.pid}

    def tenants(self) -> Iterator[tuple[int, bool]]:
        """See `memory.Tenants`."""
        return ((each.child.pid, bool(each.run)) for each in self._processes)

    def evict(self, pid: int) -> None:
        """See `memory.Tenants`."""
        process = next(each for each in self._processes if each.child.pid == pid)
        if process.run:
            process.evicted = True
            process.child.kill_group()
        else:
            self._end(process)

    @property
    def spool(self) -> str:
        return self._spec.spool

    def every_pid(self) -> tuple[int, ...]:
        return tuple(each.child.pid for each in self._processes if each.child.pid)

    def client_gone(self, client: str) -> None:
        """L4: what it left idle; its runs are aborted by whoever owns its jobs."""
        for process in [p for p in self._processes if p.client == client and not p.run]:
            self._end(process)

    # -- processes ----------------------------------------------------------------------------

    def _idle(self, session: str) -> _Process | None:
        for process in reversed(self._processes):  # the warmest
            if process.session == session and not process.run:
                return process
        return None

    def _start(self, calls: Calls) -> _Process:
        idle = [each for each in self._processes if not each.run]
        if len(self._processes) >= self._slots + IDLE_MAX and idle:
            self._end(min(idle, key=lambda each: each.idle_s))
        session = calls.session
        out_fd, err_fd = _memory_file("stdout"), _memory_file("stderr")
        process = _Process(session.session, session.client, out_fd, err_fd)
        process.child = Child(
            self._zygote, TASK_ENTRY, msgspec.msgpack.encode(self._spec), FromTask,
            partial(self._said, process), partial(self._lost, process),
            fds=[os.dup(out_fd), os.dup(err_fd)], watch=True,
        )  # fmt: skip
        self._processes.append(process)
        return process

    def _said(self, process: _Process, messages: list[FromTask]) -> None:
        told: list[Blocks] = []
        for message in messages:
            if not self._in_turn(process, message, len(told)):
                self._tell(process, told)
                process.verdict = "it answered out of turn, as a forked copy of it would"
                process.child.kill_group()
                if not process.run:
                    self._end(process)
                return
            if isinstance(message, Blocks):
                told.append(message)
                continue
            self._tell(process, told)
            told = []
            match message:
                case Limited(run=run, last=last) if run == process.run:
                    self._events.run_limited(process.slot, run, last)
                case Ended(run=run):
                    self._ended(process, run)
                case Lend(run=run) if run == process.run:
                    self._park(process)
        self._tell(process, told)

    def _in_turn(self, process: _Process, message: FromTask, untold: int) -> bool:
        """A call that forks and returns in both gives two answers: none of it can be believed."""
        match message:
            case Blocks(run=run, first=first, results=results):
                return run == process.run and first == process.next + untold and len(results) == 1
            case Ended(run=run):
                return run == process.run
            case _:
                return True

    def _tell(self, process: _Process, told: list[Blocks]) -> None:
        """Values that came together are told together."""
        if not told:
            return
        process.next = told[-1].first + len(told[-1].results)
        self._events.run_blocks(
            process.slot, process.run, told[0].first,
            [result for each in told for result in each.results],
            float(sum(each.gas for each in told)), sum(each.busy_ms for each in told),
        )  # fmt: skip

    def _ended(self, process: _Process, run: int) -> None:
        slot = process.slot
        del self._runs[run]
        process.run, process.slot = 0, -1
        process.idle_s = self._loop.time()
        if process.aborted_s:  # it has SIGTERM on its way
            self._end(process)
        self._events.run_ended(slot, run, None)

    def _park(self, process: _Process) -> None:
        taken = {each.slot for each in self._runs.values()}
        beyond = range(self._slots, self._slots + PARKED_MAX)
        free = next((slot for slot in beyond if slot not in taken), None)
        if free is None:
            process.verdict = (
                f"{PARKED_MAX} calls on this node wait for calls of their own already; "
                "nest less deeply"
            )
            process.child.kill_group()
            return
        slot, process.slot = process.slot, free
        self._events.run_moved(slot, process.run, free)

    def _end(self, process: _Process) -> None:
        """Kill one that nobody needs any more."""
        process.child.kill_group()
        process.child.close()
        self._forget(process)

    def _forget(self, process: _Process) -> None:
        self._processes.remove(process)
        os.close(process.out_fd)
        os.close(process.err_fd)

    def _lost(self, process: _Process, reason: str, code: int | None) -> None:
        """L2."""
        run, slot = process.run, process.slot
        words = kept(process.err_fd, os.fstat(process.err_fd).st_size)[-LAST_WORDS_BYTES:]
        self._forget(process)
        if not run:
            return
        del self._runs[run]
        log.warning("a task process (pid %d) ended: %s", process.child.pid, _how(code, reason))
        if process.aborted_s:
            self._events.run_ended(slot, run, None)
        elif not process.child.pid:
            self._events.run_lost(slot, run, reason)
        else:
            fault = self._fault_of(process, reason, code, words)
            self._events.run_blocks(slot, run, process.next, [fault], 0.0, 0.0)
            self._events.run_ended(slot, run, None)

    def _fault_of(self, process: _Process, reason: str, code: int | None, words: str) -> Fault:
        killed = code == -signal.SIGKILL and not process.verdict
        if process.evicted or (killed and self._memory.killed()):
            return self._memory.fault()
        how = process.verdict or _how(code, reason)
        said = f"\nIts last words:\n{words.rstrip()}" if words.strip() else ""
        return Fault(
            "process_died", f"The process of this call ended: {how}.{said}",
            "" if said else "It printed nothing before it ended.",
        )  # fmt: skip

    # -- time ---------------------------------------------------------------------------------

    def _watch(self) -> None:
        if self._check is None:
            self._check = self._loop.call_later(CHECK_S, self._supervise)

    def _supervise(self) -> None:
        """L3, L4, and a bound on what is printed."""
        self._check = None
        now_s = self._loop.time()
        for process in list(self._processes):
            if process.run and process.aborted_s:
                if now_s - process.aborted_s > self._grace_s:
                    process.child.kill_group()
            elif not process.run and now_s - process.idle_s > IDLE_S:
                self._end(process)
            elif process.run and not process.verdict:
                printed = sum(os.fstat(fd).st_size for fd in (process.out_fd, process.err_fd))
                if printed > PRINTED_BYTES_MAX:
                    process.verdict = f"it printed more than {PRINTED_BYTES_MAX >> 20} MiB"
                    os.ftruncate(process.err_fd, 0)
                    process.child.kill_group()
        if self._processes:
            self._watch()

    def close(self) -> None:
        """End every process and what it has started."""
        if self._check is not None:
            self._check.cancel()
        for process in self._processes:
            process.child.kill_group()
            process.child.close(final=True)
            os.close(process.out_fd)
            os.close(process.err_fd)
        self._processes.clear()
        self._runs.clear()


def _memory_file(name: str) -> int:
    """Written at its end, also after it was cut."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_APPEND)
    return fd


def _how(code: int | None, reason: str) -> str:
    if code is None:
        return reason
    if code >= 0:
        return f"it exited with status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = ", perhaps because memory was short" if -code == signal.SIGKILL else ""
    return f"{name} killed it{hint}"
