"""Nexus over whole clusters from seeds: safety under faults, progress after healing.

`python -m manifold.tools.simulator.nexus SEED SCHEDULES` runs as many more as one likes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from manifold.kernel.nexus.messages import (
    CONFIG_KEY,
    Accepted,
    Answer,
    Operate,
    Promise,
    ReadReply,
    SetVoters,
)
from manifold.kernel.nexus.protocol import Nexus
from manifold.kernel.nexus.values import Add, Get, Put
from manifold.kernel.nexus.voters import Drive, Drivers
from manifold.tools.simulator.faults import Faults
from manifold.tools.simulator.nexus import Harness, Plan, draw, run, schedule
from manifold.tools.simulator.world import Node

QUIET = Plan(
    nodes=5,
    voters=3,
    faults=Faults(sync=(0.2, 1.0)),
    duration_ms=500.0,
    operations=0,
    changes=0,
    core=False,
    deletes=0.0,
    keys=("a",),
)


@pytest.mark.parametrize("block", range(24))
def test_safety_under_all_faults_then_progress_after_healing(block: int) -> None:
    summary = run(1_000_000 + block * 80, 80)
    assert summary.failed is None, summary.text()
    assert summary.answered > summary.maybes and summary.changes > 0


def test_the_same_seed_gives_the_same_trace_whatever_the_hash_seed() -> None:
    code = (
        "from manifold.tools.simulator.nexus import schedule\n"
        "print([schedule(seed).digest for seed in (3, 8, 14, 21)])"
    )
    traces = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for hash_seed in ("0", "1", "4711")
    }
    assert len(traces) == 1 and schedule(3).digest in traces.pop()


RACES = 140


class Race(Harness):
    """Several drivers at once, each with voters of its own; some of them die on the way."""

    healed = False

    def _change(self) -> None:
        up = [node for node in self.world.nodes if node.up]
        for node in self.random.sample(up, min(3, len(up))):
            voters = tuple(sorted(self.random.sample(self.kids, self.random.choice((2, 3, 4)))))
            self.ask(node, SetVoters(voters, 2000.0), self._changed)
            if self.random.random() < 0.5:
                self.world.at(self.random.random() * 60.0, self._kill, node)

    def _heal(self) -> None:
        self.healed = True
        super()._heal()

    def _kill(self, node: Node) -> None:
        if node.up and not self.healed:
            self.world.crash(node)
            self.world.restart(node, 1.0 + self.random.random() * 200.0)

    def _changed(self, _handle: int, answer: Any) -> None:
        self.outcome.changes += answer.status == "ok"


def races(seed: int) -> Plan:
    return replace(draw(seed), nodes=6, voters=3, changes=4, core=False, operations=3)


def test_racing_drivers_that_die_leave_one_configuration_and_no_change_half_done() -> None:
    done = epochs = 0
    for seed in range(RACES):
        race = Race(seed, Nexus, races(seed))
        outcome = race.run()
        assert not outcome.failures, (seed, outcome.failures)
        done += outcome.changes
        epochs += max(config.count for config in race.observer.configs.values()) - 1
    assert done > RACES and epochs > 2 * RACES, (done, epochs)


def test_the_config_register_is_written_anew_by_the_step_that_ends_the_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its own re-scan is not needed: e+2 is written by a joint quorum, on what one has read."""
    rewrite = Drivers._rewrite

    def skips(self: Drivers, drive: Drive) -> None:
        drive.keys = [key for key in drive.keys if key != CONFIG_KEY]
        rewrite(self, drive)

    monkeypatch.setattr(Drivers, "_rewrite", skips)
    summary = run(0, 30, Nexus, races)
    assert summary.failed is None and summary.changes > 30, summary.text()


