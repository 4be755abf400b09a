"""Leases and watches over whole clusters: who holds, what is told, under faults."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from manifold.kernel.nexus import leases as leases_module
from manifold.kernel.nexus.ballots import ZERO, Ballot
from manifold.kernel.nexus.context import Timing
from manifold.kernel.nexus.leases import Holding, Leases
from manifold.kernel.nexus.messages import Acquire, Answer, Changed, Resign, Watch
from manifold.kernel.nexus.protocol import Nexus
from manifold.kernel.nexus.watches import Watches
from manifold.tools.simulator.faults import Faults
from manifold.tools.simulator.nexus import TIMING, Client, Harness, Plan, draw
from manifold.tools.simulator.world import Node

TTL_MS = 60.0
PROBE_MS = 1.0
LEASE = Plan(
    nodes=5,
    voters=3,
    faults=Faults(
        drop=0.05,
        dup=0.05,
        reorder=0.05,
        delay=(0.2, 3.0),
        sync=(0.2, 3.0),
        cut=60.0,
        broken=(20.0, 150.0),
        crash=100.0,
        down=(5.0, 100.0),
        pause=150.0,
        stop=(20.0, 200.0),
        clock=0.1,
    ),
    duration_ms=800.0,
    operations=0,
    changes=0,
    core=False,
    deletes=0.0,
    keys=("lease",),
)


class Contest(Harness):
    """Every node wants the lease, keeps it for a while and gives it back."""

    def __init__(self, seed: int, plan: Plan = LEASE) -> None:
        super().__init__(seed, Nexus, plan)
        self.grants = 0
        self.fences: list[Ballot] = []

    def contest(self) -> Contest:
        self.begin()
        self.world.break_things()
        for node in self.world.nodes:
            self.world.at(self.random.random() * 20.0, self._want, node)
        self.world.on_boot.append(lambda node: self.world.at(1.0, self._want, node))
        self.world.at(PROBE_MS, self._probe)
        self.world.run(self.plan.duration_ms)
        self.observer.judge()
        return self

    def _want(self, node: Node) -> None:
        if not node.up:
            return
        boot = node.boot

        def done(_handle: int, answer: Answer) -> None:
            if answer.status == "ok":
                self.grants += 1
                assert answer.fence is not None
                self.fences.append(answer.fence)
                self.world.at(self.random.random() * 4 * TTL_MS, self._resign, node, boot)

        self.ask(node, Acquire("lease", node.kid, TTL_MS, 5000.0), done)

    def _resign(self, node: Node, boot: int) -> None:
        if node.up and node.boot == boot:
            self.ask(node, Resign("lease", node.kid), lambda _handle, _answer: None)
            self.world.at(self.random.random() * TTL_MS, self._want, node)

    def _probe(self) -> None:
        now_ms = self.world.now_ms
        holders = [
            node.index
            for node in self.world.nodes
            if node.up
            and node.machine.leases.fence("lease", node.kid) is not None
            and node.machine.fence("lease", node.kid, node.local(now_ms)) is not None
        ]
        if len(holders) > 1:
            self.observer.fail(f"nodes {holders} hold one lease")
        self.world.at(PROBE_MS, self._probe)


def test_nobody_holds_a_lease_that_another_holds_while_clocks_differ_by_a_tenth() -> None:
    grants = 0
    for seed in range(30):
        contest = Contest(seed).contest()
        assert not contest.observer.failures, (seed, contest.observer.failures)
        grants += contest.grants
    assert grants > 60


def test_fences_grow_even_where_clocks_jump_and_leases_overlap() -> None:
    plan = replace(LEASE, faults=replace(LEASE.faults, jump=2000.0))
    overlapped = 0
    for seed in range(20):
        contest = Contest(seed, plan).contest()
        overlapped += bool(contest.observer.failures)
        others = [each for each in contest.observer.failures if "hold one lease" not in each]
        assert not others, (seed, others)
        assert (
            len(dict.fromkeys(contest.fences)) == len(contest.fences) and contest.fences[0] > ZERO
        )
    assert overlapped, "clocks that jump ought to break leases, which is what fences are for"


def relies_on_it_too_long(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(leases_module, "HELD_PART", 1.7)


def takes_it_too_early(patch: pytest.MonkeyPatch) -> None:
    granted = Leases._granted

    def hasty(self: Leases, holding: Holding, sent_ms: float, result: Any) -> None:
        granted(self, holding, sent_ms, result)
        holding.seen_ttl_ms = TTL_MS / 4

    patch.setattr(Leases, "_granted", hasty)


@pytest.mark.parametrize("plant", [relies_on_it_too_long, takes_it_too_early])
def test_planted_bugs_of_leases_are_caught(plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    for seed in range(150):
        if Contest(seed).contest().observer.failures:
            return
    raise AssertionError(f"{plant.__name__} was not caught")


class Watching(Harness):
    """Clients write, and at each node somebody watches one key."""

    def watching(self, timing: Timing = TIMING) -> list[str]:
        """What is wrong with what was told."""
        self.told: dict[tuple[int, int], list[Changed]] = {}
        self.begin()
        self.world.break_things()
        self.clients = [Client(self, n, 6) for n in range(self.plan.nodes)]
        for client in self.clients:
            self.world.at(self.random.random() * 10.0, client.next)
        for node in self.world.nodes:
            self._watch(node)
        self.world.on_boot.append(lambda node: self.world.at(0.5, self._watch, node))
        self.world.run(self.plan.duration_ms)
        self._heal()
        self._settle()
        self.world.run_until(lambda: all(client.done for client in self.clients), 20_000.0)
        self.world.run(3 * timing.poll_ms)
        self.observer.judge()
        return [*self.observer.failures, *self._judge()]

    def _watch(self, node: Node) -> None:
        if not node.up:
            return
        heard = self.told.setdefault((node.index, node.boot), [])
        self.ask(node, Watch("a"), lambda _handle, changed: heard.append(changed))

    def _judge(self) -> list[str]:
        wrong = []
        final = max(self.observer.chosen.get("a", {}).items(), default=(ZERO, None))[1]
        for (index, boot), heard in self.told.items():
            versions = [each.version for each in heard if each.data is not None]
            if versions != sorted(dict.fromkeys(versions)):
                wrong.append(f"node {index} was told of versions {versions}")
            if self.world.nodes[index].boot == boot:
                last = heard[-1].data if heard else "nothing"
                if last != (final.data if final is not None else None):
                    wrong.append(f"node {index} heard {last} last, and it is {final}")
        return wrong


def watched(seed: int) -> Plan:
    return replace(draw(seed), changes=0, core=False, keys=("a",))


def test_every_watcher_hears_the_last_change_and_no_version_twice() -> None:
    for seed in range(25):
        wrong = Watching(seed, Nexus, watched(seed)).watching()
        assert not wrong, (seed, wrong)


def test_a_watch_without_polls_misses_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hints are lost like any message."""
    monkeypatch.setattr(Watches, "hint", lambda self, key, version: None)
    poll = Watches._poll

    def once(self: Watches, key: str, watched: Any) -> None:
        if not watched.reading and all(told is None for told in watched.told.values()):
            poll(self, key, watched)

    monkeypatch.setattr(Watches, "_poll", once)
    assert any(Watching(seed, Nexus, watched(seed)).watching() for seed in range(20))
