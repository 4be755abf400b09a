"""Every index adds one to a counter that the whole cluster agrees on.

    python examples/counter.py           prints 1000 indices, 1000 in the counter

`manifold.globals` is the same in a kernel, wherever it runs, as in this program. An index that is
run again, because its node died, does not count again: each of its writes takes place once.
"""

from __future__ import annotations

import manifold

INDICES = 1000


@manifold.kernel
def count(index: int) -> int:
    manifold.globals.counter += 1
    return index


def main() -> None:
    with manifold.connect(up=4) as m:
        m.globals["counter"] = 0
        indices = m.parallel_for(count, 0, INDICES, reduce="count")
        print(f"{indices} indices, {m.globals['counter']} in the counter")


if __name__ == "__main__":
    main()
