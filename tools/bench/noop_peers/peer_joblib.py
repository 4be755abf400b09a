"""No-op tasks through joblib and its loky. Arguments: as the package says."""

import json
import statistics
import sys
import time


def noop(value: int) -> int:
    return value


def main() -> None:
    tasks, trips, workers, batched, chunk = map(int, sys.argv[1:6])
    begin = time.perf_counter()
    import joblib
    from joblib.externals.loky import get_reusable_executor

    executor = get_reusable_executor(max_workers=workers)
    executor.submit(noop, 0).result()
    boot_s = time.perf_counter() - begin
    begin = time.perf_counter()
    futures = [executor.submit(noop, value) for value in range(tasks)]
    assert sum(future.result() for future in futures) == tasks * (tasks - 1) // 2
    tasks_s = time.perf_counter() - begin
    times = []
    for number in range(trips):
        begin = time.perf_counter()
        executor.submit(noop, number).result()
        times.append(time.perf_counter() - begin)
    executor.shutdown(wait=True)  # Parallel has one of its own kind
    parallel = joblib.Parallel(n_jobs=workers, batch_size=chunk, pre_dispatch="all")
    parallel(joblib.delayed(noop)(value) for value in range(workers))  # its own workers are warm
    rates = []
    for _ in range(3):
        begin = time.perf_counter()
        assert len(parallel(joblib.delayed(noop)(value) for value in range(batched))) == batched
        rates.append(batched / (time.perf_counter() - begin))
    print(
        json.dumps(
            {
                "boot_s": boot_s,
                "tasks_per_s": tasks / tasks_s,
                "round_trip_p50_ms": statistics.median(times) * 1000,
                "batched_per_s": statistics.median(rates),
                "version": joblib.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
