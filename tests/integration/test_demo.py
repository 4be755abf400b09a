"""What `make demo` runs: the sum is exact, two nodes are killed, nothing is left.

It ends with a program to try next, which works."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from manifold.tools.demo import TRY


def test_the_demo_computes_kills_explains_and_leaves_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "manifold.tools.demo"], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr
    printed = done.stdout.splitlines()
    assert "131434272" in printed
    assert sum("killed" in line and "SIGKILL" in line for line in printed) == 2
    assert any(line.startswith("$ manifold why J-") for line in printed)
    assert any("no process, socket or file is left" in line for line in printed)
    assert not any("WRONG" in line for line in printed)
    program = printed[printed.index("or paste three lines into .venv/bin/python:") + 1 :]
    assert [line for line in program if line] == [f"    {line}" for line in TRY]
    assert len(TRY) == 3


@pytest.mark.parametrize("how", ["a file", "pasted"])
def test_the_three_lines_that_the_demo_ends_with_work(
    manifold_environment: dict[str, str], tmp_path: Path, how: str
) -> None:
    del manifold_environment["MANIFOLD_CLUSTER"]
    file = tmp_path / "three.py"
    file.write_text("\n".join(TRY) + "\n")
    arguments = [str(file)] if how == "a file" else ["-i", "-q"]
    done = subprocess.run(
        [sys.executable, *arguments], env=manifold_environment, input=file.read_text(),
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == "332833500\n", done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(manifold_environment["MANIFOLD_STATE_HOME"]) == []
