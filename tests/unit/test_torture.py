"""The torturer's parts: the plan, the clients' loops, and a judge that must never be wrong."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace as changed
from pathlib import Path
from random import Random

import msgspec
import pytest

from manifold.kernel.errors import Maybe, Unavailable
from manifold.kernel.nexus.ballots import Ballot
from manifold.kernel.nexus.messages import Answer, Operate
from manifold.kernel.nexus.values import Add, Delete, Get, Put, Value, Wanted, change
from manifold.tools.torture import callers, history
from manifold.tools.torture.callers import Caller
from manifold.tools.torture.history import Seen
from manifold.tools.torture.nemesis import State, stalled_ms
from manifold.tools.torture.plan import Step, plan
from manifold.tools.torture.verdict import judge

CLIENTS = 10
RECORDS = 1200  # two for each operation
ALIASES = [f"n{node}" for node in range(5)]


# -- the plan ---------------------------------------------------------------------------------


def test_the_plan_is_a_function_of_the_seed_in_every_process() -> None:
    here = [str(step) for step in plan(7, 60, 7, 5)]
    program = "from manifold.tools.torture.plan import plan\nfor s in plan(7, 60, 7, 5): print(s)"
    there = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True,
        env={"PYTHONHASHSEED": "5"},
    ).stdout.splitlines()  # fmt: skip
    assert here == there
    assert here != [str(step) for step in plan(8, 60, 7, 5)]


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_has_every_fault_ends_healed_and_stays_within_its_bounds(seed: int) -> None:
    steps = plan(seed, 40, 7, 5)
    assert {step.what for step in steps} == {
        "kill", "pause", "resume", "cut", "mend", "replace", "heal"
    }  # fmt: skip
    assert [step.at_ms for step in steps] == sorted(step.at_ms for step in steps)
    assert any(step.what == "kill" and len(step.nodes) == 5 for step in steps)
    for step in steps:
        named = {*step.nodes, *(node for cut in step.cuts for node in cut)}
        assert named <= set(range(7))
        assert step.what != "replace" or len(step.nodes) == 5
        assert all(one != other for one, other in step.cuts)
    assert Step(40_000.0, "heal") in steps


@pytest.mark.parametrize(("nodes", "voters"), [(1, 1), (3, 3), (5, 3), (7, 7)])
def test_small_clusters_have_plans_as_well(nodes: int, voters: int) -> None:
    for seed in range(30):
        for step in plan(seed, 20, nodes, voters):
            assert step.what != "replace" or 1 <= len(step.nodes) <= voters


# -- a store to judge -------------------------------------------------------------------------


class Store:
    """A correct register store in memory; answers are lost now and then. Others lie, below."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.values: dict[str, Value] = {}
        self.ballot = 0
        self.asked = 0
        self.lies = 0

    async def pause(self) -> None:
        for _ in range(self.random.randrange(4)):
            await asyncio.sleep(0)

    async def __call__(self, node: int, message: Operate) -> Answer:
        self.asked += 1
        fate = self.random.random()
        if fate < 0.02:
            raise Unavailable("nobody is there")
        await self.pause()
        if fate < 0.04:
            return Answer("unavailable", strength="none")
        if fate < 0.06:
            raise Maybe("lost on the way there")
        answer = self.apply(message)
        await self.pause()
        if fate < 0.12:
            raise Maybe("lost on the way back")
        return answer

    def apply(self, message: Operate) -> Answer:
        self.ballot += 1
        before = self.values.get(message.key, Value(0, 0, None))
        base = None if message.base < 0 and not message.retry else message.base
        wanted = [Wanted(message.op, message.change, base)]
        after, results = change(before, wanted, Ballot(self.ballot, "s", 1, 1))
        self.values[message.key] = after
        (found,) = results
        return Answer(found.status, found.version, found.data, None, found.stamp)


