"""A node's records on the disk, all but those of Nexus: membership's, and the scheduler's outbox.

Interface rules: `write` begins a write and carries out what waits for it when it is durable; writes
reach the disk in the order in which they were asked for. Each record is a checksummed file of its
own, replaced whole; an entry of the outbox that becomes empty is removed. A refused entry of the
outbox is told to who submitted it; any other record that is refused ends the node (N1).
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from manifold.kernel import durable
from manifold.kernel.durable import Damaged, NotDurable
from manifold.kernel.effects import Held, Notify, Send
from manifold.kernel.errors import ManifoldError, Unavailable
from manifold.kernel.hyperbus.driver import Incoming
from manifold.kernel.hyperbus.faults import to_failure
from manifold.kernel.scheduler.messages import Stored
from manifold.kernel.scheduler.outbox import PREFIX

if TYPE_CHECKING:
    from manifold.kernel.node import Node

log = logging.getLogger("manifold.node")


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """What a request waited for is on the disk: this is its answer."""

    incoming: Incoming
    answer: msgspec.Struct


class Persisting:
    """See the module. `folder` is the node's state folder."""

    def __init__(self, node: Node, folder: Path) -> None:
        self._node = node
        self._folder = folder
        self._disk = asyncio.Lock()
        self._durable: dict[str, bytes] = {}  # what this process has made durable

    async def write(self, held: Held) -> None:
        name, record = held.persist.name, held.persist.record
        try:
            async with self._disk:
                if name.startswith(PREFIX):
                    await asyncio.to_thread(save_entry, self._folder, name, record)
                elif self._durable.get(name) != record:
                    await asyncio.to_thread(durable.write_record, self._folder / name, record)
                    self._durable[name] = record
        except ManifoldError as error:
            if name.startswith(PREFIX) and record:
                self._not_queued(held, error)
                return
            log.critical("%s", error)
            self._node.end(74, "a record could not be made durable")
            return
        self._node.perform(held.then)

    def _not_queued(self, held: Held, error: ManifoldError) -> None:
        log.error("%s", error)
        why = Unavailable(
            f"No majority of the voters answers, and the job cannot be queued: {error.message}",
            "Submit it at another node.",
        )
        for effect in held.then:
            match effect:
                case Send(to=to, message=Stored() as stored):
                    self._node.perform([Send(to, msgspec.structs.replace(stored, kept=False))])
                case Notify(event=Acknowledged(incoming=incoming)):
                    self._node.bus.reply(incoming, to_failure(why))


def load_outbox(folder: Path) -> dict[str, bytes]:
    """The entries below the node's state folder, by name. What is damaged is told, and left."""
    box = folder / PREFIX
    if not box.is_dir():
        return {}
    durable.sweep(box)
    found = {}
    for path in sorted(box.iterdir()):
        try:
            record = durable.read_record(path)
        except Damaged as error:
            log.error("the outbox has lost a job: %s %s", error.message, error.next_step)
            continue
        if record:
            found[PREFIX + path.name] = record
    return found


def save_entry(folder: Path, name: str, record: bytes) -> None:
    """Make it durable, or durably gone; `NotDurable` where the disk refuses."""
    path = folder / name
    try:
        if not path.parent.is_dir():
            durable.make_folder(path.parent)
        if record:
            durable.write_record(path, record)
            return
        path.unlink(missing_ok=True)
        durable.sync_folder(path.parent)
    except OSError as fault:
        raise NotDurable(
            f"{path} cannot be changed: {fault.strerror}.", "Check the disk and its space."
        ) from fault
