"""The Python SDK: `connect`, `Client`, `Future`."""

from __future__ import annotations

from collections.abc import Mapping

from manifold.shells.sdk.client import Client
from manifold.shells.sdk.future import Future, JobFailed, Progress

__all__ = ["Client", "Future", "JobFailed", "Progress", "connect"]


def connect(
    cluster: str = "", *, node: str = "", environ: Mapping[str, str] | None = None, up: int = 0
) -> Client:
    """Attach to a running cluster: `cluster`, else $MANIFOLD_CLUSTER, else `default`.

    `node` prefers a node by alias. `up=N` starts a cluster of N nodes where none of that name
    runs here, and takes it down when the client closes, or when the program ends, in whatever way,
    SIGKILL included. A cluster that runs already is used as it is, and left alone. What is started
    without `cluster=` belongs to this program alone: two programs with `up=4` side by side have a
    cluster each, and a further `connect()` in the same program finds its own. With `cluster=` it
    has that name, and other programs may attach for as long as this client is open. The nodes are
    of the classes in the `manifold.yaml` of the working folder, else of the default ones.

    Raises `NoCluster` where none of that name runs here; with `up`, `ConfigError` where
    `manifold.yaml` is not accepted, `Unavailable` where the nodes do not come up, `TypeError` or
    `ValueError` where N is not a number of nodes.

    >>> with manifold.connect(up=4) as m:
    ...     m.map(math.factorial, range(100))
    """
    from manifold.shells.sdk.lifetime import attach_or_start

    return attach_or_start(cluster, node, environ, up)
