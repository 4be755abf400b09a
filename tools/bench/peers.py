"""What Manifold is measured against: other frameworks, the C compiler, plain interpreters.

Interface: `noop(name)` runs no-op tasks on `pool` (multiprocessing.Pool), `joblib` (its loky),
`dask` or `ray`. The last three are installed, once, into virtual environments of their own under
`$XDG_CACHE_HOME/manifold/bench-<name>-<version>`; `say` is told what is installed, how it goes and
how large it became. `gcc_collatz`, `cpython_collatz` and `seed_interpreter` are callables that
time the same sum: the Collatz steps of 1 … n. What is missing raises `Absent` with the reason.
Invariants: R1 an environment without its `ready` mark is never used (an install that was cut off
is begun anew). R2 everything that is started has a time limit, and its process group is ended.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from manifold.tools.bench.harness import Absent

SCRIPTS = Path(__file__).parent / "noop_peers"
INSTALL_TIMEOUT_S = 900.0  # Ray is about 75 MB to fetch: 1 Mbit/s does it in 600 s
RUN_TIMEOUT_S = 180.0  # 5 000 tasks at 100 a second are 50 s; three times that, and the boot
GCC_TIMEOUT_S = 60.0
OUTPUT_BYTES_MAX = 1 << 20  # what a peer may print

Say = Callable[[str], None]


class Peer(msgspec.Struct, frozen=True):
    """A framework; `requirement` is empty for what Python brings itself."""

    name: str
    script: str
    package: str = ""
    version: str = ""


PEERS = {
    each.name: each
    for each in (
        Peer("pool", "peer_pool.py"),
        Peer("dask", "peer_dask.py", "distributed", "2026.8.0"),
        Peer("ray", "peer_ray.py", "ray", "2.60.0"),
        Peer("joblib", "peer_joblib.py", "joblib", "1.6.0"),
    )
}


class Noop(msgspec.Struct, frozen=True):
    """What a peer's script printed."""

    boot_s: float
    tasks_per_s: float
    round_trip_p50_ms: float
    version: str
    batched_per_s: float = 0.0  # 0: it was not asked to


class Timing(NamedTuple):
    seconds: float
    total: int


# --- other frameworks -------------------------------------------------------------------------


def tell(line: str) -> None:
    """The usual `say`: to standard error, so that `--json` stays clean."""
    print(line, file=sys.stderr, flush=True)


def noop(
    name: str,
    *,
    tasks: int = 5_000,
    trips: int = 300,
    workers: int = 2,
    batched: int = 0,
    chunk: int = 1,
    environ: Mapping[str, str] = os.environ,
    say: Say = tell,
) -> Noop:
    """Boot a cluster of the peer, run `tasks` at once, then `trips` one by one, then `batched`
    in batches of `chunk`."""
    peer = PEERS[name]
    python = Path(sys.executable) if not peer.package else environment(peer, environ, say)
    figures = map(str, (tasks, trips, workers, batched, chunk))
    command = [str(python), str(SCRIPTS / peer.script), *figures]
    say(f"{name}: {tasks} no-op tasks, then {trips} round trips")
    with tempfile.TemporaryDirectory(prefix="mfb-") as folder:  # short: Ray's sockets live in it
        code, output = _run(command, RUN_TIMEOUT_S, _clean(environ, folder), Path(folder))
    lines = output.strip().splitlines() or [""]
    if code != 0:
        raise Absent(f"{name} did not finish: {_why(code, lines)}.")
    try:
        return msgspec.json.decode(lines[-1], type=Noop)
    except msgspec.MsgspecError:
        raise Absent(f"{name} printed no figures but {lines[-1][:200]!r}.") from None


def environment(peer: Peer, environ: Mapping[str, str], say: Say) -> Path:
    """The Python of the peer's virtual environment, made at the first call."""
    folder = cache_folder(environ) / f"bench-{peer.name}-{peer.version}"
    python, mark = folder / "bin" / "python", folder / "ready"
    if mark.exists():
        return python
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _only_one(folder.with_suffix(folder.suffix + ".lock")):
        if mark.exists():  # another benchmark installed it while we waited
            return python
        shutil.rmtree(folder, ignore_errors=True)
        say(f"{peer.name}: installing {peer.package} {peer.version} into {folder}, once")
        try:
            _install(peer, folder, environ, say)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        mark.write_text(f"{peer.package}=={peer.version}\n")
        say(f"{peer.name}: installed, {_size_bytes(folder) / 1e6:.0f} MB in {folder}")
    return python


