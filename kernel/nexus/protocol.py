"""Nexus of one node: proposer always, acceptor where it is a voter, driver where it is asked.

Interface: `start` once, then `receive`, `request` and `tick`; each returns effects in order.
`durable` holds the records that were persisted before, by name. `boot` is durable and larger than
any before. `node_up` and `node_down` tell whom operations may be forwarded to: a hint, as are the
configurations that are learnt. `storage_failed` once the disk refused anything: it votes no more.
An answer is `Reply(client, …)` with the handle that `request` was given; a watch replies again and
again. Rules for the driver: writes become durable in the order in which they were asked for; an
empty record is a removal; a message to oneself that stands after a `Persist` waits for it as well.

Invariants: those of acceptor.py (A), proposer.py (P), forwarding.py (F), voters.py (R),
collector.py (G), leases.py (L), watches.py (W), values.py (V), configs.py (E), context.py (X).
Source: Rystsov, "CASPaxos: Replicated State Machines without logs" (2018); docs/nexus.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from typing import Literal

import msgspec

from manifold.kernel.effects import Effect
from manifold.kernel.nexus.acceptor import Acceptor
from manifold.kernel.nexus.ballots import Ballot
from manifold.kernel.nexus.collector import Collector
from manifold.kernel.nexus.configs import Config
from manifold.kernel.nexus.context import NONCE_BITS, Context, Timing
from manifold.kernel.nexus.forwarding import Forwarding
from manifold.kernel.nexus.leases import Leases
from manifold.kernel.nexus.messages import (
    CONFIG_KEY,
    KNOWN_NAME,
    Accept,
    Accepted,
    Acquire,
    Answer,
    Changed,
    Collapse,
    Drop,
    Forward,
    Forwarded,
    Full,
    Greeting,
    Hello,
    Hint,
    Initialise,
    Message,
    Nack,
    Operate,
    Prepare,
    Promise,
    Read,
    ReadReply,
    Request,
    Resign,
    Scan,
    Scanned,
    Seal,
    Sealed,
    SetVoters,
    Stale,
    Unwatch,
    Watch,
)
from manifold.kernel.nexus.proposer import Proposer
from manifold.kernel.nexus.rounds import Operation
from manifold.kernel.nexus.values import Datum, Get, Result
from manifold.kernel.nexus.voters import Drivers
from manifold.kernel.nexus.watches import Watches
from manifold.vm.kid import Kid

SWEEP_MS = 100.0  # one record of a voter is looked after each time
ASK_MS = 200.0  # who knows no configuration asks a node so often
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
        self.drivers = Drivers(self.context, self.proposer)
        self.collector = Collector(self.context, self.proposer)
        self.leases = Leases(self.context, self.proposer)
        self.watches = Watches(self.context, self.proposer, self._changed)
        self.proposer.on_adopt = self._adopted
        self.proposer.on_tombstone = self.collector.note
        self._save = False
        self._running = False

    # -- events -----------------------------------------------------------------------------------

    def start(self, now_ms: float) -> list[Effect]:
        assert not self._running, "a machine starts once"
        self._running = True
        self.context.now_ms = now_ms
        self.acceptor.start()
        self.context.later(SWEEP_MS, self._sweep)
        self.context.later(self._resume_ms(), self._resume)
        self.context.later(ASK_MS, self._ask)
        return self._close()

    def receive(self, source: Kid, message: Message, now_ms: float) -> list[Effect]:
        self.context.now_ms = now_ms
        match message:
            case Prepare() | Accept() | Read() | Scan() | Collapse() | Hello() | Drop():
                self.acceptor.receive(source, message)
            case Seal():
                self.acceptor.receive(source, message)
                self.proposer.adopt(message.config)
            case Promise() | Nack() | Full() | Accepted() | ReadReply() | Stale():
                self.proposer.receive(source, message)
            case Greeting() | Sealed() | Scanned():
                if isinstance(message, Greeting) and message.config is not None:
                    self.proposer.adopt(message.config)
                self.drivers.receive(source, message)
            case Forward() | Forwarded():
                self.forwarding.receive(source, message)
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
            case Watch(key=key):
                if not self.watches.watch(client, key):
                    self.context.reply(client, Answer("busy", strength="none"))
            case Unwatch(key=key):
                self.watches.unwatch(client, key)
            case Initialise(voters=voters, timeout_ms=timeout_ms):
                kids = [Kid(kid) for kid in voters]
                self.drivers.initialise(kids, timeout_ms, self._finish(client))
            case SetVoters(voters=voters, timeout_ms=timeout_ms):
                self._set_voters(client, [Kid(kid) for kid in voters], timeout_ms)
        return self._close()

    def storage_failed(self, now_ms: float) -> list[Effect]:
        """The disk refused a record: what it holds is unknown until a restart reads it."""
        self.context.now_ms = now_ms
        self.acceptor.stopped = True
        return self._close()

    def client_gone(self, client: int, now_ms: float) -> list[Effect]:
        """Nobody listens to this handle any more: its watches end."""
        self.context.now_ms = now_ms
        self.watches.client_gone(client)
        return self._close()

    def node_up(self, kid: Kid, now_ms: float) -> list[Effect]:
        self.context.now_ms = now_ms
        self.forwarding.node_up(kid)
        return self._close()

    def node_down(self, kid: Kid, now_ms: float) -> list[Effect]:
        self.context.now_ms = now_ms
        self.forwarding.node_down(kid)
        return self._close()

    # -- what others ask --------------------------------------------------------------------------

    @property
    def config(self) -> Config | None:
        """Who votes, as far as this node knows."""
        return self.proposer.config

    def fence(self, key: str, holder: str, now_ms: float) -> Ballot | None:
        """The token of a lease that is held here now; None: act no more."""
        self.context.now_ms = max(self.context.now_ms, now_ms)
        return self.leases.fence(key, holder)

    # -- inside -----------------------------------------------------------------------------------

    def _operate(self, client: int, message: Operate) -> None:
        answer = self._answer(client)
        if message.key == CONFIG_KEY and not isinstance(message.change, Get):
            why = "Voters change by SetVoters only."
            self.context.reply(client, Answer("refused", strength="none", why=why))
            return

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
            strength: Literal["quorum", "stale", "none"] = "quorum"
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
                ),
            )

        return answer

    def _finish(self, client: int) -> Callable[[str, str], None]:
        def finish(status: str, why: str) -> None:
            answer = {"ok": Answer("ok"), "maybe": Answer("maybe", strength="none", why=why)}
            refused = Answer("refused", strength="none", why=why)
            self.context.reply(client, answer.get(status, refused))

        return finish

    def _set_voters(self, client: int, kids: list[Kid], timeout_ms: float) -> None:
        if self.config is None:
            why = "No voters are known here: initialise them first."
            self.context.reply(client, Answer("refused", strength="none", why=why))
            return
        self.drivers.change(kids, timeout_ms, self._finish(client))

    def _changed(self, client: int, key: str, version: int, data: Datum) -> None:
        self.context.reply(client, Changed(key, version, data))

    def _adopted(self) -> None:
        """Save it; a voter here hears of it as well, for it may vote no more."""
        self._save = True
        config, sealed = self.proposer.config, self.acceptor.config
        if config is not None and sealed is not None and sealed.epoch < config.epoch:
            self.context.send(self.context.me, Seal(self.context.rid(), config))

    def _sweep(self, _now_ms: float) -> None:
        key = self.acceptor.sweep(4 * self.context.timing.gc_ms)
        if key is not None:
            self.collector.note(key)
        self.context.later(SWEEP_MS, self._sweep)

    def _resume_ms(self) -> float:
        return self.context.timing.resume_ms * (1 + self.context.random.random())

    def _resume(self, _now_ms: float) -> None:
        """Voters look after changes that were left half done, and so does who knows of one."""
        if self.acceptor.votes or (self.config is not None and self.config.joint):
            self.drivers.look()
        self.context.later(self._resume_ms(), self._resume)

    def _ask(self, _now_ms: float) -> None:
        if self.config is None:
            others = [kid for kid in self.forwarding.live() if kid != self.context.me]
            if others:
                self.context.send(self.context.random.choice(others), Hello(self.context.rid()))
            self.context.later(ASK_MS, self._ask)

    def _close(self) -> list[Effect]:
        """All effects; a configuration that is news is written where nothing else is (a hint)."""
        self.context.settle()
        if self._save and not self.context.persists and self.config is not None:
            self._save = False
            self.context.persist(KNOWN_NAME, msgspec.msgpack.encode(self.config))
        return self.context.take()
