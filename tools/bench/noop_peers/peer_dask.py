"""No-op tasks through Dask distributed, in processes. Arguments: as the package says."""

import json
import statistics
import sys
import time


def noop(value: int) -> int:
    return value


def noops(values: range) -> list[int]:
    """A batch: Dask has none of its own for functions, so its users write a loop."""
    return [noop(value) for value in values]


def main() -> None:
    tasks, trips, workers, batched, chunk = map(int, sys.argv[1:6])
    begin = time.perf_counter()
    import distributed

    with (
        distributed.LocalCluster(
            n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        client.wait_for_workers(workers)
        client.submit(noop, -1, pure=False).result()
        boot_s = time.perf_counter() - begin
        begin = time.perf_counter()
        futures = client.map(noop, range(tasks), pure=False)
        assert sum(client.gather(futures)) == tasks * (tasks - 1) // 2
        tasks_s = time.perf_counter() - begin
        del futures
        times = []
        for number in range(trips):
            begin = time.perf_counter()
            client.submit(noop, number, pure=False).result()
            times.append(time.perf_counter() - begin)
        rates = []
        for _ in range(3):
            begin = time.perf_counter()
            chunks = [range(at, min(at + chunk, batched)) for at in range(0, batched, chunk)]
            assert sum(map(len, client.gather(client.map(noops, chunks, pure=False)))) == batched
            rates.append(batched / (time.perf_counter() - begin))
    print(
        json.dumps(
            {
                "boot_s": boot_s,
                "tasks_per_s": tasks / tasks_s,
                "round_trip_p50_ms": statistics.median(times) * 1000,
                "batched_per_s": statistics.median(rates),
                "version": distributed.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