def run(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    """Clients in closed loops at `store`, and in the end a read of every key."""
    monkeypatch.setattr(callers, "THINK_MS", 0.0)
    monkeypatch.setattr(callers, "AWAY_MS", 0.0)
    seen: list[Seen] = []
    clock = iter(range(10_000_000))

    async def all_of_them() -> None:
        stopped = asyncio.Event()

        def record(each: Seen) -> None:
            seen.append(each)
            if len(seen) >= RECORDS:
                stopped.set()

        def caller(number: int) -> Caller:
            return Caller(
                f"c{number}", number, number % 5, ALIASES, Random(number), store, record,
                lambda: float(next(clock)), 0.0,
            )  # fmt: skip

        async with asyncio.TaskGroup() as group:
            for number in range(CLIENTS):
                group.create_task(caller(number).run(stopped))
        for key in sorted({each.key for each in seen}):
            while await caller(CLIENTS).once(key, "read") != "ok":
                continue

    asyncio.run(all_of_them())
    return history.latest(seen)


@pytest.mark.parametrize("seed", range(8))
def test_what_a_correct_store_answers_is_never_blamed(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = run(Store(seed), monkeypatch)
    verdict = judge(seen)
    assert verdict.failures == []
    kinds = Counter(each.kind for each in seen)
    assert set(kinds) == {"read", "write", "cas", "add", "delete", "create"}
    statuses = Counter(each.status for each in seen)
    assert {"ok", "no", "maybe", "unavailable"} <= set(statuses)
    assert any(each.tries > 1 and each.final for each in seen), "retries find their results"


class DropsAnAcknowledgedWrite(Store):
    def apply(self, message: Operate) -> Answer:
        before = self.values.get(message.key)
        answer = super().apply(message)
        if answer.status == "ok" and isinstance(message.change, Put | Add):
            self.lies += 1
            if self.lies == 20:
                self.values[message.key] = before or Value(0, 0, None)
        return answer


class ReturnsAStaleRead(Store):
    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.first: dict[str, Answer] = {}

    def apply(self, message: Operate) -> Answer:
        answer = super().apply(message)
        if isinstance(message.change, Get):
            old = self.first.setdefault(message.key, answer)
            if old.data != answer.data and answer.data is not None:
                self.lies += 1
                if self.lies == 5:
                    return msgspec.structs.replace(old, version=0)
        return answer


class AppliesARetryAgain(Store):
    """It has no ring; what was lost on the way back is done twice."""

    def apply(self, message: Operate) -> Answer:
        value = self.values.get(message.key)
        if value is not None:
            self.values[message.key] = msgspec.structs.replace(value, ring=())
        retry = message.retry and isinstance(message.change, Add)
        self.lies += retry
        return super().apply(msgspec.structs.replace(message, retry=False, base=-1))


class DoesWhatItRefused(Store):
    """`unavailable` says that nothing was done."""

    async def __call__(self, node: int, message: Operate) -> Answer:
        if isinstance(message.change, Put) and not message.retry:
            self.lies += 1
            if self.lies == 10:
                self.apply(message)
                return Answer("unavailable", strength="none")
        return await super().__call__(node, message)


class TellsAnotherVersion(Store):
    def apply(self, message: Operate) -> Answer:
        answer = super().apply(message)
        if answer.status == "ok" and answer.version > 4 and isinstance(message.change, Put):
            self.lies += 1
            if self.lies == 10:
                return msgspec.structs.replace(answer, version=2)
        return answer


class LosesADelete(Store):
    def apply(self, message: Operate) -> Answer:
        before = self.values.get(message.key)
        answer = super().apply(message)
        if answer.status == "ok" and isinstance(message.change, Delete) and before is not None:
            self.lies += 1
            if self.lies == 5:
                self.values[message.key] = before
        return answer


LIARS = [
    DropsAnAcknowledgedWrite, ReturnsAStaleRead, AppliesARetryAgain, DoesWhatItRefused,
    TellsAnotherVersion, LosesADelete,
]  # fmt: skip


@pytest.mark.parametrize("liar", LIARS)
def test_a_store_that_lies_once_is_found_out(
    liar: Callable[[int], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(4):
        store = liar(seed)
        verdict = judge(run(store, monkeypatch))
        assert store.lies, "it has lied"
        if verdict.failures:
            key = verdict.blamed[0].key
            assert all(each.key == key for each in verdict.blamed)
            return
    raise AssertionError("nobody noticed")


# -- the judge's own rules --------------------------------------------------------------------


def seen(kind: str, begun_ms: float, result: object, **more: object) -> Seen:
    argument = {"add": (1,), "write": (5,), "read": ()}[kind]
    each = {"client": "c", "node": "n0", "key": "k", "status": "ok", "version": 0} | more
    return msgspec.convert(
        {"kind": kind, "argument": argument, "result": result, "begun_ms": begun_ms,
         "ended_ms": begun_ms + 1.0} | each, Seen,
    )  # fmt: skip


def test_acknowledged_adds_sum_up_exactly_but_for_those_of_unknown_fate() -> None:
    adds = [seen("add", 10.0 * n, n + 1) for n in range(5)]
    lost = seen("add", 60.0, None, status="maybe")
    assert judge([*adds, seen("read", 90.0, 5)]).failures == []
    assert judge([*adds, lost, seen("read", 90.0, 6)]).failures == []
    for total, more in ((4, []), (6, []), (7, [lost])):
        failures = judge([*adds, *more, seen("read", 90.0, total)]).failures
        assert any("acknowledged" in each for each in failures)
    failures = judge([*adds, seen("add", 65.0, 5)]).failures
    assert any("both told 5" in each for each in failures)


def test_versions_may_not_go_back_though_values_agree() -> None:
    good = [seen("write", 0.0, None, version=4), seen("read", 5.0, 5, version=4)]
    assert judge(good).failures == []
    assert judge([*good, seen("read", 9.0, 5, version=3)]).failures
    assert judge([*good, seen("write", 9.0, None, version=4)]).failures
    assert judge([*good, seen("write", 9.0, None, version=4, tries=2)]).failures == []


def test_a_history_survives_a_file_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "seen"
    each = seen("add", 1.0, 1)
    with path.open("wb") as file:
        history.write(file, each)
        history.write(file, each)
    path.write_bytes(path.read_bytes()[:-5])
    assert history.read(path) == [each]


def test_what_a_dead_client_had_begun_may_have_happened() -> None:
    begun = [seen("write", 1.0, None, status="begun", client="c1")]
    read = seen("read", 5.0, 5)
    assert judge(history.latest([*begun, read])).failures == []
    refused = seen("write", 1.0, None, status="unavailable", client="c1")
    assert judge(history.latest([*begun, refused, read])).failures


# -- how long nothing went on -----------------------------------------------------------------

ALL = frozenset(range(5))
CALM = State(0.0, ALL, frozenset(), (ALL,))


def test_a_majority_lives_where_one_node_reaches_it_both_ways() -> None:
    assert CALM.majority()
    assert changed(CALM, up=frozenset({0, 1, 2})).majority()
    assert not changed(CALM, up=frozenset({0, 1})).majority()
    one_way = frozenset((node, 4) for node in range(4)) | {(0, 1), (1, 2), (2, 3), (3, 0)}
    assert not changed(CALM, cuts=one_way | {(0, 2), (1, 3)}).majority()
    assert changed(CALM, cuts=frozenset({(0, 1)})).majority()


def test_while_voters_change_both_sets_count() -> None:
    both = (frozenset({0, 1, 2}), frozenset({2, 3, 4}))
    assert not changed(CALM, up=frozenset({0, 1, 2}), voters=both).majority()
    assert changed(CALM, up=frozenset({1, 2, 3}), voters=both).majority()


def test_only_time_in_which_a_majority_lived_counts_as_stalled() -> None:
    down = changed(CALM, at_ms=1000.0, up=frozenset({0}))
    back = changed(CALM, at_ms=9000.0)
    done = [seen("read", at_ms - 1.0, None) for at_ms in (100.0, 300.0, 9700.0, 9800.0)]
    assert stalled_ms([CALM, down, back], done, 10_000.0) == (700.0, 300.0)
    assert stalled_ms([CALM], done, 10_000.0) == (9400.0, 300.0)
    assert stalled_ms([down], done, 10_000.0) == (0.0, 0.0)
