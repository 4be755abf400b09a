"""The `placement` benchmark: the seed's suites A and E, and 64 unequal nodes under open load.

The code under test is `kernel/geode`, unchanged; nodes, network and clients are simulated.

  A    1000 tasks (one in ten of weight 10, the others 1) onto capacities 20/10/5/2/1, nothing
       leaves; state refreshed every 1, 10 or 100 tasks; the variance of load/capacity at the end
  E    open loop, Poisson arrivals of equal tasks (1 ms at capacity 10): 500/s for 5000 tasks on
       5 nodes of capacity 10, then on 20/10/5/2/1 at 70 % load; 4 dispatchers
  N64  64 nodes of capacity 1 to 16, 16 dispatchers, exponential work of mean 1, open loop at
       loads of 0.5 to 0.95; and `affinity`: four kinds of task, true speed
       capacity * exp(-3 * shortfall), while geode starts with beta = 1 and has to learn

Every policy gets the same information: capacities, a report of each node every T (0: at each
decision), and the load of a node with each result from it. What differs is the rule only.
`clairvoyant` knows every queue and every true speed at every moment: a bound, not a rival.

Interface rules: `run(quick)` for the harness, `study(runs, ...)` for tests and the documentation,
`python -m manifold.tools.bench.placement` prints the tables.
Source: the design page of geode, "Prove it"; Mitzenmacher, "How Useful Is Old Information?"
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import exp
from random import Random
from typing import TYPE_CHECKING

from manifold.kernel.config import GeodeConfig
from manifold.kernel.geode import metric
from manifold.kernel.geode.features import Static
from manifold.kernel.geode.geode import Geode
from manifold.kernel.geode.messages import Demand, LoadReport
from manifold.vm.kid import Kid, kid_of

if TYPE_CHECKING:
    from manifold.tools.bench.harness import Figure

UNEQUAL = (20.0, 10.0, 5.0, 2.0, 1.0)
MANY = tuple(float(1 + (7 * i) % 16) for i in range(64))  # each capacity of 1..16 four times
AFFINITY = 3.0  # true slow-down is exp(3 * shortfall); geode's prior is exp(1 * shortfall)
WARM_UP = 0.2  # part of a run that is not counted
AVAILABLE_S = 1.0  # a task that takes longer counts as unavailable
GOAL_AVAILABLE = 0.999
GOAL_RATIO = 1.10  # within 10 % of the best realisable policy
CONFIG = GeodeConfig(decisions=10)


@dataclass(frozen=True, slots=True)
class Kind:
    program: Kid
    demand: Demand


PLAIN = (Kind(kid_of(b"plain"), Demand()),)
WANTS = ((0.9, 0.0), (0.2, 0.9), (0.6, 0.6), (0.1, 0.1))  # compute, memory
KINDS = tuple(
    Kind(kid_of(b"kind%d" % i), Demand(program=kid_of(b"kind%d" % i), compute=c, memory=m))
    for i, (c, m) in enumerate(WANTS)
)


@dataclass(frozen=True, slots=True)
class Case:
    """One cell of the study."""

    name: str
    capacities: tuple[float, ...]
    stale_s: float  # T, the period of reports; 0 is a fresh view at each decision
    load: float
    tasks: int
    dispatchers: int
    mean_gas: float = 1.0
    equal: bool = False  # all tasks of the mean size, or exponential
    kinds: tuple[Kind, ...] = PLAIN

    @property
    def statics(self) -> tuple[Static, ...]:
        spread = len(self.kinds) > 1
        return tuple(
            Static(1, capacity, 1 << (28 + 4 * (i % 4)) if spread else 1 << 30, latency_ms=0.0)
            for i, capacity in enumerate(self.capacities)
        )

    def speeds(self) -> list[list[float]]:
        """True gas per second, by kind and node."""
        if len(self.kinds) == 1:
            return [list(self.capacities)]
        nodes = [(static.compute, static.features) for static in self.statics]
        return [
            [
                compute * exp(-AFFINITY * metric.shortfall(kind.demand, features, CONFIG))
                for compute, features in nodes
            ]
            for kind in self.kinds
        ]


# --- policies ---------------------------------------------------------------------------------


class Policy:
    """What one dispatcher knows and does; subclasses define `pick`. Geode has an adapter."""

    own = False  # corrects by its own dispatches
    width = 2

    def __init__(self, case: Case, random: Random) -> None:
        count = len(case.capacities)
        self.capacities = case.capacities
        self.random = random
        self.everyone = range(count)
        self.seen = [0.0] * count
        self.since = [0.0] * count
        self.flight = [0.0] * count
        self.marks = [sum(case.capacities[: i + 1]) for i in self.everyone]
        self.case = case

    def report(self, node: int, queued: float, speed: float, now_s: float) -> None:
        self.seen[node] = queued
        self.since[node] = 0.0

    def sent(self, node: int, gas: float, now_s: float) -> None:
        if self.own:
            self.since[node] += gas
            self.flight[node] += gas

    def done(self, node: int, gas: float, kind: int, speed: float, now_s: float) -> None:
        if self.own:
            self.since[node] -= gas
            self.flight[node] -= gas

    def finish(self, node: int, gas: float) -> float:
        queued = max(self.seen[node] + self.since[node], self.flight[node])
        return (queued + gas) / self.capacities[node]

    def pick(self, gas: float, kind: int, now_s: float) -> int:
        raise AssertionError("a policy picks")


class UniformP2C(Policy):
    def pick(self, gas: float, kind: int, now_s: float) -> int:
        drawn = self.random.sample(self.everyone, min(self.width, len(self.capacities)))
        return min(drawn, key=lambda node: self.finish(node, gas))


class JSQ4(UniformP2C):
    width = 4


class WeightedP2C(Policy):
    def pick(self, gas: float, kind: int, now_s: float) -> int:
        first = second = self.random.choices(self.everyone, cum_weights=self.marks)[0]
        while second == first:
            second = self.random.choices(self.everyone, cum_weights=self.marks)[0]
        return min((first, second), key=lambda node: self.finish(node, gas))


class WeightedP2COwn(WeightedP2C):
    own = True


class SeedArgmin(Policy):
    """The seed's metric; load is counted in tasks, a plain task wants the best of everything.

    The clamp of the kernel (50) would make all nodes alike beyond a load of 25 times the
    capacity, which suite A reaches; here the formula is clamped where doubles end.
    """

    top = 1
    exponent_max = 600.0  # exp(600) = 4e260

    def __init__(self, case: Case, random: Random) -> None:
        super().__init__(case, random)
        best = Demand(compute=1.0, memory=1.0, bandwidth=1.0)
        wanted = [best] if len(case.kinds) == 1 else [kind.demand for kind in case.kinds]
        features = [static.features for static in case.statics]
        self.apart = [
            [metric.seed_distance(demand, each, CONFIG) for each in features] for demand in wanted
        ]

    def pick(self, gas: float, kind: int, now_s: float) -> int:
        apart, capacities, seen = self.apart[kind], self.capacities, self.seen
        one, most = self.case.mean_gas, self.exponent_max
        costs = [
            metric.seed_cost(apart[i], seen[i] / one, capacities[i], most) for i in self.everyone
        ]
        if self.top == 1:
            return costs.index(min(costs))
        best = heapq.nsmallest(self.top, self.everyone, key=costs.__getitem__)
        return best[int(self.random.random() * len(best))]


class SeedTop3(SeedArgmin):
    top = 3


class GeodePolicy(Policy):
    """The kernel's own code behind the interface of the others."""

    config = CONFIG
    learns = True
    corrects = True

    def __init__(self, case: Case, random: Random) -> None:
        super().__init__(case, random)
        self.kids = [kid_of(b"node%d" % i) for i in self.everyone]
        self.index = {kid: i for i, kid in enumerate(self.kids)}
        self.classes = [
            f"{static.compute:g}/{static.memory_bytes >> 20}" for static in case.statics
        ]
        self.geode = Geode(kid_of(b"dispatcher"), self.config, random)
        for i, static in enumerate(case.statics):
            self.geode.node_up(self.kids[i], f"node-{i:02}", self.classes[i], static, 0.0)

    def report(self, node: int, queued: float, speed: float, now_s: float) -> None:
        self.geode.report(self.kids[node], LoadReport(queued, gas_per_s=speed), 1000 * now_s)

    def sent(self, node: int, gas: float, now_s: float) -> None:
        if self.corrects:
            self.geode.dispatched(self.kids[node], gas, 1000 * now_s)

    def done(self, node: int, gas: float, kind: int, speed: float, now_s: float) -> None:
        if self.corrects:
            self.geode.completed(self.kids[node], gas, 1000 * now_s)
        if self.learns and len(self.case.kinds) > 1:
            program = self.case.kinds[kind].program
            self.geode.observed(self.kids[node], self.classes[node], program, speed, 1000 * now_s)

    def pick(self, gas: float, kind: int, now_s: float) -> int:
        wanted = self.case.kinds[kind].demand
        demand = Demand(gas, wanted.program, compute=wanted.compute, memory=wanted.memory)
        winner = self.geode.choose(demand, 1000 * now_s, "task").winner
        assert winner is not None
        return self.index[winner]


