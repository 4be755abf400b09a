"""Every example, run as its own header says, gives what its header says."""

from __future__ import annotations

import json
import os
import re
import runpy
import secrets
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from manifold.tools.emulator.testing import TestCluster

ROOT = Path(__file__).parents[2]
DOCUMENTED = re.compile(r"^; +manifold (run .*?)(?: +\((.*)\))?$", re.MULTILINE)


# A line of an example's docstring: the command, and what it prints.
PYTHON = re.compile(r"^    python (examples/\w+\.py.*?) {2,}(prints .*)?", re.MULTILINE)


def documented() -> list[tuple[str, str, str]]:
    """Example, command and the result its header gives ("" where it gives none)."""
    return [
        (path.name, command, result)
        for path in sorted((ROOT / "examples").glob("*.ent"))
        for command, result in DOCUMENTED.findall(path.read_text())
    ]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    with tempfile.TemporaryDirectory(prefix="mf-") as folder:
        environ = os.environ | {
            "MANIFOLD_STATE_HOME": f"{folder}/state",
            "MANIFOLD_RUNTIME_DIR": f"{folder}/run",
            "MANIFOLD_CLUSTER": f"t{secrets.token_hex(4)}",
        }
        cluster = TestCluster(4, environ)
        yield cluster
        cluster.close()


