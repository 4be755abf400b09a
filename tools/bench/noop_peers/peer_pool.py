"""No-op tasks through multiprocessing.Pool. Arguments: as the package says."""

import json
import multiprocessing
import platform
import statistics
import sys
import time


def noop(value: int) -> int:
    return value


def main() -> None:
    tasks, trips, workers, batched, chunk = map(int, sys.argv[1:6])
    begin = time.perf_counter()
    with multiprocessing.get_context("forkserver").Pool(workers) as pool:
        pool.apply(noop, (0,))
        boot_s = time.perf_counter() - begin
        # One task per message, as the others do it: chunks would measure the list, not the pool.
        begin = time.perf_counter()
        assert sum(pool.imap(noop, range(tasks), chunksize=1)) == tasks * (tasks - 1) // 2
        tasks_s = time.perf_counter() - begin
        times = []
        for number in range(trips):
            begin = time.perf_counter()
            pool.apply(noop, (number,))
            times.append(time.perf_counter() - begin)
        rates = []
        for _ in range(3):
            begin = time.perf_counter()
            assert len(pool.map(noop, range(batched), chunksize=chunk)) == batched
            rates.append(batched / (time.perf_counter() - begin))
    print(
        json.dumps(
            {
                "boot_s": boot_s,
                "tasks_per_s": tasks / tasks_s,
                "round_trip_p50_ms": statistics.median(times) * 1000,
                "batched_per_s": statistics.median(rates),
                "version": platform.python_version(),
            }
        )
    )


if __name__ == "__main__":
    main()
