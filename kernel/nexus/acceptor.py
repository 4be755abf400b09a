"""The acceptor: promises and accepts, one record a key, durable before it is answered.

Interface: `receive(source, message)` for what voters are asked; `sweep` for what a voter cleans up
by itself. It answers only messages of exactly the epoch that it has sealed; to others it answers
`Stale`, with its configuration, and whoever is ahead seals it.

Invariants, asserted here or from outside by tools/simulator/nexus_checks.py:
  A1  promised, accepted, floors and the sealed epoch never go back, over crashes as well;
  A2  every answer stands after the record that it tells of;
  A3  once an epoch is sealed, nothing of an earlier one is answered;
  A4  a record is dropped only once a floor above all that it promised and accepted is durable;
  A5  a voter that was not sealed in the epoch before, or was no voter in it, starts without
      records: nobody has counted on it. A disk that is not the one listed does not vote at all.
Source: Rystsov, "CASPaxos" (2018), section 2.2; design page of Nexus. Differences: an accept of
the accepted ballot is answered again; a ballot must have a larger `n` than what was accepted, so
that versions are bounded by ballots (values.py V3).
"""

from __future__ import annotations

import heapq
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from manifold.kernel.effects import Send
from manifold.kernel.nexus.ballots import ZERO, Ballot, following
from manifold.kernel.nexus.configs import Config
from manifold.kernel.nexus.context import Context
from manifold.kernel.nexus.messages import (
    KEY_PREFIX,
    SCAN_KEYS,
    SHARDS,
    VOTER_NAME,
    Accept,
    Accepted,
    Collapse,
    Drop,
    Floors,
    Full,
    Greeting,
    Hello,
    Hint,
    KeyRecord,
    Nack,
    Prepare,
    Promise,
    Read,
    ReadReply,
    Scan,
    Scanned,
    Seal,
    Sealed,
    Stale,
    VoterRecord,
)
from manifold.kernel.nexus.values import Value
from manifold.vm.kid import Kid

WATCHERS_MAX = 4096  # of one key: every node, limits.NODES_MAX
WATCHED_MAX = 16_384  # keys with watchers; who is forgotten polls
ROWS_MAX = 65_536  # keys; at the usual 1 KiB they fill the 62 MB that a voter's disk may hold
DISK_BITS = 61
WATCH_POLLS = 3  # a watcher that is silent for so many polls is gone

_encode = msgspec.msgpack.Encoder().encode
_voter = msgspec.msgpack.Decoder(VoterRecord)
_record = msgspec.msgpack.Decoder(KeyRecord)

Asked = Prepare | Accept | Read | Scan | Collapse


def shard_of(key: str) -> int:
    return zlib.crc32(key.encode()) % SHARDS


@dataclass(slots=True)
class Row:
    """One register. `record` is its encoding, None where it has changed since."""

    promised: Ballot
    accepted: Ballot
    value: Value | None
    since_ms: float = 0.0  # when it was accepted, as far as this process knows
    record: bytes | None = None


