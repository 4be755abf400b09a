"""Logs of nodes, merged in order of time and followed.

Interface: `Logs.more()` gives the lines that have come since it was asked last (at first those that
there are), each with the alias of its node. Nodes are asked at the same time. One that does not
answer is told of once and asked again after `LOOK_S`; nodes that join are found as soon.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import Callable, Iterable

from manifold.kernel import messages as m
from manifold.kernel.errors import ManifoldError, Maybe, Unavailable
from manifold.shells.sdk.client import Client

ANSWER_MS = 3000.0  # beyond the 2 s after which a connection asks whether its own node lives
LOOK_S = 5.0

Entry = tuple[str, str]  # alias, line
Warn = Callable[[str], None]


def silent_warning(warn: Warn, aliases: Iterable[str]) -> None:
    """Say which nodes have not answered, where there are any."""
    names = ", ".join(aliases)
    if names:
        warn(f"no answer from {names}")


class Logs:
    """Of one node, which must be there, or of all."""

    def __init__(
        self,
        client: Client,
        node: str = "",
        *,
        contains: str = "",
        lines: int = m.LOG_LINES_MAX,
        warn: Warn = lambda sentence: None,
    ) -> None:
        self._client = client
        self._node = node
        self._contains = contains
        self._lines = min(max(lines, 1), m.LOG_LINES_MAX)
        self._warn = warn
        self._after: dict[str, int] = {}
        self._silent: set[str] = set()  # told of
        self._aliases: list[str] = [node] if node else []
        self._looked_s = -LOOK_S

    def more(self) -> list[Entry]:
        """See the module. Of a named node an error is raised; of all, they are told of."""
        if not self._node and time.monotonic() - self._looked_s >= LOOK_S:
            nodes = self._client.nodes()
            asked = self._aliases = [n.alias for n in nodes if n.state in ("ready", "suspect")]
            self._looked_s = time.monotonic()
        else:
            asked = [alias for alias in self._aliases if alias not in self._silent]
        streams = []
        for alias, answer in self._client.connection.call(self._ask(asked)):
            if isinstance(answer, m.LogLines):
                self._silent.discard(alias)
                if answer.next != self._after.get(alias):
                    streams.append([(alias, line) for line in answer.lines])
                self._after[alias] = answer.next
            elif self._node or not isinstance(answer, ManifoldError):
                raise answer
            elif alias not in self._silent:
                self._silent.add(alias)
                silent_warning(self._warn, [alias])
        # Lines start with their time, so merging what is ordered orders everything; a line that
        # continues another starts with blanks and must stay behind it.
        return list(heapq.merge(*streams, key=_time))

    def _question(self, alias: str) -> m.ReadLog:
        """`lines` bounds what is there already; of what comes, nothing is left out."""
        after = self._after.get(alias)
        if after is None:
            return m.ReadLog(0, self._contains, self._lines)
        return m.ReadLog(after, self._contains)

    async def _ask(self, aliases: list[str]) -> list[tuple[str, m.LogLines | BaseException]]:
        request = self._client.connection.request
        answers = await asyncio.gather(
            *(request(self._question(alias), ANSWER_MS, alias) for alias in aliases),
            return_exceptions=True,
        )
        return [(alias, _plain(alias, each)) for alias, each in zip(aliases, answers, strict=True)]


def _plain(alias: str, answer: m.LogLines | BaseException) -> m.LogLines | BaseException:
    """A question whose fate is unknown has changed nothing."""
    if isinstance(answer, Maybe | Unavailable):
        return silent(alias)
    return answer


def silent(alias: str) -> Unavailable:
    """A node that does not answer."""
    return Unavailable(
        f"{alias} does not answer.",
        f"`manifold cat /nodes/{alias}/state` says how the others see it.",
    )


def _time(entry: Entry) -> str:
    return entry[1][:24]
