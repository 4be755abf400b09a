"""No-op tasks through Ray. Arguments: as the package says."""

import json
import statistics
import sys
import time


def noop(value: int) -> int:
    return value


def noops(values: range) -> list[int]:
    """A batch, as Ray's documentation has its users write it."""
    return [noop(value) for value in values]


def main() -> None:
    tasks, trips, workers, batched, chunk = map(int, sys.argv[1:6])
    begin = time.perf_counter()
    import ray

    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        remote = ray.remote(noop)
        ray.get(remote.remote(-1))
        boot_s = time.perf_counter() - begin
        begin = time.perf_counter()
        assert sum(ray.get([remote.remote(i) for i in range(tasks)])) == tasks * (tasks - 1) // 2
        tasks_s = time.perf_counter() - begin
        times = []
        for number in range(trips):
            begin = time.perf_counter()
            ray.get(remote.remote(number))
            times.append(time.perf_counter() - begin)
        batch = ray.remote(noops)
        chunks = [range(at, min(at + chunk, batched)) for at in range(0, batched, chunk)]
        rates = []
        for _ in range(3):
            begin = time.perf_counter()
            assert sum(map(len, ray.get([batch.remote(each) for each in chunks]))) == batched
            rates.append(batched / (time.perf_counter() - begin))
    finally:
        ray.shutdown()
    print(
        json.dumps(
            {
                "boot_s": boot_s,
                "tasks_per_s": tasks / tasks_s,
                "round_trip_p50_ms": statistics.median(times) * 1000,
                "batched_per_s": statistics.median(rates),
                "version": ray.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
