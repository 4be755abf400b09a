"""What the tree asks a cluster, and how: each question in one place, each answer or a plain error.

Interface: a `Source` is a client with what reads have in common. Nothing is kept between two
questions: every read is of now. A node that does not answer is named.
"""

from __future__ import annotations

import json
import re
from typing import Any

from manifold.kernel import messages as m
from manifold.kernel.errors import Maybe, NotFound, Unavailable
from manifold.kernel.geode.messages import Decision
from manifold.kernel.scheduler.messages import FetchResult, JobStatus, ResultPart
from manifold.shells.namespace.logs import ANSWER_MS, Logs, Warn, silent, silent_warning
from manifold.shells.namespace.tables import processes
from manifold.shells.sdk.client import Client
from manifold.shells.sdk.globals_calls import Reading
from manifold.vm.runtime.results import Partial

JOB_ID = re.compile(r"J-[0-9a-f]{16}\Z")


class Source:
    """`warn` is called with one sentence where a part of an answer is missing."""

    def __init__(self, client: Client, stale: bool, timeout_s: float, warn: Warn) -> None:
        self.client = client
        self.stale = stale
        self.timeout_s = timeout_s
        self.warn = warn

    # -- nodes ------------------------------------------------------------------------------------

    def node(self, alias: str) -> m.NodeInfo:
        """One node, as it sees itself."""
        found: m.NodeInfo = self._ask(alias, m.GetNode())
        return found

    def seen(self, alias: str) -> m.NodeInfo:
        """One node as the others see it: also one that is silent."""
        for node in self.client.nodes():
            if node.alias == alias:
                return node
        raise NotFound(f"There is no node {alias}.", "`manifold ls /nodes` lists them.")

    def inventory(self, alias: str) -> Any:
        """What the host of a node is."""
        answer: m.InventoryText = self._ask(alias, m.GetInventory())
        return json.loads(answer.json)

    def _ask(self, alias: str, body: Any) -> Any:
        request = self.client.connection.request(body, ANSWER_MS, alias)
        try:
            return self.client.connection.call(request)
        except (Unavailable, Maybe) as error:  # a question changes nothing
            raise silent(alias) from error

    # -- work -------------------------------------------------------------------------------------

    def jobs(self) -> tuple[JobStatus, ...]:
        """Those that live nodes own or remember."""
        found = self.client.jobs()
        silent_warning(self.warn, found.silent)
        return found.jobs

    def job(self, job: str) -> JobStatus:
        """One of them."""
        if not JOB_ID.match(job):
            raise NotFound(f"There is no job {job}.", "`manifold ls /jobs` lists them.")
        return self.client.status(job)

    def why(self, job: str) -> tuple[Decision, ...]:
        """How its shards were placed."""
        return self.client.why(job)

    def results(self, status: JobStatus, *, first: bool = False) -> list[Partial] | None:
        """What its blocks left; None where it is not done, or was made of Python calls.

        `first`: of a large result one part, to see what it is.
        """
        if status.state != "done":
            return None
        found = list(status.results or ())
        while len(found) < status.parts:
            part = self.client.ask(FetchResult(status.job, len(found)))
            if not isinstance(part, ResultPart) or not part.results:
                return None  # it is not held any more
            found += part.results
            if first:
                break
        numbers = [each for each in found if isinstance(each, Partial)]
        return numbers if len(numbers) == len(found) else None

    def processes(self) -> dict[str, m.Process]:
        """By id."""
        return processes(self.client, self.warn)

    def process(self, name: str) -> m.Process:
        """One of them."""
        found = self.processes().get(name)
        if found is None:
            raise NotFound(f"There is no process {name}.", "`manifold ls /proc` lists them.")
        return found

    # -- registers --------------------------------------------------------------------------------

    def keys(self, prefix: str) -> list[str]:
        """Keys of registers, perhaps some that were deleted since."""
        calls = self.client.calls_of_globals
        found, _ = self.client.connection.call(
            calls.registers.keys(prefix, self.timeout_s, stale=self.stale)
        )
        return found

    def readings(self, prefix: str) -> list[tuple[str, Reading]]:
        """Registers that are there, with what they hold."""
        calls = self.client.calls_of_globals
        found, _ = self.client.connection.call(calls.items(prefix, self.timeout_s, self.stale))
        return found

    def reading(self, key: str) -> Reading:
        """One of them."""
        calls = self.client.calls_of_globals
        return self.client.connection.call(calls.read(key, self.timeout_s, self.stale))

    def alias_of(self, kid: str) -> str:
        """Of a node."""
        registers = self.client.calls_of_globals.registers
        return self.client.connection.call(registers.names_of([kid]))[0]

    # -- logs -------------------------------------------------------------------------------------

    def logs(self, node: str, lines: int) -> Logs:
        """Of one node, or of all."""
        return Logs(self.client, node, lines=lines, warn=self.warn)