class Clairvoyant(Policy):
    """The bound: `seen` and `free_s` are the truth (see `World`)."""

    free_s: Sequence[float] = ()
    speeds: Sequence[Sequence[float]] = ()

    def pick(self, gas: float, kind: int, now_s: float) -> int:
        speeds = self.speeds[kind]
        ends = [
            (free if free > now_s else now_s) + gas / speed
            for free, speed in zip(self.free_s, speeds, strict=True)
        ]
        return ends.index(min(ends))


class NoCorrection(GeodePolicy):
    corrects = False


class NoLearning(GeodePolicy):
    learns = False


class NoGeometry(GeodePolicy):
    learns = False
    config = GeodeConfig(decisions=10, beta=0.0)


Make = Callable[[Case, Random], Policy]
REALISABLE: dict[str, Make] = {
    "seed argmin": SeedArgmin,
    "seed top 3": SeedTop3,
    "uniform P2C": UniformP2C,
    "JSQ(4)": JSQ4,
    "weighted P2C": WeightedP2C,
    "weighted P2C own": WeightedP2COwn,
}
POLICIES: dict[str, Make] = {"geode": GeodePolicy, **REALISABLE, "clairvoyant": Clairvoyant}
ABLATIONS: dict[str, Make] = {
    "geode": GeodePolicy,
    "no own correction": NoCorrection,
    "no learning": NoLearning,
    "no learning, no geometry": NoGeometry,
}


