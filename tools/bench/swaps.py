"""Closed loops of compare-and-swap against Nexus and etcd alike: what `cas` and `failover` run.

Interface: a `Session` is one store as one client sees it, values being whole numbers. `swap` runs
loops on keys of their own or all on one key, for a while, and returns a `Load`. `manifold_store`
and `etcd_store` connect one process to every node of a cluster: each a connection a node, all on
one thread, which is the same for both.
Invariant: W1 a loop on a key of its own that is refused, or that finds another number than its own
last one, is a wrong answer of the store: `AssertionError`.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from manifold.kernel import places
from manifold.kernel.errors import Maybe, Unavailable
from manifold.kernel.hyperbus.door import knock
from manifold.kernel.hyperbus.driver import Bus, Incoming
from manifold.kernel.hyperbus.messages import CLIENT_PREFIX, VERSION, Hello
from manifold.kernel.messages import DECODER, Bye
from manifold.kernel.nexus.messages import Answer, ClientChange, Operate
from manifold.kernel.nexus.values import Add, CasValue, Get
from manifold.tools.bench import etcd
from manifold.tools.bench.etcd_client import Connection, connect
from manifold.tools.bench.harness import Absent, percentile

TIMEOUT_MS = 5000.0
DOOR_MS = 2000.0
VOTERS_S = 30.0  # voters are initialised when the cluster has converged: a second
POLL_S = 0.05


class Session(Protocol):
    """`Maybe` where the fate is unknown, `Unavailable` where nothing was done."""

    async def read(self, key: str) -> int | None: ...

    async def swap(self, key: str, expected: int | None, new: int) -> tuple[bool, int | None]:
        """Whether it was done; if not, what is there."""
        ...


class EtcdSession:
    """One client of one member."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def read(self, key: str) -> int | None:
        return _number((await self._connection.read(key.encode())).value)

    async def read_here(self, key: str) -> int | None:
        """What this member has, without asking the others."""
        return _number((await self._connection.read(key.encode(), serializable=True)).value)

    async def swap(self, key: str, expected: int | None, new: int) -> tuple[bool, int | None]:
        before = None if expected is None else b"%d" % expected
        done, found = await self._connection.cas(key.encode(), before, b"%d" % new)
        return done, _number(found)


def _number(data: bytes | None) -> int | None:
    return None if data is None else int(data)


class NexusSession:
    """One client of one node, over the bus of this process."""

    _count = itertools.count()

    def __init__(self, bus: Bus, node: str, timeout_ms: float = TIMEOUT_MS) -> None:
        self._bus, self._node, self._timeout_ms = bus, node, timeout_ms

    async def _operate(self, key: str, change: ClientChange) -> Answer:
        op = f"{self._bus.identity}.{next(NexusSession._count)}"
        request = Operate(op, key, change, self._timeout_ms)
        answer = await self._bus.request(self._node, request, self._timeout_ms)
        assert isinstance(answer, Answer)
        if answer.status == "maybe":
            raise Maybe("The fate of a swap is unknown.")
        if answer.status not in ("ok", "no"):
            raise Unavailable(f"Nexus answered {answer.status}: {answer.why}.")
        return answer

    async def read(self, key: str) -> int | None:
        return _whole((await self._operate(key, Get())).data)

    async def swap(self, key: str, expected: int | None, new: int) -> tuple[bool, int | None]:
        answer = await self._operate(key, CasValue(expected, new))
        return answer.status == "ok", None if answer.status == "ok" else _whole(answer.data)

    async def add(self, key: str, amount: int) -> int:
        found = _whole((await self._operate(key, Add(amount))).data)
        assert found is not None
        return found


def _whole(data: object) -> int | None:
    assert data is None or isinstance(data, int), "whoever else writes a benchmark's key?"
    return data


# --- stores -----------------------------------------------------------------------------------


@asynccontextmanager
async def etcd_store(cluster: etcd.Cluster) -> AsyncIterator[dict[str, EtcdSession]]:
    """A session a member that runs, by name."""
    connections = {
        member.name: await connect(etcd.HOST, member.port)
        for member in cluster.members
        if member.runs
    }
    try:
        yield {name: EtcdSession(each) for name, each in connections.items()}
    finally:
        for connection in connections.values():
            connection.close()


@asynccontextmanager
async def manifold_store(
    cluster: str, environ: Mapping[str, str], aliases: Sequence[str], timeout_ms: float = TIMEOUT_MS
) -> AsyncIterator[dict[str, NexusSession]]:
    """A session a node, by alias; as a client of the SDK is attached, without its thread."""
    runtime = places.runtime_path(cluster, environ)
    identity = CLIENT_PREFIX + os.urandom(8).hex()
    address = f"ipc://{runtime / ('c' + identity[2:])}"
    bus = Bus(identity, os.getpid(), cluster, DECODER, _unasked)
    nodes: dict[str, str] = {}
    try:
        bus.listen_client(address)
        hello = Hello(VERSION, cluster, identity, os.getpid(), address)
        for alias in aliases:
            welcome = await asyncio.to_thread(
                knock, f"ipc://{places.ipc_path(runtime, alias)}", hello, DOOR_MS
            )
            bus.learn(welcome.source, welcome.address)
            nodes[alias] = welcome.source
        yield {alias: NexusSession(bus, node, timeout_ms) for alias, node in nodes.items()}
    finally:
        for node in nodes.values():
            bus.send(node, Bye())
        await asyncio.sleep(0)  # one turn of the loop: the goodbyes leave
        bus.close()
        Path(address.removeprefix("ipc://") + ".c").unlink(missing_ok=True)


