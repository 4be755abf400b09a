"""Rings and aliases as the registry works with them, and how they are packed into registers.

Interface: `decode_…` raises `ProtocolError` for what a registry cannot have written; `encode_…` is
its inverse, and equal values have equal encodings.
Invariants:
  C1  the members of a ring are in the order of their KIDs, each there once;
  C2  an alias belongs to one KID and a KID has one alias at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType
from typing import TypeVar

import msgspec

from manifold.kernel.errors import ProtocolError
from manifold.kernel.registry.messages import (
    ALIASES_MAX,
    GPU,
    KID_BYTES,
    MEMBERS_MAX,
    NO_FENCE,
    Fence,
    Kind,
    PackedAlias,
    PackedAliases,
    PackedRings,
)
from manifold.vm.kid import Kid

_rings = msgspec.msgpack.Decoder(PackedRings)
_aliases = msgspec.msgpack.Decoder(PackedAliases)
_encode = msgspec.msgpack.Encoder().encode
T = TypeVar("T")
_NOBODY: Mapping[Kid, Kind] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Rings:
    """One epoch. `members` is in the order of the KIDs (C1)."""

    epoch: int = 0
    fence: Fence = NO_FENCE
    members: Mapping[Kid, Kind] = field(default_factory=lambda: _NOBODY)

    def ring(self, node_class: str = "") -> tuple[Kid, ...]:
        """All members, those of a class, or with `gpu` also those that have one."""
        if not node_class:
            return tuple(self.members)
        return tuple(
            kid
            for kid, kind in self.members.items()
            if kind.node_class == node_class or (node_class == GPU and kind.gpu)
        )


@dataclass(frozen=True, slots=True)
class Alias:
    kid: Kid
    since: int


@dataclass(frozen=True, slots=True)
class Aliases:
    fence: Fence = NO_FENCE
    owners: Mapping[str, Alias] = field(default_factory=lambda: MappingProxyType({}))


def to_bytes(kid: Kid) -> bytes:
    return bytes.fromhex(kid[2:])


def to_kid(data: bytes) -> Kid:
    return Kid("K-" + data.hex())


def encode_rings(rings: Rings) -> bytes:
    kinds: dict[Kind, int] = {}
    places = bytearray()
    kids = sorted(rings.members)
    assert len(kids) <= MEMBERS_MAX, "who adds a member counts them"
    for kid in kids:
        places.append(kinds.setdefault(rings.members[kid], len(kinds)))
    packed = b"".join(map(to_bytes, kids))
    return _encode(PackedRings(rings.epoch, rings.fence, tuple(kinds), packed, bytes(places)))


def decode_rings(data: object) -> Rings:
    packed = _unpack(_rings, data)
    kids = [packed.kids[at : at + KID_BYTES] for at in range(0, len(packed.kids), KID_BYTES)]
    ordered = all(one < other for one, other in pairwise(kids))
    if len(packed.kids) != KID_BYTES * len(packed.places) or not ordered:
        raise ProtocolError("Its KIDs are not whole, not in order or not as many as kinds.")
    if any(place >= len(packed.kinds) for place in packed.places):
        raise ProtocolError("A member is of a kind that is not listed.")
    members = {
        to_kid(kid): packed.kinds[place] for kid, place in zip(kids, packed.places, strict=True)
    }
    return Rings(packed.epoch, packed.fence, MappingProxyType(members))


def encode_aliases(aliases: Aliases) -> bytes:
    assert len(aliases.owners) <= ALIASES_MAX, "who gives an alias counts them"
    entries = tuple(
        PackedAlias(alias, to_bytes(each.kid), each.since)
        for alias, each in sorted(aliases.owners.items())
    )
    return _encode(PackedAliases(aliases.fence, entries))


def decode_aliases(data: object) -> Aliases:
    packed = _unpack(_aliases, data)
    owners = {each.alias: Alias(to_kid(each.kid), each.since) for each in packed.entries}
    kids = dict.fromkeys(each.kid for each in packed.entries)
    if not len(owners) == len(kids) == len(packed.entries):
        raise ProtocolError("An alias or a KID is listed twice.")
    return Aliases(packed.fence, MappingProxyType(owners))


def _unpack(decoder: msgspec.msgpack.Decoder[T], data: object) -> T:
    if not isinstance(data, bytes):
        raise ProtocolError("It holds no bytes.")
    try:
        return decoder.decode(data)
    except msgspec.DecodeError as fault:
        raise ProtocolError(f"It cannot be decoded: {fault}.") from fault
