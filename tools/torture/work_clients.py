"""A process of clients with work: `python -m manifold.tools.torture.work_clients FILE SPEC`.

SPEC is a `Spec` as JSON. Each client is one of the SDK, attached to a node of its own; it gives the
cluster one piece of work after the other (work.py) and appends to FILE what became of it. When
standard input ends they finish what they have under way, and then each has a piece of each kind
done at its own node: that must succeed. The process ends then, or once somebody kills it.
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from random import Random
from typing import Any

import msgspec
import uvloop

from manifold.kernel.errors import ManifoldError, Maybe, ProcessDied, Trap
from manifold.shells.sdk.client import Client
from manifold.shells.sdk.future import Future
from manifold.shells.sdk.jobs import new_job
from manifold.tools.torture.stdin import when_stdin_ends
from manifold.tools.torture.work import KINDS, Mode, Ran, Work, called, deal, piece, program

THINK_S = 0.15  # on average, between two pieces of work of a client
AWAY_S = 0.1  # before it is tried again to attach somewhere
MOVE = 0.2  # share of pieces after which a client attaches anew, to its own node first
BEGUN_S = 1.0  # a client that leaves its work gives it so long at most to begin
ENDING_S = 45.0  # after healing, for what is under way: a program waits 30 s for its globals


class Spec(msgspec.Struct, frozen=True):
    """`clients`: the number of each, and the alias of its node."""

    cluster: str
    seed: int
    aliases: list[str]
    clients: list[tuple[int, str]]


class Worker:
    """One client. `record` is given every `Ran`."""

    def __init__(self, number: int, home: str, spec: Spec, record: Callable[[Ran], None]) -> None:
        self._name, self._home, self._spec, self._record = f"w{number}", home, spec, record
        self._random = Random(f"{spec.seed} work {number}")
        self._client: Client | None = None
        self._pieces = 0
        self._stopped = asyncio.Event()

    async def run(self, stopped: asyncio.Event) -> None:
        self._stopped = stopped
        while not stopped.is_set():
            work, mode = deal(self._random, self._next())
            await self._do(work, mode)
            if self._random.random() < MOVE:
                await self._leave()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._random.uniform(0.0, 2 * THINK_S)):
                    await stopped.wait()
        await self._leave()
        for kind in KINDS:
            await self._do(piece(kind, self._random, self._next()), "closing")
        await self._leave()

    def _next(self) -> str:
        self._pieces += 1
        return f"{self._name}.{self._pieces}"

    # -- connections ------------------------------------------------------------------------------

    async def _attached(self) -> Client:
        """To our own node, or where that is away to another; waits until there is one."""
        aliases = [self._home, *self._random.sample(self._spec.aliases, 2)]
        while self._client is None:
            for alias in aliases:
                with suppress(ManifoldError):
                    self._client = await asyncio.to_thread(Client, self._spec.cluster, node=alias)
                    break
            else:
                await asyncio.sleep(AWAY_S)
        return self._client

    async def _leave(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with suppress(ManifoldError):  # its node is away: the lease of what it had ends
                await asyncio.to_thread(client.close)

    # -- work -------------------------------------------------------------------------------------

    async def _do(self, work: Work, mode: Mode) -> None:
        client = await self._attached()
        now_ms = asyncio.get_running_loop().time() * 1000
        job = new_job() if work.kind not in ("adds", "calls") else ""
        ran = Ran(self._name, client.node, job, work, mode, "begun", now_ms, now_ms)
        self._record(ran)
        told: dict[str, Any]
        try:
            async with asyncio.timeout(None) as patience:
                ending = asyncio.ensure_future(self._impatient(patience))
                try:
                    told = await self._carry_out(client, ran)
                finally:
                    ending.cancel()
        except TimeoutError:
            told = {"status": "stuck", "said": f"no end {ENDING_S:g} s after healing"}
        except CancelledError:
            told = {"status": "cancelled"}
        except Trap as trap:
            told = {"status": "trap", "result": trap.index, "said": str(trap)}
        except ManifoldError as error:
            told = {"status": error.code, "said": str(error)}
        ended_ms = asyncio.get_running_loop().time() * 1000
        self._record(msgspec.structs.replace(ran, ended_ms=ended_ms, **told))

    async def _impatient(self, patience: asyncio.Timeout) -> None:
        """Before healing there is no end to patience."""
        await self._stopped.wait()
        patience.reschedule(asyncio.get_running_loop().time() + ENDING_S)

    async def _carry_out(self, client: Client, ran: Ran) -> dict[str, Any]:
        work = ran.work
        if work.kind == "adds":
            return await asyncio.to_thread(_adds, client, work)
        if work.kind == "calls":
            futures = [client.submit(called, index, work.wait_ms) for index in _range(work)]
            return {"status": "ok", "result": await _gathered(futures)}
        match ran.mode:
            case "detached":
                await self._begun(self._start(client, ran, detach=True))
                await self._leave()
                client = await self._attached()
            case "twice":
                return await self._twice(client, ran)
            case "cancelled":
                future = self._start(client, ran)
                await asyncio.sleep(self._random.uniform(0.0, 1.0))
                future.cancel()
                return {"status": "ok", "result": await _outcome(future)}
            case "left":
                await self._begun(self._start(client, ran))
                await self._leave()
                return {"status": "left"}
        return {"status": "ok", "result": await _outcome(self._start(client, ran))}

    def _start(self, client: Client, ran: Ran, *, detach: bool = False) -> Future:
        work = ran.work
        return client.job(
            program(work), work.lo, work.hi, reduce=work.reduce, name=work.kind, job=ran.job,
            detach=detach,
        )  # fmt: skip

    async def _begun(self, future: Future) -> None:
        """Until something is known of it, or not for long."""
        deadline_s = asyncio.get_running_loop().time() + self._random.uniform(0.0, BEGUN_S)
        while not future.done() and asyncio.get_running_loop().time() < deadline_s:
            await asyncio.sleep(AWAY_S)

    async def _twice(self, client: Client, ran: Ran) -> dict[str, Any]:
        """The same job, at the same time, by another client at another node: one job."""
        other = await asyncio.to_thread(Client, self._spec.cluster)
        try:
            futures = [self._start(each, ran) for each in (client, other)]
            first, second = [await _outcome(future) for future in futures]
        finally:
            with suppress(ManifoldError):
                await asyncio.to_thread(other.close)
        if first != second:
            return {"status": "differ", "said": f"one was told {first!r}, the other {second!r}"}
        return {"status": "ok", "result": first}


async def _outcome(future: Future) -> Any:
    """Its result. One that was cancelled in the cluster is told from our being cancelled."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    future.add_done_callback(lambda _: loop.call_soon_threadsafe(ended.set))
    await ended.wait()
    return future.result()


