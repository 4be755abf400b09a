"""The real program in a real terminal, as somebody at a keyboard has it: driven through tmux."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

WAIT_S = 40.0
LOOK_S = 0.1
pytestmark = pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")


class Terminal:
    """A tmux server of its own, with one window of 80 by 24."""

    def __init__(self, folder: Path, environ: dict[str, str]) -> None:
        self._socket = str(folder / "tmux")
        self._environ = environ

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["tmux", "-S", self._socket, "-f", "/dev/null", *arguments],
            env=self._environ, capture_output=True, text=True,
        )  # fmt: skip

    def tmux(self, *arguments: str) -> str:
        done = self._run(*arguments)
        assert done.returncode == 0, f"tmux {arguments}: {done.stderr}"
        return done.stdout

    def start(self, *command: str) -> None:
        # In one call: a server without a session ends, and may do so between two.
        self.tmux(
            "new-session", "-d", "-x", "80", "-y", "24", *command,
            ";", "set-option", "remain-on-exit", "on",
        )  # fmt: skip

    def keys(self, *keys: str) -> None:
        self.tmux("send-keys", *keys)

    def screen(self) -> str:
        return self.tmux("capture-pane", "-p")

    def until(self, text: str) -> None:
        """Wait until the screen shows it."""
        deadline_s = time.monotonic() + WAIT_S
        quiet = threading.Event()
        while text not in self.screen():
            assert time.monotonic() < deadline_s, f"no {text!r}; the screen is\n{self.screen()}"
            quiet.wait(LOOK_S)

    def close(self) -> None:
        subprocess.run(["tmux", "-S", self._socket, "kill-server"], capture_output=True)


@pytest.fixture
def terminal(manifold_clusters: Any, manifold_folder: Path) -> Iterator[Terminal]:
    cluster = manifold_clusters(2)
    found = Terminal(manifold_folder, cluster.environ)
    yield found
    found.close()


def test_somebody_at_a_terminal_boots_it_runs_a_verb_looks_at_nodes_and_leaves(
    terminal: Terminal,
) -> None:
    terminal.start(f"{sys.executable} -m manifold console; echo left with $?; cat")
    terminal.until("is yours")
    terminal.keys("status", "Enter")
    terminal.until("2 of 2 nodes ready")
    terminal.keys("F3")
    terminal.until("● ready")
    terminal.tmux("resize-window", "-x", "120", "-y", "40")
    terminal.until("2/2 nodes")
    terminal.keys("F2", "exit", "Enter")
    terminal.until("left with 0")
    assert "Traceback" not in terminal.screen()


def test_without_a_terminal_it_says_what_to_do_instead(terminal: Terminal) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "manifold", "console"], env=terminal._environ,
        capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 2
    assert "needs a terminal" in done.stderr and "Traceback" not in done.stderr
