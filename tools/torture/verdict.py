"""Whether what clients saw could have happened: the judge of a run.

Interface: `judge(seen)` takes every record of every client and returns a `Verdict`: failures in
words, none where all is well, and the history of the first key that is to blame. A search that was
given up is a failure as well: nobody may take it for a pass.
Checks: J1 each key is linearizable. J2 a key to which was only ever added holds the sum of what was
acknowledged and of some of what has an unknown fate, and no two adds were told one sum. J3 the
version of a register that is there never goes back, and each change that succeeded raised it.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from manifold.tools.simulator.linearizable import CONFIGURATIONS_MAX, Undecided, check
from manifold.tools.torture.history import Seen

OPEN = ("maybe", "begun")  # of unknown fate
PATIENT = 20  # times as long, for a key that was not decided at first: up to a minute and 1 GB


@dataclass(slots=True)
class Verdict:
    """See the module."""

    failures: list[str] = field(default_factory=list)
    blamed: list[Seen] = field(default_factory=list)
    keys: int = 0

    def blame(self, what: str, seen: Sequence[Seen]) -> None:
        self.failures.append(what)
        self.blamed = self.blamed or list(seen)


def judge(seen: Sequence[Seen]) -> Verdict:
    verdict = Verdict()
    by_key: dict[str, list[Seen]] = {}
    for each in seen:
        by_key.setdefault(each.key, []).append(each)
    verdict.keys = len(by_key)
    for key in sorted(by_key):
        mine = sorted(by_key[key], key=lambda each: (each.begun_ms, each.ended_ms, each.client))
        for what in (_linearizable(mine), _sums(key, mine), _versions(key, mine)):
            if what:
                verdict.blame(what, mine)
    return verdict


def _linearizable(mine: Sequence[Seen]) -> str:
    """J1."""
    operations = [each.operation() for each in mine]
    known = [each for each in operations if each is not None]
    found = check(known)
    if isinstance(found, Undecided):
        found = check(known, configurations_max=PATIENT * CONFIGURATIONS_MAX)
    return "" if found is None else str(found)


def _sums(key: str, mine: Sequence[Seen]) -> str:
    """J2."""
    if any(each.kind not in ("add", "read") for each in mine):
        return ""
    told = [each.result for each in mine if each.kind == "add" and each.status == "ok"]
    twice = [total for total, count in Counter(told).items() if count > 1]
    if twice:
        return f"Two adds to {key} were both told {twice[0]}: one of them is lost."
    done = sum(_amount(each) for each in mine if each.kind == "add" and each.status == "ok")
    lost = sum(_amount(each) for each in mine if each.kind == "add" and each.status in OPEN)
    reads = [each for each in mine if each.kind == "read" and each.status == "ok"]
    ended_ms = max((each.ended_ms for each in mine if each.kind == "add"), default=0.0)
    for each in reads:
        total = int(each.result or 0)
        if each.begun_ms > ended_ms and not done <= total <= done + lost:
            return (
                f"{key} holds {total} in the end: {done} were acknowledged, and at most {lost} of "
                "unknown fate can have been added."
            )
    return ""


def _amount(each: Seen) -> int:
    (amount,) = each.argument
    assert amount is not None, "one adds numbers"
    return amount


def _versions(key: str, mine: Sequence[Seen]) -> str:
    """J3: in the order of beginnings, with what had ended before each."""
    ended: list[tuple[float, int]] = []
    most = 0
    for each in mine:
        changed = each.status == "ok" and each.kind in ("write", "add", "cas", "create")
        present = each.status == "ok" and each.kind == "read" and each.result is not None
        if not (changed or present) or not each.version:
            continue
        while ended and ended[0][0] < each.begun_ms:
            most = max(most, heapq.heappop(ended)[1])
        new = changed and each.tries == 1  # of others it is told that they were done, not when
        if each.version < most + new:
            return (
                f"{key} had version {most} before {each.client} began to {each.kind}, and was "
                f"told version {each.version}: versions never go back."
            )
        heapq.heappush(ended, (each.ended_ms, each.version))
    return ""
