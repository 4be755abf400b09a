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
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from manifold.kernel import messages as m
from manifold.kernel import places
from manifold.kernel.clock import JUMP_MS_MAX, RATE_MAX, RATE_MIN
from manifold.kernel.config import Config, load
from manifold.kernel.errors import ManifoldError, NotFound, Refused, Unavailable
from manifold.kernel.hyperbus.rules import LinkRule, has
from manifold.kernel.process import throttle
from manifold.shells.sdk.client import Client
from manifold.tools.emulator import cluster, orders
from manifold.tools.emulator.changes import Changes
from manifold.tools.emulator.cluster import CONVERGE_S, converge_s
from manifold.tools.emulator.messages import SETTLE_S
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
        memory_roots: throttle.Roots = throttle.MEMORY_ROOTS,
        seed: int = 0,
        netns: bool = False,
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
        self.shared = False  # by several tests: its nodes neither come nor go
        self._full: dict[str, int] = {}  # by alias: the process whose disk is full
        self._skewed: set[str] = set()
        self._linked = False  # whether any rule of links was set
        self._told: set[str] = set()  # of their side of a link
        self._clients: list[Client] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="supervisor")
        self._thread.start()
        self._closed = False
        try:
            self.supervisor: Supervisor = self._call(
                cluster.up(
                    self.config, nodes, environ, self._said, roots, memory_roots, netns=netns
                )
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

    def labels_of(self, node: Node) -> tuple[str, ...]:
        """The labels that the node had when it started."""
        found = self._node(node)
        return found.ready.labels if found.ready is not None else found.spec.labels

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
        """Until every node sees every node alive, and voters are agreed: everything can be asked
        for. `Unavailable` where it takes longer; 0: than so many nodes may take."""
        timeout_s = timeout_s or self._patience_s
        if not self._call(self.supervisor.converged(timeout_s)):
            seen = {alias: n.alive for alias, n in sorted(self.supervisor.nodes.items())}
            raise Unavailable(f"The cluster has not converged: alive as seen by each: {seen}.")
        if not self._call(self.supervisor.agreed(timeout_s)):
            raise Unavailable("The cluster has not agreed on its voters.", "`logs` say why.")

    @property
    def _patience_s(self) -> float:
        return converge_s(len(self.supervisor.nodes))

    def logs(self, node: Node) -> str:
        """What the node and its workers have logged, and what they printed; also of a node that
        has left."""
        folder = places.state_dir(self.name, str(node), self.environ)
        if isinstance(node, int) or not folder.exists():
            folder = places.state_dir(self.name, self.alias(node), self.environ)
        paths = [folder / name for name in LOG_FILES]
        return "\n".join(path.read_text(errors="replace") for path in paths if path.exists())

    # -- growing and shrinking ------------------------------------------------------------------

    def add(self, kind: str = "", count: int = 1, labels: Sequence[str] = ()) -> list[str]:
        """`count` more nodes of a class, with these labels beside those of the class; their
        aliases, once everybody sees everybody."""
        self._refuse_shared()
        self.note(" ".join(filter(None, (f"add {count}", kind, *labels))))
        return self._call(self._changes.add(kind, count, labels))

    def remove(self, *nodes: Node, force: bool = False, timeout_s: float = SETTLE_S) -> None:
        """Let nodes leave well; returns once their processes have ended. `timeout_s`: for how long
        it is tried that others vote in their place, if they do."""
        self._refuse_shared()
        aliases = [self.alias(node) for node in nodes]
        self.note(f"remove {', '.join(aliases)}")
        self._call(self._changes.remove(aliases, force=force, timeout_s=timeout_s))

    def _refuse_shared(self) -> None:
        if self.shared:
            raise Refused(
                "Other tests use this cluster: its nodes neither come nor go.",
                "Take manifold_cluster, which is this test's alone.",
            )

    # -- hurting nodes ------------------------------------------------------------------------

    def kill(self, node: Node, *, stay_down: bool = False) -> int:
        """SIGKILL the node's process; the pid it had. Returns when its end was seen; the
        supervisor starts it again after its back-off, unless it is to stay down."""
        alias = self.alias(node)
        pid = self.pid(alias)
        self.note(f"kill {alias} (pid {pid}){', which stays down' if stay_down else ''}")
        self._call(self._changes.kill(alias, stay_down=stay_down, force=True))
        self._call(self.supervisor.ended(alias, pid))
        return pid

    def start(self, node: Node) -> None:
        """Start one that was to stay down."""
        alias = self.alias(node)
        self.note(f"start {alias}")
        self._call(self._changes.start(alias))

    def restart(self, node: Node, timeout_s: float = 0.0) -> None:
        """SIGKILL the node's process, where it has one, and return when another has taken its place
        and everybody sees everybody."""
        watched = self._node(node)
        watched.backoff_s = BACKOFF_S_MIN  # it is not the node that keeps dying
        if watched.down:
            self.start(node)
        else:
            self.kill(node)
        self.wait_converged(timeout_s)

    def pause(self, node: Node) -> None:
        """SIGSTOP the node's process: it is silent, and its connections stay."""
        alias = self.alias(node)
        self.note(f"pause {alias}")
        self._call(self._changes.pause(alias, force=True))

    def resume(self, node: Node) -> None:
        """SIGCONT it."""
        alias = self.alias(node)
        self.note(f"resume {alias}")
        self._call(self._changes.resume(alias))

    def throttle(self, node: Node, to: float) -> None:
        """Give its workers `to` of the compute share of its class; 1 undoes it."""
        alias = self.alias(node)
        self.note(f"throttle {alias} to {to:g}")
        self._call(self._changes.slow(alias, to))

    def clock_skew(self, node: Node, jump_ms: float = 0.0, rate: float = 1.0) -> None:
        """Put the node's clock `jump_ms` ahead, and let it go `rate` times as fast from now on.

        It is the monotonic clock of everything in the node that waits, expires or is measured.
        It cannot be put back, as that of a machine cannot; `rate=1.0` lets it go as others do.
        """
        alias = self.alias(node)
        if not 0.0 <= jump_ms <= JUMP_MS_MAX:
            raise ValueError(f"jump_ms={jump_ms!r}: write a number from 0 to {JUMP_MS_MAX:g}.")
        if not RATE_MIN <= rate <= RATE_MAX:
            raise ValueError(f"rate={rate!r}: write a number from {RATE_MIN:g} to {RATE_MAX:g}.")
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

    def cut(self, one: Iterable[Node], other: Iterable[Node], *, one_way: bool = False) -> None:
        """Cut every link between two sets of nodes, both ways or what the first send."""
        self._order("cut", LinkRule(self._side(*one), self._side(*other), one_way, cut=True))

    def slow(
        self,
        one: Node,
        other: Node,
        *,
        latency_ms: float = 0.0,
        jitter_ms: float = 0.0,
        rate_bps: float = 0.0,
        loss: float = 0.0,
        reorder: float = 0.0,
        one_way: bool = False,
    ) -> None:
        """Make links slow, narrow or lossy. A side is a node, a class, a label such as `site=a`,
        `*`, or several with commas between; of several rules that fit, the last one holds."""
        figures = (latency_ms, jitter_ms, rate_bps, loss, reorder)
        self._order("slow", LinkRule(self._side(one), self._side(other), one_way, *figures))

    def partition(self, *groups: Iterable[Node]) -> None:
        """Cut the nodes of each group off those of the others; a single group off all the rest."""
        sides = [self._side(*group) for group in groups]
        if len(sides) == 1:
            rest = [each for each in self.aliases if not has(sides[0], each, self.labels_of)]
            sides.append(self._side(*rest))
        self._order("partition", *orders.partition(sides))

    def _side(self, *nodes: Node) -> str:
        """As a rule names them; what is neither a node nor a class is refused."""
        names = [
            part
            for each in nodes
            for part in (each.split(",") if isinstance(each, str) else [each])
        ]
        aliases = self.aliases
        known = {alias.rpartition("-")[0] for alias in aliases} | {"*"}
        known |= {label for alias in aliases for label in self.labels_of(alias) if "=" in label}
        return ",".join(sorted(str(n) if n in known else self.alias(n) for n in names))

    def _order(self, what: str, *rules: LinkRule) -> None:
        """Rules of links that hold until `heal`, also for nodes that start again."""
        for rule in rules:
            self.note(f"{what}: {rule}")
        self._linked = True
        self._change(lambda before: orders.added(before, rules))

    def _change(self, changed: Callable[[orders.Rules], orders.Rules]) -> None:
        before, after = orders.change(self.supervisor.runtime_dir, changed)
        told = orders.concerned(before.rules, after.rules, self.aliases)
        orders.tell(self.name, self.environ, after, told)

    def link(self, node: Node, rule: m.SetLink) -> None:
        """Set one node's side of a link; it is forgotten when the node ends."""
        alias = self.alias(node)
        self.note(f"link of {alias}: {rule}")
        self._linked = True
        self._told.add(alias)
        self._tell(alias, rule)

    def _tell(self, alias: str, order: Any) -> None:
        with Client(self.name, node=alias, environ=self.environ) as client:
            client.ask(order)

    # -- healing ------------------------------------------------------------------------------

    def heal(self) -> None:
        """Lift every rule of links, and let every paused node go on."""
        self._resume_all()
        self.note("heal")
        self._change(lambda before: ())
        for alias in sorted(self._told):
            self._tell(alias, m.ClearLinks())
        self._told.clear()
        self._linked = False

    def _resume_all(self) -> None:
        for alias in self.aliases:
            if self._node(alias).paused:
                self.resume(alias)

    def undo(self) -> None:
        """X1: as if no fault had been made; returns when everybody sees everybody."""
        self._resume_all()
        for alias, pid in sorted(self._full.items()):
            self.free_disk(alias)
            if self.pid(alias) == pid:  # it may have stopped voting: it begins again
                self.kill(alias)
        for alias in self.aliases:
            if self._node(alias).down:
                self.start(alias)
        if not self._call(self.supervisor.ready(CONVERGE_S)):
            raise Unavailable("Not every node came back.", "`logs` of those that are missing.")
        if self._linked:
            self.heal()
        for alias in sorted(self._skewed):
            self._tell(alias, m.SkewClock())
        self._skewed.clear()
        for alias in self.aliases:
            if self._node(alias).slowed != 1.0:
                self.throttle(alias, 1.0)
        self.wait_converged()

    # -- the end ------------------------------------------------------------------------------

    def close(self) -> None:
        """Take everything down; `AssertionError` where something is left."""
        if self._closed:
            return
        self._closed = True
        for alias in list(self._full):  # all else ends with the nodes
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
    assert supervisor.members is not None, "a cluster for tests may grow"
    return found + [group for group in supervisor.members.above if Path(group).exists()]
