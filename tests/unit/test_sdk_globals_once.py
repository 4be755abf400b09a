"""What a client sends again, and how, when the node it asked is gone: each change takes place once.

The register is the real one (`values.change`); the nodes are scripted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, cast

import pytest

from manifold.kernel.errors import Busy, ManifoldError, Maybe, NoCluster, Refused, Unavailable
from manifold.kernel.nexus.ballots import Ballot
from manifold.kernel.nexus.messages import Answer, Operate
from manifold.kernel.nexus.values import Add, Get, Put, Value, Wanted, change
from manifold.shells.sdk.connection import Connection
from manifold.shells.sdk.registers import Registers, Seen, _Watched
from manifold.shells.sdk.sessions import Fate

BALLOT = Ballot(1, "", 0, 0)
KEY = "globals/x"
T = TypeVar("T")
Step = Callable[["Cluster", Operate], Answer | Fate]


class Cluster:
    """One register, and what each transmission meets; the last step stays."""

    def __init__(self, *steps: Step) -> None:
        self.value = Value(0, 0, None)
        self.sent: list[Operate] = []
        self.steps = list(steps)
        self.skipped_s = 0.0  # of the time that clients know

    def apply(self, message: Operate) -> Answer:
        """As a node does (`Nexus._operate`)."""
        base = None if message.base < 0 and not message.retry else message.base
        wanted = Wanted(message.op, message.change, base)
        self.value, (result,) = change(self.value, [wanted], BALLOT)
        strength = "none" if result.status == "maybe" else "quorum"
        return Answer(
            result.status, result.version, result.data, stamp=result.stamp,
            strength=strength,  # type: ignore[arg-type]
        )  # fmt: skip

    def others_add(self, count: int) -> None:
        for number in range(count):
            self.apply(Operate(f"C-other.{self.value.version}.{number}", KEY, Add(1)))

    # As a Session and as Sessions.

    async def current(self, _deadline_s: float) -> Cluster:
        return self

    async def exchange(self, message: Operate, _timeout_s: float, *, patient: bool) -> Any:
        assert patient != isinstance(message.change, Get)
        self.sent.append(message)
        step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        return step(self, message)


def answers(cluster: Cluster, message: Operate) -> Answer:
    return cluster.apply(message)


def dies(cluster: Cluster, message: Operate) -> Fate:
    return Fate.DEAD


def dies_after(cluster: Cluster, message: Operate) -> Fate:
    cluster.apply(message)
    return Fate.DEAD


def says(status: str, **more: Any) -> Step:
    return lambda _cluster, _message: Answer(cast(Any, status), strength="none", **more)


class Clock:
    """An event loop on which time can be skipped."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.create_task = asyncio.get_running_loop().create_task

    def time(self) -> float:
        return asyncio.get_running_loop().time() + self.cluster.skipped_s


class Line:
    """A connection that only has a loop and a name."""

    identity = "C-0123456789abcdef"

    def __init__(self, cluster: Cluster) -> None:
        self.on_leave: list[Any] = []
        self.loop = Clock(cluster)

    async def request(self, *_: object) -> object:
        raise Unavailable("there is no node to ask")


def run(cluster: Cluster, work: Callable[[Registers], Coroutine[Any, Any, T]]) -> T:
    async def go() -> T:
        registers = Registers(cast(Connection, Line(cluster)))
        registers._sessions = cast(Any, cluster)
        return await work(registers)

    return asyncio.run(go())


def add(cluster: Cluster, timeout_s: float = 5.0) -> Answer:
    return run(cluster, lambda registers: registers.operate(KEY, Add(1), timeout_s))


def test_it_is_first_sent_as_nobody_elses() -> None:
    cluster = Cluster(answers)
    assert add(cluster).data == 1
    assert [(m.retry, m.base) for m in cluster.sent] == [(False, -1)]


@pytest.mark.parametrize("death", [dies, dies_after])
def test_a_node_that_dies_before_or_after_it_applied_has_it_applied_once(death: Step) -> None:
    cluster = Cluster(death, answers)
    assert add(cluster).data == 1
    first, second = cluster.sent
    assert first.op == second.op
    assert (second.retry, second.base) == (True, 0)
    assert cluster.value.data == 1


@pytest.mark.parametrize("death", [dies, dies_after])
def test_the_base_is_the_stamp_that_was_known_before_it_was_first_sent(death: Step) -> None:
    cluster = Cluster(answers, death, answers)
    cluster.others_add(100)

    async def twice(registers: Registers) -> None:
        await registers.operate(KEY, Add(1))
        cluster.others_add(3)  # what they add meanwhile must not move the base
        await registers.operate(KEY, Add(1))

    run(cluster, twice)
    assert cluster.sent[2].base == 101
    assert cluster.value.data == 105


def test_where_the_ring_has_moved_on_the_fate_is_unknown() -> None:
    def dies_and_others_go_on(cluster: Cluster, message: Operate) -> Fate:
        cluster.apply(message)
        cluster.others_add(100)
        return Fate.DEAD

    cluster = Cluster(dies_and_others_go_on, answers)
    with pytest.raises(Maybe, match="may or may not have been applied"):
        add(cluster)
    assert cluster.value.data == 101