# --- the world --------------------------------------------------------------------------------


@dataclass(slots=True)
class World:
    """Queues, clients and the network of one run; the same seed gives the same arrivals."""

    case: Case
    make: Make
    seed: int
    events: list[tuple[float, int, int, int, int, float, float]] = field(default_factory=list)
    counter: int = 0

    def __post_init__(self) -> None:
        case, count = self.case, len(self.case.capacities)
        self_random = Random(f"world {self.seed} {case.name}")
        self.random = self_random
        self.speeds = case.speeds()
        self.queued = [0.0] * count
        self.free_s = [0.0] * count
        self.measured = list(case.capacities)  # what a node knows of its own speed
        self.policies = [
            self.make(case, Random(f"policy {self.seed} {i}")) for i in range(case.dispatchers)
        ]
        for policy in self.policies:
            if isinstance(policy, Clairvoyant):
                policy.free_s, policy.speeds = self.free_s, self.speeds
        for node in range(count):
            self.tell_all(node, 0.0)
            if case.stale_s:
                self.push(self_random.random() * case.stale_s, -1, node, 0, 0.0, 0.0)

    random: Random = field(init=False)
    speeds: list[list[float]] = field(init=False)
    queued: list[float] = field(init=False)
    free_s: list[float] = field(init=False)
    measured: list[float] = field(init=False)
    policies: list[Policy] = field(init=False)

    def push(self, at_s: float, owner: int, node: int, kind: int, gas: float, speed: float) -> None:
        self.counter += 1
        heapq.heappush(self.events, (at_s, self.counter, owner, node, kind, gas, speed))

    def tell_all(self, node: int, now_s: float) -> None:
        for policy in self.policies:
            policy.report(node, self.queued[node], self.measured[node], now_s)

    def advance(self, now_s: float) -> None:
        """Reports and results up to now."""
        while self.events and self.events[0][0] <= now_s:
            at_s, _, owner, node, kind, gas, speed = heapq.heappop(self.events)
            if owner < 0:
                self.tell_all(node, at_s)
                self.push(at_s + self.case.stale_s, -1, node, 0, 0.0, 0.0)
                continue
            left = self.queued[node] - gas
            self.queued[node] = left if left > 1e-9 else 0.0
            self.measured[node] += 0.1 * (speed - self.measured[node])
            self.policies[owner].done(node, gas, kind, speed, at_s)
            self.policies[owner].report(node, self.queued[node], self.measured[node], at_s)

    def run(self) -> list[tuple[float, float]]:
        """Response seconds and gas of each counted task."""
        case, random = self.case, self.random
        total = sum(sum(row) for row in self.speeds) / len(self.speeds)
        arrivals_s = case.load * total / case.mean_gas
        now_s, out = 0.0, []
        for task in range(case.tasks):
            now_s += random.expovariate(arrivals_s)
            self.advance(now_s)
            gas = case.mean_gas if case.equal else random.expovariate(1 / case.mean_gas)
            owner = int(random.random() * case.dispatchers)
            kind = int(random.random() * len(case.kinds))
            policy = self.policies[owner]
            if not case.stale_s:
                for node, queued in enumerate(self.queued):
                    policy.report(node, queued, self.measured[node], now_s)
            node = policy.pick(gas, kind, now_s)
            policy.sent(node, gas, now_s)
            self.queued[node] += gas
            speed = self.speeds[kind][node]
            self.free_s[node] = max(self.free_s[node], now_s) + gas / speed
            self.push(self.free_s[node], owner, node, kind, gas, speed)
            if task >= WARM_UP * case.tasks:
                out.append((self.free_s[node] - now_s, gas))
        return out


