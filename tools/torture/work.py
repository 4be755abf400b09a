"""The work that clients give a tortured cluster: what is asked, and what is right.

Interface: `deal(random, number)` is a piece of `Work`, a pure function of what it is given;
`program` its text, `expected` its result, computed here by other means than the program's: closed
forms, a sieve, a table. `Ran` is what a client records of it, once when it begins and again when
its fate is known, as history.py does for operations on registers.
Kinds: `collatz`, `primes`, `squares`, `floats`, `slow` compute; `trap` fails at one index; `tick`
adds one to a counter of its own with each index, and proposes on one that it shares; `adds` are
additions by the client itself; `calls` are Python functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any, Literal, get_args

import msgspec
import numpy as np

from manifold.kernel.scheduler.messages import Reduction

Kind = Literal[
    "collatz", "primes", "squares", "floats", "slow", "trap", "tick", "adds", "calls"
]  # fmt: skip
Mode = Literal["plain", "detached", "twice", "cancelled", "left", "closing"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PROGRAMS: tuple[Kind, ...] = ("collatz", "primes", "squares", "floats", "slow", "trap", "tick")

INDEX_MAX = 120_000
SHARED = 2  # counters that several jobs propose on
FLOATS = ((0, 40), (0, 3000), (500, 60_500))  # the same ones again and again: equal bits are asked
PREFIX = "work/"


class Work(msgspec.Struct, frozen=True):
    """One piece: `[lo, hi)`; `own` and `shared` are the globals that it writes."""

    kind: Kind
    lo: int
    hi: int
    reduce: Reduction = "collect"
    own: str = ""
    shared: str = ""
    wait_ms: int = 0  # of each index

    @property
    def count(self) -> int:
        return self.hi - self.lo


class Ran(msgspec.Struct, frozen=True):
    """One piece at one client. `status`: begun, ok, cancelled, left (by the client), stuck, or the
    code of an error. `open`: changes of unknown fate within it."""

    client: str
    node: str
    job: str
    work: Work
    mode: Mode
    status: str
    begun_ms: float
    ended_ms: float
    result: Any = None
    open: int = 0
    said: str = ""


# -- what is asked --------------------------------------------------------------------------------


def deal(random: Random, name: str) -> tuple[Work, Mode]:
    """The next piece of a client; `name` is its own, and nobody else's."""
    kind = random.choices(KINDS, (4, 3, 2, 2, 5, 1, 6, 2, 2))[0]
    mode: Mode = "plain"
    if kind in PROGRAMS and kind != "trap":
        modes: tuple[Mode, ...] = ("plain", "detached", "twice", "cancelled", "left")
        mode = random.choices(modes, (14, 2, 2, 1, 1))[0]
    return piece(kind, random, name), mode


def piece(kind: Kind, random: Random, name: str) -> Work:
    """Some work of that kind."""
    match kind:
        case "collatz":
            lo, count = random.randint(1, 1000), random.choice((10, 3000, 100_000))
            return Work(kind, lo, lo + count, random.choice(("sum", "max")))
        case "primes":
            lo, count = random.randint(0, 1000), random.choice((500, 20_000))
            return Work(kind, lo, lo + count, random.choice(("sum", "count", "min", "max")))
        case "squares":
            lo = random.randint(-1000, 1000)
            return Work(kind, lo, lo + random.choice((1, 50, 5000)))
        case "floats":
            return Work(kind, *random.choice(FLOATS), "sum")
        case "slow":
            return Work(kind, 0, random.choice((5, 40, 200)), "sum", wait_ms=10)
        case "trap":
            return Work(kind, 0, random.choice((20, 2000)), "sum", wait_ms=random.choice((0, 5)))
        case "tick":
            shared = f"{PREFIX}shared/{random.randrange(SHARED)}"
            own, wait_ms = f"{PREFIX}own/{name}", random.choice((0, 20))
            return Work(kind, 0, random.choice((3, 20, 60)), "collect", own, shared, wait_ms)
        case "adds":
            return Work(kind, 0, 10, "collect", "", f"{PREFIX}added")
        case "calls":
            return Work(kind, 0, random.choice((1, 8, 60)), wait_ms=random.choice((0, 30)))


def program(work: Work) -> str:
    """Its text."""
    wait = f"        SLEEP {work.wait_ms / 1000}\n" if work.wait_ms else ""
    return wait_after_globals(_PROGRAMS[work.kind], wait).format(
        own=work.own, shared=work.shared, bad=bad_index(work)
    )


