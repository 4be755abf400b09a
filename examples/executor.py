"""The primes below two million, counted by functions on a cluster: ProcessPoolExecutor's own way.

    python examples/executor.py          prints 148933 primes, the largest is 1999993

It starts four nodes of its own and takes them down; where `manifold up` runs it uses those. With
`from concurrent.futures import ProcessPoolExecutor as Executor`, and without `up=4`, the same
program runs in processes of this machine alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt

from manifold import Executor

BELOW = 2_000_000
BLOCK = 100_000


def primes(lo: int, hi: int) -> Iterator[int]:
    """Those in `[lo, hi)`, by the sieve of Eratosthenes."""
    sieve = bytearray([1]) * (hi - lo)
    for n in range(2, isqrt(hi - 1) + 1):
        for multiple in range(max(n * n, -(-lo // n) * n), hi, n):
            sieve[multiple - lo] = 0
    return (lo + at for at, prime in enumerate(sieve) if prime and lo + at > 1)


def count(lo: int) -> int:
    return sum(1 for _ in primes(lo, lo + BLOCK))


def largest(hi: int) -> int:
    return max(primes(hi - BLOCK, hi))


def main() -> None:
    with Executor(up=4) as executor:
        last = executor.submit(largest, BELOW)
        found = sum(executor.map(count, range(0, BELOW, BLOCK)))
        print(f"{found} primes, the largest is {last.result()}")


if __name__ == "__main__":
    main()
