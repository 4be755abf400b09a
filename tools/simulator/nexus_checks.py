"""What is judged of Nexus from outside: what goes over the wire, and what is durable then.

Interface: `Observer(world)` listens; `judge()` looks at the whole at the end. `failures` grows.
  N1  one value for a ballot of a key, ever; one configuration for an epoch;
  N2  what a voter has promised, accepted, floored and sealed never goes back, over its crashes;
  N3  nothing is answered before it is durable;
  N4  the chosen values of a key are one chain: each stamp has one operation, each version one data,
      none is left out, fences do not go back;
  N5  each operation is in the chain at one stamp; one that was refused is in none;
  N6  a voter that has sealed an epoch answers nothing of an earlier one;
  N7  a tombstone collapses only where every voter has accepted it.
"""

from __future__ import annotations

from typing import Any

import msgspec

from manifold.kernel.effects import Send
from manifold.kernel.nexus.acceptor import shard_of
from manifold.kernel.nexus.ballots import ZERO, Ballot
from manifold.kernel.nexus.configs import Config
from manifold.kernel.nexus.messages import (
    KEY_PREFIX,
    VOTER_NAME,
    Accept,
    Accepted,
    Collapse,
    KeyRecord,
    Prepare,
    Promise,
    Read,
    ReadReply,
    Seal,
    Sealed,
    VoterRecord,
)
from manifold.kernel.nexus.values import Lease, Value
from manifold.tools.simulator.world import Node, World

FAILURES_MAX = 20
_key_record = msgspec.msgpack.Decoder(KeyRecord)
_voter_record = msgspec.msgpack.Decoder(VoterRecord)

Asked = Prepare | Accept | Read
Voter = tuple[str, int]  # a node, and the epoch it joined in


