"""Pi by the Monte Carlo method: how many of 10^7 points in a square fall into the quarter circle.

    python examples/pi.py                prints 3.141026, on any machines

Each index throws 1000 points. The random numbers are a generator that starts from the index, so the
result is the same however the indices are spread over machines.
"""

from __future__ import annotations

import manifold

INDICES = 10_000
THROWS = 1000
MASK = (1 << 63) - 1  # below a mask nothing overflows: only the low 63 bits count


@manifold.kernel
def scramble(state: int) -> int:
    """The next state of the generator: a multiplication and a xorshift."""
    state = (state * 6364136223846793005 + 1442695040888963407) & MASK
    return state ^ (state >> 29)


@manifold.kernel
def hits(index: int) -> int:
    state = scramble(scramble(index))
    found = 0
    for _ in range(THROWS):
        state = scramble(state)
        x = (state >> 10) / 9007199254740992.0  # 53 random bits as a number from 0 to 1
        state = scramble(state)
        y = (state >> 10) / 9007199254740992.0
        if x * x + y * y < 1.0:
            found += 1
    return found


def main() -> None:
    with manifold.connect(up=4) as m:
        total = m.parallel_for(hits, 0, INDICES, reduce="sum")
    print(4 * total / (INDICES * THROWS))


if __name__ == "__main__":
    main()
