"""The contract of every benchmark, and fair measuring on a noisy machine.

Interface: a benchmark is one file, `tools/bench/<name>.py`, whose docstring says what it shows and
whose `run(quick: bool = False)` returns figures; a dash in the name is an underscore in the file.
Where a tool it needs is missing, it raises `Absent`. `run_benchmarks` prints figure, goal, verdict
and raw values, and the machine; with `check` it returns 1 where a goal is missed or a tool absent.
Invariants: B1 a ratio is taken within one run, its two sides in turns (ABBA), and is the median of
the rounds' own ratios: what slows the machine for a while slows both. B2 a figure whose value is
not a number is missed.
"""

from __future__ import annotations

import ast
import gc
import importlib
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TextIO

import msgspec

from manifold.kernel.errors import ManifoldError, NotFound
from manifold.kernel.inventory import inventory

FOLDER = Path(__file__).parent
PACKAGE = "manifold.tools.bench"
RAW_IN_ONE_LINE = 6  # raw values; more stand on a line each


class Absent(ManifoldError):
    """A tool that the benchmark needs is not here; the message says which and how to get it."""

    code = "absent"


class Figure(msgspec.Struct, frozen=True):
    """One measured number and what it should be. `raw` holds what it was computed from."""

    name: str
    value: float
    goal: float | None
    better: Literal["lower", "higher"]
    unit: str
    raw: dict[str, float | str] = {}
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None where there is no goal."""
        if self.goal is None:
            return None
        return self.value <= self.goal if self.better == "lower" else self.value >= self.goal


class Outcome(msgspec.Struct, frozen=True):
    """What one benchmark came to: figures, or the reason why there are none."""

    benchmark: str
    figures: list[Figure]
    absent: str = ""
    seconds: float = 0.0

    @property
    def met(self) -> bool:
        return not self.absent and all(each.met is not False for each in self.figures)


class Machine(msgspec.Struct, frozen=True):
    """Where it was measured; a figure without it means nothing."""

    cpu_model: str
    cores: int
    python: str
    kernel: str
    load_average: float


class Interleaved(msgspec.Struct, frozen=True):
    """Seconds of two things measured in turns; `ratio` is a to b, the median over rounds."""

    a: float
    b: float
    ratio: float
    ratio_low: float
    ratio_high: float

    def raw(self, a: str, b: str) -> dict[str, float | str]:
        """For `Figure.raw`, under the names of the two."""
        return {
            f"{a} s": self.a,
            f"{b} s": self.b,
            "ratio lowest": self.ratio_low,
            "ratio highest": self.ratio_high,
        }


Run = Callable[[bool], list[Figure]]
Measured = Callable[[], float | None]


# --- measuring --------------------------------------------------------------------------------


def seconds_of(measured: Measured) -> float:
    """How long a call takes, or the seconds that it returns, where it times itself."""
    with no_garbage_collection():
        begin = time.perf_counter()
        told = measured()
        return time.perf_counter() - begin if told is None else told


def interleave(a: Measured, b: Measured, rounds: int) -> Interleaved:
    """Measure `a` and `b` in turns, once each beforehand to warm both."""
    assert rounds > 0
    a(), b()
    times: list[tuple[float, float]] = []
    for number in range(rounds):
        if number % 2:
            second = seconds_of(b)
            times.append((seconds_of(a), second))
        else:
            first = seconds_of(a)
            times.append((first, seconds_of(b)))
    ratios = [first / second if second else math.inf for first, second in times]
    return Interleaved(
        a=statistics.median(first for first, _ in times),
        b=statistics.median(second for _, second in times),
        ratio=statistics.median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
    )


def best_of(measured: Measured, rounds: int) -> float:
    """The least seconds of `rounds` calls: what the machine can do when it is left alone."""
    assert rounds > 0
    return min(seconds_of(measured) for _ in range(rounds))


def percentile(samples: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile: always one of the samples."""
    assert samples and 0 < percent <= 100
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keep the collector out of a measurement, as timeit does."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


# --- the registry -----------------------------------------------------------------------------


def names(folder: Path = FOLDER) -> list[str]:
    """The benchmarks there are: the files that define `run`."""
    return sorted(path.stem.replace("_", "-") for path in folder.glob("*.py") if _defines_run(path))


