"""What was measured: gas per second of a program on a node, gas per index of a program.

A rate is looked for in this order, the first that has `rate_samples` observations counts:
  1. of this program on this node;
  2. of this program on nodes of this class;
  3. of this program per core, times the share of a core that a worker of the node gets;
  4. what the node reports of itself, over all programs;
  5. of all programs per core, times the share; a constant while nothing was ever measured.
1 and 2 replace geometry (beta goes to 0); for 3 to 5 the shortfall slows the estimate down.
Step 3 keeps a measured node and an unmeasured one on the same scale: without it a program that
is three times slower per gas than the rest runs to every node that it has never been on.

Interface rules: rates are gas per second of ONE slot; what is not finite or below
`MIN_RATE` is refused (`False`), never stored.
Invariants: R1 every stored mean is finite and positive; R2 every table is bounded.
Source: the design page of geode ("EWMA alpha 0.3, at least 5 samples"), scheduler.md ("an EWMA
of gas per index, kept per program KID and node class").
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from manifold.kernel.geode.messages import MAX_GAS, MIN_RATE
from manifold.vm.kid import Kid

# 256 nodes times 64 programs in use; the least recently taught goes first.
LEARNED_MAX = 16_384
# One core of the reference machine: about 10^9 metered instructions a second (Collatz, measured).
PRIOR_GAS_PER_CORE_S = 1e9
# Per-core rates average over unequal nodes, so they move slowly: some 20 observations.
CORE_ALPHA = 0.05


@dataclass(slots=True)
class Mean:
    """An exponentially weighted mean; the first samples weigh equally (bias correction)."""

    value: float = 0.0
    samples: int = 0

    def add(self, sample: float, alpha: float) -> None:
        self.samples += 1
        self.value += max(alpha, 1.0 / self.samples) * (sample - self.value)
        assert isfinite(self.value) and self.value > 0, "R1"


class _Table:
    """Means by key, bounded, the least recently taught forgotten first."""

    def __init__(self, alpha: float) -> None:
        self._alpha = alpha
        self._means: dict[tuple[str, str], Mean] = {}

    def add(self, key: tuple[str, str], sample: float) -> int:
        mean = self._means.pop(key, None) or Mean()
        mean.add(sample, self._alpha)
        self._means[key] = mean
        if len(self._means) > LEARNED_MAX:
            del self._means[next(iter(self._means))]
        assert len(self._means) <= LEARNED_MAX, "R2"
        return mean.samples

    def get(self, key: tuple[str, str], samples: int) -> float | None:
        mean = self._means.get(key)
        return mean.value if mean is not None and mean.samples >= samples else None

    def forget(self, second: str) -> None:
        for key in [key for key in self._means if key[1] == second]:
            del self._means[key]


class Rates:
    def __init__(self, alpha: float, samples: int) -> None:
        self._samples = samples
        self._by_node = _Table(alpha)
        self._by_class = _Table(alpha)
        self._by_core = _Table(CORE_ALPHA)
        self._gas_per_index = _Table(alpha)
        self._core = Mean()
        self.version = 0  # changes when an estimate comes into being, not when it drifts

    def observed(
        self, kid: Kid, node_class: str, compute: float, program: Kid, gas_per_s: float
    ) -> bool:
        """A slot of `kid`, worth `compute` cores, ran `program` at this rate."""
        if not _usable(gas_per_s):
            return False
        per_core = gas_per_s / compute
        counts = (
            self._by_node.add((program, kid), gas_per_s),
            self._by_class.add((program, node_class), gas_per_s),
            self._by_core.add((program, ""), per_core),
        )
        self._core.add(per_core, CORE_ALPHA)
        if self._samples in counts or self._core.samples == 1:
            self.version += 1
        return True

    def reported(self, gas_per_s: float, compute: float) -> None:
        """A node told its own rate: it calibrates the per-core figure for those that have none."""
        self._core.add(gas_per_s / compute, CORE_ALPHA)
        if self._core.samples == 1:
            self.version += 1

    def rate(
        self, kid: Kid, node_class: str, compute: float, program: Kid | None, reported: float
    ) -> tuple[float, bool]:
        """Gas per second of one slot, and whether it was learned (geometry then keeps out)."""
        if program is not None:
            learned = self._by_node.get((program, kid), self._samples)
            if learned is None:
                learned = self._by_class.get((program, node_class), self._samples)
            if learned is not None:
                return learned, True
            per_core = self._by_core.get((program, ""), self._samples)
            if per_core is not None:
                return per_core * compute, False
        if reported > 0:
            return reported, False
        return (self._core.value if self._core.samples else PRIOR_GAS_PER_CORE_S) * compute, False

    def forget(self, kid: Kid) -> None:
        """A node came back as something else."""
        self._by_node.forget(kid)
        self.version += 1

    def learn_gas_per_index(self, program: Kid, node_class: str, gas: float) -> bool:
        if not _usable(gas):
            return False
        self._gas_per_index.add((program, node_class), gas)
        self._gas_per_index.add((program, ""), gas)
        return True

    def gas_per_index(self, program: Kid, node_class: str) -> float | None:
        """None until a probe block has run anywhere; another class's figure before its own."""
        own = self._gas_per_index.get((program, node_class), 1)
        return own if own is not None else self._gas_per_index.get((program, ""), 1)


def _usable(figure: float) -> bool:
    return isfinite(figure) and MIN_RATE <= figure <= MAX_GAS
