"""A cluster for tests: started, hurt and healed by function calls, and taken down without a trace.

Interface rules: `TestCluster` runs a supervisor on a thread of the calling process, so that a test
can ask it things; nodes are real processes. Names come from the environment that is passed in, so
that clusters of two test processes never meet. Where a node is asked for, its alias will do, or its
number in `aliases`. `close` raises where anything is left behind.
Invariants: X1 `undo` lifts every fault that was made here; `close` and the pytest plugin call it.
X2 what was done, and what the supervisor said, is in `trace`, with its time.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Coroutine, Iterable, Mapping
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from manifold.kernel import messages as m
from manifold.kernel import places
from manifold.kernel.config import Config, load
from manifold.kernel.errors import ManifoldError, NotFound, Unavailable
from manifold.kernel.process import throttle
from manifold.shells.sdk.client import Client
from manifold.tools.emulator import cluster
from manifold.tools.emulator.cluster import CONVERGE_S, converge_s
from manifold.tools.emulator.supervisor import BACKOFF_S_MIN, Supervisor, Watched

COMMAND_S = 60.0  # a `manifold` command that a test waits for
LOG_FILES = ("node.log", "console.log", "workers.log")
T = TypeVar("T")
Node = str | int


class TestCluster:
    """`nodes` nodes of the classes in the file `config` (else the packaged ones).

    `overrides` are configuration keys such as `{"scheduler.grain": "5ms"}`. `seed` is that of
    `random`, from which a test takes its choices: a failure that is reported names it.
    """

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
        seed: int = 0,
    ) -> None:
        self.environ = environ
        self.seed = seed
        self.random = Random(seed)
        self.trace: list[tuple[float, str]] = []  # seconds since the start, and what happened
        self._began_s = time.monotonic()
        self.name = environ["MANIFOLD_CLUSTER"]
        settings = dict(overrides or {}) | {"cluster": self.name}
        self.config: Config = load(config, {}, settings)
        self.events: list[str] = []
        self._stopped: set[str] = set()
        self._full: dict[str, int] = {}  # by alias: the process whose disk is full
        self._skewed: set[str] = set()
        self._linked = False  # whether any rule of a link was set
        self._clients: list[Client] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="supervisor")
        self._thread.start()
        self._closed = False
        try:
            self.supervisor: Supervisor = self._call(
                cluster.up(self.config, nodes, environ, self._said, roots)
            )
            if converge:
                self.wait_converged()
        except BaseException:
            self.close()
            raise

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _said(self, line: str) -> None:
        self.events.append(line)
        self.note(line)

    def note(self, line: str) -> None:
        """Put a line of the test's own into `trace`."""
        self.trace.append((time.monotonic() - self._began_s, line))

    # -- asking -------------------------------------------------------------------------------

    @property
    def aliases(self) -> list[str]:
        return sorted(self.supervisor.nodes)

    def alias(self, node: Node) -> str:
        """The alias of a node that is named by it or by its number in `aliases`."""
        aliases = self.aliases
        if (
            isinstance(node, int)
            and not isinstance(node, bool)
            and -len(aliases) <= node < len(aliases)
        ):
            return aliases[node]
        if node in aliases:
            return str(node)
        raise NotFound(
            f"There is no node {node!r} in this cluster.",
            f"There are 0 to {len(aliases) - 1}: {', '.join(aliases)}.",
        )

    def _node(self, node: Node) -> Watched:
        return self.supervisor.nodes[self.alias(node)]

    def pid(self, node: Node) -> int:
        """The node's present process."""
        return self._node(node).pid

    def client(self, node: Node = "") -> Client:
        """A client, attached to `node` where one is named; closed with the cluster."""
        alias = "" if node == "" else self.alias(node)
        client = Client(self.name, node=alias, environ=self.environ)
        self._clients.append(client)
        return client

    def command(
        self, *arguments: str, timeout_s: float = COMMAND_S
    ) -> subprocess.CompletedProcess[str]:
        """Run `manifold` with these arguments, on this cluster; what it printed is captured."""
        return subprocess.run(
            [sys.executable, "-P", "-m", "manifold", *arguments],
            env=dict(self.environ), capture_output=True, text=True, timeout=timeout_s, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def wait_converged(self, timeout_s: float = 0.0) -> None:
        """Until every node sees every node alive; 0: for as long as so many nodes may take."""
        if not self._call(self.supervisor.converged(timeout_s or self._patience_s)):
            seen = {alias: n.alive for alias, n in sorted(self.supervisor.nodes.items())}
            raise Unavailable(f"The cluster has not converged: alive as seen by each: {seen}.")

    @property
    def _patience_s(self) -> float:
        return converge_s(len(self.supervisor.nodes))

    def logs(self, node: Node) -> str:
        """What the node and its workers have logged, and what they printed."""
        folder = places.state_dir(self.name, self.alias(node), self.environ)
        paths = [folder / name for name in LOG_FILES]
        return "\n".join(path.read_text(errors="replace") for path in paths if path.exists())

    # -- hurting nodes ------------------------------------------------------------------------

    def kill(self, node: Node) -> int:
        """SIGKILL the node's process; the pid it had. Returns when its end was seen; the
        supervisor starts it again after its back-off: `wait_converged` waits for that."""
        watched = self._node(node)
        pid = watched.pid
        self.note(f"kill {watched.spec.alias} (pid {pid})")
        os.kill(pid, signal.SIGKILL)
        self._stopped.discard(watched.spec.alias)
        self._call(self.supervisor.gone(watched.spec.alias, pid))
        return pid

    def restart(self, node: Node, timeout_s: float = 0.0) -> None:
        """SIGKILL the node's process, and return when another has taken its place and everybody
        sees everybody."""
        self._node(node).backoff_s = BACKOFF_S_MIN  # it is not the node that keeps dying
        self.kill(node)
        self.wait_converged(timeout_s)

    def pause(self, node: Node) -> None:
        """SIGSTOP the node's process: it is silent, and its connections stay."""
        alias = self.alias(node)
        self.note(f"pause {alias}")
        os.kill(self.pid(alias), signal.SIGSTOP)
        self._stopped.add(alias)

    def resume(self, node: Node) -> None:
        """SIGCONT it."""
        alias = self.alias(node)
        self.note(f"resume {alias}")
        self._stopped.discard(alias)
        os.kill(self.pid(alias), signal.SIGCONT)

    def clock_skew(self, node: Node, jump_ms: float = 0.0, rate: float = 1.0) -> None:
        """Put the node's clock `jump_ms` ahead, and let it go `rate` times as fast from now on.

        It is the monotonic clock of everything in the node that waits, expires or is measured.
        It cannot be put back, as that of a machine cannot; `rate=1.0` lets it go as others do.
        """
        alias = self.alias(node)
        self.note(f"clock of {alias}: {jump_ms:g} ms ahead, rate {rate:g}")
        self._skewed.add(alias)
        self._tell(alias, m.SkewClock(jump_ms, rate))

    def fill_disk(self, node: Node) -> None:
        """Let the node's process write nothing any more to any file, until `free_disk`.

        Its limit of a file's size (RLIMIT_FSIZE) becomes 0: writes fail with EFBIG, as they do
        with ENOSPC where a disk is full. The process that follows it has room again.
        """
        watched = self._node(node)
        self.note(f"disk of {watched.spec.alias} is full")
        _limit_files(watched.pid, 0)
        self._full[watched.spec.alias] = watched.pid

    def free_disk(self, node: Node) -> None:
        """Let it write again. A voter that has stopped begins again when its node restarts."""
        watched = self._node(node)
        self.note(f"disk of {watched.spec.alias} has room")
        if self._full.pop(watched.spec.alias, 0) == watched.pid:
            _limit_files(watched.pid, None)

    # -- hurting links ------------------------------------------------------------------------

    def cut(self, one: Iterable[Node], other: Iterable[Node]) -> None:
        """Cut every link between two sets of nodes, both ways."""
        right = [self.alias(each) for each in other]
        for left in one:
            for peer in right:
                self.link(left, m.SetLink(peer, cut_to=True, cut_from=True))

    def link(self, node: Node, rule: m.SetLink) -> None:
        """Set one node's side of a link."""
        alias = self.alias(node)
        self._linked = True
        self.note(f"link of {alias}: {rule}")
        self._tell(alias, rule)

    def _tell(self, alias: str, order: Any) -> None:
        with Client(self.name, node=alias, environ=self.environ) as client:
            client.ask(order)

    # -- healing ------------------------------------------------------------------------------

    def heal(self) -> None:
        """Lift every rule of a link, and let every paused node go on."""
        for alias in sorted(self._stopped):
            self.resume(alias)
        self.note("heal")
        for alias in self.aliases:
            self._tell(alias, m.ClearLinks())
        self._linked = False

    def undo(self) -> None:
        """X1: as if no fault had been made; returns when everybody sees everybody."""
        for alias in sorted(self._stopped):
            self.resume(alias)
        for alias, pid in sorted(self._full.items()):
            self.free_disk(alias)
            if self.pid(alias) == pid:  # it may have stopped voting: it begins again
                self.kill(alias)
        if not self._call(self.supervisor.ready(CONVERGE_S)):
            raise Unavailable("Not every node came back.", "`logs` of those that are missing.")
        if self._linked:
            self.heal()
        for alias in sorted(self._skewed):
            self._tell(alias, m.SkewClock())
        self._skewed.clear()
        self.wait_converged()

    # -- the end ------------------------------------------------------------------------------

    def close(self) -> None:
        """Take everything down; `AssertionError` where something is left."""
        if self._closed:
            return
        self._closed = True
        for alias in list(self._stopped):  # links and clocks end with their nodes
            self.resume(alias)
        for alias in list(self._full):
            self.free_disk(alias)
        for client in self._clients:
            try:
                client.close()
            except ManifoldError as error:
                self._said(f"a client could not say goodbye: {error}")
        supervisor = getattr(self, "supervisor", None)
        if supervisor is not None:
            self._call(supervisor.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if supervisor is not None:
            left = leftovers(supervisor)
            assert not left, f"left behind: {left}"


def _limit_files(pid: int, limit_bytes: int | None) -> None:
    """Of a process; None: as far as it may go."""
    try:
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        limit = hard if limit_bytes is None else limit_bytes
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, hard))
    except ProcessLookupError:
        if limit_bytes is not None:  # else its disk went with it
            raise


def processes_of(path: str) -> list[int]:
    """Processes that have `path` as an argument."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:  # it has ended meanwhile
                continue
            if path.encode() + b"\0" in command:
                found.append(int(entry.name))
    return found


def leftovers(supervisor: Supervisor) -> list[str]:
    """Processes, directories and groups of a cluster that are still there."""
    found = [f"process {pid}" for pid in processes_of(str(supervisor.runtime_dir))]
    if supervisor.runtime_dir.exists():
        found.append(str(supervisor.runtime_dir))
    found += [
        spec.cgroup for spec in supervisor.specs if spec.cgroup and Path(spec.cgroup).exists()
    ]
    return found
