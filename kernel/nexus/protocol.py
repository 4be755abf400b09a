"""Nexus of one node: proposer always, acceptor where it is a voter, driver where it is asked.

Interface: `start` once, then `receive`, `request` and `tick`; each returns effects in order.
`durable` holds the records that were persisted before, by name. `boot` is durable and larger than
any before. `node_up` and `node_down` tell whom operations may be forwarded to: a hint, as are the
configurations that are learnt. `storage_failed` once the disk refused anything: it votes no more.
An answer is `Reply(client, …)` with the handle that `request` was given; a watch replies again and
again. With nothing to do a node sets no timer, but that voters look after changes of voters, and
who knows no voters asks for them less and less often; and it makes nothing durable.
Rules for the driver: writes become durable in the order in which they were asked for; an empty
record is a removal; a message to oneself that stands after a `Persist` waits for it as well.

Invariants: those of acceptor.py (A), proposer.py (P), forwarding.py (F), voters.py (R),
collector.py (G), leases.py (L), watches.py (W), listing.py (K), values.py (V), marks.py (M),
configs.py (E), context.py (X).
Source: Rystsov, "CASPaxos: Replicated State Machines without logs" (2018); docs/nexus.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from typing import Any, get_args

import msgspec

from manifold.kernel.effects import Effect
from manifold.kernel.nexus.acceptor import Acceptor, Asked
from manifold.kernel.nexus.ballots import Ballot
from manifold.kernel.nexus.collector import Collector
from manifold.kernel.nexus.configs import Config
from manifold.kernel.nexus.context import NONCE_BITS, Context, Timing
from manifold.kernel.nexus.forwarding import Forwarding
from manifold.kernel.nexus.leases import Leases
from manifold.kernel.nexus.listing import Lister
from manifold.kernel.nexus.messages import (
    CONFIG_KEY,
    KNOWN_NAME,
    WHY_MAX,
    Acquire,
    Answer,
    Changed,
    Drop,
    Forward,
    Forwarded,
    GetNexus,
    Greeting,
    Hello,
    Hint,
    Initialise,
    List,
    Message,
    NexusInfo,
    Operate,
    Request,
    Resign,
    Scanned,
    Seal,
    Sealed,
    Seek,
    SetVoters,
    Strength,
    Tell,
    Unwatch,
    Watch,
)
from manifold.kernel.nexus.proposer import NO_VOTERS, Proposer, Replies
from manifold.kernel.nexus.rounds import Operation
from manifold.kernel.nexus.values import Get, Result
from manifold.kernel.nexus.voters import Drivers, Finish
from manifold.kernel.nexus.watches import Watches
from manifold.vm.kid import Kid

SWEEP_MS = 100.0  # one record of a voter is looked after each time
ASK_MS = 200.0  # who knows no configuration asks a node after so long, then half as often
ASK_MOST_MS = 5000.0
KNOWN_MS = 2000.0  # a node without a vote writes down who votes once it starts to be old news
_config = msgspec.msgpack.Decoder(Config)


class Nexus:
    """See the module."""

    def __init__(
        self,
        me: Kid,
        boot: int,
        durable: Mapping[str, bytes],
        random: Random,
        timing: Timing | None = None,
    ) -> None:
        nonce = random.getrandbits(NONCE_BITS) + 1
        self.context = Context(me, boot, nonce, random, timing or Timing())
        self.acceptor = Acceptor(self.context, durable)
        known = durable.get(KNOWN_NAME)
        config = _config.decode(known) if known else None
        sealed = self.acceptor.config
        if sealed is not None and (config is None or config.epoch < sealed.epoch):
            config = sealed
        self.proposer = Proposer(self.context, config)
        self.forwarding = Forwarding(self.context, self.proposer)
        self.drivers = Drivers(self.context, self.proposer, self.forwarding.live)
        self.collector = Collector(self.context, self.proposer)
        self.leases = Leases(self.context, self.proposer)
        self.watches = Watches(self.context, self.proposer, self._changed)
        self.lister = Lister(self.context, self.proposer)
        self.proposer.on_adopt = self._adopted
        self.proposer.on_tombstone = self.collector.note
        self._parts: dict[type, Callable[[Kid, Any], None]] = {  # whom a message concerns alone
            **dict.fromkeys(get_args(Asked | Hello | Drop), self.acceptor.receive),
            **dict.fromkeys(get_args(Replies), self.proposer.receive),
            **dict.fromkeys((Forward, Forwarded), self.forwarding.receive),
        }
        self._save = False
        self._saving = self._sweeping = self._resuming = self._asking = False  # timers that are set
        self._ask_ms = ASK_MS
        self._why = ""  # the disk failed
        self._running = False

    # -- events -----------------------------------------------------------------------------------

    def start(self, now_ms: float) -> list[Effect]:
        assert not self._running, "a machine starts once"
        self._running = True
        self.context.now_ms = now_ms
        self.acceptor.start()
        self._seek()
        return self._close()

    def receive(self, source: Kid, message: Message, now_ms: float) -> list[Effect]:
        self.context.now_ms = now_ms
        part = self._parts.get(type(message))
        if part is not None:
            part(source, message)
            return self._close()
        match message:
            case Seal():
                self.acceptor.receive(source, message)
                self.proposer.adopt(message.config)
            case Greeting() | Sealed():
                if isinstance(message, Greeting) and message.config is not None:
                    self.proposer.adopt(message.config)
                self.drivers.receive(source, message)
            case Scanned():
                if not self.lister.receive(source, message):
                    self.drivers.receive(source, message)
            case Seek(rid=rid):
                if self.config is not None:
                    self.context.send(source, Tell(rid, self.config))
            case Tell(config=config):
                self.proposer.adopt(config)
            case Hint(key=key, version=version):
                self.watches.hint(key, version)
        return self._close()

    def tick(self, now_ms: float) -> list[Effect]:
        self.context.now_ms = now_ms
        for action in self.context.due():
            action(now_ms)
        return self._close()

    def request(self, client: int, message: Request, now_ms: float) -> list[Effect]:
        self.context.now_ms = now_ms
        match message:
            case Operate():
                self._operate(client, message)
            case Acquire(key=key, holder=holder, ttl_ms=ttl_ms, timeout_ms=timeout_ms):
                self.leases.acquire(key, holder, ttl_ms, timeout_ms, self._answer(client))
            case Resign(key=key, holder=holder):
                self.leases.resign(key, holder, self._answer(client))
            case Watch(key=key, timeout_ms=timeout_ms, stale=stale):
                if not self.watches.watch(client, key, timeout_ms, stale):
                    self.context.reply(client, Answer("busy", strength="none"))
            case Unwatch(key=key):
                self.watches.unwatch(client, key)
            case Initialise(voters=voters, timeout_ms=timeout_ms):
                kids = [Kid(kid) for kid in voters]
                self.drivers.initialise(kids, timeout_ms, self._finish(client))
            case SetVoters():
                self._set_voters(client, message)
            case List():
                self.lister.ask(message, lambda listing: self.context.reply(client, listing))
            case GetNexus():
                self.context.reply(client, self.info())
        return self._close()

    def storage_failed(self, now_ms: float, why: str = "") -> list[Effect]:
        """The disk refused a record: what it holds is unknown until a restart reads it."""
        self.context.now_ms = now_ms
        self.acceptor.stopped = True
        self._why = self._why or why[:WHY_MAX]
        return self._close()

    def client_gone(self, client: int, now_ms: float) -> list[Effect]:
        """Nobody listens to this handle any more: its watches end."""
        self.context.now_ms = now_ms
        self.watches.client_gone(client)
        return self._close()

    def node_up(self, kid: Kid, now_ms: float) -> list[Effect]:
        self.context.now_ms = now_ms
        self.forwarding.node_up(kid)
        self._ask_ms = ASK_MS
        self._seek()
        return self._close()

    def node_down(self, kid: Kid, now_ms: float) -> list[Effect]:
        self.context.now_ms = now_ms
        self.forwarding.node_down(kid)
        self._ask_ms = ASK_MS
        self._seek()
        return self._close()

    # -- what others ask --------------------------------------------------------------------------

    @property
    def config(self) -> Config | None:
        """Who votes, as far as this node knows."""
        return self.proposer.config

    @property
    def operations(self) -> int:
        """Wishes that wait here, and ours that others propose."""
        return self.proposer.operations + self.forwarding.under_way

    def fence(self, key: str, holder: str, now_ms: float) -> Ballot | None:
        """The token of a lease that is held here now; None: act no more."""
        self.context.now_ms = max(self.context.now_ms, now_ms)
        return self.leases.fence(key, holder)

    def info(self) -> NexusInfo:
        """What this node knows."""
        config, drive = self.config, self.drivers.drive
        return NexusInfo(
            known=config is not None,
            epoch=config.epoch if config is not None else 0,
            count=config.count if config is not None else 0,
            old=tuple(voter.kid for voter in config.old) if config is not None else (),
            voters=tuple(voter.kid for voter in config.new) if config is not None else (),
            votes=self.acceptor.votes and not self.acceptor.stopped,
            stopped=self.acceptor.stopped,
            why=self._why,
            keys=len(self.acceptor.rows),
            operations=self.operations,
            step=drive.step if drive is not None and drive.target is not None else "",
        )

    # -- inside -----------------------------------------------------------------------------------

    def _operate(self, client: int, message: Operate) -> None:
        answer = self._answer(client)
        if message.key == CONFIG_KEY and not isinstance(message.change, Get):
            why = "Voters change by SetVoters only."
            self.context.reply(client, Answer("refused", strength="none", why=why))
            return
        self._seek()

        def done(result: Result) -> None:
            self.forwarding.learn(message.key, result)
            answer(result)

        operation = Operation(
            message.op,
            message.key,
            message.change,
            self.context.now_ms + message.timeout_ms,
            done,
            base=None if message.base < 0 and not message.retry else message.base,
            fixed=message.base >= 0 or message.retry,
            sent=message.retry,
            stale=message.stale,
            local=False,
        )
        self.forwarding.route(operation)

    def _answer(self, client: int) -> Callable[[Result], None]:
        def answer(result: Result) -> None:
            strength: Strength = "quorum"
            if result.strength == "stale":
                strength = "stale"
            elif result.strength == "none" or result.status == "maybe":
                strength = "none"
            self.context.reply(
                client,
                Answer(
                    result.status,
                    result.version,
                    result.data,
                    result.fence,
                    result.stamp,
                    strength,
                    tuple(str(kid) for kid in result.missing),
                    result.why,
                ),
            )

        return answer

    def _finish(self, client: int) -> Finish:
        def finish(status: str, why: str, missing: tuple[Kid, ...]) -> None:
            silent = tuple(str(kid) for kid in missing)
            if status == "ok":
                self.context.reply(client, Answer("ok"))
            elif status == "maybe":
                answer = Answer("maybe", strength="none", why=why, missing=silent)
                self.context.reply(client, answer)
            else:
                self.context.reply(client, Answer("refused", strength="none", why=why))
            if status == "ok" and self.config is not None:
                # Else they would find it out by and by, or never where all former voters leave.
                for kid in self.forwarding.live():
                    if kid != self.context.me:
                        self.context.send(kid, Tell(self.context.rid(), self.config))

        return finish

    def _set_voters(self, client: int, message: SetVoters) -> None:
        if self.config is None:
            self.context.reply(client, Answer("refused", strength="none", why=NO_VOTERS))
            return
        kids = [Kid(kid) for kid in message.voters]
        self.drivers.change(kids, message.timeout_ms, self._finish(client), message.epoch)

    def _changed(self, client: int, key: str, state: Result) -> None:
        if state.status != "ok":
            self._answer(client)(state)
            return
        version = state.version if state.data is not None else 0
        strength: Strength = "stale" if state.strength == "stale" else "quorum"
        missing = tuple(str(kid) for kid in state.missing)
        self.context.reply(client, Changed(key, version, state.data, strength, missing))

    def _adopted(self) -> None:
        """Save it; a voter here hears of it as well, for it may vote no more."""
        config, sealed = self.proposer.config, self.acceptor.config
        if config is not None and sealed is not None and sealed.epoch < config.epoch:
            self.context.send(self.context.me, Seal(self.context.rid(), config))
        if config is not None:
            self.drivers.adopted(config)
        self.watches.adopted()
        if self.acceptor.votes:
            self._save = True
        elif not self._saving:
            self._saving = True
            self.context.later(KNOWN_MS, self._old_news)

    # -- timers -----------------------------------------------------------------------------------

    def _old_news(self, _now_ms: float) -> None:
        self._saving, self._save = False, True

    def _sweep(self, _now_ms: float) -> None:
        self._sweeping = False
        age_ms = 4 * self.context.timing.gc_ms
        key = self.acceptor.sweep(age_ms)
        if key is not None:
            self.collector.note(key)

    def _resume(self, _now_ms: float) -> None:
        """Voters look after changes that were left half done, and so does who knows of one."""
        self._resuming = False
        if self._looks_after:
            self.drivers.look()

    @property
    def _looks_after(self) -> bool:
        return self.acceptor.votes or (self.config is not None and self.config.joint)

    @property
    def _lost(self) -> bool:
        """Whether no quorum that this node knows of is there: perhaps others vote by now."""
        config = self.config
        return config is None or not config.quorum(self.forwarding.live())

    def _seek(self) -> None:
        if not self._asking and len(self.forwarding.live()) > 1 and self._lost:
            self._asking = True
            self.context.later(self._ask_ms, self._ask)

    def _ask(self, _now_ms: float) -> None:
        self._asking = False
        if not self._lost:
            return
        others = [kid for kid in self.forwarding.live() if kid != self.context.me]
        if others:
            self.context.send(self.context.random.choice(others), Seek(self.context.rid()))
        self._ask_ms = min(2 * self._ask_ms, ASK_MOST_MS)
        self._seek()

    def _set_timers(self) -> None:
        """What is done now and then, and only while there is something to do."""
        if not self._sweeping and self.acceptor.untidy:
            self._sweeping = True
            rest_ms = self.acceptor.rest_ms(4 * self.context.timing.gc_ms)
            self.context.later(max(SWEEP_MS, rest_ms), self._sweep)
        if not self._resuming and self._looks_after:
            self._resuming = True
            wait_ms = self.context.timing.resume_ms * (1 + self.context.random.random())
            self.context.later(wait_ms, self._resume)
        if self._save and not self._saving:  # something else was written: in an event of its own
            self._saving = True
            self.context.later(0.0, self._old_news)

    def _close(self) -> list[Effect]:
        """All effects; a configuration that is news is written where nothing else is (a hint)."""
        self.context.settle()
        if self._save and not self.context.persists and self.config is not None:
            self._save = False
            self.context.persist(KNOWN_NAME, msgspec.msgpack.encode(self.config))
        self._set_timers()
        return self.context.take()
