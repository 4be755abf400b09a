"""The vocabulary of Nexus: between nodes, from clients, on disk.

Interface: `Message` is what `Nexus.receive` takes, `Request` what `Nexus.request` takes; answers
to clients are `Answer`, `Changed`, `Listing` and `NexusInfo`. A message concerns one key: the bus
puts what leaves at one time into one frame, and the disk syncs what arrives during a sync with the
next one.
Bounds: a key has at most 256 characters, a value 165 KiB (values.py); so a message is under 170 kB,
a part of a frame of the bus. What others need of values.py they take from here.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from manifold.kernel.nexus.ballots import COUNTER_MAX, ZERO, Ballot
from manifold.kernel.nexus.configs import VOTERS_MAX, Config, Epoch, KidText
from manifold.kernel.nexus.values import (
    COUNTED,
    CROWDED,
    FENCED,
    FULL,
    MISMATCH,
    OVERFLOW,
    Add,
    Admit,
    CasValue,
    CasVersion,
    Change,
    Datum,
    Delete,
    Dismiss,
    Effect,
    Get,
    Holder,
    Lease,
    OpId,
    Propose,
    Put,
    Status,
    Ttl,
    Value,
    crowd,
)

__all__ = [  # what others need of values.py; the rest of this module is theirs anyway
    "COUNTED",
    "CROWDED",
    "FENCED",
    "FULL",
    "MISMATCH",
    "OVERFLOW",
    "Add",
    "Admit",
    "CasValue",
    "CasVersion",
    "Datum",
    "Delete",
    "Dismiss",
    "Effect",
    "Get",
    "Lease",
    "Propose",
    "Put",
    "crowd",
]

SHARDS = 16  # floors per voter; a collapse raises one, which makes new keys of a 16th start higher
LIST_KEYS = 512  # at most what one page of every voter holds
WHY_MAX = 512
SCAN_KEYS = 512  # keys in one page of a scan: 512 * 256 B = 128 KiB
TIMEOUT_MS_MAX = 600_000.0

Rid = Annotated[int, Meta(ge=0, le=COUNTER_MAX)]
Version = Annotated[int, Meta(ge=0, le=COUNTER_MAX)]
Base = Annotated[int, Meta(ge=-1, le=COUNTER_MAX)]
KEY_CHARS_MAX = 256  # a path of 16 parts of 16 characters
Key = Annotated[str, Meta(min_length=1, max_length=KEY_CHARS_MAX)]
After = Annotated[str, Meta(max_length=KEY_CHARS_MAX)]
Floors = Annotated[tuple[Ballot, ...], Meta(max_length=SHARDS)]
TimeoutMs = Annotated[float, Meta(gt=0, le=TIMEOUT_MS_MAX)]
Kids = Annotated[tuple[KidText, ...], Meta(max_length=VOTERS_MAX)]
Why = Annotated[str, Meta(max_length=WHY_MAX)]
Strength = Literal["quorum", "stale", "none"]
Missing = Annotated[tuple[KidText, ...], Meta(max_length=2 * VOTERS_MAX)]

CONFIG_KEY = "nexus/config"  # its data is an encoded Config: the driver's journal as well

# -- proposer and acceptor ------------------------------------------------------------------------


class Prepare(msgspec.Struct, frozen=True, array_like=True, tag="x.prepare"):
    rid: Rid
    epoch: Epoch
    key: Key
    ballot: Ballot


class Promise(msgspec.Struct, frozen=True, array_like=True, tag="x.promise"):
    """`accepted` ZERO: no record, then `floor` is the voter's."""

    rid: Rid
    accepted: Ballot
    value: Value | None
    floor: Ballot


class Nack(msgspec.Struct, frozen=True, array_like=True, tag="x.nack"):
    rid: Rid
    most: Ballot


class Full(msgspec.Struct, frozen=True, array_like=True, tag="x.full"):
    """This voter takes no further keys."""

    rid: Rid


class Accept(msgspec.Struct, frozen=True, array_like=True, tag="x.accept"):
    """`keep`: promise the ballot that follows to this proposer as well."""

    rid: Rid
    epoch: Epoch
    key: Key
    ballot: Ballot
    value: Value
    keep: bool


class Accepted(msgspec.Struct, frozen=True, array_like=True, tag="x.accepted"):
    rid: Rid
    promised: Ballot


class Read(msgspec.Struct, frozen=True, array_like=True, tag="x.read"):
    """`watch`: also send a `Hint` whenever a value is accepted, for a while."""

    rid: Rid
    epoch: Epoch
    key: Key
    watch: bool = False


