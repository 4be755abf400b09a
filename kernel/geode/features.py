"""Coordinates of a node: what it is made of, on logarithmic scales from 0 to 1.

    scale(x) = log(x / low) / log(high / low), clamped to 0..1

      axis       low        high        one tenth of the axis is a factor of
      compute    1/64 core  256 cores   2.6    (cores x share of a core; 14 octaves)
      memory     64 MiB     16 TiB      3.5    (2^26 to 2^44: the range of the configuration)
      bandwidth  1 kbit/s   1 Tbit/s    7.9    (nine decades)
      latency    10 s       10 us       4.0    (six decades, near is 1)

Interface rules:
  - figures that are not finite or are negative raise `ValueError`: whoever has them from the
    network checks first (`Geode.node_up` counts and refuses them);
  - latency is a coordinate for display and for links only. The metric adds the round trip in
    seconds instead; as an axis of the distance it would count twice.

Invariants: F1 each coordinate is finite and within 0..1.
Source: the design page of geode ("features log-scaled to 0-1").
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, log

from manifold.kernel.geode.messages import MAX_SLOTS, Demand

__all__ = ["Demand", "Features", "Static", "scale"]

COMPUTE_LOW_CORES, COMPUTE_HIGH_CORES = 1 / 64, 256.0
MEMORY_LOW_BYTES, MEMORY_HIGH_BYTES = float(1 << 26), float(1 << 44)
BANDWIDTH_LOW_BPS, BANDWIDTH_HIGH_BPS = 1e3, 1e12
# What a node may say of itself at all: costs stay finite within, whatever is asked.
SHARE_MIN, SHARE_MAX = 1e-6, 1e6  # of a core; the configuration allows 0.01 to 1
LATENCY_MAX_MS = 1e9
LATENCY_NEAR_MS, LATENCY_FAR_MS = 0.01, 10_000.0


def scale(value: float, low: float, high: float) -> float:
    """Where `value` lies between `low` (0) and `high` (1), logarithmically."""
    if not isfinite(value) or value < 0:
        raise ValueError(f"a coordinate needs a finite figure of at least 0, not {value}")
    if value <= low:
        return 0.0
    return min(1.0, log(value / low) / log(high / low))


@dataclass(frozen=True, slots=True)
class Features:
    """A point of the manifold; more is better on every axis."""

    compute: float = 0.0
    memory: float = 0.0
    bandwidth: float = 0.0
    latency: float = 0.0

    @staticmethod
    def from_meta(
        cores: int, compute: float, memory_bytes: int, bandwidth_bps: float, latency_ms: float
    ) -> Features:
        """From what a node tells of itself: cores, share of a core that each worker gets, …"""
        near = scale(latency_ms, LATENCY_NEAR_MS, LATENCY_FAR_MS)
        return Features(
            compute=scale(cores * compute, COMPUTE_LOW_CORES, COMPUTE_HIGH_CORES),
            memory=scale(float(memory_bytes), MEMORY_LOW_BYTES, MEMORY_HIGH_BYTES),
            bandwidth=scale(bandwidth_bps, BANDWIDTH_LOW_BPS, BANDWIDTH_HIGH_BPS),
            latency=1.0 - near,
        )


@dataclass(frozen=True, slots=True)
class Static:
    """What does not change while a node is up."""

    cores: int = 1  # workers
    compute: float = 1.0  # speed of one worker, in cores of the reference machine
    memory_bytes: int = 1 << 30
    bandwidth_bps: float = 1e9
    latency_ms: float = 0.2  # one way, of its link
    gpu: bool = False
    arch: str = ""
    labels: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Of the whole node, in cores of the reference machine."""
        return self.cores * self.compute

    @property
    def features(self) -> Features:
        return Features.from_meta(
            self.cores, self.compute, self.memory_bytes, self.bandwidth_bps, self.latency_ms
        )

    @property
    def sane(self) -> bool:
        """Whether every figure is finite and in its range (consul#3023: one NaN spoils all)."""
        figures = (self.compute, self.bandwidth_bps, self.latency_ms, float(self.memory_bytes))
        return (
            all(isfinite(figure) and figure >= 0 for figure in figures)
            and 1 <= self.cores <= MAX_SLOTS
            and SHARE_MIN <= self.compute <= SHARE_MAX
            and self.bandwidth_bps >= 1
            and self.latency_ms <= LATENCY_MAX_MS
        )
