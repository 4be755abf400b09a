"""`manifold torture nexus`: a private cluster, clients, a nemesis, a verdict.

Interface: `torture(options, say)` runs everything and returns a `Report`; `say` is given lines for
people while it goes on. Whatever happens, Ctrl-C included, no process and no file of it is left,
but for the history of a key that was found wrong, which is written where `options.folder` says.
Course: start nodes with disks that lose what was not synced; wait until Nexus answers at each;
start clients, in processes of their own; let the nemesis carry out its plan; heal; within HEALED_S
every node must have read and written every hot key and its part of the cold ones; judge.
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
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random

import msgspec

from manifold.kernel import places
from manifold.kernel.config import Config, NodeClass, load
from manifold.kernel.errors import Unavailable
from manifold.kernel.limits import RUNTIME_DIR_BYTES_MAX
from manifold.tools.emulator import cluster
from manifold.tools.emulator.supervisor import Supervisor
from manifold.tools.emulator.testing import leftovers
from manifold.tools.simulator.linearizable import Kind
from manifold.tools.torture import history
from manifold.tools.torture.callers import PREFIX, Caller, keys_at
from manifold.tools.torture.history import Seen
from manifold.tools.torture.links import Links, ask
from manifold.tools.torture.nemesis import Nemesis, stalled_ms
from manifold.tools.torture.plan import plan
from manifold.tools.torture.verdict import judge
from manifold.tools.torture.worker import Spec

WORKERS = 2  # processes of clients
CLIENTS_PER_NODE = 2
CLIENTS_MAX = 16  # as many as the checker wants on one key
CONVERGE_S = 30.0
HEALED_S = 20.0  # once every node is up: until every key in use was read and written
AGAIN_S = 0.02
RUNTIME_CHARS_MAX = RUNTIME_DIR_BYTES_MAX - 22  # `/manifold-` and twelve digits
PROBES = 1000  # the numbers of clients that are not those of the workers begin here
CLIENTS_END_S = 15.0  # a client ends with its operation: TRIES_MAX of PATIENCE_MS


@dataclass(frozen=True, slots=True)
class Options:
    seed: int
    seconds: float
    nodes: int = 7
    voters: int = 5
    folder: Path = Path()
    keep: bool = False  # the nodes' logs and disks


@dataclass(slots=True)
class Report:
    """What a run came to; `failures` is empty where all is well."""

    seed: int
    seconds: float
    nodes: int
    voters: int
    failures: list[str] = field(default_factory=list)
    operations: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    keys: int = 0
    stalled_ms: float = 0.0
    stalled_at_ms: float = 0.0
    up_ms: float = 0.0  # from healing until every node was up
    healed_ms: float = 0.0  # and from then until every key in use was read and written
    history: str = ""
    crashed: list[str] = field(default_factory=list)  # processes of clients

    @property
    def command(self) -> str:
        return (
            f"manifold torture nexus --seed {self.seed} --seconds {self.seconds:g} "
            f"--nodes {self.nodes} --voters {self.voters}"
        )


async def torture(options: Options, say: Callable[[str], None]) -> Report:
    """See the module."""
    report = Report(options.seed, options.seconds, options.nodes, options.voters)
    folder = Path(tempfile.mkdtemp(prefix="mf-"))
    run = _Run(options, folder, report, say)
    try:
        await run.course()
    finally:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the second one, too, leaves nothing
        try:
            await run.end()
        finally:
            if options.keep:
                say(f"kept: {folder}")
            else:
                shutil.rmtree(folder, ignore_errors=True)
            signal.signal(signal.SIGINT, before)
    return report


class _Run:
    """One run, and everything that has to be ended."""

    def __init__(
        self, options: Options, folder: Path, report: Report, say: Callable[[str], None]
    ) -> None:
        self.options, self.folder, self.report, self.say = options, folder, report, say
        self.name = f"torture-{os.urandom(4).hex()}"
        self.environ = dict(os.environ) | {
            "MANIFOLD_STATE_HOME": str(folder / "state"),
            # Beside the state, where that is short enough for sockets; else where it always is.
            "MANIFOLD_RUNTIME_DIR": str(folder) if len(str(folder)) <= RUNTIME_CHARS_MAX else "",
            "MANIFOLD_CLUSTER": self.name,
        }
        self.supervisor: Supervisor | None = None
        self.links: Links | None = None
        self.nemesis: Nemesis | None = None
        self.watching: asyncio.Task[None] | None = None
        self.workers: list[subprocess.Popen[bytes]] = []
        self.seen: list[Seen] = []
        self.calm_ms = 0.0  # when clients were told to end
        self.ends: list[str] = []  # what the supervisor said

    def _now_ms(self) -> float:
        return asyncio.get_running_loop().time() * 1000

    # -- the course -------------------------------------------------------------------------------

    async def course(self) -> None:
        options, report = self.options, self.report
        supervisor, links = await self._start()
        turning_ms = self._now_ms()
        await self._start_workers(turning_ms)
        begun_ms = self._now_ms()
        nemesis = self.nemesis = Nemesis(supervisor, links, options.voters, self.say)
        self.watching = asyncio.create_task(nemesis.watch())
        steps = plan(options.seed, options.seconds, options.nodes, options.voters)
        await nemesis.run(steps, begun_ms)
        self.say(str(steps[-1]))
        heal_ms = self._now_ms()
        try:
            up_ms = await nemesis.heal()
        except TimeoutError:
            up_ms = self._now_ms()
            report.failures.append("After healing not every node came up.")
        report.up_ms = up_ms - heal_ms
        await self._settle(turning_ms)
        self._collect(begun_ms)
        self._check_ends(nemesis)

    async def _start(self) -> tuple[Supervisor, Links]:
        """The nodes, and Nexus at each of them."""
        options = self.options
        supervisor = self.supervisor = await cluster.up(
            self._config(), options.nodes, self.environ, self.ends.append
        )
        if not await supervisor.converged(CONVERGE_S):
            raise Unavailable("The nodes did not find each other in time.", "Is the host busy?")
        links = self.links = Links(self.name, self.environ, sorted(supervisor.nodes))
        deadline_ms = self._now_ms() + CONVERGE_S * 1000
        for probe in self._probes("begin", links):
            while await probe.once(f"{PREFIX}begin", "read") != "ok":
                if self._now_ms() > deadline_ms:
                    raise Unavailable("Nexus does not answer in a healthy cluster.", "Try again.")
                await asyncio.sleep(AGAIN_S)
        return supervisor, links

    def _config(self) -> Config:
        """As it is packaged, whatever is in the working folder; nodes are small and fast."""
        overrides = {
            "cluster": self.name,
            "nexus.disk": "losing",
            "nexus.voters": str(self.options.voters),
        }
        kind = NodeClass("n", self.options.nodes, latency=0.0)
        return dataclasses.replace(load(None, {}, overrides), classes=(kind,))

    async def _start_workers(self, begun_ms: float) -> None:
        """Returns once each has begun."""
        assert self.links is not None
        aliases = self.links.aliases
        count = max(len(aliases), min(CLIENTS_MAX, CLIENTS_PER_NODE * len(aliases)))
        for worker in range(WORKERS):
            mine = [(n, n % len(aliases)) for n in range(worker, count, WORKERS)]
            spec = Spec(self.name, self.options.seed, aliases, mine, begun_ms)
            command = [
                sys.executable, "-P", "-m", "manifold.tools.torture.worker",
                str(self._file(worker)), msgspec.json.encode(spec).decode(),
            ]  # fmt: skip
            with (self.folder / f"worker.{worker}.log").open("wb") as log:
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=self.environ,
                    start_new_session=True,  # Ctrl-C is for us
                )  # fmt: skip
            self.workers.append(process)
        async with asyncio.timeout(CONVERGE_S):
            while any(not _size(self._file(number)) for number in range(WORKERS)):
                await asyncio.sleep(AGAIN_S)

    def _file(self, worker: int) -> Path:
        return self.folder / f"seen.{worker}"

    def _end_workers(self) -> None:
        for process in self.workers:
            assert process.stdin is not None
            process.stdin.close()
        for number, process in enumerate(self.workers):
            try:
                status = process.wait(CLIENTS_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                status = process.wait()
            said = (self.folder / f"worker.{number}.log").read_text()[-2000:]
            if status < 0:  # a crash of theirs, in a library (nng#1653), is not one of the cluster
                self.report.crashed.append(f"clients ended by signal {-status}: {said}")
            elif status:
                self.report.failures.append(f"Clients ended with {status}: {said}")

    # -- after healing ----------------------------------------------------------------------------

    def _probes(self, name: str, links: Links) -> list[Caller]:
        """A client at each node that asks what it is told to, once, and there."""
        loop = asyncio.get_running_loop()
        return [
            Caller(
                f"{name}{node}", PROBES + len(links.aliases) * len(self.seen) + node, node,
                links.aliases, Random(node), partial(ask, links), self.seen.append,
                lambda: loop.time() * 1000, 0.0, tries_max=1,
            )
            for node in range(len(links.aliases))
        ]  # fmt: skip

    async def _demand(
        self, name: str, kinds: Sequence[Kind], keys: Sequence[Sequence[str]]
    ) -> float:
        """Node n does all `kinds` to `keys[n]`, which takes so many milliseconds, or too long."""
        assert self.links is not None
        begun_ms = self._now_ms()

        async def at(probe: Caller, mine: Sequence[str]) -> None:
            for key in mine:
                for kind in kinds:
                    wanted: Kind = "add" if kind == "write" and key.endswith("count") else kind
                    while await probe.once(key, wanted) not in ("ok", "no"):
                        await asyncio.sleep(AGAIN_S)

        try:
            async with asyncio.timeout(HEALED_S), asyncio.TaskGroup() as group:
                for probe, mine in zip(self._probes(name, self.links), keys, strict=True):
                    group.create_task(at(probe, mine))
        except TimeoutError:
            self.report.failures.append(
                f"{HEALED_S:g} s after healing not every key could be {' and '.join(kinds)}."
            )
        return self._now_ms() - begun_ms

    async def _settle(self, turning_ms: float) -> None:
        """Everybody gets on again; then, when nobody writes any more, what everything is."""
        nodes = range(self.options.nodes)
        used = keys_at(self._now_ms() - turning_ms)
        cold = used.pop("cold")
        hot = [key for some in used.values() for key in some]
        self.report.healed_ms = await self._demand(
            "heal", ("read", "write"), [hot + cold[n :: self.options.nodes] for n in nodes]
        )
        self.calm_ms = self._now_ms()
        await asyncio.to_thread(self._end_workers)
        every = sorted({each.key for each in self._read()})
        await self._demand("end", ("read",), [every[n :: self.options.nodes] for n in nodes])

    # -- the verdict ------------------------------------------------------------------------------

    def _read(self) -> list[Seen]:
        return [each for n in range(WORKERS) for each in history.read(self._file(n))]

    def _collect(self, begun_ms: float) -> None:
        options, report = self.options, self.report
        assert self.nemesis is not None
        seen = history.latest([*self._read(), *self.seen])
        report.operations = Counter(each.status for each in seen if each.tries)
        report.faults = self.nemesis.faults
        verdict = judge(seen)
        report.keys = verdict.keys
        report.failures += verdict.failures
        if not report.operations["ok"]:
            report.failures.append("Not one operation succeeded: nothing was shown.")
        stalled, at_ms = stalled_ms(self.nemesis.states, seen, self.calm_ms)
        report.stalled_ms, report.stalled_at_ms = stalled, max(0.0, at_ms - begun_ms)
        if verdict.blamed:
            path = options.folder / f"torture-nexus-{options.seed}.jsonl"
            with path.open("wb") as file:
                for each in verdict.blamed:
                    history.write(file, each)
            report.history = str(path.absolute())

    def _check_ends(self, nemesis: Nemesis) -> None:
        """No node may have ended but by our hand."""
        assert self.supervisor is not None
        for line in self.ends:
            pid = line.partition("(pid ")[2].partition(")")[0]
            if pid.isdigit() and int(pid) not in nemesis.killed:
                alias = line.partition(" ")[0]
                folder = places.state_dir(self.name, alias, self.environ)
                log = [folder / each for each in ("node.log", "console.log")]
                said = "\n".join(each.read_text()[-3000:] for each in log if each.exists())
                self.report.failures.append(f"{line}, and nobody had killed it:\n{said}")
            elif not pid.isdigit() and " is back" not in line:
                self.report.failures.append(f"The supervisor said: {line}")

    # -- the end ----------------------------------------------------------------------------------

    async def end(self) -> None:
        """Nothing is left; also in the middle of the course."""
        if self.watching is not None:
            self.watching.cancel()
            await asyncio.gather(self.watching, return_exceptions=True)
        for process in self.workers:
            if process.poll() is None:
                process.kill()
                process.wait()
            if process.stdin is not None:
                process.stdin.close()
        if self.nemesis is not None:
            await self.nemesis.close()
        if self.links is not None:
            await self.links.close()
        if self.supervisor is not None:
            await self.supervisor.stop()
            left = leftovers(self.supervisor)
            if left:
                self.report.failures.append(f"Left behind: {left}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