class ReadReply(msgspec.Struct, frozen=True, array_like=True, tag="x.read-reply"):
    rid: Rid
    accepted: Ballot
    value: Value | None
    floor: Ballot


class Hint(msgspec.Struct, frozen=True, array_like=True, tag="x.hint"):
    key: Key
    version: Version


class Stale(msgspec.Struct, frozen=True, array_like=True, tag="x.stale"):
    """Your configuration is not mine. `disk` tells which voter I am."""

    rid: Rid
    config: Config | None
    disk: Version


class Collapse(msgspec.Struct, frozen=True, array_like=True, tag="x.collapse"):
    """Every voter has accepted this tombstone: drop it, keep the floor."""

    epoch: Epoch
    key: Key
    ballot: Ballot


class Drop(msgspec.Struct, frozen=True, array_like=True, tag="x.drop"):
    """From a voter to itself: the floor above this record is durable."""

    key: Key
    ballot: Ballot


# -- configuration --------------------------------------------------------------------------------


class Seek(msgspec.Struct, frozen=True, array_like=True, tag="x.seek"):
    """Who votes?"""

    rid: Rid


class Tell(msgspec.Struct, frozen=True, array_like=True, tag="x.tell"):
    """These do; said only by who knows."""

    rid: Rid
    config: Config


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="x.hello"):
    """Which voter are you, what have you sealed? The answer needs a disk that remembers it."""

    rid: Rid


class Greeting(msgspec.Struct, frozen=True, array_like=True, tag="x.greeting"):
    rid: Rid
    disk: Version
    config: Config | None


class Seal(msgspec.Struct, frozen=True, array_like=True, tag="x.seal"):
    """This configuration is chosen: answer nothing of an earlier one. Install the floors."""

    rid: Rid
    config: Config
    floors: Floors = ()


class Sealed(msgspec.Struct, frozen=True, array_like=True, tag="x.sealed"):
    rid: Rid
    epoch: Epoch
    floors: Floors


class Scan(msgspec.Struct, frozen=True, array_like=True, tag="x.scan"):
    rid: Rid
    epoch: Epoch
    after: After
    prefix: After = ""


class Scanned(msgspec.Struct, frozen=True, array_like=True, tag="x.scanned"):
    """Keys with an accepted value, in order, `last` when there are no more."""

    rid: Rid
    keys: Annotated[tuple[Key, ...], Meta(max_length=SCAN_KEYS)]
    last: bool


# -- proposer and proposer ------------------------------------------------------------------------


class Forward(msgspec.Struct, frozen=True, array_like=True, tag="x.forward"):
    """Propose this for me. `number` grows with each transmission of the sender's process.

    `process` is the nonce of the receiver's process that may apply it, 0 where it is not known.
    """

    number: Rid
    process: Rid
    op: OpId
    key: Key
    change: Change
    base: Base
    left_ms: TimeoutMs


class Forwarded(msgspec.Struct, frozen=True, array_like=True, tag="x.forwarded"):
    """`rebase`: it was not applied; send it again with this version and to this process."""

    number: Rid
    process: Rid
    status: Status
    version: Version
    stamp: Version
    data: Datum = None
    fence: Ballot | None = None
    why: Why = ""


Message = (
    Prepare
    | Promise
    | Nack
    | Full
    | Accept
    | Accepted
    | Read
    | ReadReply
    | Hint
    | Stale
    | Collapse
    | Drop
    | Seek
    | Tell
    | Hello
    | Greeting
    | Seal
    | Sealed
    | Scan
    | Scanned
    | Forward
    | Forwarded
)

# -- clients --------------------------------------------------------------------------------------

ClientChange = Get | Put | CasVersion | CasValue | Add | Delete | Admit | Dismiss | Effect


class Operate(msgspec.Struct, frozen=True, array_like=True, tag="x.operate"):
    """One operation, once: `op` is unique. `retry`: it may have been sent before, anywhere.

    `base`: a stamp that an answer told of this key before the operation was first sent; whoever
    means to send an operation to two nodes sends it to both. Without one, a retry is only looked
    up. `stale`: a read may be answered by a minority, and says so. What marks decide (`Admit`,
    `Dismiss`, `Effect`) may be sent again as often as one likes, by anybody and under any `op`.
    """

    op: OpId
    key: Key
    change: ClientChange
    timeout_ms: TimeoutMs = 5000.0
    retry: bool = False
    base: Base = -1
    stale: bool = False


class Acquire(msgspec.Struct, frozen=True, array_like=True, tag="x.acquire"):
    """Hold the lease `key`, and keep it: answered once it is held or the time is over."""

    key: Key
    holder: Holder
    ttl_ms: Ttl
    timeout_ms: TimeoutMs = 60_000.0


