"""The simulator itself: determinism, clocks, disks, network, and the words for faults."""

from __future__ import annotations

import os
import subprocess
import sys
from random import Random
from typing import Any

import msgspec
import pytest

from manifold.kernel.effects import Effect, Notify, Persist, Reply, Send, SetTimer
from manifold.kernel.errors import ConfigError
from manifold.tools.simulator.disk import Disk
from manifold.tools.simulator.faults import PROFILES, Faults, parse
from manifold.tools.simulator.network import Network
from manifold.tools.simulator.run import simulate
from manifold.tools.simulator.world import World
from manifold.vm.kid import Kid


class Word(msgspec.Struct, frozen=True, array_like=True, tag="t.word"):
    text: str
    parts: tuple[int, ...] = ()


class Echo:
    """Answers `hello`, notes what happens, persists before it says `kept`."""

    def __init__(self, kid: Kid, boot: int, durable: dict[str, bytes]) -> None:
        self.kid, self.boot, self.durable = kid, boot, durable
        self.heard: list[Any] = []
        self.ticks: list[float] = []

    def start(self, now_ms: float) -> list[Effect]:
        return [SetTimer(now_ms + 100.0)]

    def receive(self, source: Kid, message: Word, now_ms: float) -> list[Effect]:
        self.heard.append((source, message))
        if message.text == "hello":
            return [Send(source, Word("welcome", message.parts))]
        if message.text == "keep":
            return [Notify(3), Persist("word", b"kept"), Send(source, Word("kept")), Notify("late")]
        return []

    def tick(self, now_ms: float) -> list[Effect]:
        self.ticks.append(now_ms)
        return [SetTimer(now_ms + 100.0)]


def world(seed: int = 1, faults: str = "none", count: int = 3) -> World:
    made = World(
        seed,
        parse(faults),
        count,
        lambda kid, boot, durable, random, now: Echo(kid, boot, durable),
        Word,
    )
    for node in made.nodes:
        made.start(node)
    return made


def say(made: World, source: int, to: str, word: Word) -> None:
    made.call(made.nodes[source], lambda machine, now: [Send(to, word)])


def test_a_message_reaches_a_kid_or_an_address_and_is_never_the_same_object() -> None:
    made = world()
    word = Word("hello", (1, 2))
    say(made, 0, made.nodes[1].kid, word)
    say(made, 0, "sim://2", word)
    say(made, 0, "sim://nowhere", word)
    made.run(20.0)
    for place in (1, 2):
        ((source, heard),) = made.nodes[place].machine.heard
        assert source == made.nodes[0].kid and heard == word and heard is not word
    assert [m.text for _, m in made.nodes[0].machine.heard] == ["welcome", "welcome"]
    assert made.network.lost == 1


def test_what_stands_after_a_persist_waits_until_it_is_durable() -> None:
    made = world(faults="sync=50:50,delay=1:1")
    told: list[Any] = []
    made.on_notify = {int: [lambda n, e: told.append(e)], str: [lambda n, e: told.append(e)]}
    say(made, 0, "sim://1", Word("keep"))
    made.run(30.0)
    assert told == [3] and not made.nodes[0].machine.heard
    assert made.nodes[1].disk.read("word") is None
    made.run(60.0)
    assert told == [3, "late"] and made.nodes[0].machine.heard[0][1] == Word("kept")
    assert made.nodes[1].disk.read("word") == b"kept"


def test_a_crash_takes_the_waiting_effects_with_it_and_the_next_boot_is_larger() -> None:
    made = world(faults="sync=50:50,delay=1:1")
    say(made, 0, "sim://1", Word("keep"))
    made.run(30.0)
    old = made.nodes[1].machine
    made.crash(made.nodes[1])
    made.restart(made.nodes[1], 10.0)
    ticks = len(old.ticks)
    made.run(500.0)
    assert made.nodes[1].machine.boot == 2 and made.nodes[1].machine is not old
    assert len(old.ticks) == ticks and not made.nodes[0].machine.heard


def test_a_crash_keeps_any_subset_of_the_writes_under_way_but_never_the_durable_ones() -> None:
    outcomes = []
    for seed in range(200):
        disk = Disk()
        disk.write("a", b"old", 1.0)
        disk.synced()
        for name in ("a", "b", "c"):
            disk.write(name, b"new", 2.0)
        disk.crash(Random(seed))
        kept = disk.recovered()
        assert kept["a"] in (b"old", b"new")
        outcomes.append(tuple(kept.get(name) == b"new" for name in ("a", "b", "c")))
    assert len(set(outcomes)) == 8


def test_writes_become_durable_in_their_order() -> None:
    disk = Disk()
    assert disk.write("a", b"1", 10.0) == 10.0
    assert disk.write("a", b"2", 5.0) == 10.0
    disk.synced()
    assert disk.read("a") == b"1" and not disk.holds("a", b"1")
    disk.synced()
    assert disk.holds("a", b"2")


