"""Collatz, Mandelbrot, n-body and Monte Carlo pi as @kernel, numba, gcc -O2 and CPython in one run.

Warm is the run alone, in slices of gas of 5 ms, as a worker runs it; cold is from the Python
function to its first result, everything imported before. All four compute the same values, which is
checked bit by bit. numba gets numpy arrays where the kernels have lists, and ints that wrap.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import shutil
import subprocess
import tempfile
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manifold.tools.bench import peers
from manifold.tools.bench.harness import Absent, Figure, best_of, interleave
from manifold.vm.python import Kernel, kernel
from manifold.vm.python.slices import Slices
from manifold.vm.runtime import Machine, finish
from manifold.vm.syntax import Program

EXAMPLES = Path(__file__).parents[2] / "examples"
NUMBA = peers.Peer("numba", "", "numba", "0.68.1")
MEMORY_BYTES = 1 << 26
RUN_TIMEOUT_S = 180.0

_C = """\
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#define MASK 0x7fffffffffffffffull

static double collatz(int64_t lo, int64_t hi, int64_t unused) {
    uint64_t total = 0;
    for (uint64_t index = lo; index < (uint64_t)hi; index++)
        for (uint64_t n = index; n != 1; total++) n = n % 2 == 0 ? n / 2 : 3 * n + 1;
    return (double)total;
}
static int64_t scramble(int64_t state) {
    state = ((uint64_t)state * 6364136223846793005ull + 1442695040888963407ull) & MASK;
    return state ^ (state >> 29);
}
static double pi(int64_t lo, int64_t hi, int64_t unused) {
    int64_t found = 0;
    for (int64_t index = lo; index < hi; index++) {
        int64_t state = scramble(scramble(index));
        for (int i = 0; i < 1000; i++) {
            state = scramble(state);
            double x = (state >> 10) / 9007199254740992.0;
            state = scramble(state);
            double y = (state >> 10) / 9007199254740992.0;
            if (x * x + y * y < 1.0) found++;
        }
    }
    return (double)found;
}
static double mandelbrot(int64_t lo, int64_t hi, int64_t width) {
    int64_t total = 0;
    for (int64_t pixel = lo; pixel < hi; pixel++) {
        double step = 3.0 / width, cx = -2.2 + pixel % width * step;
        double cy = 1.0 - pixel / width * step, zx = 0.0, zy = 0.0;
        int64_t steps = 0;
        for (; steps < 255; steps++) {
            double xx = zx * zx, yy = zy * zy;
            if (xx + yy > 4.0) break;
            zy = 2.0 * zx * zy + cy;
            zx = xx - yy + cx;
        }
        total += steps;
    }
    return (double)total;
}
#define N 5
#define YEAR 365.24
static const double SUN = 4 * 3.141592653589793 * 3.141592653589793;
static double energy(double *x, double *y, double *z, double *u, double *v, double *w, double *m) {
    double e = 0.0;
    for (int i = 0; i < N; i++) {
        e += 0.5 * m[i] * (u[i] * u[i] + v[i] * v[i] + w[i] * w[i]);
        for (int j = i + 1; j < N; j++) {
            double dx = x[i] - x[j], dy = y[i] - y[j], dz = z[i] - z[j];
            e -= m[i] * m[j] / sqrt(dx * dx + dy * dy + dz * dz);
        }
    }
    return e;
}
static double nbody(int64_t lo, int64_t hi, int64_t steps) {
    double total = 0.0;
    for (int64_t index = lo; index < hi; index++) {
        double x[N] = {@x@}, y[N] = {@y@}, z[N] = {@z@};
        double u[N] = {@vx@}, v[N] = {@vy@}, w[N] = {@vz@}, m[N] = {@mass@};
        u[1] += index * 1e-6;
        for (int i = 1; i < N; i++) {
            u[0] -= u[i] * m[i] / SUN; v[0] -= v[i] * m[i] / SUN; w[0] -= w[i] * m[i] / SUN;
        }
        double before = energy(x, y, z, u, v, w, m);
        for (int64_t step = 0; step < steps; step++) {
            for (int i = 0; i < N; i++)
                for (int j = i + 1; j < N; j++) {
                    double dx = x[i] - x[j], dy = y[i] - y[j], dz = z[i] - z[j];
                    double square = dx * dx + dy * dy + dz * dz;
                    double pull = 0.01 / (square * sqrt(square));
                    u[i] -= dx * m[j] * pull; v[i] -= dy * m[j] * pull; w[i] -= dz * m[j] * pull;
                    u[j] += dx * m[i] * pull; v[j] += dy * m[i] * pull; w[j] += dz * m[i] * pull;
                }
            for (int i = 0; i < N; i++) {
                x[i] += 0.01 * u[i]; y[i] += 0.01 * v[i]; z[i] += 0.01 * w[i];
            }
        }
        double dx = x[1] - x[0], dy = y[1] - y[0], dz = z[1] - z[0];
        total += (energy(x, y, z, u, v, w, m) - before) / before;
        total += sqrt(dx * dx + dy * dy + dz * dz);
    }
    return total;
}
int main(int argc, char **argv) {
    int64_t lo = atoll(argv[2]), hi = atoll(argv[3]), more = atoll(argv[4]);
    double (*run)(int64_t, int64_t, int64_t) = !strcmp(argv[1], "collatz") ? collatz
        : !strcmp(argv[1], "pi") ? pi : !strcmp(argv[1], "mandelbrot") ? mandelbrot : nbody;
    struct timespec begin, end;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    double found = run(lo, hi, more);
    clock_gettime(CLOCK_MONOTONIC, &end);
    printf("%.9f %a\\n", (end.tv_sec - begin.tv_sec) + (end.tv_nsec - begin.tv_nsec) * 1e-9, found);
    return 0;
}
"""


STEPS_MAX = 255
LEFT, TOP, ACROSS = -2.2, 1.0, 3.0  # of the plane, in the width of the picture


@kernel
def escape_steps(pixel: int, width: int) -> int:
    """After how many steps z*z + c leaves the circle of radius 2; STEPS_MAX if it does not."""
    y, x = divmod(pixel, width)
    step = ACROSS / width
    cx, cy = LEFT + x * step, TOP - y * step
    zx, zy = 0.0, 0.0
    for steps in range(STEPS_MAX):
        xx, yy = zx * zx, zy * zy
        if xx + yy > 4.0:
            return steps
        zx, zy = xx - yy + cx, 2.0 * zx * zy + cy
    return STEPS_MAX


@dataclass(frozen=True)
class Case:
    """A program over `[0, hi)` (Collatz: from 1); CPython runs `sample` indices of it."""

    name: str
    function: str  # in examples/<name>.py, or above
    hi: int
    sample: int
    arguments: tuple[int, ...] = ()
    goal: float = 2.0
    lo: int = 0

    def kernel(self, wrap: bool = False) -> Kernel[..., Any]:
        found: Kernel[..., Any]
        if self.function in globals():
            found = globals()[self.function]
        else:
            module = importlib.import_module(f"manifold.examples.{self.name}")
            found = getattr(module, self.function)
        return kernel(wrap=True)(found.__wrapped__) if wrap else found


CASES = (
    Case("collatz", "collatz_steps", 1_000_000, 3000, goal=1.9, lo=1),
    Case("pi", "hits", 20_000, 10, goal=1.9),
    Case("mandelbrot", "escape_steps", 720 * 480, 3000, (720,)),
    Case("nbody", "nbody", 150, 1, (5000,)),
)


class Compiled:
    """A kernel on one worker's machine."""

    def __init__(self, case: Case, program: Program) -> None:
        self.case = case
        self._machine = Machine(MEMORY_BYTES)
        self._unit = self._machine.load(program, "sum")
        self._slices = Slices(time.perf_counter)  # of 5 ms, measured as a worker measures them

    def run(self, hi: int) -> float:
        case = self.case
        partial = self._unit.run(
            case.lo, hi, gas=self._slices.start(), on_yield=self._slices.more, on_sleep=time.sleep,
            arguments=case.arguments,
        ).partial  # fmt: skip
        return float(finish("sum", partial, case.lo, hi))  # type: ignore[arg-type]

    def close(self) -> None:
        self._machine.close()


