"""Clusters that live as long as a program: what `connect(up=N)` starts, and who ends it.

Interface: `attach_or_start` is `connect`; an `OwnedClient` takes its cluster down when it closes.
The supervisor lives a floor above and is found by name. Invariants: L1 a cluster that was found is
left alone; only what this process started is ended, by the client that started it. L2 a cluster
without a name given serves this program alone: no other finds it.
"""

from __future__ import annotations

import atexit
import importlib
import os
import threading
import time
from collections.abc import Mapping
from typing import Any

from manifold.kernel.errors import NoCluster, Refused
from manifold.shells.sdk.client import Client

NODES_MAX = 4096  # as in a configuration
OTHER_START_S = 40.0  # a cluster that another process is starting is up within its 30 s, or never
LOOK_S = 0.05
_QUIET = threading.Event()  # never set: a door has no wait, so it is looked for
_started: list[OwnedClient] = []  # by this program, and still there; the newest is last


class OwnedClient(Client):
    """A client whose cluster was started for it, and ends when it closes or the program does."""

    def __init__(self, owned: Any, node: str, environ: Mapping[str, str]) -> None:
        self._owned = owned
        self._owned_environ = environ
        try:
            super().__init__(owned.name, node=node, environ=environ)
        except BaseException:
            owned.end(environ)
            raise
        _started.append(self)
        atexit.register(self.close)

    def close(self) -> None:
        """Leave the cluster and take it down; nothing of it is left when this returns."""
        if not self._owned.ours:  # a copy in a child that the program forked
            return
        atexit.unregister(self.close)
        if self in _started:
            _started.remove(self)
        try:
            super().close()
        finally:
            self._owned.end(self._owned_environ)


def attach_or_start(cluster: str, node: str, environ: Mapping[str, str] | None, up: int) -> Client:
    """See `connect`."""
    _refuse_count(up)
    place = os.environ if environ is None else environ
    if not up:
        own = _program_s_own(cluster, environ)
        return Client(own or cluster, node=node, environ=place)
    try:
        return Client(cluster, node=node, environ=place)
    except NoCluster:
        return _start(cluster, node, place, up)


def _start(cluster: str, node: str, environ: Mapping[str, str], up: int) -> Client:
    owned = importlib.import_module("manifold.tools.emulator.owned")
    try:
        return OwnedClient(owned.start(up, cluster, environ), node, environ)
    except Refused:
        if not cluster or not owned.supervised(cluster, environ):
            raise
    # Another process is starting the cluster of this name: it is found, not ours.
    deadline_s = time.monotonic() + OTHER_START_S
    while True:
        try:
            return Client(cluster, node=node, environ=environ)
        except NoCluster:
            if time.monotonic() > deadline_s or not owned.supervised(cluster, environ):
                raise
        _QUIET.wait(LOOK_S)


def _program_s_own(cluster: str, environ: Mapping[str, str] | None) -> str:
    """The cluster that this program started itself, where nothing else is named; "" for none."""
    if cluster or environ is not None or not _started:
        return ""
    newest = _started[-1]
    return newest.cluster if newest._owned.ours else ""


def _refuse_count(up: object) -> None:
    if isinstance(up, bool) or not isinstance(up, int):
        raise TypeError(f"up is a number of nodes, such as up=4; {up!r} is none.")
    if not 0 <= up <= NODES_MAX:
        raise ValueError(f"up is a number of nodes from 1 to {NODES_MAX}; {up} is none.")
