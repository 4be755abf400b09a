"""The nodes an emulated cluster has or may get: their names and their specifications.

Interface rules: `first` once, then `more` as nodes are added; both make the state folders.
Invariants: B1 an alias is given out once in the life of a cluster: who was told of `rpi4-05` never
finds another node under that name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from manifold.kernel import labels, places
from manifold.kernel.config import Config, NodeClass
from manifold.kernel.config_loader import nearest
from manifold.kernel.errors import NotFound, Refused
from manifold.kernel.limits import NODES_MAX
from manifold.kernel.nodespec import NodeSpec
from manifold.kernel.process import throttle
from manifold.tools.emulator.network import Network


def node_spec(
    config: Config,
    alias: str,
    kind: NodeClass,
    runtime: Path,
    seeds: tuple[str, ...],
    environ: Mapping[str, str],
    zygote: str,
    roots: throttle.Roots = throttle.ROOTS,
    memory_roots: throttle.Roots = throttle.MEMORY_ROOTS,
    more_labels: Sequence[str] = (),
) -> NodeSpec:
    """The specification of one node on this host; `more_labels` go before those of its class."""
    group = f"{runtime.name}/{alias}"
    cores = kind.cores * kind.compute
    cgroup = throttle.prepare(group, cores, roots) if kind.compute < 1.0 else ""
    memory_cgroup = throttle.prepare_memory(group, kind.memory, memory_roots)
    address = f"ipc://{places.ipc_path(runtime, alias)}"
    own = labels.merged(kind.labels_of(_number(alias)), more_labels)
    labels.check_size(own)
    return NodeSpec(
        alias, kind.name, config, str(places.state_dir(config.cluster, alias, environ)), address,
        seeds, zygote, cgroup, kind.cores, kind.compute, kind.memory, kind.bandwidth, kind.latency,
        kind.gpu, own, memory_cgroup=memory_cgroup,
    )  # fmt: skip


def _number(alias: str) -> int:
    """Which of its class a node is; an agent may have any name, and is then the first."""
    number = alias.rpartition("-")[2]
    return int(number) if number.isdigit() and len(number) <= 9 else 1


class Members:
    """Of the cluster of `config` in `runtime`. `agents` are the addresses of nodes that others
    supervise here."""

    def __init__(
        self,
        config: Config,
        runtime: Path,
        environ: Mapping[str, str],
        roots: throttle.Roots,
        agents: Sequence[str] = (),
        memory_roots: throttle.Roots = throttle.MEMORY_ROOTS,
        network: Network | None = None,
    ) -> None:
        self.config = config
        self.runtime = runtime
        self.agents = tuple(agents)
        self.roots = roots
        self.memory_roots = memory_roots
        self.network = network  # where its nodes are in namespaces
        self._environ = environ
        self._zygote = str(runtime / "zygote")
        self._last: dict[str, int] = {}  # of each class: the highest number given out (B1)

    @property
    def above(self) -> tuple[str, ...]:
        """The groups that those of all its nodes are in."""
        roots = dict.fromkeys((*self.roots, *self.memory_roots))
        return throttle.above(self.runtime.name, tuple(roots))

    def first(self, count: int) -> list[NodeSpec]:
        """`count` nodes, spread over the classes."""
        members = self.config.spread(count)
        for _, kind in members:
            self._last[kind.name] = self._last.get(kind.name, 0) + 1
        specs = [self._spec(alias, kind, ()) for alias, kind in members]
        seeds = (*(spec.reached_at for spec in specs), *self.agents)
        return [msgspec.structs.replace(spec, seeds=seeds) for spec in specs]

    def more(
        self, name: str, count: int, seeds: tuple[str, ...], more_labels: Sequence[str] = ()
    ) -> list[NodeSpec]:
        """`count` more of class `name`, "" is the first of the file."""
        kind = self._kind(name)
        labels.check_size(labels.merged(kind.labels_of(1), more_labels))
        last = self._last.get(kind.name, 0)
        if last + count > NODES_MAX:
            raise Refused(
                f"There were {last} nodes of class {kind.name} already, of at most {NODES_MAX}.",
                "Names are given out once: start the cluster anew.",
            )
        self._last[kind.name] = last + count
        aliases = [f"{kind.name}-{number:02d}" for number in range(last + 1, last + count + 1)]
        return [self._spec(alias, kind, seeds, more_labels) for alias in aliases]

    def _kind(self, name: str) -> NodeClass:
        kinds = {kind.name: kind for kind in self.config.classes}
        kind = kinds.get(name or self.config.classes[0].name)
        if kind is None:
            known = f"There are {', '.join(kinds)}."
            raise NotFound(f"There is no class {name!r}.", nearest(name, kinds) or known)
        return kind

    def _spec(
        self, alias: str, kind: NodeClass, seeds: tuple[str, ...], more_labels: Sequence[str] = ()
    ) -> NodeSpec:
        spec = node_spec(
            self.config, alias, kind, self.runtime, seeds, self._environ, self._zygote,
            self.roots, self.memory_roots, more_labels,
        )  # fmt: skip
        Path(spec.state_dir).mkdir(parents=True, exist_ok=True, mode=0o700)
        if self.network is not None:
            line = self.network.plan(alias, kind.bandwidth)
            return msgspec.structs.replace(spec, line=line)
        return spec
