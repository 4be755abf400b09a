"""`manifold.globals`: those of the cluster that `manifold.connect()` finds, attached at first use.

Interface rules: one connection of this process, made when it is first needed and again where it was
closed or another cluster is meant by now; not that of a process we were forked from. A cluster that
this program started is reached by the connection that started it.
"""

from __future__ import annotations

import atexit
import os
import threading

from manifold.kernel import places
from manifold.shells.sdk import lifetime
from manifold.shells.sdk.client import Client
from manifold.shells.sdk.globals import Globals


class DefaultGlobals(Globals):
    """`manifold.globals`: of the cluster that `manifold.connect()` finds, attached at first use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._own: Client | None = None
        self._own_place: tuple[str, ...] = ()

    @property
    def _client(self) -> Client:
        if lifetime._program_s_own("", None):
            return lifetime._started[-1]
        with self._lock:
            cluster = os.environ.get("MANIFOLD_CLUSTER", "") or "default"
            folder = str(places.runtime_path(cluster, os.environ))
            place = (str(os.getpid()), cluster, folder)
            if self._own is None or self._own.connection.closed or place != self._own_place:
                self._leave()
                self._own, self._own_place = Client(cluster), place
                atexit.register(self._leave)
            return self._own

    def _leave(self) -> None:
        """Not of the process that we were forked from: its connection is not ours."""
        own, self._own = self._own, None
        atexit.unregister(self._leave)
        if own is not None and self._own_place[0] == str(os.getpid()):
            own.close()

    def __reduce__(self) -> str:
        return "globals"  # by reference: a function that uses it may be sent to a cluster

    def __repr__(self) -> str:
        return "<manifold.globals>"


globals = DefaultGlobals()
