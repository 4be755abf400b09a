"""What the parts of one node's Nexus share: who it is, its clock, its timers, its effects.

Interface: parts call `send`, `persist`, `later` and `reply`; `Nexus` empties `take` at the end of
each event. Invariants:
  X1  an event persists at most one record, and every answer that depends on it is sent after it:
      then writes of one name reach the disk in the order in which they were decided;
  X2  numbers of requests start at random, so that an answer to a former process fits nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from random import Random

import msgspec

from manifold.kernel.effects import Effect, Notify, Persist, Reply, Send, SetTimer
from manifold.vm.kid import Kid

NONCE_BITS = 30
RID_BITS = 61  # leaves 2^61 to count upward from

CALLS_MAX = 1_000_000  # at the end of one event: more is a loop, a bug of ours

GRACE_MS = 1.0  # a local network's round trip and a half

Action = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class Timing:
    """Spans of time, each in milliseconds of the node's own clock."""

    timeout_ms: float = 20.0  # at least, where round trips are shorter; see `Pace`
    timeout_most_ms: float = 500.0
    contended_ms: float = 10_000.0  # so long after a collision a key goes to one proposer
    doubt_ms: float = 1_000.0  # so long nothing is forwarded to who did not answer, then one
    doubt_most_ms: float = 10_000.0  # operation to find out, and twice as long if that is lost
    gc_ms: float = 5_000.0  # age of a tombstone when it is collected
    poll_ms: float = 5_000.0  # of watches
    behind_ms: float = 200.0  # so long after a value was chosen who was not asked hears of it
    resume_ms: float = 5_000.0  # voters look this often for a change that was left half done


@dataclass(slots=True)
class Pace:
    """How long something takes: mean and deviation as in RFC 6298, and the timeout from them."""

    mean_ms: float
    deviation_ms: float

    def took(self, span_ms: float) -> None:
        self.deviation_ms += (abs(span_ms - self.mean_ms) - self.deviation_ms) / 4
        self.mean_ms += (span_ms - self.mean_ms) / 8

    def timeout_ms(self, timing: Timing, tries: int = 0) -> float:
        """Doubled with each try that came to nothing: else it would never learn a slower pace."""
        long_ms = (self.mean_ms + 4 * self.deviation_ms) * (1 << min(tries, 4))
        return min(max(long_ms, timing.timeout_ms), timing.timeout_most_ms)


@dataclass(slots=True)
class Context:
    """See the module."""

    me: Kid
    boot: int
    nonce: int
    random: Random
    timing: Timing
    now_ms: float = 0.0
    rounds: Pace = field(default_factory=lambda: Pace(5.0, 2.5))  # until a quorum has answered
    forwards: Pace = field(default_factory=lambda: Pace(10.0, 5.0))  # until another has proposed
    _rid: int = 0
    _sent: list[Effect] = field(default_factory=list)
    _persist: Persist | None = None
    _after: list[Effect] = field(default_factory=list)
    _soon: deque[Callable[[], None]] = field(default_factory=deque)
    _timers: list[tuple[float, int, Action]] = field(default_factory=list)
    _timer_seq: int = 0
    _armed_ms: float = float("inf")

    def __post_init__(self) -> None:
        self._rid = self.random.getrandbits(RID_BITS)

    def rid(self) -> int:
        self._rid += 1  # X2
        return self._rid

    def send(self, to: str, message: msgspec.Struct) -> None:
        self._sent.append(Send(to, message))

    def reply(self, client: int, message: msgspec.Struct) -> None:
        self._sent.append(Reply(client, message))

    def notify(self, event: object) -> None:
        self._sent.append(Notify(event))

    def persist(self, name: str, record: bytes, *then: Send) -> None:
        """Make it durable, then send."""
        assert self._persist is None, "X1"
        self._persist = Persist(name, record)
        self._after.extend(then)

    @property
    def persists(self) -> bool:
        """Whether this event persists something already."""
        return self._persist is not None

    def later(self, after_ms: float, action: Action) -> None:
        """Call `action(now_ms)` then. It has to find out itself whether it is still wanted."""
        self._timer_seq += 1
        heappush(self._timers, (self.now_ms + after_ms, self._timer_seq, action))

    def soon(self, call: Callable[[], None]) -> None:
        """Call it at the end of this event, when no part is in the middle of anything."""
        self._soon.append(call)

    def settle(self) -> None:
        """Make the calls that `soon` was asked for."""
        calls = 0
        while self._soon:
            calls += 1
            assert calls < CALLS_MAX, "parts keep calling each other"
            self._soon.popleft()()

    def due(self) -> list[Action]:
        """The timers that are due, in order."""
        actions = []
        while self._timers and self._timers[0][0] <= self.now_ms:
            actions.append(heappop(self._timers)[2])
        self._armed_ms = float("inf")
        return actions

    def take(self) -> list[Effect]:
        """All effects of this event: what depends on nothing, the timer, the record, the rest."""
        effects, self._sent = self._sent, []
        if self._timers and self._timers[0][0] < self._armed_ms:
            self._armed_ms = self._timers[0][0]
            effects.append(SetTimer(self._armed_ms))
        if self._persist is not None:
            effects.append(self._persist)
            effects += self._after
            self._persist, self._after = None, []
        return effects

    def timeout_ms(self, tries: int = 0) -> float:
        return self.rounds.timeout_ms(self.timing, tries)

    def grace_ms(self) -> float:
        """How long the last voters may be behind a quorum."""
        return max(GRACE_MS, 2 * self.rounds.deviation_ms)

    def backoff_ms(self, tries: int) -> float:
        most_ms = min(self.rounds.mean_ms * 2 ** min(tries, 5), 2 * self.timing.timeout_most_ms)
        return float(self.random.random() * most_ms)
