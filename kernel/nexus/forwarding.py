"""Routing of operations: a contended key is proposed by one node, the others forward to it.

Interface: `route(operation)` proposes it here or sends it on; `receive` takes `Forward` and
`Forwarded`; `node_up` and `node_down` say who can be forwarded to. All of it is a hint: whoever
proposes, an operation is applied once.

Invariants:
  F1  a forwarded operation is applied only on a value whose ring reaches back to its `base`, a
      stamp that was chosen before it was first sent; so a late copy of it does nothing;
  F2  only the process that a transmission names applies it. `rebase` is answered only to the first
      copy, and obeyed only from that process and while no other transmission of that operation
      is out: then nobody can have applied it.
Measured in a prototype: eight proposers of one key starve seven of them; one proposer is fair.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from manifold.kernel.nexus.configs import rendezvous
from manifold.kernel.nexus.context import Context
from manifold.kernel.nexus.messages import Forward, Forwarded
from manifold.kernel.nexus.proposer import OPERATIONS_MAX, Proposer
from manifold.kernel.nexus.rounds import Operation
from manifold.kernel.nexus.values import Result
from manifold.vm.kid import Kid

BASES_MAX = 16_384  # keys whose stamp is remembered
SOURCES_MAX = 4096  # nodes that forward to us: limits.NODES_MAX
TRANSMISSIONS_MAX = 2  # then we propose ourselves
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
    rebases: int = 0


class Forwarding:
    """See the module."""

    def __init__(self, context: Context, proposer: Proposer) -> None:
        self._context = context
        self._proposer = proposer
        proposer.reroute = self.route
        self._live: list[Kid] = [context.me]
        self._doubted: dict[Kid, float] = {}
        self._bases: OrderedDict[str, int] = OrderedDict()
        self._out: dict[int, Sent] = {}  # by number of a transmission
        self._number = (context.boot & BOOT_MASK) << COUNT_BITS
        self._highest: dict[Kid, int] = {}
        self._processes: dict[Kid, int] = {}

    def node_up(self, kid: Kid) -> None:
        if kid not in self._live:
            self._live = sorted([*self._live, kid])

    def node_down(self, kid: Kid) -> None:
        if kid in self._live and kid != self._context.me:
            self._live.remove(kid)
        late = dict.fromkeys(n for n, sent in self._out.items() if sent.to == kid)
        for number in late:
            sent = self._out.get(number)
            if sent is not None:
                self._take_back(sent)

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
        if operation.local or operation.reads:
            return None
        if not self._proposer.contended(operation.key):
            return None
        now_ms = self._context.now_ms
        to = rendezvous(operation.key, self._live)
        if to is None or to == self._context.me or now_ms < self._doubted.get(to, now_ms):
            return None
        return to

    def _transmit(self, sent: Sent) -> None:
        self._number += 1
        number = self._number
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

        self._context.later(2 * self._context.timeout_ms(), late)

    def _late(self, sent: Sent) -> None:
        if len(sent.numbers) < TRANSMISSIONS_MAX:
            self._transmit(sent)
            return
        self._doubted[sent.to] = self._context.now_ms + self._context.timing.doubt_ms
        self._take_back(sent)

    def _take_back(self, sent: Sent) -> None:
        """Propose it here; the other may have done so already."""
        self._close(sent)
        wish = sent.operation
        if sent.base >= 0:
            wish.base, wish.sent = sent.base, True
        self._proposer.submit(wish)

    def _close(self, sent: Sent) -> None:
        for number in sent.numbers:
            self._out.pop(number, None)

    def _forwarded(self, source: Kid, message: Forwarded) -> None:
        sent = self._out.get(message.number)
        if sent is None or source != sent.to:
            return
        self._doubted.pop(source, None)
        self._processes[source] = message.process
        if message.status == "rebase":
            self._rebase(sent, message)
        elif message.status in ("unavailable", "busy"):
            return  # this copy was not proposed; the timeout decides
        else:
            self._close(sent)
            done = Result(
                message.status, message.version, message.data, message.fence, message.stamp
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
