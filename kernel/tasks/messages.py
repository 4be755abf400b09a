"""What travels between a client and where its calls run; nodes on the way leave it unopened."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

PARCEL_BYTES_MAX = 17 << 20  # all that a WASI program may write, and a little; of others see `pack`
STDIN_BYTES_MAX = 8 << 20
PARTS_MAX = 4096  # arrays in one object that keep a part of their own; the rest is in the pickle

Size = Annotated[int, Meta(ge=0, le=1 << 50)]


class Parcel(msgspec.Struct, frozen=True, array_like=True):
    """A pickled object that is on its way: only task processes and clients open it.

    `data` is the pickle. Large ones, and the arrays in them, travel as a file that the receiver
    maps: `path` within its client's folder of the spool; `sizes` of the parts in it, the pickle
    first unless it is in `data`.
    """

    data: Annotated[bytes, Meta(max_length=PARCEL_BYTES_MAX)] = b""
    path: Annotated[str, Meta(max_length=64, pattern=r"^[0-9a-z-]*$")] = ""
    sizes: Annotated[tuple[Size, ...], Meta(max_length=PARTS_MAX)] = ()

    @property
    def nbytes(self) -> int:
        """What it takes in messages and in memory; the file is not counted."""
        return 64 + len(self.data) + 9 * len(self.sizes)


class CommandLine(msgspec.Struct, frozen=True, array_like=True):
    """What a WASI program is given: a parcel's data."""

    arguments: tuple[str, ...]
    environ: dict[str, str]
    stdin: Annotated[bytes, Meta(max_length=STDIN_BYTES_MAX)] = b""


class CommandOutput(msgspec.Struct, frozen=True, array_like=True):
    """What a WASI program left: a parcel's data. `code` of its fault, "" where it has none."""

    status: int
    stdout: bytes
    stderr: bytes
    code: str = ""
    message: str = ""
    next_step: str = ""
