"""Nexus in the simulator: short schedules of clients, faults and changes of voters from seeds.

Interface: `schedule(seed, machine) -> Outcome` runs one; `run(seed, schedules)` many of them and
stops at the first that fails. Each seed draws how many nodes there are, who votes, which faults
happen and how often, what clients do, and whether voters are changed, by how many drivers at a
time. First all faults happen (safety); then a core is well for ever and everybody must get on
(liveness). Histories go to the linearizability checker, the rest is nexus_checks.py's.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from manifold.kernel.effects import Effect, Reply
from manifold.kernel.nexus.context import Timing
from manifold.kernel.nexus.messages import (
    Answer,
    ClientChange,
    Initialise,
    Message,
    Operate,
    SetVoters,
)
from manifold.kernel.nexus.protocol import Nexus
from manifold.kernel.nexus.values import Add, CasValue, Delete, Get, Put
from manifold.tools.simulator.faults import Faults
from manifold.tools.simulator.linearizable import Operation, check
from manifold.tools.simulator.nexus_checks import Observer
from manifold.tools.simulator.world import Node, World
from manifold.vm.kid import Kid

TIMING = Timing(
    timeout_ms=10.0,
    timeout_most_ms=60.0,
    contended_ms=150.0,
    doubt_ms=80.0,
    gc_ms=25.0,
    poll_ms=120.0,
    behind_ms=8.0,
    resume_ms=300.0,
)
REQUEST_MS = 150.0  # what a client gives an operation
PATIENCE_MS = 400.0  # then it takes its node for dead
SETTLE_MS = 4000.0  # after healing each node must have done an operation of its own
STEP_MS = 15.0
KEYS = ("a", "b")
Machine = Callable[..., Nexus]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a seed has drawn."""

    nodes: int
    voters: int
    faults: Faults
    duration_ms: float
    operations: int  # of each client
    changes: int  # of voters
    core: bool
    deletes: float  # part of the operations
    keys: tuple[str, ...] = KEYS


def draw(seed: int) -> Plan:
    """The plan of a seed: a third of them without changes, some with little that goes wrong."""
    random = Random(f"nexus {seed}")
    voters = random.choice((3, 3, 3, 5))
    nodes = voters + random.choice((0, 1, 1, 2))
    bad = random.choice((0.3, 1.0, 1.0))

    def some(most: float) -> float:
        return bad * most * random.random() if random.random() < 0.6 else 0.0

    faults = Faults(
        drop=some(0.25),
        dup=some(0.15),
        reorder=some(0.15),
        delay=(0.2, random.choice((1.0, 3.0, 8.0))),
        sync=(0.2, random.choice((1.0, 5.0, 20.0))),
        cut=some(200.0),
        partition=some(60.0),
        clog=some(40.0),
        broken=(10.0, 300.0),
        crash=some(300.0),
        down=(5.0, 200.0),
        pause=some(120.0),
        stop=(5.0, 200.0),
        clock=some(0.1),
        jump=some(20.0),
        fsync=some(0.004),
    )
    changes = random.choice((0, 1, 1, 3)) if nodes > 3 else 0
    core = changes == 0 and random.random() < 0.6  # else new voters may be out of it
    return Plan(
        nodes=nodes,
        voters=voters,
        faults=faults,
        duration_ms=random.choice((100.0, 200.0)),
        operations=random.choice((2, 2, 4)),
        changes=changes,
        core=core,
        deletes=random.choice((0.0, 0.15, 0.4)),
        keys=random.choice((("a",), KEYS)),
    )


@dataclass(slots=True)
class Outcome:
    """One schedule."""

    seed: int
    events: int = 0
    operations: int = 0
    answered: int = 0
    maybes: int = 0
    changes: int = 0  # of voters that came to an end
    collapsed: int = 0
    digest: str = ""
    failures: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Pending:
    """What a client waits for."""

    operation: Operation
    change: ClientChange
    op: str
    base: int = -1
    retried: bool = False


