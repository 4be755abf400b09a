"""The Python SDK: `connect`, `Client`, `Future`."""

from __future__ import annotations

from collections.abc import Mapping

from manifold.shells.sdk.client import Client
from manifold.shells.sdk.future import Future, JobFailed, Progress

__all__ = ["Client", "Future", "JobFailed", "Progress", "connect"]


def connect(
    cluster: str = "", *, node: str = "", environ: Mapping[str, str] | None = None
) -> Client:
    """Attach to a running cluster: `cluster`, else $MANIFOLD_CLUSTER, else `default`.

    `node` prefers a node by alias. Raises `NoCluster` where none of that name runs here.
    """
    return Client(cluster, node=node, environ=environ)
