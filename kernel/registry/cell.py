"""This node's copy of one register, and the one write of it that may be under way.

Interface: `told` with what was read, whoever read it; `write` and `written` around an operation.
Invariants:
  B1  `value` is what the register held at `version`, so a write that expects that version changes
      exactly what was looked at; `version` None: not known, no write;
  B2  versions never go back, but for absence, which is version 0;
  B3  after our write of version v succeeded the register held our value at v + 1. The version an
      answer carries may be a later one, whose value we do not know.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from manifold.kernel.nexus.messages import CasVersion

T = TypeVar("T")


@dataclass(slots=True)
class Cell(Generic[T]):
    """See the module."""

    key: str
    empty: T
    value: T
    encode: Callable[[T], bytes]
    decode: Callable[[object], T]
    version: int | None = None
    sound: bool = False  # whether `value` is what it holds; not before anything was told
    token: int = 0  # of the write under way
    wanted: T | None = None
    expected: int = 0
    retry_ms: float = float("-inf")
    tries: int = 0

    @property
    def writable(self) -> bool:
        return self.sound and self.version is not None and self.token == 0

    def told(self, version: int, data: object) -> bool:
        """Take it over if it is news; `ProtocolError` where it is no value of ours."""
        if data is None:
            version = 0
        elif self.version is not None and version <= self.version:
            return False  # B2
        self.version, self.sound = version, False
        self.value = self.decode(data) if data is not None else self.empty
        self.sound = True
        return True

    def write(self, value: T, token: int) -> CasVersion:
        assert self.writable and self.version is not None, "B1"
        self.token, self.wanted, self.expected = token, value, self.version
        return CasVersion(self.version, self.encode(value))

    def written(self) -> T:
        """The write under way has succeeded: what it wrote."""
        wanted = self.wanted
        assert wanted is not None, "there was one"
        self.tries = 0
        if self.version == self.expected:  # else something later was told meanwhile
            self.value = wanted
            self.version = self.expected + 1 if self.expected else None  # B3
        return wanted
