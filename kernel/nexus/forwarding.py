"""Routing of operations: a contended key is proposed by one node, the others forward to it.

Interface: `route(operation)` proposes it here or sends it on; `receive` takes `Forward` and
`Forwarded`; `node_up` and `node_down` say who can be forwarded to. All of it is a hint: whoever
proposes, an operation is applied once.

Who does not answer twice is doubted: all that it was sent goes to the next in order, of whom those
that doubt the same one think alike. After a while one operation is sent to find out.

Invariants:
  F1  a forwarded operation is applied only on a value whose ring reaches back to its `base`, a
      stamp that was chosen before it was first sent; so a late copy of it does nothing;
  F2  only the process that a transmission names applies it. `rebase` is answered only to the first
      copy, and obeyed only from that process and while no other transmission of that operation
      is out: then nobody can have applied it;
  F3  what marks decide needs neither: whoever gets it may propose it, so from its first
      transmission its failure is not reported (P3).
Measured in a prototype: eight proposers of one key starve seven of them; one proposer is fair.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from manifold.kernel import rendezvous
from manifold.kernel.nexus.context import Context
from manifold.kernel.nexus.messages import Forward, Forwarded
from manifold.kernel.nexus.proposer import OPERATIONS_MAX, Proposer
from manifold.kernel.nexus.rounds import Operation
from manifold.kernel.nexus.values import Result
from manifold.vm.kid import Kid

BASES_MAX = 16_384  # keys whose stamp is remembered
SOURCES_MAX = 4096  # nodes that forward to us: limits.NODES_MAX
TRANSMISSIONS_MAX = 2  # then somebody else is asked
TRIED_MAX = 2  # then we propose ourselves
UNANSWERED_MAX = 1024  # transmissions given up, whose late answers tell how long they take
CHOICES_MAX = 16_384  # keys whose proposer is remembered: a hash of every node each
REBASES_MAX = 4
COUNT_BITS = 32
BOOT_MASK = (1 << 29) - 1  # with the count below it: 61 bits
LEFT_MS_MIN = 1.0


@dataclass(slots=True)
class Sent:
    """An operation that somebody else was asked to propose."""

    operation: Operation
    to: Kid
    process: int
    base: int  # -1: whoever gets it does not apply it
    numbers: list[int] = field(default_factory=list)
    sent_ms: float = 0.0  # the first of them
    rebases: int = 0


@dataclass(slots=True)
class Doubt:
    """Nothing is forwarded there until then; the next doubt lasts `span_ms`."""

    until_ms: float
    span_ms: float


class Forwarding:
    """See the module."""

    def __init__(self, context: Context, proposer: Proposer) -> None:
        self._context = context
        self._proposer = proposer
        proposer.reroute = self.route
        self._live: list[Kid] = [context.me]
        self._doubted: dict[Kid, Doubt] = {}
        self._choices: dict[str, Kid] = {}  # while nobody is doubted
        self._unanswered: OrderedDict[int, float] = OrderedDict()
        self._bases: OrderedDict[str, int] = OrderedDict()
        self._out: dict[int, Sent] = {}  # by number of a transmission
        self._number = (context.boot & BOOT_MASK) << COUNT_BITS
        self._highest: dict[Kid, int] = {}
        self._processes: dict[Kid, int] = {}

    def node_up(self, kid: Kid) -> None:
        if kid not in self._live:
            self._live = sorted([*self._live, kid])
            self._choices.clear()
        self._doubted.pop(kid, None)

    def node_down(self, kid: Kid) -> None:
        if kid in self._live and kid != self._context.me:
            self._live.remove(kid)
            self._choices.clear()
        self._take_all_back(kid)

    def _take_all_back(self, kid: Kid) -> None:
        for number in [number for number, sent in self._out.items() if sent.to == kid]:
            sent = self._out.get(number)
            if sent is not None:
                self._take_back(sent)

    @property
    def under_way(self) -> int:
        return len(self._out)

    def live(self) -> list[Kid]:
        return self._live

    # -- our own operations -----------------------------------------------------------------------

    def route(self, operation: Operation) -> None:
        to = self._preferred(operation)
        if to is None or len(self._out) >= OPERATIONS_MAX:
            self._proposer.submit(operation)
            return
        process = self._processes.get(to, 0)
        self._transmit(Sent(operation, to, process, self._base(operation) if process else -1))

    def _base(self, operation: Operation) -> int:
        if operation.base is not None:
            return operation.base
        return self._bases.get(operation.key, -1)

    def _preferred(self, operation: Operation) -> Kid | None:
        """Whom to ask; None: propose it here."""
        if operation.local or operation.reads or operation.tried >= TRIED_MAX:
            return None
        if not self._proposer.contended(operation.key):
            return None
        to = self._choice(operation.key)
        if to is None or to == self._context.me:
            return None
        if to in self._doubted:
            self._doubt(to)  # this one finds out; the others wait for what comes of it
        return to

    def _choice(self, key: str) -> Kid | None:
        """The first in the order of the key that is not doubted."""
        if self._doubted:
            now_ms = self._context.now_ms
            doubted = [kid for kid, doubt in self._doubted.items() if now_ms < doubt.until_ms]
            return rendezvous.first(key, [kid for kid in self._live if kid not in doubted])
        choice = self._choices.get(key)
        if choice is None:
            choice = rendezvous.first(key, self._live)
            assert choice is not None, "we live"
            if len(self._choices) >= CHOICES_MAX:
                self._choices.clear()
            self._choices[key] = choice
        return choice

    def _doubt(self, kid: Kid) -> None:
        timing, doubt = self._context.timing, self._doubted.get(kid)
        span_ms = doubt.span_ms if doubt is not None else timing.doubt_ms
        until_ms = self._context.now_ms + span_ms
        self._doubted[kid] = Doubt(until_ms, min(2 * span_ms, timing.doubt_most_ms))

    def _transmit(self, sent: Sent) -> None:
        self._number += 1
        number = self._number
        if not sent.numbers:
            sent.sent_ms = self._context.now_ms
        sent.numbers.append(number)
        self._out[number] = sent
        wish = sent.operation
        left_ms = max(LEFT_MS_MIN, wish.deadline_ms - self._context.now_ms)
        self._context.send(
            sent.to,
            Forward(number, sent.process, wish.op, wish.key, wish.change, sent.base, left_ms),
        )

        def late(_now_ms: float) -> None:
            if number in self._out:
                self._late(sent)

        self._context.later(self._context.forwards.timeout_ms(self._context.timing), late)

    def _late(self, sent: Sent) -> None:
        if len(sent.numbers) < TRANSMISSIONS_MAX:
            self._transmit(sent)
            return
        for number in sent.numbers:
            self._unanswered[number] = sent.sent_ms
            if len(self._unanswered) > UNANSWERED_MAX:
                self._unanswered.popitem(last=False)
        doubt = self._doubted.get(sent.to)
        if doubt is None or self._context.now_ms >= doubt.until_ms:
            self._doubt(sent.to)
        self._take_all_back(sent.to)

    def _take_back(self, sent: Sent) -> None:
        """Ask somebody else, or propose it here; the other may have done so already."""
        self._close(sent)
        wish = sent.operation
        wish.tried += 1
        if wish.blind:
            wish.sent = True  # F3
        elif sent.base >= 0:
            wish.base, wish.sent, wish.fixed = sent.base, True, True
        self.route(wish)

    def _close(self, sent: Sent) -> None:
        for number in sent.numbers:
            self._out.pop(number, None)

    def _forwarded(self, source: Kid, message: Forwarded) -> None:
        sent = self._out.get(message.number)
        if sent is None:
            late_ms = self._unanswered.pop(message.number, None)
            if late_ms is not None:
                self._context.forwards.took(self._context.now_ms - late_ms)
        if sent is None or source != sent.to:
            return
        self._doubted.pop(source, None)
        self._processes[source] = message.process
        if len(sent.numbers) == 1:  # else it is not known which of them was answered
            self._context.forwards.took(self._context.now_ms - sent.sent_ms)
        if message.status == "rebase":
            self._rebase(sent, message)
        elif message.status == "unavailable" or (message.status == "busy" and not message.why):
            return  # this copy was not proposed; the timeout decides
        else:
            self._close(sent)
            done = Result(
                message.status,
                message.version,
                message.data,
                message.fence,
                message.stamp,
                why=message.why,
            )
            self.learn(sent.operation.key, done)
            self._proposer.finish(sent.operation, done)

    def _rebase(self, sent: Sent, message: Forwarded) -> None:
        applies = sent.base != -1  # else nobody does, whatever copy it is
        if applies and (len(sent.numbers) > 1 or message.process != sent.process):
            return  # F2
        if sent.rebases >= REBASES_MAX:
            return
        self._close(sent)
        if applies and sent.operation.fixed:
            self._proposer.finish(sent.operation, Result("maybe", strength="none"))
            return
        sent.numbers.clear()
        sent.rebases += 1
        sent.process = message.process
        fixed = sent.operation.base if sent.operation.fixed else None
        sent.base = message.stamp if fixed is None else fixed
        self._transmit(sent)

    def learn(self, key: str, result: Result) -> None:
        """Remember the latest stamp that was told of a key."""
        self._bases.pop(key, None)
        if result.status in ("ok", "no") and result.strength == "quorum":
            self._bases[key] = result.stamp
            if len(self._bases) > BASES_MAX:
                self._bases.popitem(last=False)

    # -- operations of others ---------------------------------------------------------------------

    def receive(self, source: Kid, message: Forward | Forwarded) -> None:
        if isinstance(message, Forwarded):
            self._forwarded(source, message)
            return
        room = source in self._highest or len(self._highest) < SOURCES_MAX
        first = room and message.number > self._highest.get(source, 0)
        if first:
            self._highest[source] = message.number
        mine = message.process == self._context.nonce
        base = message.base if mine else -1

        def done(result: Result) -> None:
            process = self._context.nonce
            answer = Forwarded(
                message.number,
                process,
                result.status,
                result.version,
                result.stamp,
                result.data,
                result.fence,
                result.why,
            )
            if result.status != "maybe":  # who asked finds out itself, or says so
                self._context.send(source, answer)

        deadline_ms = self._context.now_ms + message.left_ms
        self._proposer.submit(
            Operation(
                message.op,
                message.key,
                message.change,
                deadline_ms,
                done,
                base=base,
                rebase=first or base == -1,
            )
        )
