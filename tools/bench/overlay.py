"""The `overlay` benchmark: the links and the greedy forwarding of geode among 10 000 nodes.

Every virtual node has its own `Links` (the kernel's, unchanged), filled from as many nodes as
gossip would have told it of; tasks enter anywhere and are forwarded by `routing.next_hop` until a
node executes them. Only the overlay is simulated: a full view would be 10^8 entries. Loads that a
node knows of its links are a snapshot, taken anew each time that a tenth as many tasks came as
there are nodes. One task in ten needs a GPU, which one node in sixteen has; what is rejected goes
back to its origin and is tried again, so that "lost" can only mean lost.

Interface rules: `run(quick)` for the harness, `study(nodes, tasks, seed)` for tests.
Source: the design page of geode, "Topology": expected O(log^2 N / q) hops over q links.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2
from random import Random
from typing import TYPE_CHECKING

from manifold.kernel.config import GeodeConfig
from manifold.kernel.geode import metric
from manifold.kernel.geode.features import Features, Static
from manifold.kernel.geode.links import Links
from manifold.kernel.geode.messages import Demand
from manifold.kernel.geode.routing import Action, next_hop
from manifold.vm.kid import Kid

if TYPE_CHECKING:
    from manifold.tools.bench.harness import Figure

NODES = 10_000
TASKS = 20_000
HEARD = 100  # nodes that each node has heard of when it draws its links
SNAPSHOT_PART = 10  # a snapshot is taken when a tenth as many tasks came as there are nodes
DRAIN = 0.9  # of each queue is left when the next snapshot is taken
TRIES = 50  # times the origin sends a rejected task out again
RTT_S = 0.001
GAS_PER_CORE_S = 1e9
WORK_GAS = 1e8
COMPARED = 200  # random nodes against which the place found is judged
SIZES = ((1, 0.5), (2, 0.5), (4, 1.0), (16, 1.0))  # cores, share of a core: four classes


@dataclass(slots=True)
class Machine:
    kid: Kid
    static: Static
    features: Features
    links: Links
    queued_gas: float = 0.0
    seen_gas: float = 0.0  # what its neighbours believe


@dataclass(frozen=True, slots=True)
class Outcome:
    nodes: int
    tasks: int
    executed: int
    lost: int
    mean_hops: float
    p99_hops: int
    retries: int  # times a task went back to its origin
    cost_ratio: float  # predicted finish where it ran over the best of COMPARED random nodes


def build(count: int, config: GeodeConfig, random: Random) -> dict[Kid, Machine]:
    """Machines in four classes, each with links drawn from what it heard of."""
    machines: dict[Kid, Machine] = {}
    for number in range(count):
        kid = Kid(f"K-{number:032x}")
        cores, share = SIZES[int(random.random() * len(SIZES))]
        static = Static(cores, share * random.uniform(0.8, 1.2), cores << 30, gpu=number % 16 == 0)
        links = Links(kid, config, random)
        machines[kid] = Machine(kid, static, static.features, links)
    everyone = list(machines.values())
    for machine in everyone:
        machine.queued_gas = machine.seen_gas = random.expovariate(1 / WORK_GAS)
        machine.links.heard(machine.kid, machine.features)
        for _ in range(HEARD):
            other = everyone[int(random.random() * count)]
            if other is not machine:
                machine.links.heard(other.kid, other.features)
        for _ in range(config.far_links):  # first come is not P ~ 1/rank: draw all of them anew
            machine.links.refresh()
    return machines


class Overlay:
    def __init__(self, count: int, seed: int, config: GeodeConfig | None = None) -> None:
        self.config = config or GeodeConfig()
        self.random = Random(f"overlay {seed}")
        self.machines = build(count, self.config, self.random)
        self.everyone = list(self.machines.values())

    def cost(self, machine: Machine, demand: Demand, queued_gas: float) -> float | None:
        """Predicted finish; None if the machine may not run it."""
        if demand.needs_gpu and not machine.static.gpu:
            return None
        distance = metric.shortfall(demand, machine.features, self.config)
        rate = GAS_PER_CORE_S * machine.static.compute
        rate /= metric.penalty(distance, self.config.beta)
        return metric.finish_s(queued_gas, demand.work_gas, machine.static.cores, rate, RTT_S)

    def travel(self, demand: Demand, origin: Machine) -> tuple[Machine | None, int]:
        """Where the task is executed, None if it came back; and the hops it made."""
        here, hops = origin, 0
        visited: tuple[Kid, ...] = (origin.kid,)
        while True:
            links = [*here.links.near, *here.links.far]
            costs = {}
            for kid in links:
                neighbour = self.machines[kid]
                cost = self.cost(neighbour, demand, neighbour.seen_gas)
                if cost is not None:
                    costs[kid] = cost
            own = self.cost(here, demand, here.queued_gas)
            hop = next_hop(own, costs, links, hops, visited, self.config, self.random)
            if hop.action is Action.EXECUTE:
                return here, hops
            if hop.action is Action.REJECT or hop.to is None:
                return None, hops
            here, hops = self.machines[hop.to], hops + 1
            visited = (*visited, here.kid)
            assert hops <= self.config.hops, "G4"

    def settle(self, demand: Demand, origin: Machine) -> tuple[Machine | None, int, int]:
        """As `travel`, from the origin again until a node takes it; the last are the retries."""
        hops = 0
        for retries in range(TRIES):
            found, more = self.travel(demand, origin)
            hops += more
            if found is not None:
                return found, hops, retries
            origin.links.refresh()
        return None, hops, TRIES

    def snapshot(self) -> None:
        for machine in self.everyone:
            machine.queued_gas *= DRAIN
            machine.seen_gas = machine.queued_gas

    def excess(self, found: Machine, demand: Demand) -> float:
        """How much dearer the place found is than the best of some drawn at random."""
        mine = self.cost(found, demand, found.queued_gas)
        others = [
            cost
            for machine in self.random.sample(self.everyone, min(COMPARED, len(self.everyone)))
            if (cost := self.cost(machine, demand, machine.queued_gas)) is not None
        ]
        assert mine is not None, "G1"
        return mine / min(others) if others else 1.0


def study(nodes: int, tasks: int, seed: int) -> Outcome:
    overlay = Overlay(nodes, seed)
    random = overlay.random
    all_hops: list[int] = []
    retries = lost = 0
    excess: list[float] = []
    for task in range(tasks):
        if task % max(1, nodes // SNAPSHOT_PART) == 0:
            overlay.snapshot()
        demand = Demand(WORK_GAS, needs_gpu=random.random() < 0.1, compute=random.random())
        origin = overlay.everyone[int(random.random() * nodes)]
        found, hops, again = overlay.settle(demand, origin)
        retries += again
        if found is None:
            lost += 1
            continue
        all_hops.append(hops)
        if task % 50 == 0:
            excess.append(overlay.excess(found, demand))
        found.queued_gas += demand.work_gas
    all_hops.sort()
    return Outcome(
        nodes=nodes,
        tasks=tasks,
        executed=len(all_hops),
        lost=lost,
        mean_hops=sum(all_hops) / len(all_hops),
        p99_hops=all_hops[int(len(all_hops) * 0.99)],
        retries=retries,
        cost_ratio=sum(excess) / len(excess),
    )


def expected_hops(nodes: int, config: GeodeConfig | None = None) -> float:
    """log^2 N / q, to base 2: the distance halves some log2 N times."""
    config = config or GeodeConfig()
    return min(log2(nodes) ** 2 / (config.near_links + config.far_links), config.hops)


def run(quick: bool = False) -> list[Figure]:
    """Mean hops against log^2 N / q, and tasks lost, which is 0."""
    from manifold.tools.bench.harness import Figure

    outcome = study(1000, 2000, 0) if quick else study(NODES, TASKS, 0)
    raw: dict[str, float | str] = {
        "nodes": outcome.nodes,
        "tasks": outcome.tasks,
        "executed": outcome.executed,
        "p99 hops": outcome.p99_hops,
        "back to the origin": outcome.retries,
        f"predicted finish over the best of {COMPARED} random nodes": outcome.cost_ratio,
    }
    goal = expected_hops(outcome.nodes)
    note = f"{outcome.nodes} virtual nodes, 16 links each; goal is log2(N)^2 / 16, 6 at most"
    return [
        Figure("overlay: mean hops", outcome.mean_hops, goal, "lower", "hops", raw, note),
        Figure("overlay: tasks lost", float(outcome.lost), 0.0, "lower", "tasks", raw, note),
    ]


def main() -> None:
    print(study(NODES, TASKS, 0))


if __name__ == "__main__":
    main()