def _range(work: Work) -> range:
    return range(work.lo, work.hi)


def _adds(client: Client, work: Work) -> dict[str, Any]:
    """In a thread: one addition after the other."""
    told, unknown = [], 0
    for _ in _range(work):
        try:
            told.append(client.globals.add(work.shared, 1))
        except Maybe:
            unknown += 1
        except ManifoldError as error:
            if error.code not in ("unavailable", "busy", "no_cluster"):  # else it was not done
                raise
    return {"status": "ok", "result": told, "open": unknown}


async def _gathered(futures: Sequence[Future]) -> list[int | None]:
    """None for a call whose process was killed."""
    found: list[int | None] = []
    for future in futures:
        try:
            found.append(await _outcome(future))
        except ProcessDied:
            found.append(None)
    return found


async def serve(path: str, spec: Spec) -> None:
    loop = asyncio.get_running_loop()
    stopped = when_stdin_ends(loop)
    with open(path, "ab", buffering=0) as file:
        encode = msgspec.json.Encoder().encode

        def record(ran: Ran) -> None:
            file.write(encode(ran) + b"\n")

        async with asyncio.TaskGroup() as group:
            for number, home in spec.clients:
                group.create_task(Worker(number, home, spec, record).run(stopped))


def main() -> None:
    faulthandler.enable()  # a crash in a library of ours must not look like one of the cluster
    uvloop.run(serve(sys.argv[1], msgspec.json.decode(sys.argv[2], type=Spec)))
    os._exit(0)  # as in worker.py


if __name__ == "__main__":
    main()