class Client:
    """One closed loop, at a node; where that is dead it goes to another."""

    def __init__(self, harness: Harness, number: int, operations: int) -> None:
        self._harness = harness
        self._number = number
        self._left = operations
        self._count = 0
        self._handle = 0
        self._stamps: dict[str, int] = {}
        self.pending: Pending | None = None
        self.done = operations == 0

    def next(self) -> None:
        """The next operation, or the end."""
        if self._left == 0:
            self.done = True
            return
        self._left -= 1
        self._count += 1
        harness = self._harness
        random = harness.random
        op = f"c{self._number}.{self._count}"
        kind, argument, change = self._choose(random)
        key = random.choice(harness.plan.keys)
        begun_ms = harness.world.now_ms
        operation = Operation(f"c{self._number}", key, kind, argument, None, begun_ms, None)  # type: ignore[arg-type]
        # Half of those who know a stamp mean to ask twice if need be.
        base = self._stamps.get(key, -1) if random.random() < 0.5 else -1
        self.pending = Pending(operation, change, op, base)
        self._ask(retry=False)

    def _choose(self, random: Random) -> tuple[str, tuple[int | None, ...], ClientChange]:
        harness = self._harness
        value = self._number * 1000 + self._count
        if random.random() < harness.plan.deletes:
            return "delete", (), Delete()
        kind = random.choice(("read", "read", "write", "add", "add", "cas", "create"))
        if kind == "read":
            return kind, (), Get()
        if kind == "write":
            return kind, (value,), Put(value)
        if kind == "add":
            return kind, (1,), Add(1)
        if kind == "create":
            return kind, (value,), CasValue(None, value)
        expected = harness.last_seen
        return kind, (expected, value), CasValue(expected, value)

    def _ask(self, *, retry: bool) -> None:
        harness, pending = self._harness, self.pending
        assert pending is not None
        node = harness.world.nodes[self._number % len(harness.world.nodes)]
        if retry or not node.up:
            up = [each for each in harness.world.nodes if each.up]
            if not up:
                harness.world.at(20.0, self._again, pending)
                return
            node = harness.random.choice(up)
        self._handle = harness.handle(self._answered)
        pending.retried = pending.retried or retry
        key = pending.operation.key
        message = Operate(
            pending.op, key, pending.change, REQUEST_MS, pending.retried, pending.base
        )
        handle = self._handle

        def call(machine: Any, now_ms: float) -> list[Effect]:
            return list(machine.request(handle, message, now_ms))

        harness.world.call(node, call)
        harness.world.at(PATIENCE_MS, self._patience, handle)

    def _again(self, pending: Pending) -> None:
        if self.pending is pending:
            self._ask(retry=pending.retried)

    def _patience(self, handle: int) -> None:
        if self.pending is not None and self._handle == handle:
            self._unknown()

    def _answered(self, handle: int, answer: Any) -> None:
        pending = self.pending
        if pending is None or handle != self._handle:
            return
        assert isinstance(answer, Answer)
        harness = self._harness
        if answer.status in ("ok", "no"):
            self._stamps[pending.operation.key] = answer.stamp
            harness.record(self._with_result(pending, answer), harness.world.now_ms)
            harness.outcome.answered += 1
            self._rest()
        elif answer.status in ("unavailable", "busy") and not pending.retried:
            harness.observer.refused[pending.op] = None
            self._rest()
        else:
            harness.outcome.maybes += 1
            self._unknown()

    def _with_result(self, pending: Pending, answer: Answer) -> Operation:
        result: Any = None
        kind = pending.operation.kind
        if kind == "read" or kind == "add":
            result = answer.data
        elif kind in ("cas", "create", "delete"):
            result = answer.status == "ok"
        if kind == "read" and isinstance(result, int):
            self._harness.last_seen = result
        return replace(pending.operation, result=result)

    def _unknown(self) -> None:
        """Its fate is not known: ask again under the same name, or leave it open."""
        pending = self.pending
        assert pending is not None
        if self._harness.random.random() < 0.6:
            self._ask(retry=True)
            return
        if pending.operation.kind != "read":
            self._harness.record(pending.operation, None)
        self._rest()

    def _rest(self) -> None:
        self.pending = None
        self._harness.world.at(self._harness.random.random() * 10.0, self.next)

    def close(self) -> None:
        """The schedule is over."""
        if self.pending is not None and self.pending.operation.kind != "read":
            self._harness.record(self.pending.operation, None)
        self.pending = None


