"""Above `full_view` nodes shards hop over links, and nothing is lost on the way."""

from __future__ import annotations

from typing import Any

import pytest

from manifold.kernel.config import Config, GeodeConfig
from manifold.kernel.scheduler.messages import AssignShard
from manifold.kernel.scheduler.owner import Owner
from manifold.tools.simulator.jobs import factory
from manifold.tools.simulator.run import simulate

# A view of three nodes, two links each: a cluster of twelve is large.
NARROW = Config(geode=GeodeConfig(full_view=3, near_links=1, far_links=1, hops=4))


def hops_of(message: Any) -> int:
    return len(message.path) if isinstance(message, AssignShard) else 0


@pytest.mark.parametrize("faults", ["none", "light", "heavy"])
def test_results_are_exact_where_no_node_sees_more_than_its_links(faults: str) -> None:
    for seed in range(8):
        report = simulate(seed, 12, faults, None, factory(NARROW))
        assert not report.failures, report.text()


def test_shards_hop_and_never_more_often_than_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    assign = Owner._assignment

    def counting(self: Owner, job: Any, shard: Any) -> Any:
        effect = assign(self, job, shard)
        seen.append(hops_of(effect.message))  # type: ignore[union-attr]
        return effect

    monkeypatch.setattr(Owner, "_assignment", counting)
    for seed in range(8):
        simulate(seed, 12, "none", None, factory(NARROW))
    assert max(seen) >= 1, "nobody was ever sent on"
    assert max(seen) <= NARROW.geode.hops
