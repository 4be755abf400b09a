"""SWIM with Lifeguard's extensions as a pure state machine. Advisory: no quorum derives from it.

Interface: `start` once, then `receive` and `tick`; each returns effects in order. `Send(to=kid)`
goes to a node whose addresses were told by `MemberChanged`, `Send(to=address)` to a seed whose
KID is not known yet. `Persist("incarnation")` may be repeated with the same record; a driver
that finds it durable already has nothing to do.

Sources: Das, Gupta, Motivala, "SWIM" (2002); Dadgar et al., "Lifeguard" (2018); constants of
memberlist's LAN profile. Differences: identity is (kid, boot); a full exchange is also tried with
one of the dead now and then, so that a healed partition is found; fresh news leaves at once;
a node that finds its own clock late gives no verdict (`_lagged`).

Invariants, asserted by number here or in the part named, and from outside by
tools/simulator/membership.py:
  M1  our incarnation only grows, and only we raise it;
  M2  no message that claims our incarnation leaves before it is durable: until an answer proves
      that, each list with a Send has the Persist before it;
  M3  what is believed of a node only grows (table T1), so dead(i) yields only to a later
      incarnation of that node (T2);
  M4  an accusation is made only after a probe failed directly and by every relay, in full time;
  M5  a late event loop accuses nobody;
  M6  everything is bounded: members, news, relays, open requests, messages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import msgspec

from manifold.kernel.config import MembershipConfig
from manifold.kernel.effects import Effect, Notify, Persist, Plane, Send, SetTimer
from manifold.kernel.membership.beliefs import ENDED_ESCALATIONS
from manifold.kernel.membership.judging import NACK_PART, Judging
from manifold.kernel.membership.messages import (
    COUNTER_MAX,
    PART_UPDATES,
    Ack,
    Gossip,
    IncarnationRecord,
    Leave,
    Me,
    Member,
    Message,
    Nack,
    Ping,
    PingReq,
    PushPull,
    State,
    Update,
)
from manifold.kernel.membership.probing import (
    RELAYS_MAX,
    Probe,
    Relay,
    smooth_rtt,
)
from manifold.vm.kid import Kid

REQUESTS_MAX = 64  # full exchanges whose answer is awaited
ENDED_MAX = 256  # processes of this host whose end was reported
RECONNECT_PROBES = 10  # one of the dead is tried each 10 probe intervals, over the cluster
LEAVE_FAN_OUT = 8  # told directly of our leaving; gossip does the rest
LAG_PART = 0.25  # lag below this part of `lag_ms` is every busy loop's
LARGE_CLUSTER = 32  # above, full exchanges are made more rarely


class Membership(Judging):
    """Who is there, as seen by one node. `incarnation` is the one saved last (0: none)."""

    def __init__(
        self,
        me: Me,
        config: MembershipConfig,
        random: Random,
        *,
        incarnation: int,
        seeds: Sequence[str],
        known: Sequence[Update] = (),
    ) -> None:
        super().__init__(me, config, random, incarnation=incarnation, seeds=seeds)
        self._proven = incarnation
        self._known = tuple(known)
        self._probe: Probe | None = None
        self._relays: dict[int, Relay] = {}
        self._requests: dict[int, tuple[int, str]] = {}  # seq -> (incarnation, seed or "")
        self._first_seq = -1
        self._probe_due_ms = math.inf
        self._exchange_due_ms = math.inf
        self._reconnect_due_ms = math.inf
        self._armed_ms = math.inf

    # What the driver calls.

    def start(self, now_ms: float) -> list[Effect]:
        """Make our incarnation durable, then look for the cluster."""
        assert not self._running, "a machine starts once"
        self._running = True
        self._since_ms = now_ms
        for update in self._known:
            if update.state == State.ALIVE:  # the rest of a snapshot may be refuted long since
                self._apply(update, now_ms, quiet=True)
        self._seeds.start(now_ms)
        self._probe_due_ms = now_ms + self.config.probe_ms * self._random.random()
        self._exchange_due_ms = now_ms + self._exchange_ms() * (0.5 + self._random.random() / 2)
        self._reconnect_due_ms = now_ms + self._reconnect_ms() * self._random.random()
        self._join(now_ms)
        return self._finish(now_ms, ticked=True, persist=True)

    def receive(self, source: Kid, message: Message, now_ms: float) -> list[Effect]:
        if not self._running:
            return []
        self._enter(now_ms)
        record = self._table.get(source)
        if record is not None:
            record.heard_ms = now_ms
        if source == self.me.kid:
            if isinstance(message, PushPull):
                self._seeds.is_us(message.via)
            return self._finish(now_ms)
        match message:
            case Ping():
                self._hear(source, message.boot, message.updates, now_ms)
                plane = Plane.DATA if message.data else Plane.CONTROL
                news = self._packet(source, message.boot)
                self._out.append(Send(source, Ack(message.seq, self.me.boot, news), plane))
            case Ack():
                self._apply_all(message.updates, now_ms, source=source)
                self._acknowledged(source, message, now_ms)
            case Nack():
                self._apply_all(message.updates, now_ms, source=source)
                self._nacked(source, message.seq)
            case PingReq():
                self._hear(source, message.boot, message.updates, now_ms)
                self._relay(source, message, now_ms)
            case Gossip():
                self._hear(source, message.boot, message.updates, now_ms)
                self._contradict(source, message.boot, now_ms)
            case PushPull():
                self._exchanged(source, message, now_ms)
            case Leave():
                gone = Update(source, message.boot, message.incarnation, State.LEFT)
                self._apply(gone, now_ms)
        return self._finish(now_ms)

    def tick(self, now_ms: float) -> list[Effect]:
        if not self._running:
            return []
        self._enter(now_ms)
        if self.state == State.ALIVE:
            self._judge(now_ms)
            self._probe_step(now_ms)
            self._relay_step(now_ms)
            self._join(now_ms)
            self._exchange_step(now_ms)
        self._gossip_step(now_ms)
        return self._finish(now_ms, ticked=True)

    def relabel(self, labels: tuple[str, ...], now_ms: float) -> list[Effect]:
        """We have other labels: a higher incarnation carries the new description everywhere."""
        self.me = replace(self.me, labels=labels)
        self._meta = msgspec.structs.replace(self.me.meta, version=self._meta.version + 1)
        self._members = None
        if not self._running or self.state != State.ALIVE:
            return []
        self.incarnation = min(COUNTER_MAX, self.incarnation + 1)
        self._tell(self._myself(), now_ms)
        return self._finish(now_ms, persist=True)

    def leave(self, now_ms: float) -> list[Effect]:
        """Tell that we go. Afterwards only the news of it is passed on."""
        if not self._running or self.state == State.LEFT:
            return []
        self.state, self._since_ms, self._members = State.LEFT, now_ms, None
        self._probe = None
        self._suspicions.clear()
        self._hearings.clear()
        self._relays.clear()
        for record in self._table.draw(self._random, LEAVE_FAN_OUT):
            self._out.append(Send(record.kid, Leave(self.me.boot, self.incarnation)))
        self._tell(self._myself(), now_ms)
        return self._finish(now_ms)

    def process_ended(self, kid: Kid, boot: int, now_ms: float) -> list[Effect]:
        """This host saw process `boot` of `kid` end: it is dead at once, and so it is told."""
        if not self._running or kid == self.me.kid:
            return []
        if kid not in self._ended and len(self._ended) >= ENDED_MAX:
            del self._ended[next(iter(self._ended))]
        self._ended[kid] = (boot, ENDED_ESCALATIONS)
        record = self._table.get(kid)
        incarnation = record.incarnation if record is not None and record.boot == boot else 0
        self._apply(Update(kid, boot, incarnation, State.DEAD, self.me.kid), now_ms)
        return self._finish(now_ms)

    def loop_lag(self, lag_ms: float, now_ms: float) -> list[Effect]:
        """Our own event loop was late by `lag_ms`; a little is not worth telling."""
        if not self._running or lag_ms < self.config.lag_ms * LAG_PART:
            return []
        self._lagged(lag_ms, now_ms)
        return self._finish(now_ms)

    def members(self) -> tuple[Member, ...]:
        """Everyone that can be described, this node included, the dead included; by KID."""
        if self._members is None:
            rows = [r.member() for r in self._table.records() if r.meta is not None]
            me = self.me
            meta, since_ms = self._meta, self._since_ms
            rows.append(Member(me.kid, me.boot, self.incarnation, self.state, meta, since_ms, 0.0))
            self._members = tuple(sorted(rows, key=lambda member: member.kid))
        return self._members

    def get(self, kid: Kid) -> Member | None:
        if kid == self.me.kid:
            return next(member for member in self.members() if member.kid == kid)
        record = self._table.get(kid)
        return record.member() if record is not None and record.meta is not None else None

    def snapshot(self) -> tuple[Update, ...]:
        """The living, for `known` of a later process."""
        return tuple(
            record.update(whole=True)
            for record in self._table.records()
            if record.state == State.ALIVE and record.meta_boot == record.boot
        )

    # Time, lag, and the end of each call.

    def _enter(self, now_ms: float) -> None:
        late_ms = now_ms - self._armed_ms
        if late_ms > self.config.lag_ms:  # stopped, starved, or a clock that jumped
            self._lagged(late_ms, now_ms)

    def _lagged(self, lag_ms: float, now_ms: float) -> None:
        """M5: what we failed to see in time is our fault, and the accused get the time back."""
        self.health.add(1)
        if lag_ms <= self.config.lag_ms:
            return
        if self._probe is not None:
            self._probe = None
            self._probe_due_ms = now_ms + self.config.probe_ms * self._random.random()
        self._relays.clear()
        self._hearings.clear()  # they begin again: the time to answer was ours to lose
        for suspicion in self._suspicions.values():
            suspicion.started_ms += lag_ms
            suspicion.deadline_ms += lag_ms

    def _finish(
        self, now_ms: float, *, ticked: bool = False, persist: bool = False
    ) -> list[Effect]:
        """The effects of this call: what is told here, the timer, the Persist, what depends on it.

        Notifications and the timer stand first because a Persist may hold back the rest of a list
        while those of later lists go ahead: an old timer would replace a newer one.
        """
        out, self._out = self._out, []
        effects: list[Effect] = [effect for effect in out if isinstance(effect, Notify)]
        if self._superseded:
            return effects
        due_ms = max(now_ms, self._earliest_ms())
        if (ticked or due_ms != self._armed_ms) and due_ms != math.inf:
            effects.append(SetTimer(due_ms))
        self._armed_ms = due_ms
        sends = [effect for effect in out if isinstance(effect, Send)]
        if persist or (sends and self._proven < self.incarnation):  # M2
            effects.append(self._persist())
        effects += sends
        assert len(effects) >= len(out), "nothing else is put out"
        return effects

    def _earliest_ms(self) -> float:
        if self.state != State.ALIVE:
            return self._gossip_due_ms
        probe = self._probe
        due_ms = self._probe_due_ms
        if probe is not None:
            due_ms = probe.end_ms if probe.indirect else probe.ack_due_ms
        due_ms = min(due_ms, self._gossip_due_ms, self._seeds.due_ms)
        due_ms = min(due_ms, self._exchange_due_ms, self._reconnect_due_ms)
        due_ms = min(due_ms, self._judging_due_ms())
        for relay in self._relays.values():
            due_ms = min(due_ms, relay.due_ms)
        return due_ms

    def _persist(self) -> Persist:
        record = IncarnationRecord(self.incarnation)
        return Persist("incarnation", msgspec.msgpack.encode(record))

    # Hearing from others.

    def _hear(self, source: Kid, boot: int, updates: tuple[Update, ...], now_ms: float) -> None:
        """Take in the news of a message; a sender we do not know is asked who it is."""
        self._apply_all(updates, now_ms, source=source)
        record = self._table.get(source)
        unknown = record is None or record.meta is None or boot > record.boot
        if unknown and self.state == State.ALIVE and self._seldom("ask", source, now_ms):
            self._request(source, "")

    def _contradict(self, source: Kid, boot: int, now_ms: float) -> None:
        """Somebody we hold for dead talks: let it know, so that it can refute."""
        record = self._table.get(source)
        if record is None or record.state == State.SUSPECT:
            return  # A suspect hears of it from the next probe.
        about = self._about(record, boot)
        if about and self._seldom("contradict", source, now_ms):
            self._out.append(Send(source, Gossip(self.me.boot, about)))

    # Probing.

    def _probe_step(self, now_ms: float) -> None:
        probe = self._probe
        if probe is not None:
            if not probe.indirect and now_ms >= probe.ack_due_ms:
                self._probe_indirectly(probe, now_ms)
            elif probe.indirect and now_ms >= probe.end_ms:
                self._failed(probe, now_ms)
        if self._probe is None and now_ms >= self._probe_due_ms:
            self._probe_next(now_ms)

    def _probe_next(self, now_ms: float) -> None:
        period_ms = self.health.scale(self.config.probe_ms)
        self._probe_due_ms = now_ms + period_ms
        self._warn_suspects()
        record = self._ring.next(self._table, self._random)
        if record is None:
            return
        ack_ms = min(self.health.scale(self.config.ack_ms), period_ms)
        self._probe = Probe(
            self._next_seq(),
            record.kid,
            record.boot,
            self.incarnation,
            now_ms,
            now_ms + ack_ms,
            now_ms + period_ms,
        )
        news = self._packet(record.kid, record.boot)
        self._out.append(Send(record.kid, Ping(self._probe.seq, self.me.boot, False, news)))

    def _probe_indirectly(self, probe: Probe, now_ms: float) -> None:
        """Ask relays, and try the second transport ourselves."""
        given_ms = max(probe.end_ms - probe.ack_due_ms, self.config.ack_ms)
        probe.end_ms = max(probe.end_ms, now_ms + given_ms)  # M4: the relays get their full time
        self._probe_due_ms = max(self._probe_due_ms, probe.end_ms)
        probe.relays = self._relays_for(probe.target)
        probe.data_seq = self._next_seq()
        for relay in probe.relays:
            news = self._packet(relay, COUNTER_MAX)
            nack_ms = given_ms * NACK_PART
            ask = PingReq(probe.seq, self.me.boot, probe.target, nack_ms, news)
            self._out.append(Send(relay, ask))
        news = self._packet(probe.target, probe.boot)
        ping = Ping(probe.data_seq, self.me.boot, True, news)
        self._out.append(Send(probe.target, ping, Plane.DATA))

    def _failed(self, probe: Probe, now_ms: float) -> None:
        assert probe.indirect and now_ms >= probe.end_ms, "M4"
        self._probe = None
        missed = len(probe.relays) - len(probe.nacked)
        self.health.add(missed if probe.relays else 1)
        record = self._table.get(probe.target)
        if record is not None and record.live and record.boot == probe.boot:
            accusation = Update(
                record.kid, record.boot, record.incarnation, State.SUSPECT, self.me.kid
            )
            self._apply(accusation, now_ms)

    def _acknowledged(self, source: Kid, message: Ack, now_ms: float) -> None:
        relay = self._relays.get(message.seq)
        if relay is not None and relay.target == source:
            del self._relays[message.seq]
            news = self._packet(relay.origin, COUNTER_MAX)
            self._out.append(Send(relay.origin, Ack(relay.origin_seq, message.boot, news)))
            return
        if self._hearings and self._testified(source, message, now_ms):
            return
        probe = self._probe
        if probe is None or message.seq not in (probe.seq, probe.data_seq):
            return
        if source != probe.target and source not in probe.relays:
            return
        if message.boot < probe.boot:
            return  # An older process of that node still runs: no sign of the one we probe.
        self._probe = None
        self._proven = max(self._proven, probe.incarnation)
        if message.boot > probe.boot:  # It has started anew, and we have not heard of that.
            self._request(probe.target, "")
            return
        self.health.add(-1)
        if source == probe.target and message.seq == probe.seq:
            record = self._table.get(source)
            if record is not None:
                record.rtt_ms = smooth_rtt(record.rtt_ms, now_ms - probe.sent_ms)
                self._members = None

    def _nacked(self, source: Kid, seq: int) -> None:
        hearing = self._hearing_of(source, seq)
        if hearing is not None and source not in hearing.nacked:
            hearing.nacked.append(source)
        probe = self._probe
        if probe is None or probe.seq != seq or source not in probe.relays:
            return
        if source not in probe.nacked:
            probe.nacked.append(source)

    def _relay(self, source: Kid, message: PingReq, now_ms: float) -> None:
        if self.state != State.ALIVE:
            return
        target = self._table.get(message.target)
        if target is None or target.meta is None or len(self._relays) >= RELAYS_MAX:
            news = self._packet(source, message.boot)
            self._out.append(Send(source, Nack(message.seq, news)))
            return
        seq = self._next_seq()
        nack_due_ms = now_ms + message.nack_ms
        end_ms = nack_due_ms + message.nack_ms
        self._relays[seq] = Relay(source, message.seq, target.kid, nack_due_ms, end_ms)
        assert len(self._relays) <= RELAYS_MAX, "M6"
        news = self._packet(target.kid, target.boot)
        self._out.append(Send(target.kid, Ping(seq, self.me.boot, False, news)))

    def _relay_step(self, now_ms: float) -> None:
        for seq, relay in list(self._relays.items()):
            if now_ms < relay.due_ms:
                continue
            if relay.nacked:
                del self._relays[seq]
                continue
            relay.nacked = True
            news = self._packet(relay.origin, COUNTER_MAX)
            self._out.append(Send(relay.origin, Nack(relay.origin_seq, news)))

    # Full exchanges: joining, repairing, meeting again.

    def _join(self, now_ms: float) -> None:
        for seed in self._seeds.call(self._table, self._random, now_ms):
            self._request(seed, seed)

    def _exchange_ms(self) -> float:
        """The interval, longer in large clusters: a table costs as much as the cluster is large."""
        nodes = self._nodes()
        factor = 1 if nodes <= LARGE_CLUSTER else math.ceil(math.log2(nodes)) - 4
        return self.config.push_pull_ms * factor

    def _reconnect_ms(self) -> float:
        return self.config.probe_ms * RECONNECT_PROBES

    def _exchange_step(self, now_ms: float) -> None:
        if now_ms >= self._exchange_due_ms:
            self._exchange_due_ms = now_ms + self._exchange_ms()
            for record in self._table.expired(now_ms):
                self._table.forget(record)
                self._members = None
            for record in self._table.draw(self._random, 1):
                self._request(record.kid, "")
        if now_ms >= self._reconnect_due_ms:
            self._reconnect_due_ms = now_ms + self._reconnect_ms()
            dead = len(self._table) - self._table.live
            if dead and self._random.random() * self._nodes() < dead:
                lost = self._table.draw_dead(self._random)
                if lost is not None:
                    self._request(lost.kid, "")

    def _request(self, to: str, via: str) -> None:
        seq = self._next_seq()
        if len(self._requests) >= REQUESTS_MAX:
            del self._requests[next(iter(self._requests))]
        self._requests[seq] = (self.incarnation, via)
        self._send_table(to, seq, reply=False, via=via)

    def _send_table(self, to: str, seq: int, *, reply: bool, via: str = "") -> None:
        rows = [self._myself()]
        rows += [r.update(self._accuser(r), whole=True) for r in self._table.records()]
        for first in range(0, len(rows), PART_UPDATES):
            part = tuple(rows[first : first + PART_UPDATES])
            last = first + PART_UPDATES >= len(rows)
            self._out.append(Send(to, PushPull(seq, self.me.boot, reply, last, via, part)))

    def _exchanged(self, source: Kid, message: PushPull, now_ms: float) -> None:
        quiet = False
        if message.reply:
            if message.seq not in self._requests:
                return
            if self._first_seq < 0:
                self._first_seq = message.seq
            # The first answer of all is no news: who gave it tells of those it knows itself.
            quiet = message.seq == self._first_seq
            incarnation, seed = self._requests[message.seq]
            self._proven = max(self._proven, incarnation)
            if seed:
                self._seeds.answered(seed, source)
            if message.last:
                del self._requests[message.seq]
        self._apply_all(message.updates, now_ms, quiet=quiet)
        if message.last and not message.reply:
            self._send_table(source, message.seq, reply=True)
