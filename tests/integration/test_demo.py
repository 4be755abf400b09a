"""What `make demo` runs: the sum is exact, two nodes are killed, nothing is left."""

from __future__ import annotations

import subprocess
import sys


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
