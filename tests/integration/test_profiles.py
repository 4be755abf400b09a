"""The profiles: each is a cluster that comes up, is unequal as it says, and computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from manifold.kernel.config import PROFILES, load, profile_path
from manifold.kernel.nexus.messages import GetNexus, NexusInfo
from manifold.tools.emulator.testing import TestCluster

COLLATZ = Path(__file__).parents[2] / "examples" / "collatz.ent"


def steps(n: int) -> int:
    count = 0
    while n != 1:
        n, count = n // 2 if n % 2 == 0 else 3 * n + 1, count + 1
    return count


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_comes_up_and_computes(
    profile: str, manifold_clusters: Callable[..., TestCluster]
) -> None:
    config = load(profile_path(profile), {})
    cluster = manifold_clusters(profile=profile, overrides={"nexus.voters": "auto"})
    assert len(cluster.aliases) == config.nodes
    client = cluster.client()
    assert {each.alias: each.labels for each in client.nodes()} == {
        alias: config.labels_of(alias) for alias, _ in config.spread()
    }
    expected = sum(steps(n) for n in range(1, 20_000))
    assert client.parallel_for(COLLATZ, 1, 20_000, reduce="sum") == expected
    info = client.ask(GetNexus())
    assert isinstance(info, NexusInfo)
    assert len(info.voters) == 5
