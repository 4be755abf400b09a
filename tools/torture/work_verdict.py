"""Whether what a tortured cluster made of its work is right: the judge of jobs.

Interface: `judge_work(ran, counters, ...)` takes the last word on every piece of work and what the
counters hold in the end, and returns failures in words, none where all is well.
Checks: W1 a result is the one that was computed independently; a float is the same bits wherever
it was computed. W2 a piece ends in one of the ways that are documented, and in no other. W3 of a
program that is done each effect took place once; of one whose fate is not known at most once. W4 a
counter on which many propose or add gave each of its values to one of them, and holds in the end
what that comes to. W5 after healing each client had a piece of each kind done.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from manifold.tools.torture.work import KINDS, Ran, bad_index, expected

# Nobody knows what became of it, nobody could be reached, its cluster was gone for seconds; a shard
# was lost 20 times. Each is documented (docs/scheduler.md, docs/sdk.md), and counted in a report.
EXCUSED = ("maybe", "unavailable", "busy", "no_cluster", "exhausted")
DONE_BY_CLIENT = ("cancelled", "left")
FLOAT_ERROR = 1e-12  # relative: 60 000 terms, each rounded to 1e-16, summed by a tree
SHOWN = 3  # failures of one check


def judge_work(
    ran: Sequence[Ran],
    counters: Mapping[str, int],
    *,
    clients: int,
    workers_killed: bool,
    crashed: bool,
) -> list[str]:
    """See the module. `crashed`: processes of clients died, and with them what they knew."""
    found: dict[str, list[str]] = defaultdict(list)
    for each in ran:
        found["result"] += _result(each, workers_killed)
        found["end"] += _end(each, crashed)
    found["bits"] += _bits(ran)
    found["own"] += _own(ran, counters)
    found["shared"] += _shared(ran, counters)
    found["closing"] += _closing(ran, clients, crashed)
    failures = []
    for check in found.values():
        failures += check[:SHOWN]
        if len(check) > SHOWN:
            failures.append(f"... and {len(check) - SHOWN} more of that kind.")
    return failures


def effects(ran: Sequence[Ran]) -> int:
    """Of programs that were done: two with each index."""
    return sum(2 * each.work.count for each in ran if each.work.kind == "tick" and _done(each))


def latest(ran: Sequence[Ran]) -> list[Ran]:
    """The last word on each piece."""
    return list({(each.client, each.begun_ms): each for each in ran}.values())


def _done(each: Ran) -> bool:
    return each.status == "ok"


def _named(each: Ran) -> str:
    work = each.work
    return (
        f"{work.kind} [{work.lo}, {work.hi}) {work.reduce} ({each.job or 'no job'}, {each.mode}, "
        f"of {each.client} at {each.node})"
    )


def _result(each: Ran, workers_killed: bool) -> list[str]:
    """W1."""
    if not _done(each):
        return []
    wanted, got = expected(each.work), each.result
    match each.work.kind:
        case "trap":
            return [f"{_named(each)} should have trapped, and gave {got!r}."]
        case "tick":
            if len(got) != each.work.count:
                return [f"{_named(each)} gave {len(got)} results."]
            return []
        case "adds":
            return []
        case "floats":
            right = isinstance(got, float) and math.isclose(got, wanted, rel_tol=FLOAT_ERROR)
        case "calls":
            pairs = list(zip(got, wanted, strict=True)) if len(got) == len(wanted) else [(0, 1)]
            right = all(one == other or (one is None and workers_killed) for one, other in pairs)
        case _:
            right = got == wanted
    return [] if right else [f"{_named(each)} gave {_short(got)} instead of {_short(wanted)}."]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _end(each: Ran, crashed: bool) -> list[str]:
    """W2."""
    if each.work.kind == "trap":
        if each.status == "trap" and each.result != bad_index(each.work):
            return [f"{_named(each)} trapped at index {each.result}: {each.said}"]
        if each.status == "trap":
            return []
    if _done(each) or each.status in EXCUSED or each.status == each.mode:
        return []
    if each.status == "begun":
        return [] if crashed else [f"Nobody knows what became of {_named(each)}."]
    return [f"{_named(each)} ended as {each.status!r}: {each.said}"]


def _bits(ran: Sequence[Ran]) -> list[str]:
    """W1: floats."""
    by_range: dict[tuple[int, int], Counter[float]] = defaultdict(Counter)
    for each in ran:
        if each.work.kind == "floats" and _done(each):
            by_range[each.work.lo, each.work.hi][each.result] += 1
    return [
        f"The sum of floats over [{lo}, {hi}) was not always the same: {dict(seen)}."
        for (lo, hi), seen in sorted(by_range.items())
        if len(seen) > 1
    ]


def _own(ran: Sequence[Ran], counters: Mapping[str, int]) -> list[str]:
    """W3."""
    found = []
    for each in ran:
        own, count = each.work.own, each.work.count
        if not own:
            continue
        total = counters[own]
        least = count if _done(each) else 0
        if not least <= total <= count:
            wanted = f"{count}" if least else f"0 to {count}"
            found.append(
                f"{_named(each)}, which ended as {each.status!r}, counted {own} up to {total} "
                f"instead of {wanted}."
            )
    return found


def _shared(ran: Sequence[Ran], counters: Mapping[str, int]) -> list[str]:
    """W4."""
    found = []
    for name in sorted({each.work.shared for each in ran if each.work.shared}):
        mine = [each for each in ran if each.work.shared == name]
        told = [before for each in mine if _done(each) for before in each.result]
        twice = [before for before, count in Counter(told).items() if count > 1]
        if twice:
            found.append(f"{name} gave {sorted(twice)[:5]} to more than one.")
        total = counters[name]
        sure = len(told)
        open_ = sum(each.work.count if not _done(each) else each.open for each in mine)
        if not sure <= total <= sure + open_:
            found.append(
                f"{name} holds {total} in the end: {sure} additions were done for sure, and at "
                f"most {open_} more may have been."
            )
        beyond = [before for before in told if not 0 <= before < total]
        if beyond:
            found.append(f"{name} holds {total} in the end, and somebody was told {max(beyond)}.")
    return found


def _closing(ran: Sequence[Ran], clients: int, crashed: bool) -> list[str]:
    """W5."""
    done = [
        each
        for each in ran
        if each.mode == "closing" and (_done(each) or each.status == each.work.kind == "trap")
    ]
    missing = clients * len(KINDS) - len(done)
    return [] if crashed or not missing else [f"{missing} pieces of work failed after healing."]
