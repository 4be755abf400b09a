"""Whom a proposal is sent to: a quorum, at first; the other voters hear of it a little later.

A voter that is not needed costs a message, a sync and an answer all the same, and its sync slows
those that are waited for where disks are shared. So an Accept goes to a quorum, ourselves among
it where we vote; whoever does not answer in time is passed over for a while, and the others are
asked. What was chosen without somebody is told him `behind_ms` later, the latest value of a key
once. Until then he knows less, as after a lost message.

Interface: `few(key, config)` says who is asked first, None for everybody; `silent(kid)` and
`heard(kid)` who is to be passed over; `chosen(…)` notes who was left out, `caught_up(key)` that
nobody is any more.
Invariants:
  T1  it only delays messages, as a network may: safety does not depend on anything here;
  T2  at most BEHIND_MAX keys are noted; the oldest is told at once to make room.
Source: Moraru et al., "There Is More Consensus in Egalitarian Parliaments" (2013), section 6.2
(thrifty); Dean and Barroso, "The Tail at Scale" (2013), hedged requests.
"""

from __future__ import annotations

from dataclasses import dataclass

from manifold.kernel import rendezvous
from manifold.kernel.nexus.ballots import Ballot
from manifold.kernel.nexus.configs import Config
from manifold.kernel.nexus.context import Context
from manifold.kernel.nexus.messages import Accept
from manifold.kernel.nexus.values import Value
from manifold.vm.kid import Kid

HEDGE_MS_MIN = 2.0  # a local round trip with two syncs, twice
BEHIND_MAX = 1024  # keys; their values are in the proposer's caches in any case
CHOICES_MAX = 16_384  # as many keys as the proposer holds registers


@dataclass(frozen=True, slots=True)
class Left:
    """Who has not been told of the latest value of a key, and what to tell."""

    kids: tuple[Kid, ...]
    epoch: int
    ballot: Ballot
    value: Value


@dataclass(slots=True)
class Passed:
    """A voter that is not asked first until then; the next time lasts `span_ms`."""

    until_ms: float
    span_ms: float


class Thrift:
    """See the module."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._passed: dict[Kid, Passed] = {}
        self._choices: dict[str, tuple[Kid, ...] | None] = {}
        self._epoch = 0
        self._behind: dict[str, Left] = {}
        self._telling = False  # a timer is set

    # -- who is asked -----------------------------------------------------------------------------

    def few(self, key: str, config: Config) -> tuple[Kid, ...] | None:
        """A quorum of `config` to ask for this key; None where everybody has to be asked."""
        if config.joint:
            return None
        if self._passed:
            now_ms = self._context.now_ms
            quick = [kid for kid in config.kids() if not self._is_passed(kid, now_ms)]
            return self._choose(key, config, quick)
        if config.epoch != self._epoch or len(self._choices) >= CHOICES_MAX:
            self._epoch = config.epoch
            self._choices.clear()
        if key not in self._choices:
            self._choices[key] = self._choose(key, config, config.kids())
        return self._choices[key]

    def _is_passed(self, kid: Kid, now_ms: float) -> bool:
        passed = self._passed.get(kid)
        return passed is not None and now_ms < passed.until_ms

    def _choose(
        self, key: str, config: Config, quick: tuple[Kid, ...] | list[Kid]
    ) -> tuple[Kid, ...] | None:
        """Ourselves, then those whose turn it is, so that all have their share of the keys."""
        left = list(quick)
        few: dict[Kid, None] = {}
        while not config.quorum(few):
            kid = self._context.me if self._context.me in left else rendezvous.first(key, left)
            if kid is None:
                return None
            left.remove(kid)
            few[kid] = None
        return tuple(few) if len(few) < len(config.new) else None

    def hedge_ms(self) -> float:
        """How long those that were asked have, before the others are asked as well."""
        rounds = self._context.rounds
        return max(HEDGE_MS_MIN, rounds.mean_ms + 4 * rounds.deviation_ms)

    def silent(self, kid: Kid) -> None:
        """It did not answer in time: others are asked first for a while, each time for longer."""
        timing, now_ms = self._context.timing, self._context.now_ms
        passed = self._passed.get(kid)
        if passed is None:
            self._passed[kid] = Passed(now_ms + timing.doubt_ms, 2 * timing.doubt_ms)
        elif now_ms >= passed.until_ms:
            passed.until_ms = now_ms + passed.span_ms
            passed.span_ms = min(2 * passed.span_ms, timing.doubt_most_ms)

    def heard(self, kid: Kid) -> None:
        """It answers, after the time for which it was passed over: it is as good as the others."""
        passed = self._passed.get(kid)
        if passed is not None and self._context.now_ms >= passed.until_ms:
            del self._passed[kid]

    # -- who was left out -------------------------------------------------------------------------

    def chosen(self, key: str, left: Left) -> None:
        """`left.value` was chosen; those in `left` have not been sent it."""
        if key not in self._behind and len(self._behind) >= BEHIND_MAX:
            self._tell(next(iter(self._behind)))  # T2
        self._behind[key] = left
        if not self._telling:
            self._telling = True
            self._context.later(self._context.timing.behind_ms, self._tell_all)

    def caught_up(self, key: str) -> None:
        self._behind.pop(key, None)

    def _tell_all(self, _now_ms: float) -> None:
        self._telling = False
        for key in list(self._behind):
            self._tell(key)

    def _tell(self, key: str) -> None:
        left = self._behind.pop(key)
        message = Accept(self._context.rid(), left.epoch, key, left.ballot, left.value, False)
        for kid in left.kids:
            self._context.send(kid, message)
