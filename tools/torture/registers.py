"""The clients of registers in a run: started, asked to show that all is well again, judged.

Interface: `Registers(stage, seed, per_node)`; `start` returns once each client has begun; after
healing `settle` lets every node read and write every hot key and its part of the cold ones;
once the clients have ended `collect` reads everything there is, judges it, and writes down the
history of a key that was found wrong.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from random import Random

import msgspec

from manifold.tools.simulator.linearizable import Kind
from manifold.tools.torture import history
from manifold.tools.torture.callers import Caller, keys_at
from manifold.tools.torture.history import Seen
from manifold.tools.torture.links import ask
from manifold.tools.torture.nemesis import stalled_ms
from manifold.tools.torture.stage import AGAIN_S, CONVERGE_S, Stage
from manifold.tools.torture.verdict import judge
from manifold.tools.torture.worker import Spec

WORKERS = 2  # processes of clients
CLIENTS_MAX = 16  # as many as the checker wants on one key
HEALED_S = 20.0  # once every node is up: until every key in use was read and written
PROBES = 1000  # the numbers of clients that are not those of the workers begin here


class Registers:
    """See the module."""

    def __init__(self, stage: Stage, seed: int, per_node: int) -> None:
        self._stage, self._seed, self._per_node = stage, seed, per_node
        self._nodes = stage.scene.nodes
        self._seen: list[Seen] = []
        self._turning_ms = 0.0  # keys turn from then on
        self._calm_ms = 0.0  # when clients were told to end

    async def start(self) -> None:
        stage = self._stage
        self._turning_ms = stage.now_ms()
        count = min(CLIENTS_MAX, self._per_node * self._nodes)
        count = max(self._nodes, count) if self._per_node > 1 else count
        for worker in range(WORKERS):
            mine = [(n, n % self._nodes) for n in range(worker, count, WORKERS)]
            spec = Spec(stage.name, self._seed, stage.aliases, mine, self._turning_ms)
            stage.clients(
                "manifold.tools.torture.worker", str(self._file(worker)),
                msgspec.json.encode(spec).decode(),
            )  # fmt: skip
        async with asyncio.timeout(CONVERGE_S):
            while any(not size(self._file(number)) for number in range(WORKERS)):
                await asyncio.sleep(AGAIN_S)

    def _file(self, worker: int) -> Path:
        return self._stage.folder / f"seen.{worker}"

    # -- after healing ----------------------------------------------------------------------------

    def _probes(self, name: str) -> list[Caller]:
        """A client at each node that asks what it is told to, once, and there."""
        loop = asyncio.get_running_loop()
        links = self._stage.links
        return [
            Caller(
                f"{name}{node}", PROBES + self._nodes * len(self._seen) + node, node,
                links.aliases, Random(node), partial(ask, links), self._seen.append,
                lambda: loop.time() * 1000, 0.0, tries_max=1,
            )
            for node in range(self._nodes)
        ]  # fmt: skip

    async def _demand(
        self, name: str, kinds: Sequence[Kind], keys: Sequence[Sequence[str]]
    ) -> float:
        """Node n does all `kinds` to `keys[n]`, which takes so many milliseconds, or too long."""
        begun_ms = self._stage.now_ms()

        async def at(probe: Caller, mine: Sequence[str]) -> None:
            for key in mine:
                for kind in kinds:
                    wanted: Kind = "add" if kind == "write" and key.endswith("count") else kind
                    while await probe.once(key, wanted) not in ("ok", "no"):
                        await asyncio.sleep(AGAIN_S)

        try:
            async with asyncio.timeout(HEALED_S), asyncio.TaskGroup() as group:
                for probe, mine in zip(self._probes(name), keys, strict=True):
                    group.create_task(at(probe, mine))
        except TimeoutError:
            self._stage.report.failures.append(
                f"{HEALED_S:g} s after healing not every key could be {' and '.join(kinds)}."
            )
        return self._stage.now_ms() - begun_ms

    async def settle(self) -> None:
        """Everybody gets on again."""
        used = keys_at(self._stage.now_ms() - self._turning_ms)
        cold = used.pop("cold")
        hot = [key for some in used.values() for key in some]
        self._stage.report.healed_ms = await self._demand(
            "heal", ("read", "write"), [hot + cold[n :: self._nodes] for n in range(self._nodes)]
        )
        self._calm_ms = self._stage.now_ms()

    async def read_all(self) -> None:
        """When nobody writes any more: what everything is."""
        every = sorted({each.key for each in self._read()})
        await self._demand("end", ("read",), [every[n :: self._nodes] for n in range(self._nodes)])

    # -- the verdict ------------------------------------------------------------------------------

    def _read(self) -> list[Seen]:
        return [each for n in range(WORKERS) for each in history.read(self._file(n))]

    def collect(self, begun_ms: float, path: Path) -> None:
        """Judge; `path` is where the history of a key that is to blame is written."""
        report = self._stage.report
        seen = history.latest([*self._read(), *self._seen])
        report.operations = Counter(each.status for each in seen if each.tries)
        verdict = judge(seen)
        report.keys = verdict.keys
        report.failures += verdict.failures
        if not report.operations["ok"]:
            report.failures.append("Not one operation succeeded: nothing was shown.")
        stalled, at_ms = stalled_ms(self._stage.nemesis.states, seen, self._calm_ms)
        report.stalled_ms, report.stalled_at_ms = stalled, max(0.0, at_ms - begun_ms)
        if verdict.blamed:
            with path.open("wb") as file:
                for each in verdict.blamed:
                    history.write(file, each)
            report.history = str(path.absolute())


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