def summary(name: str, folder: Path = FOLDER) -> str:
    """The first line of a benchmark's docstring, read without importing it."""
    tree = ast.parse(_path(name, folder).read_text(encoding="utf-8"))
    return (ast.get_docstring(tree) or "").partition("\n")[0]


def load_run(name: str, folder: Path = FOLDER) -> Run:
    """The `run` of a benchmark; only now it and what it needs are imported."""
    _path(name, folder)
    run: Run = importlib.import_module(f"{PACKAGE}.{name.replace('-', '_')}").run
    return run


def _path(name: str, folder: Path) -> Path:
    known = names(folder)
    if name not in known:
        raise NotFound(f"There is no benchmark {name!r}.", f"There are: {', '.join(known)}.")
    return folder / f"{name.replace('-', '_')}.py"


def _defines_run(path: Path) -> bool:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in tree.body)


# --- running ----------------------------------------------------------------------------------


def run_benchmarks(
    wanted: Sequence[str],
    *,
    quick: bool = False,
    as_json: bool = False,
    check: bool = False,
    load: Callable[[str], Run] = load_run,
    out: TextIO | None = None,
) -> int:
    """Run the benchmarks in order and report each as it ends; the exit code of the verb."""
    out = out or sys.stdout
    runs = [(name, load(name)) for name in wanted]  # an unknown name is told before the long work
    here = machine()
    if not as_json:
        print(machine_line(here), file=out, flush=True)
    outcomes = []
    for name, run in runs:
        outcome = _outcome(name, run, quick)
        outcomes.append(outcome)
        if not as_json:
            print("\n".join(lines(outcome)), file=out, flush=True)
    if as_json:
        print(msgspec.json.encode(report(here, outcomes)).decode(), file=out)
    return 1 if check and not all(each.met for each in outcomes) else 0


def report(here: Machine, outcomes: Sequence[Outcome]) -> dict[str, object]:
    """What `--json` prints; `met` is null for a figure without a goal."""
    return {
        "machine": here,
        "met": all(each.met for each in outcomes),
        "benchmarks": [
            {
                "name": each.benchmark,
                "met": each.met,
                "absent": each.absent,
                "seconds": each.seconds,
                "figures": [msgspec.to_builtins(f) | {"met": f.met} for f in each.figures],
            }
            for each in outcomes
        ],
    }


def lines(outcome: Outcome) -> list[str]:
    """A benchmark's result for people."""
    found = [f"\n{outcome.benchmark}  ({outcome.seconds:.1f} s)"]
    if outcome.absent:
        found.append(f"  ABSENT  {outcome.absent}")
    for each in outcome.figures:
        verdict = {True: "met   ", False: "MISSED", None: "-     "}[each.met]
        sign = "<=" if each.better == "lower" else ">="
        goal = f"  (goal {sign} {_number(each.goal)})" if each.goal is not None else ""
        value = f"{_number(each.value)} {each.unit}".rstrip()
        found.append(f"  {verdict}  {each.name}: {value}{goal}")
        if each.raw:
            raw = [f"{key} {_number(value)}" for key, value in each.raw.items()]
            rows = raw if len(raw) > RAW_IN_ONE_LINE else [", ".join(raw)]
            found += [f"          {row}" for row in rows]
        if each.note:
            found.append(f"          {each.note}")
    return found


def machine() -> Machine:
    """This machine, and how busy it is as the benchmarks begin."""
    found = inventory()
    return Machine(
        cpu_model=found.cpu_model,
        cores=found.cores_usable,
        python=platform.python_version(),
        kernel=found.system,
        load_average=os.getloadavg()[0],
    )


def machine_line(here: Machine) -> str:
    return (
        f"{here.cpu_model}, {here.cores} cores, Python {here.python}, {here.kernel}, "
        f"load {here.load_average:.2f}"
    )


def _outcome(name: str, run: Run, quick: bool) -> Outcome:
    begin = time.perf_counter()
    try:
        figures, absent = run(quick), ""
    except Absent as reason:
        figures, absent = [], str(reason)
    return Outcome(name, figures, absent, time.perf_counter() - begin)


def _number(value: float | str | None) -> str:
    if isinstance(value, str) or value is None:
        return str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.4g}"