class Resign(msgspec.Struct, frozen=True, array_like=True, tag="x.resign"):
    """Give back a lease that was acquired here."""

    key: Key
    holder: Holder


class Watch(msgspec.Struct, frozen=True, array_like=True, tag="x.watch"):
    """Answered by `Changed`, first with what is there, then whenever that is another version.

    Where what is there cannot be read in time the answer is an `Answer`, `unavailable`, and the
    watch is over. `stale`: then the first state is what a minority knows, and the watch goes on.
    """

    key: Key
    timeout_ms: TimeoutMs = 5000.0
    stale: bool = False


class Unwatch(msgspec.Struct, frozen=True, array_like=True, tag="x.unwatch"):
    """Ends the watches of this request's handle on `key`."""

    key: Key


class Initialise(msgspec.Struct, frozen=True, array_like=True, tag="x.initialise"):
    """Make these the first voters. May be repeated, by anybody."""

    voters: Kids
    timeout_ms: TimeoutMs = 10_000.0


class SetVoters(msgspec.Struct, frozen=True, array_like=True, tag="x.set-voters"):
    """From now on these vote. `epoch`: `refused` if another configuration than that is final.

    So what was computed from a status (`NexusInfo.epoch`) does not undo what others did since.
    """

    voters: Kids
    timeout_ms: TimeoutMs = 30_000.0
    epoch: Annotated[int, Meta(ge=-1, le=COUNTER_MAX)] = -1


class List(msgspec.Struct, frozen=True, array_like=True, tag="x.list"):
    """Keys that begin with `prefix`, those after `after` in their order: a `Listing`."""

    prefix: After = ""
    after: After = ""
    limit: Annotated[int, Meta(ge=1, le=LIST_KEYS)] = LIST_KEYS
    timeout_ms: TimeoutMs = 5000.0
    stale: bool = False


class GetNexus(msgspec.Struct, frozen=True, array_like=True, tag="x.get-nexus"):
    """What this node knows, without asking anybody: a `NexusInfo`."""


Request = Operate | Acquire | Resign | Watch | Unwatch | Initialise | SetVoters | List | GetNexus


class Answer(msgspec.Struct, frozen=True, array_like=True, tag="x.answer"):
    """`data` None: absent. `stamp`: for `Operate.base`. `missing`: voters that did not answer."""

    status: Status
    version: Version = 0
    data: Datum = None
    fence: Ballot | None = None
    stamp: Version = 0
    strength: Strength = "quorum"
    missing: Missing = ()
    why: Why = ""


class Changed(msgspec.Struct, frozen=True, array_like=True, tag="x.changed"):
    """`strength` is `stale` only in the first one, where that was asked for."""

    key: Key
    version: Version
    data: Datum
    strength: Strength = "quorum"
    missing: Missing = ()


class Listing(msgspec.Struct, frozen=True, array_like=True, tag="x.listing"):
    """Every key that is there, and perhaps some that were deleted since: who lists reads them.

    `more`: ask again after the last one. `strength` `none`: unavailable, `why` and `missing` tell.
    """

    keys: Annotated[tuple[Key, ...], Meta(max_length=LIST_KEYS)]
    more: bool = False
    strength: Strength = "quorum"
    missing: Missing = ()
    why: Why = ""


class NexusInfo(msgspec.Struct, frozen=True, array_like=True, tag="x.nexus-info"):
    """`known`: a configuration is; then `epoch` for `SetVoters`, and `count` for people.

    `old` is empty but while voters change. `votes`: this node does; `stopped`: its disk refused a
    record, `why` in words, and it votes no more until a restart. `keys`: its records. `operations`:
    under way here. `step`: of a change of voters that this node drives, else empty.
    """

    known: bool
    epoch: Epoch = 0
    count: Version = 0
    old: Kids = ()
    voters: Kids = ()
    votes: bool = False
    stopped: bool = False
    why: Why = ""
    keys: Version = 0
    operations: Version = 0
    step: Annotated[str, Meta(max_length=16)] = ""


# -- disk -----------------------------------------------------------------------------------------


class VoterRecord(msgspec.Struct, frozen=True, array_like=True):
    """Who this voter is and what it has sealed. Records of another `joined` are not its own."""

    disk: Version
    joined: Epoch
    config: Config | None
    floors: Floors = (ZERO,) * SHARDS


class KeyRecord(msgspec.Struct, frozen=True, array_like=True):
    joined: Epoch
    promised: Ballot
    accepted: Ballot
    value: Value | None


VOTER_NAME = "x.voter"
KNOWN_NAME = "x.known"  # the configuration a node knows of, voter or not: a hint
KEY_PREFIX = "x.k."
