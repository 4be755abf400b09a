"""`manifold run script.py`: what `python script.py` does, with a cluster attached."""

from __future__ import annotations

import os
import pty
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from manifold.kernel import places
from manifold.tools.emulator import cluster as emulator
from manifold.tools.emulator import record
from manifold.tools.emulator.testing import TestCluster

Environment = dict[str, str]
ROOT = Path(__file__).parents[2]
FOREVER = ROOT / "examples" / "forever.ent"
PATIENCE_S = 30.0
OWN = re.compile(r"cluster '[a-z0-9-]+' does not run: 4 nodes are started for this script .*\n")


def until(condition: Callable[[], object], what: str) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {PATIENCE_S} s: {what}"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def cluster() -> Iterator[TestCluster]:
    folder = Path(tempfile.mkdtemp(prefix="mf-"))
    environ = os.environ | {
        "MANIFOLD_STATE_HOME": str(folder / "state"),
        "MANIFOLD_RUNTIME_DIR": str(folder / "run"),
        "MANIFOLD_CLUSTER": f"s{secrets.token_hex(4)}",
    }
    cluster = TestCluster(2, environ)
    yield cluster
    cluster.close()
    shutil.rmtree(folder)


def script(folder: Path, text: str) -> str:
    path = folder / "script.py"
    path.write_text(text)
    return str(path)


def run(
    environment: Environment, *arguments: str, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "manifold", *arguments], env=environment, cwd=folder,
        capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def python(
    environment: Environment, *arguments: str, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=folder, capture_output=True, text=True,
        timeout=60, stdin=subprocess.DEVNULL,
    )  # fmt: skip


# -- as python does it ----------------------------------------------------------------------------

SAYS = """
import os, sys
print(__name__, sys.argv, sys.path[0], __file__)
print("to stderr", file=sys.stderr)
{end}
"""


@pytest.mark.parametrize(
    "end",
    [
        "", "sys.exit(7)", "sys.exit('why')", "1 / 0", "raise SystemExit", "os._exit(3)",
        "os.kill(os.getpid(), 9)", "raise KeyboardInterrupt", "def f(:",
    ],
)  # fmt: skip
def test_arguments_output_traceback_and_status_are_pythons(
    cluster: TestCluster, tmp_path: Path, end: str
) -> None:
    script(tmp_path, SAYS.format(end=end))
    environment = dict(cluster.environ)
    ours = run(environment, "run", "script.py", "a b", "-v", "--flag", folder=tmp_path)
    pythons = python(environment, "script.py", "a b", "-v", "--flag", folder=tmp_path)
    assert (ours.returncode, ours.stdout, ours.stderr) == (
        pythons.returncode, pythons.stdout, pythons.stderr
    )  # fmt: skip


