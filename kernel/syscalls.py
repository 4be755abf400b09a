"""The node's system calls: what it answers about itself, and what it gathers from the others.

Interface rules: `serve` answers at once or starts a coroutine of the node's; every gathering has a
deadline, after which the silent are named instead of waited for.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

import msgspec

from manifold.kernel import messages as m
from manifold.kernel.errors import ManifoldError, NotFound, Unavailable
from manifold.kernel.hyperbus.driver import Incoming
from manifold.kernel.hyperbus.faults import to_failure
from manifold.kernel.hyperbus.filter import Link, Tally
from manifold.kernel.hyperbus.rules import Plan, has
from manifold.kernel.inventory import inventory
from manifold.kernel.link_rules import of_config
from manifold.kernel.membership.messages import Member, State
from manifold.kernel.observe.messages import GetMetrics, ProfileNode
from manifold.kernel.scheduler.messages import JobList, ListJobs
from manifold.vm.kid import Kid

if TYPE_CHECKING:
    from manifold.kernel.node import Node

GATHER_MS = 1000.0  # how long the others have to answer
_STATES = {
    State.ALIVE: "ready",
    State.SUSPECT: "suspect",
    State.DEAD: "dead",
    State.LEFT: "left",
}
_ASKED = frozenset(
    {
        m.GetNode,
        m.AllNodes,
        m.GetInventory,
        m.AllJobs,
        m.GetProcesses,
        m.AllProcesses,
        m.ReadLog,
        m.SetLink,
        m.ClearLinks,
        m.SkewClock,
        m.SetLabels,
        m.LinkOrders,
        m.GetLinks,
        m.Bye,
        GetMetrics,
        ProfileNode,
    }
)


class SystemCalls:
    def __init__(self, node: Node) -> None:
        self._node = node
        self._looking: dict[asyncio.Future[Any], Member] = {}  # relayed: at whom
        self.orders = node.spec.orders
        self._labels: dict[str, tuple[str, ...]] = {}  # of those that differ from their class
        self._plan_links()

    def serves(self, body: Any) -> bool:
        return type(body) in _ASKED

    def serve(self, incoming: Incoming) -> None:
        """Answer, now or when everybody was heard."""
        node = self._node
        match incoming.body:
            case m.GetNode():
                node.bus.reply(incoming, self.info())
            case m.AllNodes():
                node.run(self._all_nodes(incoming))
            case m.GetInventory():
                node.run(self._inventory(incoming))
            case m.AllJobs():
                node.run(self._all_jobs(incoming))
            case m.GetProcesses():
                node.bus.reply(incoming, m.Processes(self.processes()))
            case m.AllProcesses():
                node.run(self._all_processes(incoming))
            case m.ReadLog(after=after, contains=contains, limit=limit):
                number, lines = node.logbook.read(after, contains, limit)
                node.bus.reply(incoming, m.LogLines(node.spec.alias, number, tuple(lines)))
            case m.SetLink() as rule:
                self._set_link(incoming, rule)
            case m.ClearLinks():
                node.bus.filter.clear()
                node.bus.reply(incoming, m.Done("every link is whole"))
            case m.SkewClock(jump_ms=jump_ms, rate=rate):
                node.skew_clock(jump_ms, rate)
                node.bus.reply(incoming, m.Done("the clock is set"))
            case m.LinkOrders() as orders:
                self.obey(orders)
                node.bus.reply(incoming, m.Done(f"orders {self.orders.number} hold"))
            case m.GetLinks():
                node.bus.reply(incoming, self.links())
            case m.SetLabels() as wish:
                node.run(self._relabel(incoming, wish))
            case GetMetrics() | ProfileNode():
                node.observatory.serve(incoming)
            case m.Bye():
                node.client_gone(incoming.source)

    async def _relabel(self, incoming: Incoming, wish: m.SetLabels) -> None:
        try:
            await self._node.labelling.change(wish.given, wish.taken)
        except ManifoldError as error:
            self._node.bus.reply(incoming, to_failure(error))
            return
        self._plan_links()  # rules may name one of them
        self._node.bus.reply(incoming, self.info())

    def info(self) -> m.NodeInfo:
        """This node, as it sees itself."""
        node = self._node
        spec = node.spec
        members = node.core.membership.members()
        workers = (*node.pool.pids().values(), *node.tasks.every_pid())
        throttle = "cgroup" if spec.cgroup else "pacing" if spec.compute < 1.0 else "none"
        return m.NodeInfo(
            node.identity.kid, spec.alias, spec.node_class, "ready", os.getpid(), node.boot,
            spec.address, spec.cores, spec.compute, spec.memory_bytes, spec.gpu,
            sum(member.state in (State.ALIVE, State.SUSPECT) for member in members),
            node.now_ms() - node.started_ms, throttle, workers,
            node.core.scheduler.runner.load(), node.bus.counters["bad"],
            node.observatory.address, node.labelling.own, spec.line,
        )  # fmt: skip

    def processes(self) -> tuple[m.Process, ...]:
        """What this node's workers compute, and what waits for one."""
        node = self._node
        runner = node.core.scheduler.runner
        pids = node.pool.pids() | node.tasks.pids()
        now_ms = node.now_ms()
        running = [
            m.Process(
                node.spec.alias, slot, pids.get(slot, 0), a.job, a.shard, a.tries, a.next,
                a.last, now_ms - a.run_since_ms, a.spec.name or a.spec.program, "running",
            )
            for slot, a in runner.running()
        ]  # fmt: skip
        waiting = [
            m.Process(
                node.spec.alias, -1, 0, a.job, a.shard, a.tries, a.next, a.last, 0.0,
                a.spec.name or a.spec.program, "waiting",
            )
            for a in runner.waiting()
        ]  # fmt: skip
        return (*running, *waiting)

    def obey(self, orders: m.LinkOrders) -> None:
        """Rules of links have changed; older news is no news."""
        if orders.number >= self.orders.number and orders != self.orders:
            self.orders = orders
            self._plan_links()

    def _plan_links(self) -> None:
        spec = self._node.spec
        links = of_config(spec.config, cables=bool(spec.line))
        plan = Plan(spec.alias, links, self.orders.rules, self._labels_of)
        self._node.bus.filter.set_plan(plan)

    def _labels_of(self, alias: str) -> tuple[str, ...]:
        """As it says itself, and as its class says as long as it was not heard of."""
        spec = self._node.spec
        if alias == spec.alias:
            return self._node.labelling.own
        told = self._labels.get(alias)
        return spec.config.labels_of(alias) if told is None else told

    def _heard_labels(self, alias: str, told: tuple[str, ...]) -> None:
        """Rules that name labels may be about it, or not any more."""
        if told == self._labels_of(alias):
            return
        self._labels.pop(alias, None)
        if told != self._labels_of(alias):
            self._labels[alias] = told
        self._plan_links()

    def links(self) -> m.Links:
        """What became of this node's frames, rule by rule that is about them."""
        node = self._node
        plan, counted = node.bus.filter.plan, node.bus.filter.tallies
        assert plan is not None, "made with the node"
        tallies = tuple(
            m.LinkTally(rule, ordered, place, t.sent, t.delayed, t.lost, t.reordered, t.cut)
            for ordered, rules in ((False, plan.rules), (True, plan.orders))
            for place, rule in enumerate(rules)
            if has(rule.a, node.spec.alias, self._labels_of)
            or has(rule.b, node.spec.alias, self._labels_of)
            for t in (counted.get(rule, Tally()),)
        )
        return m.Links(node.spec.alias, self.orders.number, tallies)

    def _set_link(self, incoming: Incoming, rule: m.SetLink) -> None:
        peer = rule.peer
        if peer != "*":
            member = self._find(peer)
            if member is None:
                error = NotFound(f"No node {peer} is known here.", "`manifold node ls` lists them.")
                self._node.bus.reply(incoming, to_failure(error))
                return
            peer = member.kid
        link = Link(
            rule.latency_ms, rule.jitter_ms, rule.rate_bps, rule.loss, rule.reorder,
            rule.cut_to, rule.cut_from,
        )  # fmt: skip
        self._node.bus.filter.set(peer, link)
        self._node.bus.reply(incoming, m.Done(f"link to {rule.peer} set"))

    # -- the others ---------------------------------------------------------------------------

    def _others(self) -> list[Member]:
        me = self._node.identity.kid
        return [
            member
            for member in self._node.core.membership.members()
            if member.kid != me and member.state in (State.ALIVE, State.SUSPECT)
        ]

    def _find(self, name: str) -> Member | None:
        for member in self._node.core.membership.members():
            if name in (member.kid, member.meta.alias) and member.state != State.LEFT:
                return member
        return None

    async def _ask(self, members: list[Member], body: msgspec.Struct) -> list[Any]:
        """Everybody's answer, in order; an exception where there was none."""
        asked = []
        for member in members:
            try:
                asked.append(self._node.bus.request(member.kid, body, GATHER_MS))
            except ManifoldError as error:
                failed = self._node.loop.create_future()
                failed.set_exception(error)
                asked.append(failed)
        return await asyncio.gather(*asked, return_exceptions=True)

    async def _all_nodes(self, incoming: Incoming) -> None:
        others = self._others()
        answers = await self._ask(others, m.GetNode())
        found = {self._node.identity.kid: self.info()}
        for member in self._node.core.membership.members():
            found.setdefault(member.kid, _as_seen(member))
        for member, answer in zip(others, answers, strict=True):
            if isinstance(answer, m.NodeInfo):
                state = self._node.core.membership.get(member.kid)
                seen = _STATES[state.state] if state is not None else "left"
                found[member.kid] = msgspec.structs.replace(answer, state=seen)
        nodes = sorted(found.values(), key=lambda info: info.alias)
        self._node.bus.reply(incoming, m.NodeList(tuple(nodes)))

    async def _all_jobs(self, incoming: Incoming) -> None:
        others = self._others()
        answers = await self._ask(others, ListJobs())
        own, _ = self._node.core.request(incoming.source, ListJobs(), self._node.now_ms())
        assert isinstance(own, JobList)
        jobs = list(own.jobs)
        silent = []
        for member, answer in zip(others, answers, strict=True):
            if isinstance(answer, JobList):
                jobs += answer.jobs
            else:
                silent.append(member.meta.alias)
        self._node.bus.reply(incoming, m.JobsList(tuple(jobs), tuple(silent)))

    async def _all_processes(self, incoming: Incoming) -> None:
        others = self._others()
        answers = await self._ask(others, m.GetProcesses())
        found = list(self.processes())
        silent = []
        for member, answer in zip(others, answers, strict=True):
            if isinstance(answer, m.Processes):
                found += answer.processes
            else:
                silent.append(member.meta.alias)
        self._node.bus.reply(incoming, m.Processes(tuple(found), tuple(silent)))

    async def _inventory(self, incoming: Incoming) -> None:
        host = await asyncio.to_thread(inventory)
        text = msgspec.json.encode(host).decode()
        self._node.bus.reply(incoming, m.InventoryText(text))

    async def relay(self, incoming: Incoming) -> None:
        """Pass a request on to the node it is for, and its answer back."""
        member = self._find(incoming.destination)
        try:
            if member is None:
                raise NotFound(
                    f"No node {incoming.destination} is known.", "`manifold node ls` lists them."
                )
            if member.state == State.DEAD:
                raise Unavailable(
                    f"{member.meta.alias} is silent, and held for dead.",
                    "`manifold node ls` shows when it is there again.",
                )
            takes_ms = GATHER_MS * 5
            if isinstance(incoming.body, ProfileNode):  # it is answered when it is over
                takes_ms += incoming.body.seconds * 1000
            asked = self._node.bus.request(member.kid, incoming.body, takes_ms)
            if isinstance(incoming.body, ProfileNode | GetMetrics):
                self._looking[asked] = member
                asked.add_done_callback(lambda asked: self._looking.pop(asked))
            answer = await asked
        except ManifoldError as error:
            self._node.bus.reply(incoming, to_failure(error))
            return
        self._node.bus.reply(incoming, answer)

    def member_changed(self, now: Member) -> None:
        """Who looks at a node that is gone is told at once; there is nothing to be in doubt of."""
        gone = now.state in (State.DEAD, State.LEFT)
        if now.state == State.LEFT:
            self._labels.pop(now.meta.alias, None)
        elif now.meta.alias != self._node.spec.alias:
            self._heard_labels(now.meta.alias, now.meta.labels)
        for asked, then in list(self._looking.items()):
            if now.kid == then.kid and (gone or now.boot != then.boot) and not asked.done():
                asked.set_exception(
                    Unavailable(
                        f"{then.meta.alias} ended, or fell silent, while it was looked at.",
                        "`manifold node ls` shows when it is there again.",
                    )
                )

    async def ask_all(self, incoming: Incoming, otherwise: ManifoldError) -> None:
        """A client asks about a job we do not own: whoever owns it answers."""
        answers = await self._ask(self._others(), incoming.body)
        for answer in answers:
            if isinstance(answer, msgspec.Struct):
                self._node.bus.reply(incoming, answer)
                return
        self._node.bus.reply(incoming, to_failure(otherwise))


def _as_seen(member: Member) -> m.NodeInfo:
    """A node that did not answer, as membership sees it."""
    meta = member.meta
    return m.NodeInfo(
        Kid(member.kid), meta.alias, meta.node_class, _STATES[member.state], 0, member.boot,
        meta.addresses[0] if meta.addresses else "", meta.cores, meta.compute, meta.memory_bytes,
        meta.gpu, 0, 0.0, "", labels=meta.labels,
    )  # fmt: skip