def wait_after_globals(text: str, wait: str) -> str:
    lines = text.splitlines(keepends=True)
    declared = sum(line.startswith(".") for line in lines)
    return "".join([*lines[:declared], wait, *lines[declared:]])


def bad_index(work: Work) -> int:
    """Where a program that traps does so."""
    return (work.lo + work.hi) // 2


_PROGRAMS = {
    "collatz": """\
loop:   LOAD 0
        PUSH 1
        EQ
        JNZ done
        LOAD 1
        PUSH 1
        ADD
        STORE 1
        LOAD 0
        PUSH 1
        AND
        JNZ odd
        LOAD 0
        PUSH 2
        DIV
        STORE 0
        JMP loop
odd:    LOAD 0
        PUSH 3
        MUL
        PUSH 1
        ADD
        STORE 0
        JMP loop
done:   LOAD 1
        EMIT
        HALT
""",
    "primes": """\
        LOAD 0
        PUSH 2
        LT
        JNZ end
        PUSH 2
        STORE 1
try:    LOAD 1
        DUP
        MUL
        LOAD 0
        GT
        JNZ prime
        LOAD 0
        LOAD 1
        MOD
        JZ end
        LOAD 1
        PUSH 1
        ADD
        STORE 1
        JMP try
prime:  LOAD 0
        EMIT
end:    HALT
""",
    "squares": """\
        LOAD 0
        DUP
        MUL
        EMIT
        HALT
""",
    "floats": """\
        PUSH 1.0
        LOAD 0
        PUSH 1
        ADD
        FDIV
        EMIT
        HALT
""",
    "slow": """\
        LOAD 0
        EMIT
        HALT
""",
    "trap": """\
        LOAD 0
        PUSH {bad}
        EQ
        JZ fine
        RAISE as_it_should
fine:   LOAD 0
        EMIT
        HALT
""",
    "tick": """\
.global {own} i64
.global {shared} i64
        PUSH 1
        ADD_GLOBAL {own}
        STORE 1
        LOAD_GLOBAL {shared}
again:  DUP
        PUSH 1
        ADD
        PROPOSE_GLOBAL {shared}
        JZ again
        EMIT
        HALT
""",
}


def called(index: int, wait_ms: int) -> int:
    """What `calls` call, in a task process of the cluster."""
    import threading

    if wait_ms:
        threading.Event().wait(wait_ms / 1000)
    return pow(3, index, 1_000_003)


# -- what is right --------------------------------------------------------------------------------


def expected(work: Work) -> Any:
    """The result, where it does not depend on what else happens; None where it does."""
    match work.kind:
        case "collatz":
            steps = _collatz()[work.lo : work.hi]
            return int(steps.sum() if work.reduce == "sum" else steps.max())
        case "primes":
            found = [int(each) + work.lo for each in np.flatnonzero(_prime()[work.lo : work.hi])]
            reductions: dict[str, Callable[[list[int]], int]]
            reductions = {"sum": sum, "count": len, "min": min, "max": max}
            return reductions[work.reduce](found)
        case "squares":
            return [index**2 for index in range(work.lo, work.hi)]
        case "floats":
            return math.fsum(1.0 / (index + 1) for index in range(work.lo, work.hi))
        case "slow":
            return (work.lo + work.hi - 1) * work.count // 2
        case "calls":
            return [pow(3, index, 1_000_003) for index in range(work.lo, work.hi)]
    return None


@cache
def _collatz() -> np.ndarray[Any, np.dtype[np.int64]]:
    """Steps to 1 by index: those of smaller numbers are known already."""
    table = np.zeros(INDEX_MAX, dtype=np.int64)
    for start in range(2, INDEX_MAX):
        at, steps = start, 0
        while at >= start:
            at, steps = (at // 2, steps + 1) if at % 2 == 0 else (3 * at + 1, steps + 1)
        table[start] = steps + table[at]
    return table


@cache
def _prime() -> np.ndarray[Any, np.dtype[np.bool_]]:
    sieve = np.ones(INDEX_MAX, dtype=np.bool_)
    sieve[:2] = False
    for divisor in range(2, math.isqrt(INDEX_MAX) + 1):
        if sieve[divisor]:
            sieve[divisor * divisor :: divisor] = False
    return sieve
