"""A cluster that belongs to a program: it is there while the program is, and ends with it.

Interface: `start` brings one up and returns an `Owned`; `Owned.end` takes it down. `launch` starts
a supervisor of a session of its own and waits until it has said how it went.
Invariants: O1 whichever way the program ends, SIGKILL included, its cluster ends: the supervisor
watches a pidfd of the program, which no child inherits a hold on (the write end of a pipe would
live on in every child that multiprocessing forks). O2 what a child of the program does, whose
`Owned` is a copy, ends nothing. O3 a private cluster's state goes with it; where both it and its
program were killed, a later `start` removes what is left.
"""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from manifold.kernel import places
from manifold.kernel.durable import make_folder
from manifold.kernel.errors import ManifoldError, Refused, Unavailable
from manifold.kernel.hyperbus.faults import to_error
from manifold.kernel.hyperbus.messages import Failure
from manifold.tools.emulator import record

START_S = 60.0  # the supervisor itself gives up after the 30 s it waits for its nodes
END_S = 10.0  # nodes have 2 s to leave, the zygote 1 s for what is left, on a host that is busy
LINE_BYTES_MAX = 65_536
PRIVATE = re.compile(r"up-([0-9]{1,10})-[0-9a-f]{8}")  # with the pid of the program it belongs to
STALE_S = 3600.0  # what is younger may be about to start, in a container whose pids we cannot see
SWEEP_MAX = 16  # forgotten folders removed by one start
# What decides where a cluster's files are: taken from the environment that is passed, alone.
PLACE_VARIABLES = ("XDG_STATE_HOME", "XDG_RUNTIME_DIR", "HOME")


class Owned:
    """A cluster that this process started. `name` is what clients attach to."""

    def __init__(
        self, name: str, folder: Path, process: subprocess.Popen[bytes], private: bool
    ) -> None:
        self.name = name
        self.folder = folder
        self.private = private
        self._process = process
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._ended = False

    @property
    def ours(self) -> bool:
        """O2: whether it is this process that started it."""
        return os.getpid() == self._pid

    def end(self, environ: Mapping[str, str]) -> None:
        """Take it down and return once nothing of it is left. May be called twice."""
        if not self.ours:
            return
        with self._lock:
            if self._ended:
                return
            self._ended = True
        _end_process(self._process)
        if self._process.returncode != 0:  # killed, by somebody: what it left must go all the same
            from manifold.tools.emulator import cluster

            cluster.down(self.name, environ)
        if self.private:
            shutil.rmtree(self.folder, ignore_errors=True)


def start(count: int, cluster: str = "", environ: Mapping[str, str] = os.environ) -> Owned:
    """Bring up `count` nodes that end with this process; private where `cluster` is empty.

    They share this machine whole, unless a manifold.yaml in the working folder has other classes.

    Raises `Refused` where a cluster of that name is being supervised, `ConfigError` where the
    configuration of this folder is not accepted, `Unavailable` where the nodes do not come up.
    """
    name = cluster or f"up-{os.getpid()}-{os.urandom(4).hex()}"
    folder = places.cluster_dir(name, environ)
    if not cluster:
        _sweep(folder.parent)
    ending = os.pidfd_open(os.getpid())  # O1
    flags = ["--nodes", str(count), "--while-fd", str(ending), "--whole"]
    flags += [] if cluster else ["--private"]
    try:
        process, _ = launch(name, flags, folder, environ, (ending,))
    except ManifoldError as error:
        if not cluster and not isinstance(error, Unavailable):  # its logs are of use, if it began
            shutil.rmtree(folder, ignore_errors=True)
        raise
    except BaseException:
        if not cluster:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.close(ending)
    return Owned(name, folder, process, private=not cluster)


