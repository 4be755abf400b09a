"""The namespace over real processes: everything that is listed can be read, watched and piped."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from manifold.kernel.errors import NotFound, Refused, Unavailable
from manifold.shells.cli.main import run
from manifold.shells.namespace import Entry, Namespace
from manifold.shells.namespace.tables import TABLES
from manifold.shells.sdk.client import Client
from manifold.tools.emulator.testing import TestCluster

ROOT = Path(__file__).parents[2]
COLLATZ = ROOT / "examples" / "collatz.ent"
FOREVER = ROOT / "examples" / "forever.ent"
PAGE = ROOT / "docs" / "namespace.md"
WAIT_S = 30.0  # for what takes milliseconds on a machine with nothing else to do
Start = Callable[..., TestCluster]


@pytest.fixture(scope="module")
def calm() -> Iterator[TestCluster]:
    """A cluster that nobody hurts."""
    folder = Path(tempfile.mkdtemp(prefix="mf-"))
    environment = os.environ | {
        "MANIFOLD_STATE_HOME": str(folder / "state"),
        "MANIFOLD_RUNTIME_DIR": str(folder / "run"),
        "MANIFOLD_CLUSTER": f"n{secrets.token_hex(4)}",
    }
    cluster = TestCluster(4, environment)
    try:
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(folder)


@pytest.fixture
def client(calm: TestCluster) -> Iterator[Client]:
    with Client(calm.name, environ=calm.environ) as client:
        yield client


@pytest.fixture
def space(client: Client) -> Namespace:
    return Namespace(client)


class Shell:
    """Runs `manifold` on a cluster."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        self.environment, self.folder = environment, folder

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        """In this process, which saves its start: status, standard output, standard error."""
        output, errors = io.StringIO(), io.StringIO()
        with (
            patch.dict(os.environ, self.environment),
            contextlib.chdir(self.folder),
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(errors),
        ):
            status = run(list(arguments))
        return status, output.getvalue(), errors.getvalue()

    def ok(self, *arguments: str) -> str:
        status, printed, said = self(*arguments)
        assert status == 0, printed + said
        return printed

    def json(self, *arguments: str) -> Any:
        return json.loads(self.ok(*arguments, "--json"))

    @contextlib.contextmanager
    def following(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """A process that goes on; it is ended."""
        with subprocess.Popen(
            [sys.executable, "-u", "-m", "manifold", *arguments], text=True, cwd=self.folder,
            env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ) as process:  # fmt: skip
            try:
                yield process
            finally:
                process.kill()

    def complete(self, line: str) -> list[str]:
        """What bash is offered for the last word of a line."""
        words = line.split(" ")
        asked = {
            "_MANIFOLD_COMPLETE": "bash_complete",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(words) - 1),
        }
        done = subprocess.run(
            [sys.executable, "-m", "manifold"], env=self.environment | asked, text=True,
            cwd=self.folder, capture_output=True, timeout=60,
        )  # fmt: skip
        assert done.stderr == ""
        return [each.removeprefix("plain,") for each in done.stdout.split()]


@pytest.fixture
def shell(calm: TestCluster, tmp_path: Path) -> Shell:
    return Shell(dict(calm.environ), tmp_path)


def until(what: Callable[[], Any], why: str) -> Any:
    """What it is once it is something."""
    quiet = threading.Event()
    deadline_s = time.monotonic() + WAIT_S
    while not (found := what()):
        assert time.monotonic() < deadline_s, why
        quiet.wait(0.05)
    return found


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


@contextlib.contextmanager
def running(client: Client) -> Iterator[str]:
    """A job that goes on, with more shards than there are slots."""
    future = client.job(str(FOREVER), 0, 12)
    try:
        until(lambda: client.processes().processes, "nothing runs")
        yield future.job
    finally:
        client.kill(future.job)


