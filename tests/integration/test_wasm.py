"""WebAssembly of other compilers on a cluster: C compiled by Debian's clang, run by every face."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import manifold
from manifold.tools.emulator.testing import TestCluster

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60
LONGEST = "int main(void) { for (;;) ; }"
PACKAGES = "clang lld wasi-libc libclang-rt-dev-wasm32"

Shell = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def cluster(manifold_clusters: Callable[..., TestCluster]) -> TestCluster:
    return manifold_clusters(2)


@pytest.fixture
def shell(cluster: TestCluster) -> Shell:
    def run(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        given = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
        return subprocess.run(
            [sys.executable, "-m", "manifold", *arguments],
            env=dict(cluster.environ), capture_output=True, text=True, timeout=PATIENCE_S,
            **given,
        )  # type: ignore[call-overload]  # fmt: skip

    return run


def compiled(folder: Path, name: str, *flags: str, source: str = "") -> str:
    """A C program as WebAssembly; skips where this machine has no compiler for it."""
    if shutil.which("clang") is None or shutil.which("wasm-ld") is None:
        pytest.skip(f"no clang for wasm32: apt-get install {PACKAGES}")
    path = ROOT / "examples" / "wasm" / f"{name}.c"
    if source:
        path = folder / f"{name}.c"
        path.write_text(source)
    out = folder / f"{name}.wasm"
    subprocess.run(["clang", *flags, "-O2", "-o", str(out), str(path)], check=True)
    return str(out)


WASI = ("--target=wasm32-wasi",)
MODULE = ("--target=wasm32", "-nostdlib", "-Wl,--no-entry", "-Wl,--export=run")


def test_a_wasi_program_gets_its_arguments_and_its_output_and_status_are_ours(
    shell: Shell, tmp_path: Path
) -> None:
    words = compiled(tmp_path, "words", *WASI)
    done = shell("run", words, "--", "1", "2", "3.5")
    assert (done.stdout, done.returncode) == ("6.5\n", 0), done.stderr
    bad = shell("run", words, "--", "1", "two")
    assert bad.returncode == 2 and "two" in bad.stderr
    read = shell("run", words, stdin="to be or\nnot to be\n")
    assert read.stdout == "2 lines, 6 words, 19 bytes\n"
    told = json.loads(shell("run", "--json", words, "--", "1", "2").stdout)
    assert (told["status"], told["stdout"]) == (0, "3\n")


def test_a_module_runs_over_a_range_and_gives_the_sum_that_python_gives(
    shell: Shell, tmp_path: Path
) -> None:
    def collatz(n: int) -> int:
        steps = 0
        while n != 1:
            n = n // 2 if n % 2 == 0 else 3 * n + 1
            steps += 1
        return steps

    module = compiled(tmp_path, "collatz", *MODULE)
    done = shell("run", module, "--range", "1:10000", "--reduce", "sum")
    assert done.stdout.strip() == str(sum(map(collatz, range(1, 10_000)))), done.stderr
    named = shell("run", module, "--range", "27:28", "--entry", "run")
    assert named.stdout.strip() == "111"


def test_what_makes_no_sense_is_refused_with_what_to_do(shell: Shell, tmp_path: Path) -> None:
    module = compiled(tmp_path, "collatz", *MODULE)
    command = compiled(tmp_path, "words", *WASI)
    wrong = tmp_path / "wrong.wasm"
    wrong.write_bytes(b"\0asm\1\0\0\0\xff")
    for arguments, words in (
        (("run", module, "--range", "1:2", "--entry", "walk"), "run"),
        (("run", "--range", "1:2", command), "--range"),
        (("run", str(wrong)), "wrong.wasm"),
        (("run", str(tmp_path / "none.wasm")), "cannot be read"),
    ):
        done = shell(*arguments)
        assert done.returncode == 2 and words in done.stderr, (arguments, done.stderr)
        assert "Traceback" not in done.stderr


def test_a_trap_shows_what_was_written_before_it_and_names_the_file(
    shell: Shell, tmp_path: Path
) -> None:
    source = (
        '#include <stdio.h>\n#include <stdlib.h>\nint main(void) { puts("so far"); abort(); }\n'
    )
    program = compiled(tmp_path, "abort", *WASI, "-g", source=source)
    done = shell("run", program)
    assert done.returncode == 1 and done.stdout == "so far\n"
    assert "abort.wasm" in done.stderr and "unreachable" in done.stderr


def test_a_program_without_end_is_cancelled(cluster: TestCluster, tmp_path: Path) -> None:
    program = compiled(tmp_path, "longest", *WASI, source=LONGEST)
    client = cluster.client()
    future = client.command(program)
    deadline_s = time.monotonic() + PATIENCE_S
    while not client.processes().processes:
        assert time.monotonic() < deadline_s
    assert future.cancel()
    while any(job.state == "running" for job in client.jobs().jobs):
        assert time.monotonic() < deadline_s
    with pytest.raises(manifold.Exhausted, match="timeout"):
        client.command(program, timeout_ms=300).result(PATIENCE_S)
