"""A worker process: computes blocks of indices in the sandbox, for one node, until that node goes.

Interface rules: forked by the zygote; its only connection is the channel to its node. It looks
at the channel between blocks and whenever the program's gas slice runs out, so that cancel and
shrink are seen within about `slice_ms`. Whatever the program does ends as a `Fault`; what is our
own bug ends the process, and the node starts another.
Invariants: W1 one run at a time, its blocks in order; W2 exactly one `Ended` for each `Compute`;
W3 a `Limit` or an `Abort` of a run that waits behind another is answered at once, so that a node
never mistakes a worker that is busy with something else for one that does not listen; W4 at most
one `GlobalCall` waits for its answer, and nothing but that answer or an `Abort` ends the wait.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from manifold.kernel.errors import Exhausted, ManifoldError, Trap
from manifold.kernel.process import throttle
from manifold.kernel.process.channel import Channel, Closed
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
    ToWorker,
    Value,
    WorkerSpec,
)
from manifold.kernel.tasks.messages import CommandLine, CommandOutput, Parcel
from manifold.vm.foreign import Foreign, load
from manifold.vm.kid import Kid
from manifold.vm.runtime import Machine, Outcome, Stopped
from manifold.vm.syntax import Program, decode
from manifold.vm.syntax.program import Type

if TYPE_CHECKING:
    from manifold.vm.foreign.machine import Command, ForeignMachine

_commands = msgspec.msgpack.Decoder(CommandLine)

TELL_S = 0.02  # results are sent together, this often
TELL_BYTES = 1 << 20  # or once they are this large
LOOK_S = 0.002  # between blocks, how often the channel is looked at
ALIVE_S = 0.1  # sent within a long block, this often
PROGRAMS_MAX = 256
GAS_PER_S_GUESS = 500_000_000  # until the first slice has been measured
GAS_SLICE_MIN = 10_000


class Worker:
    def __init__(self, channel: Channel[ToWorker], spec: WorkerSpec, paced: bool) -> None:
        self._channel = channel
        self._machine = Machine(spec.memory_bytes)
        self._foreign: ForeignMachine | None = None
        self._programs: dict[Kid, Program | Foreign] = {}
        self._slice_s = spec.slice_ms / 1000
        self._pacer = throttle.Pacer(spec.share) if paced else None
        self._gas_per_s = float(GAS_PER_S_GUESS)
        self._compute: Compute | None = None
        self._last = 0
        self._aborted = False
        self._results: list[Result] = []
        self._results_bytes = 0
        self._first = 0
        self._gas = 0
        self._block_gas = 0  # of the block being computed, as far as it was told
        self._told_s = 0.0
        self._looked_s = 0.0
        self._cpu_s = 0.0
        self._busy_from_s = 0.0
        self._queue: list[ToWorker] = []  # came with, or during, the present run
        self._calls = 0  # of globals, so far
        self._done: GlobalDone | None = None  # the answer to the last of them

    def serve(self) -> None:
        """Until the node closes the channel."""
        while True:
            if not self._queue:
                self._queue = self._channel.wait()
                continue
            message = self._queue.pop(0)
            if isinstance(message, Compute):  # a limit or abort here came after its run's end
                self._run(message)
            elif isinstance(message, Pace):
                self._set_pace(message.share)

    # -- one run ------------------------------------------------------------------------------

    def _run(self, compute: Compute) -> None:
        self._compute = compute
        self._last = compute.last
        self._aborted = False
        self._first = compute.first
        now_s = time.monotonic()
        self._told_s = self._looked_s = self._busy_from_s = now_s
        self._cpu_s = time.thread_time()
        kept, self._queue = self._queue, []
        for message in kept:
            self._hear(message)
        fault: Fault | None = None
        try:
            compute_block = self._loaded(compute)
            block = compute.first
            while block < self._last and not self._aborted:
                self._results.append(compute_block(block))
                block += 1
                self._between(block)
        except Stopped:
            pass  # aborted within a block: nobody waits for the rest
        except ManifoldError as error:
            fault = _fault(error)
        except MemoryError:
            fault = Fault("exhausted", "The worker ran out of memory.", "Ask for less at once.")
        self._tell(Ended(compute.run, fault))
        self._compute = None

    def _loaded(self, compute: Compute) -> Callable[[int], Result]:
        """The program, ready to compute a block."""
        program = self._program(compute)
        if isinstance(program, Program):
            loaded = self._machine.load(program, compute.reduce)
            return partial(self._block, partial(loaded.run, on_global=_Globals(self)), compute)
        if self._foreign is None:
            from manifold.vm.foreign.machine import ForeignMachine  # few workers ever need it

            self._foreign = ForeignMachine(self._machine.memory_bytes)
        if program.kind == "command":
            command = self._foreign.command(program, on_wait=self._tell)
            return partial(self._command, command, compute)
        unit = self._foreign.load(program, compute.reduce, compute.entry, on_wait=self._tell)
        return partial(self._block, unit.run, compute)

    def _program(self, compute: Compute) -> Program | Foreign:
        program = self._programs.get(compute.program)
        if not compute.ir:
            if program is None:
                raise Trap("This worker was not sent the program.", "Submit the job again.")
            return program
        # In the order in which they were last sent, so that the node forgets each before we do.
        self._programs.pop(compute.program, None)
        if len(self._programs) >= PROGRAMS_MAX:
            self._programs.pop(next(iter(self._programs)))
        if program is None:
            program = load(compute.ir, compute.program) if compute.wasm else decode(compute.ir)
        self._programs[compute.program] = program
        return program

    def _block(self, run: Callable[..., Outcome], compute: Compute, block: int) -> Result:
        if compute.indices:
            low = compute.indices[block - compute.first]
            high = low + 1
        else:
            low = compute.lo + block * compute.size
            high = min(low + compute.size, compute.hi)
        self._block_gas = 0
        try:
            outcome = run(
                low,
                high,
                gas=max(GAS_SLICE_MIN, int(self._gas_per_s * self._slice_s)),
                on_yield=self._on_yield,
                on_sleep=self._on_sleep,
                arguments=compute.arguments,
            )
        except Stopped:
            raise
        except ManifoldError as error:
            if not compute.isolate:
                raise
            return _fault(error)
        self._gas += outcome.gas_used - self._block_gas
        self._results_bytes += outcome.partial.nbytes
        return outcome.partial

    def _command(self, command: Command, compute: Compute, block: int) -> Result:
        """One run of a WASI program: what it wrote, also where it trapped."""
        try:
            line = _commands.decode(compute.commands[block - compute.first].data)
        except (IndexError, msgspec.DecodeError) as error:
            raise Trap("The program came without its arguments.", "Use the SDK.") from error
        self._block_gas = 0
        began_s = time.monotonic()
        try:
            done = command.run(
                line.arguments, environ=line.environ, stdin=line.stdin,
                gas=max(GAS_SLICE_MIN, int(self._gas_per_s * self._slice_s)),
                on_yield=self._on_yield, on_sleep=self._on_sleep,
            )  # fmt: skip
            output = CommandOutput(done.status, done.stdout, done.stderr)
            self._gas += done.gas_used - self._block_gas
        except Stopped:
            raise
        except ManifoldError as error:
            wrote = getattr(error, "stdout", b""), getattr(error, "stderr", b"")
            output = CommandOutput(1, *wrote, error.code, error.message, error.next_step)
        data = msgspec.msgpack.encode(output)
        self._results_bytes += len(data)
        busy_ms = 1000 * (time.monotonic() - began_s)
        return Value(Parcel(data), not output.code, busy_ms)

    def _between(self, block: int) -> None:
        """After a block: look, tell and pace, each when it is due."""
        now_s = time.monotonic()
        if now_s - self._looked_s >= LOOK_S:
            self._look(now_s)
        if now_s - self._told_s >= TELL_S or self._results_bytes >= TELL_BYTES:
            self._tell()
        if self._pacer is not None:
            self._pace()

    def _on_yield(self, gas_used: int) -> int:
        """The gas slice ran out within a block: more gas, or 0 to end."""
        now_s = time.monotonic()
        self._gas += gas_used - self._block_gas
        self._block_gas = gas_used
        self._look(now_s)
        if self._pacer is not None:
            self._pace()
        if now_s - self._told_s >= ALIVE_S:
            self._tell()
        return 0 if self._aborted else max(GAS_SLICE_MIN, int(self._gas_per_s * self._slice_s))

    def _on_sleep(self, seconds: float) -> None:
        """The program sleeps; cancel wakes it."""
        until_s = time.monotonic() + seconds
        while not self._aborted:
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                return
            for message in self._channel.wait(min(left_s, ALIVE_S)):
                self._hear(message)
            self._tell()

    def reach(self, **fields: Any) -> GlobalDone:
        """Have the node carry out a `GlobalCall`. Waiting for it is not work."""
        assert self._compute is not None
        self._calls += 1
        self._done = None
        block = self._first + len(self._results)
        call = GlobalCall(self._compute.run, self._calls, block=block, **fields)
        self._channel.send(call)
        while self._done is None:
            before_s = time.monotonic()
            messages = self._channel.wait(ALIVE_S)
            now_s = time.monotonic()
            self._busy_from_s += now_s - before_s
            for message in messages:
                self._hear(message)
            if self._aborted:
                raise Stopped(0, call.index)
            if now_s - self._told_s >= ALIVE_S:
                self._tell()
        if self._done.fault is not None:
            raise _error(self._done.fault)
        return self._done

    # -- the channel --------------------------------------------------------------------------

    def _look(self, now_s: float) -> None:
        self._looked_s = now_s
        for message in self._channel.take():
            self._hear(message)

    def _hear(self, message: ToWorker) -> None:
        """Act on what concerns the present run or one that waits; the rest came too late."""
        assert self._compute is not None
        if isinstance(message, Pace):
            self._set_pace(message.share)
        elif message.run > self._compute.run:
            self._hear_of_waiting(message)
        elif message.run == self._compute.run:
            match message:
                case Limit(last=last):
                    # The block being computed is finished: that costs less than doing it again.
                    started = min(self._first + len(self._results) + 1, self._last)
                    self._last = min(self._last, max(last, started))
                    self._channel.send(Limited(message.run, self._last))
                case Abort():
                    self._aborted = True
                case GlobalDone(number=number):
                    if number == self._calls:
                        self._done = message
                case Compute():
                    raise AssertionError("a run is started once")

    def _set_pace(self, share: float) -> None:
        self._pacer = throttle.Pacer(share) if share < 1.0 else None
        self._cpu_s = time.thread_time()

    def _hear_of_waiting(self, message: Compute | Limit | Abort | GlobalDone) -> None:
        """W3."""
        if isinstance(message, Compute):
            self._queue.append(message)
            return
        waiting = next(
            (w for w in self._queue if not isinstance(w, Pace) and w.run == message.run), None
        )
        if not isinstance(waiting, Compute) or isinstance(message, GlobalDone):
            return
        at = self._queue.index(waiting)
        if isinstance(message, Abort):
            del self._queue[at]
            self._channel.send(Ended(message.run, None))
            return
        last = min(max(message.last, waiting.first), waiting.last)
        self._queue[at] = msgspec.structs.replace(waiting, last=last)
        self._channel.send(Limited(message.run, last))

    def _tell(self, ended: Ended | None = None) -> None:
        assert self._compute is not None
        now_s = time.monotonic()
        busy_s = now_s - self._busy_from_s
        results = tuple(self._results)
        told = Blocks(self._compute.run, self._first, results, self._gas, busy_s * 1000)
        self._channel.send(told, *([ended] if ended is not None else []))
        if self._gas > GAS_SLICE_MIN and busy_s > 0.001:
            speed = self._gas / busy_s
            self._gas_per_s = 0.5 * self._gas_per_s + 0.5 * speed
        self._first += len(results)
        self._results.clear()
        self._results_bytes = 0
        self._gas = 0
        self._told_s = self._busy_from_s = now_s

    def _pace(self) -> None:
        assert self._pacer is not None
        cpu_s = time.thread_time()
        pause_s = self._pacer.pause_s(cpu_s - self._cpu_s)
        self._cpu_s = cpu_s
        if pause_s <= 0:
            return
        before_s = time.monotonic()
        for message in self._channel.wait(pause_s):
            self._hear(message)
        self._pacer.paused(time.monotonic() - before_s)
        self._cpu_s = time.thread_time()


class _Globals:
    """The globals of a program in a worker: its node's."""

    def __init__(self, worker: Worker) -> None:
        self._reach = worker.reach

    def load(self, index: int, name: str, type: Type) -> int | float:
        return self._reach(index=index, k=0, op="load", name=name, float=type == "f64").found

    def store(self, index: int, k: int, name: str, value: int | float) -> None:
        is_float = isinstance(value, float)
        self._reach(index=index, k=k, op="store", name=name, float=is_float, value=value)

    def propose(
        self, index: int, k: int, name: str, expected: int | float, new: int | float
    ) -> tuple[int | float, bool]:
        is_float = isinstance(new, float)
        done = self._reach(
            index=index, k=k, op="propose", name=name, float=is_float, expected=expected, value=new
        )
        return done.found, done.ok

    def add(self, index: int, k: int, name: str, value: int | float) -> int | float:
        is_float = isinstance(value, float)
        done = self._reach(index=index, k=k, op="add", name=name, float=is_float, value=value)
        if not done.ok:
            raise Trap(
                f"the global {name} is {done.found}: adding {value} does not fit in 64 bits.",
                "Keep it below 2^63, or make it a float.",
            )
        return done.found