def launch(
    name: str,
    flags: Sequence[str],
    folder: Path,
    environ: Mapping[str, str],
    fds: Sequence[int] = (),
    patience_s: float = START_S,
) -> tuple[subprocess.Popen[bytes], dict[str, Any]]:
    """Start a supervisor and wait until its nodes see each other; it, and what it said.

    Whatever is raised, Ctrl-C included, the supervisor has ended.
    """
    try:
        make_folder(folder)
    except OSError as fault:
        raise Refused(
            f"{folder} cannot be made: {fault.strerror}.",
            "Set MANIFOLD_STATE_HOME to a folder that you may write to.",
        ) from fault
    read_fd, write_fd = os.pipe()
    command = [
        sys.executable, "-P", "-m", "manifold", "--cluster", name, "up", *flags,
        "--report-fd", str(write_fd),
    ]  # fmt: skip
    try:
        with (folder / "supervisor.log").open("ab") as log:
            process = subprocess.Popen(
                command, pass_fds=(write_fd, *fds), stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, start_new_session=True, env=_environment(environ),
            )  # fmt: skip
    except BaseException:
        os.close(read_fd)
        raise
    finally:
        os.close(write_fd)
    try:
        event = _report(process, read_fd, folder, patience_s)
    except BaseException:
        _end_process(process)
        raise
    finally:
        os.close(read_fd)
    return process, event


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What a program with an environment of its own means for the supervisor it starts."""
    if environ is os.environ:
        return dict(environ)
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("MANIFOLD_") and key not in PLACE_VARIABLES
    }
    return kept | dict(environ)


def _report(
    process: subprocess.Popen[bytes], read_fd: int, folder: Path, patience_s: float
) -> dict[str, Any]:
    """The one line a supervisor says of itself; raises what went wrong."""
    line = _line(process, read_fd, patience_s)
    if not line:
        raise Unavailable(
            "The supervisor ended before its nodes were up.", f"Read {folder / 'supervisor.log'}."
        )
    event: dict[str, Any] = json.loads(line)
    if "error" in event:
        error = event["error"]
        raise to_error(Failure(error["code"], error["message"], error["next"]))
    return event


def _line(process: subprocess.Popen[bytes], read_fd: int, patience_s: float) -> bytes:
    """Until the end of a line, of the pipe, or of the process: a child that another thread of the
    program forks at the wrong moment keeps the pipe open."""
    line = b""
    deadline_s = time.monotonic() + patience_s
    pidfd = os.pidfd_open(process.pid)
    try:
        while not line.endswith(b"\n") and len(line) < LINE_BYTES_MAX:
            ready = _ready((read_fd, pidfd), deadline_s - time.monotonic())
            if not ready:
                raise Unavailable(
                    f"The supervisor said nothing for {patience_s:g} s.", "Try again."
                )
            if read_fd not in ready:
                return b""
            more = os.read(read_fd, LINE_BYTES_MAX)
            if not more:
                return b""
            line += more
    finally:
        os.close(pidfd)
    return line


def _end_process(process: subprocess.Popen[bytes]) -> None:
    """Tell it to stop; kill it where it does not."""
    if process.poll() is not None:
        return
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:  # a program that ignores SIGCHLD has no children to wait for
        return
    try:
        process.terminate()
        if not _ready((pidfd,), END_S):
            process.kill()
    finally:
        os.close(pidfd)
    process.wait()


def _ready(fds: Sequence[int], seconds: float) -> set[int]:
    """Which of `fds` can be read, after `seconds` at most. Not `select`: it takes none above 1023,
    and the program may have many open."""
    poller = select.poll()
    for fd in fds:
        poller.register(fd, select.POLLIN)
    return {fd for fd, _ in poller.poll(max(0.0, seconds) * 1000)}


def _sweep(home: Path) -> None:
    """O3: remove what private clusters left that nobody was there to end."""
    found = [path for path in home.glob("up-*") if PRIVATE.fullmatch(path.name)]
    for path in found[:SWEEP_MAX]:
        match = PRIVATE.fullmatch(path.name)
        assert match is not None, "only such names are here"
        if record.start_time(int(match[1])) >= 0 or not record.wait_released(path, 0.0):
            continue
        try:
            old = time.time() - path.stat().st_mtime > STALE_S
        except FileNotFoundError:  # another start swept it
            continue
        if old:
            shutil.rmtree(path, ignore_errors=True)


def supervised(cluster: str, environ: Mapping[str, str]) -> bool:
    """Whether somebody supervises a cluster of that name here, be it up yet or not."""
    return record.holder(places.cluster_dir(cluster, environ)) is not None
