"""`manifold torture nexus` for seconds, in real processes; and that it finds a disk that lies."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from manifold.shells.cli.main import run
from manifold.tools.torture.history import read
from manifold.tools.torture.plan import plan

SECONDS = 6.0
COMMAND = [sys.executable, "-P", "-m", "manifold", "torture", "nexus"]
PATIENCE_S = 120.0

# The planted fault: once a voter has begun, only every 300th sync is one. What it loses is the end
# of its file, which looks like that of an earlier day: nothing but the histories can tell.
SELDOM_SYNCS = """
from manifold.kernel.nexus.storage_losing import LosingDisk
honest, calls = LosingDisk.sync, [0]
def sync(self, handle):
    calls[0] += 1
    if calls[0] <= 30 or calls[0] % 300 == 0:
        honest(self, handle)
LosingDisk.sync = sync
LosingDisk._write_early = lambda self, inode: None
"""


def environment(home: Path, **more: str) -> dict[str, str]:
    """Its temporary folder lies in `home`, where what it leaves can be seen."""
    return dict(os.environ) | {"TMPDIR": str(home)} | more


def tortured(home: Path, folder: Path, *flags: str, **more: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [*COMMAND, *flags, "--json"], capture_output=True, text=True, cwd=folder,
        env=environment(home, **more), timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


def processes_of(home: Path) -> list[str]:
    """Processes that were started with a path in `home`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if f"{home}/".encode() in command:
                found.append(command.decode().replace("\0", " "))
    return found


@pytest.mark.parametrize("seed", [7, 0], ids=["seed 7", "a seed drawn at random"])
def test_nothing_acknowledged_is_lost_and_histories_are_linearizable(
    seed: int, manifold_folder: Path, tmp_path: Path
) -> None:
    seed = seed or secrets.randbelow(1 << 31)
    print(f"manifold torture nexus --seed {seed} --seconds {SECONDS:g}")
    flags = ("--seed", str(seed), "--seconds", str(SECONDS))
    status, report = tortured(manifold_folder, tmp_path, *flags)
    assert report["failures"] == [], report
    assert status == 0
    assert report["command"].startswith(f"manifold torture nexus --seed {seed} ")
    assert report["operations"]["ok"] > 100
    assert report["faults"]
    assert list(manifold_folder.iterdir()) == []
    assert list(tmp_path.iterdir()) == []
    assert processes_of(manifold_folder) == []


def test_disks_that_seldom_do_what_they_say_are_found_out(
    manifold_folder: Path, tmp_path: Path
) -> None:
    """And the history of a key that went wrong is written down."""
    plant = tmp_path / "plant"
    work = tmp_path / "work"
    for folder in (plant, work):
        folder.mkdir()
    (plant / "sitecustomize.py").write_text(SELDOM_SYNCS)
    path = os.pathsep.join([str(plant), *filter(None, [os.environ.get("PYTHONPATH")])])
    kills_all_twice = (
        seed
        for seed in range(10_000)
        if sum(step.what == "kill" and len(step.nodes) == 3 for step in plan(seed, 5, 3, 3)) >= 2
    )
    for seed in islice(kills_all_twice, 3):  # whether a kill hits what was told is up to the host
        flags = ("--seed", str(seed), "--seconds", "5", "--nodes", "3", "--voters", "3")
        status, report = tortured(manifold_folder, work, *flags, PYTHONPATH=path)
        if status:
            break
    assert status == 1
    assert any("not linearizable" in each for each in report["failures"]), report["failures"]
    assert len({each.key for each in read(Path(report["history"]))}) == 1
    assert list(manifold_folder.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_when_it_is_interrupted(
    number: signal.Signals, manifold_folder: Path, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [*COMMAND, "--nodes", "3", "--voters", "3", "--seconds", "60"], cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(manifold_folder),
        start_new_session=True,
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        assert process.stdout.readline(), "the first step of the plan"
        assert processes_of(manifold_folder)
        process.send_signal(number)
        process.send_signal(number)
        assert process.wait(PATIENCE_S) == 130
    deadline_s = time.monotonic() + 5.0
    while processes_of(manifold_folder) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert processes_of(manifold_folder) == []
    assert list(manifold_folder.iterdir()) == []


def test_voters_must_be_odd_and_among_the_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (("--voters", "4"), ("--nodes", "3", "--voters", "5")):
        assert run(["torture", "nexus", *flags, "--json"]) == 2
        assert json.loads(capsys.readouterr().out)["error"]["code"] == "usage"
