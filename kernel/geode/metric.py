"""The two metrics: geode's predicted finish, and the seed's formula for comparison.

    geode   (max(0, q - (k-1)w) / k + w) / rate * exp(beta * shortfall) + miss/bandwidth + rtt
    seed    minkowski3(demand, features) * exp(2 * load / capacity)

with q the gas queued on the node, w the gas of the task, k the slots and `rate` the gas per
second of one slot. With one slot the first is (q + w) / rate, the formula of the design page; with
more, a task waits only for the queue beyond the other slots and then runs on one of them, which
(q + w) / (k * rate) gets wrong by a factor of k on an idle node.

Interface rules: plain floats in, a finite float out; no state, no view.
Invariants, asserted here and by tests/unit/test_geode_metric.py:
  G5  costs are finite: every exponent is clamped at 50 (exp(50) = 5e21; the seed's
      `exp(2*load/cap)` raised OverflowError in its own simulation);
  M1  only shortfall is distance: more than was asked never counts against a node;
  M2  the cost never falls when the queue or the work grows.
Source: the design page of geode, "Rule"; the seed's README, "Load Distortion".
"""

from __future__ import annotations

from math import exp, isfinite

from manifold.kernel.config import GeodeConfig
from manifold.kernel.geode.features import Features
from manifold.kernel.geode.messages import Demand

EXPONENT_MAX = 50.0
SEED_LOAD_FACTOR = 2.0


def shortfall(demand: Demand, features: Features, config: GeodeConfig) -> float:
    """dist3 = (sum of w * max(0, wanted - has)^3)^(1/3), over compute, memory and bandwidth."""
    total = 0.0
    lack = demand.compute - features.compute
    if lack > 0:
        total += config.weight_compute * lack**3
    lack = demand.memory - features.memory
    if lack > 0:
        total += config.weight_memory * lack**3
    lack = demand.bandwidth - features.bandwidth
    if lack > 0:
        total += config.weight_bandwidth * lack**3
    return float(total ** (1 / 3)) if total else 0.0


def penalty(distance: float, beta: float) -> float:
    """By how much a shortfall slows a task down, as long as nothing better is known."""
    return exp(min(EXPONENT_MAX, beta * distance))


def finish_s(
    queued_gas: float, work_gas: float, slots: int, slot_gas_per_s: float, fixed_s: float
) -> float:
    """Seconds until the result is here; `slot_gas_per_s` has the penalty in it already."""
    wait_gas = queued_gas - (slots - 1) * work_gas
    wait_gas = wait_gas / slots if wait_gas > 0 else 0.0
    seconds = (wait_gas + work_gas) / slot_gas_per_s + fixed_s
    assert isfinite(seconds), "G5"
    return seconds


def seed_distance(demand: Demand, features: Features, config: GeodeConfig) -> float:
    """Weighted Minkowski distance, p = 3: it punishes surplus as it does shortfall."""
    total = (
        config.weight_compute * abs(demand.compute - features.compute) ** 3
        + config.weight_memory * abs(demand.memory - features.memory) ** 3
        + config.weight_bandwidth * abs(demand.bandwidth - features.bandwidth) ** 3
    )
    return float(total ** (1 / 3))


def seed_cost(
    distance: float, load: float, capacity: float, exponent_max: float = EXPONENT_MAX
) -> float:
    """The seed's distortion by load. At distance 0 no load repels: kept, it is the formula."""
    cost = distance * exp(min(exponent_max, SEED_LOAD_FACTOR * load / capacity))
    assert isfinite(cost), "G5"
    return cost