@pytest.mark.parametrize("fate", [Fate.REPLACED, Fate.SILENT])
def test_what_a_living_process_may_have_is_only_looked_up(fate: Fate) -> None:
    cluster = Cluster(lambda _cluster, _message: fate, answers)
    with pytest.raises(Maybe):
        add(cluster, timeout_s=0.2)
    assert {(m.retry, m.base) for m in cluster.sent[1:]} == {(True, -1)}
    assert cluster.value.data is None


@pytest.mark.parametrize("fate", [Fate.REPLACED, Fate.SILENT])
def test_what_a_living_process_has_done_is_found(fate: Fate) -> None:
    def does_it(cluster: Cluster, message: Operate) -> Fate:
        cluster.apply(message)
        return fate

    cluster = Cluster(does_it, dies, answers)  # a death later does not make it anybody's again
    assert add(cluster).data == 1
    assert cluster.sent[2].base == -1


def silent_until_the_deadline(cluster: Cluster, message: Operate) -> Fate:
    cluster.apply(message)
    cluster.skipped_s += message.timeout_ms / 1000 + 0.1
    return Fate.SILENT


def test_a_node_that_is_silent_until_the_deadline_is_looked_for_once_more() -> None:
    assert add(Cluster(silent_until_the_deadline, answers)).data == 1
    cluster = Cluster(silent_until_the_deadline)
    with pytest.raises(Maybe):
        add(cluster)
    assert len(cluster.sent) == 2


def test_a_read_is_read_again_by_anybody() -> None:
    cluster = Cluster(dies, lambda *_: Fate.SILENT, answers)
    assert run(cluster, lambda r: r.operate(KEY, Get())).data is None
    assert {(m.retry, m.base) for m in cluster.sent} == {(False, -1)}


def test_what_was_not_sent_is_not_a_copy() -> None:
    cluster = Cluster(lambda *_: Fate.UNSENT, answers)
    add(cluster)
    assert not cluster.sent[1].retry


def test_busy_nodes_are_asked_again() -> None:
    assert add(Cluster(says("busy"), says("busy"), answers)).data == 1
    with pytest.raises(Busy, match="Come again"):
        add(Cluster(says("busy")), timeout_s=0.1)


def test_unavailable_names_who_is_missing() -> None:
    kid = "K-" + "ab" * 16
    with pytest.raises(Unavailable, match=r"/globals/x was not changed: .*K-abababab") as caught:
        add(Cluster(says("unavailable", missing=(kid,))))
    assert caught.value.exit_code == 1
    assert caught.value.missing == ("K-abababab",)  # type: ignore[attr-defined]
    with pytest.raises(Unavailable, match="no voters are known"):
        add(Cluster(says("unavailable")))


def test_unavailable_is_not_told_of_what_somebody_may_have() -> None:
    with pytest.raises(Maybe):
        add(Cluster(dies_after, says("unavailable")))


def test_a_refusal_says_why() -> None:
    with pytest.raises(Refused, match="because"):
        add(Cluster(says("refused", why="because")))


def test_without_any_node_nothing_was_done_unless_it_was_sent() -> None:
    class Gone(Cluster):
        async def current(self, _deadline_s: float) -> Cluster:
            if self.sent or not self.steps:
                raise NoCluster("nobody answers")
            return self

    with pytest.raises(NoCluster):
        add(Gone())
    with pytest.raises(Maybe):
        add(Gone(dies))


def test_stamps_that_are_told_out_of_order_do_not_go_back() -> None:
    registers = run(Cluster(answers), _returned)
    registers._learn(KEY, 7)
    registers._learn(KEY, 5)
    assert registers._bases[KEY] == 7


async def _returned(registers: Registers) -> Registers:
    return registers


def test_a_watcher_hears_versions_grow_and_absence_once() -> None:
    heard: list[Seen | ManifoldError] = []

    async def watch(registers: Registers) -> None:
        watched = _Watched(KEY)
        watched.tells.append(heard.append)
        for version, data in [(1, 5), (1, 5), (3, 6), (2, 4), (4, None), (640, None), (641, 7)]:
            watched.saw(Seen(version, data))

    run(Cluster(answers), watch)
    assert [(s.version, s.data) for s in heard if isinstance(s, Seen)] == [
        (1, 5), (3, 6), (4, None), (641, 7),
    ]  # fmt: skip


def test_a_value_that_is_put_again_by_a_late_copy_does_not_undo_what_came_after() -> None:
    late: list[Operate] = []

    def dies_with_a_copy_in_the_network(cluster: Cluster, message: Operate) -> Fate:
        late.append(message)
        return Fate.DEAD

    cluster = Cluster(dies_with_a_copy_in_the_network, answers)
    run(cluster, lambda r: r.operate(KEY, Put(1)))
    cluster.apply(Operate("C-other.1", KEY, Put(2)))
    cluster.apply(late[0])
    assert cluster.value.data == 2
