"""The folder of one test process: everything its clusters leave on disk, and who may remove it.

Interface rules: `RunFolder.open(run, worker)` makes it, `test_folder` gives each test one of its
own in it, `close` removes it. `clean_up` removes those of processes that have ended, with whatever
of their clusters still runs.
Invariants: F1 two processes never have the same folder, whatever they are called: a lock is held
on it for as long as its process lives. F2 nothing is removed but by who holds that lock. F3 paths
of sockets in it are short enough for the system (`RUNTIME_DIR_BYTES_MAX`).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from itertools import count
from pathlib import Path

from manifold.kernel import places
from manifold.kernel.errors import ManifoldError, Refused
from manifold.kernel.limits import CLUSTER_NAME_CHARS_MAX, RUNTIME_DIR_BYTES_MAX
from manifold.tools.emulator import cluster

LOCK = "lock"
STATE, RUNTIME = "state", "r"
RUNTIME_NAME_BYTES = len("/manifold-") + places.HASH_DIGITS
RUN_DIGITS = 6  # of a run's id: 24 bits; two that are the same are told apart by F1
WORKER_CHARS_MAX = 6  # `gw9999`
SAME_MAX = 10  # runs of one name at a time


def base() -> Path:
    """The folder above those of all test processes of this user; short, whatever $TMPDIR is."""
    path = Path("/tmp") / f"mfp-{os.geteuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    places.check_private(path)
    return path


def digest(run: str) -> str:
    """What the names of a run's folders and clusters begin with."""
    return hashlib.sha256(run.encode()).hexdigest()[:RUN_DIGITS]


class RunFolder:
    """See the module; `name` is also the beginning of the names of its clusters."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self.name = path.name
        self._lock = lock
        self._numbers = count(1)

    @classmethod
    def open(cls, run: str, worker: str) -> RunFolder:
        """Of the test process `worker` (such as `gw0`) of the run with the id `run`."""
        name = f"{digest(run)}-{worker[:WORKER_CHARS_MAX]}"
        for number in range(SAME_MAX):
            path = base() / (f"{name}-{number}" if number else name)
            path.mkdir(mode=0o700, exist_ok=True)
            lock = _locked(path)
            if lock >= 0:
                return cls(path, lock)
        raise Refused(f"{SAME_MAX} runs are called {run!r}.", "Give them different ids.")

    def test_folder(self) -> Path:
        """A new folder in it."""
        path = self.path / str(next(self._numbers))
        path.mkdir(mode=0o700)
        return path

    def environ(self, folder: Path) -> dict[str, str]:
        """The variables of commands that use the cluster of a test, and no other."""
        name = f"{self.name}-{folder.name}"
        assert len(name) < CLUSTER_NAME_CHARS_MAX, "digits, worker, two numbers: 6, 6, 1, 4"
        return dict(os.environ) | environ_of_test(folder) | {"MANIFOLD_CLUSTER": name}

    def remove(self, folder: Path) -> None:
        """Remove what `test_folder` gave; whatever of its clusters still runs is ended."""
        _end_clusters(folder)
        shutil.rmtree(folder)

    def close(self) -> None:
        """Remove it; whatever of its clusters still runs is ended."""
        _remove(self.path)
        os.close(self._lock)


def clean_up() -> list[str]:
    """F2: remove the folders of test processes that have ended; what could not be, and why."""
    failed = []
    for path in sorted(base().iterdir()):
        lock = _locked(path)
        if lock < 0:
            continue
        try:
            _remove(path)
        except (ManifoldError, OSError) as error:
            failed.append(f"{path}: {error}")
        finally:
            os.close(lock)
    return failed


def environ_of_test(folder: Path) -> dict[str, str]:
    """Where commands look for the clusters of the test in that folder."""
    runtime = folder / RUNTIME
    if len(os.fsencode(runtime)) + RUNTIME_NAME_BYTES > RUNTIME_DIR_BYTES_MAX:
        runtime = folder.parent  # F3: beside the folders of tests, told apart by the state's place
    return {"MANIFOLD_STATE_HOME": str(folder / STATE), "MANIFOLD_RUNTIME_DIR": str(runtime)}


def _locked(path: Path) -> int:
    """A descriptor that holds the folder's lock; -1 where somebody else does, or it is gone."""
    lock = -1
    try:
        lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), os.stat(path / LOCK)):
            return lock
    except OSError:  # held; or who held it has removed it meanwhile
        pass
    if lock >= 0:
        os.close(lock)
    return -1


def _end_clusters(folder: Path) -> None:
    """Of a test, whoever started them."""
    for state in folder.glob(f"{STATE}/*"):
        if state.is_dir():
            cluster.down(state.name, environ_of_test(folder))


def _remove(path: Path) -> None:
    for folder in path.iterdir():
        if folder.is_dir():
            _end_clusters(folder)
    shutil.rmtree(path)