def test_standard_input_is_the_scripts(cluster: TestCluster, tmp_path: Path) -> None:
    path = script(tmp_path, "print(input()[::-1])")
    done = subprocess.run(
        [sys.executable, "-m", "manifold", "run", path], env=dict(cluster.environ), input="abc\n",
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == "cba\n"


# -- which cluster --------------------------------------------------------------------------------

ASKS = """
import manifold
with manifold.connect() as m:
    print(m.cluster, len(m.nodes()))
with manifold.connect(up=3) as m:
    print(m.cluster, len(m.nodes()))
"""


@pytest.mark.parametrize("how", ["option", "variable", "file"])
def test_a_script_finds_the_cluster_of_the_command_line(
    cluster: TestCluster, tmp_path: Path, how: str
) -> None:
    path = script(tmp_path, ASKS)
    environment = dict(cluster.environ)
    options = []
    if how != "variable":
        del environment["MANIFOLD_CLUSTER"]
    if how == "option":
        options = ["--cluster", cluster.name]
    if how == "file":
        (tmp_path / "manifold.yaml").write_text(f"cluster: {cluster.name}\n")
    done = run(environment, *options, "run", path, folder=tmp_path)
    assert (done.stdout, done.stderr) == (f"{cluster.name} 2\n" * 2, "")


@pytest.fixture
def alone(manifold_environment: Environment) -> Iterator[Environment]:
    """Where no cluster runs, and none may run in the end."""
    yield manifold_environment
    until(lambda: not left(manifold_environment), f"nothing is left: {left(manifold_environment)}")


def left(environment: Environment) -> list[str]:
    mark = os.fsencode(f"MANIFOLD_STATE_HOME={environment['MANIFOLD_STATE_HOME']}")
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and record.start_time(int(entry.name)) >= 0:
            with suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(entry.name)
    folders = [Path(environment[f"MANIFOLD_{name}"]) for name in ("STATE_HOME", "RUNTIME_DIR")]
    return found + [str(path) for each in folders if each.exists() for path in each.iterdir()]


def test_where_none_runs_a_script_has_one_of_its_own_and_is_told(
    alone: Environment, tmp_path: Path
) -> None:
    done = run(alone, "run", script(tmp_path, ASKS))
    assert done.returncode == 0, done.stderr
    one, two = done.stdout.splitlines()
    assert one == two
    assert re.fullmatch(r"up-\d+-[0-9a-f]{8} 4", one)
    assert OWN.fullmatch(done.stderr)


@pytest.mark.parametrize("end", ["sys.exit(7)", "1 / 0", "os.kill(os.getpid(), 9)"])
def test_its_own_cluster_ends_with_a_script_however_it_ends(
    alone: Environment, tmp_path: Path, end: str
) -> None:
    path = script(tmp_path, f"import manifold, os, sys\nmanifold.connect()\n{end}\n")
    done = run(alone, "run", path)
    assert done.returncode == {"s": 7, "1": 1, "o": -9}[end[0]]


def test_one_ctrl_c_ends_the_script_and_its_cluster(alone: Environment, tmp_path: Path) -> None:
    path = script(
        tmp_path,
        f"import manifold\nwith manifold.connect() as m:\n"
        f"    future = m.job({str(FOREVER)!r}, 0, 4)\n"
        f"    m.wait(future, lambda _: print('computing', flush=True))\n",
    )
    controller, terminal = pty.openpty()  # the key itself: the system signals the whole group
    process = subprocess.Popen(
        [sys.executable, "-m", "manifold", "run", path], env=alone, stdin=terminal,
        stdout=terminal, stderr=terminal, start_new_session=True, preexec_fn=_take_terminal,
    )  # fmt: skip
    os.close(terminal)
    try:
        seen = b""
        while b"computing" not in seen:
            seen += os.read(controller, 4096)
        began = time.monotonic()
        os.write(controller, b"\x03")
        assert process.wait(PATIENCE_S) == -signal.SIGINT
        assert time.monotonic() - began < 10
        with suppress(OSError):  # EIO: nobody has the terminal any more
            while more := os.read(controller, 4096):
                seen += more
        assert b"never retrieved" not in seen, seen.decode()
        assert seen.rstrip().endswith(b"KeyboardInterrupt"), seen.decode()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(controller)


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_with_up_a_lasting_cluster_is_started_first(alone: Environment, tmp_path: Path) -> None:
    (tmp_path / "manifold.yaml").write_text("classes:\n  small: {count: 2}\n")
    path = script(tmp_path, ASKS)
    try:
        done = run(alone, "run", "--up", path, folder=tmp_path)
        name = alone["MANIFOLD_CLUSTER"]
        assert done.stdout == f"{name} 2\n" * 2, done.stderr
        assert "`manifold down` ends it" in done.stderr
        again = run(alone, "run", "--up", path, folder=tmp_path)
        assert (again.stdout, again.stderr) == (f"{name} 2\n" * 2, "")
    finally:
        assert emulator.down(alone["MANIFOLD_CLUSTER"], alone)
        shutil.rmtree(places.cluster_dir(alone["MANIFOLD_CLUSTER"], alone))


def test_a_cluster_that_was_asked_for_by_name_is_not_replaced_by_another(
    alone: Environment, tmp_path: Path
) -> None:
    done = run(alone, "--cluster", "lab", "run", script(tmp_path, "print('ran')"))
    assert (done.returncode, done.stdout) == (3, "")
    assert "Cluster 'lab' is not running" in done.stderr
    assert "--up" in done.stderr


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["--range", "1:5", "{}"], ["{}", "--range", "1:5"], ["{}", "--reduce=sum"],
        ["--why", "{}"], ["{}", "x", "--json"], ["--on", "a", "{}"], ["--timeout", "1", "{}"],
    ],
)  # fmt: skip
def test_options_for_programs_over_indices_are_refused_with_what_to_do(
    alone: Environment, tmp_path: Path, arguments: list[str]
) -> None:
    path = script(tmp_path, "print('ran')")
    done = run(alone, "run", *(each.format(path) for each in arguments))
    assert done.returncode == 2
    told = done.stdout + done.stderr
    assert "for programs over indices" in told
    assert f"manifold run {path} -- --" in told
    assert "ran" not in done.stdout.splitlines()


def test_up_behind_the_script_says_where_it_belongs(alone: Environment, tmp_path: Path) -> None:
    path = script(tmp_path, "print('ran')")
    done = run(alone, "run", path, "--up")
    assert done.returncode == 2
    assert f"manifold run --up {path}" in done.stderr


@pytest.mark.parametrize(
    ("passed", "seen"),
    [
        (["--", "--range", "1:5"], ["--range", "1:5"]),
        (["x", "--", "--json", "--", "y"], ["x", "--json", "--", "y"]),
        (["--help"], ["--help"]),
        (["--", "--"], ["--"]),
        ([], []),
    ],
)
def test_what_stands_behind_two_dashes_is_the_scripts(
    cluster: TestCluster, tmp_path: Path, passed: list[str], seen: list[str]
) -> None:
    path = script(tmp_path, "import sys\nprint(sys.argv[1:])")
    done = run(dict(cluster.environ), "run", path, *passed)
    assert done.stdout == f"{seen}\n", done.stderr


@pytest.mark.parametrize("name", ["nobody.py", "."])
def test_a_script_that_is_none_is_refused_before_anything_starts(
    alone: Environment, tmp_path: Path, name: str
) -> None:
    (tmp_path / "folder.py").mkdir()
    wanted = "folder.py" if name == "." else name
    done = run(alone, "run", wanted, folder=tmp_path)
    assert done.returncode == 2
    assert wanted in done.stderr
    assert "Traceback" not in done.stderr


def test_a_configuration_that_is_refused_is_told_without_a_traceback(
    alone: Environment, tmp_path: Path
) -> None:
    path = script(tmp_path, "print('ran')")
    (tmp_path / "manifold.yaml").write_text("scheduler: {grain: fast}\n")
    done = run(alone, "run", path, folder=tmp_path)
    assert done.returncode == 2
    assert "manifold.yaml:1" in done.stderr
    assert "Traceback" not in done.stderr
