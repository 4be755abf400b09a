"""5 000 no-op tasks, each with its own future and result, against Pool, Dask and Ray.

Ours: `client.submit` 5 000 times on a cluster of two nodes of a core each, then every result;
theirs: the same number of no-op calls on two workers. The round trip is one task, submitted and
awaited, some hundred times.
"""

from __future__ import annotations

import time

from manifold.shells.sdk import Client
from manifold.shells.sdk.programs import program_of
from manifold.tools.bench import peers
from manifold.tools.bench.harness import Absent, Figure, percentile
from manifold.tools.bench.scratch import uniform

NOOP = ".cells 1\nLOAD 0\nEMIT\nHALT\n"
TASKS = 5_000


def rate(client: Client, tasks: int) -> float:
    """Tasks a second: submitted one by one, every result looked at."""
    program = program_of(NOOP)
    began = time.perf_counter()
    futures = [client.submit(program, index) for index in range(tasks)]
    results = [future.result(60) for future in futures]
    seconds = time.perf_counter() - began
    assert results == list(range(tasks))
    return tasks / seconds


def round_trip_ms(client: Client, trips: int) -> float:
    """The median of one task's way there and back."""
    program = program_of(NOOP)
    samples = []
    for index in range(trips):
        began = time.perf_counter()
        assert client.submit(program, index).result(60) == index
        samples.append((time.perf_counter() - began) * 1000)
    return percentile(samples, 50)


def run(quick: bool = False) -> list[Figure]:
    """Rates and round trips as ratios to each peer's, in one run."""
    trips = 100 if quick else 300
    with uniform(2) as cluster:
        client = cluster.client()
        rate(client, 200)  # everybody's workers are warm before they are measured
        ours = sorted(rate(client, TASKS) for _ in range(3))[1]
        ours_ms = round_trip_ms(client, trips)
    figures = []
    goals: dict[str, tuple[float | None, float | None]] = {
        "pool": (None, None), "dask": (None, None), "ray": (10.0, 0.5)
    }  # fmt: skip
    for name, (rate_goal, trip_goal) in goals.items():
        try:
            peer = peers.noop(name, tasks=TASKS, trips=trips)
        except Absent as reason:
            if name == "ray":
                raise
            figures.append(Figure(f"{name} is absent", float("nan"), None, "lower", "",
                                  note=str(reason)))  # fmt: skip
            continue
        figures += [
            Figure(
                f"tasks a second / {name}", ours / peer.tasks_per_s, rate_goal, "higher", "x",
                {"manifold /s": ours, f"{name} /s": peer.tasks_per_s},
            ),
            Figure(
                f"round trip / {name}", ours_ms / peer.round_trip_p50_ms, trip_goal, "lower", "x",
                {"manifold ms": ours_ms, f"{name} ms": peer.round_trip_p50_ms},
            ),
        ]  # fmt: skip
    return figures
