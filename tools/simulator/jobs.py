"""Whole nodes in the simulator: membership, geode and scheduler together, with jobs to run.

`composite(roster)` hosts the kernel's own `Core`; workers and clients are simulated (`workers.py`,
`clients.py`). What is judged, from what clients get, what workers were told, and what each event
did to the ledgers:
  J1 results are exact: bit for bit what the documented tree over the blocks gives;
  J2 every block is counted exactly once, from a report of an attempt that was not fenced;
  J3 an attempt number is never used twice by a node, over all its processes;
  J7 an owner acknowledges only what it counted, a runner keeps results until they are acknowledged,
     and computes nothing that it gave up;
  J4 ledgers balance after every event, and every bound holds;
  J5 a job that was killed, that trapped or that ran into its timeout ends as such, no other does;
  J8 a job that was kept in Nexus goes on with another owner when its own is dead;
  J6 after healing every job ends, and then nothing of any is left: no run, attempt, live shard or
     gas in flight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

from manifold.kernel.config import Config
from manifold.kernel.geode.messages import Demand
from manifold.kernel.membership import messages as membership_messages
from manifold.kernel.membership.messages import Me, State, Update, saved_incarnation
from manifold.kernel.nexus import messages as nexus_messages
from manifold.kernel.process.messages import Result
from manifold.kernel.scheduler import blocks, outbox
from manifold.kernel.scheduler import messages as scheduler_messages
from manifold.kernel.scheduler.messages import (
    JobEvent,
    JobSpec,
    Reduction,
)
from manifold.tools.simulator import membership
from manifold.tools.simulator.clients import Clients, Task
from manifold.tools.simulator.faults import Faults
from manifold.tools.simulator.observed import Audit, Observed, left_over
from manifold.tools.simulator.protocols import Factory, Protocols, Roster
from manifold.tools.simulator.workers import (
    CORE_GAS_PER_S,
    RATE_ERROR,
    Program,
    Workers,
    same,
)
from manifold.tools.simulator.world import MINUTE_MS, Node, World
from manifold.vm.kid import Kid, kid_of
from manifold.vm.runtime.results import Partial, merge

COMPUTE = {"sensor": 0.25, "board": 0.5, "server": 1.0, "accelerator": 0.6}  # of a core, a slot
JOBS_PER_NODE, JOBS_MIN, JOBS_MAX = 1.5, 6, 40  # in one run; more show nothing new
FIRST_JOB_MS = 1000.0  # the cluster has met by then, where nothing is wrong
DURATION_MS, LARGE_DURATION_MS = 15_000.0, 8000.0
VOTERS, VOTERS_MS, AGAIN_MS = 3, 600.0, 12_000.0  # of clusters that have so many nodes
# What jobs wish for in turn; each is met by a node of any cluster of three and more.
WISHES: tuple[tuple[str, ...], ...] = (
    (), (), ("site=a",), (), ("rack=r1", "!ssd"), (), ("ssd",), (), ("!site=b",),
)  # fmt: skip
KILLED = 0.15  # of the jobs, while they run or after
STRIKES_PER_MINUTE = 12.0  # of each kind, over the cluster: a worker lost, a node slowed down
SLOW_FACTOR, SLOW_MS = 0.2, 3000.0
ENDLESS_GAS, ENDLESS_MS = 1e12, 500.0  # of an index; until its timeout
# After healing: a silent assignee, a stall that is forgiven, an orphan, a client that asks again;
# then the work itself, on whoever is left.
SETTLE_MS = 120_000.0
# A client's job may have ended while a former owner of it still runs it: for as long as it takes.
IDLE_MS = 20_000.0
MESSAGES = membership_messages.Message | scheduler_messages.Message | nexus_messages.Message


def machine_of(index: int, kid: Kid, boot: int) -> Me:
    """Four unequal classes in turn, with one to four slots. All but the first move to the other
    site each time they start: what others know of them is old for a while."""
    me = membership.node_of(index, kid, boot)
    site = "b" if index and (index + boot) % 2 == 0 else "a"
    own = [f"rack=r{index % 2}", f"site={site}", *(["ssd"] if index % 3 == 0 else [])]
    return replace(
        me, compute=COMPUTE[me.node_class], memory_bytes=1 << 30, bandwidth_bps=1e9,
        latency_ms=0.3, labels=tuple(own),
    )  # fmt: skip


class Exact:
    """J1, J5: what the clients got."""

    name = "results are exact, and jobs end as they should"
    settle_ms = SETTLE_MS

    clients: Clients

    def __init__(self, workers: Workers) -> None:
        self.failures: list[str] = []
        self.workers = workers
        self._judged = 0
        self._ends: dict[str, int] = {}

    def watch(self, world: World, faults: Faults) -> None:
        self._world = world
        self.clients = Clients(world)
        self.clients.watch()
        self.workers.watch(world)

    def settled(self, world: World, well: Sequence[Node]) -> str:
        tasks = [task for task in self.clients.tasks if task.ended or not self._waits(task, well)]
        open_ = [task.job for task in tasks if not task.ended]
        if open_:
            return f"{len(open_)} jobs have not ended: {open_[:3]}"
        if not self._judged:
            for task in tasks:
                self._judge(task)
        return ""

    def _waits(self, task: Task, well: Sequence[Node]) -> bool:
        """Queued at a node that stays cut off: for as long as that lasts (docs/outbox.md)."""
        queued = task.status is not None and task.status.state == "queued"
        return queued and self._world.nodes[task.home] not in well

    def summary(self) -> str:
        ends = ", ".join(f"{count} {how}" for how, count in sorted(self._ends.items()))
        return f"{self.name}: {ends or 'no jobs'}"

    def _judge(self, task: Task) -> None:
        self._judged += 1
        status = task.status
        fault = status.fault.code if status is not None and status.fault is not None else ""
        how = task.ended + (f" ({fault or task.error})" if task.ended != "done" else "")
        self._ends[how.split(":")[0]] = self._ends.get(how.split(":")[0], 0) + 1
        wanted = wanted_end(task, self._world.disturbed)
        if not any(how.startswith(each) for each in wanted):
            self.failures.append(f"J5 {task.job} ended {how}, not {' or '.join(wanted)}")
        if task.ended == "done":
            self._compare(task)

    def _compare(self, task: Task) -> None:
        expected = expected_results(task, self.workers)
        if len(expected) != len(task.results):
            self.failures.append(f"J1 {task.job}: {len(task.results)} results")
        for at, (found, right) in enumerate(zip(task.results, expected, strict=False)):
            if not same(found, right):
                self.failures.append(f"J1 {task.job}: result {at} is {found}, not {right}")
                return
        status = task.status
        if status is not None and status.done != status.total:
            self.failures.append(f"J1 {task.job}: {status.done} of {status.total} indices")


def wanted_end(task: Task, disturbed: bool) -> list[str]:
    """How a job may end. Under faults a shard may be lost too often, or nobody be reached."""
    if Program.decode(task.ir).traps and not task.spec.isolate:
        wanted = ["failed (trap"]
    elif task.spec.timeout_ms:
        wanted = ["failed (exhausted"]
    else:
        wanted = ["done"]
    if task.kill:
        wanted.append("cancelled")
    if disturbed:
        wanted += ["failed (exhausted", "failed (unavailable", "refused (unavailable"]
    return wanted


def expected_results(task: Task, workers: Workers) -> list[Result]:
    """By definition: blocks in order, reduced by the documented tree."""
    program, spec = Program.decode(task.ir), task.spec
    every = [workers.result(spec, program, block) for block in range(blocks.count(spec))]
    if spec.isolate or spec.reduce == "collect" or not every:
        return every
    partials = [each for each in every if isinstance(each, Partial)]
    return [by_eights(spec.reduce, partials)]


def by_eights(reduce: Reduction, level: list[Partial]) -> Partial:
    while len(level) > 1:
        level = [merge(reduce, level[at : at + 8]) for at in range(0, len(level), 8)]
    return level[0]


class Counted:
    """J2, J3, J4, as the observed cores saw them."""

    name = "blocks are counted once, from attempts that were not fenced; ledgers balance"
    settle_ms = 0.0

    def __init__(self, audit: Audit, workers: Workers) -> None:
        self.failures = audit.failures
        self._audit = audit
        self.workers = workers
        self.taken_over = 0

    def watch(self, world: World, faults: Faults) -> None:
        """The cores and the workers tell."""
        world.on_notify.setdefault(JobEvent, []).append(self._happened)

    def _happened(self, node: Node, event: JobEvent) -> None:
        self.taken_over += event.what == "taken over"

    def settled(self, world: World, well: Sequence[Node]) -> str:
        self.failures += self.workers.failures
        self.workers.failures.clear()
        return ""

    def summary(self) -> str:
        audit, workers = self._audit, self.workers
        again = workers.blocks_done - audit.counted
        return (
            f"{self.name}: {audit.counted} counted, {again} computed in vain, {audit.fenced} "
            f"reports fenced, {workers.lost} workers lost, {self.taken_over} jobs taken over"
        )


class Idle:
    """J6."""

    name = "nothing is left of jobs that ended"
    settle_ms = SETTLE_MS + IDLE_MS

    def __init__(self, workers: Workers) -> None:
        self.failures: list[str] = []
        self.workers = workers
        self._since_ms = -1.0  # all jobs have ended

    def watch(self, world: World, faults: Faults) -> None:
        """It looks at the end."""

    def settled(self, world: World, well: Sequence[Node]) -> str:
        """Asked when all jobs have ended for their clients; owners have heard it soon after."""
        if self._since_ms < 0:
            self._since_ms = world.now_ms
        why = next((left for left in map(self._left, well) if left), "")
        if why and world.now_ms - self._since_ms > IDLE_MS:
            self.failures.append(f"J6 after {IDLE_MS:g} ms without jobs: {why}")
            return ""
        return why

    def _left(self, node: Node) -> str:
        if not node.up:
            return f"node {node.index} is down"
        left = left_over(node.machine)
        runs = self.workers.running(node)
        return (
            f"node {node.index}: {left or f'{len(runs)} runs on workers'}" if left or runs else ""
        )

    def summary(self) -> str:
        return self.name


# -- what is done to the cluster ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Workload:
    """Jobs at random moments, some killed; workers that are lost and nodes that slow down."""

    exact: Exact
    workers: Workers
    jobs: int
    spread_ms: float

    def begin(self, world: World) -> None:
        world.at(VOTERS_MS, self._make_voters, world)
        for number in range(self.jobs):
            at_ms = FIRST_JOB_MS + self.spread_ms * world.random.random()
            world.at(at_ms, self._submit, world, number)
        if not world.faults.quiet:
            for strike in (self._lose_worker, self._slow_down):
                self._plan(world, strike)

    def _make_voters(self, world: World) -> None:
        """As a supervisor does, until it has come about."""
        kids = tuple(str(node.kid) for node in world.nodes[:VOTERS])
        up = [node for node in world.nodes if node.up]
        if len(kids) < VOTERS or any(node.machine.nexus.config is not None for node in up):
            return
        if up:
            request = nexus_messages.Initialise(kids)
            world.call(up[0], lambda core, now_ms: core.consult(1, request, now_ms))
        world.at(AGAIN_MS, self._make_voters, world)

    def _submit(self, world: World, number: int) -> None:
        home = world.random.randrange(len(world.nodes))
        task = random_task(world.random, number, home, len(world.nodes))
        self.exact.clients.submit(task)
        if world.random.random() < KILLED:
            kill_ms = 2000.0 * world.random.random() ** 2
            world.at(kill_ms, self.exact.clients.kill, task)

    def _plan(self, world: World, strike: Callable[[World], None]) -> None:
        wait_ms = world.random.expovariate(STRIKES_PER_MINUTE / MINUTE_MS)
        world.at(wait_ms, self._strike, world, strike)

    def _strike(self, world: World, strike: Callable[[World], None]) -> None:
        if world.network.faulty:  # until the world is healed
            world.disturbed = True
            strike(world)
            self._plan(world, strike)

    def _lose_worker(self, world: World) -> None:
        busy = [node for node in world.nodes if node.up and self.workers.running(node)]
        if busy:
            node = world.random.choice(busy)
            self.workers.lose(node, world.random.choice(self.workers.running(node))[0])

    def _slow_down(self, world: World) -> None:
        node = world.random.choice(world.nodes)
        self.workers.factors[node.index] = SLOW_FACTOR
        world.at(SLOW_MS, self._recover, node.index)

    def _recover(self, index: int) -> None:
        self.workers.factors.pop(index, None)


def random_task(random: Random, number: int, home: int, nodes: int) -> Task:
    """A job of any kind: most are small, some take seconds; some trap, some never end."""
    count = random.choice((0, 1, 1, 5, 60, 300, 700, 2000))
    work_ms = 10 ** random.uniform(0, 3.3)
    isolate = count > 0 and random.random() < 0.2
    endless = count > 0 and random.random() < 0.05
    lo = random.randrange(-1000, 1000)
    indices = tuple(random.randrange(10_000) for _ in range(count)) if isolate else ()
    gas = work_ms / 1000 * CORE_GAS_PER_S / max(1, count)
    traps: tuple[int, ...] = ()
    if count and not endless and random.random() < 0.15:
        traps = (indices[0] if indices else lo + random.randrange(count),)
    kind = random.choice(("ints", "floats", "mixed"))
    program = Program(kind, ENDLESS_GAS if endless else gas, number, traps)
    reduce: Reduction = random.choice(("sum", "min", "max", "count", "collect"))
    demand = Demand()
    if nodes > 2 and random.random() < 0.1:
        demand = Demand(node_class="server")
    elif nodes > 2:
        demand = Demand(labels=WISHES[number % len(WISHES)])
    spec = JobSpec(
        kid_of(program.ir), lo, lo + count, "collect" if isolate else reduce, (), isolate, indices,
        ENDLESS_MS if endless else 0.0, f"job {number}", demand,
    )  # fmt: skip
    return Task(f"J-{number:016x}", spec, program.ir, home)


# -- what runs ------------------------------------------------------------------------------------


def composite(
    roster: Roster, config: Config | None = None, core: type[Observed] = Observed
) -> Protocols:
    """Membership, geode and scheduler on each node. A mutant of `core` must be caught."""
    settings = config or Config()
    random = Random(roster.seed)
    nodes = len(roster.kids)
    place = {kid: index for index, kid in enumerate(roster.kids)}
    warm: tuple[Update, ...] = ()
    if nodes > membership.WARM_ABOVE:
        warm = tuple(
            Update(kid, 1, 1, State.ALIVE, "", machine_of(index, kid, 1).meta)
            for index, kid in enumerate(roster.kids)
        )
    audit = Audit()
    workers = Workers([true_speed(random, index, kid) for index, kid in enumerate(roster.kids)])

    def boot(
        kid: Kid, number: int, durable: dict[str, bytes], random: Random, now_ms: float
    ) -> Observed:
        index = place[kid]
        cold = number > 1 or index >= nodes - membership.COLD_STARTERS
        made = core(
            machine_of(index, kid, number),
            settings,
            random,
            incarnation=saved_incarnation(durable.get("incarnation")),
            seeds=roster.addresses[: membership.SEEDS],
            known=() if cold else warm,
            durable={name: record for name, record in durable.items() if name.startswith("x.")},
            outbox={name: r for name, r in durable.items() if name.startswith(outbox.PREFIX)},
        )
        made.audit = audit
        return made

    exact = Exact(workers)
    duration_ms = DURATION_MS if nodes <= membership.WARM_ABOVE else LARGE_DURATION_MS
    jobs = max(JOBS_MIN, min(JOBS_MAX, round(JOBS_PER_NODE * nodes)))
    workload = Workload(exact, workers, jobs, duration_ms - FIRST_JOB_MS)
    return Protocols(
        boot=boot,
        messages=MESSAGES,
        checkers=[
            *membership.checkers(settings.membership, nodes, lambda machine: machine.membership),  # type: ignore[attr-defined]
            exact, Counted(audit, workers), Idle(workers),
        ],
        workload=workload.begin,
        duration_ms=duration_ms,
    )  # fmt: skip


def true_speed(random: Random, index: int, kid: Kid) -> float:
    """What a slot of this node really gives: near what its class promises."""
    error = 1 + RATE_ERROR * (2 * random.random() - 1)
    return machine_of(index, kid, 1).compute * CORE_GAS_PER_S * error


def factory(config: Config | None = None, core: type[Observed] = Observed) -> Factory:
    """`composite` with another configuration, or a mutant."""
    return lambda roster: composite(roster, config, core)
