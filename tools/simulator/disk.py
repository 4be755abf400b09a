"""A node's disk: durable records, and the writes that a crash may lose."""

from __future__ import annotations

from random import Random

KEEP = 0.5  # probability that a write under way survives a crash
TORN = 0.25  # and that the last survivor is torn: its checksum fails, so it never was


class Disk:
    """Writes become durable in their order; a crash keeps a random subset of those under way."""

    def __init__(self) -> None:
        self._durable: dict[str, bytes] = {}
        self._under_way: list[tuple[str, bytes]] = []
        self._due_ms = 0.0
        self.lost = 0
        self.torn = 0
        self.broken = False  # a sync has failed: nothing becomes durable until a restart

    def write(self, name: str, record: bytes, due_ms: float) -> float:
        """Begin a write; it is durable at the time returned, after those before it."""
        self._under_way.append((name, record))
        self._due_ms = max(self._due_ms, due_ms)
        return self._due_ms

    def synced(self) -> None:
        """The oldest write under way is durable."""
        name, record = self._under_way.pop(0)
        self._durable[name] = record

    def holds(self, name: str, record: bytes) -> bool:
        """Whether `record` is durable already and nothing else is on its way."""
        waiting = any(other == name for other, _ in self._under_way)
        return not waiting and self._durable.get(name) == record

    def read(self, name: str) -> bytes | None:
        """What a reader from outside finds durable."""
        return self._durable.get(name)

    def recovered(self) -> dict[str, bytes]:
        """A copy of the durable records, for a process that starts."""
        return dict(self._durable)

    def crash(self, random: Random) -> None:
        kept = [write for write in self._under_way if random.random() < KEEP]
        self.lost += len(self._under_way) - len(kept)
        if kept and random.random() < TORN:
            kept.pop()
            self.torn += 1
        for name, record in kept:
            self._durable[name] = record
        self._under_way.clear()
        self._due_ms = 0.0
        self.broken = False
