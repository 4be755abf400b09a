"""Whom a proposal is sent to: a quorum, at first; the other voters hear of it a little later.

A voter that is not needed costs a message, a sync and an answer all the same, and its sync slows
those that are waited for where disks are shared. So an Accept goes to a quorum, ourselves among
it where we vote; whoever does not answer in time is passed over for a while, and the others are
asked. What was chosen without somebody is told him `behind_ms` later, the latest value of a key
once. Until then he knows less, as after a lost message.

Now and then a round asks everybody, so that it is known how fast each of them is.

Interface: `few(key, config)` says who is asked first, None for everybody, and `begun(rid)` which
round that was; `silent(kid)`, `heard(kid, took_ms)` and `heard_late(kid, rid)` tell who is to be
passed over, `ended(…)` who is late in a round; `chosen(…)` notes who was left out,
`caught_up(key)` that nobody is any more.
Invariants:
  T1  it only delays messages, as a network may: safety does not depend on anything here;
  T2  at most BEHIND_MAX keys are noted; the oldest is told at once to make room. At most TELL_MAX
      are told in one event, so that a peer's queue takes them.
Source: Moraru et al., "There Is More Consensus in Egalitarian Parliaments" (2013), section 6.2
(thrifty); Dean and Barroso, "The Tail at Scale" (2013), hedged requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from manifold.kernel import rendezvous
from manifold.kernel.nexus.ballots import Ballot
from manifold.kernel.nexus.configs import Config
from manifold.kernel.nexus.context import Context, Pace
from manifold.kernel.nexus.messages import Accept
from manifold.kernel.nexus.values import Value
from manifold.vm.kid import Kid

HEDGE_MS_MIN = 2.0  # a local round trip with two syncs, twice
LATE_MS = 50.0  # without one answer in time: a stall of a busy machine is shorter
PROBE_MS = 1000.0  # a round to everybody so often, while there are rounds
BEHIND_MAX = 256  # keys; a value has at most 165 KiB: 42 MiB
TELL_MAX = 32  # keys in one event: 5.3 MiB of the 8 MiB that a peer's queue takes
TELL_GAP_MS = 5.0  # between two such events; the queue has left by then
ENDED_MAX = 1024  # rounds of 64 keys, 16 of each
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
        self._paces: dict[Kid, Pace] = {}  # of those that were asked first
        self._late_ms: dict[Kid, float] = {}  # since when no answer of theirs came in time
        self._probe_at_ms = float("-inf")
        self._probes = False  # the round that begins asks everybody, to see
        self._probe = 0  # the number of such a round
        self._ended: dict[int, tuple[float, tuple[Kid, ...]]] = {}  # when they began, who is late
        self._choices: dict[str, tuple[Kid, ...] | None] = {}
        self._epoch = 0
        self._behind: dict[str, Left] = {}
        self._telling = False  # a timer is set

    # -- who is asked -----------------------------------------------------------------------------

    def few(self, key: str, config: Config) -> tuple[Kid, ...] | None:
        """A quorum of `config` to ask for this key; None where everybody has to be asked."""
        if config.joint:
            return None
        if config.epoch != self._epoch:
            self._epoch = config.epoch
            self._choices.clear()
            self._passed.clear()
            self._late_ms.clear()
            self._paces.clear()
            self._probe_at_ms = float("-inf")
        if self._context.now_ms >= self._probe_at_ms:
            self._probe_at_ms = self._context.now_ms + PROBE_MS
            self._probes = True
            return None
        if self._passed:
            now_ms = self._context.now_ms
            quick = [kid for kid in config.kids() if not self._is_passed(kid, now_ms)]
            return self._choose(key, config, quick)
        if len(self._choices) >= CHOICES_MAX:
            self._choices.clear()
        if key not in self._choices:
            self._choices[key] = self._choose(key, config, config.kids())
        return self._choices[key]

    def begun(self, rid: int) -> None:
        """The round that `few` was asked for has this number."""
        if self._probes:
            self._probes, self._probe = False, rid

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
        """How long those that were asked have, before the others are asked as well: what the
        fastest voter needs, so that a slow one is noticed however long it has been slow."""
        paces = self._paces.values() or (self._context.rounds,)
        return max(HEDGE_MS_MIN, min(pace.mean_ms + 4 * pace.deviation_ms for pace in paces))

    def silent(self, kid: Kid) -> None:
        """It did not answer in time. Where that goes on others are asked first for a while, each
        time for longer; a single stall is one of the machine, and of all."""
        timing, now_ms = self._context.timing, self._context.now_ms
        if now_ms - self._late_ms.setdefault(kid, now_ms) < LATE_MS:
            return
        passed = self._passed.get(kid)
        if passed is None:
            self._passed[kid] = Passed(now_ms + timing.doubt_ms, 2 * timing.doubt_ms)
        elif now_ms >= passed.until_ms:
            passed.until_ms = now_ms + passed.span_ms
            passed.span_ms = min(2 * passed.span_ms, timing.doubt_most_ms)

    def heard(self, kid: Kid, took_ms: float) -> None:
        """It was asked first, and has answered: after the time for which it was passed over it is
        as good as the others."""
        if kid == self._context.me:
            return
        self._late_ms.pop(kid, None)
        self._took(kid, took_ms)
        passed = self._passed.get(kid)
        if passed is not None and self._context.now_ms >= passed.until_ms:
            del self._passed[kid]

    def _took(self, kid: Kid, took_ms: float) -> None:
        pace = self._paces.get(kid)
        if pace is None:
            self._paces[kid] = Pace(took_ms, took_ms / 2)
        else:
            pace.took(took_ms)

    def ended(self, rid: int, began_ms: float, late: tuple[Kid, ...]) -> None:
        """A round is over without those who were asked first and have not answered."""
        if len(self._ended) >= ENDED_MAX:
            del self._ended[next(iter(self._ended))]
        self._ended[rid] = (began_ms, late)

    def heard_late(self, kid: Kid, rid: int) -> None:
        """It has answered a round that was over, or after others were asked."""
        began_ms, late = self._ended.get(rid, (0.0, ()))
        if kid not in late:
            return
        took_ms = self._context.now_ms - began_ms
        if rid == self._probe:
            self.heard(kid, took_ms)
        else:
            self._took(kid, took_ms)  # else only those would count that were quick

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
        for key in list(islice(self._behind, TELL_MAX)):
            self._tell(key)
        self._telling = bool(self._behind)
        if self._telling:
            self._context.later(TELL_GAP_MS, self._tell_all)

    def _tell(self, key: str) -> None:
        left = self._behind.pop(key)
        message = Accept(self._context.rid(), left.epoch, key, left.ballot, left.value, False)
        for kid in left.kids:
            self._context.send(kid, message)
