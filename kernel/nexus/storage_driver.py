"""Group commit: what Nexus persists becomes durable, in the order asked for.

Interface: `recover(folder)` once, before the machine starts; then `write(held)` for each record,
and `carry_out(effects)` is called with what was held once it is durable, then `flush()`: answers
leave before the loop takes in what came during the sync. What comes while a sync is
under way goes with the next one; nothing waits for a timer. While the disk is fast they are done in
the loop: handing one to a thread, and waiting for the interpreter behind the loop, costs as much as
the sync. Else they are done in the thread, beside what else there is to do. `failed(error)` is
called once, when the disk refused: from then on nothing is written and nothing is carried out any
more (S2 of storage.py). The folder is made by the first write: a node that never votes has none.
Invariants: D1 an effect is carried out only when its record, and each earlier record of the same
name, is durable; D2 one batch is under way at a time.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from random import SystemRandom
from typing import Any

from manifold.kernel.durable import read_record, sync_folder, write_record
from manifold.kernel.effects import Effect, Held
from manifold.kernel.errors import ManifoldError
from manifold.kernel.nexus import storage
from manifold.kernel.nexus.rejoin import Step
from manifold.kernel.nexus.storage_files import DISK, Files
from manifold.kernel.nexus.storage_frames import BATCH_BYTES_MAX, Change

log = logging.getLogger("manifold.nexus")

FOLDER = "nexus"  # within a node's state
REJOIN = "nexus.rejoin"  # beside it, while a voter that lost its disk joins anew
PREFIX = "x."  # of the names of records that are kept here

# A batch is written whole; of larger ones the rest waits for the next. A record is under 100 kB.
BATCH_BYTES = BATCH_BYTES_MAX // 2
# The loop waits for syncs itself while they take less than this on average. Measured in turns, with
# syncs of 0.12 ms: 0.95 of the thread's p50 with 8 clients, 0.97 with 64, 0.91 with 8 on one key.
LOOP_S = 0.0005
# A stray slow sync of 5 ms is passed over (of 0.1 it makes 0.41 ms); of a disk that takes 5 ms now
# the third is in the thread.
AVERAGED = 16
UNKNOWN_S = 0.05  # before the first sync: after some 75 fast ones the loop does it itself


def files(kind: str) -> Files:
    """The disk, or for tests one that forgets with the process what was not synced."""
    if kind == "losing":
        from manifold.kernel.nexus.storage_losing import LosingDisk  # never needed otherwise

        return LosingDisk(SystemRandom().getrandbits(32))
    return DISK


def recover(
    folder: Path, boot: int, files: Files = DISK
) -> tuple[storage.Storage | None, dict[str, bytes]]:
    """The storage in `folder` (None where there is none yet) and its records, by name.

    Storage that is damaged is put aside: this node has forgotten what it promised, and joins the
    voters anew (rejoin.py).
    """
    if not folder.exists():
        return None, {}
    try:
        opened = storage.open(folder, files)
    except storage.Amnesia as damage:
        aside = folder.with_name(f"{folder.name}.damaged-{boot}")
        log.critical("%s It is kept as %s; this node joins the voters anew.", damage, aside)
        save_step(folder, "damaged")  # before: of the two, the crash must not find neither
        os.rename(folder, aside)
        sync_folder(folder.parent)
        return None, {}
    report = opened.recovered
    log.info("nexus: %s", report)
    return opened, {name.decode(): record for name, record in opened.records().items()}


def load_step(folder: Path) -> Step:
    """How far this node is with joining the voters anew."""
    saved = read_record(folder.with_name(REJOIN))
    found: dict[bytes, Step] = {b"damaged": "damaged", b"removed": "removed"}
    return found.get(saved or b"", "")


def save_step(folder: Path, step: Step) -> None:
    """Make it durable; the end of it by removing the record."""
    path = folder.with_name(REJOIN)
    if step:
        write_record(path, step.encode())
    else:
        path.unlink(missing_ok=True)
        sync_folder(path.parent)


class Commits:
    """See the module. Used from the thread of `loop`; its own thread only appends."""

    def __init__(
        self,
        folder: Path,
        files: Files,
        opened: storage.Storage | None,
        records: dict[str, bytes],
        loop: asyncio.AbstractEventLoop,
        carry_out: Callable[[Sequence[Effect]], Any],
        failed: Callable[[ManifoldError], Any],
        flush: Callable[[], Any],
    ) -> None:
        self._folder, self._files, self._storage = folder, files, opened
        self._loop, self._carry_out, self._failed = loop, carry_out, failed
        self._flush = flush
        self._wanted = records  # the last record asked for, by name
        self._pending: dict[str, int] = {}  # how many of the waiting and the running are of a name
        self._waiting: list[tuple[Held, bool]] = []  # and whether there is something to write
        self._running: list[tuple[Held, bool]] = []
        self._wake = False
        self._queue: SimpleQueue[list[Change] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._mean_s = UNKNOWN_S  # of recent syncs
        self.stopped = ""
        self.batches = 0
        self.on_batch: Callable[[float], None] | None = None  # told how long each took, in seconds

    @property
    def syncs(self) -> int:
        """Of files and folders, by this process: what wears its storage."""
        return DISK.syncs

    def write(self, held: Held) -> None:
        """Make the record durable; an empty one is removed."""
        if self.stopped:
            return
        name, record = held.persist.name, held.persist.record
        fresh = self._wanted.get(name, b"") != record
        if not fresh and not self._pending.get(name):
            self._carry_out(held.then)
            return
        if fresh:
            self._wanted[name] = record
        self._pending[name] = self._pending.get(name, 0) + 1
        self._waiting.append((held, fresh))
        if not self._running and not self._wake:
            self._wake = True  # after this turn of the loop: what came together goes together
            self._loop.call_soon(self._start)

    def _start(self) -> None:
        self._wake = False
        if self._running or not self._waiting or self.stopped:
            return
        changes: dict[bytes, bytes | None] = {}
        size = taken = 0
        for held, fresh in self._waiting:
            if fresh:
                changes[held.persist.name.encode()] = held.persist.record or None
                size += len(held.persist.record)
            taken += 1
            if size > BATCH_BYTES:
                break
        self._running, self._waiting = self._waiting[:taken], self._waiting[taken:]
        if self._in_the_loop:
            self._done(*self._sync(list(changes.items())))
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._append, name="nexus-disk", daemon=True)
            self._thread.start()
        self._queue.put(list(changes.items()))

    @property
    def _in_the_loop(self) -> bool:
        return self._mean_s < LOOP_S

    def _append(self) -> None:
        """The thread: one batch after the other."""
        while (changes := self._queue.get()) is not None:
            error, took_s = self._sync(changes)
            try:
                self._loop.call_soon_threadsafe(self._done, error, took_s)
            except RuntimeError:  # the loop is closed: nobody waits any more
                break
        if self._storage is not None:
            self._storage.close()

    def _sync(self, changes: list[Change]) -> tuple[BaseException | None, float]:
        """In whichever thread; what went wrong is judged in `_done`."""
        begun_s = time.perf_counter()
        if not changes:
            return None, 0.0
        try:
            if self._storage is None:
                self._storage = storage.open(self._folder, self._files)
            self._storage.append(changes)
        except BaseException as fault:
            return fault, 0.0
        return None, time.perf_counter() - begun_s

    def _done(self, error: BaseException | None, took_s: float) -> None:
        if self.stopped:
            return
        if error is not None:
            self.stopped = str(error)
            self._waiting.clear()
            if not isinstance(error, ManifoldError):
                raise error
            self._failed(error)
            return
        self.batches += 1
        if took_s:  # else there was nothing to write
            self._mean_s += (took_s - self._mean_s) / AVERAGED
            if self.on_batch is not None:
                self.on_batch(took_s)
        done, self._running = self._running, []
        if self._waiting and not self._wake:  # what came meanwhile is synced while we answer
            if self._in_the_loop:
                self._wake = True
                self._loop.call_soon(self._start)
            else:
                self._start()
        for held, _ in done:
            left = self._pending[held.persist.name] - 1
            if left:
                self._pending[held.persist.name] = left
            else:
                del self._pending[held.persist.name]
            if not held.persist.record and not left:
                self._wanted.pop(held.persist.name, None)
        for held, _ in done:
            self._carry_out(held.then)
        self._flush()

    def close(self) -> None:
        """Give the folder back. What is under way becomes durable, and nobody is told."""
        self.stopped = self.stopped or "closed"
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
        elif self._storage is not None:
            self._storage.close()