def cache_folder(environ: Mapping[str, str]) -> Path:
    """Where installed peers are kept; it may be removed at any time."""
    xdg = environ.get("XDG_CACHE_HOME", "")
    home = Path(xdg) if os.path.isabs(xdg) else Path(environ.get("HOME", "/tmp")) / ".cache"
    return home / "manifold"


def _install(peer: Peer, folder: Path, environ: Mapping[str, str], say: Say) -> None:
    clean = _clean(environ, tempfile.gettempdir())
    begin = time.monotonic()
    steps = [
        [sys.executable, "-m", "venv", str(folder)],
        [
            str(folder / "bin" / "python"),
            *("-m", "pip", "install", "--disable-pip-version-check", "--no-input"),
            *("--progress-bar", "off", "--retries", "1", "--timeout", "15"),
            f"{peer.package}=={peer.version}",
        ],
    ]

    def progress(line: str) -> None:
        word = line.strip().partition(" ")[0]
        if word in ("Downloading", "Installing"):
            say(f"{peer.name}: {time.monotonic() - begin:4.0f} s  {line.strip()[:150]}")

    for step in steps:
        code, output = _run(step, INSTALL_TIMEOUT_S, clean, folder.parent, progress)
        if code != 0:
            errors = [each for each in output.splitlines() if "ERROR" in each] or [output[-200:]]
            raise Absent(
                f"{peer.package} {peer.version} cannot be installed: {_why(code, errors)}.",
                "It needs the network once; the other benchmarks do not.",
            )


