"""The vocabulary of membership: what travels, what is told to the rest of the node.

Interface: `Message` is what `Membership.receive` takes; `Event` is what its `Notify` effects
carry. All that travels is a frozen, array-like msgspec struct with a unique tag, and its bounds
are checked when it is decoded.

Bounds: one packet carries at most `PACKET_UPDATES_BYTES` of updates; a full exchange is cut into
parts of `PART_UPDATES` updates, so no message is larger than 256 * (512 + 100) = 157 kB.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated

import msgspec

from manifold.kernel import labels as labelling
from manifold.kernel.errors import ProtocolError
from manifold.vm.kid import Kid

META_BYTES_MAX = 512  # encoded size of a node's description (memberlist's limit as well)
ADDRESSES_MAX = 4  # e.g. ipc, tcp on two interfaces, tls
ADDRESS_CHARACTERS_MAX = 128  # a Unix socket's path has at most 107, and a scheme before it
PACKET_UPDATES_BYTES = 1400  # one Ethernet frame less its headers
PACKET_UPDATES_MAX = 64  # 1400 B / 22 B, the least an update can take
PART_UPDATES = 256  # updates in one part of a full exchange
LABEL_CHARACTERS_MAX = labelling.KEY_CHARS_MAX + 1 + labelling.VALUE_CHARS_MAX
COUNTER_MAX = (1 << 62) - 1  # boots, incarnations, sequence numbers


class State(IntEnum):
    """What is believed of a node; a larger one wins within one incarnation."""

    ALIVE = 0
    SUSPECT = 1
    DEAD = 2
    LEFT = 3  # it said so itself


_KidText = Annotated[str, msgspec.Meta(min_length=34, max_length=34)]
_MaybeKid = Annotated[str, msgspec.Meta(max_length=34)]
_Counter = Annotated[int, msgspec.Meta(ge=0, le=COUNTER_MAX)]
_Name = Annotated[str, msgspec.Meta(max_length=64)]
_Address = Annotated[str, msgspec.Meta(min_length=1, max_length=ADDRESS_CHARACTERS_MAX)]
_Figure = Annotated[float, msgspec.Meta(ge=0, le=1e18)]
_Label = Annotated[str, msgspec.Meta(min_length=1, max_length=LABEL_CHARACTERS_MAX)]


class Meta(msgspec.Struct, frozen=True, array_like=True):
    """What a node says of itself. During a boot only its labels change, and `version` grows."""

    alias: _Name
    node_class: _Name
    addresses: Annotated[tuple[_Address, ...], msgspec.Meta(max_length=ADDRESSES_MAX)]
    cores: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 1
    compute: _Figure = 1.0
    memory_bytes: Annotated[int, msgspec.Meta(ge=0, le=1 << 60)] = 0
    bandwidth_bps: _Figure = 0.0
    latency_ms: _Figure = 0.0
    gpu: bool = False
    arch: Annotated[str, msgspec.Meta(max_length=32)] = ""
    labels: Annotated[tuple[_Label, ...], msgspec.Meta(max_length=labelling.LABELS_MAX)] = ()
    version: _Counter = 0


class Update(msgspec.Struct, frozen=True, array_like=True):
    """One belief about one node. `by` is who accused it ("" where nobody did)."""

    kid: _KidText
    boot: _Counter
    incarnation: _Counter
    state: Annotated[int, msgspec.Meta(ge=0, le=3)]
    by: _MaybeKid = ""
    meta: Meta | None = None


_Packet = Annotated[tuple[Update, ...], msgspec.Meta(max_length=PACKET_UPDATES_MAX)]
_Part = Annotated[tuple[Update, ...], msgspec.Meta(max_length=PART_UPDATES)]


class Ping(msgspec.Struct, frozen=True, array_like=True, tag="m.ping"):
    """Are you there? `boot` is the sender's; `data` asks for the answer on the data plane."""

    seq: _Counter
    boot: _Counter
    data: bool = False
    updates: _Packet = ()


class Ack(msgspec.Struct, frozen=True, array_like=True, tag="m.ack"):
    """The target of ping `seq` answered; `boot` is the target's, also when a relay says it."""

    seq: _Counter
    boot: _Counter
    updates: _Packet = ()


