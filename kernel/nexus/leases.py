"""Leases: one holder at a time by the clock, and a fencing token for when clocks fail.

Interface: `acquire` keeps trying until it holds, then keeps it; `holds(key)` at the moment of use;
`resign`. What the holder does elsewhere must carry the fence: it only grows.
Invariants:
  L1  a holder relies on its lease for 0.8 TTL from when it *sent* its last successful renewal;
  L2  a contender takes a lease only after it saw one version of it for a whole TTL by its own
      clock; clocks may differ by a tenth, so with L1 two never hold at a time: 0.8/0.9 < 1/1.1;
  L3  the fence is the ballot that first proposed the grant, kept in the value.
A clock that jumps breaks L2; then only the fence protects.
Source: Gray and Cheriton, "Leases" (1989); Burrows, "Chubby" (2006) for the sequencer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from manifold.kernel.nexus.ballots import Ballot
from manifold.kernel.nexus.context import Context
from manifold.kernel.nexus.proposer import Proposer
from manifold.kernel.nexus.rounds import Operation
from manifold.kernel.nexus.values import Change, Grant, Lease, Release, Renew, Result

HELD_PART = 0.8
RENEW_PART = 0.3  # three renewals may be lost before the lease is
TRY_PART = 0.25  # a contender looks so often in a TTL
HOLDINGS_MAX = 1024


@dataclass(frozen=True, slots=True)
class LeaseLost:
    """`Notify`: this node does not hold the lease any more."""

    key: str
    holder: str
    fence: Ballot


@dataclass(slots=True)
class Holding:
    """A lease that is held here, or wanted."""

    key: str
    holder: str
    ttl_ms: float
    deadline_ms: float
    done: Callable[[Result], None]
    fence: Ballot | None = None
    until_ms: float = float("-inf")
    seen: int = -1  # the version last seen, since
    seen_ms: float = 0.0
    seen_ttl_ms: float = 0.0
    over: bool = False
    failed: Result | None = None  # the last try, where no quorum answered


class Leases:
    """See the module."""

    def __init__(self, context: Context, proposer: Proposer) -> None:
        self._context = context
        self._proposer = proposer
        self._holdings: dict[tuple[str, str], Holding] = {}

    def acquire(
        self,
        key: str,
        holder: str,
        ttl_ms: float,
        timeout_ms: float,
        done: Callable[[Result], None],
    ) -> None:
        if len(self._holdings) >= HOLDINGS_MAX or (key, holder) in self._holdings:
            done(Result("busy", strength="none"))
            return
        deadline_ms = self._context.now_ms + timeout_ms
        holding = Holding(key, holder, ttl_ms, deadline_ms, done)
        self._holdings[(key, holder)] = holding
        self._contend(holding)

    def fence(self, key: str, holder: str) -> Ballot | None:
        """The token to act with now, None where the lease is not surely held (L1)."""
        holding = self._holdings.get((key, holder))
        if holding is None or self._context.now_ms >= holding.until_ms:
            return None
        return holding.fence

    def resign(self, key: str, holder: str, done: Callable[[Result], None]) -> None:
        holding = self._holdings.pop((key, holder), None)
        if holding is None or holding.fence is None:
            done(Result("no"))
            return
        holding.over = True
        holding.until_ms = float("-inf")
        self._submit(holding, Release(holder, holding.fence), done)

    def _submit(self, holding: Holding, wish: Change, done: Callable[[Result], None]) -> None:
        op = f"{self._context.me[:18]}.{self._context.nonce}.{self._context.rid()}"
        deadline_ms = self._context.now_ms + holding.ttl_ms
        self._proposer.submit(Operation(op, holding.key, wish, deadline_ms, done))

    # -- wanted -----------------------------------------------------------------------------------

    def _contend(self, holding: Holding) -> None:
        now_ms = self._context.now_ms
        if holding.over:
            return
        if now_ms >= holding.deadline_ms:
            self._forget(holding)
            holding.done(holding.failed or Result("no"))
            return
        still = holding.seen >= 0 and now_ms - holding.seen_ms >= holding.seen_ttl_ms
        broken = holding.seen if still else 0  # L2
        wish = Grant(holding.holder, holding.ttl_ms, broken)
        self._submit(holding, wish, lambda result: self._granted(holding, now_ms, result))

    def _granted(self, holding: Holding, sent_ms: float, result: Result) -> None:
        if holding.over:
            if result.status == "ok" and result.fence is not None:  # resigned meanwhile
                self._submit(holding, Release(holding.holder, result.fence), lambda _result: None)
            return
        if result.status == "ok":
            holding.fence = result.fence
            holding.until_ms = sent_ms + HELD_PART * holding.ttl_ms  # L1
            holding.done(result)
            self._keep(holding)
            return
        holding.failed = result if result.status == "unavailable" else None
        if isinstance(result.data, Lease) and result.version != holding.seen:
            holding.seen, holding.seen_ms = result.version, self._context.now_ms
            holding.seen_ttl_ms = result.data.ttl_ms
        wait_ms = TRY_PART * holding.ttl_ms * (0.5 + self._context.random.random())
        self._context.later(wait_ms, lambda _now: self._contend(holding))

    # -- held -------------------------------------------------------------------------------------

    def _keep(self, holding: Holding) -> None:
        self._context.later(RENEW_PART * holding.ttl_ms, lambda _now: self._renew(holding))

    def _renew(self, holding: Holding) -> None:
        if holding.over or holding.fence is None:
            return
        now_ms = self._context.now_ms
        if now_ms >= holding.until_ms:
            self._lost(holding)
            return
        wish = Renew(holding.holder, holding.fence)
        self._submit(holding, wish, lambda result: self._renewed(holding, now_ms, result))
        self._keep(holding)

    def _renewed(self, holding: Holding, sent_ms: float, result: Result) -> None:
        if holding.over:
            return
        if result.status == "ok":
            holding.until_ms = max(holding.until_ms, sent_ms + HELD_PART * holding.ttl_ms)  # L1
        elif result.status == "no":
            self._lost(holding)

    def _lost(self, holding: Holding) -> None:
        assert holding.fence is not None
        self._forget(holding)
        self._context.notify(LeaseLost(holding.key, holding.holder, holding.fence))

    def _forget(self, holding: Holding) -> None:
        holding.over = True
        holding.until_ms = float("-inf")
        self._holdings.pop((holding.key, holding.holder), None)
