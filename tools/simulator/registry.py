"""The registry in the simulator: whole clusters of it, each node on its real Nexus.

Interface: `schedule(seed, machine, timing) -> Outcome` runs one schedule drawn from a seed: nodes
join, crash, pause, are cut off, leave and come back, some under a name that is another's or under
a new one; then a core is well for ever, the others are gone for good, and the ring must come to
be the core. Membership is a failure detector of the harness's own, which is as wrong as a real
one: it holds for dead whom it has not reached for a while, each node for itself.
`quiet(nodes)` starts a cluster at once and counts what that costs, and what rest costs.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from manifold.kernel.effects import Effect, Held, Notify, Persist, Reply, Send, SetTimer
from manifold.kernel.membership.messages import Me, Member, MemberChanged, State
from manifold.kernel.nexus.ask import Ask
from manifold.kernel.nexus.context import Timing as NexusTiming
from manifold.kernel.nexus.leases import LeaseLost
from manifold.kernel.nexus.messages import Operate
from manifold.kernel.nexus.protocol import Nexus
from manifold.kernel.registry.messages import REGISTRAR_KEY, RINGS_KEY, Timing
from manifold.kernel.registry.protocol import Registry
from manifold.kernel.registry.records import to_bytes
from manifold.tools.simulator.faults import Faults
from manifold.tools.simulator.nexus import TIMING as NEXUS_TIMING
from manifold.tools.simulator.nexus import Harness, Plan
from manifold.tools.simulator.registry_checks import Belief, Beliefs, Judge
from manifold.tools.simulator.world import Node
from manifold.vm.kid import Kid

TIMING = Timing(
    settle_ms=20.0,
    retire_ms=300.0,
    lease_ms=60.0,
    patience_ms=60.0,
    acquire_ms=240.0,
    operate_ms=150.0,
    retry_ms=20.0,
    retry_most_ms=200.0,
    forget_ms=600.0,
    look_ms=2.0,
)
DETECT_MS = 5.0  # the detector looks so often
SUSPECT_MS = (15.0, 60.0)  # and takes a node for dead after so long
SETTLE_MS = 6000.0  # after healing; retiring takes 300 ms, contending up to 1.5 s a try
MEMORY_BYTES = (1 << 26, 1 << 28, 1 << 30, 1 << 32)
CLASSES = ("sensor", "board", "server", "accelerator")
Machine = Callable[[Me, Random, Timing], Registry]


class Host(Nexus):
    """One node: Nexus and the registry on top of it, put together as the node's core does."""

    def __init__(self, registry: Registry, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.registry = registry
        self.asked: dict[str, int] = {}  # requests of the registry, by their type
        self.on_write: Callable[[bytes], None] = lambda data: None
        self._tokens: dict[int, int] = {}
        self._dues = [float("inf"), float("inf")]
        self._known = False

    def start(self, now_ms: float) -> list[Effect]:
        return self._join(super().start(now_ms), self.registry.start(now_ms), now_ms)

    def receive(self, source: Kid, message: Any, now_ms: float) -> list[Effect]:
        return self._join(super().receive(source, message, now_ms), [], now_ms)

    def tick(self, now_ms: float) -> list[Effect]:
        mine: list[Effect] = []
        if now_ms >= self._dues[1]:
            self._dues[1] = float("inf")
            mine = self.registry.tick(now_ms)
        theirs: list[Effect] = []
        if now_ms >= self._dues[0]:
            self._dues[0] = float("inf")
            theirs = super().tick(now_ms)
        return self._join(theirs, mine, now_ms)

    def request(self, client: int, message: Any, now_ms: float) -> list[Effect]:
        return self._join(super().request(client, message, now_ms), [], now_ms)

    def storage_failed(self, now_ms: float, why: str = "") -> list[Effect]:
        return self._join(super().storage_failed(now_ms, why), [], now_ms)

    def member(self, change: MemberChanged, now_ms: float) -> list[Effect]:
        return self._join([], self.registry.member_changed(change, now_ms), now_ms)

    def leave(self, now_ms: float) -> list[Effect]:
        return self._join([], self.registry.leave(now_ms), now_ms)

    def forget(self, kid: Kid, now_ms: float) -> list[Effect]:
        return self._join([], self.registry.forget(kid, now_ms), now_ms)

    def _join(self, theirs: list[Effect], mine: list[Effect], now_ms: float) -> list[Effect]:
        out: list[Effect] = []
        queue: deque[tuple[int, list[Effect]]] = deque(((0, theirs), (1, mine)))
        while queue:
            owner, effects = queue.popleft()
            for place, effect in enumerate(effects):
                if isinstance(effect, Persist):
                    out.append(Held(effect, tuple(effects[place + 1 :])))
                    break
                self._inside(owner, effect, queue, out, now_ms)
            if not queue and not self._known and self.config is not None:
                self._known = True
                queue.append((1, self.registry.nexus_known(now_ms)))
        due_ms = min(self._dues)
        if due_ms != float("inf"):
            out.append(SetTimer(due_ms))
        return out

    def _inside(
        self,
        owner: int,
        effect: Effect,
        queue: deque[tuple[int, list[Effect]]],
        out: list[Effect],
        now_ms: float,
    ) -> None:
        match effect:
            case SetTimer(at_ms=at_ms):
                self._dues[owner] = at_ms
            case Notify(event=Ask(token=token, request=request)):
                if isinstance(request, Operate) and request.key == RINGS_KEY:
                    self.on_write(request.change.data)  # type: ignore[union-attr,arg-type]
                name = type(request).__name__
                self.asked[name] = self.asked.get(name, 0) + 1
                handle = -len(self._tokens) - 1
                self._tokens[handle] = token
                queue.append((0, super().request(handle, request, now_ms)))
            case Reply(request=handle, message=message) if handle < 0:
                token = self._tokens[handle]
                queue.append((1, self.registry.answered(token, message, now_ms)))
            case Notify(event=LeaseLost(key=key, fence=fence)) if key == REGISTRAR_KEY:
                queue.append((1, self.registry.lease_lost(fence, now_ms)))
            case _:
                out.append(effect)


@dataclass(frozen=True, slots=True)
class Names:
    """By which aliases nodes go: some share one, some have another after each restart."""

    shared: bool
    changing: bool

    def of(self, index: int, boot: int) -> str:
        if self.shared and index in (1, 2):
            return "twin"
        if self.changing and index == 3:
            return f"name-{boot % 3}"
        return f"node-{index}"


# Registrars that stop for longer than their lease, clocks that end it early, much to do.
ROUGH = Faults(
    drop=0.02,
    delay=(0.2, 3.0),
    sync=(0.2, 3.0),
    broken=(10.0, 300.0),
    crash=200.0,
    down=(5.0, 900.0),
    pause=300.0,
    stop=(50.0, 250.0),
    clock=0.1,
    jump=250.0,
)


def rough(seed: int) -> tuple[Plan, Names]:
    """Two registrars at a time, as often as can be."""
    plan, names = draw(seed)
    return replace(plan, nodes=6, voters=3, faults=ROUGH, duration_ms=1500.0, core=False), names


def draw(seed: int) -> tuple[Plan, Names]:
    random = Random(f"registry {seed}")
    voters = random.choice((3, 3, 5))
    bad = random.choice((0.3, 1.0, 1.0))

    def some(most: float) -> float:
        return bad * most * random.random() if random.random() < 0.6 else 0.0

    faults = Faults(
        drop=some(0.15),
        dup=some(0.1),
        reorder=some(0.1),
        delay=(0.2, random.choice((1.0, 3.0))),
        sync=(0.2, random.choice((1.0, 5.0))),
        cut=some(120.0),
        partition=some(60.0),
        clog=some(30.0),
        broken=(10.0, 500.0),
        crash=some(150.0),
        down=(5.0, 500.0),
        pause=some(150.0),
        stop=(10.0, 400.0),
        clock=some(0.1),
        jump=some(40.0),
    )
    plan = Plan(
        nodes=voters + random.choice((1, 2, 4)),
        voters=voters,
        faults=faults,
        duration_ms=random.choice((500.0, 1000.0, 1500.0)),
        operations=0,
        changes=0,
        core=random.random() < 0.5,
        deletes=0.0,
        keys=(),
    )
    return plan, Names(random.random() < 0.5, random.random() < 0.3)


@dataclass(slots=True)
class Figures:
    """One schedule."""

    seed: int
    events: int
    epochs: int
    twice: int
    settled_ms: float
    failures: list[str]
    digest: str


class Schedule(Harness):
    """One schedule of the registry."""

    def __init__(
        self,
        seed: int,
        machine: Machine = Registry,
        timing: Timing = TIMING,
        plan: Plan | None = None,
        names: Names | None = None,
        nexus_timing: NexusTiming = NEXUS_TIMING,
        judged: Timing | None = None,
    ) -> None:
        drawn, drawn_names = draw(seed)
        self.names = names or drawn_names
        self._registry = machine
        self._timing = timing
        self._nexus_timing = nexus_timing
        super().__init__(seed, Nexus, plan or drawn)
        self.beliefs: Beliefs = {}
        self.judge = Judge(self.world, self.observer, judged or timing, self.beliefs)
        self.blind: dict[tuple[int, int], float] = {}  # who does not see whom, until when
        self._reached: dict[tuple[int, int], float] = {}
        self._patience: dict[tuple[int, int], float] = {}
        self._gone: dict[int, str] = {}  # who is down for its own reasons, and what was told
        self.world.on_boot.append(self._booted)
        self.world.at(0.0, self._detect)

    def _boot(
        self, kid: Kid, boot: int, durable: dict[str, bytes], random: Random, _now_ms: float
    ) -> Nexus:
        index = next(place for place, each in enumerate(self.kids) if each == kid)
        registry = self._registry(self._me(index, boot), random, self._timing)
        rest: tuple[Any, ...] = (kid, boot, durable, random)
        host = Host(registry, *rest, self._nexus_timing)
        host.on_write = lambda data: self.judge.writes(index, data)
        for each in self.kids:
            host.forwarding.node_up(each)
        return host

    def _me(self, index: int, boot: int) -> Me:
        return Me(
            self.kids[index],
            boot,
            self.names.of(index, boot),
            CLASSES[index % 4],
            (f"sim://{index}",),
            memory_bytes=MEMORY_BYTES[index % 4],
            gpu=index % 4 == 3,
        )

    # -- membership -------------------------------------------------------------------------------

    def _booted(self, node: Node) -> None:
        self._gone.pop(node.index, None)
        for other in self.world.nodes:
            self.beliefs[(node.index, other.index)] = Belief()
            self._reached[(node.index, other.index)] = self.world.now_ms
        if self.names.of(node.index, 1) != self.names.of(node.index, node.boot):
            self.judge.renamed[to_bytes(node.kid)] = None

    def _detect(self) -> None:
        """Every node that runs looks at every other."""
        now_ms = self.world.now_ms
        running = [n for n in self.world.nodes if n.up and now_ms >= n.paused_until_ms]
        there = {node.index: node for node in running}
        for viewer in running:
            for subject in self.world.nodes:
                if subject is not viewer:
                    self._consider(viewer, subject, subject.index in there, now_ms)
        self.judge.look()
        self.world.at(DETECT_MS, self._detect)

    def _consider(self, viewer: Node, subject: Node, runs: bool, now_ms: float) -> None:
        pair = (viewer.index, subject.index)
        broken = self.world.network._broken
        cut = broken(*pair, now_ms) or broken(subject.index, viewer.index, now_ms)
        cut = cut or now_ms < self.blind.get(pair, 0.0)
        belief = self.beliefs[pair]
        if runs and not cut:
            self._reached[pair] = now_ms
            belief.alive(now_ms)
            self._believe(viewer, subject, belief, "alive")
            return
        belief.gone_ms += DETECT_MS
        left = self._gone.get(subject.index)
        if left == "left" and not cut and belief.state == "alive":
            self._believe(viewer, subject, belief, "left")
        elif belief.state == "alive":
            if pair not in self._patience:
                low, high = SUSPECT_MS
                self._patience[pair] = low + (high - low) * self.random.random()
            if now_ms - self._reached[pair] >= self._patience[pair]:
                self._believe(viewer, subject, belief, "dead")

    def _believe(self, viewer: Node, subject: Node, belief: Belief, state: str) -> None:
        if (belief.state, belief.boot) == (state, subject.boot):
            return
        belief.state, belief.boot = state, subject.boot
        states = {"alive": State.ALIVE, "dead": State.DEAD, "left": State.LEFT}
        meta = self._me(subject.index, subject.boot).meta
        member = Member(subject.kid, subject.boot, 0, states[state], meta, 0.0, None)
        self.world.call(
            viewer, lambda machine, now: machine.member(MemberChanged(member, None), now)
        )

    # -- the course of a schedule -----------------------------------------------------------------

    def play(self) -> Figures:
        self.begin()
        world = self.world
        world.break_things()
        for _ in range(self.random.choice((0, 0, 1, 2))):
            world.at(self.random.random() * self.plan.duration_ms, self._leave)
        if self.random.random() < 0.3:
            world.at(self.random.random() * self.plan.duration_ms, self._forget)
        world.run(self.plan.duration_ms)
        self._heal()
        for node in world.nodes:
            if node.up and node not in self._core:
                world.crash(node)
        settled_ms = world.run_until(lambda: not self._missing(), SETTLE_MS, 20.0)
        if settled_ms is None:
            self.observer.fail(f"K6 {self._missing()} of {len(self._core)} after healing")
        self.judge.judge()
        self.observer.judge()
        return Figures(
            self.outcome.seed,
            world.events,
            self.judge.epochs,
            self.judge.twice,
            settled_ms or SETTLE_MS,
            self.observer.failures,
            world.digest(),
        )

    def _missing(self) -> str:
        names = {node.index: self.names.of(node.index, node.boot) for node in self._core}
        return self.judge.settled(self._core, names)

    def _leave(self) -> None:
        """A node goes in good order, and perhaps comes back."""
        up = [node for node in self.world.nodes if node.up]
        if len(up) < len(self.world.nodes) or not up:
            return
        node = self.random.choice(up)
        self._gone[node.index] = "left"
        self.judge.left[to_bytes(node.kid)] = None
        self.world.call(node, lambda machine, now_ms: machine.leave(now_ms))
        self.world.at(3.0, self._stop, node, node.boot)
        self.world.restart(node, 20.0 + 400.0 * self.random.random())

    def _stop(self, node: Node, boot: int) -> None:
        if node.up and node.boot == boot:
            self.world.crash(node)

    def _forget(self) -> None:
        """Somebody who is down is forgotten, wherever the operator happens to sit."""
        up = [node for node in self.world.nodes if node.up]
        down = [node for node in self.world.nodes if not node.up]
        if up and down:
            kid = self.random.choice(down).kid
            self.judge.forgotten[to_bytes(kid)] = None
            self.world.call(self.random.choice(up), lambda host, now_ms: host.forget(kid, now_ms))


CALM = Faults(drop=0.01, delay=(0.2, 2.0), sync=(0.2, 2.0), clock=0.05)
BLIND_MS = 900.0


class Duel(Schedule):
    """Two registrars who believe different things, both of them in good health.

    Nobody but the registrar reaches one of the nodes; so they want it out of the ring, and the
    registrar does not. Then the clocks of the others jump, which ends its lease early: only the
    fence tells it that somebody else writes now.
    """

    def __init__(self, seed: int, machine: Machine = Registry) -> None:
        plan = Plan(6, 3, CALM, 2400.0, 0, 0, False, 0.0, ())
        super().__init__(seed, machine, TIMING, plan, Names(False, False))
        for begin_ms in (200.0, 1300.0):
            self.world.at(begin_ms, self._begin)

    def _begin(self) -> None:
        nodes = self.world.nodes
        holder = next((n for n in nodes if n.up and n.machine.registry.registrar), None)
        if holder is None:
            return
        others = [node for node in nodes if node is not holder]
        subject = self.random.choice(others)
        for viewer in others:
            self.blind[(viewer.index, subject.index)] = self.world.now_ms + BLIND_MS
        for step in range(12):  # they contend from some 380 ms on
            after_ms = 380.0 + 40.0 * step + 30.0 * self.random.random()
            self.world.at(after_ms, self._jump, self.random.choice(others))

    def _jump(self, node: Node) -> None:
        self.world.set_clock(node, rate=node.rate, jump_ms=TIMING.lease_ms)


def schedule(
    seed: int,
    machine: Machine = Registry,
    timing: Timing = TIMING,
    drawn: Any = draw,
    judged: Timing | None = None,
) -> Figures:
    """`drawn(seed)` is the plan, and who is called what; `judged` is the timing as promised."""
    plan, names = drawn(seed)
    return Schedule(seed, machine, timing, plan, names, judged=judged).play()


@dataclass(slots=True)
class Cost:
    """Of a cluster that starts at once, then rests; counts are of all nodes together."""

    nodes: int
    epochs: int
    ready_ms: float  # from the first voters to one ring at all nodes
    asked: dict[str, int]  # requests to Nexus until then
    messages_s: float  # at rest, of Nexus, of the registers of the registry and the lease
    records_s: float  # made durable at rest


def quiet(
    nodes: int, voters: int = 3, timing: Timing | None = None, rest_ms: float = 60_000.0
) -> Cost:
    """What a start and rest cost with the real spans of time and no faults."""
    faults = Faults(delay=(0.2, 1.0), sync=(0.3, 2.0))
    plan = Plan(nodes, voters, faults, 0.0, 0, 0, False, 0.0, ())
    run = Schedule(7, Registry, timing or Timing(), plan, Names(False, False), NexusTiming())
    run.begin()
    run._core = list(run.world.nodes)
    ready_ms = run.world.run_until(lambda: not run._missing(), 60_000.0, 10.0)
    assert ready_ms is not None, run._missing()
    asked: dict[str, int] = {}
    for node in run.world.nodes:
        for name, count in node.machine.asked.items():
            asked[name] = asked.get(name, 0) + count
    run.world.run(5_000.0)
    counts = {"sent": 0, "synced": 0}

    def sent(node: Node, send: Send) -> None:
        counts["sent"] += send.to != node.kid

    run.world.on_send.append(sent)
    before = [node.disk for node in run.world.nodes]
    for disk in before:
        write = disk.write

        def counted(name: str, record: bytes, due_ms: float, write: Any = write) -> Any:
            counts["synced"] += 1
            return write(name, record, due_ms)

        disk.write = counted  # type: ignore[method-assign]
    run.world.run(rest_ms)
    run.judge.judge()
    assert not run.observer.failures, run.observer.failures
    rest_s = rest_ms / 1000
    return Cost(
        nodes, run.judge.epochs, ready_ms, asked, counts["sent"] / rest_s, counts["synced"] / rest_s
    )


def main(arguments: Sequence[str]) -> int:
    """`python -m manifold.tools.simulator.registry SEED SCHEDULES`, or `… quiet NODES`.

    Every third schedule is a rough one.
    """
    if arguments[0] == "quiet":
        print(quiet(int(arguments[1])))
        return 0
    seed, schedules = (int(each) for each in arguments)
    epochs = twice = events = 0
    for number in range(seed, seed + schedules):
        figures = schedule(number, drawn=draw if number % 3 else rough)
        epochs, twice = epochs + figures.epochs, twice + bool(figures.twice)
        events += figures.events
        if figures.failures:
            print(f"FAILED at seed {number}:", *figures.failures, sep="\n")
            return 1
    print(f"{schedules} schedules, {events} events, {epochs} epochs, two registrars in {twice}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