class Nack(msgspec.Struct, frozen=True, array_like=True, tag="m.nack"):
    """A relay's: I am well, but the target of your ping-req has not answered me."""

    seq: _Counter
    updates: _Packet = ()


class PingReq(msgspec.Struct, frozen=True, array_like=True, tag="m.pingreq"):
    """Please ping `target` for me; say nack after `nack_ms` without an answer."""

    seq: _Counter
    boot: _Counter
    target: _KidText
    nack_ms: Annotated[float, msgspec.Meta(ge=0, le=1e6)]
    updates: _Packet = ()


class Gossip(msgspec.Struct, frozen=True, array_like=True, tag="m.gossip"):
    """News only."""

    boot: _Counter
    updates: _Packet = ()


class PushPull(msgspec.Struct, frozen=True, array_like=True, tag="m.pushpull"):
    """One part of a whole table. After the `last` part of a request comes the other's table.

    `via` is the address a join was sent to: a node that hears its own join drops that seed.
    """

    seq: _Counter
    boot: _Counter
    reply: bool
    last: bool
    via: Annotated[str, msgspec.Meta(max_length=ADDRESS_CHARACTERS_MAX)] = ""
    updates: _Part = ()


class Leave(msgspec.Struct, frozen=True, array_like=True, tag="m.leave"):
    """The sender leaves the cluster in good order."""

    boot: _Counter
    incarnation: _Counter


Message = Ping | Ack | Nack | PingReq | Gossip | PushPull | Leave


@dataclass(frozen=True, slots=True)
class Me:
    """What a node knows of itself when it starts. A new process of one node has a larger `boot`."""

    kid: Kid
    boot: int
    alias: str
    node_class: str
    addresses: tuple[str, ...]
    cores: int = 1
    compute: float = 1.0
    memory_bytes: int = 0
    bandwidth_bps: float = 0.0
    latency_ms: float = 0.0
    gpu: bool = False
    arch: str = ""
    labels: tuple[str, ...] = ()

    @property
    def meta(self) -> Meta:
        """The description that travels; refused when it is too long for a packet."""
        meta = Meta(
            alias=self.alias,
            node_class=self.node_class,
            addresses=self.addresses,
            cores=self.cores,
            compute=float(self.compute),
            memory_bytes=self.memory_bytes,
            bandwidth_bps=float(self.bandwidth_bps),
            latency_ms=float(self.latency_ms),
            gpu=self.gpu,
            arch=self.arch,
            labels=self.labels,
        )
        size_bytes = len(msgspec.msgpack.encode(meta))
        if size_bytes > META_BYTES_MAX:
            raise ProtocolError(
                f"The description of {self.alias} takes {size_bytes} B of {META_BYTES_MAX}.",
                "Shorten its alias, its class, its addresses or its labels.",
            )
        return meta


@dataclass(frozen=True, slots=True)
class Member:
    """What this node believes of one node. `rtt_ms` is None until a round trip was measured."""

    kid: Kid
    boot: int
    incarnation: int
    state: State
    meta: Meta
    since_ms: float
    rtt_ms: float | None


@dataclass(frozen=True, slots=True)
class MemberChanged:
    """A node appeared, changed state, restarted (another boot), became describable or told other
    labels of itself.

    `previous_state` is None when it was not known before.
    """

    member: Member
    previous_state: State | None


@dataclass(frozen=True, slots=True)
class Superseded:
    """Another process with our KID and a larger boot exists: we are the old one and fall silent.

    If no such process should exist (our boot counter was lost), start again above `boot`.
    """

    boot: int


@dataclass(frozen=True, slots=True)
class Refuted:
    """Somebody (`by`) held us for suspect or dead; we answered with a higher incarnation."""

    incarnation: int
    by: str


Event = MemberChanged | Superseded | Refuted


class IncarnationRecord(msgspec.Struct, frozen=True, array_like=True):
    """The durable record `incarnation`."""

    incarnation: _Counter


def saved_incarnation(record: bytes | None) -> int:
    """What `Membership(incarnation=…)` wants, from the durable record (0 where there is none)."""
    if not record:
        return 0
    return msgspec.msgpack.decode(record, type=IncarnationRecord).incarnation