def walk(space: Namespace, path: str = "/") -> Iterator[tuple[str, Entry]]:
    """Every path that is listed."""
    entries = space.list(path)
    assert len({entry.name for entry in entries}) == len(entries)
    for entry in entries:
        inner = f"{path.rstrip('/')}/{entry.name}"
        yield inner, entry
        if entry.kind == "folder":
            yield from walk(space, inner)


def kinds_now(space: Namespace, path: str) -> set[str]:
    """How the folder lists it by now: registers of a job that runs come and go."""
    folder, _, name = path.rstrip("/").rpartition("/")
    return {each.kind for each in space.list(folder or "/") if each.name.rstrip("/") == name}


# -- the tree -------------------------------------------------------------------------------------


def test_everything_that_is_listed_can_be_read_and_completed(
    client: Client, space: Namespace
) -> None:
    """One walk over a cluster with a job that runs, one that is done, and nested globals."""
    client.globals["walk"] = 1
    client.globals["walk/in"] = "x"
    client.parallel_for(str(COLLATZ), 1, 20)
    with running(client):
        seen = dict(walk(space))
        texts = {}
        for path, entry in seen.items():
            assert entry.summary or "inventory" in path, path
            kind = space.kind(path)
            assert kind == entry.kind or kind in kinds_now(space, path), path
            if kind == "folder":
                if not path.endswith("/"):  # else it is a file as well
                    with pytest.raises(Refused, match="is a folder"):
                        space.read(path)
                continue
            texts[path] = space.read(path)
            json.dumps(space.value(path))
            assert texts[path] == "" or texts[path].endswith("\n"), path
        for path in list(seen)[:: max(1, len(seen) // 60)]:  # completion of each is a question
            plain = path.rstrip("/")
            for end in {1, len(plain) // 2, plain.rindex("/") + 1, len(plain)}:
                found = space.complete(plain[:end])
                assert any(f"{plain}/".startswith(each.rstrip("/") + "/") for each in found), path
    assert {"/globals/walk", "/globals/walk/", "/globals/walk/in"} <= set(seen)
    results = [texts[path] for path in texts if re.fullmatch("/jobs/J-[0-9a-f]{16}/result", path)]
    assert "0\n1\n7\n2\n5\n8\n16\n3\n19\n6\n14\n9\n9\n17\n17\n4\n12\n20\n20\n" in results


def test_what_is_read_is_what_the_cluster_says(client: Client, space: Namespace) -> None:
    for node in client.nodes():
        folder = f"/nodes/{node.alias}"
        found = [space.read(f"{folder}/{name}") for name in ("id", "pid", "class")]
        assert found == [f"{each}\n" for each in (node.kid, node.pid, node.node_class)]
        assert space.value(f"{folder}/slots") == node.cores
        assert space.value(f"{folder}/state") == "ready"
        assert space.value(f"{folder}/inventory/cores") == os.cpu_count()
    client.globals["told/f"] = 0.1
    client.globals["told/b"] = b"\x00\xff"
    assert space.read("/globals/told/f") == "0.1\n"
    assert (space.read("/globals/told/b"), space.value("/registers/globals/told/b")) == (
        "hex:00ff\n", "00ff",
    )  # fmt: skip
    voters = space.value("/nexus/voters")
    assert isinstance(voters, list) and len(voters) == 3
    assert space.read("/nexus/status").startswith("known: true\nepoch: 1\nmajority: true\n")


def test_a_job_and_its_processes_are_folders_while_it_runs(
    client: Client, space: Namespace
) -> None:
    with running(client) as job:
        names = [entry.name for entry in space.list(f"/jobs/{job}")]
        assert "status" in names and "result" not in names
        assert space.read(f"/jobs/{job}/state") == "running\n"
        assert space.value(f"/jobs/{job}/owner") in [node.alias for node in client.nodes()]
        assert job in space.read(f"/jobs/{job}/why")
        with pytest.raises(Refused, match="runs still"):
            space.read(f"/jobs/{job}/result")
        found = {e.name: space.value(f"/proc/{e.name}/status") for e in space.list("/proc")}
        mine = {name: each for name, each in found.items() if isinstance(each, dict)}
        assert {each["state"] for each in mine.values() if each["job"] == job} >= {"running"}
        computing = [name for name, each in mine.items() if each["pid"] and each["job"] == job]
        assert {entry.name for entry in space.list("/proc")} >= set(computing)
    assert space.read(f"/jobs/{job}/state") == "cancelled\n"
    ids = {entry.name for entry in space.list("/proc")}
    assert set(computing) <= ids, "a worker that is idle keeps its id"


def test_results_are_those_of_the_client(client: Client, space: Namespace) -> None:
    for how in ("sum", "min", "max", "count", "collect"):
        future = client.job(str(COLLATZ), 1, 3000, reduce=how)  # type: ignore[arg-type]
        assert space_value_of(space, future.job, future.result()) is True
    called = client.submit(len, "abc")
    assert called.result() == 3
    assert "result" not in [entry.name for entry in space.list(f"/jobs/{called.job}")]
    with pytest.raises(Refused, match="there is no result to print"):
        space.read(f"/jobs/{called.job}/result")


def space_value_of(space: Namespace, job: str, result: Any) -> bool:
    return space.value(f"/jobs/{job}/result") == result


WRONG = [
    ("/node", "There is no /node.", "Did you mean /nodes?"),
    ("/nodes/server-1/cpu", "There is no /nodes/server-1.", "Did you mean /nodes/server-01?"),
    ("/nodes/server-01/cpus", "There is no /nodes/server-01/cpus.", "/nodes/server-01/cpu?"),
    ("/nodes/server-01/inventory/core", "There is no", "inventory/cores?"),
    ("/nodes/server-01/cpu/x", "/nodes/server-01/cpu is a file", "manifold cat"),
    ("/jobs/J-1/state", "There is no /jobs/J-1.", "manifold ls /jobs"),
    ("/jobs/J-0123456789abcdef/why", "There is no /jobs/J-0123456789abcdef.", "manifold ls /jobs"),
    ("/proc/K-1", "There is no /proc/K-1.", "manifold ls /proc"),
    ("/globals/wrng", "There is no /globals/wrng.", "Did you mean /globals/wrong?"),
    ("/globals/wrong/x", "/globals/wrong is a file", "manifold cat /globals/wrong"),
    ("/version/x", "/version is a file", "manifold cat /version"),
]


def test_what_is_not_there_is_told_with_what_is(client: Client, space: Namespace) -> None:
    client.globals["wrong"] = 1
    asks: list[Callable[[str], Any]] = [
        space.read, space.value, space.list, space.kind, lambda path: next(space.follow(path)),
    ]  # fmt: skip
    for path, message, hint in WRONG:
        for ask in asks:
            with pytest.raises(NotFound) as told:
                ask(path)
            assert message in told.value.message, path
            assert hint in told.value.next_step, path
    assert space.complete("/nope/x") == space.complete("x") == []


def test_every_path_of_the_page_exists(space: Namespace) -> None:
    commands = re.findall(r"^manifold (?:cat|tail|watch|ls).*?#", PAGE.read_text(), re.MULTILINE)
    paths = [word for line in commands for word in line.split() if word.startswith("/")]
    assert len(paths) > 5
    for path in paths:
        space.kind(path)


def test_a_thread_can_end_what_it_follows(client: Client, space: Namespace) -> None:
    for path in ("/log", "/nodes/server-01/pid", "/nodes", "/globals/ended"):
        client.globals["ended"] = 1
        stop = threading.Event()
        lines = space.follow(path, stop=stop)
        assert next(lines)
        stop.set()
        assert len(list(lines)) < 1000


# -- verbs ----------------------------------------------------------------------------------------


def test_ls_lists_folders_and_keeps_its_table_of_globals(shell: Shell, calm: TestCluster) -> None:
    roots = shell.ok("ls", "/").split()
    assert roots == [
        "/nodes", "/jobs", "/proc", "/globals", "/cluster", "/registers", "/nexus", "/log",
        "/version",
    ]  # fmt: skip
    assert shell.ok("ls", "/nodes").split() == [f"{alias}/" for alias in calm.aliases]
    assert [each["path"] for each in shell.json("ls", "/nodes")] == [
        f"/nodes/{alias}" for alias in calm.aliases
    ]
    assert re.search(r"^server-01 +folder +ready, server", shell.ok("ls", "-l", "/nodes"), re.M)
    shell.ok("set", "ls/a", "1")
    table = shell.ok("ls", "/globals/ls").splitlines()
    assert table[0].split() == ["NAME", "VALUE", "TYPE", "VERSION"]
    assert table[-1] == "1 name under /globals/ls  (quorum)"
    assert shell.json("ls", "ls/", "--stale", "--timeout", "9")[0]["name"] == "ls/a"
    ring = "/cluster/rings"  # which the nodes agree on soon after they have met
    until(lambda: ring in shell.ok("ls", "/registers/cluster"), "there is no ring")
    assert "/cluster/rings" in shell.ok("ls", "/cluster")


def test_cat_prints_values_alone(shell: Shell) -> None:
    shell.ok("set", "cat/x", "5")
    assert shell.ok("cat", "/globals/cat/x", "cat/x", "/nodes/server-01/class") == "5\n5\nserver\n"
    assert shell.json("cat", "cat/x") == 5
    assert shell.json("cat", "cat/x", "/nodes/server-01/class") == {
        "/globals/cat/x": 5, "/nodes/server-01/class": "server",
    }  # fmt: skip
    assert "alias: server-01\n" in shell.ok("cat", "/nodes/server-01/status")
    assert len(shell.ok("cat", "/log").splitlines()) > 4


@pytest.mark.parametrize(
    ("status", "arguments"),
    [
        (4, ("cat", "/nodes")), (4, ("cat", "/nope")), (4, ("ls", "/nope")), (2, ("cat",)),
        (4, ("tail", "/nope")), (4, ("tail", "-f", "/nope")), (4, ("tail", "/nodes")),
        (2, ("tail", "-n", "-1", "/log")), (4, ("watch", "/nope")), (2, ("watch", "no name")),
        (2, ("export", "flurb")), (2, ("export", "nodes", "-o", "/no/such/folder/x")),
        (4, ("cat", "/globals/nothing-here")), (2, ("ls", "/globals//x")), (2, ("cat", "")),
    ],
)  # fmt: skip
def test_refusals_have_an_exit_status_and_a_sentence(
    shell: Shell, status: int, arguments: tuple[str, ...]
) -> None:
    found, printed, said = shell(*arguments)
    assert (found, printed) == (status, "")
    assert "error: " in said
    assert "Traceback" not in said


@pytest.mark.parametrize("path", ["/globals/", "", "/registers/", "/cluster/", "/globals/a/"])
@pytest.mark.parametrize("verb", ["cat", "tail", "watch", "get"])
def test_a_name_that_is_too_long_is_refused_with_the_rule(
    shell: Shell, verb: str, path: str
) -> None:
    found, printed, said = shell(verb, path + "x" * 300)
    assert (found in (2, 4), printed) == (True, "")
    assert "A name has 1 to 128" in said or "has at most 256 characters" in said
    assert shell.complete(f"manifold {verb} {path}{'x' * 300}") == []


def test_tail_prints_the_last_lines_of_a_log_and_of_anything(shell: Shell) -> None:
    lines = shell.ok("tail", "-n", "3", "/log").splitlines()
    assert len(lines) == 3
    assert re.match(r"\S+ +\d{4}-\d\d-\d\dT", lines[0])
    assert re.match(r"\d{4}-\d\d-\d\dT", shell.ok("tail", "-n", "1", "/nodes/server-01/log"))
    assert shell.ok("tail", "-n", "0", "/log") == ""
    assert len(shell.ok("tail", "-n", "2", "/nexus/voters").splitlines()) == 2
    entry = json.loads(shell.ok("tail", "-n", "1", "/nodes/server-01/log", "--json"))
    assert entry["node"] == "server-01"


def test_tail_follows_a_log_and_ends_with_ctrl_c(shell: Shell, client: Client) -> None:
    with shell.following("tail", "-f", "-n", "1", "/log") as tail:
        assert next_line(tail)
        job = client.job(str(COLLATZ), 1, 10)
        job.result()
        assert tail.stdout is not None
        assert any(job.job in line for line in tail.stdout)
        tail.send_signal(signal.SIGINT)
        assert tail.wait(WAIT_S) == 130
        assert tail.stderr is not None
        assert "Traceback" not in tail.stderr.read()


def test_tail_follows_whatever_changes(shell: Shell, client: Client) -> None:
    client.globals["tail"] = "one"
    with shell.following("tail", "-f", "tail") as tail:
        assert next_line(tail) == "one"
        client.globals["tail"] = "two"
        assert next_line(tail) == "two"
        del client.globals["tail"]
        assert next_line(tail) == "absent"


def test_watch_prints_a_line_for_each_change(shell: Shell, client: Client) -> None:
    client.globals["watch"] = 0
    with shell.following("watch", "/globals/watch", "--count", "2") as watch:
        assert next_line(watch) == "watch = 0  (version 1, quorum)"
        client.globals["watch"] = 1
        assert next_line(watch) == "watch = 1  (version 2, quorum)"
        assert watch.wait(WAIT_S) == 0
    future = client.job(str(FOREVER), 0, 4)
    until(lambda: future.job in [job.job for job in client.jobs().jobs], "the job is not there")
    with shell.following("watch", f"/jobs/{future.job}/state") as watch:
        assert next_line(watch) == f"/jobs/{future.job}/state = running"
        client.kill(future.job)
        assert next_line(watch) == f"/jobs/{future.job}/state = cancelled"


def test_watch_tells_what_comes_into_a_folder(shell: Shell, client: Client) -> None:
    known = len(client.jobs().jobs)
    with shell.following("watch", "/jobs", "--json") as watch:
        for _ in range(known):
            assert json.loads(next_line(watch))["there"] is True
        job = client.job(str(COLLATZ), 1, 10)
        job.result()
        assert json.loads(next_line(watch)) == {"name": job.job, "there": True}


@pytest.mark.parametrize(
    "verb", ["tail -f /log", "watch /nodes/server-01/pid", "logs -f", "cat /log"]
)
def test_a_reader_that_has_seen_enough_ends_it(shell: Shell, verb: str) -> None:
    """At once: no further line is needed for it to be noticed."""
    done = subprocess.run(
        f"set -o pipefail; {sys.executable} -m manifold {verb} | head -n 1", shell=True,
        env=shell.environment, cwd=shell.folder, capture_output=True, text=True, timeout=WAIT_S,
        executable="/bin/bash",
    )  # fmt: skip
    assert len(done.stdout.splitlines()) == 1
    assert (done.returncode, done.stderr) == (0, "")


def test_export_writes_whole_tables(shell: Shell, client: Client, tmp_path: Path) -> None:
    client.globals["export/quoted"] = 'a "b",\nc'
    client.parallel_for(str(COLLATZ), 1, 10)
    with running(client):
        for name, table in TABLES.items():
            header, *lines = csv.reader(io.StringIO(shell.ok("export", name), newline=""))
            assert tuple(header) == table.columns
            assert lines, name
            assert {len(line) for line in lines} == {len(header)}
            rows = shell.json("export", name)
            assert {column.partition(".")[0] for column in header} <= set(rows[0]), name
    written = csv.DictReader(io.StringIO(shell.ok("export", "globals", "--csv"), newline=""))
    assert 'a "b",\nc' in [row["value"] for row in written]
    target = tmp_path / "nodes.json"
    target.write_text("old")
    assert shell.ok("export", "nodes", "-o", str(target)) == ""
    assert len(json.loads(target.read_text())) == 4
    assert sorted(each.name for each in tmp_path.iterdir()) == ["nodes.json"]


def test_the_shell_completes_what_the_cluster_has(shell: Shell, client: Client) -> None:
    client.globals["complete/me"] = 1
    job = client.job(str(COLLATZ), 1, 10)
    job.result()
    assert shell.complete("manifold cat /nodes/ser") == ["/nodes/server-01/"]
    assert shell.complete("manifold watch /nodes/server-01/ui") == []
    assert shell.complete("manifold get complete/") == ["complete/me"]
    assert shell.complete("manifold set /globals/compl") == ["/globals/complete/"]
    assert job.job in shell.complete("manifold kill J-")
    assert shell.complete("manifold node inspect ser") == ["server-01"]
    assert shell.complete("manifold export vo") == ["voters"]
    script = shell.ok("completion", "bash")
    assert "compopt -o nospace" in script
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr


# -- what is hurt ---------------------------------------------------------------------------------


def test_without_a_cluster_verbs_exit_3_and_completion_is_silent(
    manifold_environment: dict[str, str], tmp_path: Path
) -> None:
    shell = Shell(manifold_environment, tmp_path)
    for verb in ("ls /", "cat /version", "tail -f /log", "watch /nodes", "export nodes", "ls"):
        status, printed, _ = shell(*verb.split(), "--json")
        assert status == 3, verb
        assert json.loads(printed)["error"]["code"] == "no_cluster"
    assert shell.complete("manifold cat /") == []


def test_a_node_that_is_silent_is_named_and_the_rest_is_told(
    manifold_clusters: Start, tmp_path: Path
) -> None:
    cluster = manifold_clusters(4)
    shell = Shell(dict(cluster.environ), tmp_path)
    client = cluster.client("rpi4-01")
    told: list[str] = []
    space = Namespace(client, warn=told.append)
    with shell.following("watch", "/nodes/server-01/state") as watch:
        assert next_line(watch) == "/nodes/server-01/state = ready"
        cluster.pause("server-01")
        assert next_line(watch) in (
            "/nodes/server-01/state = suspect", "/nodes/server-01/state = dead",
        )  # fmt: skip
    with pytest.raises(Unavailable, match=r"server-01 does not answer\.") as silent:
        space.read("/nodes/server-01/cpu")
    assert "/nodes/server-01/state" in silent.value.next_step
    assert space.value("/nodes/server-01/state") in ("suspect", "dead")
    assert "alias: server-01\n" in space.read("/nodes/server-01/status")
    assert [entry.name for entry in space.list("/nodes")] == cluster.aliases
    assert space.read("/log")
    cluster.resume("server-01")


def test_what_is_followed_outlives_a_restart_of_its_node(
    manifold_clusters: Start, tmp_path: Path
) -> None:
    cluster = manifold_clusters(2)
    shell = Shell(dict(cluster.environ), tmp_path)
    alias = cluster.aliases[-1]
    with (
        shell.following("tail", "-f", "-n", "1", f"/nodes/{alias}/log") as tail,
        shell.following("watch", f"/nodes/{alias}/pid") as watch,
    ):
        assert next_line(tail)
        assert next_line(watch) == f"/nodes/{alias}/pid = {cluster.pid(alias)}"
        old = cluster.kill(alias)
        assert tail.stdout is not None
        assert any("boot 2 of" in line for line in tail.stdout)
        line = next_line(watch)
        assert line == f"/nodes/{alias}/pid = {cluster.pid(alias)}"
        assert str(old) not in line
