"""A cluster for tests: started, hurt and healed by function calls, and taken down without a trace.

Interface rules: `TestCluster` runs a supervisor on a thread of the calling process, so that a test
can ask it things; nodes are real processes. Names come from the environment that is passed in, so
that clusters of two test processes never meet. `close` raises where anything is left behind.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from manifold.kernel import messages as m
from manifold.kernel import places
from manifold.kernel.config import Config, load
from manifold.kernel.errors import ManifoldError, Unavailable
from manifold.kernel.process import throttle
from manifold.shells.sdk.client import Client
from manifold.tools.emulator import cluster
from manifold.tools.emulator.changes import Changes
from manifold.tools.emulator.supervisor import Supervisor, Watched

CONVERGE_S = 30.0
T = TypeVar("T")


class TestCluster:
    """`nodes` nodes; `overrides` are configuration keys such as `{"scheduler.grain": "5ms"}`."""

    __test__ = False  # pytest: this is no test

    def __init__(
        self,
        nodes: int,
        environ: Mapping[str, str],
        *,
        overrides: Mapping[str, str] | None = None,
        config: Path | None = None,
        converge: bool = True,
        roots: throttle.Roots = throttle.ROOTS,
    ) -> None:
        self.environ = environ
        self.name = environ["MANIFOLD_CLUSTER"]
        settings = dict(overrides or {}) | {"cluster": self.name}
        self.config: Config = load(config, {}, settings)
        self.events: list[str] = []
        self._clients: list[Client] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="supervisor")
        self._thread.start()
        self._closed = False
        try:
            self.supervisor: Supervisor = self._call(
                cluster.up(self.config, nodes, environ, self.events.append, roots)
            )
            assert self.supervisor.changes is not None, "a cluster that is up may be changed"
            self._changes: Changes = self.supervisor.changes
            if converge:
                self.wait_converged()
        except BaseException:
            self.close()
            raise

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    # -- asking -------------------------------------------------------------------------------

    @property
    def aliases(self) -> list[str]:
        return sorted(self.supervisor.nodes)

    def _node(self, alias: str) -> Watched:
        return self.supervisor.nodes[alias]

    def pid(self, alias: str) -> int:
        """The node's present process."""
        return self._node(alias).pid

    def client(self, node: str = "") -> Client:
        """A client, attached to `node` where one is named; closed with the cluster."""
        client = Client(self.name, node=node, environ=self.environ)
        self._clients.append(client)
        return client

    def wait_converged(self, timeout_s: float = CONVERGE_S) -> None:
        """Until every node sees every node alive."""
        if not self._call(self.supervisor.converged(timeout_s)):
            seen = {alias: n.alive for alias, n in sorted(self.supervisor.nodes.items())}
            raise Unavailable(f"The cluster has not converged: alive as seen by each: {seen}.")

    def logs(self, alias: str) -> str:
        """The node's log file."""
        folder = places.state_dir(self.name, alias, self.environ)
        found = [folder / name for name in ("node.log", "console.log", "workers.log")]
        return "\n".join(path.read_text() for path in found if path.exists())

    # -- growing and shrinking ------------------------------------------------------------------

    def add(self, kind: str = "", count: int = 1) -> list[str]:
        """`count` more nodes of a class; their aliases, once everybody sees everybody."""
        return self._call(self._changes.add(kind, count))

    def remove(self, *aliases: str, force: bool = False) -> None:
        """Let nodes leave well; returns once their processes have ended."""
        self._call(self._changes.remove(aliases, force=force))

    # -- hurting ------------------------------------------------------------------------------

    def kill(self, alias: str, *, stay_down: bool = False) -> int:
        """SIGKILL the node's process; the supervisor starts it again, unless it is to stay down.
        The pid that it had."""
        return self._call(self._changes.kill(alias, stay_down=stay_down, force=True))

    def start(self, alias: str) -> None:
        """Start one that was to stay down."""
        self._call(self._changes.start(alias))

    def pause(self, alias: str) -> None:
        """SIGSTOP the node's process."""
        self._call(self._changes.pause(alias, force=True))

    def resume(self, alias: str) -> None:
        """SIGCONT it."""
        self._call(self._changes.resume(alias))

    def slow(self, alias: str, to: float) -> None:
        """Give its workers `to` of the compute share of its class; 1 undoes it."""
        self._call(self._changes.slow(alias, to))

    def cut(self, one: Iterable[str], other: Iterable[str]) -> None:
        """Cut every link between two sets of nodes, both ways."""
        right = list(other)
        for left in one:
            for peer in right:
                self.link(left, m.SetLink(peer, cut_to=True, cut_from=True))

    def link(self, alias: str, rule: m.SetLink) -> None:
        """Set one node's side of a link."""
        with Client(self.name, node=alias, environ=self.environ) as client:
            client.ask(rule)

    def heal(self) -> None:
        """Lift every cut, and let every paused node go on."""
        for alias in self.aliases:
            if self._node(alias).paused:
                self.resume(alias)
        for alias in self.aliases:
            with Client(self.name, node=alias, environ=self.environ) as client:
                client.ask(m.ClearLinks())

    # -- the end ------------------------------------------------------------------------------

    def close(self) -> None:
        """Take everything down; `AssertionError` where something is left."""
        if self._closed:
            return
        self._closed = True
        for client in self._clients:
            try:
                client.close()
            except ManifoldError as error:
                self.events.append(f"a client could not say goodbye: {error}")
        supervisor = getattr(self, "supervisor", None)
        if supervisor is not None:
            self._call(supervisor.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if supervisor is not None:
            left = leftovers(supervisor)
            assert not left, f"left behind: {left}"


def leftovers(supervisor: Supervisor) -> list[str]:
    """Processes, directories and groups of a cluster that are still there."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(supervisor.runtime_dir).encode() + b"\0" in command:
                found.append(f"process {entry.name}")
    if supervisor.runtime_dir.exists():
        found.append(str(supervisor.runtime_dir))
    assert supervisor.members is not None, "a cluster for tests may grow"
    return found + [group for group in supervisor.members.above if Path(group).exists()]
