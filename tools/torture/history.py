"""What clients saw, as records: written by the processes of clients, read by who judges.

Interface: `Seen` is one operation of one client; `write` appends one to a file, `read` takes a
file; a last line that a killed process cut off is left out. Each operation is written when it
begins, as `begun`, and again when its fate is known: `latest` leaves the last word on each. So a
process of clients that dies takes nothing out of the history. Times are of the host's monotonic
clock, which all its processes share.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import msgspec

from manifold.tools.simulator.linearizable import Kind, Operation

Datum = int | None


class Seen(msgspec.Struct, frozen=True):
    """`status`: ok, no: what was told. maybe, begun: its fate is unknown. Else nothing was done.

    `version` is that of the register as the answer told it, 0 where it did not.
    """

    client: str
    node: str
    key: str
    kind: Kind
    argument: tuple[Datum, ...]
    status: str  # ok | no | maybe | begun | unavailable | busy
    result: Datum | bool
    begun_ms: float
    ended_ms: float
    version: int = 0
    tries: int = 1

    @property
    def final(self) -> bool:
        return self.status in ("ok", "no")

    def operation(self) -> Operation | None:
        """As the checker wants it; None: it cannot have had an effect."""
        if self.status in ("unavailable", "busy") or (self.kind == "read" and not self.final):
            return None
        ended_ms = self.ended_ms if self.final else None
        return Operation(
            self.client, self.key, self.kind, self.argument, self.result, self.begun_ms, ended_ms
        )


def latest(seen: Iterable[Seen]) -> list[Seen]:
    """The last word on each operation."""
    return list({(each.client, each.begun_ms): each for each in seen}.values())


_encode = msgspec.json.Encoder().encode
_decoder = msgspec.json.Decoder(Seen)


def write(file: BinaryIO, seen: Seen) -> None:
    file.write(_encode(seen) + b"\n")


def read(path: Path) -> list[Seen]:
    whole = path.read_bytes().split(b"\n")[:-1]
    return [_decoder.decode(line) for line in whole]
