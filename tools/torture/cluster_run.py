"""`manifold torture cluster`: a private cluster that works, a nemesis that mixes every fault.

Interface: `torture_cluster(options, say)` runs everything and returns a `ClusterReport`; what is
said in stage.py holds. What went wrong is written down where `options.folder` says: the history of
a register as in run.py, all pieces of work in `torture-cluster-SEED.work.jsonl`.
Course: start nodes; start clients of registers (callers.py) and clients with work (work.py), in
processes of their own; let the nemesis carry out its plan; heal; within HEALED_S every register in
use must be read and written everywhere, and within WORK_S each client must have had a piece of work
of each kind; within IDLE_S no node may have a job or a busy worker any more; judge.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec

from manifold.kernel import messages as m
from manifold.kernel.errors import ManifoldError
from manifold.kernel.nexus.values import Get
from manifold.tools.torture.cluster_plan import plan
from manifold.tools.torture.links import operate
from manifold.tools.torture.registers import Registers, size
from manifold.tools.torture.report import ClusterReport, Options
from manifold.tools.torture.stage import AGAIN_S, CONVERGE_S, Scene, Stage, staged
from manifold.tools.torture.work import Ran
from manifold.tools.torture.work_clients import ENDING_S, Spec
from manifold.tools.torture.work_verdict import effects, judge_work, latest

WORKERS = 2  # processes of clients with work
CLIENTS_MAX = 8  # with work
CORES = 2  # of a node: a program that waits for a global does not keep others waiting
WORK_S = (
    45.0  # nine pieces of work at each client, one after the other; the longest takes 2 s alone
)
# A job that was taken over ends 30 s after anybody has asked for it, and is looked at each second.
IDLE_S = 45.0
ASK_MS = 2000.0
READ_S = 30.0  # for the final value of each counter


async def torture_cluster(options: Options, say: Callable[[str], None]) -> ClusterReport:
    """See the module."""
    report = ClusterReport(options.seed, options.seconds, options.nodes, options.voters)
    scene = Scene(options.nodes, options.voters, CORES, keep=options.keep)
    async with staged(scene, report, say) as stage:
        await stage.up()
        run = _Run(options, stage, report)
        await run.course()
    return report


class _Run:
    def __init__(self, options: Options, stage: Stage, report: ClusterReport) -> None:
        self._options, self._stage, self._report = options, stage, report
        self._registers = Registers(stage, options.seed, per_node=1)
        self._workers = min(CLIENTS_MAX, options.nodes)

    async def course(self) -> None:
        options, stage = self._options, self._stage
        await self._registers.start()
        await self._start_work()
        begun_ms = stage.now_ms()
        steps = plan(options.seed, options.seconds, options.nodes, options.voters)
        await stage.attack(steps, begun_ms)
        await stage.heal(steps[-1])
        up_ms = stage.now_ms()
        ending = asyncio.create_task(asyncio.to_thread(stage.end_clients, ENDING_S + WORK_S))
        await self._registers.settle()
        await ending
        ended_ms = stage.now_ms()
        self._report.work_ms = ended_ms - up_ms
        await self._wait_idle()
        self._report.idle_ms = stage.now_ms() - ended_ms
        await self._registers.read_all()
        await self._judge_work()
        name = f"torture-cluster-{options.seed}"
        self._registers.collect(begun_ms, options.folder / f"{name}.jsonl")
        stage.check_ends()

    # -- clients with work ------------------------------------------------------------------------

    async def _start_work(self) -> None:
        """Returns once each process has begun."""
        stage = self._stage
        aliases = stage.aliases
        for process in range(WORKERS):
            mine = [(n, aliases[n % len(aliases)]) for n in range(process, self._workers, WORKERS)]
            spec = Spec(stage.name, self._options.seed, aliases, mine)
            stage.clients(
                "manifold.tools.torture.work_clients", str(self._file(process)),
                msgspec.json.encode(spec).decode(),
            )  # fmt: skip
        async with asyncio.timeout(CONVERGE_S):
            while any(not size(self._file(each)) for each in range(min(WORKERS, self._workers))):
                await asyncio.sleep(AGAIN_S)

    def _file(self, process: int) -> Path:
        return self._stage.folder / f"work.{process}"

    def _read(self) -> list[Ran]:
        decoder = msgspec.json.Decoder(Ran)
        found = []
        for process in range(WORKERS):
            path = self._file(process)
            lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
            found += [decoder.decode(line) for line in lines]
        return latest(found)

    # -- after healing ----------------------------------------------------------------------------

    async def _wait_idle(self) -> None:
        """Until nothing runs anywhere: neither what was abandoned nor what was taken over."""
        busy: list[str] = ["nobody was asked"]
        try:
            async with asyncio.timeout(IDLE_S):
                while busy:
                    busy = await self._busy()
                    await asyncio.sleep(AGAIN_S)
        except TimeoutError:
            self._report.failures.append(
                f"{IDLE_S:g} s after the last client had left there was still: {', '.join(busy)}."
            )

    async def _busy(self) -> list[str]:
        links = self._stage.links
        try:
            jobs = await links.ask(0, m.AllJobs(), ASK_MS)
            processes = await links.ask(0, m.AllProcesses(), ASK_MS)
        except ManifoldError as error:
            return [str(error)]
        found = [
            f"{job.job} ({job.name or job.program})" for job in jobs.jobs if job.state == "running"
        ]
        found += [
            f"process {each.pid} of {each.node} on {each.job}"
            for each in processes.processes
            if each.job
        ]
        return found + [f"{alias}, which is silent" for alias in (*jobs.silent, *processes.silent)]

    async def _judge_work(self) -> None:
        report = self._report
        ran = self._read()
        report.jobs = Counter(each.status for each in ran)
        report.kinds = Counter(each.work.kind for each in ran)
        report.effects = effects(ran)
        counters = await self._counters(ran)
        killed = self._stage.nemesis.faults["killed workers"] > 0
        failures = judge_work(
            ran, counters, clients=self._workers, workers_killed=killed,
            crashed=bool(report.crashed),
        )  # fmt: skip
        report.failures += failures
        if failures:
            path = self._options.folder / f"torture-cluster-{report.seed}.work.jsonl"
            path.write_bytes(b"".join(msgspec.json.encode(each) + b"\n" for each in ran))
            report.work = str(path.absolute())

    async def _counters(self, ran: list[Ran]) -> dict[str, int]:
        """What each counter holds in the end; absent is 0."""
        names = sorted({name for e in ran for name in (e.work.own, e.work.shared) if name})
        found: dict[str, int] = {}
        nodes = self._options.nodes
        async with asyncio.timeout(READ_S):
            for number, name in enumerate(names):
                answer = None
                while answer is None:
                    answer = await operate(
                        self._stage.links, number % nodes, f"globals/{name}", Get()
                    )
                data = answer.data
                assert data is None or isinstance(data, int), f"nobody has written {data!r}"
                found[name] = data or 0
        return found
