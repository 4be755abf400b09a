"""No-op tasks through Ray with two processors. Arguments: tasks, round trips."""

import json
import statistics
import sys
import time


def noop(value: int) -> int:
    return value


def main() -> None:
    tasks, trips = int(sys.argv[1]), int(sys.argv[2])
    begin = time.perf_counter()
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
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
    finally:
        ray.shutdown()
    print(
        json.dumps(
            {
                "boot_s": boot_s,
                "tasks_per_s": tasks / tasks_s,
                "round_trip_p50_ms": statistics.median(times) * 1000,
                "version": ray.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
