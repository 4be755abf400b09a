"""A cluster for tests: started, hurt and healed by function calls, and taken down without a trace.

Interface rules: `TestCluster` runs a supervisor on a thread of the calling process, so that a test
can ask it things; nodes are real processes. Names come from the environment that is passed in, so
that clusters of two test processes never meet. `close` raises where anything is left behind.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from manifold.kernel import messages as m
from manifold.kernel import places
from manifold.kernel.config import Config, load
from manifold.kernel.errors import ManifoldError, Unavailable
from manifold.kernel.hyperbus.rules import LinkRule
from manifold.kernel.process import throttle
from manifold.shells.sdk.client import Client
from manifold.tools.emulator import cluster, orders
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
        self._stopped: set[str] = set()
        self._told: set[str] = set()  # of their side of a link
        self._clients: list[Client] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="supervisor")
        self._thread.start()
        self._closed = False
        try:
            self.supervisor: Supervisor = self._call(
                cluster.up(self.config, nodes, environ, self.events.append, roots)
            )
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

    # -- hurting ------------------------------------------------------------------------------

    def kill(self, alias: str) -> int:
        """SIGKILL the node's process (the supervisor starts it again); the pid it had."""
        pid = self.pid(alias)
        os.kill(pid, signal.SIGKILL)
        return pid

    def pause(self, alias: str) -> None:
        """SIGSTOP the node's process."""
        os.kill(self.pid(alias), signal.SIGSTOP)
        self._stopped.add(alias)

    def resume(self, alias: str) -> None:
        """SIGCONT it."""
        self._stopped.discard(alias)
        os.kill(self.pid(alias), signal.SIGCONT)

    def cut(self, one: Iterable[str], other: Iterable[str], *, one_way: bool = False) -> None:
        """Cut every link between two sets of nodes, both ways or what the first send."""
        self._order(LinkRule(",".join(one), ",".join(other), one_way, cut=True))

    def slow(
        self,
        one: str,
        other: str,
        *,
        latency_ms: float = 0.0,
        jitter_ms: float = 0.0,
        rate_bps: float = 0.0,
        loss: float = 0.0,
        reorder: float = 0.0,
        one_way: bool = False,
    ) -> None:
        """Make links slow, narrow or lossy. A side is an alias, a class, `*`, or several with
        commas between; of several rules that fit, the last one holds."""
        figures = (latency_ms, jitter_ms, rate_bps, loss, reorder)
        self._order(LinkRule(one, other, one_way, *figures))

    def partition(self, *groups: Iterable[str]) -> None:
        """Cut the nodes of each group off those of the others."""
        self._order(*orders.partition([",".join(sorted(group)) for group in groups]))

    def _order(self, *rules: LinkRule) -> None:
        """Rules of links that hold until `heal`, also for nodes that start again."""
        self._change(lambda before: orders.added(before, rules))

    def _change(self, changed: Callable[[orders.Rules], orders.Rules]) -> None:
        before, after = orders.change(self.supervisor.runtime_dir, changed)
        told = orders.concerned(before.rules, after.rules, self.aliases)
        orders.tell(self.name, self.environ, after, told)

    def link(self, alias: str, rule: m.SetLink) -> None:
        """Set one node's side of a link; it is forgotten when the node ends."""
        with Client(self.name, node=alias, environ=self.environ) as client:
            client.ask(rule)
        self._told.add(alias)

    def heal(self) -> None:
        """Lift every rule of links, and let every paused node go on."""
        for alias in sorted(self._stopped):
            self.resume(alias)
        self._change(lambda before: ())
        for alias in sorted(self._told):
            with Client(self.name, node=alias, environ=self.environ) as client:
                client.ask(m.ClearLinks())
        self._told.clear()

    # -- the end ------------------------------------------------------------------------------

    def close(self) -> None:
        """Take everything down; `AssertionError` where something is left."""
        if self._closed:
            return
        self._closed = True
        for alias in list(self._stopped):
            self.resume(alias)
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
    found += [
        spec.cgroup for spec in supervisor.specs if spec.cgroup and Path(spec.cgroup).exists()
    ]
    return found
