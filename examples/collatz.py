"""How many steps the Collatz sequences of 1 to 10^6 take, in all.

    python examples/collatz.py           prints 131434424 steps, and how long it took
    python examples/collatz.py 27        prints 111, the steps of one number, without a cluster

The same function runs three ways: as plain Python, compiled in this process, and on every node of
the cluster that runs (`manifold up`), or of one that is started for this program.
"""

from __future__ import annotations

import sys
import time

import manifold

HIGHEST = 1_000_000


@manifold.kernel
def collatz_steps(n: int) -> int:
    steps = 0
    while n != 1:
        n = n // 2 if n % 2 == 0 else 3 * n + 1
        steps += 1
    return steps


def main() -> None:
    if len(sys.argv) > 1:
        n = int(sys.argv[1])
        assert collatz_steps(n) == collatz_steps.compiled(n)
        print(collatz_steps.compiled(n))
        return
    with manifold.connect(up=4) as m:
        began = time.perf_counter()
        total = m.parallel_for(collatz_steps, 1, HIGHEST + 1, reduce="sum")
        print(f"{total} steps in {time.perf_counter() - began:.2f} s")


if __name__ == "__main__":
    main()
