"""Jobs on real processes: exact whatever is killed, stopped or cut on the way."""

from __future__ import annotations

import functools
import operator
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from manifold.kernel.errors import Exhausted, InvalidProgram, Refused, Trap, Unavailable
from manifold.kernel.geode.messages import Demand
from manifold.kernel.scheduler import blocks
from manifold.shells.sdk import Client, Future
from manifold.tools.emulator.testing import TestCluster

Start = Callable[..., TestCluster]
EXAMPLES = Path(__file__).parents[2] / "examples"
COLLATZ = EXAMPLES / "collatz.ent"

# Emits its index after a pause: a job of it takes a known time without taking the processor.
SLOW = """
.cells 1
    SLEEP 0.004
    LOAD 0
    EMIT
    HALT
"""
# A float whose sum depends on the order of additions.
FLOATS = """
.cells 1
    PUSH 1.0
    LOAD 0
    PUSH 0.1
    ADD
    FDIV
    EMIT
    HALT
"""


def at_progress(share: float, act: Callable[[], None]) -> Callable[[Future], None]:
    """A progress callback that acts once, when the job has got so far."""
    done = []

    def progress(future: Future) -> None:
        now = future.progress()
        if now is not None and not done and now.done >= share * now.total:
            done.append(True)
            act()

    return progress


def run_slow(client: Client, hi: int, progress: Callable[[Future], None]) -> tuple[int, Future]:
    future = client.job(SLOW, 0, hi, reduce="sum")
    return client.wait(future, progress), future


def test_two_nodes_sum_a_million_collatz_lengths(manifold_clusters: Start) -> None:
    client = manifold_clusters(2).client()
    assert client.parallel_for(COLLATZ, 1, 1_000_000, reduce="sum") == 131434272


def test_every_reduction_gives_what_python_gives(manifold_clusters: Start) -> None:
    client = manifold_clusters(3).client()
    values = [index * index - 7 * index for index in range(-50, 700)]
    program = ".cells 1\nLOAD 0\nLOAD 0\nMUL\nLOAD 0\nPUSH 7\nMUL\nSUB\nEMIT\nHALT\n"
    expected = {
        "sum": sum(values), "min": min(values), "max": max(values), "count": len(values),
        "collect": values,
    }  # fmt: skip
    for how, value in expected.items():
        assert client.parallel_for(program, -50, 700, reduce=how) == value, how  # type: ignore[arg-type]


def test_an_empty_range_reduces_to_nothing(manifold_clusters: Start) -> None:
    client = manifold_clusters(1).client()
    assert client.parallel_for(COLLATZ, 5, 5, reduce="sum") == 0
    assert client.parallel_for(COLLATZ, 5, 5, reduce="collect") == []


def test_a_collection_of_a_million_comes_back_whole_and_in_order(manifold_clusters: Start) -> None:
    client = manifold_clusters(2).client()
    program = ".cells 1\nLOAD 0\nPUSH 3\nMUL\nEMIT\nHALT\n"
    assert client.parallel_for(program, 0, 1_000_000) == list(range(0, 3_000_000, 3))


def test_arguments_reach_the_cells_after_the_index(manifold_clusters: Start) -> None:
    client = manifold_clusters(1).client()
    program = ".cells 3\n.arguments i64 f64\nLOAD 0\nLOAD 1\nMUL\nLOAD 2\nADD\nEMIT\nHALT\n"
    assert client.parallel_for(program, 0, 4, arguments=(10, 0.5)) == [0.5, 10.5, 20.5, 30.5]


def test_tasks_submitted_one_by_one_have_each_their_own_result(manifold_clusters: Start) -> None:
    client = manifold_clusters(2).client()
    futures = [client.submit(COLLATZ, n) for n in (27, 1, 97, 871)]
    assert [future.result(20) for future in futures] == [111, 0, 118, 178]


def test_a_task_that_traps_fails_alone(manifold_clusters: Start) -> None:
    client = manifold_clusters(2).client()
    program = ".cells 1\nPUSH 100\nLOAD 0\nDIV\nEMIT\nHALT\n"
    futures = [client.submit(program, n) for n in (5, 0, 4)]
    assert futures[0].result(20) == 20
    assert futures[2].result(20) == 25
    with pytest.raises(Trap, match="index 0"):
        futures[1].result(20)


