"""What a register remembers of the programs that write it: marks of their effects.

Interface: `Marks` stands beside the ring in a value; `Book(marks)` is a working copy of it, changed
by `admit`, `dismiss`, `settle` and `mark`, read by `admits`, `counted` and `found`, and put back by
`marks()`. An effect is known by (job, position, k), whoever asks for it and however often.
Invariants:
  M1  an effect whose mark may be gone is never applied: marks go only with their position settled,
      or with their job, and then the effect is refused;
  M2  a job that was dismissed is not admitted again by a late `Admit`;
  M3  settled ranges of a job are sorted, not empty, and neither overlap nor touch.
Bounds of an encoding: 64 jobs of 72 B, 1 024 ranges of 19 B and 2 048 marks of 28 B in all, 64
digests of 9 B: under 81 KiB. A mark of a small number at a small position takes 6 B, 2 048 12 KiB.
Source: design page of the scheduler, "Effects on globals".
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import blake3
import msgspec
from msgspec import Meta

from manifold.kernel.nexus.ballots import COUNTER_MAX

INT_MIN, INT_MAX = -(1 << 63), (1 << 63) - 1
JOBS_MAX = 64  # admitted to one register; a further one has to wait
MARKS_MAX = 2048  # of one register: 64 nodes with a block of 32 effects each that is not counted
RANGES_MAX = 1024  # settled ranges of one register: what does not fit keeps its marks
GONE_MAX = 64  # jobs that were dismissed: a late `Admit` is some of them late, not all
SETTLED_MAX = 64  # ranges that one effect carries
GONE_BITS = 61

Integer = Annotated[int, Meta(ge=INT_MIN, le=INT_MAX)]
JobId = Annotated[str, Meta(min_length=1, max_length=64)]
Position = Annotated[int, Meta(ge=0, le=COUNTER_MAX)]
Found = Integer | float | None  # what the register held before; None: of no interest (`Put`)
Range = tuple[Position, Position]  # half-open
Mark = tuple[Position, Position, Found]  # position, k, result


class Job(msgspec.Struct, frozen=True, array_like=True):
    """A job that may write this register."""

    job: JobId
    settled: Annotated[tuple[Range, ...], Meta(max_length=RANGES_MAX)] = ()
    effects: Annotated[tuple[Mark, ...], Meta(max_length=MARKS_MAX)] = ()


class Marks(msgspec.Struct, frozen=True, array_like=True):
    """`jobs` in the order of their admission, `gone` digests of those that were dismissed."""

    jobs: Annotated[tuple[Job, ...], Meta(max_length=JOBS_MAX)] = ()
    gone: Annotated[tuple[Position, ...], Meta(max_length=GONE_MAX)] = ()


def digest_of(job: str) -> int:
    """A job in `gone`: two that share one in 2^61 are the same, and the second is refused."""
    return int.from_bytes(blake3.blake3(job.encode()).digest(8), "big") >> (64 - GONE_BITS)


@dataclass(slots=True)
class _Open:
    """A job whose marks are being changed."""

    settled: list[Range]
    effects: dict[tuple[int, int], Found]


class Book:
    """See the module."""

    def __init__(self, marks: Marks | None) -> None:
        self._before = marks
        self._jobs: dict[str, Job] = {each.job: each for each in marks.jobs} if marks else {}
        self._gone: dict[int, None] = dict.fromkeys(marks.gone) if marks else {}
        self._open: dict[str, _Open] = {}
        self._count = sum(len(each.effects) for each in self._jobs.values())
        self._ranges = sum(len(each.settled) for each in self._jobs.values())
        self._changed = False

    def marks(self) -> Marks | None:
        """What it has become: the same object where nothing has changed."""
        if not self._changed:
            return self._before
        jobs = tuple(self._closed(name, job) for name, job in self._jobs.items())
        return Marks(jobs, tuple(self._gone)) if jobs or self._gone else None

    def _closed(self, name: str, job: Job) -> Job:
        opened = self._open.get(name)
        if opened is None:
            return job
        effects = tuple([(at, k, found) for (at, k), found in opened.effects.items()])
        return Job(name, tuple(opened.settled), effects)

    def _opened(self, name: str) -> _Open:
        opened = self._open.get(name)
        if opened is None:
            job = self._jobs[name]
            effects = {(at, k): found for at, k, found in job.effects}
            opened = self._open[name] = _Open(list(job.settled), effects)
        return opened

    # -- jobs -------------------------------------------------------------------------------------

    @property
    def jobs(self) -> int:
        return len(self._jobs)

    def admits(self, name: str) -> bool:
        return name in self._jobs

    def admit(self, name: str) -> Literal["ok", "refused", "busy"]:
        """`refused`: it was dismissed (M2). `busy`: there is no room until another one is."""
        if name in self._jobs:
            return "ok"
        if digest_of(name) in self._gone:
            return "refused"
        if len(self._jobs) >= JOBS_MAX:
            return "busy"
        self._jobs[name] = Job(name)
        self._changed = True
        return "ok"

    @property
    def names(self) -> tuple[str, ...]:
        """Of the jobs, in the order of their admission."""
        return tuple(self._jobs)

    def dismiss(self, name: str) -> None:
        """Its marks go; nothing of it is applied from now on."""
        digest = digest_of(name)
        if name not in self._jobs and digest in self._gone:
            return
        if name in self._jobs:
            opened = self._opened(name)
            self._count -= len(opened.effects)
            self._ranges -= len(opened.settled)
            del self._jobs[name], self._open[name]
        if len(self._gone) >= GONE_MAX:
            del self._gone[next(iter(self._gone))]
        self._gone[digest] = None
        self._changed = True

    def clear(self) -> None:
        """The register is deleted: all of them are dismissed."""
        for name in list(self._jobs):
            self.dismiss(name)

    # -- effects ----------------------------------------------------------------------------------

    def settle(self, name: str, ranges: Iterable[Range]) -> None:
        """Positions whose blocks are counted: their marks are not needed any more (M1)."""
        news = [each for each in ranges if not _holds(self._settled(name), each)]
        if not news:
            return
        opened = self._opened(name)
        before = len(opened.settled)
        for each in news:
            merged = _merged(opened.settled, each)
            if self._ranges - before + len(merged) <= RANGES_MAX:
                opened.settled = merged
        self._ranges += len(opened.settled) - before
        kept = {
            place: found
            for place, found in opened.effects.items()
            if not _covers(opened.settled, place[0])
        }
        self._count -= len(opened.effects) - len(kept)
        opened.effects = kept
        self._changed = True

    def _settled(self, name: str) -> list[Range] | tuple[Range, ...]:
        opened = self._open.get(name)
        return opened.settled if opened is not None else self._jobs[name].settled

    def counted(self, name: str, position: int) -> bool:
        return _covers(self._settled(name), position)

    def seen(self, name: str, position: int, k: int) -> bool:
        return (position, k) in self._opened(name).effects

    def found(self, name: str, position: int, k: int) -> Found:
        return self._opened(name).effects[(position, k)]

    @property
    def full(self) -> bool:
        return self._count >= MARKS_MAX

    def mark(self, name: str, position: int, k: int, found: Found) -> None:
        assert not self.full and not self.counted(name, position), "M1"
        self._opened(name).effects[(position, k)] = found
        self._count += 1
        self._changed = True


# -- ranges ---------------------------------------------------------------------------------------


def _covers(ranges: list[Range] | tuple[Range, ...], position: int) -> bool:
    place = bisect_right(ranges, position, key=_first) - 1
    return place >= 0 and position < ranges[place][1]


def _holds(ranges: list[Range] | tuple[Range, ...], wanted: Range) -> bool:
    """Whether all of `wanted` is in `ranges` already; what is empty is."""
    first, after = wanted
    if first >= after:
        return True
    place = bisect_right(ranges, first, key=_first) - 1
    return place >= 0 and after <= ranges[place][1]


def _merged(ranges: list[Range], added: Range) -> list[Range]:
    """`ranges` with `added`, which is not empty (M3)."""
    first, after = added
    begin = bisect_left(ranges, first, key=_after)  # the first that touches it, or is above
    end = bisect_right(ranges, after, key=_first)
    if begin < end:
        first, after = min(first, ranges[begin][0]), max(after, ranges[end - 1][1])
    return [*ranges[:begin], (first, after), *ranges[end:]]


def _first(one: Range) -> int:
    return one[0]


def _after(one: Range) -> int:
    return one[1]
