"""Ordinary Python functions that do nothing: Manifold against Pool, joblib/loky, Dask and Ray.

As many workers on each side as this machine has cores (ours: nodes of one core each). Three things:
5 000 calls submitted one by one and then all waited for; one call submitted and awaited, some
hundred times; 100 000 calls by `map` in batches of 500, or what comes nearest to it. Ours is
measured before and after each peer, which is compared with the mean of the two.
"""

from __future__ import annotations

import os
import statistics
import time

import msgspec

from manifold.shells.sdk import Client
from manifold.tools.bench import peers
from manifold.tools.bench.harness import Absent, Figure, no_garbage_collection, percentile
from manifold.tools.bench.scratch import uniform

TASKS = 5_000
BATCHED, CHUNK = 100_000, 500
WORKERS_MAX = 16  # beyond it the client, which is one thread, is what is measured
RESULT_S = 60.0
# Of tasks a second, round trip, batched tasks a second, as ratios to the peer's.
GOALS: dict[str, tuple[float | None, float | None, float | None]] = {
    "pool": (None, None, 0.5),
    "joblib": (None, None, None),
    "dask": (1.0, 1.0, 1.0),
    "ray": (1.0, 1.0, 1.0),
}


class Ours(msgspec.Struct, frozen=True):
    """One measurement of Manifold."""

    tasks_per_s: float
    round_trip_p50_ms: float
    batched_per_s: float


def noop(value: int) -> int:
    return value


def one_by_one(client: Client, tasks: int) -> float:
    """Calls a second: each submitted with a future of its own, then every result looked at."""
    began = time.perf_counter()
    futures = [client.submit(noop, value) for value in range(tasks)]
    assert sum(future.result(RESULT_S) for future in futures) == tasks * (tasks - 1) // 2
    return tasks / (time.perf_counter() - began)


def round_trip_ms(client: Client, trips: int) -> float:
    """The median of one call's way there and back."""
    samples = []
    for value in range(trips):
        began = time.perf_counter()
        assert client.submit(noop, value).result(RESULT_S) == value
        samples.append((time.perf_counter() - began) * 1000)
    return percentile(samples, 50)


def in_batches(client: Client, tasks: int) -> float:
    """Calls a second by `map`."""
    began = time.perf_counter()
    assert len(client.map(noop, range(tasks), chunksize=CHUNK)) == tasks
    return tasks / (time.perf_counter() - began)


def ours(client: Client, trips: int) -> Ours:
    with no_garbage_collection():
        return Ours(
            one_by_one(client, TASKS),
            round_trip_ms(client, trips),
            statistics.median(in_batches(client, BATCHED) for _ in range(3)),  # as the peers do
        )


def run(quick: bool = False) -> list[Figure]:
    """Three ratios to each peer, in one run."""
    trips = 100 if quick else 300
    workers = min(len(os.sched_getaffinity(0)), WORKERS_MAX)
    figures: list[Figure] = []
    with uniform(workers) as cluster:
        client = cluster.client()
        ours(client, 50)  # everybody's workers are warm before they are measured
        before = ours(client, trips)
        for name in GOALS:
            try:
                peer = peers.noop(
                    name, tasks=TASKS, trips=trips, workers=workers, batched=BATCHED, chunk=CHUNK
                )
            except Absent as reason:
                figures.append(absent(name, reason))
                continue
            after = ours(client, trips)
            figures += compared(name, before, after, peer)
            before = after
    return figures


def absent(name: str, reason: Absent) -> Figure:
    """A peer that cannot be had: where there is a goal for it, that is missed, not met."""
    goal = 1.0 if any(GOALS[name]) else None
    return Figure(f"{name} is absent", float("nan"), goal, "higher", "x", note=str(reason))


def compared(name: str, before: Ours, after: Ours, peer: peers.Noop) -> list[Figure]:
    """The figures for one peer."""
    rate_goal, trip_goal, batched_goal = GOALS[name]
    tasks_per_s = (before.tasks_per_s + after.tasks_per_s) / 2
    trip_ms = (before.round_trip_p50_ms + after.round_trip_p50_ms) / 2
    batched_per_s = (before.batched_per_s + after.batched_per_s) / 2
    return [
        Figure(
            f"calls a second, one by one / {name}", tasks_per_s / peer.tasks_per_s, rate_goal,
            "higher", "x", {"manifold /s": tasks_per_s, f"{name} /s": peer.tasks_per_s},
            f"{name} {peer.version}",
        ),
        Figure(
            f"round trip / {name}", trip_ms / peer.round_trip_p50_ms, trip_goal, "lower", "x",
            {"manifold ms": trip_ms, f"{name} ms": peer.round_trip_p50_ms},
        ),
        Figure(
            f"calls a second, batches of {CHUNK} / {name}", batched_per_s / peer.batched_per_s,
            batched_goal, "higher", "x",
            {"manifold /s": batched_per_s, f"{name} /s": peer.batched_per_s},
        ),
    ]  # fmt: skip