@contextmanager
def _only_one(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _clean(environ: Mapping[str, str], folder: str) -> dict[str, str]:
    """The environment for a peer: nothing of ours on its path, no calls home."""
    kept = {
        name: value
        for name, value in environ.items()
        if not name.startswith(("PYTHON", "MANIFOLD_", "RAY_", "DASK_", "VIRTUAL_ENV"))
    }
    own = {"TMPDIR": folder, "RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0"}
    return kept | own | {"PYTHONNOUSERSITE": "1", "PYTHONUNBUFFERED": "1"}


def _run(
    command: Sequence[str],
    timeout_s: float,
    environ: Mapping[str, str],
    folder: Path,
    line_seen: Say | None = None,
) -> tuple[int, str]:
    """Exit code and output of a program that is ended, with its group, when its time is over."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=dict(environ),
        cwd=folder,
        start_new_session=True,
    ) as process:
        watch = threading.Timer(timeout_s, _end_group, [process.pid])
        watch.daemon = True
        watch.start()
        try:
            assert process.stdout is not None
            kept: list[str] = []
            size = 0
            for line in process.stdout:
                size += len(line)
                if size <= OUTPUT_BYTES_MAX:
                    kept.append(line)
                if line_seen is not None:
                    line_seen(line)
            code = process.wait()
        finally:
            watch.cancel()
            _end_group(process.pid)
    return code, "".join(kept)


def _end_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return  # it has ended already


def _why(code: int, lines: Sequence[str]) -> str:
    if code == -signal.SIGKILL:
        return "its time was over"
    return f"exit code {code}, {lines[-1].strip()[:200]!r}"


def _size_bytes(folder: Path) -> int:
    return sum(each.lstat().st_size for each in folder.rglob("*") if not each.is_dir())


# --- the same sum, three ways -----------------------------------------------------------------

_C = """\
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static uint64_t steps(uint64_t n) {
    uint64_t count = 0;
    while (n != 1) {
        n = n % 2 == 0 ? n / 2 : 3 * n + 1;
        count++;
    }
    return count;
}

int main(int argc, char **argv) {
    uint64_t last = argc > 1 ? strtoull(argv[1], 0, 10) : 1, total = 0;
    struct timespec begin, end;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    for (uint64_t n = 1; n <= last; n++) total += steps(n);
    clock_gettime(CLOCK_MONOTONIC, &end);
    double seconds = (end.tv_sec - begin.tv_sec) + (end.tv_nsec - begin.tv_nsec) * 1e-9;
    printf("%.9f %llu\\n", seconds, (unsigned long long)total);
    return 0;
}
"""


class GccCollatz:
    """The sum compiled by `gcc -O2`; the program times itself, so that its start does not count.

    Unsigned numbers: gcc's fastest form of the loop, hence the strictest peer.
    """

    def __init__(self, compiler: str = "gcc") -> None:
        program = shutil.which(compiler)
        if program is None:
            raise Absent(f"{compiler} is not here.", "Install it: apt install gcc libc6-dev.")
        folder = tempfile.mkdtemp(prefix="manifold-bench-")
        self._end = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        source, self._binary = Path(folder, "collatz.c"), Path(folder, "collatz")
        source.write_text(_C)
        command = [program, "-O2", "-o", str(self._binary), str(source)]
        code, output = _run(command, GCC_TIMEOUT_S, os.environ, Path(folder))
        if code != 0:
            raise Absent(f"{compiler} cannot compile: {output.strip()[-200:]}.")

    def __call__(self, n: int) -> Timing:
        command = [str(self._binary), str(n)]
        code, output = _run(command, RUN_TIMEOUT_S, os.environ, self._binary.parent)
        if code != 0:
            raise Absent(f"The compiled program did not finish: {_why(code, [output])}.")
        seconds, total = output.split()
        return Timing(float(seconds), int(total))


def gcc_collatz() -> GccCollatz:
    """Compile the C program; `Absent` where there is no gcc."""
    return GccCollatz()


def cpython_collatz(n: int) -> Timing:
    """The sum in plain Python, written as one would for speed."""
    begin = time.perf_counter()
    total = 0
    for number in range(1, n + 1):
        while number != 1:
            number = 3 * number + 1 if number % 2 else number // 2
            total += 1
    return Timing(time.perf_counter() - begin, total)


Program = list[list[str | int]]

# One index: its number is in cell 0, the steps are counted in cell 1 and printed.
SEED_COLLATZ: Program = [
    ["PUSH", 0], ["STORE", 1],
    ["LOAD", 0], ["PUSH", 1], ["SUB"], ["JZ", 26],
    ["LOAD", 0], ["PUSH", 2], ["MOD"], ["JNZ", 15],
    ["LOAD", 0], ["PUSH", 2], ["DIV"], ["STORE", 0], ["JMP", 21],
    ["LOAD", 0], ["PUSH", 3], ["MUL"], ["PUSH", 1], ["ADD"], ["STORE", 0],
    ["LOAD", 1], ["PUSH", 1], ["ADD"], ["STORE", 1], ["JMP", 2],
    ["LOAD", 1], ["PRINT"], ["HALT"],
]  # fmt: skip


def seed_interpreter(n: int) -> Timing:
    """The sum by interpreting `SEED_COLLATZ`, as the seed's virtual machine works."""
    begin = time.perf_counter()
    total = 0
    for index in range(1, n + 1):
        total += int(interpret(SEED_COLLATZ, index)[0])
    return Timing(time.perf_counter() - begin, total)


def interpret(program: Program, index: int) -> list[float]:
    """Run a list of instructions: look at the name of each, one after the other, as the seed did.

    Kept as plain as a first version is: the ratio to it says what compiling is worth.
    """
    stack: list[float] = []
    cells: dict[int, float] = {0: float(index)}
    printed: list[float] = []
    at = 0
    while at < len(program):
        name, *operands = program[at]
        operand = int(operands[0]) if operands else 0
        at += 1
        if name == "PUSH":
            stack.append(float(operand))
        elif name in ("ADD", "SUB", "MUL", "DIV", "MOD"):
            right, left = stack.pop(), stack.pop()
            stack.append(_arithmetic(str(name), left, right))
        elif name == "STORE":
            cells[operand] = stack.pop()
        elif name == "LOAD":
            stack.append(cells.get(operand, 0.0))
        elif name == "JMP":
            at = operand
        elif name == "JZ":
            at = operand if stack.pop() == 0 else at
        elif name == "JNZ":
            at = operand if stack.pop() != 0 else at
        elif name == "PRINT":
            printed.append(stack.pop())
        elif name == "HALT":
            break
        else:
            raise AssertionError(f"SEED_COLLATZ has no instruction {name}")
    return printed


def _arithmetic(name: str, left: float, right: float) -> float:
    if name == "ADD":
        return left + right
    if name == "SUB":
        return left - right
    if name == "MUL":
        return left * right
    return left / right if name == "DIV" else left % right
