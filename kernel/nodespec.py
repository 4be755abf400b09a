"""What a node is told when it is forked: by the emulator, or by the machine that it runs on.

Interface rules: data only; it travels from the supervisor through the zygote as MessagePack.
"""

from __future__ import annotations

import msgspec

from manifold.kernel.config import Config
from manifold.kernel.messages import LinkOrders
from manifold.kernel.process import memory


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
    line: str = ""  # where other nodes reach it, in a network of their own: it is in a namespace
    memory_cgroup: str = ""  # that bounds its tasks' memory; without one the node keeps the books

    @property
    def slots(self) -> int:
        """How many tasks may run at a time."""
        task_bytes = self.config.tasks.memory
        return memory.slots(self.cores, self.memory_bytes, task_bytes, self.memory_cgroup)

    @property
    def reached_at(self) -> str:
        """By other nodes; clients always use `address`."""
        return self.line or self.address

    @property
    def cgroups(self) -> tuple[str, ...]:
        """Every group that was made for it."""
        return tuple(dict.fromkeys(each for each in (self.cgroup, self.memory_cgroup) if each))