@dataclass(frozen=True, slots=True)
class Summary:
    """One run."""

    mean: float
    p50: float
    p99: float
    slowdown: float  # response / (work at the mean capacity), median: E[1/work] is infinite
    available: float


def simulate(case: Case, make: Make, seed: int) -> Summary:
    outcome = World(case, make, seed).run()
    times = sorted(seconds for seconds, _ in outcome)
    capacity = sum(case.capacities) / len(case.capacities)
    return Summary(
        mean=sum(times) / len(times),
        p50=times[len(times) // 2],
        p99=times[int(len(times) * 0.99)],
        slowdown=sorted(seconds * capacity / gas for seconds, gas in outcome)[len(outcome) // 2],
        available=sum(seconds <= AVAILABLE_S for seconds in times) / len(times),
    )


def fill(every: int, make: Make, seed: int) -> Summary:
    """Suite A: the variance of load/capacity, in the place of the mean."""
    case = Case(f"A, refreshed every {every}", UNEQUAL, 0.0, 0.0, 1000, 1)
    random, policy = Random(f"A {seed}"), make(case, Random(f"policy {seed}"))
    load = [0.0] * len(UNEQUAL)
    busy_s = [0.0] * len(UNEQUAL)
    if isinstance(policy, Clairvoyant):
        policy.free_s, policy.speeds = busy_s, case.speeds()
    for task in range(case.tasks):
        now_s = task * 1e-3
        if task % every == 0:
            for node, queued in enumerate(load):
                policy.report(node, queued, UNEQUAL[node], now_s)
        gas = 10.0 if random.random() < 0.1 else 1.0
        node = policy.pick(gas, 0, now_s)
        policy.sent(node, gas, now_s)
        load[node] += gas
        # No work is done here: for the clairvoyant a backlog never drains.
        busy_s[node] = case.tasks * 1e-3 + load[node] / UNEQUAL[node]
    ratios = [held / capacity for held, capacity in zip(load, UNEQUAL, strict=True)]
    middle = sum(ratios) / len(ratios)
    variance = sum((ratio - middle) ** 2 for ratio in ratios) / len(ratios)
    return Summary(variance, variance, variance, variance, 1.0)


# --- the study --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cell:
    """One case, all policies, all runs."""

    suite: str
    name: str
    runs: dict[str, tuple[Summary, ...]]

    def mean(self, policy: str, what: str = "mean") -> float:
        runs = self.runs[policy]
        return sum(float(getattr(run, what)) for run in runs) / len(runs)

    def best(self, what: str = "mean") -> str:
        return min((name for name in REALISABLE), key=lambda name: self.mean(name, what))

    def ratio(self, what: str = "mean") -> float:
        """Geode over the best realisable policy; below 1 geode is the best."""
        return self.mean("geode", what) / self.mean(self.best(what), what)

    def interval(self, policy: str, what: str = "mean") -> tuple[float, float]:
        """95 % bootstrap confidence interval over the runs."""
        import numpy

        values = numpy.array([getattr(run, what) for run in self.runs[policy]])
        picks = numpy.random.default_rng(0).integers(0, len(values), (2000, len(values)))
        low, high = numpy.percentile(values[picks].mean(axis=1), (2.5, 97.5))
        return float(low), float(high)


def cases(tasks: float = 1.0) -> list[tuple[str, Case]]:
    """Suites E and N64; `tasks` shortens every run."""
    found: list[tuple[str, Case]] = []
    count = int(5000 * tasks)
    for stale_s in (0.0, 1.0):
        case = Case(f"equal T={stale_s:g}", (10.0,) * 5, stale_s, 0.1, count, 4, 0.01, True)
        found.append(("E", case))
    for stale_s in (0.0, 0.1, 1.0):
        case = Case(f"unequal T={stale_s:g}", UNEQUAL, stale_s, 0.7, count, 4, 0.01, True)
        found.append(("E", case))
    for load, stale_s in ((0.5, 1.0), (0.7, 1.0), (0.9, 0.2), (0.9, 1.0), (0.9, 5.0), (0.95, 1.0)):
        count = int((3000 if stale_s > 1 else 2000) * tasks)
        name = f"load {load:g} T={stale_s:g}"
        found.append(("N64", Case(name, MANY, stale_s, load, count, 16)))
    for stale_s in (0.2, 5.0):
        name = f"T={stale_s:g}"
        count = int((3000 if stale_s > 1 else 2000) * tasks)
        case = Case(name, MANY, stale_s, 0.6, count, 16, kinds=KINDS)
        found.append(("affinity", case))
    return found


def fills(runs: int, policies: dict[str, Make] = POLICIES) -> list[Cell]:
    return [
        Cell(
            "A",
            f"refreshed every {every}",
            {
                name: tuple(fill(every, make, seed) for seed in range(runs))
                for name, make in policies.items()
            },
        )
        for every in (1, 10, 100)
    ]


def study(
    runs: int, chosen: Sequence[tuple[str, Case]], policies: dict[str, Make] = POLICIES
) -> list[Cell]:
    return [
        Cell(
            suite,
            case.name,
            {
                name: tuple(simulate(case, make, seed) for seed in range(runs))
                for name, make in policies.items()
            },
        )
        for suite, case in chosen
    ]


def quick_cells() -> list[Cell]:
    """A few runs of the cells that tell most: for tests, within ten seconds."""
    wanted = ("unequal T=0", "unequal T=1", "load 0.9 T=0.2", "load 0.9 T=5", "T=5")
    chosen = [each for each in cases(0.4) if each[1].name in wanted]
    return fills(8) + study(3, chosen)


def full_cells() -> list[Cell]:
    """30 runs; of suite A, which is short and whose end is noisy, 60."""
    return fills(60) + study(30, cases())


def _raw(cells: Sequence[Cell]) -> dict[str, float | str]:
    raw: dict[str, float | str] = {}
    for cell in cells:
        for policy in cell.runs:
            low, high = cell.interval(policy)
            figures = {what: cell.mean(policy, what) for what in ("mean", "p50", "p99")}
            text = " ".join(f"{what} {value:.4g}" for what, value in figures.items())
            rest = f"slowdown {cell.mean(policy, 'slowdown'):.4g}" if cell.suite != "A" else ""
            seen = f"available {cell.mean(policy, 'available'):.4f}" if cell.suite == "E" else ""
            raw[f"{cell.name}: {policy}"] = f"{text} [{low:.4g}, {high:.4g}] {rest} {seen}".strip()
        raw[f"{cell.name}: geode/best"] = cell.ratio()
        raw[f"{cell.name}: geode/best p99"] = cell.ratio("p99")
        raw[f"{cell.name}: best realisable"] = cell.best()
    return raw


def run(quick: bool = False) -> list[Figure]:
    """One figure per suite: the worst ratio of geode to the best realisable policy."""
    from manifold.tools.bench.harness import Figure

    cells = quick_cells() if quick else full_cells()
    figures: list[Figure] = []
    for suite in dict.fromkeys(cell.suite for cell in cells):
        mine = [cell for cell in cells if cell.suite == suite]
        worst = max(mine, key=lambda cell: cell.ratio())
        what = "variance of load/capacity" if suite == "A" else "mean response"
        figures.append(
            Figure(
                name=f"placement {suite}: geode / best realisable policy",
                value=worst.ratio(),
                goal=GOAL_RATIO,
                better="lower",
                unit="ratio",
                raw=_raw(mine),
                note=f"{what}; worst cell: {worst.name}, best there: {worst.best()}",
            )
        )
    open_loop = [cell for cell in cells if cell.suite == "E"]
    available = min(cell.mean("geode", "available") for cell in open_loop)
    note = f"part of the tasks that end within {AVAILABLE_S:g} s, worst cell of suite E"
    goal = GOAL_AVAILABLE
    figures.append(Figure("placement E: availability", available, goal, "higher", "", {}, note))
    return figures


def table(cells: Sequence[Cell], what: str = "mean") -> str:
    """Markdown, for docs/geode.md."""
    names = list(cells[0].runs)
    lines = ["| cell | " + " | ".join(names) + " | geode/best |", "|---" * (len(names) + 2) + "|"]
    for cell in cells:
        scale = 1000.0 if cell.suite == "E" and what != "slowdown" else 1.0
        row = [f"{scale * cell.mean(name, what):.3g}" for name in names]
        ratio = f"{cell.ratio(what):.2f}" if set(REALISABLE) <= set(names) else ""
        lines.append(f"| {cell.suite} {cell.name} | " + " | ".join(row) + f" | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    import sys

    arguments = sys.argv[1:]
    cells = quick_cells() if "--quick" in arguments else full_cells()
    for what in ("mean", "p50", "p99", "slowdown"):
        print(f"\n{what} (E in ms, N64 in mean service times of a capacity-1 node)\n")
        print(table(cells, what))
    print("\n95 % intervals of the mean, geode:")
    for cell in cells:
        low, high = cell.interval("geode")
        print(f"  {cell.suite} {cell.name}: {cell.mean('geode'):.4g} [{low:.4g}, {high:.4g}]")
    wanted = ("load 0.9 T=1", "T=5")
    chosen = [each for each in cases() if each[1].name in wanted]
    print("\nablations, mean\n")
    print(table(study(10, chosen, ABLATIONS)))


if __name__ == "__main__":
    main()