class Gcc:
    """The C program; it times itself."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("gcc")
        if program is None:
            raise Absent("gcc is not here.", "Install it: apt install gcc libc6-dev.")
        tree = ast.parse((EXAMPLES / "nbody.py").read_text())
        text = _C
        for node in ast.walk(tree):  # the numbers of the example, so that both have the same bits
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.List):
                elements = ", ".join(ast.unparse(each) for each in node.value.elts)
                name = ast.unparse(node.targets[0])
                text = text.replace(f"@{name}@", elements.replace("SOLAR_MASS", "SUN"))
        source, self._binary = folder / "peer.c", folder / "peer"
        source.write_text(text)
        command = [program, "-O2", "-o", str(self._binary), str(source), "-lm"]
        subprocess.run(command, check=True, timeout=RUN_TIMEOUT_S)

    def run(self, case: Case, hi: int) -> tuple[float, float]:
        """Seconds and the sum."""
        more = case.arguments[0] if case.arguments else 0
        command = [str(self._binary), case.name, str(case.lo), str(hi), str(more)]
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=RUN_TIMEOUT_S
        )
        seconds, total = done.stdout.split()
        return float(seconds), float.fromhex(total)


def cold_s(case: Case) -> float:
    """From the function to the first result, with a machine of its own."""
    function = case.kernel().__wrapped__
    began = time.perf_counter()
    compiled = Compiled(case, kernel(function).program)
    compiled.run(case.lo + 1)
    seconds = time.perf_counter() - began
    compiled.close()
    return seconds


def cpython_s(case: Case) -> float:
    """Seconds of the whole range, from a sample spread over it."""
    function = case.kernel().__wrapped__
    stride = max(1, (case.hi - case.lo) // case.sample)
    indices = range(case.lo, case.hi, stride)
    began = time.perf_counter()
    for index in indices:
        function(index, *case.arguments)
    return (time.perf_counter() - began) / len(indices) * (case.hi - case.lo)


# --- numba ------------------------------------------------------------------------------------

_NUMBA_MAIN = """
import json, sys, time
def main(lo, hi, arguments, rounds):
    began = time.perf_counter()
    total(lo, lo + 1, *arguments)
    cold, warm = time.perf_counter() - began, []
    for _ in range(rounds):
        began = time.perf_counter()
        found = total(lo, hi, *arguments)
        warm.append(time.perf_counter() - began)
    print(json.dumps([cold, min(warm), float(found)]))