def test_a_node_killed_in_the_middle_changes_nothing(manifold_clusters: Start) -> None:
    cluster = manifold_clusters(4)
    client = cluster.client(cluster.aliases[0])
    victim = cluster.aliases[-1]
    result, future = run_slow(client, 2000, at_progress(0.2, lambda: cluster.kill(victim)))
    assert result == sum(range(2000))
    assert future.status is not None
    assert future.status.retries >= 1


def test_a_node_stopped_and_continued_changes_nothing(manifold_clusters: Start) -> None:
    cluster = manifold_clusters(4)
    client = cluster.client(cluster.aliases[0])
    victim = cluster.aliases[-1]
    stopped = []

    def stop() -> None:
        cluster.pause(victim)
        stopped.append(time.monotonic())

    def progress(future: Future) -> None:
        pause(future)
        if stopped and time.monotonic() - stopped[0] > 3:
            stopped[:] = [float("inf")]
            cluster.resume(victim)

    pause = at_progress(0.2, stop)
    result, _ = run_slow(client, 4000, progress)
    assert result == sum(range(4000))


def test_a_stopped_node_stalls_its_shards_for_little_more_than_two_seconds(
    manifold_clusters: Start,
) -> None:
    cluster = manifold_clusters(4)
    client = cluster.client(cluster.aliases[0])
    began = time.monotonic()
    run_slow(client, 1000, at_progress(1.0, lambda: None))
    quiet_s = time.monotonic() - began
    began = time.monotonic()
    result, _ = run_slow(
        client, 1000, at_progress(0.05, lambda: cluster.pause(cluster.aliases[-1]))
    )
    assert result == sum(range(1000))
    # 2 s of silence, and what was owed done again by the others; twice as long on a busy machine.
    assert time.monotonic() - began < 2 * (quiet_s + 3.5)


def test_five_of_sixteen_nodes_killed_at_random_moments_change_nothing(
    manifold_clusters: Start,
) -> None:
    cluster = manifold_clusters(16)
    client = cluster.client("server-01")
    order = random.Random(5)
    victims = order.sample([a for a in cluster.aliases if a != "server-01"], 5)
    moments = sorted(order.uniform(0.02, 0.8) for _ in victims)
    acts = [
        at_progress(moment, lambda alias=victim: cluster.kill(alias))  # type: ignore[misc]
        for moment, victim in zip(moments, victims, strict=True)
    ]
    result, _ = run_slow(client, 5000, lambda future: [act(future) for act in acts] and None)
    assert result == sum(range(5000))


def test_when_the_owner_is_killed_the_client_gets_the_result_from_another(
    manifold_clusters: Start,
) -> None:
    cluster = manifold_clusters(3)
    owner = cluster.aliases[0]
    client = cluster.client(owner)
    result, future = run_slow(client, 1000, at_progress(0.2, lambda: cluster.kill(owner)))
    assert result == sum(range(1000))
    assert future.status is not None


def test_a_worker_that_is_killed_is_replaced(manifold_clusters: Start) -> None:
    cluster = manifold_clusters(1)
    client = cluster.client()

    def kill() -> None:
        (node,) = client.nodes()
        os.kill(node.workers[0], signal.SIGKILL)

    result, future = run_slow(client, 500, at_progress(0.2, kill))
    assert result == sum(range(500))
    assert future.status is not None
    assert future.status.retries == 1