class Harness:
    """One schedule."""

    def __init__(self, seed: int, machine: Machine, plan: Plan | None = None) -> None:
        self.plan = plan or draw(seed)
        self.outcome = Outcome(seed)
        self.history: list[Operation] = []
        self.last_seen: int | None = None
        self._machine = machine
        self._handlers: dict[int, Callable[[int, Any], None]] = {}
        self._handle = 0
        self.world = World(seed, self.plan.faults, self.plan.nodes, self._boot, Message)
        self.random = Random(self.world.random.getrandbits(64))
        self.observer = Observer(self.world)
        self.world.on_reply.append(self._replied)
        self.kids = tuple(node.kid for node in self.world.nodes)
        self.clients: list[Client] = []

    def _boot(
        self, kid: Kid, boot: int, durable: dict[str, bytes], random: Random, _now_ms: float
    ) -> Nexus:
        machine = self._machine(kid, boot, durable, random, TIMING)
        for each in self.kids:
            machine.forwarding.node_up(each)
        return machine

    def handle(self, handler: Callable[[int, Any], None]) -> int:
        self._handle += 1
        self._handlers[self._handle] = handler
        return self._handle

    def _replied(self, _node: Node, reply: Reply) -> None:
        handler = self._handlers.get(reply.request)
        if handler is not None:
            handler(reply.request, reply.message)

    def record(self, operation: Operation, ended_ms: float | None) -> None:
        self.outcome.operations += 1
        self.history.append(replace(operation, ended_ms=ended_ms))

    def ask(self, node: Node, message: Any, handler: Callable[[int, Any], None]) -> None:
        """A request of the harness's own."""
        handle = self.handle(handler)
        self.world.call(node, lambda machine, now_ms: machine.request(handle, message, now_ms))

    # -- the course of a schedule -----------------------------------------------------------------

    def run(self) -> Outcome:
        self.begin()
        plan, world = self.plan, self.world
        world.break_things()
        self.clients = [Client(self, n, plan.operations) for n in range(plan.nodes)]
        for client in self.clients:
            world.at(self.random.random() * 10.0, client.next)
        for _ in range(plan.changes):
            world.at(self.random.random() * plan.duration_ms, self._change)
        world.run(plan.duration_ms)
        self._heal()
        self._settle()
        return self.end()

    def begin(self) -> None:
        """All nodes up, the first voters known."""
        world = self.world
        for node in world.nodes:
            world.start(node)
        told: list[Answer] = []
        voters = self.kids[: self.plan.voters]
        self.ask(world.nodes[0], Initialise(voters), lambda _handle, answer: told.append(answer))
        world.run_until(lambda: bool(told), 1000.0, 5.0)
        assert told and told[0].status == "ok", f"the first voters: {told}"

    def end(self) -> Outcome:
        outcome, observer = self.outcome, self.observer
        for client in self.clients:
            client.close()
        observer.judge()
        outcome.failures += observer.failures
        violation = check(self.history)
        if violation is not None:
            outcome.failures.append(f"not linearizable: {violation}")
        outcome.events = self.world.events
        outcome.digest = self.world.digest()
        return outcome

    def _change(self) -> None:
        """New voters, asked for at one node or at two that race."""
        up = [node for node in self.world.nodes if node.up]
        for node in self.random.sample(up, min(len(up), self.random.choice((1, 1, 2)))):
            most = self.plan.nodes
            count = self.random.choice([n for n in (1, 2, 3, 3, 3, 4, 5) if n <= most])
            voters = tuple(sorted(self.random.sample(self.kids, count)))

            def done(_handle: int, answer: Any) -> None:
                self.outcome.changes += answer.status == "ok"

            self.ask(node, SetVoters(voters, 2000.0), done)

    def _heal(self) -> None:
        """A core with a quorum is well for ever; voters whose disk failed are started again."""
        world = self.world
        core = list(world.nodes)
        if self.plan.core:
            config = max(self.observer.configs.values(), key=lambda each: each.epoch)
            for node in self.random.sample(world.nodes, len(world.nodes)):
                rest = {each.kid: None for each in core if each is not node}
                if rest and config.quorum(rest):
                    core.remove(node)
        world.heal(None if len(core) == len(world.nodes) else core)
        for node in core:
            if node.up and node.machine.acceptor.stopped:
                world.crash(node)
                world.start(node)
        self._core = core

    def _settle(self) -> None:
        """Every node of the core must read, each key is read; a change must come to its end."""
        world, keys = self.world, self.plan.keys
        left: dict[tuple[int, str], None] = {}
        for place, node in enumerate(self._core):
            if keys:
                key = keys[place % len(keys)]
                left[(node.index, key)] = None
                self._demand(node, key, left)
        whole = len(self._core) == len(world.nodes)

        def settled() -> bool:
            if left:
                return False
            configs = [node.machine.config for node in self._core]
            return not whole or not any(config is None or config.joint for config in configs)

        if world.run_until(settled, SETTLE_MS, STEP_MS) is None:
            joint = [node.index for node in self._core if node.machine.config.joint]
            self.observer.fail(f"no progress after healing: {list(left)}, joint at {joint}")

    def _demand(self, node: Node, key: str, left: dict[tuple[int, str], None]) -> None:
        op = f"s{node.index}.{key}.{self.handle(lambda _handle, _answer: None)}"
        operation = Operation(op, key, "read", (), None, self.world.now_ms, None)

        def done(_handle: int, answer: Any) -> None:
            if answer.status == "ok":
                left.pop((node.index, key), None)
                found = replace(operation, result=answer.data)
                self.record(found, self.world.now_ms)
            else:
                self._demand(node, key, left)

        self.ask(node, Operate(op, key, Get(), 500.0), done)


