"""What a node is told when it is forked: by the emulator, or by the machine that it runs on.

Interface rules: data only; it travels from the supervisor through the zygote as MessagePack.
"""

from __future__ import annotations

import msgspec

from manifold.kernel.config import Config
from manifold.kernel.messages import LinkOrders


class NodeSpec(msgspec.Struct, frozen=True):
    """Everything a node is told when it is forked."""

    alias: str
    node_class: str
    config: Config
    state_dir: str
    address: str
    seeds: tuple[str, ...]
    zygote: str
    cgroup: str
    cores: int
    compute: float
    memory_bytes: int
    bandwidth_bps: float
    latency_ms: float
    gpu: bool
    labels: tuple[str, ...] = ()
    orders: LinkOrders = LinkOrders()  # rules of links made since the cluster came up

    @property
    def cgroups(self) -> tuple[str, ...]:
        """Every group that was made for it."""
        return (self.cgroup,) if self.cgroup else ()