main(*json.loads(sys.argv[1]))
"""


class _ForNumba(ast.NodeTransformer):
    """@kernel becomes @numba.njit, and a list a numpy array."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        node.decorator_list = [ast.parse("numba.njit", mode="eval").body]
        return node

    def visit_List(self, node: ast.List) -> ast.AST:
        return ast.Call(ast.parse("np.array", mode="eval").body, [node], [])


def needed(tree: ast.Module, function: str) -> list[ast.stmt]:
    """The statements of a module that a kernel needs: constants, kernels it calls, itself."""
    wanted, kept = {function}, []
    for each in reversed(tree.body):
        if isinstance(each, ast.FunctionDef):
            made = {each.name}
        else:
            targets = each.targets if isinstance(each, ast.Assign) else []
            made = {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
        if made & wanted:
            wanted |= {node.id for node in ast.walk(each) if isinstance(node, ast.Name)}
            kept.append(each)
    return kept[::-1]


def numba_source(case: Case) -> str:
    """The example's constants and functions for numba, and the sum over a range."""
    here = case.function in globals()
    path = Path(__file__) if here else EXAMPLES / f"{case.name}.py"
    kept = needed(ast.parse(path.read_text()), case.function)
    body = ast.unparse(
        ast.fix_missing_locations(_ForNumba().visit(ast.Module(body=kept, type_ignores=[])))
    )
    parameters = "".join(f", a{at}" for at in range(len(case.arguments)))
    adding = "for each in found: total += each" if case.name == "nbody" else "total += found"
    start = "0.0" if case.name == "nbody" else "0"
    loop = f"""
    @numba.njit
    def total(lo, hi{parameters}):
        total = {start}
        for index in range(lo, hi):
            found = {case.function}(index{parameters})
            {adding}
        return total
    """
    head = "import math\nimport numba\nimport numpy as np\n"
    return head + body + textwrap.dedent(loop) + _NUMBA_MAIN


def numba_run(case: Case, python: Path, folder: Path, rounds: int) -> tuple[float, float, float]:
    """Cold and warm seconds, and the sum."""
    script = folder / f"numba_{case.name}.py"
    script.write_text(numba_source(case))
    wanted = json.dumps([case.lo, case.hi, case.arguments, rounds])
    done = subprocess.run(
        [str(python), str(script), wanted],
        capture_output=True, text=True, timeout=RUN_TIMEOUT_S, cwd=folder,
    )  # fmt: skip
    if done.returncode:
        raise Absent(f"numba cannot run {case.name}: {done.stderr.strip()[-300:]}.")
    cold, warm, total = json.loads(done.stdout)
    return cold, warm, total


# --- the figures ------------------------------------------------------------------------------


def against_gcc(case: Case, gcc: Gcc, wrap: bool, rounds: int) -> Figure:
    """Warm, in turns."""
    compiled = Compiled(case, case.kernel(wrap).program)

    def ours() -> float:
        began = time.perf_counter()
        total = compiled.run(case.hi)
        seconds = time.perf_counter() - began
        assert total == expected, (case.name, total, expected)
        return seconds

    expected = gcc.run(case, case.hi)[1]
    pair = interleave(ours, lambda: gcc.run(case, case.hi)[0], rounds)
    compiled.close()
    name = f"{case.name}{', wrap=True' if wrap else ''} / gcc -O2"
    goal = 1.5 if wrap else case.goal
    return Figure(name, pair.ratio, goal, "lower", "x", pair.raw("kernel", "gcc"))


def against_others(case: Case, kernel_s: float, numba: Callable[[Case], Any]) -> list[Figure]:
    """Cold, numba and CPython."""
    cold, plain = best_of(lambda: cold_s(case), 5), cpython_s(case)
    found = [
        Figure(f"{case.name}: CPython / kernel", plain / kernel_s, None, "higher", "x",
               {"CPython s": plain}, f"from {case.sample} indices")
    ]  # fmt: skip
    try:
        numba_cold, numba_warm, _ = numba(case)
    except Absent as reason:
        return [
            *found,
            Figure(f"{case.name}: cold kernel", cold, None, "lower", "s", {}, str(reason)),
        ]
    return [
        *found,
        Figure(f"{case.name}: numba / kernel", numba_warm / kernel_s, None, "higher", "x",
               {"numba s": numba_warm}),
        Figure(f"{case.name}: cold numba / cold kernel", numba_cold / cold, 20.0, "higher", "x",
               {"numba s": numba_cold, "kernel s": cold}),
    ]  # fmt: skip


def run(quick: bool = False) -> list[Figure]:
    """Ratios of seconds."""
    rounds = 2 if quick else 5
    found: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="mfb-") as name:
        folder = Path(name)
        gcc = Gcc(folder)

        def numba(case: Case) -> tuple[float, float, float]:
            python = peers.environment(NUMBA, os.environ, peers.tell)
            return numba_run(case, python, folder, rounds)

        for case in CASES:
            default = against_gcc(case, gcc, False, rounds)
            found.append(default)
            if case.goal < 2.0:
                found.append(against_gcc(case, gcc, True, rounds))
            found += against_others(case, float(default.raw["kernel s"]), numba)
    return found
