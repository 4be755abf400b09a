"""`connect(up=N)`: a program's own cluster is there while it needs it, and never after."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import manifold
from manifold.kernel import places
from manifold.kernel.errors import ConfigError, NoCluster, Refused
from manifold.shells.sdk.lifetime import OwnedClient
from manifold.tools.emulator import record
from manifold.tools.emulator.testing import TestCluster

Environment = dict[str, str]
EXAMPLES = Path(__file__).parents[2] / "examples"
COLLATZ, FOREVER = EXAMPLES / "collatz.ent", EXAMPLES / "forever.ent"
PATIENCE_S = 30.0
HEAD = "import manifold, manifold.kernel.errors, multiprocessing, os, sys, time\n"


def until(condition: Callable[[], object], what: str) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {PATIENCE_S} s: {what}"
        time.sleep(0.01)


@pytest.fixture
def environment(manifold_environment: Environment) -> Iterator[Environment]:
    """Of a program that nobody named a cluster for; in the end nothing may be left."""
    del manifold_environment["MANIFOLD_CLUSTER"]
    yield manifold_environment
    found = left(manifold_environment)
    for pid in processes(manifold_environment):  # a test that failed leaves nothing either
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not found, f"left behind: {found}"


def processes(environment: Environment) -> list[int]:
    """Whatever runs with this test's state folder in its environment."""
    mark = os.fsencode(f"MANIFOLD_STATE_HOME={environment['MANIFOLD_STATE_HOME']}")
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return [pid for pid in found if record.start_time(pid) >= 0]


def left(environment: Environment) -> list[str]:
    """What there is of any cluster."""
    folders = [Path(environment[f"MANIFOLD_{name}"]) for name in ("STATE_HOME", "RUNTIME_DIR")]
    there = [path for folder in folders if folder.exists() for path in folder.iterdir()]
    return [*map(str, processes(environment)), *map(str, there)]


def python(environment: Environment, program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HEAD + program], env=environment, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip


