"""The joblib backend: joblib's own tests where they are generic, and what only a cluster can do.

joblib's tests are run as they are, by their names, with "manifold" for the backend's name.
docs/executor.md repeats EXCEPTIONS.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import os
import pickle
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import joblib
import joblib.parallel
import numpy as np
import pytest
from joblib import Parallel, delayed

import manifold.joblib
from manifold.shells.sdk.joblib_backend import ManifoldBackend
from manifold.tools.emulator.testing import TestCluster

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # theirs
    from joblib.test import test_parallel as theirs

manifold.joblib.register()  # as its import did
NAME = "manifold"

_MANAGER = "sends proxies of a multiprocessing manager: only children of the process may use those"
_SCRIPT = "its script does not import manifold; the same is shown by a test of our own below"
_MEMMAP = "about memory maps of arrays, for pools of one machine"
_LOKY = "about the default backends themselves, whatever the parameter"
# Those of joblib's tests that have a backend for a parameter and are not generic.
EXCEPTIONS = {
    "test_dispatch_multiprocessing": _MANAGER,
    "test_initializer_context": _MANAGER,
    "test_initializer_parallel": _MANAGER,
    "test_parallel_with_interactively_defined_functions": _SCRIPT,
    "test_parallel_with_unpicklable_functions_in_args": _SCRIPT,
    "test_auto_memmap_on_arrays_from_generator": _MEMMAP,
    "test_memmapping_leaks": _MEMMAP,
    "test_background_thread_parallelism": _LOKY,
    "test_parallel_thread_limit": _LOKY,
    "test_nested_parallel_warnings": "wants the warnings of loky and multiprocessing when nested",
    "test_nested_exception_dispatch": "fails everywhere: joblib itself expects it to",
}
BACKENDS = joblib.parallel.BACKENDS


def parameters(function: Any) -> list[tuple[list[str], list[Any]]]:
    """What joblib's test is parametrised over: names, and the values of them together."""
    marks = [mark for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
    return [([n.strip() for n in m.args[0].split(",")], list(m.args[1])) for m in reversed(marks)]


def with_us(test: str, names: list[str], values: list[Any]) -> list[tuple[Any, ...]]:
    """The values, with our backend for theirs."""
    if names == ["backend"]:
        return [(NAME,)]
    if names == ["backend", "error"]:  # whether two calls share a pool, and disturb each other
        return [(NAME, False)]
    if names in (["parent_backend"], ["outer_backend"]):  # a process of loky's does not know us
        return [(NAME,), ("threading",)]
    if names in (["child_backend"], ["inner_backend"]):
        return [(NAME,), ("threading",), ("loky",)]
    if names == ["n_jobs"] and -2 in values and test != "test_simple_parallel":
        return [(2,)]  # with 1 it is no parallel call; the others are numbers, too
    return [value if len(names) > 1 else (value,) for value in values]


def backends_of(function: Any) -> bool:
    return any("backend" in "".join(names) for names, _ in parameters(function))


def cases() -> list[Any]:
    """Every combination of every generic test that has us in it."""
    found = []
    for name, function in vars(theirs).items():
        if not name.startswith("test_") or not backends_of(function) or name in EXCEPTIONS:
            continue
        grid: list[dict[str, Any]] = [{}]
        for names, values in parameters(function):
            ours = with_us(name, names, values)
            grid = [case | dict(zip(names, v, strict=True)) for case in grid for v in ours]
        for case in grid:
            if NAME in case.values():
                label = "-".join(getattr(v, "__name__", str(v))[:24] for v in case.values())
                found.append(pytest.param(name, case, id=f"{name}-{label}"))
    return found


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[TestCluster]:
    """A cluster that the backend finds."""
    with tempfile.TemporaryDirectory(prefix="mf-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MANIFOLD_STATE_HOME", f"{folder}/state")
        patch.setenv("MANIFOLD_RUNTIME_DIR", f"{folder}/run")
        patch.setenv("MANIFOLD_CLUSTER", f"t{secrets.token_hex(4)}")
        cluster = TestCluster(4, dict(os.environ))
        yield cluster
        cluster.close()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("name", "arguments"), cases())
def test_joblibs_own(name: str, arguments: dict[str, Any], request: pytest.FixtureRequest) -> None:
    function = getattr(theirs, name)
    wanted = set(inspect.signature(function).parameters) - arguments.keys()
    function(**arguments, **{fixture: request.getfixturevalue(fixture) for fixture in wanted})


def test_every_test_of_joblibs_with_a_backend_is_run_or_has_a_reason() -> None:
    named = {n for n, f in vars(theirs).items() if n.startswith("test_") and backends_of(f)}
    assert set(EXCEPTIONS) <= named
    assert len(named) - len(EXCEPTIONS) >= 25, sorted(named)


# -- our own --------------------------------------------------------------------------------------

SOON_S = 30.0
ROOT = Path(__file__).parents[2]
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # task processes have no tests


def connections() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "manifold-client"]


def eventually(condition: Any) -> None:
    deadline_s = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come about"
        threading.Event().wait(0.01)


def pid_and_nap(_: int) -> int:
    time.sleep(0.05)
    return os.getpid()


def inverse(number: int) -> float:
    return 1 / (number - 3)  # here


def mark(value: str) -> None:
    os.environ["MARK"] = value


