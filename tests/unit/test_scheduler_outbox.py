"""The outbox of a node: what it takes, in which order it gives, and where it ends."""

from __future__ import annotations

import pytest

from manifold.kernel.effects import Held, Send
from manifold.kernel.errors import Busy
from manifold.kernel.scheduler import outbox as boxes
from manifold.kernel.scheduler.ledger import Job
from manifold.kernel.scheduler.messages import JobSpec, Stored
from manifold.kernel.scheduler.outbox import ENTRIES_MAX, PREFIX, Outbox
from manifold.vm.kid import kid_of

ME = kid_of(b"me")
IR = b"a program"


def job(number: int) -> Job:
    spec = JobSpec(kid_of(IR), 0, 10, "sum", name=f"job {number}")
    return Job(f"J-{number:016x}", spec, IR, 0.0, 1, [None])


def stored(held: Held) -> Stored:
    """What the node is told when the write has ended."""
    (sent, *_) = held.then
    assert isinstance(sent, Send) and isinstance(sent.message, Stored)
    return sent.message


def test_what_was_put_is_found_again_by_the_next_process_in_its_order() -> None:
    box = Outbox(ME)
    disk = {}
    for number in (3, 1, 2):
        held = box.put(job(number))
        disk[held.persist.name] = held.persist.record
    assert sorted(disk) == [f"{PREFIX}J-{number:016x}" for number in (1, 2, 3)]
    again = Outbox(ME)
    assert again.load(disk, 0.0) == []
    assert [entry.job.job for entry in again.next(9)] == [f"J-{n:016x}" for n in (3, 1, 2)]
    assert all(entry.job.state == "queued" for entry in again.next(9))


def test_nothing_is_handed_over_before_the_disk_has_it() -> None:
    box = Outbox(ME)
    held = box.put(job(1))
    assert box.waiting and box.next(9) == []
    box.stored(stored(held))
    assert [entry.job.job for entry in box.next(9)] == ["J-" + f"{1:016x}"]


def test_what_has_left_the_disk_is_gone() -> None:
    box = Outbox(ME)
    box.stored(stored(box.put(job(1))))
    (entry,) = box.entries.values()
    held = box.leave(entry)
    assert held.persist.record == b""
    assert box.stored(stored(held)) is entry
    assert not box.entries and not box.waiting


def test_a_full_outbox_says_what_to_do_and_has_room_again() -> None:
    box = Outbox(ME)
    for number in range(ENTRIES_MAX):
        box.stored(stored(box.put(job(number))))
    with pytest.raises(Busy, match=f"outbox is full: {ENTRIES_MAX} jobs") as refused:
        box.put(job(ENTRIES_MAX))
    assert "manifold nexus status" in refused.value.next_step
    assert len(box.entries) == ENTRIES_MAX
    box.stored(stored(box.leave(next(iter(box.entries.values())))))
    box.put(job(ENTRIES_MAX))


def test_bytes_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    box = Outbox(ME)
    held = box.put(job(1))
    monkeypatch.setattr(boxes, "BYTES_MAX", len(held.persist.record) + 10)
    with pytest.raises(Busy, match="outbox is full: 1 jobs"):
        box.put(job(2))


def test_a_damaged_record_is_named_and_costs_no_other() -> None:
    box = Outbox(ME)
    held = box.put(job(1))
    disk = {held.persist.name: held.persist.record, PREFIX + "J-bad": b"\xc1", PREFIX + "J-no": b""}
    again = Outbox(ME)
    assert again.load(disk, 0.0) == [PREFIX + "J-bad"]
    assert list(again.entries) == [f"J-{1:016x}"]
