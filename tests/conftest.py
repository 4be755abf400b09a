"""Fixtures for every test. Clusters come from the pytest plugin (manifold/tools/testing)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from manifold.kernel.config import PACKAGED
from manifold.tools.emulator.testing import TestCluster

pytest_plugins = ["pytester"]  # for the tests of the plugin itself


@pytest.fixture
def manifold_clusters(manifold_clusters: Callable[..., TestCluster]) -> Callable[..., TestCluster]:
    """As the plugin's, but of the unequal classes that a user has who writes no file."""

    def start(*nodes: int, **options: object) -> TestCluster:
        if not {"classes", "links", "config", "profile"} & set(options):
            options["config"] = PACKAGED
        return manifold_clusters(*nodes, **options)

    return start
