"""CPython's own tests of executors, those that are generic, run on `manifold.Executor`.

They come with the Python that runs this, where it has its `test` package; else, for a Python whose
tests were stripped, Debian's libpython3.X-testsuite serves if it is of the same minor version. They
are run as they are; only what their scripts import is renamed, since those name
`concurrent.futures` in their text. docs/executor.md repeats EXCEPTIONS.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import importlib.util
import inspect
import multiprocessing
import os
import re
import secrets
import subprocess
import sys
import tempfile
import threading
import traceback
import unittest
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import manifold
from manifold.tools.emulator.testing import TestCluster

MINOR = f"{sys.version_info.major}.{sys.version_info.minor}"
NAME = "test_concurrent_futures"
DEBIAN = Path(f"/usr/lib/python{MINOR}/test")
MISSING = (
    f"This Python has no test.{NAME}, and there is none in {DEBIAN}: "
    f"`apt-get install libpython{MINOR}-testsuite` where Python is Debian's {MINOR}."
)

# Generic: they use nothing but the interface of an executor.
GENERIC = (
    "ExecutorTest",
    "ExecutorShutdownTest",
    "WaitTests",
    "AsCompletedTests",
    "InitializerMixin",
    "FailingInitializerMixin",
)
# Written for the pool of processes; those that only use the interface must pass all the same.
OF_PROCESSES = "ProcessPoolExecutorTest"
PARTS = (
    "",
    ".util",
    ".executor",
    ".test_shutdown",
    ".test_wait",
    ".test_as_completed",
    ".test_init",
    ".test_process_pool",
)

_PRIVATE = "looks into `_processes`, a private field of the pool: a cluster's processes are its own"
_RECYCLE = "`max_tasks_per_child` recycles the pool's own processes: there is no such argument here"
EXCEPTIONS = {
    "test_killed_child": (
        "wants one dead process to break the whole pool: here it fails its own call and no other"
    ),
    "test_traceback": (
        "wants the cause to be of the private class `_RemoteTraceback`: it is RemoteTraceback here"
    ),
    "test_ressources_gced_in_workers": (
        "sends a proxy of a multiprocessing manager: only children of the process may use those"
    ),
    "test_saturation": "sends a multiprocessing semaphore, which only children may inherit",
    "test_idle_process_reuse_one": _PRIVATE,
    "test_idle_process_reuse_multiple": _PRIVATE,
    "test_max_tasks_per_child": _RECYCLE,
    "test_max_tasks_per_child_defaults_to_spawn_context": _RECYCLE,
    "test_max_tasks_early_shutdown": _RECYCLE,
    # Only in later versions than 3.11:
    "test_python_finalization_error": "patches the pool's private way of starting processes",
    "test_force_shutdown_workers": _PRIVATE,
    "test_force_shutdown_workers_dead": _PRIVATE,
    "test_force_shutdown_workers_invalid_op": _PRIVATE,
    "test_force_shutdown_workers_not_started": _PRIVATE,
    "test_force_shutdown_workers_stops_pool": _PRIVATE,
    "test_terminate_workers": _PRIVATE,
    "test_kill_workers": _PRIVATE,
}


def _exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _linked(*names: str) -> None:
    """Make entries of Debian's folder importable by name, and nothing else of that folder."""
    folder = tempfile.TemporaryDirectory(prefix="mf-cpython-")
    atexit.register(folder.cleanup)
    for name in names:
        source = DEBIAN.parent / name if name == "test" else DEBIAN / name
        os.symlink(source, Path(folder.name) / source.name)
    sys.path.append(folder.name)


def _prepared() -> str:
    """The importable name of the tests' module; skips this module where there is none.

    Task processes import it too: they have our sys.path.
    """
    if _exists(f"test.{NAME}"):
        return f"test.{NAME}"
    found = [n for n in (NAME, f"{NAME}.py") if (DEBIAN / n).exists()]
    if not found:
        print(MISSING)
        pytest.skip(MISSING, allow_module_level=True)
    if _exists("test.support"):
        _linked(*found)
        return NAME
    _linked("test")
    return f"test.{NAME}"


MODULE = _prepared()


