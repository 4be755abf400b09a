"""The proposer: carries operations of clients through rounds with the voters.

Interface: `submit(operation)` queues one; `receive(source, message)` takes what voters answer;
`adopt(config)` when a configuration is known to be chosen. An operation's `done` is called once.

A key has one round under way. Reads alone take one round of `Read`s; everything else one of
`Prepare`s, which the cache may save, and one of `Accept`s, which goes to a quorum at first
(thrift.py). After one timeout a round says what can be said twice again, after two it is given up;
once a quorum has spoken in vain, after a moment: so a voter that is down delays nobody.
Invariants:
  P1  a ballot is used for at most one value: each proposal takes a new one, and the `n` of a key
      that is forgotten is kept for all;
  P2  the cache proposes and never answers: what is answered without an Accept was reported by one
      quorum with one accepted ballot;
  P3  from the first Accept that holds an operation its failure is not reported: `maybe`. What
      marks decide is proposed again all the same, as long as there is time;
  P4  everything is bounded: registers, operations, batches, queues.
Source: Rystsov, "CASPaxos" (2018); Howard, "Flexible Paxos" (2016) for quorums of two phases.
Difference: a ballot is burnt by any Accept, not only by a conflict (see docs/nexus.md, errata).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from manifold.kernel.nexus.ballots import ZERO, Ballot, following
from manifold.kernel.nexus.configs import Config
from manifold.kernel.nexus.context import Context
from manifold.kernel.nexus.gathering import GATHER_MS
from manifold.kernel.nexus.messages import (
    Accept,
    Accepted,
    Collapse,
    Full,
    Nack,
    Prepare,
    Promise,
    Read,
    ReadReply,
    Seal,
    Stale,
)
from manifold.kernel.nexus.rounds import Cache, Operation, Phase, Register, Round
from manifold.kernel.nexus.thrift import Left, Thrift
from manifold.kernel.nexus.values import (
    BATCH_MAX,
    Result,
    Rewrite,
    Status,
    Value,
    change,
)
from manifold.vm.kid import Kid

REGISTERS_MAX = 16_384  # with their caches of some 100 B to 64 KiB
OPERATIONS_MAX = 8192  # queued and under way at one node: 64 clients of 128 each
QUEUE_MAX = 1024  # of one key: sixteen batches, some 100 ms
BACKOFFS_MAX = 5  # a back-off takes at most 2^5 round trips, each of which raises a ballot by one
RESENT_MAX = 2  # times that one round seals a voter that lags behind
NO_VOTERS = "No voters are known here: `manifold nexus init` makes the first."

Replies = Promise | Nack | Full | Accepted | ReadReply | Stale


class Proposer:
    """See the module."""

    def __init__(self, context: Context, config: Config | None) -> None:
        self._context = context
        self.config = config
        self.registers: dict[str, Register] = {}
        self.operations = 0
        self._rounds: dict[int, Register] = {}
        self._least_n = 0
        self._thrift = Thrift(context)
        self.on_adopt: Callable[[], None] = lambda: None
        self.on_tombstone: Callable[[str], None] = lambda key: None
        self.reroute: Callable[[Operation], None] = self.submit

    # -- operations -------------------------------------------------------------------------------

    def submit(self, operation: Operation) -> None:
        register = self._register(operation.key)
        full = self.operations >= OPERATIONS_MAX or len(register.queue) >= QUEUE_MAX
        if full and not operation.sent:
            self.finish(operation, Result("busy", strength="none"))
            return
        self.operations += 1
        register.queue.append(operation)
        self._kick(register)

    def _register(self, key: str) -> Register:
        register = self.registers.pop(key, None)
        if register is None:
            if len(self.registers) >= REGISTERS_MAX:
                self._forget()
            register = Register(key, self._least_n)
        self.registers[key] = register  # most recently used last
        return register

    def _forget(self) -> None:
        for key, register in self.registers.items():
            if register.idle:
                self._least_n = max(self._least_n, register.n)  # P1
                del self.registers[key]
                return

    def contended(self, key: str) -> bool:
        register = self.registers.get(key)
        return register is not None and self._context.now_ms < register.contended_until_ms

    def _kick(self, register: Register) -> None:
        """Begin the next round, if there is something to do and nothing under way."""
        if register.round is not None or register.waiting:
            return
        if register.tries:
            self._expire(register)
        if not register.queue:
            register.tries = 0
            return
        if self.config is None:
            register.tries += 1
            self._back_off(register)
            return
        if all(operation.reads for operation in register.queue) and register.tries == 0:
            batch = [register.queue.popleft() for _ in range(min(BATCH_MAX, len(register.queue)))]
            self._begin(register, Phase.READ, ZERO, batch, self.config)
            return
        if register.tries == 0 and self._gathers(register):
            return
        batch = self._batch(register.queue)
        cache, register.cache = register.cache, None
        fresh = all(not operation.sent for operation in batch)
        if cache is not None and cache.epoch == self.config.epoch and fresh:
            self._propose_cached(register, cache, batch, self.config)
            return
        self._begin(register, Phase.PREPARE, self._next_ballot(register), batch, self.config)

    def _gathers(self, register: Register) -> bool:
        """Whether its next round waits for more operations."""
        gathering = register.gathering
        waited = gathering.open
        waits = gathering.waits(len(register.queue))
        if waits and not waited:
            number = gathering.number

            def over(_now_ms: float) -> None:
                if gathering.open and gathering.number == number:
                    gathering.missed()
                    self._kick(register)

            self._context.later(GATHER_MS, over)
        return waits

    def _propose_cached(
        self, register: Register, cache: Cache, batch: list[Operation], config: Config
    ) -> None:
        begun = self._begin(register, Phase.ACCEPT, cache.ballot, batch, config)
        self._propose(register, begun, cache.value)  # P2

    @staticmethod
    def _batch(queue: deque[Operation]) -> list[Operation]:
        """The next operations, in order; what every voter has to accept goes alone."""
        if queue[0].everywhere and len(queue) > 1:
            queue.rotate(-1)  # cleaning may fail slowly, where a voter is down: others first
        batch = [queue.popleft()]
        while queue and len(batch) < BATCH_MAX:
            if batch[0].everywhere or queue[0].everywhere:
                break
            batch.append(queue.popleft())
        return batch

    def _next_ballot(self, register: Register) -> Ballot:
        """Above what was heard of, and above where that is when we have backed off.

        Else who proposes once a round trip, with the promises it keeps, is never caught up with,
        and never learns that it should leave the key to one who batches for all.
        """
        ahead = 1 << min(register.tries, BACKOFFS_MAX) if register.tries else 0
        register.n = max(register.n, register.highest.n + ahead) + 1  # P1
        return Ballot(register.n, self._context.me, self._context.boot, self._context.nonce)

    def _begin(
        self,
        register: Register,
        phase: Phase,
        ballot: Ballot,
        batch: list[Operation],
        config: Config,
    ) -> Round:
        assert register.round is None
        context = self._context
        begun = Round(context.rid(), phase, config, ballot, batch, context.now_ms)
        register.round = begun
        self._rounds[begun.rid] = register
        if phase is not Phase.ACCEPT:
            self._send(register, begun)
        elif not begun.everywhere:
            begun.asked = self._thrift.few(register.key, config) or begun.kids
            self._thrift.begun(begun.rid)
        self._watch_over(register, begun)
        return begun

    def _watch_over(self, register: Register, begun: Round) -> None:
        rid, timeout_ms = begun.rid, self._context.timeout_ms(register.tries)

        def late(_now_ms: float) -> None:
            if self._rounds.get(rid) is not register:
                return
            self._context.later(timeout_ms, too_late)
            if begun.phase is not Phase.PREPARE:  # a ballot is promised once
                self._send(register, begun, begun.missing())

        def hedge(_now_ms: float) -> None:
            if self._rounds.get(rid) is register:
                self._context.later(timeout_ms - hedge_ms, late)
                if begun.asked is not begun.kids:
                    for kid in begun.missing():
                        self._thrift.silent(kid)
                    self._ask_the_spared(register, begun)

        def too_late(_now_ms: float) -> None:
            if self._rounds.get(rid) is register:
                self._failed(register, begun)

        if begun.asked is begun.kids:
            self._context.later(timeout_ms, late)
        else:
            hedge_ms = min(self._thrift.hedge_ms(), timeout_ms / 2)
            self._context.later(hedge_ms, hedge)

    def _ask_the_spared(self, register: Register, begun: Round) -> None:
        spared = begun.spared()
        if spared:
            self._thrift.ended(begun.rid, begun.sent_ms, begun.missing())
            begun.asked, begun.spared_ms = begun.kids, self._context.now_ms
            self._send(register, begun, spared)

    def _in_vain(self, register: Register, begun: Round, *, wait: bool = True) -> None:
        """A quorum has spoken, and it is not enough: who is left gets a moment, not a timeout."""
        if begun.grace or not begun.in_vain:
            return
        begun.grace = True
        self._ask_the_spared(register, begun)
        began_ms = begun.spared_ms + self._context.rounds.mean_ms  # of those who began later
        grace_ms = max(0.0, began_ms - self._context.now_ms) + self._context.grace_ms()
        rid = begun.rid

        def over(_now_ms: float) -> None:
            if self._rounds.get(rid) is register:
                self._failed(register, begun, wait=wait)

        self._context.later(grace_ms, over)

    def _send(self, register: Register, begun: Round, only: tuple[Kid, ...] | None = None) -> None:
        rid, epoch, key = begun.rid, begun.config.epoch, register.key
        message: Read | Prepare | Accept
        if begun.phase is Phase.READ:
            message = Read(rid, epoch, key)
        elif begun.phase is Phase.PREPARE:
            message = Prepare(rid, epoch, key, begun.ballot)
        else:
            assert begun.value is not None
            message = Accept(rid, epoch, key, begun.ballot, begun.value, True)
        for kid in begun.asked if only is None else only:
            self._context.send(kid, message)

    # -- answers of voters ------------------------------------------------------------------------

    def receive(self, source: Kid, message: Replies) -> None:
        register = self._rounds.get(message.rid)
        begun = register.round if register is not None else None
        if isinstance(message, Stale):
            self._stale(source, message, register, begun)
            return
        if register is None or begun is None or source not in begun.kids:
            if isinstance(message, Accepted):
                self._thrift.heard_late(source, message.rid)
            return
        match message:
            case Promise() if begun.phase is Phase.PREPARE:
                begun.heard[source] = message
                if begun.enough(begun.heard):
                    self._promised(register, begun)
                else:
                    self._in_vain(register, begun)
            case ReadReply() if begun.phase is Phase.READ:
                begun.heard[source] = message
                if begun.config.quorum(begun.heard):
                    self._read(register, begun)
            case Accepted() if begun.phase is Phase.ACCEPT:
                begun.promised[source] = message.promised
                if math.isfinite(begun.spared_ms):
                    self._thrift.heard_late(source, begun.rid)
                else:
                    self._thrift.heard(source, self._context.now_ms - begun.sent_ms)
                if begun.enough(begun.promised):
                    self._chosen(register, begun)
                else:
                    self._in_vain(register, begun)
            case Nack():
                self._refused(source, message, register, begun)
            case Full():
                begun.full = True
                begun.refused[source] = ZERO
                if begun.hopeless():
                    self._failed(register, begun)
                else:
                    self._ask_the_spared(register, begun)
            case _:
                return

    def _read(self, register: Register, begun: Round) -> None:
        """P2, else through the queue like a write, which also writes back."""
        if not begun.agreed():
            if begun.missing():
                self._in_vain(register, begun, wait=False)  # those that are left may agree yet
                return
            self._failed(register, begun, wait=False)
            return
        self._context.rounds.took(self._context.now_ms - begun.sent_ms)
        latest, value = begun.latest(), begun.told()
        if latest.value is not None and value.dead:
            self.on_tombstone(register.key)
        self._end(register, begun)
        result = Result("ok", value.version, value.data, stamp=value.stamp)
        register.tries = 0
        self._tell(begun.batch, [result] * len(begun.batch))
        self._kick(register)

    def _promised(self, register: Register, begun: Round) -> None:
        latest, value = begun.latest(), begun.present()
        self._context.rounds.took(self._context.now_ms - begun.sent_ms)
        new, results = change(value, [each.wanted() for each in begun.batch], begun.ballot)
        rewrite = any(
            isinstance(each.change, Rewrite) and result.status == "ok"
            for each, result in zip(begun.batch, results, strict=True)
        )
        nothing = latest.value is None and new is value  # nobody to propose anything to
        if new is value and begun.agreed() and (nothing or not rewrite):
            self._end(register, begun)
            register.tries = 0
            told = begun.told()
            self._tell(
                begun.batch,
                [replace(each, version=told.version, stamp=told.stamp) for each in results],
            )
            self._kick(register)
            return
        batch = begun.batch
        self._end(register, begun)
        proposal = self._begin(register, Phase.ACCEPT, begun.ballot, batch, begun.config)
        self._propose(register, proposal, value)

    def _propose(self, register: Register, begun: Round, value: Value) -> None:
        """Send the Accepts for the batch on top of `value`."""
        begun.value, begun.results = change(
            value, [each.wanted() for each in begun.batch], begun.ballot
        )
        for operation, result in zip(begun.batch, begun.results, strict=True):
            if result.status in ("ok", "no") and not operation.reads:
                operation.sent, operation.rebase = True, False  # P3
                if operation.base is None:
                    operation.base = value.stamp
        register.n = max(register.n, begun.ballot.n)
        self._send(register, begun)

    def _chosen(self, register: Register, begun: Round) -> None:
        assert begun.value is not None
        everywhere = begun.everywhere
        self._context.rounds.took(self._context.now_ms - begun.sent_ms)
        self._end(register, begun)
        self._leave_out(register.key, begun, begun.value)
        follower = following(begun.ballot)
        kept = {kid: None for kid, promised in begun.promised.items() if promised == follower}
        ahead = register.highest <= follower  # else somebody would refuse it again and again
        if ahead and begun.config.quorum(kept) and not everywhere:
            register.cache = Cache(follower, begun.value, begun.config.epoch)
            register.n = max(register.n, follower.n)
        if everywhere and not begun.config.joint and begun.value.dead:
            collapse = Collapse(begun.config.epoch, register.key, begun.ballot)
            for kid in begun.kids:
                self._context.send(kid, collapse)
        elif begun.value.dead:
            self.on_tombstone(register.key)
        register.tries = 0
        register.gathering.ended(len(begun.batch), len(register.queue), BATCH_MAX)
        self._tell(begun.batch, begun.results)
        self._kick(register)

    def _leave_out(self, key: str, begun: Round, value: Value) -> None:
        spared = begun.spared()
        if spared:
            left = Left(spared, begun.config.epoch, begun.ballot, value)
            self._thrift.chosen(key, left)
            return
        self._thrift.caught_up(key)
        late = begun.missing()
        if late and not math.isfinite(begun.spared_ms):
            self._thrift.ended(begun.rid, begun.sent_ms, late)

    def _refused(self, source: Kid, message: Nack, register: Register, begun: Round) -> None:
        register.highest = max(register.highest, message.most)
        begun.refused[source] = message.most
        if message.most.node != self._context.me and message.most.node:
            contended_ms = self._context.timing.contended_ms
            register.contended_until_ms = self._context.now_ms + contended_ms
        if begun.hopeless():
            self._failed(register, begun)
        else:
            self._in_vain(register, begun)

    # -- configurations ---------------------------------------------------------------------------

    def _stale(
        self, source: Kid, message: Stale, register: Register | None, begun: Round | None
    ) -> None:
        """A voter is ahead of us: follow. It is behind: seal it, and ask once more."""
        config, mine = message.config, self.config
        if config is not None and self.adopt(config):
            if register is not None and begun is not None:
                self._failed(register, begun, wait=False)
            return
        if mine is None or not mine.is_voter(source, message.disk):
            return
        behind = config is None or (config.origin == mine.origin and config.epoch < mine.epoch)
        if not behind:
            return
        times = begun.resent.get(source, 0) if begun is not None else 0
        if times < RESENT_MAX:
            self._context.send(source, Seal(self._context.rid(), mine))
            if register is not None and begun is not None and begun.config.epoch == mine.epoch:
                begun.resent[source] = times + 1
                self._send(register, begun, (source,))

    def adopt(self, config: Config) -> bool:
        """Follow a configuration that is known to be chosen; whether it was news."""
        mine = self.config
        if mine is not None and (config.origin != mine.origin or config.epoch <= mine.epoch):
            return False
        self.config = config
        self.on_adopt()
        return True

    # -- ends -------------------------------------------------------------------------------------

    def _end(self, register: Register, begun: Round) -> None:
        assert register.round is begun
        register.round = None
        del self._rounds[begun.rid]

    def _tell(self, batch: list[Operation], results: list[Result]) -> None:
        self.operations -= len(batch)
        for operation, result in zip(batch, results, strict=True):
            self.finish(operation, result)

    def _failed(self, register: Register, begun: Round, *, wait: bool = True) -> None:
        """The round came to nothing: its operations go back to the head of the queue."""
        self._end(register, begun)
        if not begun.everywhere:
            register.tries += 1
        missing = register.missing = begun.missing()
        left: list[Operation] = []
        for operation in begun.batch:
            if operation.stale and begun.heard and operation.reads and not begun.in_vain:
                self._tell_stale(operation, begun)
            elif begun.full and not operation.sent:
                self.operations -= 1
                self.finish(operation, Result("busy", strength="none"))
            elif operation.everywhere or self._context.now_ms >= operation.deadline_ms:
                self._give_up(operation, missing)
            elif begun.refused and not operation.local and self.contended(register.key):
                self._hand_over(operation)
            else:
                left.append(operation)
        register.queue.extendleft(reversed(left))
        if wait:
            self._back_off(register)
        else:
            self._kick(register)

    def _hand_over(self, operation: Operation) -> None:
        """Somebody else proposes this key: let the operation find its way anew."""
        self.operations -= 1
        operation.fixed = operation.fixed or operation.sent
        self._context.soon(lambda: self.reroute(operation))

    def _tell_stale(self, operation: Operation, begun: Round) -> None:
        value = begun.told()
        self.operations -= 1
        missing = begun.missing()
        found = Result("ok", value.version, value.data, strength="stale", missing=missing)
        self.finish(operation, found)

    def finish(self, operation: Operation, result: Result) -> None:
        """Tell its fate, once, and not in the middle of a step of ours."""
        if not operation.over:
            operation.over = True
            self._context.soon(lambda: operation.done(result))

    def _give_up(self, operation: Operation, missing: tuple[Kid, ...]) -> None:
        self.operations -= 1
        status: Status = "maybe" if operation.sent and not operation.reads else "unavailable"
        why = NO_VOTERS if self.config is None else ""
        self.finish(operation, Result(status, strength="none", missing=missing, why=why))

    def _expire(self, register: Register) -> None:
        now_ms = self._context.now_ms
        for _ in range(len(register.queue)):
            operation = register.queue.popleft()
            if now_ms >= operation.deadline_ms:
                self._give_up(operation, register.missing)
            else:
                register.queue.append(operation)

    def _back_off(self, register: Register) -> None:
        if register.waiting:
            return
        register.waiting = True

        def again(_now_ms: float) -> None:
            register.waiting = False
            self._kick(register)

        unknown = self._context.timing.timeout_ms if self.config is None else 0.0
        self._context.later(unknown + self._context.backoff_ms(register.tries), again)