def _unasked(_incoming: Incoming) -> None:
    """Nothing is watched here: what comes unasked is no concern of ours."""


async def wait_agreeing(sessions: Mapping[str, Session]) -> None:
    """Until every node of the store answers a read: it has voters, or a leader."""
    ends = time.monotonic() + VOTERS_S
    for name, session in sessions.items():
        while True:
            try:
                await session.read("bench/ready")
                break
            except (Maybe, Unavailable) as error:
                if time.monotonic() > ends:
                    raise Absent(f"{name} cannot read after {VOTERS_S:g} s: {error}") from error
                await asyncio.sleep(POLL_S)


# --- loops ------------------------------------------------------------------------------------


@dataclass(slots=True)
class Load:
    """What loops did: `seconds` of each attempt, and how many were done."""

    attempts_s: list[float] = field(default_factory=list)
    done: int = 0
    unknown: int = 0  # no answer within the timeout, or an honest "maybe"
    wall_s: float = 0.0
    cpu_s: float = 0.0  # of this process: the clients

    def ms(self, percent: float) -> float:
        return percentile(self.attempts_s, percent) * 1000

    @property
    def per_s(self) -> float:
        return self.done / self.wall_s

    @property
    def client_share(self) -> float:
        """Of one core, which is what the clients' thread can have: near 1 it is the limit."""
        return self.cpu_s / self.wall_s


async def own_key(
    session: Session, key: str, number: int | None, seconds: float, load: Load
) -> None:
    """Swaps on a key that nobody else has; each must be done (W1), if its fate is known."""
    ends = time.perf_counter() + seconds
    doubt = False  # a swap of unknown fate may have been done, or be done yet
    while (began := time.perf_counter()) < ends or not load.attempts_s:
        following = (number or 0) + 1
        try:
            done, found = await session.swap(key, number, following)
        except (Maybe, Unavailable):
            doubt = True
            load.unknown += 1
        else:
            assert done or (doubt and found == following), f"W1: {key} was {number}, then {found}"
            doubt = False
            load.done += done
            number = following
        load.attempts_s.append(time.perf_counter() - began)


async def same_key(
    session: Session, key: str, number: int | None, seconds: float, load: Load
) -> None:
    """Swaps until the time is over; what is there is learnt from refusals."""
    ends = time.perf_counter() + seconds
    while (began := time.perf_counter()) < ends or not load.attempts_s:
        following = (number or 0) + 1
        try:
            done, found = await session.swap(key, number, following)
        except (Maybe, Unavailable):
            load.unknown += 1
        else:
            load.done += done
            number = following if done else found
        load.attempts_s.append(time.perf_counter() - began)


async def adding(session: NexusSession, key: str, seconds: float, load: Load) -> None:
    """Fetch-and-add, which nobody refuses."""
    ends = time.perf_counter() + seconds
    while (began := time.perf_counter()) < ends or not load.attempts_s:
        try:
            await session.add(key, 1)
        except (Maybe, Unavailable):
            load.unknown += 1
        else:
            load.done += 1
        load.attempts_s.append(time.perf_counter() - began)


async def spread(
    sessions: Sequence[Session], clients: int, key: str, seconds: float, *, one: bool
) -> Load:
    """So many loops, dealt to the sessions in turn. On one key, none of the swaps is lost."""
    load = Load()
    dealt = [sessions[n % len(sessions)] for n in range(clients)]
    keys = [key if one else f"{key}.{n}" for n in range(clients)]
    reads = (session.read(each) for session, each in zip(dealt, keys, strict=True))
    before = await asyncio.gather(*reads)
    loop = same_key if one else own_key
    with timed(load):
        await asyncio.gather(
            *(
                loop(session, each, number, seconds, load)
                for session, each, number in zip(dealt, keys, before, strict=True)
            )
        )
    if one:
        less = (await sessions[0].read(key) or 0) - (before[0] or 0) - load.done
        assert 0 <= less <= load.unknown, f"{load.done} swaps were told, {less} more were done"
    return load


async def spread_adding(
    sessions: Sequence[NexusSession], clients: int, key: str, seconds: float
) -> Load:
    """As `spread` on one key, by fetch-and-add."""
    load = Load()
    dealt = [sessions[n % len(sessions)] for n in range(clients)]
    with timed(load):
        await asyncio.gather(*(adding(session, key, seconds, load) for session in dealt))
    return load


@contextmanager
def timed(load: Load) -> Iterator[None]:
    """The time and the clients' share of it, into `load`."""
    began, cpu = time.perf_counter(), time.process_time()
    yield
    load.wall_s, load.cpu_s = time.perf_counter() - began, time.process_time() - cpu
