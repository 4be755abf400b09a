"""The C programs of examples/wasm, compiled by Debian's clang, run as docs/wasm.md says."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from manifold.vm.foreign import CommandTrap, Foreign, ForeignMachine, load
from manifold.vm.runtime import Stopped, finish, merge

EXAMPLES = Path(__file__).parents[2] / "examples" / "wasm"
PACKAGES = "apt-get install clang lld wasi-libc libclang-rt-dev-wasm32"
COMPILE_S = 60
PLENTY = 1 << 40
COMMAND_OPTIONS = ("--target=wasm32-wasi", "-O2", "-g")
MODULE_OPTIONS = (
    "--target=wasm32",
    "-O2",
    "-nostdlib",
    "-Wl,--no-entry",
    "-Wl,--export=run",
)


@functools.cache
def missing(options: tuple[str, ...], folder: Path) -> str:
    """Why clang cannot compile the least program with these options; "" if it can."""
    if shutil.which("clang") is None:
        return "there is no clang"
    text = "int main(void) { return 0; } long long run(long long i) { return i; }"
    done = subprocess.run(
        ["clang", *options, "-x", "c", "-o", str(folder / "least.wasm"), "-"],
        input=text.encode(),
        capture_output=True,
        timeout=COMPILE_S,
    )
    return done.stderr.decode(errors="replace").strip() if done.returncode else ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wasm")


def compiled(source: Path, options: tuple[str, ...], folder: Path) -> Foreign:
    """The program; skips where clang, lld or wasi-libc is missing, fails if it does not compile."""
    if why := missing(options, folder):
        pytest.skip(f"clang cannot compile for wasm32 here; {PACKAGES} ({why})")
    target = folder / f"{source.stem}.wasm"
    command = ["clang", *options, "-o", str(target), str(source)]
    subprocess.run(command, check=True, timeout=COMPILE_S)
    return load(target.read_bytes(), target.name)


@pytest.fixture
def machine() -> Iterator[ForeignMachine]:
    machine = ForeignMachine(64 << 20)
    yield machine
    machine.close()


def none_left(_: int) -> int:
    return 0


def no_sleep(seconds: float) -> None:
    raise AssertionError("nothing here sleeps")


def steps(index: int) -> int:
    count = 0
    while index > 1:
        index = 3 * index + 1 if index & 1 else index // 2
        count += 1
    return count


def test_a_core_module_computes_what_cpython_computes(
    machine: ForeignMachine, folder: Path
) -> None:
    collatz = compiled(EXAMPLES / "collatz.c", MODULE_OPTIONS, folder)
    assert collatz.kind == "module" and not collatz.imports
    unit = machine.load(collatz, "sum")
    parts = [
        unit.run(lo, hi, gas=PLENTY, on_yield=none_left, on_sleep=no_sleep).partial
        for lo, hi in ((1, 4_000), (4_000, 10_000))
    ]
    expected = sum(map(steps, range(1, 10_000)))
    assert finish("sum", merge("sum", parts), 1, 10_000) == expected == 849_637


def words(
    machine: ForeignMachine, folder: Path, *arguments: str, stdin: bytes = b""
) -> tuple[int, str, str]:
    program = compiled(EXAMPLES / "words.c", COMMAND_OPTIONS, folder)
    assert program.kind == "command"
    outcome = machine.command(program).run(
        ["words", *arguments],
        environ={},
        stdin=stdin,
        gas=PLENTY,
        on_yield=none_left,
        on_sleep=no_sleep,
    )
    return outcome.status, outcome.stdout.decode(), outcome.stderr.decode()


def test_a_command_reads_its_standard_input(machine: ForeignMachine, folder: Path) -> None:
    text = b"three words here\nand two\n" * 1000
    assert words(machine, folder, stdin=text) == (0, "2000 lines, 5000 words, 25000 bytes\n", "")
    assert words(machine, folder) == (1, "0 lines, 0 words, 0 bytes\n", "")


def test_a_command_takes_arguments_and_returns_a_status(
    machine: ForeignMachine, folder: Path
) -> None:
    assert words(machine, folder, "1", "2", "3.5") == (0, "6.5\n", "")
    assert words(machine, folder, "1", "x") == (2, "", "words: x is no number\n")


PROBE = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static int depth(int *at) { return *at; }

int main(int argc, char **argv) {
    if (argc < 2) return 9;
    if (!strcmp(argv[1], "file")) return fopen("/etc/passwd", "r") ? 1 : 0;
    if (!strcmp(argv[1], "home")) { puts(getenv("HOME")); return 0; }
    if (!strcmp(argv[1], "sleep")) { usleep(250000); return sleep(2) ? 1 : 0; }
    if (!strcmp(argv[1], "clock")) return time(NULL) > 1700000000 ? 0 : 1;
    if (!strcmp(argv[1], "memory")) {
        long mebibytes = 0;
        while (malloc(1 << 20)) mebibytes++;
        printf("%ld\n", mebibytes);
        return 0;
    }
    if (!strcmp(argv[1], "trap")) { fputs("about to\n", stderr); return depth((int *)-8); }
    if (!strcmp(argv[1], "abort")) abort();
    if (!strcmp(argv[1], "loop")) for (volatile int i = 0;; i++) ;
    return 8;
}
"""


def probe(machine: ForeignMachine, folder: Path, what: str, slept: list[float]) -> tuple[int, str]:
    source = folder / "probe.c"
    source.write_text(PROBE)
    program = compiled(source, ("--target=wasm32-wasi", "-O0", "-g"), folder)
    outcome = machine.command(program).run(
        ["probe", what],
        environ={"HOME": "/nowhere"},
        stdin=b"",
        gas=1 << 29,
        on_yield=none_left,
        on_sleep=slept.append,
    )
    return outcome.status, outcome.stdout.decode()


def test_wasi_libc_finds_an_environment_a_clock_and_no_files(
    machine: ForeignMachine, folder: Path
) -> None:
    slept: list[float] = []
    assert probe(machine, folder, "file", slept) == (0, "")
    assert probe(machine, folder, "home", slept) == (0, "/nowhere\n")
    assert probe(machine, folder, "clock", slept) == (0, "")
    assert not slept
    assert probe(machine, folder, "sleep", slept) == (0, "")
    assert slept == [0.25, 2.0]


def test_malloc_fails_at_the_machines_limit(machine: ForeignMachine, folder: Path) -> None:
    status, text = probe(machine, folder, "memory", [])
    assert status == 0 and 58 <= int(text) <= 63


def test_a_trap_names_the_functions_of_the_source(machine: ForeignMachine, folder: Path) -> None:
    with pytest.raises(CommandTrap) as trapped:
        probe(machine, folder, "trap", [])
    assert "out of bounds memory access" in trapped.value.message
    assert "in depth < " in trapped.value.message
    assert trapped.value.next_step == "Its last words: about to"
    with pytest.raises(CommandTrap, match=r"`unreachable` instruction executed in abort < "):
        probe(machine, folder, "abort", [])


def test_an_endless_loop_in_c_is_stopped(machine: ForeignMachine, folder: Path) -> None:
    with pytest.raises(Stopped):
        probe(machine, folder, "loop", [])