def test_a_voter_whose_disk_failed_says_nothing_until_it_is_started_again() -> None:
    stopped = 0
    for seed in range(25):
        plan = replace(draw(seed), changes=0, core=False)
        harness = Harness(seed, Nexus, replace(plan, faults=replace(plan.faults, fsync=0.03)))
        said: list[str] = []

        def listen(node: Node, send: Any, said: list[str] = said) -> None:
            if node.disk.broken and isinstance(send.message, Promise | Accepted | ReadReply):
                said.append(f"node {node.index}: {send.message}")

        harness.world.on_send.append(listen)
        harness.begin()
        harness.world.break_things()
        node = harness.world.nodes[0]
        for number in range(40):
            harness.world.at(number * 8.0, _put, harness, node, number)
        harness.world.run(400.0)
        stopped += sum(each.up and each.machine.acceptor.stopped for each in harness.world.nodes)
        assert not said and not harness.observer.failures, (seed, said, harness.observer.failures)
    assert stopped > 10


def _put(harness: Harness, node: Node, number: int) -> None:
    if node.up:
        message = Operate(f"p{number}", "a", Put(number), 100.0)
        harness.ask(node, message, lambda _handle, _answer: None)


def _one(harness: Harness, node: Node, message: Any, limit_ms: float = 3000.0) -> Answer:
    told: list[Answer] = []
    harness.ask(node, message, lambda _handle, answer: told.append(answer))
    assert harness.world.run_until(lambda: bool(told), limit_ms, 1.0) is not None, message
    return told[0]


def test_a_minority_refuses_writes_names_who_is_missing_and_reads_stale_when_asked() -> None:
    harness = Harness(1, Nexus, QUIET)
    harness.begin()
    first, apart = harness.world.nodes[1], harness.world.nodes[0]
    assert _one(harness, first, Operate("w1", "a", Put(1))).status == "ok"
    harness.world.run(100.0)  # who was not needed has heard of it as well
    harness.world.partition([apart], 5000.0)
    write = _one(harness, apart, Operate("w2", "a", Put(2), 300.0))
    assert (write.status, write.strength) == ("unavailable", "none")
    assert set(write.missing) == {harness.kids[1], harness.kids[2]}
    assert _one(harness, apart, Operate("r1", "a", Get(), 300.0)).status == "unavailable"
    stale = _one(harness, apart, Operate("r2", "a", Get(), 300.0, stale=True))
    assert (stale.status, stale.data, stale.strength) == ("ok", 1, "stale")
    assert _one(harness, first, Operate("w3", "a", Put(3))).strength == "quorum"
    harness.world.run(6000.0)
    healed = _one(harness, apart, Operate("r3", "a", Get()))
    assert (healed.status, healed.data, healed.strength) == ("ok", 3, "quorum")
    harness.observer.judge()
    assert not harness.observer.failures


def test_everything_acknowledged_is_there_after_all_voters_were_killed_at_once() -> None:
    for seed in range(10):
        harness = Harness(seed, Nexus, QUIET)
        harness.begin()
        total = 0
        for number in range(12):
            node = harness.world.nodes[number % 5]
            answer = _one(harness, node, Operate(f"a{number}", "a", Add(1)))
            assert answer.status == "ok"
            total += 1
        for node in harness.world.nodes:
            harness.world.crash(node)
        harness.world.run(5.0)
        for node in harness.world.nodes:
            harness.world.start(node)
        found = _one(harness, harness.world.nodes[4], Operate("r", "a", Get()))
        assert (found.status, found.data) == ("ok", total)


def test_eight_nodes_at_one_key_get_equal_shares() -> None:
    """Jain's index: 1 is fair, 1/8 is one node that has it all (0.12 without forwarding)."""
    harness = Harness(5, Nexus, replace(QUIET, nodes=8))
    harness.begin()
    done = [0] * 8

    def again(node: Node) -> None:
        def answered(_handle: int, answer: Answer) -> None:
            done[node.index] += answer.status == "ok"
            again(node)

        message = Operate(f"{node.index}.{done[node.index]}.{harness.world.events}", "a", Add(1))
        harness.ask(node, message, answered)

    for node in harness.world.nodes:
        again(node)
    harness.world.run(1500.0)
    jain = sum(done) ** 2 / (8 * sum(each**2 for each in done))
    assert jain > 0.9 and sum(done) > 400, done
