"""The command line as its users and their scripts meet it: a contract, verb by verb."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from manifold.shells.cli.table import VERBS
from manifold.tools.emulator.testing import TestCluster

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
COLLATZ = str(EXAMPLES / "collatz.ent")
FOREVER = str(EXAMPLES / "forever.ent")
TRAP = str(EXAMPLES / "trap.ent")
Environment = dict[str, str]


class Shell:
    """Runs `manifold` in a folder that has no manifold.yaml."""

    def __init__(self, environment: Environment, folder: Path) -> None:
        self.environment = environment
        self.folder = folder

    def __call__(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "manifold", *arguments], env=self.environment | more,
            cwd=self.folder, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
        return done

    def ok(self, *arguments: str, **more: str) -> str:
        done = self(*arguments, **more)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def json(self, *arguments: str) -> Any:
        return json.loads(self.ok(*arguments, "--json"))

    def error(self, code: int, *arguments: str) -> dict[str, str]:
        """A refusal under --json: one object on standard output, nothing else."""
        done = self(*arguments, "--json")
        assert done.returncode == code, (arguments, done.stdout, done.stderr)
        found = json.loads(done.stdout)
        assert list(found) == ["error"]
        assert set(found["error"]) == {"code", "message", "next"}
        assert found["error"]["message"]
        error: dict[str, str] = found["error"]
        return error


@pytest.fixture(scope="module")
def cluster() -> Iterator[TestCluster]:
    folder = Path(tempfile.mkdtemp(prefix="mf-"))
    environment = os.environ | {
        "MANIFOLD_STATE_HOME": str(folder / "state"),
        "MANIFOLD_RUNTIME_DIR": str(folder / "run"),
        "MANIFOLD_CLUSTER": f"c{secrets.token_hex(4)}",
    }
    cluster = TestCluster(4, environment)
    try:
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(folder)


@pytest.fixture
def shell(cluster: TestCluster, tmp_path: Path) -> Shell:
    """On the cluster that is up."""
    return Shell(dict(cluster.environ), tmp_path)


@pytest.fixture
def alone(manifold_environment: Environment, tmp_path: Path) -> Iterator[Shell]:
    """Where no cluster is up (and none is left up)."""
    shell = Shell(manifold_environment, tmp_path)
    yield shell
    shell.ok("down", "--yes")


# -- what answers ---------------------------------------------------------------------------------


def test_node_ls_lists_every_node(shell: Shell, cluster: TestCluster) -> None:
    nodes = shell.json("node", "ls")
    assert [node["alias"] for node in nodes] == cluster.aliases
    for node in nodes:
        assert re.fullmatch(r"K-[0-9a-f]{32}", node["id"])
        assert node["class"] == node["alias"].rpartition("-")[0]
        assert node["state"] == "ready"
        assert node["pid"] == cluster.pid(node["alias"])
        assert node["address"].startswith("ipc:///")
        assert node["load"]["slots"] == node["cores"]
        assert node["bad_messages"] == 0
    table = shell.ok("node", "ls").splitlines()
    assert table[0].split()[:4] == ["ALIAS", "ID", "CLASS", "STATE"]
    assert [line.split()[0] for line in table[1:]] == cluster.aliases


def test_node_inspect_says_what_a_node_and_its_host_are(shell: Shell) -> None:
    found = shell.json("node", "inspect", "server-01")
    assert found["alias"] == "server-01"
    assert found["host"]
    assert "server-01" in shell.ok("node", "inspect", "server-01")


def test_status_counts_nodes_workers_and_jobs(shell: Shell, cluster: TestCluster) -> None:
    found = shell.json("status")
    assert found["cluster"] == cluster.name
    assert (found["nodes"], found["ready"], found["dead"]) == (4, 4, 0)
    assert found["converged"] is True
    assert "4 of 4 nodes ready" in shell.ok("status")


@pytest.mark.parametrize(
    ("how", "result"),
    [
        ("sum", 84),
        ("min", 0),
        ("max", 19),
        ("count", 9),
        ("collect", [0, 1, 7, 2, 5, 8, 16, 3, 19]),
    ],
)
def test_run_gives_its_result(shell: Shell, how: str, result: object) -> None:
    total = sum([0, 1, 7, 2, 5, 8, 16, 3, 19])
    expected = total if how == "sum" else result
    found = shell.json("run", COLLATZ, "--range", "1:10", "--reduce", how)
    assert found["result"] == expected
    assert found["indices"] == 9
    assert re.fullmatch(r"J-[0-9a-f]{16}", found["job"])


def test_run_prints_for_people_what_it_computed_and_how(shell: Shell) -> None:
    done = shell("run", COLLATZ, "--range", "1:1_000", "--reduce", "max")
    assert done.returncode == 0
    assert done.stdout == "178\n"
    assert re.search(r"J-[0-9a-f]{16}: 999 indices in .*, \d+ shards, 0 retries", done.stderr)


def test_run_in_the_seeds_dialect_gives_pairs_in_order(shell: Shell) -> None:
    program = str(EXAMPLES / "seed_collatz.json")
    found = shell.json("run", program, "--range", "100:110")["result"]
    assert [pair[0] for pair in found] == list(range(100, 110))
    assert found[0] == [100, 25]


def test_run_with_arguments_on_a_node_of_a_class(shell: Shell, tmp_path: Path) -> None:
    program = tmp_path / "scaled.ent"
    program.write_text(".cells 2\n.arguments f64\nLOAD 0\nLOAD 1\nMUL\nEMIT\nHALT\n")
    found = shell.json(
        "run", str(program), "--range", "0:4", "--args", "0.5", "--class", "rpi5", "--why"
    )
    assert found["result"] == [0, 0.5, 1, 1.5]
    assert found["why"]
    assert {c["node_class"] for why in found["why"] for c in why["candidates"]} == {"rpi5"}


def test_jobs_ps_why_and_kill_speak_of_the_same_job(shell: Shell) -> None:
    job = shell.ok("run", FOREVER, "--range", "0:2", "--detach").strip()
    assert re.fullmatch(r"J-[0-9a-f]{16}", job)
    deadline = time.monotonic() + 20
    while not (processes := [p for p in shell.json("ps") if p["job"] == job]):
        assert time.monotonic() < deadline
    assert {"node", "slot", "pid", "shard", "state"} <= set(processes[0])
    assert job in shell.ok("ps")
    (listed,) = [each for each in shell.json("jobs") if each["job"] == job]
    assert (listed["state"], listed["done"], listed["total"]) == ("running", 0, 2)
    assert job in shell.ok("jobs")
    assert job in shell.ok("why", job) or "shard" in shell.ok("why", job)
    assert shell.json("why", job)
    assert shell.json("kill", job)["state"] == "cancelled"
    assert job not in shell.ok("jobs")
    assert job in shell.ok("jobs", "--all")


def test_kill_of_a_job_that_is_done_says_so(shell: Shell) -> None:
    job = shell.json("run", COLLATZ, "--range", "1:10")["job"]
    assert "had ended already: done" in shell.ok("kill", job)


def test_logs_are_merged_and_filtered(shell: Shell, cluster: TestCluster) -> None:
    lines = shell.ok("logs", "--grep", "boot 1 of").splitlines()
    assert sorted(line.split()[0] for line in lines) == cluster.aliases
    times = [line.split()[1] for line in lines]
    assert times == sorted(times)
    (entry,) = [
        json.loads(line)
        for line in shell.ok(
            "logs", "--node", "server-01", "--grep", "boot 1 of", "--json"
        ).splitlines()
    ]
    assert entry["node"] == "server-01"
    assert len(shell.ok("logs", "-n", "3").splitlines()) == 3


def test_logs_follow_what_happens_and_end_with_ctrl_c(shell: Shell) -> None:
    follower = subprocess.Popen(
        [sys.executable, "-u", "-m", "manifold", "logs", "-f", "--grep", " done"],
        env=shell.environment, cwd=shell.folder, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        job = shell.json("run", COLLATZ, "--range", "1:10")["job"]
        assert follower.stdout is not None
        assert any(job in line for line in follower.stdout)
        follower.send_signal(signal.SIGINT)
        _, said = follower.communicate(timeout=20)
        assert follower.returncode == 130
        assert "Traceback" not in said
    finally:
        follower.kill()
        follower.communicate()


def test_asm_says_what_a_program_is(shell: Shell) -> None:
    found = shell.json("asm", COLLATZ)
    assert found["kid"].startswith("K-")
    assert found["instructions"] > 5
    assert found["kid"] in shell.ok("asm", COLLATZ)


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.ent")))
def test_disasm_assembles_to_the_same_instructions(shell: Shell, tmp_path: Path, name: str) -> None:
    once = tmp_path / "once.ent"
    once.write_text(shell.ok("disasm", str(EXAMPLES / name)))
    assert shell.ok("disasm", str(once)) == once.read_text()
    first, second = shell.json("asm", str(EXAMPLES / name)), shell.json("asm", str(once))
    assert first["instructions"] == second["instructions"]
    assert "(module" in shell.ok("disasm", "--wat", str(once))


@pytest.mark.parametrize("kind", ["bash", "zsh", "fish"])
def test_completion_is_a_script_for_the_shell(shell: Shell, kind: str) -> None:
    assert "_MANIFOLD_COMPLETE" in shell.ok("completion", kind)


def test_completion_knows_verbs_and_options(shell: Shell) -> None:
    asked = {"_MANIFOLD_COMPLETE": "bash_complete", "COMP_WORDS": "manifold sta", "COMP_CWORD": "1"}
    assert "plain,status" in shell.ok(**asked)
    asked |= {"COMP_WORDS": "manifold run --red", "COMP_CWORD": "2"}
    assert "plain,--reduce" in shell.ok(**asked)


def test_version_names_what_runs(shell: Shell) -> None:
    found = shell.json("version")
    assert found["python"] == sys.version.split()[0]
    assert found["manifold"] in shell.ok("version")


def test_help_names_every_verb_in_its_group(shell: Shell) -> None:
    said = shell.ok("--help")
    for verb in VERBS:
        assert re.search(rf"^  {verb}\b", said, re.MULTILINE), verb


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_has_a_help_page_and_a_usage_line(shell: Shell, verb: str) -> None:
    said = shell.ok(verb, "--help")
    assert said.startswith(f"Usage: manifold {verb}")


# -- what fails -----------------------------------------------------------------------------------

WRONG = [
    (2, ["flurb"]), (2, ["--flurb"]), (2, ["--cluster"]), (2, ["run"]), (2, ["run", "nothing.ent"]),
    (2, ["run", COLLATZ, "--range", "5"]), (2, ["run", COLLATZ, "--range", "5:1"]),
    (2, ["run", COLLATZ, "--range", "a:b"]), (2, ["run", COLLATZ, "--range", f"0:{1 << 64}"]),
    (2, ["run", COLLATZ, "--range", ":"]), (2, ["run", COLLATZ, "--reduce", "mean"]),
    (2, ["run", COLLATZ, "--args", "x"]), (2, ["run", COLLATZ, "--args", "1e", "--json"]),
    (2, ["run", COLLATZ, "--timeout", "soon"]), (2, ["run", COLLATZ, "--timeout", "-1"]),
    (2, ["run", COLLATZ, "--timeout", "nan"]), (2, ["run", COLLATZ, "extra"]),
    (2, ["node"]), (2, ["node", "flurb"]), (2, ["node", "inspect"]), (4, ["node", "inspect", "x"]),
    (2, ["kill"]), (2, ["kill", "x"]), (4, ["kill", "J-0123456789abcdef"]), (2, ["why"]),
    (2, ["why", "J-1"]), (4, ["why", "J-0123456789abcdef"]), (2, ["logs", "-n", "0"]),
    (4, ["logs", "--node", "nowhere"]), (4, ["metrics", "nowhere"]),
    (2, ["metrics", "--targets", "rpi4-01"]), (2, ["metrics", "--json", "--openmetrics"]),
    (2, ["metrics", "-o", "/dev/null/x"]), (2, ["profile"]), (4, ["profile", "nowhere"]),
    (2, ["profile", "rpi4-01", "--seconds", "61"]), (2, ["profile", "rpi4-01", "--hz", "0"]),
    (2, ["profile", "rpi4-01", "--folded", "--json"]),
    (2, ["profile", "rpi4-01", "--seconds", "0.1", "-o", "/dev/null/x"]),
    (2, ["asm"]), (2, ["asm", "nothing.ent"]),
    (2, ["asm", "."]), (2, ["disasm", "/dev/null/x"]), (2, ["completion", "csh"]),
    (2, ["up", "--nodes", "0"]), (2, ["up", "--nodes", "many"]), (2, ["up", "--set", "grain"]),
    (2, ["up", "--set", "scheduler.grian=10ms"]), (2, ["up", "--config", "nothing.yaml"]),
    (2, ["agent", "--class", "cray"]), (4, ["agent", "--alias", "../x"]),
    (4, ["--cluster", "no/such", "status"]), (3, ["--cluster", "nowhere", "status"]),
]  # fmt: skip


@pytest.mark.parametrize(("code", "arguments"), WRONG, ids=[" ".join(w[1])[-50:] for w in WRONG])
def test_a_wrong_command_says_what_is_wrong(shell: Shell, code: int, arguments: list[str]) -> None:
    done = shell(*arguments)
    assert done.returncode == code, done.stdout + done.stderr
    if "--json" in arguments:
        assert json.loads(done.stdout)["error"]["message"]
    else:
        assert re.search(r"^(error|Usage|nowhere): ", done.stderr, re.MULTILINE), done.stderr
        assert done.stdout == ""


def test_a_wrong_verb_gets_the_nearest_one(shell: Shell) -> None:
    assert "Did you mean `manifold status`?" in shell("stauts").stderr
    assert "`manifold --help` lists all" in shell("qqqq").stderr


def test_wrong_arguments_get_the_usage_line(shell: Shell) -> None:
    said = shell("kill").stderr
    assert said.startswith("Usage: manifold kill [OPTIONS] JOB")
    assert "Usage: manifold run " in shell("run", COLLATZ, "--flurb").stderr


def test_a_program_that_traps_exits_1_and_says_where(shell: Shell) -> None:
    done = shell("run", TRAP, "--range", "0:1000")
    assert done.returncode == 1
    place = r"trap\.ent, line 10, DIV: division by zero at index 500 on \w+-\d\d\.$"
    assert re.search(rf"^error: \S*{place}", done.stderr, re.MULTILINE), done.stderr
    assert "cells: 0: " in done.stderr
    assert shell.error(1, "run", TRAP, "--range", "0:1000")["code"] == "trap"


def test_a_program_over_its_timeout_exits_1(shell: Shell) -> None:
    error = shell.error(1, "run", FOREVER, "--range", "0:2", "--timeout", "0.5")
    assert error["code"] == "exhausted"


def test_a_job_no_node_may_run_exits_1_with_the_reasons(shell: Shell) -> None:
    error = shell.error(1, "run", COLLATZ, "--on", "nowhere-01")
    assert error["code"] == "unavailable"


def test_a_program_that_is_wrong_is_refused_with_its_line(shell: Shell, tmp_path: Path) -> None:
    program = tmp_path / "wrong.ent"
    program.write_text(".cells 1\nPOP\nHALT\n")
    for verb in (["run"], ["asm"], ["disasm"]):
        error = shell.error(2, *verb, str(program))
        assert error["code"] == "invalid_program"
        assert "line 2" in error["message"]


def test_refusals_exit_4_with_what_to_do(shell: Shell) -> None:
    error = shell.error(4, "kill", "J-0123456789abcdef")
    assert error["code"] == "not_found"
    assert shell.error(4, "node", "inspect", "nowhere")["next"]


def test_usage_errors_exit_2(shell: Shell) -> None:
    assert shell.error(2, "flurb")["code"] == "usage"
    assert shell.error(2, "run")["code"] == "usage"


def test_without_a_cluster_every_verb_that_needs_one_exits_3(alone: Shell) -> None:
    for arguments in (
        ["status"], ["node", "ls"], ["node", "inspect", "x"], ["jobs"], ["ps"], ["logs"],
        ["kill", "J-0123456789abcdef"], ["why", "J-0123456789abcdef"],
    ):  # fmt: skip
        error = alone.error(3, *arguments)
        assert error["code"] == "no_cluster"
        assert "manifold up" in error["next"]


def test_run_without_a_cluster_offers_to_start_one(alone: Shell) -> None:
    assert "--up" in alone.error(3, "run", COLLATZ, "--range", "1:10")["next"]
    (alone.folder / "manifold.yaml").write_text("classes:\n  server: {count: 1}\n")
    found = alone.json("run", COLLATZ, "--range", "1:10", "--reduce", "max", "--up")
    assert found["result"] == 19
    assert alone.json("status")["nodes"] == 1


def test_a_job_whose_fate_is_unknown_exits_5(alone: Shell) -> None:
    """Every node is stopped while it runs: nobody can say what became of it."""
    alone.ok("up", "--nodes", "1", "--detach")
    (node,) = alone.json("node", "ls")
    running = subprocess.Popen(
        [sys.executable, "-m", "manifold", "run", FOREVER, "--json"],
        env=alone.environment, cwd=alone.folder, text=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 20
        while not alone.json("jobs"):
            assert time.monotonic() < deadline
        os.kill(node["pid"], signal.SIGSTOP)
        said, _ = running.communicate(timeout=40)
        assert running.returncode == 5
        assert json.loads(said)["error"]["code"] == "maybe"
    finally:
        running.kill()
        running.communicate()
        os.kill(node["pid"], signal.SIGCONT)


def test_a_job_outlives_its_only_node(alone: Shell, tmp_path: Path) -> None:
    """The node is killed; the supervisor starts it again, and the client submits again."""
    alone.ok("up", "--nodes", "1", "--detach")
    (node,) = alone.json("node", "ls")
    program = tmp_path / "slow.ent"
    program.write_text(".cells 1\nSLEEP 0.01\nLOAD 0\nEMIT\nHALT\n")
    running = subprocess.Popen(
        [sys.executable, "-m", "manifold", "run", program, "--range", "0:100", "--reduce", "sum"],
        env=alone.environment, cwd=alone.folder, text=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 20
        while not alone.json("jobs"):
            assert time.monotonic() < deadline
        os.kill(node["pid"], signal.SIGKILL)
        said, _ = running.communicate(timeout=40)
        assert (running.returncode, said) == (0, "4950\n")
    finally:
        running.kill()
        running.communicate()


def test_ctrl_c_cancels_the_job_it_waits_for(shell: Shell) -> None:
    running = subprocess.Popen(
        [sys.executable, "-m", "manifold", "run", FOREVER, "--range", "0:2"],
        env=shell.environment, cwd=shell.folder, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 20
        before = {job["job"] for job in shell.json("jobs") if job["state"] != "running"}
        while not (jobs := [j["job"] for j in shell.json("jobs") if j["job"] not in before]):
            assert time.monotonic() < deadline
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=20)
        assert running.returncode == 130
        assert "Traceback" not in said
        states = {job["job"]: job["state"] for job in shell.json("jobs")}
        assert states[jobs[0]] == "cancelled"
    finally:
        running.kill()
        running.communicate()


def test_a_reader_that_has_seen_enough_is_no_error(shell: Shell) -> None:
    command = f"{sys.executable} -m manifold run {COLLATZ} --range 1:200000 | head -n 1"
    done = subprocess.run(
        command, shell=True, env=shell.environment, cwd=shell.folder, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == "0\n"
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_which_cluster_is_said_by_flag_then_variable_then_file(alone: Shell) -> None:
    def asked(*arguments: str, **more: str) -> str:
        return alone(*arguments, "status", **more).stderr

    (alone.folder / "manifold.yaml").write_text("cluster: from-file\n")
    assert "'from-flag'" in asked("--cluster", "from-flag", MANIFOLD_CLUSTER="from-variable")
    assert "'from-variable'" in asked(MANIFOLD_CLUSTER="from-variable")
    assert "'from-file'" in asked(MANIFOLD_CLUSTER="")
    (alone.folder / "manifold.yaml").unlink()
    assert "'default'" in asked(MANIFOLD_CLUSTER="")


# -- how fast it starts ---------------------------------------------------------------------------

HEAVY = {"textual", "numpy", "wasmtime", "rich", "cryptography", "psutil", "distributed"}
IMPORTED = """
import sys
from manifold.shells.cli.main import run
code = run(sys.argv[1:])
print(code, *sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["ps"], ["node", "ls"], ["jobs"], ["version"]])
def test_verbs_that_only_ask_import_nothing_heavy(shell: Shell, arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, *arguments], env=shell.environment, cwd=shell.folder,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    code, *modules = done.stderr.splitlines()[-1].split()
    assert code == "0", done.stderr
    assert not HEAVY & {name.partition(".")[0] for name in modules}
