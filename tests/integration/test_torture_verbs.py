"""`manifold torture` for seconds, in real processes; and that it finds what was planted."""

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
from manifold.tools.torture import cluster_plan
from manifold.tools.torture.history import read
from manifold.tools.torture.plan import plan
from manifold.tools.torture.work import KINDS

SECONDS = 6.0
MINUTES = 0.12
COMMAND = [sys.executable, "-P", "-m", "manifold", "torture"]
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

# Another: registers forget which effects they have applied, so that a replay applies them again.
FORGETFUL_MARKS = """
from manifold.kernel.nexus.marks import Book
Book.seen = lambda self, name, position, k: False
"""


def environment(home: Path, **more: str) -> dict[str, str]:
    """Its temporary folder lies in `home`, where what it leaves can be seen."""
    return dict(os.environ) | {"TMPDIR": str(home)} | more


def tortured(
    what: str, home: Path, folder: Path, *flags: str, **more: str
) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [*COMMAND, what, *flags, "--json"], capture_output=True, text=True, cwd=folder,
        env=environment(home, **more), timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


def planted(folder: Path, fault: str) -> tuple[str, Path]:
    """The search path by which every Python process begins with that fault; a working folder."""
    plant, work = folder / "plant", folder / "work"
    for each in (plant, work):
        each.mkdir()
    (plant / "sitecustomize.py").write_text(fault)
    return os.pathsep.join([str(plant), *filter(None, [os.environ.get("PYTHONPATH")])]), work


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
    status, report = tortured("nexus", manifold_folder, tmp_path, *flags)
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
    path, work = planted(tmp_path, SELDOM_SYNCS)
    kills_all_twice = (
        seed
        for seed in range(10_000)
        if sum(step.what == "kill" and len(step.nodes) == 3 for step in plan(seed, 5, 3, 3)) >= 2
    )
    for seed in islice(kills_all_twice, 3):  # whether a kill hits what was told is up to the host
        flags = ("--seed", str(seed), "--seconds", "5", "--nodes", "3", "--voters", "3")
        status, report = tortured("nexus", manifold_folder, work, *flags, PYTHONPATH=path)
        if status:
            break
    assert status == 1
    assert any("not linearizable" in each for each in report["failures"]), report["failures"]
    assert len({each.key for each in read(Path(report["history"]))}) == 1
    assert list(manifold_folder.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("what", "length"), [("nexus", ("--seconds", "60")), ("cluster", ("--minutes", "1"))]
)
def test_nothing_is_left_when_it_is_interrupted(
    what: str,
    length: tuple[str, str],
    number: signal.Signals,
    manifold_folder: Path,
    tmp_path: Path,
) -> None:
    process = subprocess.Popen(
        [*COMMAND, what, "--nodes", "3", "--voters", "3", *length], cwd=tmp_path,
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


def test_a_cluster_computes_what_is_right_whatever_happens_to_it(
    manifold_folder: Path, tmp_path: Path
) -> None:
    seed = secrets.randbelow(1 << 31)
    print(f"manifold torture cluster --seed {seed} --minutes {MINUTES:g} --nodes 4")
    flags = ("--seed", str(seed), "--minutes", str(MINUTES), "--nodes", "4")
    status, report = tortured("cluster", manifold_folder, tmp_path, *flags)
    assert report["failures"] == [], report
    assert status == 0
    assert report["command"] == (
        f"manifold torture cluster --seed {seed} --minutes {MINUTES:g} --nodes 4 --voters 3"
    )
    assert report["jobs"]["ok"] >= 4 * (len(KINDS) - 1), "each client had one of each kind done"
    assert set(report["kinds"]) == set(KINDS)
    assert report["operations"]["ok"] > 100
    assert report["faults"]
    assert list(manifold_folder.iterdir()) == []
    assert list(tmp_path.iterdir()) == []
    assert processes_of(manifold_folder) == []


def test_effects_that_take_place_twice_are_found_out(manifold_folder: Path, tmp_path: Path) -> None:
    """And all the work is written down."""
    path, work = planted(tmp_path, FORGETFUL_MARKS)
    many_kills = (
        seed
        for seed in range(10_000)
        if sum(s.what in ("kill", "owner", "workers") for s in cluster_plan.plan(seed, 7.2, 3, 3))
        >= 4
    )
    own: list[str] = []
    for seed in islice(
        many_kills, 8
    ):  # whether a kill hits an effect, and whose, is up to the host
        flags = ("--seed", str(seed), "--minutes", str(MINUTES), "--nodes", "3")
        status, report = tortured("cluster", manifold_folder, work, *flags, PYTHONPATH=path)
        assert status == bool(report["failures"])
        own = [each for each in report["failures"] if "counted work/own/" in each]
        if own:
            break
    assert own, report["failures"]
    lines = Path(report["work"]).read_bytes().splitlines()
    assert any(json.loads(line)["work"]["kind"] == "tick" for line in lines)
    assert list(manifold_folder.iterdir()) == []


def test_voters_must_be_odd_and_among_the_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (("--voters", "4"), ("--nodes", "3", "--voters", "5")):
        for what in ("nexus", "cluster"):
            assert run(["torture", what, *flags, "--json"]) == 2
            assert json.loads(capsys.readouterr().out)["error"]["code"] == "usage"
