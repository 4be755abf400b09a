"""From suspicion to verdict: the suspect is warned, and heard before it is buried.

The middle third of the machine in protocol.py. A suspicion that runs out is no verdict yet: within
its last `ack_ms` the suspect is called once more, by this node and through relays, and each call
carries the accusation. Who gets through to it learns so and gives it its time anew; it has heard
what is held against it, and refutes. Who gets no word of any relay, and yet hears that others talk,
is not heard itself: it judges nobody, and asks again.

A hearing lies within the suspicion's time, so that a node that is gone is not found out later.

Source: Lifeguard (2018), section 4.1 for what silent relays mean, 4.2 for the timer; the hearing
is ours: one-way cuts leave an accuser that a refutation does not reach (docs/membership.md).

Invariants: M7 a verdict is given only at the end of a hearing, held within the suspicion, in which
neither the suspect nor a relay said that it lives, and not by a node that hears others and is
answered by none; V1 at most `HEARINGS_MAX` at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from manifold.kernel.config import MembershipConfig
from manifold.kernel.effects import Send
from manifold.kernel.membership import suspicion as timers
from manifold.kernel.membership.beliefs import Beliefs
from manifold.kernel.membership.messages import Ack, Gossip, Me, Ping, PingReq, State, Update
from manifold.kernel.membership.suspicion import Suspicion
from manifold.kernel.membership.table import Record
from manifold.vm.kid import Kid

WARNINGS = 4  # suspects warned by one node in each probe interval
WARNERS = 32.0  # nodes that warn a suspect in each probe interval, in the mean, besides accusers
HEARINGS_MAX = 64  # 64 * (1 + 3) messages of 200 B at once; other nodes hear other suspects
NACK_PART = 0.8  # a relay says nack after this part of the time it was given (Lifeguard 4.1)


@dataclass(slots=True)
class Hearing:
    """One suspect is called, directly and through relays, until `end_ms`."""

    seq: int
    target: Kid
    boot: int
    end_ms: float
    relays: tuple[Kid, ...]
    nacked: list[Kid] = field(default_factory=list)


class Judging(Beliefs):
    """What a suspicion leads to."""

    def __init__(
        self,
        me: Me,
        config: MembershipConfig,
        random: Random,
        *,
        incarnation: int,
        seeds: Sequence[str],
    ) -> None:
        super().__init__(me, config, random, incarnation=incarnation, seeds=seeds)
        self._hearings: dict[Kid, Hearing] = {}
        self._seq = int(random.random() * (1 << 30))  # an answer to a former process must not fit

    def _next_seq(self) -> int:
        self._seq += 1
        return self._seq

    def _relays_for(self, target: str, *, suspects: bool = False) -> tuple[Kid, ...]:
        """Those who are asked to call `target`; with `suspects`, rather these than nobody."""
        count = self.config.indirect
        drawn = self._table.draw(self._random, count, without=target, alive=True)
        if suspects and not drawn:
            drawn = self._table.draw(self._random, count, without=target)
        return tuple(record.kid for record in drawn)

    def _warn_suspects(self) -> None:
        """Tell a few of those we hold for suspect: the news of it may not have reached them.

        Without this a node whose accusations went into a partition would wait for the suspect's
        next turn in the ring, or bury it. Others than the accuser do it too, in large clusters some
        of them: a node that is seldom in reach hears of it in time to refute.
        """
        part = WARNERS / self._nodes()
        warned = [
            kid
            for kid, suspicion in self._suspicions.items()
            if self.me.kid in suspicion.accusers or self._random.random() < part
        ]
        for kid in self._random.sample(warned, min(WARNINGS, len(warned))):
            record = self._table.get(kid)
            if record is not None:
                about = self._about(record, record.boot)
                self._out.append(Send(kid, Gossip(self.me.boot, about)))

    def _hearing_ms(self) -> float:
        """Twice the usual time at the most: it is repeated where it leads to nothing."""
        return min(self.health.scale(self.config.ack_ms), 2 * self.config.ack_ms)

    def _judging_due_ms(self) -> float:
        """When `_judge` has something to do."""
        due_ms = min((hearing.end_ms for hearing in self._hearings.values()), default=math.inf)
        if len(self._hearings) >= HEARINGS_MAX:
            return due_ms
        lead_ms = self._hearing_ms()
        for kid, suspicion in self._suspicions.items():
            if kid not in self._hearings:
                due_ms = min(due_ms, suspicion.deadline_ms - lead_ms)
        return due_ms

    def _judge(self, now_ms: float) -> None:
        """Hear those whose time runs out; bury those who let it pass."""
        for kid, suspicion in list(self._suspicions.items()):
            record = self._table.get(kid)
            hearing = self._hearings.get(kid)
            if record is None:
                continue
            if hearing is not None:
                if now_ms >= hearing.end_ms:
                    self._conclude(record, suspicion, hearing, now_ms)
            elif now_ms >= suspicion.deadline_ms - self._hearing_ms():
                self._begin_hearing(record, now_ms)

    def _begin_hearing(self, record: Record, now_ms: float) -> None:
        if len(self._hearings) >= HEARINGS_MAX:
            return  # One of them will end, or somebody else hears this one.
        seq, given_ms = self._next_seq(), self._hearing_ms()
        relays = self._relays_for(record.kid, suspects=True)
        self._hearings[record.kid] = Hearing(
            seq, record.kid, record.boot, now_ms + given_ms, relays
        )
        assert len(self._hearings) <= HEARINGS_MAX, "V1"
        about = self._about(record, record.boot)
        self._out.append(Send(record.kid, Ping(seq, self.me.boot, False, about)))
        ask = PingReq(seq, self.me.boot, record.kid, given_ms * NACK_PART, about)
        self._out += [Send(relay, ask) for relay in relays]

    def _conclude(
        self, record: Record, suspicion: Suspicion, hearing: Hearing, now_ms: float
    ) -> None:
        """Nobody has reached it: a verdict, unless nobody has answered at all."""
        del self._hearings[record.kid]
        if hearing.relays and not hearing.nacked and self._hears(now_ms):
            self._begin_hearing(record, now_ms)
        elif now_ms >= suspicion.deadline_ms:  # M7
            dead = Update(record.kid, record.boot, record.incarnation, State.DEAD, self.me.kid)
            self._apply(dead, now_ms)

    def _hears(self, now_ms: float) -> bool:
        """Whether anybody has talked to us in the longest time that a suspicion takes."""
        since_ms = now_ms - timers.timeout_ms(self.config, self._nodes(), 0)
        return any(record.heard_ms > since_ms for record in self._table.records())

    def _grown(self, record: Record, by: str, now_ms: float, *, quiet: bool) -> None:
        self._hearings.pop(record.kid, None)  # what it was about is over
        super()._grown(record, by, now_ms, quiet=quiet)

    def _hearing_of(self, source: Kid, seq: int) -> Hearing | None:
        """The hearing that `source` may speak in."""
        for hearing in self._hearings.values():
            if hearing.seq == seq and (source == hearing.target or source in hearing.relays):
                return hearing
        return None

    def _testified(self, source: Kid, message: Ack, now_ms: float) -> bool:
        """Whether that answered a hearing: the suspect lives, and has its time anew."""
        hearing = self._hearing_of(source, message.seq)
        if hearing is None or message.boot < hearing.boot:
            return hearing is not None
        del self._hearings[hearing.target]
        suspicion = self._suspicions.get(hearing.target)
        if suspicion is not None:
            suspicion.renew(now_ms, self.config, self._nodes())
        return True
