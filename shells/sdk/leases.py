"""Leases of clients: one holder at a time by the clock, and a fence for when clocks fail.

Interface: `ClientLease` of `Registers`; its coroutines run on the connection's thread, `held` and
`fence` may be read anywhere. The lease is the register `leases/NAME`, which its holder writes again
before its time is over: it ends with the client, and survives the node the client is attached to.
Invariants (as in kernel/nexus/leases.py):
  L1  a holder relies on it for 0.8 TTL from when it *sent* its last successful renewal;
  L2  a contender takes it only after it saw one version of it for a whole TTL of its own clock:
      clocks may differ by a tenth, so with L1 two never hold it at a time: 0.8 / 0.9 < 1 / 1.1;
  L3  the fence is the version that the grant made; versions of a register only grow. The register
      is never deleted, and each write expects a version, so the next one is known beforehand.
Source: Gray and Cheriton, "Leases" (1989); Burrows, "Chubby" (2006) for the sequencer.
"""

from __future__ import annotations

import asyncio
import time
from random import uniform
from typing import Annotated

import msgspec
from msgspec import Meta

from manifold.kernel.errors import ManifoldError, Maybe, Refused, Unavailable
from manifold.kernel.nexus.messages import Answer, CasVersion, Get
from manifold.shells.sdk.registers import Registers

HELD_PART = 0.8
RENEW_PART = 0.25  # three renewals may be lost before the lease is
TRY_PART = 0.25  # a contender looks so often in a TTL
TTL_MS_MIN = 100.0  # below that a busy machine loses it at random
TTL_MS_MAX = 3_600_000.0
RELEASE_S = 1.0
FOLDER = "leases/"


class Held(msgspec.Struct, frozen=True):
    """What the register holds, as JSON for people. `holder` "": nobody holds it."""

    holder: Annotated[str, Meta(max_length=64)] = ""
    ttl_ms: Annotated[float, Meta(ge=0, le=TTL_MS_MAX)] = 0.0
    fence: Annotated[int, Meta(ge=0)] = 0


_decoder = msgspec.json.Decoder(Held)


class ClientLease:
    """See the module."""

    def __init__(self, registers: Registers, name: str, ttl_ms: float) -> None:
        if not TTL_MS_MIN <= ttl_ms <= TTL_MS_MAX:
            raise ValueError(f"ttl_ms is from {TTL_MS_MIN:g} to {TTL_MS_MAX:g}; {ttl_ms} is not.")
        self.name = name
        self.fence: int | None = None
        self._key = FOLDER + name
        self._registers = registers
        self._ttl_s = ttl_ms / 1000
        self._until_s = float("-inf")
        self._version = 0
        self._mine = Held()
        self._renewing: asyncio.Task[None] | None = None

    @property
    def held(self) -> bool:
        """L1: whether to act now. The fence is for who is acted upon."""
        return time.monotonic() < self._until_s

    async def acquire(self, timeout_s: float) -> None:
        """Once it is held; `Unavailable` where somebody else has it for all that time."""
        deadline_s = time.monotonic() + timeout_s
        holder = self._registers.name()
        seen, since_s = -1, 0.0
        while True:
            answer = await self._registers.operate(self._key, Get())
            if answer.data is None:
                await self._write(0, Held(), timeout_s)
                continue
            found, now_s = _held(self._key, answer), time.monotonic()
            if answer.version != seen:
                seen, since_s = answer.version, now_s
            ours = found.holder == holder  # written by us, and not known of, or too late
            free = ours or not found.holder or now_s - since_s >= found.ttl_ms / 1000  # L2
            mine = found if ours else Held(holder, self._ttl_s * 1000, answer.version + 1)
            if free and await self._take(answer.version, mine):
                return
            if now_s >= deadline_s:
                raise Unavailable(
                    f"The lease {self.name!r} is held by {found.holder or 'somebody else'}.",
                    "Nothing was done. Wait longer, with timeout_s=.",
                )
            if not free:
                pause_s = TRY_PART * min(self._ttl_s, found.ttl_ms / 1000)
                await asyncio.sleep(pause_s * uniform(0.5, 1.5))

    async def _take(self, version: int, mine: Held) -> bool:
        until_s = time.monotonic() + HELD_PART * self._ttl_s  # L1
        if not await self._write(version, mine, self._ttl_s) or time.monotonic() >= until_s:
            return False
        self._begin(version + 1, mine, until_s)  # L3
        return True

    def _begin(self, version: int, mine: Held, until_s: float) -> None:
        self._version, self._mine, self._until_s = version, mine, until_s
        self.fence = mine.fence
        self._registers.on_stop.append(self.release)
        self._renewing = asyncio.get_running_loop().create_task(self._keep())

    async def _write(self, version: int, wanted: Held, timeout_s: float) -> bool:
        """Whether it was written; where that is not known, the next read tells."""
        change = CasVersion(version, msgspec.json.encode(wanted))
        try:
            answer = await self._registers.operate(self._key, change, timeout_s)
        except Maybe:
            return False
        return answer.status == "ok"

    async def _keep(self) -> None:
        """Renew it until it is lost."""
        while True:
            await asyncio.sleep(RENEW_PART * self._ttl_s)
            if not await self._renew_once():
                self._until_s = float("-inf")
                return

    async def _renew_once(self) -> bool:
        """False: it is somebody else's."""
        sent_s = time.monotonic()
        change = CasVersion(self._version, msgspec.json.encode(self._mine))
        try:
            answer = await self._registers.operate(self._key, change, RENEW_PART * self._ttl_s)
        except ManifoldError:
            return True  # the next one may come through in time
        if answer.status == "ok":
            self._version += 1
            self._until_s = max(self._until_s, sent_s + HELD_PART * self._ttl_s)
            return True
        if answer.data is not None and _held(self._key, answer) == self._mine:
            self._version = answer.version  # an earlier renewal has come through after all
            return True
        return False

    async def release(self) -> None:
        """Give it back; who waits for it has it at once. Nothing happens where it is lost."""
        if self._renewing is None:
            return
        self._renewing.cancel()
        self._renewing = None
        self._registers.on_stop.remove(self.release)
        held, self._until_s, self.fence = self.held, float("-inf"), None
        if held:
            try:
                await self._write(self._version, Held(), RELEASE_S)
            except ManifoldError:
                return  # it ends by itself, when its time is over


def _held(key: str, answer: Answer) -> Held:
    try:
        return _decoder.decode(answer.data if isinstance(answer.data, bytes) else b"")
    except msgspec.DecodeError as error:
        raise Refused(
            f"/{key} holds something that is no lease.", "Choose another name."
        ) from error
