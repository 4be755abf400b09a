"""The pytest plugin, as a project of somebody else's uses it: real runs of pytest in a folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from manifold.tools.emulator.testing import processes_of
from manifold.tools.testing.run_folder import base, digest

RUN_S = 100.0


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A folder of its own, whose run knows nothing of the one that we are in."""
    for name in list(os.environ):
        if name.startswith("PYTEST_XDIST"):
            monkeypatch.delenv(name)
    return pytester


def ran(project: pytest.Pytester, *flags: str) -> pytest.RunResult:
    return project.runpytest_subprocess("-p", "no:cacheprovider", *flags, timeout=RUN_S)


def folders(run: str) -> list[Path]:
    return list(base().glob(f"{digest(run)}-*"))


# -- clusters ---------------------------------------------------------------------------------


def test_a_test_has_the_cluster_that_its_marker_asks_for(project: pytest.Pytester) -> None:
    project.makepyfile("""
        import pytest

        @pytest.mark.manifold(nodes=4, classes={"big": {"count": 1, "cores": 2}, "small": 3})
        def test_classes(manifold_cluster):
            assert manifold_cluster.aliases == ["big-01", "small-01", "small-02", "small-03"]
            with manifold_cluster.client() as m:
                assert sum(node.cores for node in m.nodes()) == 5
                m.globals["x"] = 7
                assert m.map(abs, [-1, -2]) == [1, 2]
            assert "7" in manifold_cluster.command("get", "/globals/x").stdout

        def test_without_a_marker(manifold_cluster):
            assert len(manifold_cluster.aliases) == 3

        def test_several(manifold_clusters):
            one, two = manifold_clusters(1), manifold_clusters(2, seed=7)
            one.client().globals["x"] = 1
            assert "x" not in two.client().globals
            assert two.seed == 7 and len(two.aliases) == 2
    """)
    project.makeini("[pytest]\nfilterwarnings = error\n")
    ran(project).assert_outcomes(passed=3)


def test_settings_say_how_many_nodes_there_are_where_a_test_does_not(
    project: pytest.Pytester,
) -> None:
    project.makeini("[pytest]\nmanifold_nodes = 2\nmanifold_shared_nodes = 1\n")
    project.makepyfile("""
        def test_own(manifold_cluster):
            assert len(manifold_cluster.aliases) == 2

        def test_shared(manifold_shared_cluster):
            assert len(manifold_shared_cluster.aliases) == 1
    """)
    ran(project).assert_outcomes(passed=2)


@pytest.mark.parametrize(
    ("marker", "fixture", "says"),
    [
        ("nodez=3", "manifold_cluster", "no argument 'nodez'"),
        ("nodes=-3", "manifold_cluster", "no number of nodes"),
        ("classes={'a': {'colour': 1}}", "manifold_cluster", "colour"),
        ("overrides={'no.key': '1'}", "manifold_cluster", "no.key"),
        ("nodes=3", "manifold_shared_cluster", "that of all tests"),
    ],
)
def test_a_wrong_marker_is_told_in_one_sentence(
    project: pytest.Pytester, marker: str, fixture: str, says: str
) -> None:
    project.makepyfile(f"""
        import pytest

        @pytest.mark.manifold({marker})
        def test_wrong({fixture}):
            pass
    """)
    result = ran(project)
    result.assert_outcomes(errors=1)
    said = result.stdout.str()
    assert says in said
    assert "Traceback" not in said and "_pytest/" not in said


def test_a_shared_cluster_is_one_for_a_process_and_whole_for_each_test(
    project: pytest.Pytester,
) -> None:
    project.makepyfile("""
        import pytest

        seen = []

        def test_hurts_it(manifold_shared_cluster):
            cluster = manifold_shared_cluster
            seen.append([cluster.pid(alias) for alias in cluster.aliases])
            cluster.pause(0)
            cluster.cut([1], [2, 3])
            cluster.fill_disk(2)
            cluster.clock_skew(3, jump_ms=5000, rate=2.0)
            cluster.kill(1)
            assert False, "so that it ends here"

        def test_finds_it_whole(manifold_shared_cluster):
            cluster = manifold_shared_cluster
            now = [cluster.pid(alias) for alias in cluster.aliases]
            assert [a == b for a, b in zip(seen[0], now)] == [True, False, False, True]
            for number in range(4):
                client = cluster.client(number)
                client.globals[f"x{number}"] = number
                assert {node.state for node in client.nodes()} == {"ready"}
    """)
    result = ran(project)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*manifold: events of *", "*pause node-01*", "*disk of node-03*"])


# -- failures ---------------------------------------------------------------------------------