def _modules() -> list[ModuleType]:
    """The one module of 3.11, or the package's of later versions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        return [importlib.import_module(MODULE + part) for part in PARTS if _exists(MODULE + part)]


MODULES = _modules()


def _named(name: str) -> Any:
    return next(vars(module)[name] for module in MODULES if name in vars(module))


def run_script(_option: str, script: str) -> tuple[int, bytes, bytes]:
    """Their `assert_python_ok`, with our executor for the one the script imports."""
    script = script.replace("from concurrent.futures import", "from manifold import")
    script = re.sub(rf"(from|import) (test\.)?{NAME}", rf"\1 {MODULE}", script)
    # A script is one indented block under `if True:`; the tests' module is where we found it.
    lead = f"import sys; sys.path[:] = {sys.path!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", lead + script], capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.returncode, done.stdout.strip(), done.stderr.strip()


class OnManifold(_named("ExecutorMixin")):  # type: ignore[misc]
    """What their mixins for threads and processes are: which executor to make."""

    executor_type = manifold.Executor

    def setUp(self) -> None:
        self.clients = clients()
        super().setUp()

    def get_context(self) -> Any:
        return multiprocessing.get_context("spawn")  # for what tests of processes share by it

    def tearDown(self) -> None:
        super().tearDown()
        assert clients() == self.clients, "an executor left its connection behind"


def clients() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "manifold-client"}


def own_tests(of: type) -> dict[str, Any]:
    """The tests of a class, without those it inherits, and what they use."""
    return {n: value for n, value in vars(of).items() if n.startswith(("test_", "_test"))}


def failing(test: Any, reason: str) -> Any:
    """The test, as one that has to fail. It is reported as skipped: to show where it failed pytest
    parses sources, which in 3.11 must not happen while another thread formats a traceback."""

    def run(self: unittest.TestCase) -> None:
        # What it leaves half done may fail again when it is collected: that is to happen here.
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        try:
            test(self)
        except Exception as error:
            failed = True
            traceback.clear_frames(error.__traceback__)
        else:
            failed = False
        finally:
            gc.collect()
            sys.unraisablehook = hook
        assert failed, f"it passes: take it off EXCEPTIONS, and off docs/executor.md ({reason})"
        self.skipTest(f"fails, as it must: {reason}")

    run.__name__ = test.__name__
    return run


def test_case(name: str, mixin: type) -> type[unittest.TestCase]:
    """A test case of one of their mixins, on our executor."""
    made = type(name, (mixin, OnManifold, _named("BaseTestCase")), {"__module__": __name__})
    for method, _ in inspect.getmembers(made, inspect.isfunction):
        if method in EXCEPTIONS:
            setattr(made, method, failing(inspect.getattr_static(made, method), EXCEPTIONS[method]))
    assert issubclass(made, unittest.TestCase)
    return made


test_case.__test__ = False  # type: ignore[attr-defined]

for _name in GENERIC:
    globals()[f"Test{_name}"] = test_case(f"Test{_name}", _named(_name))
globals()[f"Test{OF_PROCESSES}"] = test_case(
    f"Test{OF_PROCESSES}", type(OF_PROCESSES, (), own_tests(_named(OF_PROCESSES)))
)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[TestCluster]:
    """A cluster that `manifold.Executor()` finds."""
    with tempfile.TemporaryDirectory(prefix="mf-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MANIFOLD_STATE_HOME", f"{folder}/state")
        patch.setenv("MANIFOLD_RUNTIME_DIR", f"{folder}/run")
        patch.setenv("MANIFOLD_CLUSTER", f"t{secrets.token_hex(4)}")
        for module in MODULES:
            if hasattr(module, "assert_python_ok"):
                patch.setattr(module, "assert_python_ok", run_script)
        cluster = TestCluster(4, dict(os.environ))
        yield cluster
        cluster.close()


def test_every_generic_test_of_this_version_was_found() -> None:
    names = {n for name in GENERIC for n in dir(globals()[f"Test{name}"]) if n.startswith("test_")}
    assert len(names) >= 29, sorted(names)
    assert {"test_map_timeout", "test_interpreter_shutdown", "test_initializer"} <= names
