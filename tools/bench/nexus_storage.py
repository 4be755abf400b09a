"""What an acceptor's storage costs: our own log against SQLite, LMDB and a bare append, synced.

One commit of a record of 1 KiB; 64 records of 1 KiB in one commit; opening and reading every
record after an end without `close`. SQLite has WAL and synchronous=FULL, LMDB its defaults: all
are durable when they return. Folders are in TMPDIR; where that is memory, a sync costs nothing and
only the rest is compared.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, Protocol

from manifold.kernel.limits import MIB
from manifold.kernel.nexus import storage
from manifold.kernel.nexus.storage_frames import Change
from manifold.tools.bench.harness import Figure, interleave, percentile

KEYS = 10_000
VALUE_BYTES = 1024
BATCH = 64
COMMITS, BATCHES = 20, 5  # in one round: short, so that what slows a disk for a while slows both
LMDB_MAP_BYTES = 1024 * MIB  # address space, not memory


class Contender(Protocol):
    def append(self, changes: Sequence[Change]) -> None: ...

    def records(self) -> Mapping[bytes, bytes]: ...

    def close(self) -> None: ...


class Sqlite:
    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.base = sqlite3.connect(folder / "base", isolation_level=None)
        self.base.execute("PRAGMA journal_mode=WAL")
        self.base.execute("PRAGMA synchronous=FULL")
        self.base.execute(
            "CREATE TABLE IF NOT EXISTS record (key BLOB PRIMARY KEY, value BLOB) WITHOUT ROWID"
        )

    def append(self, changes: Sequence[Change]) -> None:
        self.base.execute("BEGIN")
        self.base.executemany("INSERT OR REPLACE INTO record VALUES (?, ?)", changes)
        self.base.execute("COMMIT")

    def records(self) -> Mapping[bytes, bytes]:
        return dict(self.base.execute("SELECT key, value FROM record"))

    def close(self) -> None:
        self.base.close()


class Lmdb:
    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.base: Any = importlib.import_module("lmdb").open(str(folder), map_size=LMDB_MAP_BYTES)

    def append(self, changes: Sequence[Change]) -> None:
        with self.base.begin(write=True) as transaction:
            for key, value in changes:
                transaction.put(key, value)

    def records(self) -> Mapping[bytes, bytes]:
        with self.base.begin() as transaction:
            return dict(transaction.cursor())

    def close(self) -> None:
        self.base.close()


class Bare:
    """The same bytes at the end of one file, and a sync: nothing can be read back."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = os.open(folder / "bare", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def append(self, changes: Sequence[Change]) -> None:
        os.write(self.file, b"".join(value for _, value in changes if value is not None))
        os.fdatasync(self.file)

    def records(self) -> Mapping[bytes, bytes]:
        return {}

    def close(self) -> None:
        os.close(self.file)


Opener = Callable[[Path], Contender]


def others() -> dict[str, Opener]:
    try:
        importlib.import_module("lmdb")
    except ImportError:
        return {"SQLite": Sqlite}
    return {"SQLite": Sqlite, "LMDB": Lmdb}


class Writer:
    """Commits to one contender, `size` records at a time, and remembers how long each took.

    A round's figure is its median: a disk that others use too now and then takes 100 times longer.
    """

    def __init__(self, contender: Contender, commits: int, size: int) -> None:
        self.contender, self.commits, self.size = contender, commits, size
        self.random = Random(1)
        self.samples: list[float] = []

    def __call__(self) -> float:
        batches = [
            [(b"%08d" % self.random.randrange(KEYS), self.value()) for _ in range(self.size)]
            for _ in range(self.commits)
        ]
        taken = []
        for batch in batches:
            began = time.perf_counter()
            self.contender.append(batch)
            taken.append(time.perf_counter() - began)
        self.samples += taken
        return percentile(taken, 50)

    def value(self) -> bytes:
        return self.random.randbytes(VALUE_BYTES)

    def records_per_s(self) -> float:
        """Over all of them, with what slowed some: a new file, a checkpoint, others' syncs."""
        return len(self.samples) * self.size / sum(self.samples)

    def ms(self, percent: float) -> float:
        return percentile(self.samples, percent) * 1000


def writing(folder: Path, commits: int, size: int, rounds: int) -> list[Figure]:
    """How long commits take, to those of each other."""
    what = "commit" if size == 1 else f"commit of {size} records"
    figures = []
    for name, opener in {**others(), "bare append": Bare}.items():
        ours = storage.open(folder / f"ours {size} {name}")
        other = opener(folder / f"{name} {size}")
        a, b = Writer(ours, commits, size), Writer(other, commits, size)
        pair = interleave(a, b, rounds)
        ours.close()
        other.close()
        raw: dict[str, float | str] = {
            "ours p50 ms": a.ms(50), f"{name} p50 ms": b.ms(50),
            "ours p99 ms": a.ms(99), f"{name} p99 ms": b.ms(99),
            "ours records/s": a.records_per_s(), f"{name} records/s": b.records_per_s(),
            "ratio lowest": pair.ratio_low, "ratio highest": pair.ratio_high,
        }  # fmt: skip
        goal = None if name == "bare append" else 1.0
        figures.append(Figure(f"{what} / {name}", pair.ratio, goal, "lower", "x", raw))
    return figures


def abandoned(opener: Opener, folder: Path, keys: int) -> Path:
    """A folder as a process that was killed leaves it: `keys` records, a third written twice."""
    contender = opener(folder)
    random = Random(2)
    for begin in [*range(0, keys, BATCH), *range(0, keys // 3, BATCH)]:
        batch = [
            (b"%08d" % key, random.randbytes(VALUE_BYTES)) for key in range(begin, begin + BATCH)
        ]
        contender.append(batch)
    left = folder.with_name(f"{folder.name} left")
    shutil.copytree(folder, left)
    contender.close()
    return left


class Recovery:
    def __init__(self, opener: Opener, left: Path, keys: int) -> None:
        self.opener, self.left, self.keys = opener, left, keys

    def __call__(self) -> float:
        copy = self.left.with_name(f"{self.left.name} copy")
        shutil.copytree(self.left, copy)
        began = time.perf_counter()
        contender = self.opener(copy)
        found = len(contender.records())
        taken = time.perf_counter() - began
        contender.close()
        shutil.rmtree(copy)
        assert found >= self.keys
        return taken


def recovering(folder: Path, keys: int, rounds: int) -> list[Figure]:
    def ours(path: Path) -> Contender:
        return storage.open(path)

    a = Recovery(ours, abandoned(ours, folder / "ours", keys), keys)
    figures = []
    for name, opener in others().items():
        b = Recovery(opener, abandoned(opener, folder / name, keys), keys)
        pair = interleave(a, b, rounds)
        figures.append(
            Figure(
                f"recovery of {keys} records / {name}", pair.ratio, None, "lower", "x",
                pair.raw("ours", name),
            )
        )  # fmt: skip
    figures.append(Figure(f"recovery of {keys} records", pair.a, 1.0, "lower", "s"))
    return figures


def run(quick: bool = False) -> list[Figure]:
    """Ratios of commit, throughput and recovery; a file is replaced several times on the way."""
    rounds = 20 if quick else 100
    with tempfile.TemporaryDirectory(prefix="mf-bench-") as name:
        folder = Path(name)
        return [
            *writing(folder, COMMITS, 1, rounds),
            *writing(folder, BATCHES, BATCH, rounds),
            *recovering(folder, KEYS // 5 if quick else KEYS, 3 if quick else 11),
        ]
