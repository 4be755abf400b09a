"""Simulated worker processes and the programs they run.

A program is a pure function of the index, described by its IR (`Program`), so every result can be
known beforehand. A worker computes blocks at its node's speed, tells what it did as the real one
does (`kernel/process/worker.py`): results together, a sign of life within a long block, `Limited`
for each limit, one end for each run; it can be lost at any moment.

Invariants: V1 a slot is given one run at a time; V2 work goes only where its demand allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from manifold.kernel import labels
from manifold.kernel.effects import Effect
from manifold.kernel.process.messages import Fault, Result
from manifold.kernel.scheduler import blocks
from manifold.kernel.scheduler.messages import AbortRun, JobSpec, LimitRun, StartRun
from manifold.tools.simulator.world import Node, World
from manifold.vm.runtime.results import Partial, from_entries

CORE_GAS_PER_S = 1e9  # of a slot with compute 1.0
RATE_ERROR = 0.3  # a node's true speed differs by up to this part from what its class promises
START_MS, PIPE_MS = 0.3, 0.1  # to begin a run; from a worker to its node
TELL_MS, ALIVE_MS = 20.0, 100.0
DUST = 1e-6  # of a block's gas: what rounding may leave

Value = int | float


class Program(msgspec.Struct, frozen=True, array_like=True):
    """What the IR of a simulated program says: `kind` of values, gas, and where it traps."""

    kind: str
    gas: float  # of one index
    salt: int
    traps: tuple[int, ...] = ()

    @property
    def ir(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @staticmethod
    def decode(ir: bytes) -> Program:
        return msgspec.msgpack.decode(ir, type=Program)

    def emits(self, index: int) -> tuple[Value, ...]:
        """The values of one index."""
        mixed = (index * 2654435761 + self.salt) & 0xFFFF
        match self.kind:
            case "ints":
                return (mixed - 30_000,)
            case "floats":  # their sum depends on the order of additions
                return (1.0 / (mixed + 0.1),)
            case _:  # none, one or two, of either type
                return (mixed, mixed / 7.0)[: mixed % 3]


def block_result(spec: JobSpec, program: Program, block: int) -> Result:
    """What a worker must find for `block`; a `Fault` where one of its indices traps."""
    low, high = blocks.bounds(spec, block)
    for index in program.traps:
        if low <= index < high:
            return Fault("trap", f"Index {index} divides by zero.", index=index)
    reduce = "collect" if spec.isolate else spec.reduce
    entries = [program.emits(index) for index in range(low, high)]
    return from_entries(reduce, entries, json=False, flat=False)


@dataclass(slots=True)
class _Run:
    """One run on one slot. Gas is counted from the beginning of block `first`."""

    node: Node
    start: StartRun
    program: Program
    next: int
    last: int
    told: int  # first block whose result was not told
    edge: float = 0.0  # gas at the end of block `next`
    gas: float = 0.0
    gas_told: float = 0.0
    at_ms: float = 0.0
    told_ms: float = 0.0
    over: bool = False
    token: int = 0


@dataclass(slots=True)
class Workers:
    """Every worker process of the world."""

    speeds: Sequence[float]  # gas per second of a slot, by node
    failures: list[str] = field(default_factory=list)
    factors: dict[int, float] = field(default_factory=dict)  # slow-downs, by node
    lost: int = 0
    blocks_done: int = 0
    _runs: dict[tuple[int, int], _Run] = field(default_factory=dict)
    # Lost, and the node is to be told: of the run that was on, and of those it started meanwhile.
    _gone: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    _results: dict[tuple[JobSpec, int], Result] = field(default_factory=dict)
    _world: World | None = None

    def watch(self, world: World) -> None:
        self._world = world
        world.on_notify.setdefault(StartRun, []).append(self._start)
        world.on_notify.setdefault(LimitRun, []).append(self._limit)
        world.on_notify.setdefault(AbortRun, []).append(self._abort)
        world.on_crash.append(self._crashed)

    @property
    def busy(self) -> bool:
        return bool(self._runs)

    def running(self, node: Node) -> list[tuple[int, JobSpec]]:
        """Slot and job of each run on `node`."""
        runs = self._runs.items()
        return [(slot, run.start.spec) for (index, slot), run in runs if index == node.index]

    def lose(self, node: Node, slot: int) -> None:
        """The process of a slot ends; its node is told."""
        key = (node.index, slot)
        run = self._runs.pop(key, None)
        if run is None or not node.up:
            return

        def told(core: Any, now_ms: float) -> list[Effect]:
            effects: list[Effect] = []
            for number in self._gone.pop(key):
                effects += core.run_lost(slot, number, "its worker ended", now_ms)
            return effects

        run.over = True
        self.lost += 1
        self._gone[key] = [run.start.run]
        self._tell(node, told)

    def result(self, spec: JobSpec, program: Program, block: int) -> Result:
        key = (spec, block)
        if key not in self._results:
            self._results[key] = block_result(spec, program, block)
        return self._results[key]

    # -- what the node says -------------------------------------------------------------------

    def _start(self, node: Node, event: StartRun) -> None:
        assert self._world is not None
        key = (node.index, event.worker)
        if key in self._gone:
            self._gone[key].append(event.run)  # sent to a process that has ended
            return
        if key in self._runs:
            self.failures.append(f"V1 slot {event.worker} of node {node.index} has two runs")
        self._admit(node, event)
        now_ms = self._world.now_ms + START_MS
        run = _Run(node, event, Program.decode(event.ir), event.first, event.last, event.first)
        run.at_ms = run.told_ms = now_ms
        run.edge = self._block_gas(run)
        self._runs[key] = run
        self._wake(run)

    def _admit(self, node: Node, event: StartRun) -> None:
        demand, me = event.spec.demand, node.machine.me
        classes = ("", me.node_class)
        if demand.node_class not in classes or demand.node not in ("", me.alias, me.kid):
            self.failures.append(f"V2 {me.alias} runs what asks for {demand}")
        has = (*me.labels, *labels.facts(me.node_class, me.arch, me.gpu))
        if not all(labels.meets(has, wish) for wish in demand.labels):
            self.failures.append(f"V2 {me.alias} with {me.labels} runs what wants {demand.labels}")

    def _limit(self, node: Node, event: LimitRun) -> None:
        run = self._runs.get((node.index, event.worker))
        if run is None or run.start.run != event.run:
            return  # its end is on its way to the node
        self._advance(run)
        run.last = min(run.last, max(event.last, min(run.next + 1, run.last)))
        last = run.last
        self._tell(node, lambda core, now: core.run_limited(event.worker, event.run, last, now))
        self._wake(run)

    def _abort(self, node: Node, event: AbortRun) -> None:
        run = self._runs.get((node.index, event.worker))
        if run is not None and run.start.run == event.run:
            self._end(run, None)

    def _crashed(self, node: Node) -> None:
        for key in [key for key in self._runs if key[0] == node.index]:
            self._runs.pop(key).over = True
        for key in [key for key in self._gone if key[0] == node.index]:
            del self._gone[key]

    # -- computing ----------------------------------------------------------------------------

    def _rate(self, run: _Run) -> float:
        """Gas per millisecond."""
        return self.speeds[run.node.index] * self.factors.get(run.node.index, 1.0) / 1000

    def _block_gas(self, run: _Run) -> float:
        low, high = blocks.positions(run.start.spec, run.next)
        return run.program.gas * (high - low)

    def _advance(self, run: _Run) -> Fault | None:
        """Compute until now; the fault that ended it, if one did."""
        assert self._world is not None
        elapsed_ms = self._world.now_ms - run.at_ms
        if elapsed_ms <= 0:
            return None
        run.gas += elapsed_ms * self._rate(run)
        run.at_ms = self._world.now_ms
        while run.next < run.last and run.gas >= run.edge * (1 - DUST):
            found = self.result(run.start.spec, run.program, run.next)
            if isinstance(found, Fault) and not run.start.spec.isolate:
                return found
            self.blocks_done += 1
            run.next += 1
            run.edge += self._block_gas(run) if run.next < run.last else 0.0
        return None

    def _wake(self, run: _Run) -> None:
        """Come back when there is something to tell."""
        assert self._world is not None
        run.token += 1
        now_ms = self._world.now_ms
        rate = self._rate(run)
        block_ms = max(0.0, (run.edge - run.gas) / rate)
        whole_ms = block_ms + max(0, run.last - run.next - 1) * self._block_gas(run) / rate
        if run.next >= run.last:
            whole_ms = 0.0
        told_ms = run.told_ms - run.at_ms
        wait_ms = min(whole_ms, max(block_ms, told_ms + TELL_MS), told_ms + ALIVE_MS)
        wait_ms = max(wait_ms + run.at_ms - now_ms, 0.01)
        self._world.at(wait_ms, self._woken, run, run.token)

    def _woken(self, run: _Run, token: int) -> None:
        if run.over or run.token != token:
            return
        fault = self._advance(run)
        if fault is not None or run.next >= run.last:
            self._end(run, fault)
            return
        self._report(run)
        self._wake(run)

    def _report(self, run: _Run) -> None:
        assert self._world is not None
        start, first = run.start, run.told
        span = range(first, run.next)
        results = tuple(self.result(start.spec, run.program, block) for block in span)
        gas, run.gas_told = run.gas - run.gas_told, run.gas
        busy_ms, run.told_ms = self._world.now_ms - run.told_ms, self._world.now_ms
        run.told = run.next
        self._tell(
            run.node,
            lambda core, now: core.run_blocks(
                start.worker, start.run, first, results, gas, busy_ms, now
            ),
        )

    def _end(self, run: _Run, fault: Fault | None) -> None:
        self._report(run)
        run.over = True
        start = run.start
        ended = self._runs.pop((run.node.index, start.worker), None)
        assert ended is run, "a slot has one run at a time"
        self._tell(run.node, lambda core, now: core.run_ended(start.worker, start.run, fault, now))

    def _tell(self, node: Node, action: Any) -> None:
        assert self._world is not None

        def told(core: Any, now_ms: float) -> list[Effect]:
            effects: list[Effect] = action(core, now_ms)
            return effects

        self._world.call(node, told, PIPE_MS)


def same(found: Result, expected: Result) -> bool:
    """Bit for bit."""
    if isinstance(found, Partial) and isinstance(expected, Partial):
        return msgspec.msgpack.encode(found) == msgspec.msgpack.encode(expected)
    return (
        isinstance(found, Fault) and isinstance(expected, Fault) and found.index == expected.index
    )
