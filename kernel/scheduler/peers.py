"""What an owner knows of the nodes that run its shards, beyond geode's view of them. Pure data.

Interface rules: `took` once per assignment, `left` once when it ends or is taken back.
Invariants: E1 the live shards of a node are never negative, and 0 when no job runs; E2 nothing is
held against a node for ever: a stall and an empty credit are forgiven after a time, since a node
that is not asked cannot show that it is well.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from manifold.kernel.config import SchedulerConfig
from manifold.kernel.geode.geode import Geode, Ranked, refusal
from manifold.kernel.geode.messages import Demand, LoadReport
from manifold.vm.kid import Kid

# A node that was silent on a shard is not asked again for so long: well over the silence itself,
# and a sixth of the time after which a job that nobody may run fails.
STALL_MS = 5000.0
RELENT_MS = 1000.0  # a node that had no credit is tried again after this: five `backlog_ms`
PROGRAMS_MAX = 200  # remembered per node; fewer than a runner keeps: it will still have those


class Peers:
    """See the module."""

    def __init__(self, config: SchedulerConfig, geode: Geode) -> None:
        self._config = config
        self._geode = geode
        self._live: dict[Kid, int] = {}  # shards of ours assigned to each node
        self._foreign: dict[Kid, tuple[int, float]] = {}  # slots others keep busy, and when told
        self._stalled: dict[Kid, float] = {}  # until when
        self._broke: dict[Kid, float] = {}  # had no credit, since when
        self._programs: dict[Kid, dict[Kid, None]] = {}

    # -- shards -------------------------------------------------------------------------------

    def took(self, node: Kid) -> None:
        self._live[node] = self._live.get(node, 0) + 1

    def left(self, node: Kid) -> None:
        count = self._live[node] - 1
        assert count >= 0, "E1"
        if count:
            self._live[node] = count
        else:
            del self._live[node]

    def live(self) -> dict[Kid, int]:
        """Our shards by node; a node without any is not in it."""
        return self._live

    def busy(self, now_ms: float) -> dict[Kid, int]:
        """Slots taken on each node: by our shards, and by others' as last told."""
        busy = dict(self._live)
        for node, (foreign, told_ms) in self._foreign.items():
            if now_ms - told_ms < self._config.silence_ms:
                busy[node] = busy.get(node, 0) + foreign
        return busy

    # -- news ---------------------------------------------------------------------------------

    def heard(self, node: Kid) -> None:
        self._stalled.pop(node, None)

    def stall(self, node: Kid, now_ms: float) -> None:
        self._stalled[node] = now_ms + STALL_MS

    def forget(self, node: Kid) -> None:
        """It is gone, or came back as a new process."""
        self._programs.pop(node, None)
        self._foreign.pop(node, None)
        self._stalled.pop(node, None)
        self._broke.pop(node, None)

    def load(self, node: Kid, load: LoadReport, now_ms: float) -> None:
        """What came with a report."""
        self._geode.report(node, load, now_ms)
        foreign = load.slots - load.free_slots - self._live.get(node, 0)
        if foreign > 0:
            self._foreign[node] = (foreign, now_ms)
        else:
            self._foreign.pop(node, None)
        if load.credits:
            self._broke.pop(node, None)
        else:
            self._broke.setdefault(node, now_ms)

    def relent(self, now_ms: float) -> None:
        """E2: nodes that had no credit some time ago may be tried again, with one shard."""
        for node, since_ms in list(self._broke.items()):
            if now_ms - since_ms >= RELENT_MS:
                del self._broke[node]
                known = self._geode.node(node)
                if known is not None and known.load is not None:
                    load = msgspec.structs.replace(known.load, credits=1)
                    self._geode.report(node, load, now_ms)

    def alias(self, node: Kid | None) -> str:
        """Its name for people; "" for nobody, or who has left."""
        known = self._geode.node(node) if node is not None else None
        return known.alias if known is not None else ""

    def stalled(self, node: Kid, now_ms: float) -> bool:
        return self._stalled.get(node, now_ms) > now_ms

    def follow(
        self, path: tuple[Kid, ...], forward: Kid, wanted: Demand, now_ms: float
    ) -> tuple[Kid, tuple[Kid, ...]]:
        """Where a shard goes that the last node of `path` sends on to `forward`, and its path.

        It is only a hint. Where it leads nowhere the shard stays with who gave it, its hops used
        up: a local optimum costs time, never a task.
        """
        hops = self._geode.config.hops
        node = self._geode.node(forward)
        lost = forward in path or len(path) > hops or self.stalled(forward, now_ms)
        if lost or node is None or refusal(node, wanted) is not None:
            return path[-1], path[-1:] * hops
        return forward, path

    def not_stalled(self, ranked: Sequence[Ranked], now_ms: float) -> Sequence[Ranked]:
        if not self._stalled:
            return ranked
        return [each for each in ranked if self._stalled.get(each.kid, now_ms) <= now_ms]

    # -- programs -----------------------------------------------------------------------------

    def needs(self, node: Kid, program: Kid) -> bool:
        """Whether `program` has to travel to `node`; after that it has not."""
        known = self._programs.setdefault(node, {})
        if program in known:
            return False
        if len(known) >= PROGRAMS_MAX:
            del known[next(iter(known))]
        known[program] = None
        return True

    def lacks(self, node: Kid, program: Kid) -> None:
        """It said so, or what was sent may be lost."""
        self._programs.get(node, {}).pop(program, None)