class Acceptor:
    """One voter, or a node that could become one."""

    def __init__(self, context: Context, durable: Mapping[str, bytes]) -> None:
        self._context = context
        self.stopped = False
        self.rows: dict[str, Row] = {}
        self._garbage: list[str] = []
        self._fading: dict[str, None] = {}  # rows without data: `sweep` looks after them
        self._watchers: dict[str, dict[Kid, float]] = {}
        saved = durable.get(VOTER_NAME)
        if saved:
            record = _voter.decode(saved)
        else:
            record = VoterRecord(context.random.getrandbits(DISK_BITS) + 1, 0, None)
        self.disk, self.joined = record.disk, record.joined
        self.config: Config | None = None
        self.votes = False
        self._follow(record.config)
        self.floors = list(record.floors)
        for name in sorted(durable):
            if name.startswith(KEY_PREFIX) and durable[name]:
                self._load(name, durable[name])

    def _load(self, name: str, data: bytes) -> None:
        record = _record.decode(data)
        if record.joined != self.joined:  # A5: of an earlier time as a voter
            self._garbage.append(name)
            return
        row = Row(record.promised, record.accepted, record.value, record=data)
        self._keep(name.removeprefix(KEY_PREFIX), row)

    def _keep(self, key: str, row: Row) -> None:
        self.rows[key] = row
        if row.value is None or row.value.dead:
            self._fading[key] = None
        else:
            self._fading.pop(key, None)

    def _follow(self, config: Config | None) -> None:
        self.config = config
        self.votes = config is not None and config.is_voter(self._context.me, self.disk)

    def start(self) -> None:
        """Nothing is made durable: a number that nobody was told may be another next time."""
        for row in self.rows.values():
            row.since_ms = self._context.now_ms

    # -- messages ---------------------------------------------------------------------------------

    def receive(self, source: Kid, message: Asked | Seal | Hello | Drop) -> None:
        if self.stopped:
            return
        match message:
            case Seal():
                self._seal(source, message)
            case Hello(rid=rid):
                self._persist_voter(Send(source, Greeting(rid, self.disk, self.config)))
            case Drop():
                if source == self._context.me:
                    self._drop(message)
            case _:
                if not self._current(message.epoch):
                    self._stale(source, getattr(message, "rid", 0))
                else:
                    self._serve(source, message)

    def _current(self, epoch: int) -> bool:
        return self.votes and self.config is not None and self.config.epoch == epoch  # A3

    def _serve(self, source: Kid, message: Asked) -> None:
        match message:
            case Prepare():
                self._prepare(source, message)
            case Accept():
                self._accept(source, message)
            case Read():
                self._read(source, message)
            case Scan():
                self._scan(source, message)
            case Collapse():
                self._collapse(message)

    def _stale(self, source: Kid, rid: int) -> None:
        self._persist_voter(Send(source, Stale(rid, self.config, self.disk)))

    def _row(self, key: str) -> Row:
        """The row, or what a missing one reads as."""
        return self.rows.get(key) or Row(self.floors[shard_of(key)], ZERO, None)

    def _prepare(self, source: Kid, message: Prepare) -> None:
        row, ballot = self._row(message.key), message.ballot
        floor = self.floors[shard_of(message.key)]
        if len(self.rows) >= ROWS_MAX and message.key not in self.rows:
            self._context.send(source, Full(message.rid))
            return
        least = row.accepted.n if row.accepted != ZERO else floor.n
        if ballot <= max(row.promised, row.accepted) or ballot.n <= least:
            self._refuse(source, message.rid, message.key, row)
            return
        accepted, value = row.accepted, row.value
        self._write(message.key, row, promised=ballot)
        reply = Promise(message.rid, accepted, value, floor if accepted == ZERO else ZERO)
        self._persist_row(message.key, Send(source, reply))

    def _refuse(self, source: Kid, rid: int, key: str, row: Row) -> None:
        floor = self.floors[shard_of(key)] if row.accepted == ZERO else ZERO
        most = max(row.promised, row.accepted, floor)  # all that it has to be above
        self._persist_row(key, Send(source, Nack(rid, most)))

    def _accept(self, source: Kid, message: Accept) -> None:
        row, ballot = self._row(message.key), message.ballot
        if ballot != row.accepted:
            if ballot < max(row.promised, row.accepted):
                self._refuse(source, message.rid, message.key, row)
                return
            promise = following(ballot) if message.keep else ballot
            self._write(
                message.key,
                row,
                promised=max(row.promised, promise),
                accepted=ballot,
                value=message.value,
            )
            self._hint(message.key, message.value.version)
            row = self.rows[message.key]
        self._persist_row(message.key, Send(source, Accepted(message.rid, row.promised)))

    def _write(
        self,
        key: str,
        row: Row,
        *,
        promised: Ballot,
        accepted: Ballot | None = None,
        value: Value | None = None,
    ) -> None:
        assert promised >= row.promised and (accepted or row.accepted) >= row.accepted, "A1"
        row.promised, row.record = promised, None
        if accepted is not None:
            row.accepted, row.value = accepted, value
        row.since_ms = self._context.now_ms
        self._keep(key, row)

    def _read(self, source: Kid, message: Read) -> None:
        row = self._row(message.key)
        if message.watch:
            self._watch(source, message.key)
        floor = ZERO if row.accepted != ZERO else self.floors[shard_of(message.key)]
        reply = ReadReply(message.rid, row.accepted, row.value, floor)
        self._persist_row(message.key, Send(source, reply))

    # -- watchers ---------------------------------------------------------------------------------

    def _watch(self, source: Kid, key: str) -> None:
        watchers = self._watchers.get(key)
        if watchers is None:
            if len(self._watchers) >= WATCHED_MAX:
                del self._watchers[next(iter(self._watchers))]
            watchers = self._watchers[key] = {}
        if len(watchers) < WATCHERS_MAX or source in watchers:
            watchers[source] = self._context.now_ms + WATCH_POLLS * self._context.timing.poll_ms

    def _hint(self, key: str, version: int) -> None:
        watchers = self._watchers.get(key)
        if watchers is None:
            return
        for kid, until_ms in list(watchers.items()):
            if self._context.now_ms > until_ms:
                del watchers[kid]
            else:
                self._context.send(kid, Hint(key, version))
        if not watchers:
            del self._watchers[key]

    # -- configuration ----------------------------------------------------------------------------

    def _seal(self, source: Kid, message: Seal) -> None:
        config, known = message.config, self.config
        if known is not None and (config.origin != known.origin or config.epoch < known.epoch):
            self._stale(source, message.rid)
            return
        listed = config.is_voter(self._context.me, self.disk)
        if known is None and not listed:  # not sealed: perhaps this disk will be listed later
            self._stale(source, message.rid)
            return
        if known is None or config.epoch > known.epoch:
            if not self._goes_on(config):
                self._fading.clear()
                self.rows.clear()  # on disk they stay until a restart finds them to be nobody's
                self.joined = config.epoch  # A5
            self._follow(config)
        if not listed:
            self._stale(source, message.rid)
            return
        for shard, floor in enumerate(message.floors):
            self.floors[shard] = max(self.floors[shard], floor)
        reply = Sealed(message.rid, config.epoch, tuple(self.floors))
        self._persist_voter(Send(source, reply))

    def _goes_on(self, config: Config) -> bool:
        """Whether this voter had a vote in the epoch before `config`, and knows it."""
        known = self.config
        return known is not None and known.count + 1 == config.count and self.votes

    def _scan(self, source: Kid, message: Scan) -> None:
        after, prefix = message.after, message.prefix
        keys = (
            key
            for key, row in self.rows.items()
            if key > after and row.accepted != ZERO and key.startswith(prefix)
        )
        page = heapq.nsmallest(SCAN_KEYS + 1, keys)
        last = len(page) <= SCAN_KEYS
        reply = Scanned(message.rid, tuple(page[:SCAN_KEYS]), last)
        self._persist_voter(Send(source, reply))

    # -- dropping ---------------------------------------------------------------------------------

    def _collapse(self, message: Collapse) -> None:
        row = self.rows.get(message.key)
        assert self.config is not None
        if row is None or row.accepted != message.ballot or self.config.joint:
            return
        self._raise_floor(message.key, row)

    def _raise_floor(self, key: str, row: Row) -> None:
        """First the floor; the record goes when that is durable (A4)."""
        shard = shard_of(key)
        self.floors[shard] = max(self.floors[shard], row.promised, row.accepted)
        self._persist_voter(Send(self._context.me, Drop(key, row.accepted)))

    def _drop(self, message: Drop) -> None:
        row = self.rows.get(message.key)
        floor = self.floors[shard_of(message.key)]
        if row is None or row.accepted != message.ballot or max(row.promised, row.accepted) > floor:
            return
        if row.value is not None and not row.value.dead:
            return
        del self.rows[message.key]
        self._fading.pop(message.key, None)
        self._context.persist(KEY_PREFIX + message.key, b"")

    @property
    def untidy(self) -> bool:
        """Whether there is something for `sweep`, now or later."""
        return not self.stopped and bool(self._garbage or self._fading)

    def rest_ms(self, age_ms: float) -> float:
        """How long `sweep` has nothing to do, once it found nothing."""
        if self._garbage or not self._fading:
            return 0.0
        oldest_ms = min(self.rows[key].since_ms for key in self._fading)
        return oldest_ms + age_ms - self._context.now_ms

    def sweep(self, age_ms: float) -> str | None:
        """One step of cleaning; a tombstone old enough to be collected, where there is one."""
        if self.stopped or self._context.persists:
            return None
        if self._garbage:
            name = self._garbage.pop()
            if name.removeprefix(KEY_PREFIX) not in self.rows:
                self._context.persist(name, b"")
            return None
        for key in self._fading:
            row = self.rows[key]
            if self._context.now_ms - row.since_ms < age_ms:
                continue
            row.since_ms = self._context.now_ms
            if row.accepted != ZERO:
                return key
            self._raise_floor(key, row)  # a promise alone: the floor keeps it as well
            return None
        return None

    # -- disk -------------------------------------------------------------------------------------

    def _persist_row(self, key: str, then: Send) -> None:
        row = self.rows.get(key)
        if row is None:
            self._persist_voter(then)
            return
        if row.record is None:
            row.record = _encode(KeyRecord(self.joined, row.promised, row.accepted, row.value))
        self._context.persist(KEY_PREFIX + key, row.record, then)  # A2

    def _persist_voter(self, *then: Send) -> None:
        record = VoterRecord(self.disk, self.joined, self.config, self._floors())
        self._context.persist(VOTER_NAME, _encode(record), *then)  # A2

    def _floors(self) -> Floors:
        return tuple(self.floors)
