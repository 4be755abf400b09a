"""What this node believes of every node: static figures, last load, its own dispatches since.

    q-hat = seen(q_last, age) + own_sent - own_done since that report, never below own in-flight

Interface rules:
  - ages are differences of this node's own clock: when a report ARRIVED, never when it was sent;
  - `dispatched` once per task sent, `completed(..., ended=True)` once per task that left again
    (result, failure, withdrawal); parts done before that with `ended=False`;
  - what is not known (a node that left, a duplicate result) is counted and ignored.

The bound from below is an addition to the design page: a report is older than its arrival, so
work that was on its way when it was written is neither in `q_last` nor in "since that report";
what I sent and have not got back needs no clock.

Invariants: G2 0 <= credits <= grant; G3 own in-flight is never negative and exactly 0 at idle.
Source: the design page of geode, "Rule"; Mitzenmacher, "How Useful Is Old Information?" (2000).
"""

from __future__ import annotations

from math import exp, isfinite

from manifold.kernel import labels
from manifold.kernel.geode.features import LATENCY_MAX_MS, Static
from manifold.kernel.geode.messages import MAX_GAS, MAX_SLOTS, MIN_RATE, LoadReport
from manifold.vm.kid import Kid

# Class means are taken again after this long: an O(N) pass, 10 times a second at most.
MEAN_MS = 100.0
RTT_ALPHA = 0.3  # as for rates: about the last five samples


class Node:
    """One node as seen from here. Read by geode.py; written by `View` only."""

    __slots__ = (
        "alias",
        "done_gas",
        "facts",
        "features",
        "flight_gas",
        "flights",
        "free_memory_bytes",
        "grant",
        "kid",
        "load",
        "node_class",
        "queued_gas",
        "reported_ms",
        "rtt_s",
        "sent_gas",
        "settled",
        "slots",
        "static",
    )

    def __init__(self, kid: Kid, alias: str, node_class: str, static: Static, rtt_s: float) -> None:
        self.kid = kid
        self.alias = alias
        self.node_class = node_class
        self.static = static
        self.features = static.features
        # What it can be asked to be: what it says, and what it is by itself.
        self.facts = (*static.labels, *labels.facts(node_class, static.arch, static.gpu))
        self.slots = static.cores
        self.rtt_s = rtt_s
        self.load: LoadReport | None = None
        self.reported_ms = 0.0
        self.queued_gas = 0.0
        self.free_memory_bytes = static.memory_bytes
        self.grant = MAX_SLOTS
        self.settled = 0  # own tasks sent minus ended since that report
        self.sent_gas = 0.0  # since that report
        self.done_gas = 0.0  # since that report
        self.flights = 0  # own tasks that have not ended
        self.flight_gas = 0.0  # what is left of them

    @property
    def identity(self) -> tuple[str, str, Static]:
        return self.alias, self.node_class, self.static

    def inherit(self, before: Node) -> None:
        """It told new figures of itself: what is known of its load and is on its way stays."""
        if before.load is not None:
            self.load, self.reported_ms = before.load, before.reported_ms
            self.slots, self.grant = before.slots, before.grant
            self.queued_gas = before.queued_gas
            self.free_memory_bytes = before.free_memory_bytes
        self.settled, self.flights = before.settled, before.flights
        self.sent_gas, self.done_gas = before.sent_gas, before.done_gas
        self.flight_gas = before.flight_gas

    @property
    def credits(self) -> int:
        credits = min(self.grant, max(0, self.grant - self.settled))
        assert 0 <= credits <= self.grant, "G2"
        return credits


