"""A private cluster to hurt: its nodes, its nemesis, the processes of its clients, and its end.

Interface: `staged(...)` is a context: inside it a `Stage` is there, whose `up` starts the nodes and
waits until Nexus answers at each, `attack` lets the nemesis carry out a plan, `heal` lifts
everything, `clients` starts a process of clients and `end_clients` ends those that there are.
What goes wrong is added to the report. Whatever happens, Ctrl-C included, no process and no file of
it is left when the context ends, but what a run has written elsewhere on purpose.
Invariants: S1 no node may have ended but by the nemesis' hand. S2 disks forget what was not synced.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from manifold.kernel import places
from manifold.kernel.config import Config, NodeClass, load
from manifold.kernel.errors import Unavailable
from manifold.kernel.limits import RUNTIME_DIR_BYTES_MAX
from manifold.kernel.nexus.values import Get
from manifold.tools.emulator import cluster
from manifold.tools.emulator.supervisor import Supervisor
from manifold.tools.emulator.testing import leftovers
from manifold.tools.torture.links import Links, operate
from manifold.tools.torture.nemesis import Nemesis
from manifold.tools.torture.plan import Step
from manifold.tools.torture.report import Report

CONVERGE_S = 30.0
AGAIN_S = 0.02
RUNTIME_CHARS_MAX = RUNTIME_DIR_BYTES_MAX - 22  # `/manifold-` and twelve digits
SAID_CHARS = 3000  # of a log, in a failure
# After a zygote was killed: a node that it was forking may end unseen; and until the next one has
# its imports, nodes cannot be started, which the supervisor says.
HALF_FORKED_MS = 1000.0
ZYGOTE_MS = 15_000.0

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Scene:
    """What is to be there. `overrides` are configuration keys beyond those of every run."""

    nodes: int
    voters: int
    cores: int = 1
    overrides: Mapping[str, str] = dataclasses.field(default_factory=dict)
    keep: bool = False  # the nodes' logs and disks


@dataclass(slots=True)
class Clients:
    """One process of clients."""

    process: subprocess.Popen[bytes]
    log: Path


@asynccontextmanager
async def staged(scene: Scene, report: Report, say: Say) -> AsyncIterator[Stage]:
    """See the module."""
    folder = Path(tempfile.mkdtemp(prefix="mf-"))
    stage = Stage(scene, folder, report, say)
    try:
        yield stage
    finally:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the second one, too, leaves nothing
        try:
            await stage.end()
        finally:
            if scene.keep:
                say(f"kept: {folder}")
            else:
                shutil.rmtree(folder, ignore_errors=True)
            signal.signal(signal.SIGINT, before)


class Stage:
    """See the module."""

    def __init__(self, scene: Scene, folder: Path, report: Report, say: Say) -> None:
        self.scene, self.folder, self.report, self.say = scene, folder, report, say
        self.name = f"torture-{os.urandom(4).hex()}"
        self.environ = dict(os.environ) | {
            "MANIFOLD_STATE_HOME": str(folder / "state"),
            # Beside the state, where that is short enough for sockets; else where it always is.
            "MANIFOLD_RUNTIME_DIR": str(folder) if len(str(folder)) <= RUNTIME_CHARS_MAX else "",
            "MANIFOLD_CLUSTER": self.name,
        }
        self._supervisor: Supervisor | None = None
        self._links: Links | None = None
        self._nemesis: Nemesis | None = None
        self._watching: asyncio.Task[None] | None = None
        self._clients: list[Clients] = []
        self._ends: list[tuple[float, str]] = []  # when the supervisor said what

    @staticmethod
    def now_ms() -> float:
        return asyncio.get_running_loop().time() * 1000

    @property
    def links(self) -> Links:
        assert self._links is not None, "it is up"
        return self._links

    @property
    def nemesis(self) -> Nemesis:
        assert self._nemesis is not None, "it is up"
        return self._nemesis

    @property
    def aliases(self) -> list[str]:
        return self.links.aliases

    # -- the cluster ------------------------------------------------------------------------------

    async def up(self) -> None:
        """The nodes, and Nexus at each of them."""
        supervisor = self._supervisor = await cluster.up(
            self._config(), self.scene.nodes, self.environ, self._heard
        )
        if not await supervisor.converged(CONVERGE_S):
            raise Unavailable("The nodes did not find each other in time.", "Is the host busy?")
        links = self._links = Links(self.name, self.environ, sorted(supervisor.nodes))
        deadline_ms = self.now_ms() + CONVERGE_S * 1000
        for node in range(len(links.aliases)):
            while (await operate(links, node, "globals/torture/begin", Get())) is None:
                if self.now_ms() > deadline_ms:
                    raise Unavailable("Nexus does not answer in a healthy cluster.", "Try again.")
                await asyncio.sleep(AGAIN_S)
        self._nemesis = Nemesis(supervisor, links, self.scene.voters, self.say)
        self._watching = asyncio.create_task(self._nemesis.watch())

    def _heard(self, line: str) -> None:
        self._ends.append((self.now_ms(), line))

    def _config(self) -> Config:
        """As it is packaged, whatever is in the working folder; nodes are small and fast."""
        overrides = {
            "cluster": self.name,
            "nexus.disk": "losing",  # S2
            "nexus.voters": str(self.scene.voters),
        } | dict(self.scene.overrides)
        kind = NodeClass("n", self.scene.nodes, cores=self.scene.cores, latency=0.0)
        return dataclasses.replace(load(None, {}, overrides), classes=(kind,))

    # -- the story --------------------------------------------------------------------------------

    async def attack(self, steps: Sequence[Step], begun_ms: float) -> None:
        """All of the plan but its last step, which is to heal."""
        await self.nemesis.run(steps, begun_ms)

    async def heal(self, last: Step) -> None:
        """The last step; returns once every node is up, or too late."""
        self.say(str(last))
        heal_ms = self.now_ms()
        try:
            up_ms = await self.nemesis.heal()
        except TimeoutError:
            up_ms = self.now_ms()
            self.report.failures.append("After healing not every node came up.")
        self.report.up_ms = up_ms - heal_ms

    def check_ends(self) -> None:
        """S1."""
        nemesis = self.nemesis
        self.report.faults = nemesis.faults
        for at_ms, line in self._ends:
            pid = line.partition("(pid ")[2].partition(")")[0]
            if pid.isdigit() and int(pid) not in nemesis.killed:
                if nemesis.forking(at_ms, HALF_FORKED_MS):
                    continue
                alias = line.partition(" ")[0]
                said = self._logs(alias)
                self.report.failures.append(f"{line}, and nobody had killed it:\n{said}")
            elif (
                not pid.isdigit()
                and " is back" not in line
                and not nemesis.forking(at_ms, ZYGOTE_MS)
            ):
                self.report.failures.append(f"The supervisor said: {line}")

    def _logs(self, alias: str) -> str:
        folder = places.state_dir(self.name, alias, self.environ)
        log = [folder / each for each in ("node.log", "console.log")]
        return "\n".join(each.read_text()[-SAID_CHARS:] for each in log if each.exists())

    # -- clients ----------------------------------------------------------------------------------

    def clients(self, module: str, *arguments: str) -> None:
        """Start a process of clients. It is to end when its standard input does."""
        log = self.folder / f"clients.{len(self._clients)}.log"
        command = [sys.executable, "-P", "-m", module, *arguments]
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=file, stderr=file, env=self.environ,
                cwd=self.folder, start_new_session=True,  # Ctrl-C is for us
            )  # fmt: skip
        self._clients.append(Clients(process, log))

    def end_clients(self, patience_s: float) -> None:
        """Blocks until all have ended, or were killed."""
        for clients in self._clients:
            assert clients.process.stdin is not None
            clients.process.stdin.close()
        for clients in self._clients:
            try:
                status = clients.process.wait(patience_s)
            except subprocess.TimeoutExpired:
                clients.process.kill()
                clients.process.wait()
                status = 0
                self.report.failures.append(
                    f"Clients had not ended {patience_s:g} s after they were told to: "
                    f"{clients.log.read_text()[-SAID_CHARS:]}"
                )
            said = clients.log.read_text()[-SAID_CHARS:]
            if status < 0:  # a crash of theirs, in a library (nng#1653), is not one of the cluster
                self.report.crashed.append(f"clients ended by signal {-status}: {said}")
            elif status:
                self.report.failures.append(f"Clients ended with {status}: {said}")
        self._clients.clear()

    # -- the end ----------------------------------------------------------------------------------

    async def end(self) -> None:
        """Nothing is left; also in the middle of the course."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        for clients in self._clients:
            if clients.process.poll() is None:
                clients.process.kill()
                clients.process.wait()
            if clients.process.stdin is not None:
                clients.process.stdin.close()
        if self._nemesis is not None:
            await self._nemesis.close()
        if self._links is not None:
            await self._links.close()
        if self._supervisor is not None:
            await self._supervisor.stop()
            left = leftovers(self._supervisor)
            if left:
                self.report.failures.append(f"Left behind: {left}")