@contextmanager
def running(environment: Environment, program: str) -> Iterator[subprocess.Popen[str]]:
    """A program that has printed its first line; it is killed in the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD + program], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=PATIENCE_S)


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


# -- every way a program ends ---------------------------------------------------------------------


def test_a_cluster_is_there_in_the_block_and_nothing_of_it_after(environment: Environment) -> None:
    done = python(
        environment,
        f"with manifold.connect(up=3) as m:\n"
        f"    print(len(m.nodes()), m.parallel_for({str(COLLATZ)!r}, 1, 1000, reduce='max'))\n"
        f"print(os.listdir(os.environ['MANIFOLD_STATE_HOME']))",
    )
    assert done.returncode == 0
    assert done.stdout + done.stderr == "3 178\n[]\n"  # the supervisor has no say on the terminal


@pytest.mark.parametrize("job", ["", f"m.job({str(FOREVER)!r}, 0, 4)"])
def test_a_program_that_just_ends_takes_it_down(environment: Environment, job: str) -> None:
    done = python(environment, f"m = manifold.connect(up=2)\n{job}\nprint(len(m.nodes()))")
    assert left(environment) == []  # at once: whoever waits for the program waits for this
    assert (done.returncode, done.stdout, done.stderr) == (0, "2\n", "")


def test_a_program_that_raises_takes_it_down(environment: Environment) -> None:
    done = python(environment, "m = manifold.connect(up=2)\nraise ValueError('mine')")
    assert left(environment) == []
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback") and done.stderr.endswith("ValueError: mine\n")
    assert done.stderr.count("Traceback") == 1


def test_one_ctrl_c_ends_program_and_cluster(environment: Environment) -> None:
    program = (
        f"m = manifold.connect(up=2)\nfuture = m.job({str(FOREVER)!r}, 0, 4)\n"
        f"m.wait(future, lambda _: print('computing', flush=True))"
    )
    with running(environment, program) as process:
        assert first_line(process) == "computing"
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
        assert process.wait(PATIENCE_S) == -signal.SIGINT
        assert left(environment) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_program_that_is_killed_leaves_nothing(
    environment: Environment, number: signal.Signals
) -> None:
    program = "m = manifold.connect(up=2)\nprint(m.cluster, flush=True)\ntime.sleep(60)"
    with running(environment, program) as process:
        assert first_line(process).startswith(f"up-{process.pid}-")
        process.send_signal(number)
        process.wait(PATIENCE_S)
        until(lambda: not left(environment), "the cluster has ended by itself")


def test_a_child_that_outlives_its_killed_program_does_not_keep_the_cluster(
    environment: Environment,
) -> None:
    program = (
        "m = manifold.connect(up=2)\n"
        "context = multiprocessing.get_context('fork')\n"
        "child = context.Process(target=time.sleep, args=(60,))\n"
        "child.start()\nprint(child.pid, flush=True)\nchild.join()"
    )
    with running(environment, program) as process:
        child = int(first_line(process))
        process.kill()
        process.wait(PATIENCE_S)
        until(lambda: processes(environment) == [child], "the cluster has ended by itself")
        until(lambda: not os.listdir(environment["MANIFOLD_STATE_HOME"]), "and its state")
        os.kill(child, signal.SIGKILL)
        until(lambda: not processes(environment), "the child has ended")


def test_a_child_that_ends_does_not_end_its_parents_cluster(environment: Environment) -> None:
    program = (
        "m = manifold.connect(up=2)\n"
        "context = multiprocessing.get_context('fork')\n"
        "child = context.Process(target=m.close)\n"
        "child.start(); child.join()\n"
        "print(child.exitcode, len(m.nodes()))\nm.close()"
    )
    done = python(environment, program)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 2\n", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_program_that_is_ended_while_its_cluster_starts_leaves_nothing(
    environment: Environment, number: signal.Signals
) -> None:
    with running(environment, "manifold.connect(up=2)\ntime.sleep(60)") as process:
        until(lambda: len(processes(environment)) > 1, "the supervisor has been started")
        process.send_signal(number)
        process.wait(PATIENCE_S)
        until(lambda: not left(environment), "what had started has ended")


def test_a_supervisor_that_is_killed_leaves_nothing_once_the_client_closes(
    environment: Environment,
) -> None:
    client = manifold.connect(up=2, environ=environment)
    held = record.holder(places.cluster_dir(client.cluster, environment))
    assert held is not None
    os.kill(held.pid, signal.SIGKILL)
    client.close()
    assert left(environment) == []


# -- whose cluster it is --------------------------------------------------------------------------


def test_a_cluster_that_runs_is_used_and_left_alone(environment: Environment) -> None:
    environment["MANIFOLD_CLUSTER"] = "mine"
    cluster = TestCluster(2, environment)
    try:
        with manifold.connect(up=3, environ=environment) as client:
            assert not isinstance(client, OwnedClient)
            assert len(client.nodes()) == 2
        with manifold.connect(environ=environment) as client:
            assert len(client.nodes()) == 2
    finally:
        cluster.close()
    remove(environment, "mine")


def remove(environment: Environment, cluster: str) -> None:
    """The state of a cluster with a name, which it keeps."""
    shutil.rmtree(places.cluster_dir(cluster, environment))


def test_two_programs_side_by_side_have_a_cluster_each(environment: Environment) -> None:
    with (
        manifold.connect(up=1, environ=environment) as one,
        manifold.connect(up=2, environ=environment) as two,
    ):
        assert one.cluster != two.cluster
        assert (len(one.nodes()), len(two.nodes())) == (1, 2)
        with pytest.raises(NoCluster):
            manifold.connect(environ=environment)


def test_a_program_finds_its_own_cluster_without_a_name(environment: Environment) -> None:
    done = python(
        environment,
        "with manifold.connect(up=2) as m:\n"
        "    with manifold.connect() as other:\n"
        "        print(other.cluster == m.cluster)\n"
        "    print(len(m.nodes()))\n"
        "try:\n    manifold.connect()\nexcept manifold.kernel.errors.ManifoldError as e:\n"
        "    print(e.code)",
    )
    assert (done.stdout, done.stderr) == ("True\n2\nno_cluster\n", "")


def test_a_named_cluster_is_started_once_and_found_by_others(environment: Environment) -> None:
    clients: list[manifold.Client] = []
    errors: list[BaseException] = []

    def connect() -> None:
        try:
            clients.append(manifold.connect("ours", up=2, environ=environment))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=connect) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    try:
        assert not errors
        owners = [client for client in clients if isinstance(client, OwnedClient)]
        assert len(owners) == 1
        assert {client.cluster for client in clients} == {"ours"}
    finally:
        for client in sorted(clients, key=lambda client: isinstance(client, OwnedClient)):
            client.close()
    assert processes(environment) == []
    remove(environment, "ours")


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("up", "kind"), [(-1, ValueError), (5000, ValueError), (2.0, TypeError), (True, TypeError)]
)
def test_what_is_no_number_of_nodes_is_refused(
    environment: Environment, up: int, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match="up is a number of nodes"):
        manifold.connect(up=up, environ=environment)


def test_a_configuration_that_is_refused_says_why_and_leaves_nothing(
    environment: Environment, tmp_path: Path
) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("scheduler: {grain: fast}\n")
    environment["MANIFOLD_CONFIG"] = str(file)
    with pytest.raises(ConfigError, match=r"bad\.yaml:1:\d+: .*grain"):
        manifold.connect(up=2, environ=environment)
    assert left(environment) == []


def test_a_name_that_is_none_is_refused_before_anything_starts(environment: Environment) -> None:
    with pytest.raises(Refused, match="no name of a cluster"):
        manifold.connect("../up", up=2, environ=environment)


@pytest.mark.parametrize("cluster", ["", "ours"])
def test_a_state_folder_that_cannot_be_made_is_refused_with_what_to_do(
    environment: Environment, tmp_path: Path, cluster: str
) -> None:
    (tmp_path / "file").touch()
    elsewhere = environment | {"MANIFOLD_STATE_HOME": str(tmp_path / "file" / "state")}
    with pytest.raises(Refused, match=r"cannot be made: Not a directory.*MANIFOLD_STATE_HOME"):
        manifold.connect(cluster, up=1, environ=elsewhere)


def test_a_preferred_node_that_is_not_there_is_no_obstacle(environment: Environment) -> None:
    with manifold.connect(up=1, node="nobody-01", environ=environment) as client:
        assert [node.alias for node in client.nodes()] == [client.node]  # a wish, no condition


def test_what_was_left_by_a_program_and_supervisor_both_killed_is_removed_later(
    environment: Environment,
) -> None:
    state = Path(environment["MANIFOLD_STATE_HOME"])
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                          capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
    old, young, living, other = (
        state / f"up-{gone}-00000000",
        state / f"up-{gone}-00000001",
        state / f"up-{os.getpid()}-00000000",
        state / "up-to-date",
    )
    for folder in (old, young, living, other):
        folder.mkdir(parents=True)
        (folder / "supervisor.lock").touch()
    for folder in (old, living, other):
        os.utime(folder, (0, 0))
    with manifold.connect(up=1, environ=environment):
        assert [folder.exists() for folder in (old, young, living, other)] == [False] + [True] * 3
    for name in (young.name, living.name, other.name):
        remove(environment, name)
