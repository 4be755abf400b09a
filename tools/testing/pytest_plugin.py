"""The pytest plugin: a cluster of real processes for a test, or one for all tests of a worker.

Interface rules: fixtures `manifold_cluster` (of the test, as its marker asks), `manifold_clusters`
(started by the test itself), `manifold_shared_cluster` (one per test process),
`manifold_environment` and `manifold_folder` (for tests that run commands); marker
`@pytest.mark.manifold(...)`, see wishes.py; options `--manifold-seed`, `--manifold-logs`; settings
`manifold_nodes` and `manifold_shared_nodes`. docs/testing.md is their page.
Invariants: T1 test processes share nothing: names, sockets and state are in a folder of each
(run_folder.py). T2 whatever a test did to a shared cluster is undone before the next begins. T3 a
pytest run that uses none of it imports nothing of the OS, and makes nothing.
"""

from __future__ import annotations

import os
import re
import secrets
import uuid
import warnings
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from manifold.tools.emulator.testing import TestCluster
    from manifold.tools.testing.run_folder import RunFolder
    from manifold.tools.testing.wishes import Wish

MARKER = "manifold"
SHARED = "manifold_shared_cluster"
DEFAULT_NODES = 3
DEFAULT_SHARED_NODES = 4
RUN_VARIABLE = "PYTEST_XDIST_TESTRUNUID"
SEED_MAX = 1 << 32

_run_key = pytest.StashKey["RunFolder"]()
_folder_key = pytest.StashKey[Path]()  # of a test
_clusters_key = pytest.StashKey["list[TestCluster]"]()  # of a test
_shared_key = pytest.StashKey["tuple[Path, list[TestCluster]]"]()  # of the session


# -- options --------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("manifold", "clusters of Manifold")
    group.addoption(
        "--manifold-seed", type=int, default=None, metavar="N",
        help="Seed of every cluster that has none of its own; a failure's report says its seed.",
    )  # fmt: skip
    group.addoption(
        "--manifold-logs", default="", metavar="DIR",
        help="Keep the logs of the nodes of failed tests, in a folder per test.",
    )  # fmt: skip
    parser.addini(
        "manifold_nodes", "Nodes of a test that does not say.", default=str(DEFAULT_NODES)
    )
    parser.addini(
        "manifold_shared_nodes", "Nodes of manifold_shared_cluster.",
        default=str(DEFAULT_SHARED_NODES),
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        f"{MARKER}(nodes=, classes=, links=, seed=, overrides=, config=, netns=): "
        "the cluster that the fixture manifold_cluster starts for this test.",
    )


def pytest_unconfigure(config: pytest.Config) -> None:
    run = config.stash.get(_run_key, None)
    if run is not None:
        run.close()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker(MARKER) and SHARED in getattr(item, "fixturenames", ()):
        pytest.fail(
            f"@pytest.mark.{MARKER} asks for a cluster of this test alone, and {SHARED} is that of "
            "all tests: take manifold_cluster, or leave out the marker.",
            pytrace=False,
        )


# -- folders --------------------------------------------------------------------------------------


def _worker(config: pytest.Config) -> str:
    given = getattr(config, "workerinput", None)  # of pytest-xdist
    return str(given["workerid"]) if given else "main"


def _run(config: pytest.Config) -> RunFolder:
    """T1: the folder of this test process; what dead ones have left is removed first."""
    run = config.stash.get(_run_key, None)
    if run is None:
        from manifold.tools.testing.run_folder import RunFolder, clean_up

        for failure in clean_up():
            warnings.warn(f"left by an earlier run: {failure}", stacklevel=1)
        given = getattr(config, "workerinput", {}).get("testrunuid", "")
        name = given or os.environ.get(RUN_VARIABLE) or uuid.uuid4().hex
        run = config.stash[_run_key] = RunFolder.open(name, _worker(config))
    return run


