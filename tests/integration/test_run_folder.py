"""Test processes do not meet, and clean up after each other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from manifold.kernel.limits import CLUSTER_NAME_CHARS_MAX, RUNTIME_DIR_BYTES_MAX
from manifold.kernel.places import runtime_path
from manifold.tools.emulator.testing import processes_of
from manifold.tools.testing.run_folder import RunFolder, base, clean_up, environ_of_test

HOLDER = """
import os, sys
from manifold.tools.emulator.testing import TestCluster
from manifold.tools.testing.run_folder import RunFolder
run = RunFolder.open(sys.argv[1], "gw0")
environ = run.environ(run.test_folder())
cluster = TestCluster(2, environ)
print(run.path, cluster.supervisor.runtime_dir, flush=True)
sys.stdin.read()
os._exit(1)
"""


@pytest.fixture
def run_name() -> str:
    return os.urandom(8).hex()


@pytest.fixture
def opened(run_name: str) -> Iterator[RunFolder]:
    run = RunFolder.open(run_name, "gw0")
    yield run
    if run.path.exists():
        run.close()


def test_two_runs_of_one_name_have_a_folder_each(opened: RunFolder, run_name: str) -> None:
    other = RunFolder.open(run_name, "gw0")
    assert other.path != opened.path
    other.close()
    again = RunFolder.open(run_name, "gw0")
    assert again.path == other.path
    again.close()


def test_workers_and_tests_have_names_of_their_own(opened: RunFolder, run_name: str) -> None:
    worker = RunFolder.open(run_name, "gw1")
    folders = [run.test_folder() for run in (opened, opened, worker)]
    runs = (opened, opened, worker)
    names = {run.environ(f)["MANIFOLD_CLUSTER"] for run, f in zip(runs, folders, strict=True)}
    assert len(names) == 3
    worker.close()


def test_names_stay_within_their_bounds_in_large_runs(run_name: str) -> None:
    run = RunFolder.open(run_name, "gw999999")
    name = run.environ(run.test_folder())["MANIFOLD_CLUSTER"] + "a"
    assert len(name) <= CLUSTER_NAME_CHARS_MAX
    run.close()


@pytest.mark.parametrize("uid", ["0", "1000", "4294967295"])
@pytest.mark.parametrize("run", ["abcdef-main", "abcdef-gw12", "abcdef-gw9999-9"])
@pytest.mark.parametrize("test", ["1", "2345"])
def test_paths_are_short_enough_for_sockets_whoever_runs_it(uid: str, run: str, test: str) -> None:
    places_of = environ_of_test(Path(f"/tmp/mfp-{uid}/{run}/{test}"))
    path = runtime_path("abcdef-gw9999-9-2345a", places_of)
    assert len(str(path)) <= RUNTIME_DIR_BYTES_MAX


def test_a_folder_that_is_in_use_is_left_alone(opened: RunFolder) -> None:
    kept = opened.test_folder() / "kept"
    kept.write_text("x")
    assert clean_up() == []
    assert kept.read_text() == "x"


@pytest.mark.parametrize("how", ["it is killed", "it ends without closing"])
def test_what_a_dead_process_left_is_removed_by_the_next(run_name: str, how: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, run_name], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    ) as holder:  # fmt: skip
        assert holder.stdout is not None and holder.stdin is not None
        path, runtime = map(Path, holder.stdout.readline().split())
        assert path.parent == base() and runtime.is_dir()
        if how == "it is killed":
            holder.send_signal(signal.SIGKILL)
        holder.stdin.close()
        holder.wait()
    assert clean_up() == []
    assert not path.exists()
    assert not runtime.exists()
    assert processes_of(str(runtime)) == []