def schedule(seed: int, machine: Machine = Nexus, plan: Plan | None = None) -> Outcome:
    """One schedule; a mutant of `machine` must be caught by some."""
    return Harness(seed, machine, plan).run()


@dataclass(slots=True)
class Summary:
    """Many schedules."""

    schedules: int = 0
    events: int = 0
    operations: int = 0
    answered: int = 0
    maybes: int = 0
    changes: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    failed: Outcome | None = None

    def text(self) -> str:
        rate = self.schedules / self.cpu_s if self.cpu_s else 0.0
        lines = [
            f"{self.schedules} schedules, {self.events} events, {self.operations} operations, "
            f"{self.maybes} unknown, {self.changes} changes of voters; {rate:.0f} schedules a "
            "second of processor time"
        ]
        if self.failed is not None:
            lines += [f"FAILED at seed {self.failed.seed}:", *self.failed.failures]
        return "\n".join(lines)


def run(seed: int, schedules: int, machine: Machine = Nexus, plans: Any = None) -> Summary:
    """Schedules from `seed` on, to the first that fails. `plans(seed)` draws other ones."""
    summary = Summary()
    begun_s, cpu_s = time.perf_counter(), time.process_time()
    collects = gc.isenabled()
    gc.disable()
    try:
        for number in range(seed, seed + schedules):
            outcome = schedule(number, machine, plans(number) if plans else None)
            summary.schedules += 1
            summary.events += outcome.events
            summary.operations += outcome.operations
            summary.answered += outcome.answered
            summary.maybes += outcome.maybes
            summary.changes += outcome.changes
            if outcome.failures:
                summary.failed = outcome
                break
            if number % 50 == 0:
                gc.collect()
    finally:
        if collects:
            gc.enable()
    summary.wall_s = time.perf_counter() - begun_s
    summary.cpu_s = time.process_time() - cpu_s
    return summary


def main(arguments: Sequence[str]) -> int:
    """`python -m manifold.tools.simulator.nexus SEED SCHEDULES`."""
    seed, schedules = (int(each) for each in arguments)
    summary = run(seed, schedules)
    print(summary.text())
    return 1 if summary.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
