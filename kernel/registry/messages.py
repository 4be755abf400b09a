"""The vocabulary of the registry: what its two registers hold, and what is told to the node.

Nothing travels between registries: they meet in the registers `cluster/rings` and
`cluster/aliases`, whose contents are `PackedRings` and `PackedAliases`, encoded by msgpack.

Bounds, against 64 KiB of data in a register (Nexus), with 1024 members and aliases:
  rings    1024 * (16 B KID + 1 B kind) + 256 kinds * (66 B class + 3 B) + 50 B = 35.1 KB
  aliases  1024 * (18 B KID + 30 B alias + 9 B epoch + 1 B) + 50 B = 59.4 KB
so one register each is enough. (29 characters are all an alias can have: limits.ALIAS_CHARS_MAX.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta

from manifold.kernel.limits import ALIAS_CHARS_MAX
from manifold.vm.kid import Kid

RINGS_KEY = "cluster/rings"
ALIASES_KEY = "cluster/aliases"
REGISTRAR_KEY = "cluster/registrar"  # a lease

MEMBERS_MAX = 1024  # see the module
ALIASES_MAX = 1024
KINDS_MAX = 256  # a kind is one byte
KID_BYTES = 16
WEIGHT_MAX = 15  # 64 MiB << 15 = 2 TiB
COUNTER_MAX = (1 << 62) - 1
GPU = "gpu"  # the ring of all nodes that have one

Counter = Annotated[int, Meta(ge=0, le=COUNTER_MAX)]
Fence = tuple[Counter, Annotated[str, Meta(max_length=34)], Counter, Counter]  # a Ballot of Nexus
NO_FENCE: Fence = (0, "", 0, 0)


class Kind(msgspec.Struct, frozen=True, array_like=True):
    """What rings need to know of a node. It weighs `2 ** weight` in `place`."""

    node_class: Annotated[str, Meta(max_length=64)]
    gpu: bool
    weight: Annotated[int, Meta(ge=0, le=WEIGHT_MAX)]


class PackedRings(msgspec.Struct, frozen=True, array_like=True):
    """`kids` are the KIDs in order, 16 B each; byte i of `places` names the kind of KID i."""

    epoch: Counter
    fence: Fence
    kinds: Annotated[tuple[Kind, ...], Meta(max_length=KINDS_MAX)]
    kids: Annotated[bytes, Meta(max_length=MEMBERS_MAX * KID_BYTES)]
    places: Annotated[bytes, Meta(max_length=MEMBERS_MAX)]


class PackedAlias(msgspec.Struct, frozen=True, array_like=True):
    """`since`: the epoch of the rings that was known when it was given."""

    alias: Annotated[str, Meta(min_length=1, max_length=ALIAS_CHARS_MAX)]
    kid: Annotated[bytes, Meta(min_length=KID_BYTES, max_length=KID_BYTES)]
    since: Counter


class PackedAliases(msgspec.Struct, frozen=True, array_like=True):
    fence: Fence
    entries: Annotated[tuple[PackedAlias, ...], Meta(max_length=ALIASES_MAX)]


@dataclass(frozen=True, slots=True)
class RingChanged:
    """`Notify`: this node knows a later epoch. A KID of another kind now is in both lists."""

    epoch: int
    joined: tuple[Kid, ...]
    left: tuple[Kid, ...]


@dataclass(frozen=True, slots=True)
class AliasTaken:
    """`Notify`: the alias this node goes by belongs to `kid`; it is shown under its own KID."""

    alias: str
    kid: Kid


@dataclass(frozen=True, slots=True)
class Forgot:
    """`Notify`: what became of `forget(kid)`; `why` where it was not done."""

    kid: Kid
    done: bool
    why: str = ""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """`Notify`: somebody wrote into a register of ours what it cannot hold; it is left alone."""

    key: str
    why: str


@dataclass(frozen=True, slots=True)
class RegistryFull:
    """`Notify`: a living node finds no room in the ring or for its alias; told once."""

    members: int
    aliases: int


Event = RingChanged | AliasTaken | Forgot | Unreadable | RegistryFull


@dataclass(frozen=True, slots=True)
class Timing:
    """Spans of time, each in milliseconds of the node's own clock."""

    settle_ms: float = 1000.0  # so long a node is alive, or gone for good, before it is acted upon
    retire_ms: float = 30_000.0  # so long a dead node stays in the ring: a restart moves no data
    lease_ms: float = 3000.0  # of the registrar
    patience_ms: float = 5000.0  # the k-th in line waits k times as long for the one before
    acquire_ms: float = 12_000.0  # one attempt to get the lease: four times its span
    operate_ms: float = 5000.0  # one write
    retry_ms: float = 1000.0  # after a write that came to nothing, doubling up to `retry_most_ms`
    retry_most_ms: float = 30_000.0
    forget_ms: float = 15_000.0  # then `forget` is given up
    look_ms: float = 100.0  # news of this long is looked at together
    idle_ms: float = float("inf")  # a registrar without work resigns after so long