def test_the_project_that_is_tested_on_clusters_passes(tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(ROOT / "examples" / "pytest_project", project)
    environ = {name: each for name, each in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "2"], env=environ, cwd=project,
        capture_output=True, text=True, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert re.search(r"^=+ 9 passed in ", done.stdout, re.MULTILINE), done.stdout


def manifold(cluster: TestCluster, command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "manifold", *shlex.split(command)],
        env=dict(cluster.environ), cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_every_example_says_how_to_run_it() -> None:
    names = {name for name, _, _ in documented()}
    assert names == {path.name for path in (ROOT / "examples").glob("*.ent")}


@pytest.mark.parametrize(("name", "command", "result"), documented())
def test_an_example_gives_what_it_says(
    cluster: TestCluster, name: str, command: str, result: str
) -> None:
    if name == "forever.ent":
        command += " --timeout 0.5"
        result = "fails"
    done = manifold(cluster, command + " --json")
    found = json.loads(done.stdout)
    if result == "fails":
        assert done.returncode == 1
        assert found["error"]["code"] in ("trap", "exhausted")
        return
    assert done.returncode == 0, done.stdout + done.stderr
    if result:
        assert found["result"] == json.loads(result.split()[0])


def test_the_seeds_program_yields_all_thousand_pairs_in_order(cluster: TestCluster) -> None:
    done = manifold(cluster, "run examples/seed_collatz.json --range 100:1100 --json")
    pairs = json.loads(done.stdout)["result"]
    assert pairs == [[n, steps(n)] for n in range(100, 1100)]


def steps(n: int) -> int:
    count = 0
    while n != 1:
        n = 3 * n + 1 if n % 2 else n // 2
        count += 1
    return count


def test_monte_carlo_pi_does_not_depend_on_the_sharding(cluster: TestCluster) -> None:
    pi = ROOT / "examples" / "pi.ent"
    client = cluster.client()
    whole = client.parallel_for(pi, 0, 600, reduce="sum")
    parts = [client.parallel_for(pi, at, at + 200, reduce="sum") for at in (0, 200, 400)]
    assert whole == sum(parts)


def test_primes_are_the_primes(cluster: TestCluster) -> None:
    client = cluster.client()
    found = client.parallel_for(ROOT / "examples" / "primes.ent", 0, 3000)
    flags = [n for n, value in enumerate(found) if value]
    assert flags == [n for n in range(3000) if n > 1 and all(n % d for d in range(2, n))]


@pytest.mark.parametrize("name", ["counter.ent", "counter.py"])
def test_a_counter_holds_exactly_what_was_counted(cluster: TestCluster, name: str) -> None:
    cluster.client().globals["counter"] = 5
    if name.endswith(".py"):
        count = runpy.run_path(str(ROOT / "examples" / name))["count"]
        assert cluster.client().parallel_for(count, 0, 300, reduce="count") == 300
    else:
        done = manifold(cluster, f"run examples/{name} --range 0:300 --reduce sum --json")
        assert json.loads(done.stdout)["result"] >= 300, done.stdout + done.stderr
    assert cluster.client().globals["counter"] == 305


# -- programs in Python ---------------------------------------------------------------------------

PROGRAMS = sorted((ROOT / "examples").glob("[!_]*.py"))


def commands() -> list[tuple[str, str]]:
    """Command and what its header says it prints, of every example in Python."""
    return [
        (command, printed.removeprefix("prints ").strip())
        for path in PROGRAMS
        for command, printed in PYTHON.findall(path.read_text())
        if printed
    ]


def python(
    environment: dict[str, str], command: str, folder: Path
) -> subprocess.CompletedProcess[str]:
    """Run an example from the root, as its header has it; pictures go to `folder`."""
    words = [str(folder / w) if w.endswith(".png") else w for w in shlex.split(command)]
    return subprocess.run(
        [sys.executable, *words], env=environment, cwd=ROOT, capture_output=True, text=True,
        timeout=100,
    )  # fmt: skip


@pytest.fixture
def nothing_runs(manifold_environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """No cluster, nor a name of one; and in the end no trace of any."""
    del manifold_environment["MANIFOLD_CLUSTER"]
    yield manifold_environment
    for name in ("MANIFOLD_STATE_HOME", "MANIFOLD_RUNTIME_DIR"):
        folder = Path(manifold_environment[name])
        assert not folder.exists() or os.listdir(folder) == []


def test_every_example_in_python_says_what_it_prints() -> None:
    said = {command.split()[0] for command, _ in commands()}
    assert said == {f"examples/{path.name}" for path in PROGRAMS}


@pytest.mark.parametrize(("command", "printed"), commands())
def test_an_example_in_python_prints_what_it_says_with_no_cluster_running(
    nothing_runs: dict[str, str], tmp_path: Path, command: str, printed: str
) -> None:
    done = python(nothing_runs, command, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert printed.partition(",")[0] in done.stdout
    for number in re.findall(r"\d[\d.]*", printed):
        assert number.rstrip(".") in re.findall(r"\d[\d.]*", done.stdout)


def test_an_example_runs_by_the_command_line_where_a_cluster_runs(cluster: TestCluster) -> None:
    done = manifold(cluster, "run examples/collatz.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("131434424 steps in ")
    assert cluster.client().jobs().jobs, "it was this cluster that computed them"


def test_the_picture_of_the_mandelbrot_set_is_one(
    nothing_runs: dict[str, str], tmp_path: Path
) -> None:
    done = python(nothing_runs, "examples/mandelbrot.py out.png 240", tmp_path)
    assert done.returncode == 0, done.stderr
    width, height, rows = pixels((tmp_path / "out.png").read_bytes())
    assert (width, height) == (240, 160)
    black = sum(row[at : at + 3] == b"\0\0\0" for row in rows for at in range(0, 720, 3))
    assert black == int(done.stdout.split()[0])
    assert rows[80][3 * 130 : 3 * 131] == b"\0\0\0"  # the middle belongs to the set
    assert rows[0][2] > rows[0][0]  # far away it is blue
    # The set is its own mirror image: row 80 lies on the axis. Roundings may differ at its edge.
    assert sum(one == other for one, other in zip(rows[1:], rows[:0:-1], strict=True)) > 140


def pixels(data: bytes) -> tuple[int, int, list[bytes]]:
    """Read a picture of three bytes a pixel without filters; every checksum is looked at."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks = {}
    at = 8
    while at < len(data):
        (size,) = struct.unpack_from(">I", data, at)
        name, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert struct.unpack_from(">I", data, at + 8 + size) == (zlib.crc32(name + body),)
        chunks[name] = body
        at += size + 12
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    width, height, depth, colour, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert (depth, colour, rest) == (8, 2, [0, 0, 0])
    raw = zlib.decompress(chunks[b"IDAT"])
    lines = [raw[at : at + 3 * width + 1] for at in range(0, len(raw), 3 * width + 1)]
    assert len(lines) == height and {line[0] for line in lines} == {0}
    return width, height, [line[1:] for line in lines]


def test_the_words_of_the_docs_are_counted_right(
    nothing_runs: dict[str, str], tmp_path: Path
) -> None:
    done = python(nothing_runs, "examples/wordcount.py", tmp_path)
    texts = [path.read_text().lower() for path in sorted((ROOT / "docs").glob("*.md"))]
    words = Counter(word for text in texts for word in re.findall("[a-z]+", text))
    (most,) = words.most_common(1)
    assert done.stdout.startswith(
        f"{words.total()} words, the most frequent: {most[0]} {most[1]}, "
    ), done.stderr


# -- the page of the SDK --------------------------------------------------------------------------


def page(name: str) -> tuple[str, list[str]]:
    """The blocks of Python of a page, as one program, and what its comments say it prints."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / name).read_text(), re.M | re.S)
    program = "\n".join(blocks)
    printed = re.findall(r"^ *print\(.*\)  # (.*)$", program, re.MULTILINE)
    assert len(printed) == program.count("print("), "every print says what it prints"
    return program, printed


def test_the_page_of_the_sdk_does_what_it_says(
    nothing_runs: dict[str, str], tmp_path: Path
) -> None:
    program, printed = page("sdk.md")
    assert len(printed) > 10
    (tmp_path / "page.py").write_text(program)
    done = python(nothing_runs, str(tmp_path / "page.py"), tmp_path)
    assert done.stderr == ""
    assert done.stdout.splitlines() == printed