def test_a_clock_may_run_fast_or_jump_and_its_timers_follow() -> None:
    made = world()
    fast, still = made.nodes[0], made.nodes[1]
    made.set_clock(fast, rate=1.1)
    made.run(10_000.0)
    assert len(fast.machine.ticks) == pytest.approx(110, abs=2)
    assert len(still.machine.ticks) == pytest.approx(100, abs=2)
    made.set_clock(fast, rate=1.0, jump_ms=5_000.0)
    before = len(fast.machine.ticks)
    made.run(1.0)
    assert len(fast.machine.ticks) == before + 1
    assert fast.machine.ticks == sorted(fast.machine.ticks)


def test_a_paused_node_hears_everything_late() -> None:
    made = world()
    made.pause(made.nodes[1], 1_000.0)
    say(made, 0, "sim://1", Word("hello"))
    made.run(900.0)
    assert not made.nodes[1].machine.heard
    made.run(200.0)
    assert len(made.nodes[1].machine.heard) == 1 and made.nodes[0].machine.heard


def test_a_cut_is_one_way_and_a_partition_is_not() -> None:
    network = Network(Random(1), Faults(), 4)
    network.cut(0, 1, 100.0)
    assert network.routes(0, 1, 50.0) == () and network.routes(1, 0, 50.0)
    assert network.routes(0, 1, 100.0)
    network.partition([2, 3], 200.0)
    assert network.routes(2, 3, 150.0)
    assert network.routes(0, 2, 150.0) == () == network.routes(3, 1, 150.0)
    assert network.routes(0, 2, 200.0)


def test_clogged_messages_wait_and_arrive_after_all() -> None:
    network = Network(Random(1), Faults(), 2)
    network.clog(1, 10.0, 500.0)
    (delay_ms,) = network.routes(0, 1, 20.0)
    assert 480.0 <= delay_ms < 500.0
    assert network.routes(0, 1, 600.0)[0] < 10.0


def test_the_rare_fates_come_at_their_probabilities() -> None:
    network = Network(Random(1), parse("drop=0.2,dup=0.1"), 2)
    network.faulty = True
    copies = [len(network.routes(0, 1, 0.0)) for _ in range(20_000)]
    assert copies.count(0) / 20_000 == pytest.approx(0.2, abs=0.01)
    assert copies.count(2) / 20_000 == pytest.approx(0.1, abs=0.01)


def test_a_handler_turns_a_notification_into_a_later_call() -> None:
    made = world()
    done: list[float] = []

    def later(machine: Echo, now_ms: float) -> list[Effect]:
        done.append(now_ms)
        return [Reply(7, Word("done"))]

    made.on_notify[int] = [lambda node, event: made.call(node, later, float(event))]
    made.call(made.nodes[2], lambda machine, now: [Notify(250)])
    made.call(made.nodes[1], lambda machine, now: [Notify(250)])
    made.run(100.0)
    made.crash(made.nodes[1])
    made.run(400.0)
    assert len(done) == 1 and made.replies == {(2, 1, 7): Word("done")}


def test_faults_are_parsed_and_written_back() -> None:
    faults = parse("light, drop=0.25, delay=1:50, crash=3")
    assert (faults.drop, faults.delay, faults.crash) == (0.25, (1.0, 50.0), 3.0)
    assert faults.pause == PROFILES["light"].pause
    for plan in (faults, *PROFILES.values()):
        assert parse(plan.text()) == plan
    assert parse("none").quiet and parse("delay=1:9").quiet and not parse("drop=0.1").quiet


@pytest.mark.parametrize(
    "text",
    [
        "medium",
        "drop",
        "drop=2",
        "drop=x",
        "drop=nan",
        "delay=9:1",
        "delay=1:2:3",
        "dorp=1",
        "crash=-1",
        "crash=1,light",
        "",
    ],
)
def test_faults_that_make_no_sense_are_refused_with_what_to_do(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert caught.value.next_step


def test_the_digest_depends_on_the_seed_alone_and_not_on_hash_randomisation() -> None:
    """W1, in three processes with different PYTHONHASHSEEDs."""
    program = (
        "from manifold.tools.simulator.run import simulate\n"
        "for seed in (1, 2): print(simulate(seed, 8, 'heavy', 20000.0).digest)"
    )
    digests = []
    for hash_seed in ("0", "1", "4242"):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        digests.append(done.stdout.split())
    assert digests[0] == digests[1] == digests[2]
    assert digests[0][0] != digests[0][1]


def test_a_report_says_what_was_run_and_how_to_run_it_again() -> None:
    report = simulate(3, 3, "light", 5_000.0)
    text = report.text()
    assert "seed 3: 3 nodes, faults light" in text and report.digest in text
    assert report.events > 0 and report.virtual_s >= 5.0 and not report.failures
    report.failures.append("something")
    assert "manifold sim --seed 3 --nodes 3 --faults light" in report.text()
