"""What can be done with a global, once for all faces of it: names, values, and the calls.

Interface: `key_of`, `encode` and `decode` check what a user gives; `Calls` carries it out on the
connection's thread. A global NAME is the register `globals/NAME`, for people `/globals/NAME`.
Invariant:
  G1  what is read is what was written, in type as well: an int is not a float, text is not bytes.
      Text is its UTF-8; bytes have `BYTES_MARK` before them, with which no UTF-8 begins.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from manifold.kernel.errors import Refused
from manifold.kernel.nexus.messages import (
    Add,
    Answer,
    CasValue,
    CasVersion,
    Delete,
    Get,
    Put,
)
from manifold.shells.sdk.registers import TIMEOUT_S, Registers, Seen

FOLDER = "globals/"
NAME = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*\Z")
NAME_CHARS_MAX = 128
NAME_RULE = (
    "A name has 1 to 128 letters, digits and any of _ . - and / between its parts: "
    "x, jobs/total or /globals/x."
)
BYTES_MARK = b"\xff"
DATA_BYTES_MAX = 64 << 10  # that of kernel/nexus/values.py
INT_MIN, INT_MAX = -(1 << 63), (1 << 63) - 1

Value = int | float | str | bytes


@dataclass(frozen=True, slots=True)
class Reading:
    """What a global held. `value` None: it was not there. `strength`: `quorum`, or `stale` where
    one voter was believed, as was asked."""

    value: Value | None
    version: int
    strength: str = "quorum"


# -- names and values -----------------------------------------------------------------------------


def key_of(name: str) -> str:
    """The register of a global; `ValueError` where that is no name."""
    if not isinstance(name, str):
        raise TypeError(f"the name of a global is a str, not {type(name).__name__}.")
    plain = name.removeprefix("/" + FOLDER)
    if len(plain) > NAME_CHARS_MAX or not NAME.match(plain):
        raise ValueError(f"{name[:80]!r} is no name of a global. {NAME_RULE}")
    return FOLDER + plain


def encode(value: Any) -> int | float | bytes:
    """A value as a register holds it (G1)."""
    if isinstance(value, int):  # a bool as well: it is 1 or 0
        if not INT_MIN <= value <= INT_MAX:
            raise OverflowError(f"{value} does not fit in 64 bits; text of it would.")
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        data = value.encode()
    elif isinstance(value, bytes | bytearray | memoryview):
        data = BYTES_MARK + bytes(value)
    else:
        raise TypeError(
            f"a global holds an int, a float, a str or bytes, not {type(value).__name__}."
        )
    if len(data) > DATA_BYTES_MAX:
        raise Refused(
            f"The value has {len(data):,} bytes; a global holds at most {DATA_BYTES_MAX:,}.",
            "Keep it in a file or in parts, and its name in the global.",
        )
    return data


def decode(data: Any) -> Value | None:
    """What a register holds, as it was written; None where there is nothing."""
    if data is None or isinstance(data, int | float):
        return data
    if not isinstance(data, bytes):
        return str(data)  # a lease of a node
    if data.startswith(BYTES_MARK):
        return data.removeprefix(BYTES_MARK)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data  # written by something else


def reading_of(found: Answer | Seen) -> Reading:
    return Reading(decode(found.data), found.version, found.strength)


def number_of(amount: Any) -> int | float:
    found = encode(amount) if isinstance(amount, int | float) else None
    if found is None or isinstance(found, bytes):
        raise TypeError(f"only numbers are added, not {type(amount).__name__}.")
    return found


def _same(one: Any, other: Any) -> bool:
    """Equal in type as well, and a NaN to itself: as Nexus compares."""
    if type(one) is not type(other):
        return False
    return bool(one == other) or (isinstance(one, float) and math.isnan(one) and math.isnan(other))


# -- what a global can do -------------------------------------------------------------------------


class Calls:
    """Each as a coroutine; arguments were checked before it runs. See `Globals` for words."""

    def __init__(self, registers: Registers) -> None:
        self.registers = registers

    async def read(self, key: str, timeout_s: float, stale: bool = False) -> Reading:
        return reading_of(await self.registers.operate(key, Get(), timeout_s, stale=stale))

    async def get(self, key: str, default: Any, timeout_s: float, stale: bool) -> Any:
        found = await self.read(key, timeout_s, stale)
        return default if found.value is None else found.value

    async def item(self, key: str) -> Value:
        found = await self.read(key, TIMEOUT_S)
        if found.value is None:
            raise KeyError(key.removeprefix(FOLDER))
        return found.value

    async def set(self, key: str, data: int | float | bytes, timeout_s: float) -> Reading:
        answer = await self.registers.operate(key, Put(data), timeout_s)
        return Reading(decode(data), answer.version)

    async def delete(self, key: str, timeout_s: float) -> bool:
        return (await self.registers.operate(key, Delete(), timeout_s)).status == "ok"

    async def drop(self, key: str) -> None:
        if not await self.delete(key, TIMEOUT_S):
            raise KeyError(key.removeprefix(FOLDER))

    async def exchange(
        self, key: str, expected: Any, data: int | float | bytes, timeout_s: float
    ) -> tuple[Reading, bool]:
        """What is there afterwards, and whether it is ours."""
        answer = await self.registers.operate(key, CasValue(expected, data), timeout_s)
        if answer.status == "ok":
            return Reading(decode(data), answer.version), True
        return reading_of(answer), False

    async def cas(
        self, key: str, expected: Any, data: int | float | bytes, timeout_s: float
    ) -> bool:
        return (await self.exchange(key, expected, data, timeout_s))[1]

    async def propose(
        self, key: str, expected: int | float | bytes | None, data: int | float | bytes,
        timeout_s: float,
    ) -> tuple[Any, bool]:  # fmt: skip
        """An absent global counts as zero of the expected type, as it does in a program."""
        zero = type(expected)(0) if isinstance(expected, int | float) else None
        while True:
            found, swapped = await self.exchange(key, expected, data, timeout_s)
            if swapped:
                return decode(expected), True
            if found.value is not None or zero is None:
                return found.value, False
            if not _same(expected, zero):
                return zero, False
            if (await self.exchange(key, None, data, timeout_s))[1]:
                return zero, True

    async def total(self, key: str, amount: int | float, timeout_s: float) -> Reading:
        """Add; what it is then."""
        answer = await self.registers.operate(key, Add(amount), timeout_s)
        if answer.status == "ok":
            found = decode(answer.data)
            assert isinstance(found, int | float)
            return Reading(found, answer.version)
        raise _not_added(key, amount, decode(answer.data))

    async def add(self, key: str, amount: int | float, timeout_s: float) -> int | float:
        """What it was before: for floats a difference would not be exact, so it is swapped."""
        if isinstance(amount, int):
            total = await self.total(key, amount, timeout_s)
            assert isinstance(total.value, int)
            return total.value - amount
        answer = await self.registers.operate(key, Get(), timeout_s)
        while True:
            before = 0.0 if answer.data is None else answer.data
            if not isinstance(before, float):
                raise _not_added(key, amount, decode(before))
            version = answer.version if answer.data is not None else 0
            change = CasVersion(version, before + amount)
            answer = await self.registers.operate(key, change, timeout_s)
            if answer.status == "ok":
                return before

    async def items(
        self, prefix: str, timeout_s: float, stale: bool
    ) -> tuple[list[tuple[str, Reading]], str]:
        """Of keys that begin with `prefix`: what they hold, and how strong the list of them is."""
        keys, strength = await self.registers.keys(prefix, timeout_s, stale=stale)
        found = await self.registers.read_all(keys, timeout_s, stale=stale)
        return [(key, reading_of(seen)) for key, seen in found], strength

    async def named(
        self, prefix: str, timeout_s: float = TIMEOUT_S, stale: bool = False
    ) -> list[tuple[str, Any]]:
        found, _ = await self.items(FOLDER + prefix, timeout_s, stale)
        return [(key.removeprefix(FOLDER), reading.value) for key, reading in found]

    async def names(
        self, prefix: str, timeout_s: float = TIMEOUT_S, stale: bool = False
    ) -> list[str]:
        return [name for name, _ in await self.named(prefix, timeout_s, stale)]


def _not_added(key: str, amount: int | float, found: Value | None) -> Exception:
    name = key.removeprefix(FOLDER)
    if type(found) is type(amount):
        return OverflowError(f"{name} is {found}: adding {amount} does not fit in 64 bits.")
    return TypeError(
        f"{name} is {_a(found)}; {_a(amount)} cannot be added to it: types do not change by adding."
    )


def _a(value: Any) -> str:
    kind = {int: "an int", float: "a float", str: "text", bytes: "bytes"}.get(type(value), "absent")
    return f"{kind} ({value!r})" if isinstance(value, int | float) else kind


def prefix_of(prefix: str) -> str:
    if not isinstance(prefix, str):
        raise TypeError(f"a prefix is a str, not {type(prefix).__name__}.")
    return prefix.removeprefix("/" + FOLDER)