class Observer:
    """See the module."""

    def __init__(self, world: World) -> None:
        self.failures: list[str] = []
        self.configs: dict[int, Config] = {}
        self.chosen: dict[str, dict[Ballot, Value]] = {}
        self.refused: dict[str, None] = {}  # operations that were said not to have happened
        self.answers = 0
        self._world = world
        self._asked: dict[tuple[str, int], Asked] = {}  # by who asked, and the number
        self._values: dict[tuple[str, Ballot], Value] = {}
        self._votes: dict[tuple[str, Ballot], dict[str, None]] = {}
        self._promised: dict[tuple[Voter, str], Ballot] = {}
        self._accepted: dict[tuple[Voter, str], Ballot] = {}
        self._joined: dict[str, int] = {}
        self._sealed: dict[str, int] = {}
        self._floors: dict[str, tuple[Ballot, ...]] = {}
        self._handlers: dict[type, Any] = {
            Prepare: self._prepare,
            Accept: self._accept,
            Read: self._prepare,
            Promise: self._promise,
            ReadReply: self._read,
            Accepted: self._vote,
            Seal: self._seal,
            Sealed: self._seals,
            Collapse: self._collapse,
        }
        world.on_send.append(self._sent)
        world.on_boot.append(self._booted)

    def _sent(self, node: Node, send: Send) -> None:
        handler = self._handlers.get(type(send.message))
        if handler is not None:
            handler(node, send.message, send.to)

    def _booted(self, node: Node) -> None:
        """What a voter joined as is what its disk says, which it may not have told anybody."""
        self._joined.pop(node.kid, None)

    def fail(self, what: str) -> None:
        if len(self.failures) < FAILURES_MAX:
            self.failures.append(f"t={self._world.now_ms:.1f} {what}")

    # -- proposers --------------------------------------------------------------------------------

    def _prepare(self, node: Node, message: Prepare | Read, to: str) -> None:
        self._asked[(node.kid, message.rid)] = message

    def _accept(self, node: Node, message: Accept, to: str) -> None:
        self._asked[(node.kid, message.rid)] = message
        name = (message.key, message.ballot)
        value = self._values.setdefault(name, message.value)
        if value is not message.value and value != message.value:
            self.fail(f"N1 two values for {name}: {value} and {message.value}")

    def _seal(self, node: Node, message: Seal, to: str) -> None:
        config = self.configs.setdefault(message.config.epoch, message.config)
        if config != message.config:
            self.fail(f"N1 two configurations of epoch {config.count}")

    def _collapse(self, node: Node, message: Collapse, to: str) -> None:
        votes = self._votes.get((message.key, message.ballot), {})
        config = self.configs[message.epoch]
        if any(kid not in votes for kid in config.kids()):
            self.fail(f"N7 {message.key} collapses with {len(votes)} of {len(config.kids())}")

    # -- voters -----------------------------------------------------------------------------------

    def _durable(self, node: Node, key: str) -> tuple[Ballot, Ballot]:
        """Promised and accepted, as a restart would find them; a floor stands for both."""
        data = node.disk.read(KEY_PREFIX + key)
        if data:
            record = _key_record.decode(data)
            if record.joined == self._joined.get(node.kid, 0):
                return record.promised, record.accepted
        saved = node.disk.read(VOTER_NAME)
        floor = _voter_record.decode(saved).floors[shard_of(key)] if saved else ZERO
        return floor, floor

    def _voter(self, node: Node, asked: Asked) -> Voter:
        self.answers += 1
        if self._sealed.get(node.kid, 0) > asked.epoch:
            self.fail(f"N6 node {node.index} answers of an epoch before the one it sealed")
        if node.kid not in self._joined:
            saved = node.disk.read(VOTER_NAME)
            self._joined[node.kid] = _voter_record.decode(saved).joined if saved else 0
        return node.kid, self._joined[node.kid]

    def _remembers(
        self, node: Node, voter: Voter, key: str, accepted: Ballot, floor: Ballot
    ) -> None:
        """What it tells counts as accepted: a crash may have kept it from saying so before."""
        last = self._accepted.get((voter, key), ZERO)
        if max(accepted, floor) < last:
            self.fail(f"N2 node {node.index} forgot {key}: accepted {last}, tells of {accepted}")
        self._accepted[(voter, key)] = max(last, accepted)

    def _promise(self, node: Node, message: Promise, to: str) -> None:
        asked = self._asked[(to, message.rid)]
        if not isinstance(asked, Prepare):
            self.fail("N1 a request's number was used twice")
            return
        voter, key = self._voter(node, asked), asked.key
        if asked.ballot <= self._promised.get((voter, key), ZERO):
            self.fail(f"N2 node {node.index} promises {asked.ballot} of {key} after a higher one")
        self._remembers(node, voter, key, message.accepted, message.floor)
        self._promised[(voter, key)] = asked.ballot
        if self._durable(node, key)[0] < asked.ballot:
            self.fail(f"N3 node {node.index} promises {key} before it is durable")

    def _read(self, node: Node, message: ReadReply, to: str) -> None:
        asked = self._asked[(to, message.rid)]
        voter = self._voter(node, asked)
        self._remembers(node, voter, asked.key, message.accepted, message.floor)
        if self._durable(node, asked.key)[1] < message.accepted:
            self.fail(f"N3 node {node.index} tells of {asked.key} before it is durable")

    def _vote(self, node: Node, message: Accepted, to: str) -> None:
        asked = self._asked[(to, message.rid)]
        if not isinstance(asked, Accept):
            self.fail("N1 a request's number was used twice")
            return
        voter, key, ballot = self._voter(node, asked), asked.key, asked.ballot
        last = self._accepted.get((voter, key), ZERO)
        if ballot < last or (ballot != last and ballot < self._promised.get((voter, key), ZERO)):
            self.fail(f"N2 node {node.index} accepts {ballot} of {key} after a higher one")
        self._accepted[(voter, key)] = max(last, ballot)
        promised = max(message.promised, self._promised.get((voter, key), ZERO))
        self._promised[(voter, key)] = promised
        durable = self._durable(node, key)
        if durable[1] < ballot or durable[0] < message.promised:
            self.fail(f"N3 node {node.index} accepts {key} before it is durable")
        votes = self._votes.setdefault((key, ballot), {})
        votes[node.kid] = None
        chosen = self.chosen.setdefault(key, {})
        config = self.configs.get(asked.epoch)
        if config is None:
            self.fail(f"N6 node {node.index} answers of an epoch that nobody was asked to seal")
        elif ballot not in chosen and config.quorum(votes):
            chosen[ballot] = asked.value

    def _seals(self, node: Node, message: Sealed, to: str) -> None:
        if message.epoch < self._sealed.get(node.kid, 0):
            self.fail(f"N2 node {node.index} goes back to an earlier epoch")
        before = self._floors.get(node.kid, message.floors)
        if any(new < old for new, old in zip(message.floors, before, strict=True)):
            self.fail(f"N2 node {node.index} has lowered a floor")
        self._floors[node.kid] = message.floors
        self._sealed[node.kid] = message.epoch
        saved = node.disk.read(VOTER_NAME)
        record = _voter_record.decode(saved) if saved else None
        if record is None or record.config is None or record.config.epoch < message.epoch:
            self.fail(f"N3 node {node.index} seals before it is durable")
            return
        self._joined[node.kid] = record.joined

    # -- at the end -------------------------------------------------------------------------------

    def judge(self) -> None:
        """N4 and N5, over all that was ever chosen."""
        places: dict[str, tuple[str, int]] = {}
        for key in sorted(self.chosen):
            self._chain(key, places)
        for op in self.refused:
            if op in places:
                self.fail(f"N5 {op} was refused and is in the chain at {places[op]}")

    def _chain(self, key: str, places: dict[str, tuple[str, int]]) -> None:
        operations: dict[int, str] = {}
        datas: dict[int, Any] = {}
        before: Value | None = None
        fence = ZERO
        for ballot, value in sorted(self.chosen[key].items()):
            oldest = value.stamp - len(value.ring)
            for place, entry in enumerate(value.ring, 1):
                stamp = oldest + place
                if operations.setdefault(stamp, entry.op) != entry.op:
                    self.fail(f"N4 {key} has two operations at stamp {stamp}")
                if places.setdefault(entry.op, (key, stamp)) != (key, stamp):
                    self.fail(f"N5 {entry.op} is at {places[entry.op]} and {(key, stamp)}")
            if datas.setdefault(value.version, value.data) != value.data:
                self.fail(f"N4 {key} has two values at version {value.version}")
            if before is not None:
                lost = oldest > before.stamp and before.data is not None
                back = value.version < before.version or value.stamp < before.stamp
                if back or lost:
                    self.fail(f"N4 {key} at {ballot} leaves out stamp {before.stamp}")
            if isinstance(value.data, Lease):
                if value.data.fence < fence:
                    self.fail(f"N4 a fence of {key} goes back")
                fence = value.data.fence
            before = value