def test_a_failure_shows_seed_events_and_logs_and_the_seed_repeats_it(
    project: pytest.Pytester,
) -> None:
    project.makepyfile("""
        import pytest

        @pytest.mark.manifold(nodes=3)
        def test_fails(manifold_cluster):
            victim = manifold_cluster.random.choice(manifold_cluster.aliases)
            manifold_cluster.note(f"chose {victim} and {manifold_cluster.random.random()}")
            manifold_cluster.restart(victim)
            assert False
    """)
    said = ran(project, "--manifold-logs=kept").stdout.str()
    seed = re.search(r"seed (\d+); the same again: pytest --manifold-seed=\1 '(.*)'", said)
    assert seed is not None, said
    chosen = re.search(r"chose (node-\d+) and (\S+)", said)
    assert chosen is not None
    assert f"kill {chosen[1]}" in said and f"{chosen[1]} is back, boot 2" in said
    for alias in ("node-01", "node-02", "node-03"):
        assert f"manifold: log of {alias}" in said
    assert said.count("boot 1 of node-0") == 3
    kept = list(project.path.glob("kept/*/*/node-0?/node.log"))
    assert len(kept) == 3
    again = ran(project, f"--manifold-seed={seed[1]}", seed[2]).stdout.str()
    assert chosen[0] in again


def test_a_cluster_that_does_not_come_up_shows_its_logs(project: pytest.Pytester) -> None:
    project.makepyfile("""
        from manifold.kernel import places

        def test_never_up(manifold_clusters, manifold_environment):
            name = manifold_environment["MANIFOLD_CLUSTER"] + "a"
            folder = places.state_dir(name, "node-01", manifold_environment)
            folder.mkdir(parents=True, mode=0o700)
            (folder / "key").mkdir()
            (folder / "boot").write_bytes(b"torn")
            manifold_clusters(1)
    """)
    result = ran(project)
    result.assert_outcomes(failed=1)
    assert "manifold: log of node-01" in result.stdout.str()


# -- workers and runs -------------------------------------------------------------------------

MANY = """
    import os
    import pytest

    @pytest.mark.parametrize("number", range(6))
    def test_shared(manifold_shared_cluster, number, record_property):
        client = manifold_shared_cluster.client()
        assert client.globals.add("count", 1) < 6  # of this worker's tests alone
        assert os.environ.get("PYTEST_XDIST_WORKER", "main") in manifold_shared_cluster.name

    @pytest.mark.parametrize("number", range(2))
    def test_own(manifold_cluster, number):
        assert manifold_cluster.client().globals.add("count", 1) == 0
"""


def test_any_number_of_workers_and_runs_side_by_side_do_not_meet(
    project: pytest.Pytester,
) -> None:
    project.makepyfile(MANY)
    name = os.urandom(8).hex()
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *flags],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=project.path,
        )
        for flags in (["-n", "3", f"--testrunuid={name}"], ["-n", "2", f"--testrunuid={name}"], [])
    ]  # fmt: skip
    for each in runs:
        out, _ = each.communicate(timeout=RUN_S)
        assert each.returncode == 0, out.decode()
        assert b"8 passed" in out
    assert folders(name) == []


def test_what_a_crashed_worker_left_is_removed(project: pytest.Pytester) -> None:
    project.makepyfile("""
        import os, signal, pathlib
        import pytest

        @pytest.mark.manifold(nodes=2)
        def test_crashes(manifold_cluster):
            runtime = manifold_cluster.supervisor.runtime_dir
            pathlib.Path("runtime").write_text(f"{runtime}")
            os.kill(os.getpid(), signal.SIGKILL)

        def test_goes_on(manifold_cluster):
            pass
    """)
    result = ran(project, "-n", "1")
    result.assert_outcomes(passed=1, failed=1)
    runtime = Path((project.path / "runtime").read_text())
    ran(project, "-k", "goes_on").assert_outcomes(passed=1, deselected=1)
    assert not runtime.parent.exists()
    assert processes_of(str(runtime)) == []


def test_who_uses_none_of_it_pays_nothing(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = os.urandom(8).hex()
    monkeypatch.setenv("PYTEST_XDIST_TESTRUNUID", name)
    project.makepyfile("""
        import sys

        def test_nothing_of_the_os_is_imported():
            found = [name for name in sys.modules if name.startswith("manifold.")]
            assert [name for name in found if ".testing" not in name] == [
                "manifold.vm", "manifold.vm.version", "manifold.tools"
            ]
    """)
    project.makeconftest("""
        def pytest_sessionfinish(session):
            import hashlib, os, pathlib
            name = hashlib.sha256(os.environ["PYTEST_XDIST_TESTRUNUID"].encode()).hexdigest()[:6]
            assert not list(pathlib.Path(f"/tmp/mfp-{os.geteuid()}").glob(f"{name}-*"))
    """)
    ran(project).assert_outcomes(passed=1)
