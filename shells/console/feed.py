"""Looks at a cluster again and again, and tells what it saw; never blocks who listens.

Interface rules: a thread of its own. `deliver` is called on it with an `Observation` or an event;
who listens takes that to its own thread. When the node it is attached to has ended it attaches to
another; when nobody answers it says so once, and tries again until somebody does.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from manifold.kernel.errors import ManifoldError, NoCluster, Unavailable
from manifold.kernel.messages import AllJobs, AllNodes, AllProcesses, LogLines, ReadLog
from manifold.shells.console import messages as e
from manifold.shells.console.model import Observation
from manifold.shells.sdk.client import Client
from manifold.shells.sdk.connection import doors
from manifold.shells.sdk.sessions import Fate, Session, Sessions
from manifold.vm.kid import Kid
from manifold.vm.version import VERSION

LOOK_S = 1.0
QUIET_LOOK_S = 2.0  # when nothing has changed for
QUIET_AFTER_S = 30.0
RETRY_S = 0.5
ANSWER_S = 5.0  # a node that gathers from silent ones answers after 1 s
AGREEMENT_LOOKS = 10  # one look at who votes for so many at the nodes
LOG_LINES_FIRST = 100  # of each node
LOG_LINES_MAX = 500  # of each node at a time
LOG_MS = 2000.0
ATTACH_S = 1.0

Deliver = Callable[["Observation | e.Event"], None]


def clock_ms() -> int:
    """The wall clock: recordings are read on another day."""
    return time.time_ns() // 1_000_000


class Feed:
    """Of one cluster. `start`, then `stop`."""

    def __init__(self, cluster: str, environ: Mapping[str, str], deliver: Deliver) -> None:
        self.cluster = cluster
        self._environ = environ
        self._deliver = deliver
        self._wake = threading.Event()
        self._stopping = False
        self._logs = False
        self._numbers: dict[str, int] = {}
        self._ready: tuple[str, ...] = ()
        self._client: Client | None = None
        self._lost = ""
        self._seen: object = None
        self._changed_s = 0.0
        self._thread = threading.Thread(target=self._run, name="console-feed", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End it; what it waits for is given up."""
        self._stopping = True
        self._wake.set()
        client = self._client
        if client is not None:
            client.close()
        self._thread.join()

    def poke(self) -> None:
        """Look at once: something was done."""
        self._changed_s = time.monotonic()
        self._wake.set()

    def want_logs(self, wanted: bool) -> None:
        """Whether logs are read as well."""
        if wanted != self._logs:
            self._logs = wanted
            self._wake.set()

    # -- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping:
            try:
                if not doors(self.cluster, self._environ):
                    raise NoCluster(
                        f"Cluster {self.cluster!r} is not running here.",
                        "Start one: up --nodes 4 --detach",
                    )
                with Client(self.cluster, environ=self._environ) as client:
                    self._client = client
                    if not self._stopping:
                        self._serve(client)
            except ManifoldError as error:
                self._tell_lost(error)
            finally:
                self._client = None
            self._pause(RETRY_S)

    def _pause(self, seconds: float) -> None:
        self._wake.wait(seconds)
        if not self._stopping:
            self._wake.clear()

    def _tell_lost(self, error: ManifoldError) -> None:
        if self._lost != error.message and not self._stopping:
            self._lost = error.message
            self._deliver(e.Lost(clock_ms(), error.message, error.next_step, self.cluster))

    def _serve(self, client: Client) -> None:
        sessions = Sessions(client.connection)
        looks = 0
        attached = ""
        while not self._stopping:
            node, seen = client.connection.call(self._look(sessions))
            if attached != node:
                attached, self._lost = node, ""
                self._deliver(e.Attached(clock_ms(), self.cluster, node, VERSION))
            self._deliver(seen)
            if looks % AGREEMENT_LOOKS == 0:
                self._agreement(client, seen)
            looks += 1
            if self._logs:
                self._read_logs(client)
            self._pause(self._interval_s(seen))

    def _interval_s(self, seen: Observation) -> float:
        """Less often where nothing happens."""
        now_s = time.monotonic()
        summary = (
            [(n.kid, n.state, n.boot, n.load and n.load.free_slots) for n in seen.nodes or ()],
            [(job.job, job.state, job.done) for job in seen.jobs or ()],
        )
        if summary != self._seen:
            self._seen, self._changed_s = summary, now_s
        return LOOK_S if now_s - self._changed_s < QUIET_AFTER_S else QUIET_LOOK_S

    async def _look(self, sessions: Sessions) -> tuple[str, Observation]:
        deadline_s = asyncio.get_running_loop().time() + ATTACH_S
        session = await sessions.current(deadline_s)
        nodes, jobs, processes = await asyncio.gather(
            _ask(session, AllNodes()), _ask(session, AllJobs()), _ask(session, AllProcesses())
        )
        silent = dict.fromkeys((*jobs.silent, *processes.silent))
        self._ready = tuple(node.alias for node in nodes.nodes if node.state == "ready")
        return session.node.alias, Observation(
            nodes.nodes, jobs.jobs, processes.processes, tuple(sorted(silent))
        )

    def _agreement(self, client: Client, seen: Observation) -> None:
        registers = client.calls_of_globals.registers
        with contextlib.suppress(ManifoldError):  # the next look tells what is wrong, if it lasts
            info = client.connection.call(registers.nexus())
            names = {node.kid: node.alias for node in seen.nodes or ()}
            voters = tuple(sorted(names.get(Kid(kid), kid[:10]) for kid in info.voters))
            if info.known:
                self._deliver(e.Agreement(clock_ms(), info.count, voters))

    def _read_logs(self, client: Client) -> None:
        answers: list[Any] = client.connection.call(self._log_answers(client))
        streams = []
        for answer in answers:
            if isinstance(answer, LogLines):
                before = self._numbers.get(answer.alias)
                if before != answer.next:
                    self._numbers[answer.alias] = answer.next
                    streams.append([(answer.alias, line) for line in answer.lines])
        lines = tuple(merged(streams))
        if lines:
            self._deliver(e.Logged(clock_ms(), dict(self._numbers), lines))

    async def _log_answers(self, client: Client) -> list[Any]:
        asked = []
        for alias in self._ready:
            limit = LOG_LINES_MAX if alias in self._numbers else LOG_LINES_FIRST
            body = ReadLog(self._numbers.get(alias, 0), "", limit)
            asked.append(client.connection.request(body, LOG_MS, destination=alias))
        return await asyncio.gather(*asked, return_exceptions=True)


async def _ask(session: Session, body: Any) -> Any:
    answer = await session.exchange(body, ANSWER_S, patient=False)
    if isinstance(answer, Fate):
        silent = answer is Fate.SILENT
        raise Unavailable(
            f"Node {session.node.alias} {'does not answer' if silent else 'has ended'}; "
            "looking for another."
        )
    return answer


def merged(streams: list[list[tuple[str, str]]]) -> list[tuple[str, str]]:
    """Lines of several nodes in order of time; what continues a line stays behind it."""
    keyed = []
    for stream in streams:
        moment = ""
        found = []
        for alias, line in stream:
            moment = line[:24] if line[23:24] == "Z" else moment
            found.append((moment, alias, line))
        keyed.append(found)
    return [(alias, line) for _, alias, line in heapq.merge(*keyed, key=lambda each: each[0])]
