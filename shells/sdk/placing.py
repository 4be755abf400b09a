"""Where work may run: `where=` of the SDK and `--where` of the command line, as a demand has it.

Interface: a wish is `site=a`, `ssd`, `!ssd` or `site!=a`; several are all to be met. What is no
wish is `Refused`, with what to write.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from manifold.kernel import labels
from manifold.kernel.geode.messages import Demand

Where = str | Sequence[str]


def wishes_of(where: Where) -> tuple[str, ...]:
    """`where` as a demand has it; "" and () wish for nothing."""
    if isinstance(where, str):
        return labels.read_wishes([where]) if where else ()
    return labels.read_wishes(where)


def demand_of(demand: Demand | None, where: Where) -> Demand:
    """`demand`, which also wants `where`."""
    found = demand or Demand()
    wishes = wishes_of(where)
    if not wishes:
        return found
    return msgspec.structs.replace(found, labels=labels.read_wishes((*found.labels, *wishes)))