def by_definition(count: int) -> float:
    """The sum of FLOATS as documented: in order within a block, then by a tree of eights."""
    size = -(-count // blocks.BLOCKS_MAX)
    level = []
    for low in range(0, count, size):
        total = 0.0
        for index in range(low, min(low + size, count)):
            total += 1.0 / (index + 0.1)
        level.append(total)
    while len(level) > 1:
        groups = [level[at : at + 8] for at in range(0, len(level), 8)]
        level = [functools.reduce(operator.add, group) for group in groups]
    return level[0]


@pytest.mark.parametrize("nodes", [1, 3, 16])
def test_a_float_sum_has_the_same_bits_however_it_is_spread(
    manifold_clusters: Start, nodes: int
) -> None:
    client = manifold_clusters(nodes).client()
    assert (
        client.parallel_for(FLOATS, 0, 200_000, reduce="sum").hex() == by_definition(200_000).hex()
    )


def test_a_float_sum_has_the_same_bits_when_nodes_are_killed(manifold_clusters: Start) -> None:
    cluster = manifold_clusters(3)
    slow = FLOATS.replace("PUSH 1.0", "SLEEP 0.002\nPUSH 1.0")
    client = cluster.client(cluster.aliases[0])
    quiet = client.parallel_for(slow, 0, 1500, reduce="sum")
    future = client.job(slow, 0, 1500, reduce="sum")
    kill = at_progress(0.3, lambda: cluster.kill(cluster.aliases[-1]))
    assert client.wait(future, kill).hex() == quiet.hex()


def test_a_trap_says_where_and_the_node_lives(manifold_clusters: Start) -> None:
    client = manifold_clusters(2).client()
    program = ".cells 2\nPUSH 100\nLOAD 0\nPUSH 50\nSUB\nDIV\nEMIT\nHALT\n"
    with pytest.raises(Trap, match="index 50") as caught:
        client.parallel_for(program, 0, 100)
    assert caught.value.line == 6
    assert "DIV" in caught.value.instruction
    assert caught.value.cells[0] == 50
    assert client.parallel_for(COLLATZ, 1, 10, reduce="max") == 19


def test_a_program_that_never_ends_is_killed_within_a_second(manifold_clusters: Start) -> None:
    client = manifold_clusters(2).client()
    future = client.job(EXAMPLES / "forever.ent", 0, 4)
    while future.status is None:
        client.nodes()
    began = time.monotonic()
    assert client.kill(future.job).state == "cancelled"
    while any(process.job == future.job for process in client.processes().processes):
        assert time.monotonic() - began < 5
    assert future.cancelled() or future.exception(5)
    assert client.parallel_for(COLLATZ, 1, 10, reduce="max") == 19


def test_a_program_that_never_ends_runs_into_its_timeout(manifold_clusters: Start) -> None:
    client = manifold_clusters(2).client()
    began = time.monotonic()
    with pytest.raises(Exhausted, match="timeout"):
        client.parallel_for(EXAMPLES / "forever.ent", 0, 4, timeout_s=0.5)
    assert time.monotonic() - began < 5
    assert client.parallel_for(COLLATZ, 1, 10, reduce="max") == 19


def test_a_short_job_is_not_held_up_by_one_that_never_ends(manifold_clusters: Start) -> None:
    client = manifold_clusters(1).client()
    endless = client.job(".cells 1\nSLEEP 0.01\nLOAD 0\nEMIT\nHALT\n", 0, 100_000)
    while endless.status is None:
        client.nodes()
    assert client.parallel_for(COLLATZ, 1, 10, reduce="max") == 19
    assert endless.cancel()


def test_work_goes_only_where_its_constraints_allow(manifold_clusters: Start) -> None:
    client = manifold_clusters(16).client()
    future = client.job(SLOW, 0, 200, reduce="sum", demand=Demand(node_class="rpi5"))
    assert client.wait(future) == sum(range(200))
    winners = {
        candidate.node_class
        for decision in client.why(future.job)
        for candidate in decision.candidates
    }
    assert winners == {"rpi5"}


def test_a_job_no_node_may_run_is_refused_with_the_reasons(manifold_clusters: Start) -> None:
    client = manifold_clusters(2).client()
    with pytest.raises(Unavailable, match="No node may run this job"):
        client.wait(client.job(SLOW, 0, 10, demand=Demand(node="nowhere-01")))


def test_what_is_wrong_with_a_program_is_said_before_it_leaves(manifold_clusters: Start) -> None:
    client = manifold_clusters(1).client()
    with pytest.raises(InvalidProgram, match="line 2"):
        client.parallel_for(".cells 1\nPOP\nHALT\n", 0, 10)
    with pytest.raises(Refused, match="ends before it starts"):
        client.parallel_for(COLLATZ, 10, 5)


def test_a_job_submitted_twice_under_one_id_runs_once(manifold_clusters: Start) -> None:
    client = manifold_clusters(1).client()
    first = client.job(SLOW, 0, 50, reduce="sum")
    second = client.job(SLOW, 0, 50, reduce="sum", job=first.job)
    assert second.result(20) == sum(range(50))
    assert [job.job for job in client.jobs().jobs] == [first.job]
