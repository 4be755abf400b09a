"""No-op tasks through Dask distributed, two worker processes. Arguments: tasks, round trips."""

import json
import statistics
import sys
import time


def noop(value: int) -> int:
    return value


def main() -> None:
    tasks, trips = int(sys.argv[1]), int(sys.argv[2])
    begin = time.perf_counter()
    import distributed

    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        client.wait_for_workers(2)
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
    print(
        json.dumps(
            {
                "boot_s": boot_s,
                "tasks_per_s": tasks / tasks_s,
                "round_trip_p50_ms": statistics.median(times) * 1000,
                "version": distributed.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
