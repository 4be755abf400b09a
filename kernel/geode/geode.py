"""Geode: which node should run this task, and why that one.

    hard filter -> sample d by capacity * exp(-beta * shortfall) -> least predicted finish

Interface rules:
  - one `Geode` per node; it is told of nodes, loads and its own dispatches, and asked;
  - time is `now_ms` of this node's clock, randomness the injected `Random`; no effects;
  - `choose` picks one node for one task and keeps the decision; it does not dispatch: call
    `dispatched` when the task is sent and `completed` when it is over;
  - `candidates` ranks every node that may take the demand; mitosis cuts shards in proportion to
    `Candidate.gas_per_s` and keeps its own decisions with `record`;
  - above `full_view` nodes only the links are candidates and `next_hop` forwards; where none of
    them may take a demand, those of all known nodes that may.

Invariants, asserted where they could break:
  G1 the hard filter is never violated: a constraint is a boolean and never distance;
  G2 0 <= credits <= grant (view.py);       G3 in-flight returns to 0 at idle (view.py);
  G4 hops never exceed the limit (routing.py);
  G5 weights and costs are finite, weights positive (metric.py and here);
  G6 the ring of decisions is bounded (explain.py); so is the cache of plans (here).

Source: the design page of geode. Differences: see docs/geode.md, "What measuring changed".
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from itertools import accumulate
from math import isfinite, sqrt
from random import Random

from manifold.kernel import labels
from manifold.kernel.config import GeodeConfig
from manifold.kernel.geode import explain, metric, routing
from manifold.kernel.geode.explain import Record, Ring
from manifold.kernel.geode.features import Static
from manifold.kernel.geode.links import Links
from manifold.kernel.geode.messages import Candidate, Decision, Demand, LoadReport
from manifold.kernel.geode.rates import Rates
from manifold.kernel.geode.routing import Hop
from manifold.kernel.geode.view import Node, View
from manifold.vm.kid import Kid

PLANS_MAX = 64  # kinds of demand in use at once on a node; one plan is some 100 bytes a node
# Learned rates drift this long before a plan takes them in; a rate that comes into being does at
# once. A plan costs 3 us a node, which would dominate if each decision made its own.
PLAN_MS = 1000.0
# Up to this many candidates each is predicted and kept for `why` (1 us and 56 bytes apiece);
# above, only those that were sampled.
LISTED_MAX = 32
SEED_TOP = 3  # the seed's ROUTING_TOP_K: one of the three best, at random
# Drawn for one decision: sample * sqrt(finish / (2 * age)), from 2 to 16. So `sample` = 3 is what
# a view gets that is half as old as the task will take; measured, see docs/geode.md.
FIRST_DRAWN, BREADTH_MAX = 2, 16
AGE_FACTOR = 2.0
# A draw that hits a node drawn already is repeated so often, then made among the others only.
DRAW_TRIES = 4
LEARNED, SAMPLED = 1, 2  # flags of `explain.Record`

Refusals = tuple[tuple[str, str], ...]


class Entry:
    """A node for one kind of demand: what does not change from task to task."""

    __slots__ = ("byte_s", "distance", "learned", "node", "rate", "weight")

    def __init__(
        self, node: Node, distance: float, rate: float, learned: bool, byte_s: float
    ) -> None:
        self.node = node
        self.distance = distance
        self.rate = rate  # gas/s of one slot, geometry included
        self.learned = learned
        self.byte_s = byte_s  # seconds to bring it one byte of input
        self.weight = rate * node.slots
        assert isfinite(self.weight) and self.weight > 0, "G5"


class Plan:
    __slots__ = ("entries", "made_ms", "nodes", "refused", "version")

    def __init__(
        self, entries: list[Entry], refused: Refusals, version: tuple[int, ...], now_ms: float
    ) -> None:
        self.entries = entries
        self.nodes = tuple(entry.node for entry in entries)
        self.refused = refused
        self.version = version
        self.made_ms = now_ms


class Ranked:
    """A node that may take a demand, as light as the hot path needs it."""

    __slots__ = ("cost", "entry", "figures", "kid", "slot_gas_per_s", "slots")

    def __init__(self, entry: Entry, figures: list[float]) -> None:
        self.entry = entry
        self.figures = figures
        self.kid = entry.node.kid
        self.slots = entry.node.slots
        self.slot_gas_per_s = entry.rate
        self.cost = figures[2]


class Choice:
    """The outcome of `choose`: as light as the hot path needs; `decision()` explains."""

    __slots__ = ("_record",)

    def __init__(self, record: Record) -> None:
        self._record = record

    @property
    def winner(self) -> Kid | None:
        """None if no node may take the task now: queue it at the origin."""
        return self._record.winner

    @property
    def runner_up(self) -> Kid | None:
        return self._record.runner_up

    @property
    def finish_ms(self) -> float:
        """Predicted, of the winner."""
        return self._record.finish_ms

    @property
    def refused(self) -> Refusals:
        return self._record.refused

    def decision(self) -> Decision:
        return self._record.decision()


class Geode:
    def __init__(self, me: Kid, config: GeodeConfig, random: Random) -> None:
        assert config.metric in ("geode", "seed")
        self.me = me
        self.config = config
        self._random = random
        self._view = View(me, config.stale_ms)
        self._rates = Rates(config.rate_alpha, config.rate_samples)
        self._links = Links(me, config, random)
        self._plans: dict[object, Plan] = {}
        self._ring = Ring(config.decisions)

    # --- who is there -------------------------------------------------------------------------

    def node_up(self, kid: Kid, alias: str, node_class: str, static: Static, now_ms: float) -> bool:
        """A node is alive. False if its figures make no sense: counted, and it is not used."""
        before = self._view.nodes.get(kid)
        if not self._view.up(kid, alias, node_class, static):
            self.node_down(kid)
            return False
        if before is not None and before.static != static:
            self._rates.forget(kid)
        self._links.heard(kid, static.features)
        return True

    def node_down(self, kid: Kid) -> None:
        self._view.down(kid)
        self._links.forget(kid)

    def nodes(self) -> tuple[Kid, ...]:
        return tuple(self._view.nodes)

    def node(self, kid: Kid) -> Node | None:
        """What is known of a node; to be read only."""
        return self._view.nodes.get(kid)

    @property
    def refused_inputs(self) -> int:
        return self._view.refused_inputs

    @property
    def strays(self) -> int:
        return self._view.strays

    # --- what they do -------------------------------------------------------------------------

    def report(self, kid: Kid, load: LoadReport, now_ms: float) -> bool:
        node = self._view.nodes.get(kid)
        if not self._view.report(kid, load, now_ms):
            return False
        if node is not None and load.gas_per_s > 0:
            self._rates.reported(load.gas_per_s, node.static.compute)
        return True

    def dispatched(self, kid: Kid, work_gas: float, now_ms: float) -> None:
        self._view.dispatched(kid, work_gas)

    def completed(self, kid: Kid, work_gas: float, now_ms: float, *, ended: bool = True) -> None:
        """`work_gas` of a dispatched task is done or withdrawn; `ended=False`: a part of it."""
        self._view.completed(kid, work_gas, ended)

    def rtt(self, kid: Kid, rtt_ms: float) -> None:
        self._view.rtt(kid, rtt_ms)

    def queue_gas(self, kid: Kid, now_ms: float) -> float:
        """q-hat of a node; 0 for one that is not known."""
        node = self._view.nodes.get(kid)
        return 0.0 if node is None else self._view.queue_gas(node, now_ms)

    def in_flight_gas(self, kid: Kid) -> float:
        """What this node sent there and has not got back."""
        node = self._view.nodes.get(kid)
        return 0.0 if node is None else node.flight_gas

    def observed(
        self, kid: Kid, node_class: str, program: Kid, gas_per_s: float, now_ms: float
    ) -> None:
        """One slot of `kid` ran `program` at this rate."""
        node = self._view.nodes.get(kid)
        if node is None:
            self._view.strays += 1
        elif not self._rates.observed(kid, node_class, node.static.compute, program, gas_per_s):
            self._view.refused_inputs += 1

    def learn_gas_per_index(self, program: Kid, node_class: str, gas: float) -> None:
        if not self._rates.learn_gas_per_index(program, node_class, gas):
            self._view.refused_inputs += 1

    def gas_per_index(self, program: Kid, node_class: str) -> float | None:
        return self._rates.gas_per_index(program, node_class)

    # --- where work goes ----------------------------------------------------------------------

    def candidates(self, demand: Demand, now_ms: float) -> tuple[Candidate, ...]:
        """Every node that may take it, the one predicted to finish first in front."""
        return tuple(
            explain.candidate(
                each.entry.node, [*each.figures, each.entry.learned * LEARNED + SAMPLED]
            )
            for each in self.ranked(demand, now_ms)
        )

    def ranked(self, demand: Demand, now_ms: float, only: Kid | None = None) -> list[Ranked]:
        """`candidates` without their descriptions; to be passed on to `keep`."""
        entries, _ = self._admit(self._plan(demand, now_ms), demand)
        if only is not None:
            entries = [entry for entry in entries if entry.node.kid == only]
        found = [Ranked(entry, self._figures(entry, demand, now_ms)) for entry in entries]
        found.sort(key=lambda each: each.cost)
        return found

    def refusals(self, demand: Demand, now_ms: float) -> Refusals:
        """Whom the hard filter strikes out now, and why: (alias, reason)."""
        return self._admit(self._plan(demand, now_ms), demand)[1]

    def choose(self, demand: Demand, now_ms: float, task: str) -> Choice:
        plan = self._plan(demand, now_ms)
        entries, refused = self._admit(plan, demand)
        by_seed = self.config.metric == "seed"
        scored = {}
        if by_seed or len(entries) <= LISTED_MAX:
            scored = {entry: self._figures(entry, demand, now_ms) for entry in entries}
        drawn = entries if by_seed else self._sample(entries, scored, demand, now_ms)
        among = frozenset(drawn)  # for looking up only
        figures: list[float] = []
        for entry, each in scored.items():
            figures += each
            figures.append(entry.learned * LEARNED + (entry in among) * SAMPLED)
        nodes = plan.nodes
        if len(nodes) != len(scored):
            nodes = tuple([entry.node for entry in scored])
        record = Record(task, now_ms, self.config.metric, demand.work_gas, nodes, figures, refused)
        record.more = len(entries) - len(scored)
        self._pick(record, [(scored[entry], entry.node) for entry in drawn], demand)
        self._ring.keep(record)
        return Choice(record)

    def _sample(
        self, entries: list[Entry], scored: dict[Entry, list[float]], demand: Demand, now_ms: float
    ) -> list[Entry]:
        """Draw without replacement; the first two tell from their ages how many more it takes."""
        drawn: list[Entry] = []
        breadth = FIRST_DRAWN
        marks = list(accumulate([entry.weight for entry in entries]))
        while len(drawn) < min(breadth, len(entries)):
            entry = self._draw(entries, marks, drawn)
            drawn.append(entry)
            if entry not in scored:
                scored[entry] = self._figures(entry, demand, now_ms)
            if len(drawn) == FIRST_DRAWN:
                breadth = self._breadth([scored[each] for each in drawn])
                if breadth >= len(entries):
                    start = int(self._random.random() * len(entries))
                    rest = entries[start:] + entries[:start]
                    for each in drawn:
                        rest.remove(each)
                    drawn += rest
                    for each in drawn:
                        if each not in scored:
                            scored[each] = self._figures(each, demand, now_ms)
        return drawn

    def _draw(self, entries: list[Entry], marks: list[float], drawn: list[Entry]) -> Entry:
        """One that is not drawn yet, in proportion to the weights; `marks` are their sums."""
        last = len(entries) - 1
        for _ in range(DRAW_TRIES):
            place = bisect(marks, self._random.random() * marks[-1])
            entry = entries[min(place, last)]
            if entry not in drawn:
                return entry
        left = [entry for entry in entries if entry not in drawn]
        weights = list(accumulate([entry.weight for entry in left]))
        place = bisect(weights, self._random.random() * weights[-1])
        return left[min(place, len(left) - 1)]

    def _breadth(self, first: list[list[float]]) -> int:
        """How many to draw: many while the view is fresh, two when it is old.

        Old is relative: in the time that the task takes to finish, the queues turn over once.
        """
        age_ms = sum(each[1] for each in first) / len(first)
        if age_ms <= 0:
            return BREADTH_MAX if age_ms == 0 else FIRST_DRAWN
        finish_ms = min(each[3] for each in first)
        wanted = self.config.sample * sqrt(finish_ms / (AGE_FACTOR * age_ms))
        return max(FIRST_DRAWN, round(min(BREADTH_MAX, wanted)))

    def _pick(self, record: Record, drawn: list[tuple[list[float], Node]], demand: Demand) -> None:
        """Least cost; equal costs go to the one drawn first, which is random."""
        ranked = sorted(drawn, key=lambda each: each[0][2])
        if self.config.metric == "seed" and ranked:
            first = self._random.randrange(min(SEED_TOP, len(ranked)))
            ranked.insert(0, ranked.pop(first))
        if not ranked:
            return
        figures, node = ranked[0]
        assert refusal(node, demand) is None and overloaded(node, demand) is None, "G1"
        record.winner = node.kid
        record.finish_ms = figures[3]
        if len(ranked) > 1:
            record.runner_up = ranked[1][1].kid

    def _figures(self, entry: Entry, demand: Demand, now_ms: float) -> list[float]:
        """Those of `explain.Record`, without the flags."""
        node = entry.node
        work_gas = demand.work_gas
        queued = self._view.queue_gas(node, now_ms, work_gas, entry.rate)
        fixed_s = node.rtt_s
        if demand.input_bytes and node.kid not in demand.held_by:
            fixed_s += demand.input_bytes * entry.byte_s
        finish_s = metric.finish_s(queued, work_gas, node.slots, entry.rate, fixed_s)
        cost = finish_s
        if self.config.metric == "seed":
            load = queued / work_gas if work_gas > 0 else 0.0
            distance = metric.seed_distance(demand, node.features, self.config)
            cost = metric.seed_cost(distance, load, node.static.share)
        age_ms = now_ms - node.reported_ms if node.load is not None else -1.0
        return [queued, age_ms, cost, 1000 * finish_s, entry.rate, entry.distance]

    def _admit(self, plan: Plan, demand: Demand) -> tuple[list[Entry], Refusals]:
        """What changes with every report: credits and free memory."""
        refused = plan.refused
        entries = plan.entries
        need = demand.memory_bytes
        for entry in plan.entries:
            node = entry.node
            if node.grant <= node.settled or node.grant <= 0 or node.free_memory_bytes < need:
                if entries is plan.entries:
                    entries = [each for each in entries if not overloaded(each.node, demand)]
                refused = (*refused, (node.alias, overloaded(node, demand) or ""))
        return entries, refused

    def _plan(self, demand: Demand, now_ms: float) -> Plan:
        key = (
            demand.program, demand.node, demand.node_class, demand.needs_gpu, demand.arch,
            demand.cores, demand.labels, demand.exclude, demand.compute, demand.memory,
            demand.bandwidth,
        )  # fmt: skip
        version = (self._view.version, self._rates.version, self._links.version)
        plan = self._plans.get(key)
        if plan is None or plan.version != version or now_ms - plan.made_ms > PLAN_MS:
            plan = self._make_plan(demand, version, now_ms)
            self._plans.pop(key, None)
            self._plans[key] = plan
            if len(self._plans) > PLANS_MAX:
                del self._plans[next(iter(self._plans))]
        return plan

    def _make_plan(self, demand: Demand, version: tuple[int, ...], now_ms: float) -> Plan:
        entries: list[Entry] = []
        refused: list[tuple[str, str]] = []
        own = self._view.nodes.get(self.me)
        for node in self._universe():
            reason = refusal(node, demand)
            if reason is not None:
                refused.append((node.alias, reason))
                continue
            entries.append(self._entry(node, demand, own))
        if not entries and len(self._view.nodes) > self.config.full_view:
            # No link may take it: a constraint is worth looking through everybody we heard of.
            fitting = [n for n in self._view.nodes.values() if refusal(n, demand) is None]
            if len(fitting) > self.config.full_view:
                fitting = self._random.sample(fitting, self.config.full_view)
            entries = [self._entry(node, demand, own) for node in fitting]
        return Plan(entries, tuple(refused), version, now_ms)

    def _entry(self, node: Node, demand: Demand, own: Node | None) -> Entry:
        reported = node.load.gas_per_s if node.load is not None else 0.0
        rate, learned = self._rates.rate(
            node.kid, node.node_class, node.static.compute, demand.program, reported
        )
        distance = 0.0
        if not learned:
            distance = metric.shortfall(demand, node.features, self.config)
            rate /= metric.penalty(distance, self.config.beta)
        byte_s = 0.0
        if node.kid != self.me:
            slowest = node.static.bandwidth_bps
            if own is not None:
                slowest = min(slowest, own.static.bandwidth_bps)
            byte_s = 8.0 / slowest
        return Entry(node, distance, rate, learned, byte_s)

    def _universe(self) -> list[Node]:
        """All nodes; above `full_view` this one and its links, which is all it keeps up with."""
        nodes = self._view.nodes
        if len(nodes) <= self.config.full_view:
            return list(nodes.values())
        known = (self.me, *self._links.near, *self._links.far)
        return [nodes[kid] for kid in dict.fromkeys(known) if kid in nodes]

    # --- forwarding above `full_view` ---------------------------------------------------------

    def links(self) -> tuple[Kid, ...]:
        return tuple(dict.fromkeys((*self._links.near, *self._links.far)))

    def refresh_links(self) -> None:
        """Draw one long link anew; call it now and then (a few times a minute)."""
        self._links.refresh()

    @property
    def routes(self) -> bool:
        """Whether there are more nodes than one view keeps up with."""
        return len(self._view.nodes) > self.config.full_view

    def next_hop(self, demand: Demand, now_ms: float, hops: int, visited: tuple[Kid, ...]) -> Hop:
        """Where a task that has made `hops` hops over `visited` goes from here."""
        entries, _ = self._admit(self._plan(demand, now_ms), demand)
        costs = {entry.node.kid: self._figures(entry, demand, now_ms)[2] for entry in entries}
        here = costs.pop(self.me, None)
        links = self.links()
        return routing.next_hop(here, costs, links, hops, visited, self.config, self._random)

    # --- why ----------------------------------------------------------------------------------

    def record(
        self, task: str, demand: Demand, winner: Kid, now_ms: float, note: str = ""
    ) -> Decision:
        """Keep a decision that mitosis or stealing took among `candidates(demand, now_ms)`."""
        return self.keep(task, demand, self.ranked(demand, now_ms), winner, now_ms, note).decision()

    def keep(
        self,
        task: str,
        demand: Demand,
        ranked: Sequence[Ranked],
        winner: Kid | None,
        now_ms: float,
        note: str = "",
    ) -> Record:
        """`record` for a ranking that is there already; nothing is described until asked for.
        Without a winner: nobody may take it."""
        _, refused = self._admit(self._plan(demand, now_ms), demand)
        # The winner first, then by cost: what does not fit the list is the dearest.
        first = next((each for each in ranked if each.kid == winner), None)
        listed = [each for each in ranked[: LISTED_MAX + 1] if each is not first]
        if first is not None:
            listed.insert(0, first)
        del listed[LISTED_MAX:]
        nodes = tuple([each.entry.node for each in listed])
        figures: list[float] = []
        for each in listed:
            figures += each.figures
            figures.append(each.entry.learned * LEARNED + SAMPLED)
        record = Record(task, now_ms, self.config.metric, demand.work_gas, nodes, figures, refused)
        record.more = len(ranked) - len(listed)
        record.note = note
        record.winner = winner
        if first is not None:
            record.finish_ms = first.figures[3]
        record.runner_up = next((node.kid for node in nodes if node.kid != winner), None)
        self._ring.keep(record)
        return record

    def ended(self, task: str, actual_ms: float) -> None:
        """The task took so long from the decision to the result: the regret can be told."""
        self._ring.ended(task, actual_ms)

    def why(self, task: str) -> Decision | None:
        return self._ring.why(task)

    def decisions(self, count: int = 20) -> tuple[str, ...]:
        """Tasks decided last, newest first."""
        return self._ring.latest(count)


def refusal(node: Node, demand: Demand) -> str | None:
    """The first hard constraint that a node can never meet for this demand."""
    static = node.static
    if demand.node and demand.node not in (node.alias, node.kid):
        return f"is not {demand.node}"
    if demand.node_class and demand.node_class != node.node_class:
        return f"class {node.node_class}, not {demand.node_class}"
    if demand.needs_gpu and not static.gpu:
        return "no GPU"
    if demand.arch and demand.arch != static.arch:
        return f"architecture {static.arch or 'unknown'}, not {demand.arch}"
    if demand.cores > node.slots:
        return f"{node.slots} cores, {demand.cores} needed"
    if node.kid in demand.exclude:
        return "excluded: it failed the task or holds its twin"
    wish = unmet(node, demand)
    return _without(node, wish) if wish else None


def unmet(node: Node, demand: Demand) -> str:
    """The first wish about labels that a node does not meet; "" where it meets all."""
    return next((wish for wish in demand.labels if not labels.meets(node.facts, wish)), "")


def _without(node: Node, wish: str) -> str:
    """What a node has instead."""
    if wish.startswith("!"):
        return f"has the label {wish[1:]}"
    key, equals, _ = wish.partition("=")
    other = labels.value(node.facts, key) if equals else ""
    return f"has {key}={other}, not {wish}" if other else f"lacks the label {wish}"


def overloaded(node: Node, demand: Demand) -> str | None:
    """The hard constraint that a node does not meet at present."""
    if node.credits <= 0:
        return f"no credit left of {node.grant}"
    if node.free_memory_bytes < demand.memory_bytes:
        return f"{node.free_memory_bytes} bytes free, {demand.memory_bytes} needed"
    return None