class View:
    def __init__(self, me: Kid, stale_ms: float) -> None:
        self._me = me
        self._stale_ms = stale_ms
        self._means: dict[str, float] = {}
        self._means_at_ms = -MEAN_MS
        self.nodes: dict[Kid, Node] = {}
        self.version = 0  # changes when nodes come, go, or change their slots
        self.refused_inputs = 0  # NaN, infinite, negative or absurd figures
        self.strays = 0  # news of nodes or tasks that are not known

    def up(self, kid: Kid, alias: str, node_class: str, static: Static) -> bool:
        if not static.sane:
            self.refused_inputs += 1
            return False
        before = self.nodes.get(kid)
        if before is not None and (alias, node_class, static) == before.identity:
            return True
        own = self.nodes.get(self._me)
        near_ms = own.static.latency_ms if own is not None else static.latency_ms
        rtt_s = 0.0 if kid == self._me else 2 * (near_ms + static.latency_ms) / 1000
        node = Node(kid, alias, node_class, static, rtt_s)
        if before is not None:
            node.inherit(before)
        self.nodes[kid] = node
        self.version += 1
        return True

    def down(self, kid: Kid) -> None:
        if self.nodes.pop(kid, None) is not None:
            self.version += 1

    def report(self, kid: Kid, load: LoadReport, now_ms: float) -> bool:
        node = self.nodes.get(kid)
        if node is None:
            self.strays += 1
            return False
        if not _sane(load):
            self.refused_inputs += 1
            return False
        if load.slots != node.slots or node.load is None:
            self.version += 1
        node.load = load
        node.slots = load.slots
        node.reported_ms = now_ms
        node.queued_gas = load.queued_gas
        node.free_memory_bytes = load.free_memory_bytes
        node.grant = load.credits
        node.settled = 0
        node.sent_gas = node.done_gas = 0.0
        return True

    def dispatched(self, kid: Kid, work_gas: float) -> None:
        node = self.nodes.get(kid)
        if node is None or not _usable(work_gas):
            self._count(node)
            return
        node.flights += 1
        node.settled += 1
        node.flight_gas += work_gas
        node.sent_gas += work_gas

    def completed(self, kid: Kid, work_gas: float, ended: bool) -> None:
        node = self.nodes.get(kid)
        if node is None or not _usable(work_gas) or not node.flights:
            self._count(node if node is None or node.flights else None)
            return
        node.done_gas += work_gas
        node.flight_gas = max(0.0, node.flight_gas - work_gas)
        if ended:
            node.flights -= 1
            node.settled -= 1
            if not node.flights:
                node.flight_gas = 0.0  # exactly: sums of floats would leave dust
        assert node.flights >= 0 and node.flight_gas >= 0, "G3"

    def _count(self, node: Node | None) -> None:
        if node is None:
            self.strays += 1
        else:
            self.refused_inputs += 1

    def rtt(self, kid: Kid, rtt_ms: float) -> None:
        node = self.nodes.get(kid)
        if node is None or not 0 <= rtt_ms <= LATENCY_MAX_MS:
            self._count(node)
        elif kid != self._me:
            node.rtt_s += RTT_ALPHA * (rtt_ms / 1000 - node.rtt_s)

    def queue_gas(
        self, node: Node, now_ms: float, work_gas: float = 0.0, gas_per_s: float = 0.0
    ) -> float:
        """q-hat, as it matters to a task of `work_gas` that would run at `gas_per_s` a slot.

        A queue turns over in the time that it takes to drain: what was seen longer ago than that
        (or than `stale_ms`) shrinks towards the class mean.
        """
        queued = node.queued_gas
        age_ms = now_ms - node.reported_ms
        constant_ms = self._stale_ms
        if gas_per_s > 0:
            drain_ms = 1000 * (queued + work_gas) / (gas_per_s * node.slots)
            if drain_ms < constant_ms:
                constant_ms = drain_ms
        if node.load is None:
            queued = self._mean_gas(node, now_ms)
        elif age_ms > constant_ms:
            trust = exp(-age_ms / constant_ms) if constant_ms > 0 else 0.0
            queued = trust * queued + (1 - trust) * self._mean_gas(node, now_ms)
        queued += node.sent_gas - node.done_gas
        return queued if queued > node.flight_gas else node.flight_gas

    def _mean_gas(self, node: Node, now_ms: float) -> float:
        """The class mean, per core of the reference machine, on a machine of this size."""
        if now_ms - self._means_at_ms >= MEAN_MS or now_ms < self._means_at_ms:
            self._means = _means(self.nodes)
            self._means_at_ms = now_ms
        mean = self._means.get(node.node_class)
        return (self._means.get("", 0.0) if mean is None else mean) * node.static.share


def _means(nodes: dict[Kid, Node]) -> dict[str, float]:
    """Mean queue per core by class; "" is over all, for classes with fewer than two reports."""
    gas: dict[str, float] = {}
    share: dict[str, float] = {}
    count: dict[str, int] = {}
    for node in nodes.values():
        if node.load is None:
            continue
        for name in (node.node_class, ""):
            gas[name] = gas.get(name, 0.0) + node.queued_gas
            share[name] = share.get(name, 0.0) + node.static.share
            count[name] = count.get(name, 0) + 1
    return {name: gas[name] / share[name] for name in gas if count[name] > 1 or name == ""}


def _usable(figure: float) -> bool:
    return isfinite(figure) and 0 <= figure <= MAX_GAS


def _sane(load: LoadReport) -> bool:
    return (
        _usable(load.queued_gas)
        and (load.gas_per_s == 0 or MIN_RATE <= load.gas_per_s <= MAX_GAS)
        and 1 <= load.slots <= MAX_SLOTS
        and 0 <= load.free_slots <= MAX_SLOTS
        and 0 <= load.credits <= MAX_SLOTS
        and 0 <= load.free_memory_bytes <= 1 << 60
    )