def test_the_whole_cluster_is_used_unless_told_otherwise(cluster: TestCluster) -> None:
    with contextlib.closing(cluster.client()) as client:
        slots = sum(node.cores for node in client.nodes())
    with joblib.parallel_config(NAME):
        assert joblib.effective_n_jobs() == slots
        assert joblib.effective_n_jobs(-2) == slots - 1
        assert Parallel(n_jobs=2)(delayed(abs)(-n) for n in range(3)) == [0, 1, 2]
        assert joblib.effective_n_jobs(-1) == slots
        pids = set(Parallel()(delayed(pid_and_nap)(n) for n in range(40)))
    assert os.getpid() not in pids
    assert len(pids) > 1


def test_processes_stay_for_the_next_call_of_a_block() -> None:
    with joblib.parallel_config(NAME, n_jobs=2):
        runs = [set(Parallel()(delayed(pid_and_nap)(n) for n in range(10))) for _ in range(3)]
    assert set.union(*runs) == runs[0] or len(set.union(*runs)) <= 4


def test_the_connection_closes_when_the_block_ends() -> None:
    gc.collect()  # joblib's tests leave generators in cycles
    eventually(lambda: not connections())
    with joblib.parallel_config(NAME, n_jobs=2):
        Parallel()(delayed(inverse)(n) for n in range(2))
        assert len(connections()) == 1
        with Parallel(n_jobs=-1) as parallel:  # whatever it asks, it has one
            for _ in range(3):
                parallel(delayed(inverse)(n) for n in range(2))
            assert len(connections()) <= 2  # the one before may be closing
        del parallel
    eventually(lambda: not connections())


def test_an_error_tells_the_remote_line() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        Parallel(n_jobs=2, backend=NAME)(delayed(inverse)(n) for n in range(8))
    assert "return 1 / (number - 3)  # here" in str(caught.value.__cause__)


def test_small_calls_are_batched() -> None:
    with Parallel(n_jobs=4, backend=NAME) as parallel:
        assert parallel(delayed(abs)(-n) for n in range(5000)) == list(range(5000))
        assert parallel._backend.compute_batch_size() > 1


def test_the_initializer_runs_in_every_process() -> None:
    with joblib.parallel_config(NAME, n_jobs=2, initializer=mark, initargs=("41",)):
        assert set(Parallel()(delayed(os.getenv)("MARK") for _ in range(20))) == {"41"}


def test_an_option_that_does_not_exist_is_refused() -> None:
    parallel = Parallel(n_jobs=2, backend=NAME, clusters="x")
    with pytest.raises(TypeError, match="knows no option 'clusters'"):
        parallel(delayed(abs)(n) for n in range(2))


def test_the_iterator_is_never_drawn_from_on_the_connections_thread() -> None:
    names = set()

    def items() -> Iterator[Any]:
        for n in range(200):
            names.add(threading.current_thread().name)
            yield delayed(abs)(n)

    assert Parallel(n_jobs=2, backend=NAME)(items()) == list(range(200))
    assert "manifold-client" not in names


def test_arrays_go_there_and_back() -> None:
    array = np.arange(300_000, dtype=np.float64)
    results = Parallel(n_jobs=2, backend=NAME)(delayed(np.multiply)(array, n) for n in range(4))
    for n, result in enumerate(results):
        assert np.array_equal(result, array * n)


def nested(number: int) -> tuple[int, set[int]]:
    return os.getpid(), set(Parallel(backend=NAME)(delayed(pid_and_nap)(n) for n in range(2)))


def test_inside_a_call_the_backend_computes_in_turn_in_its_own_process() -> None:
    for pid, inner in Parallel(n_jobs=2, backend=NAME)(delayed(nested)(n) for n in range(4)):
        assert inner == {pid}


SCRIPT = """
import cloudpickle
import joblib
import manifold.joblib
from joblib import Parallel, delayed

class Number:
    def __init__(self, n):
        self.n = n

def square(number):
    return number.n ** 2

cube = lambda number: number.n ** 3

with joblib.parallel_config("manifold", n_jobs=2):
    print(Parallel()(delayed(square)(Number(n)) for n in range(4)))
print(Parallel(n_jobs=2, backend="manifold")(delayed(cube)(Number(n)) for n in range(4)))
"""


def test_functions_and_classes_of_a_script_work(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    for words in (["-c", SCRIPT], [str(script)]):
        done = subprocess.run(
            [sys.executable, *words], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.stdout.split("\n") == ["[0, 1, 4, 9]", "[0, 1, 8, 27]", ""], done.stderr
        assert done.stderr == ""


INTERRUPTED = """
import sys, time
import joblib, manifold.joblib
from joblib import Parallel, delayed

def items():
    for n in range(100):
        if n == 4:
            print("ready", flush=True)
        yield delayed(time.sleep)(0 if n < 4 else 300)

Parallel(n_jobs=2, backend="manifold", batch_size=1)(items())
"""


def test_ctrl_c_ends_the_program_and_what_it_ran(cluster: TestCluster) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    ) as program:  # fmt: skip
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        program.send_signal(signal.SIGINT)
        _, errors = program.communicate(timeout=SOON_S)
    assert program.returncode != 0
    assert "KeyboardInterrupt" in errors
    with contextlib.closing(cluster.client()) as client:
        eventually(lambda: not client.processes().processes)


def test_a_backend_that_is_pickled_is_made_anew() -> None:
    backend = ManifoldBackend(nesting_level=1, cluster="there")
    again = pickle.loads(pickle.dumps(backend))
    assert type(again) is ManifoldBackend
    assert (again.nesting_level, again.backend_kwargs) == (1, {"cluster": "there"})


def test_the_example_prints_what_its_header_says() -> None:
    path = ROOT / "examples" / "joblib_grid.py"
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, timeout=90, check=True
    )
    header = next(line for line in path.read_text().splitlines() if "prints" in line)
    assert done.stdout.strip() == header.split("prints ")[1]