def _error(fault: Fault) -> ManifoldError:
    error = ManifoldError(fault.message, fault.next_step)
    error.code = fault.code
    return error


def _fault(error: ManifoldError) -> Fault:
    if isinstance(error, Trap):
        return Fault(
            error.code, error.message, error.next_step, error.line, error.instruction,
            error.cells, error.index,
        )  # fmt: skip
    if isinstance(error, Exhausted):
        return Fault(error.code, error.message, error.next_step)
    line = getattr(error, "line", 0)
    return Fault(error.code, error.message, error.next_step, line)


def main(payload: bytes, fds: list[int], liveness_fd: int) -> None:
    """The zygote's entry: `payload` is a `WorkerSpec`, `fds` the worker's end of the channel.

    No liveness watch: the node holds the channel's other end, and closes it by ending.
    """
    os.close(liveness_fd)
    spec = msgspec.msgpack.decode(payload, type=WorkerSpec)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if spec.log:
        log_fd = os.open(spec.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log_fd, 1)
        os.dup2(log_fd, 2)
        os.close(log_fd)
    throttle.be_the_first_victim()
    if spec.memory_cgroup:
        throttle.join(spec.memory_cgroup)
    joined = bool(spec.cgroup) and throttle.join(spec.cgroup)
    paced = not joined and spec.share < 1.0
    channel: Channel[ToWorker] = Channel(socket.socket(fileno=fds[0]), ToWorker)
    try:
        Worker(channel, spec, paced).serve()
    except Closed:
        return