@pytest.fixture
def manifold_folder(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder of this test, short enough for sockets; removed with every cluster in it."""
    run = _run(request.config)
    folder = request.node.stash[_folder_key] = run.test_folder()
    yield folder
    run.remove(folder)


@pytest.fixture
def manifold_environment(request: pytest.FixtureRequest, manifold_folder: Path) -> dict[str, str]:
    """The variables with which `manifold` commands and SDK use this test's cluster alone."""
    return _run(request.config).environ(manifold_folder)


# -- clusters -------------------------------------------------------------------------------------


def _setting(config: pytest.Config, name: str) -> int:
    text = str(config.getini(name))
    if not text.isdigit() or int(text) < 1:
        raise pytest.UsageError(f"{name} = {text!r} in the settings is no number of nodes.")
    return int(text)


def _asked(config: pytest.Config, positional: tuple[Any, ...], named: dict[str, Any]) -> Wish:
    """What a marker, or a call, asks for; the run's seed where it has none."""
    import dataclasses

    from manifold.kernel.errors import ConfigError
    from manifold.tools.testing import wishes

    try:
        asked = wishes.wish(positional, named)
    except ConfigError as error:
        pytest.fail(str(error), pytrace=False)
    if asked.seed is None:
        given = config.getoption("--manifold-seed")
        asked = dataclasses.replace(
            asked, seed=secrets.randbelow(SEED_MAX) if given is None else given
        )
    if not (asked.nodes or asked.classes or asked.profile):
        asked = dataclasses.replace(asked, nodes=_setting(config, "manifold_nodes"))
    return asked


def _start(asked: Wish, environ: dict[str, str], folder: Path, **options: Any) -> TestCluster:
    from manifold.kernel.errors import ConfigError
    from manifold.tools.emulator.testing import TestCluster
    from manifold.tools.testing import wishes

    try:
        return TestCluster(
            wishes.count(asked), environ, config=wishes.write(asked, folder),
            overrides=wishes.overrides(asked), seed=asked.seed or 0, netns=asked.netns, **options,
        )  # fmt: skip
    except ConfigError as error:
        pytest.fail(f"The cluster that was asked for is not accepted: {error}", pytrace=False)


@pytest.fixture
def _manifold_start(
    request: pytest.FixtureRequest, manifold_folder: Path, manifold_environment: dict[str, str]
) -> Iterator[Callable[..., TestCluster]]:
    started: list[TestCluster] = request.node.stash.setdefault(_clusters_key, [])

    def start(*nodes: int, **options: Any) -> TestCluster:
        wished = {key: options.pop(key) for key in list(options) if key in _wished()}
        asked = _asked(request.config, nodes, wished)
        environ = dict(manifold_environment)
        environ["MANIFOLD_CLUSTER"] += chr(ord("a") + len(started))
        cluster = _start(asked, environ, manifold_folder, **options)
        started.append(cluster)
        return cluster

    yield start
    for cluster in started:
        cluster.close()


def _wished() -> frozenset[str]:
    from dataclasses import fields

    from manifold.tools.testing.wishes import Wish

    return frozenset(each.name for each in fields(Wish))


@pytest.fixture
def manifold_clusters(_manifold_start: Callable[..., TestCluster]) -> Callable[..., TestCluster]:
    """A function that starts clusters: `start(nodes, ...)`, with the marker's arguments. Further
    ones go to `TestCluster`. Each is taken down in the end, and must have left nothing."""
    return _manifold_start


@pytest.fixture
def manifold_cluster(
    request: pytest.FixtureRequest, _manifold_start: Callable[..., TestCluster]
) -> TestCluster:
    """The cluster of this test, as its marker asks; its nodes see each other."""
    marker = request.node.get_closest_marker(MARKER)
    if marker is None:
        return _manifold_start()
    _asked(request.config, marker.args, marker.kwargs)  # what is wrong is told before all else
    return _manifold_start(*marker.args, **marker.kwargs)


@pytest.fixture(scope="session")
def manifold_shared_cluster(request: pytest.FixtureRequest) -> Iterator[TestCluster]:
    """One cluster for every test of this process that wants it; faults are undone after each."""
    config = request.config
    run = _run(config)
    folder = run.test_folder()
    shared: list[TestCluster] = []
    config.stash[_shared_key] = (folder, shared)
    asked = _asked(config, (_setting(config, "manifold_shared_nodes"),), {})
    cluster = _start(asked, run.environ(folder), folder)
    cluster.shared = True
    shared.append(cluster)
    yield cluster
    cluster.close()
    run.remove(folder)


@pytest.fixture(autouse=True)
def _manifold_undo(request: pytest.FixtureRequest) -> Iterator[None]:
    """T2."""
    yield
    shared = getattr(request.node, "funcargs", {}).get(SHARED)
    if shared is not None:
        shared.undo()


# -- reports --------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        _explain(item, report)
    return report


def _explain(item: pytest.Item, report: pytest.TestReport) -> None:
    """What its clusters say, while they are there."""
    told: list[tuple[Path, list[TestCluster]]] = []
    if _folder_key in item.stash:
        told.append((item.stash[_folder_key], item.stash.get(_clusters_key, [])))
    if SHARED in getattr(item, "fixturenames", ()) and _shared_key in item.config.stash:
        told.append(item.config.stash[_shared_key])
    if not told:
        return
    from manifold.tools.testing import reports

    again = f"pytest --manifold-seed={{seed}} '{item.nodeid.replace('{', '{{').replace('}', '}}')}'"
    logs = item.config.getoption("--manifold-logs")
    for folder, clusters in told:
        if folder.exists():
            report.sections += reports.sections(folder, clusters, again)
            if logs:
                reports.copy(folder, Path(logs) / re.sub(r"[^\w.-]+", "_", item.nodeid))
