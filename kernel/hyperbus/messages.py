"""What travels between nodes: frames of envelopes, the door's handshake, chunks.

Interface rules: a frame is what leaves at once; an envelope is one message of a subsystem, its body
still encoded, so that one body that does not decode costs that body and not its neighbours.
Bodies are members of the one vocabulary that `node.py` assembles from every `messages.py`.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from manifold.kernel.limits import FRAME_ENVELOPES_MAX

VERSION = 2  # 1 had nng's framing on the lines
VERSION_OLDEST = 2  # still understood

CLIENT_PREFIX = "C-"  # of a client's identity; a node's is its KID

CHUNK_BYTES = 508 << 10  # two in a frame: (1 MiB - 4 KiB of overhead) / 2, less their headers
MESSAGE_BYTES_MAX = 64 << 20  # 130 chunks; more than that is fetched in parts by its protocol
REASSEMBLY_BYTES_MAX = 128 << 20  # of all peers together: two of the largest messages under way
REASSEMBLY_STREAMS_MAX = 64  # of all peers together, as many as are dialed
REASSEMBLY_SOURCE_STREAMS_MAX = 16  # of one source, so that it cannot push out all others
REFUSAL_CHARACTERS_MAX = 256  # of an `Unwelcome`'s reason
REQUESTS_MAX = 65_536  # requests in flight per process
REVERSE_IDLE_MS = 60_000.0  # a reverse channel that nobody dials is closed after this

# What decoding bytes from elsewhere may raise: msgspec lets text that is not UTF-8 out as it comes.
UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

Text = Annotated[str, Meta(max_length=256)]


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """One message. `request` asks for an answer, `reply_to` is one; ids belong to the asker."""

    body: msgspec.Raw
    request: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0
    reply_to: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0
    deadline_ms: Annotated[float, Meta(ge=0, le=86_400_000)] = 0.0  # left when sent; 0 is none
    destination: Text = ""  # a node other than the one it is sent to: relayed
    trace: Text = ""


class Frame(msgspec.Struct, frozen=True, array_like=True):
    """What leaves at once: who sends, and everything for one peer of one loop tick."""

    version: int
    cluster: Text
    source: Text
    boot: Annotated[int, Meta(ge=0, lt=1 << 32)]
    envelopes: Annotated[list[Envelope], Meta(max_length=FRAME_ENVELOPES_MAX)]


class Chunk(msgspec.Struct, frozen=True, array_like=True, tag="h.chunk"):
    """Part `index` of `count` of an encoded envelope that is larger than a frame."""

    stream: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
    index: Annotated[int, Meta(ge=0, lt=1 << 20)]
    count: Annotated[int, Meta(ge=1, le=MESSAGE_BYTES_MAX // CHUNK_BYTES + 1)]
    data: Annotated[bytes, Meta(max_length=CHUNK_BYTES)]


class Failure(msgspec.Struct, frozen=True, array_like=True, tag="h.failure"):
    """The answer to a request that could not be served: an error by its code.

    `retry_ms`: of `busy`, when to come again; 0: it was not said.
    """

    code: Text
    message: Annotated[str, Meta(max_length=65_536)]
    next_step: Annotated[str, Meta(max_length=4096)] = ""
    retry_ms: Annotated[int, Meta(ge=0, lt=1 << 31)] = 0


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="h.hello"):
    """Asked at the door: who I am, and where I can be reached ("" asks for a reverse channel)."""

    version: int
    cluster: Text
    source: Text
    boot: Annotated[int, Meta(ge=0, lt=1 << 32)]
    address: Text


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag="h.welcome"):
    """The door's answer. `reverse` is a socket to dial with Pull0, where one was asked for."""

    version: int
    cluster: Text
    source: Text
    boot: Annotated[int, Meta(ge=0, lt=1 << 32)]
    alias: Text
    address: Text
    reverse: Text = ""


class Unwelcome(msgspec.Struct, frozen=True, array_like=True, tag="h.unwelcome"):
    """The door's refusal, with the versions that are understood."""

    oldest: int
    newest: int
    reason: Text


DoorQuestion = Hello
DoorAnswer = Welcome | Unwelcome
Message = Chunk | Failure
