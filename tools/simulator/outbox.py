"""A minority that queues: cuts, crashes and submissions whose submitter never asks again.

Interface: `schedule(seed) -> Outcome`, as many as one likes. Six whole nodes (`kernel/core.py`),
three voters; some nodes, with one voter at most, are cut off, and one of them is given jobs: most
add one to a global of their own for each of their indices. The node crashes at the worst of times,
before and after the cut ends; some jobs are submitted again on the other side under the same id,
some are cancelled while they wait. What a job has done is kept by the cluster for RETAIN_MS only.

Judged from outside, once everything is well for ever:
  B1  what was told to be queued has ended, `done`, unless it was cancelled;
  B2  its global holds exactly as many as it has indices: run once, in effect;
  B3  what was told to be cancelled while it was queued has done nothing;
  B4  nothing is left in any outbox, and no job runs;
  B5  a job with effects that has ended is not begun afresh by a node that had it in its outbox.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from manifold.kernel.config import Config
from manifold.kernel.effects import Effect, Reply, after_writes
from manifold.kernel.errors import ManifoldError
from manifold.kernel.geode.messages import Demand
from manifold.kernel.nexus.messages import Answer, Get, Initialise, Operate
from manifold.kernel.process.messages import Fault, GlobalCall
from manifold.kernel.scheduler.globalcalls import GlobalAnswer
from manifold.kernel.scheduler.messages import (
    AbortRun,
    JobEvent,
    JobSpec,
    JobStatus,
    KillJob,
    LimitRun,
    StartRun,
    SubmitJob,
)
from manifold.tools.simulator.faults import Faults
from manifold.tools.simulator.jobs import composite
from manifold.tools.simulator.observed import Audit
from manifold.tools.simulator.protocols import Protocols, Roster
from manifold.tools.simulator.run import build
from manifold.tools.simulator.schedules import schedules
from manifold.tools.simulator.workers import Program, Workers
from manifold.tools.simulator.world import Node, World
from manifold.vm.kid import Kid, kid_of

NODES, VOTERS = 6, 3
NETWORK = Faults(drop=0.02, dup=0.01, reorder=0.02, delay=(0.2, 10.0), sync=(0.2, 30.0))
RETAIN_MS = 4000.0  # less than a node may be down: what has ended may be forgotten by then
MEET_MS = 2500.0
CUT_MS = (20_000.0, 40_000.0)
CRASHES = (1, 4)
DOWN_MS = (100.0, 15_000.0)
SETTLE_MS, STEP_MS = 150_000.0, 500.0
INDICES = (1, 6)
GAS = 1e5


@dataclass(slots=True)
class _Writing:
    """A run of a program that adds one to its global for each index."""

    node: Node
    start: StartRun
    next: int
    last: int
    number: int = 0


class Writers(Workers):
    """Workers whose programs have effects: a block is done when its effect has been answered."""

    def __init__(self, speeds: Sequence[float]) -> None:
        super().__init__(speeds)
        self._writing: dict[tuple[int, int], _Writing] = {}

    def watch(self, world: World) -> None:
        super().watch(world)
        world.on_notify.setdefault(GlobalAnswer, []).append(self._answered)
        world.on_crash.append(self._forget)

    def running(self, node: Node) -> list[tuple[int, JobSpec]]:
        mine = [(slot, w.start.spec) for (i, slot), w in self._writing.items() if i == node.index]
        return [*super().running(node), *mine]

    def _start(self, node: Node, event: StartRun) -> None:
        if not event.spec.effects:
            super()._start(node, event)
            return
        run = _Writing(node, event, event.first, event.last)
        self._writing[(node.index, event.worker)] = run
        self._ask(run)

    def _ask(self, run: _Writing) -> None:
        start, block = run.start, run.next
        run.number += 1
        call = GlobalCall(
            start.run, run.number, start.spec.lo + block, 0, "add", start.spec.effects[0], False,
            0, 1, start.spec.lo + block,
        )  # fmt: skip
        self._tell(run.node, lambda core, now: core.global_call(start.worker, call, now))

    def _answered(self, node: Node, event: GlobalAnswer) -> None:
        run = self._writing.get((node.index, event.slot))
        if run is None or (event.done.run, event.done.number) != (run.start.run, run.number):
            return
        if event.done.fault is not None:
            self._over(run, event.done.fault)
            return
        start, block = run.start, run.next
        result = self.result(start.spec, Program.decode(start.ir), block)
        run.next += 1
        self._tell(
            node,
            lambda core, now: core.run_blocks(
                start.worker, start.run, block, (result,), GAS, 1.0, now
            ),
        )
        if run.next >= run.last:
            self._over(run, None)
        else:
            self._ask(run)

    def _over(self, run: _Writing, fault: Fault | None) -> None:
        start = run.start
        self._writing.pop((run.node.index, start.worker), None)
        self._tell(run.node, lambda core, now: core.run_ended(start.worker, start.run, fault, now))

    def _limit(self, node: Node, event: LimitRun) -> None:
        run = self._writing.get((node.index, event.worker))
        if run is None or run.start.run != event.run:
            super()._limit(node, event)
            return
        run.last = min(run.last, max(event.last, run.next + 1))
        last = run.last
        self._tell(node, lambda core, now: core.run_limited(event.worker, event.run, last, now))

    def _abort(self, node: Node, event: AbortRun) -> None:
        run = self._writing.get((node.index, event.worker))
        if run is not None and run.start.run == event.run:
            self._over(run, None)
        else:
            super()._abort(node, event)

    def _forget(self, node: Node) -> None:
        for key in [key for key in self._writing if key[0] == node.index]:
            del self._writing[key]


@dataclass(slots=True)
class Submission:
    """A job, and what its submitter was told of it."""

    job: str
    spec: JobSpec
    ir: bytes
    kill: bool
    told: list[str] = field(default_factory=list)  # states, in the order of the answers
    cancelled: bool = False  # as it was told while the job was queued
    late: bool = False  # it was submitted again after its end

    @property
    def queued(self) -> bool:
        return "queued" in self.told


@dataclass(frozen=True, slots=True)
class Told:
    """An answer, once all that it says is durable."""

    submission: Submission
    answer: JobStatus


@dataclass(slots=True)
class Outcome:
    """What became of one schedule."""

    failures: list[str] = field(default_factory=list)
    queued: int = 0
    cancelled: int = 0
    crashes: int = 0
    taken_over: int = 0
    digest: str = ""


class Schedule:
    """One schedule."""

    def __init__(self, seed: int) -> None:
        self.random = Random(f"outbox {seed}")
        self.outcome = Outcome()
        self.ended: dict[str, str] = {}
        self.values: dict[int, Answer] = {}
        self._handle = 1000
        self.world, self.made = build(seed, NODES, NETWORK, self._protocols)
        self.world.on_notify.setdefault(Told, []).append(self._told)
        self.world.on_notify.setdefault(JobEvent, []).append(self._happened)
        self.world.on_reply.append(self._replied)
        self.submissions = [self._submission(number) for number in range(self.random.randint(3, 8))]

    def _protocols(self, roster: Roster) -> Protocols:
        config = Config()
        made = composite(roster, replace(config, scheduler=_forgets(config)))
        self.writers = Writers([1e9] * NODES)
        audit = Audit()
        boot = made.boot

        def booted(kid: Kid, number: int, durable: Any, random: Random, now_ms: float) -> Any:
            core: Any = boot(kid, number, durable, random, now_ms)
            core.audit = audit
            return core

        return replace(made, boot=booted, checkers=[], workload=lambda world: None)

    def _submission(self, number: int) -> Submission:
        program = Program("ints", GAS, number)
        count = self.random.randint(*INDICES)
        effects = (f"g{number}",) if self.random.random() < 0.75 else ()
        name = f"job {number}"
        demand = Demand(labels=("rack=r1",)) if number % 3 == 1 else Demand()
        spec = JobSpec(
            kid_of(program.ir), 0, count, "sum", name=name, demand=demand, effects=effects
        )
        return Submission(f"J-{number:016x}", spec, program.ir, self.random.random() < 0.2)

    # -- what happens -------------------------------------------------------------------------

    def meet(self) -> None:
        """All nodes are up and know who votes; from then on the network is a bad one."""
        world = self.world
        self.writers.watch(world)
        world.start_all()
        world.run(MEET_MS)
        kids = tuple(str(node.kid) for node in world.nodes[:VOTERS])
        world.call(world.nodes[0], lambda core, now: core.consult(1, Initialise(kids), now))
        world.run(MEET_MS)
        world.network.faulty = True

    def run(self) -> Outcome:
        world, random = self.world, self.random
        self.meet()
        minority = [world.nodes[0], *random.sample(world.nodes[VOTERS:], random.randint(1, 2))]
        others = [node for node in world.nodes if node not in minority]
        home = random.choice(minority)
        cut_ms = random.uniform(*CUT_MS)
        world.partition(minority, cut_ms)
        for submission in self.submissions:
            world.at(random.uniform(0.4, 0.95) * cut_ms, self._submit, submission, home, ())
            if submission.kill:
                world.at(random.uniform(0.6, 1.1) * cut_ms, self._kill, submission, home)
            elif random.random() < 0.4:
                again_ms = random.uniform(0.8, 1.3) * cut_ms
                world.at(again_ms, self._again, submission, random.choice(others), home)
        for _ in range(random.randint(*CRASHES)):
            world.at(random.uniform(0.5, 1.3) * cut_ms, self._crash, home)
        world.run(cut_ms * 1.3)
        world.run(random.uniform(0.0, 3.0) * RETAIN_MS)  # what ended meanwhile may be forgotten
        world.heal(None)
        if world.run_until(lambda: not self._open(), SETTLE_MS, STEP_MS) is None:
            self._fail(f"B4 not within {SETTLE_MS:g} ms of healing: {self._open()}")
        self._judge()
        self.outcome.digest = world.digest()
        return self.outcome

    def _submit(self, submission: Submission, node: Node, origins: tuple[Kid, ...]) -> None:
        wish = SubmitJob(
            submission.job, submission.spec, submission.ir, False, (), True, bool(origins), origins
        )
        self._request(submission, node, wish)

    def _again(self, submission: Submission, node: Node, home: Node) -> None:
        """Its submitter has been told where it is queued, and is on the other side now."""
        if submission.queued:
            submission.late |= submission.job in self.ended
            self._submit(submission, node, (home.kid,))

    def _kill(self, submission: Submission, node: Node) -> None:
        if submission.queued:
            self._request(submission, node, KillJob(submission.job))

    def _request(self, submission: Submission, node: Node, wish: SubmitJob | KillJob) -> None:
        if not node.up:
            return

        def serve(core: Any, now_ms: float) -> list[Effect]:
            queue = core.scheduler.owner.queue
            waits = isinstance(wish, KillJob) and queue.find(wish.job) in queue.jobs()
            try:
                answer, effects = core.request("C-1", wish, now_ms)
            except ManifoldError:
                return []  # it is told that it is not there, or not taken: nothing is promised
            if isinstance(wish, KillJob) and not waits:
                submission.told.append("killed")  # while it ran: anything may be done of it
            return after_writes(effects, Told(submission, answer))

        self.world.call(node, serve)

    def _crash(self, node: Node) -> None:
        if node.up:
            self.outcome.crashes += 1
            self.world.crash(node)
            self.world.restart(node, self.random.uniform(*DOWN_MS))

    # -- what is seen -------------------------------------------------------------------------

    def _told(self, node: Node, event: Told) -> None:
        submission, state = event.submission, event.answer.state
        submission.told.append(state)
        submission.cancelled |= state == "cancelled" and "killed" not in submission.told

    def _happened(self, node: Node, event: JobEvent) -> None:
        self.outcome.taken_over += event.what == "taken over"
        if event.what in ("done", "failed", "cancelled"):
            first = self.ended.setdefault(event.job, event.what)
            if event.what == "failed" and first == "done" and not self._of(event.job).late:
                self._fail(f"B5 {event.job} was done, and is begun again by node {node.index}")

    def _of(self, job: str) -> Submission:
        return next(each for each in self.submissions if each.job == job)

    def _replied(self, node: Node, reply: Reply) -> None:
        if isinstance(reply.message, Answer):
            self.values[reply.request] = reply.message

    def _open(self) -> str:
        """What is not over yet; "" where everything is."""
        for node in self.world.nodes:
            if not node.up:
                return f"node {node.index} is down"
            owner = node.machine.scheduler.owner
            if owner.queue.outbox.entries:
                return f"node {node.index} has {list(owner.queue.outbox.entries)} in its outbox"
            if owner.jobs or owner.keeper.guards or not owner.keeper.known:
                return f"node {node.index} owns {list(owner.jobs)}"
        return ""

    def _judge(self) -> None:
        self.outcome.failures += self.writers.failures  # V2: each where it may run
        for number, submission in enumerate(self.submissions):
            if not submission.queued:
                continue
            self.outcome.queued += 1
            value = self._value(f"globals/g{number}")
            total = submission.spec.hi - submission.spec.lo
            ended = self.ended.get(submission.job, "lost")
            if submission.cancelled:
                self.outcome.cancelled += 1
                if value:
                    self._fail(f"B3 {submission.job} was cancelled, and has done {value}")
            elif submission.kill:
                if not 0 <= value <= total:
                    self._fail(f"B2 {submission.job} was killed, and has done {value} of {total}")
            else:
                if ended != "done":
                    self._fail(f"B1 {submission.job} is {ended}, and was told {submission.told}")
                if value != total and submission.spec.effects:
                    self._fail(f"B2 {submission.job} has done {value} of {total}")

    def _value(self, key: str) -> int:
        self._handle += 1
        handle = self._handle
        wish = Operate(f"judge.{handle}", key, Get())
        self.world.call(self.world.nodes[1], lambda core, now: core.consult(handle, wish, now))
        self.world.run_until(lambda: handle in self.values, SETTLE_MS, 50.0)
        data = self.values[handle].data
        return data if isinstance(data, int) else 0

    def _fail(self, what: str) -> None:
        self.outcome.failures.append(what)


def _forgets(config: Config) -> Any:
    return replace(config.scheduler, retain_ms=RETAIN_MS)


def schedule(seed: int) -> Outcome:
    """One schedule; what is broken in the scheduler must be caught by some."""
    return Schedule(seed).run()


def main(arguments: Sequence[str]) -> int:
    """`python -m manifold.tools.simulator.outbox SEED SCHEDULES`."""
    return schedules(schedule, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
