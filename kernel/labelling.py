"""The labels of this node: what it was started with, and what it was told since then.

Interface rules: `own` is what it has now; `change` makes other labels durable before anybody hears
of them. Kept is only what differs from what the node was started with, so that a label which is
changed in the configuration later counts where nobody said otherwise.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec

from manifold.kernel import durable, labels
from manifold.kernel.errors import ConfigError, ManifoldError, Refused

if TYPE_CHECKING:
    from manifold.kernel.node import Node

log = logging.getLogger("manifold.node")

FILE = "labels"  # in the node's state folder


class Kept(msgspec.Struct, frozen=True, array_like=True):
    """The durable record: labels that were given, and keys of others that were taken away."""

    given: Annotated[tuple[str, ...], msgspec.Meta(max_length=labels.LABELS_MAX)] = ()
    taken: Annotated[tuple[str, ...], msgspec.Meta(max_length=labels.LABELS_MAX)] = ()

    def over(self, started: Sequence[str]) -> tuple[str, ...]:
        """The labels of a node that was started with these."""
        return labels.merged(labels.without(started, self.taken), self.given)


class Labelling:
    """See the module. `started` are the labels that the node was started with."""

    def __init__(self, node: Node, folder: Path, started: tuple[str, ...]) -> None:
        self._node = node
        self._path = folder / FILE
        self._started = started
        self._one = asyncio.Lock()
        self._kept = Kept()
        self.own = started
        try:
            record = durable.read_record(self._path)
            kept = msgspec.msgpack.decode(record, type=Kept) if record else Kept()
            own = kept.over(started)
            labels.check_size(own)
        except (ManifoldError, msgspec.MsgspecError) as error:
            log.error("labels that were given to this node do not count: %s", error)
        else:
            self._kept, self.own = kept, own

    async def change(self, given: Sequence[str], taken: Sequence[str]) -> tuple[str, ...]:
        """Give labels, and take away those with the keys `taken`; what there is then.

        Raises `Refused` where that cannot be, `NotDurable` where the disk refuses it.
        """
        async with self._one:
            try:
                kept = self._with(labels.read(given), taken)
                own = kept.over(self._started)
                labels.check_size(own)
            except ConfigError as error:
                reason = f"{error.message[:1].upper()}{error.message[1:]}"
                raise Refused(reason, error.next_step) from None
            me = dataclasses.replace(self._node.core.me, labels=own)
            assert me.meta.labels == own, "a description has room for all that a node may have"
            data = msgspec.msgpack.encode(kept)
            await asyncio.to_thread(durable.write_record, self._path, data)
            self._kept, self.own = kept, own
            self._node.perform(self._node.core.relabel(own, self._node.now_ms()))
            log.info("labels: %s", ", ".join(own) or "none")
            return own

    def _with(self, given: tuple[str, ...], taken: Sequence[str]) -> Kept:
        gone = [key for key in taken if not labels.has_key(given, key)]
        missing = [key for key in gone if not labels.has_key(self.own, key)]
        if missing:
            raise Refused(
                f"It has no label {missing[0][:64]}.", f"It has {', '.join(self.own) or 'none'}."
            )
        before = labels.without(self._kept.given, gone)
        still = [key for key in self._kept.taken if not labels.has_key(given, key)]
        # As many as it was started with: of what it never had, nothing needs to be remembered.
        keys = [key for key in (*still, *gone) if labels.has_key(self._started, key)]
        return Kept(labels.merged(before, given), tuple(dict.fromkeys(keys)))
