"""The zygote: one process with the heavy imports done and no nng socket opened, which forks
nodes and workers on request.

Interface rules: it listens on a SOCK_SEQPACKET Unix socket. One connection is one request: a
`Fork` with the file descriptors the child is to get; the answer is `Forked` and, where the request
says `watch`, in the end `Exited`. An entry point is
`module:function(payload: bytes, fds: list[int], liveness_fd: int)`, of a preloaded module.
Invariants: Z1 single-threaded when it forks; Z2 when the liveness pipe closes (the supervisor is
gone, however it went) every child is killed and what the cluster has on this host is cleared, then
it exits; Z3 a child never outlives it, whichever way it goes; Z4 nobody who connects can stop it.
Why not multiprocessing's forkserver: each node would get one of its own, and it knows no liveness.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import gc
import importlib
import os
import resource
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable

import msgspec

from manifold.kernel.errors import Unavailable
from manifold.kernel.process import speed
from manifold.kernel.process.remains import Remains, clear

FDS_MAX = 4
REQUEST_BYTES_MAX = 128 << 10  # under the socket's default buffer of 208 KiB
# A node needs about 600 at most: 256 dialers of 2, 16 reverse channels of 2, its workers, itself.
# The rest is for who connects to it: with the usual limit of 1024 a flood of them stops a node.
DESCRIPTORS_MAX = 16_384
GRACE_S = 1.0  # children see the closed pipe themselves; after this they are killed
ASK_S = 0.5  # who connects has this long to say what for; a request is one write
PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None, use_errno=True)
Entry = Callable[[bytes, list[int], int], None]


class Fork(msgspec.Struct, frozen=True):
    entry: str
    payload: bytes
    watch: bool = False


class Forked(msgspec.Struct, frozen=True):
    pid: int


class Exited(msgspec.Struct, frozen=True):
    """How a child ended: its exit code, or the negative number of the signal that ended it."""

    code: int


def request_fork(
    path: str, entry: str, payload: bytes, fds: list[int], *, watch: bool = False
) -> socket.socket:
    """Ask the zygote at `path` for a child; the answer can be read from the returned socket.

    Does not block: where too many ask at once it is `Unavailable`.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.setblocking(False)
    try:
        connection.connect(path)
        message = msgspec.msgpack.encode(Fork(entry, payload, watch))
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        connection.sendmsg([message], ancillary)
    except OSError as error:
        connection.close()
        raise Unavailable(
            f"The process that forks workers does not answer: {error}.", "It is being restarted."
        ) from error
    return connection


def read_forked(connection: socket.socket, *, watch: bool = False) -> int:
    """The pid of the child that was asked for on `connection`, closed unless it is watched."""
    answer = b""
    try:
        answer = connection.recv(4096)
    except ConnectionResetError:
        pass  # as an end without an answer
    finally:
        if not (watch and answer):
            connection.close()
    if not answer:
        raise Unavailable("The process that forks workers ended.", "It is being restarted.")
    return msgspec.msgpack.decode(answer, type=Forked).pid


def read_exited(connection: socket.socket) -> int | None:
    """How the child ended, None where the zygote is gone; `connection` is closed."""
    with connection:
        try:
            answer = connection.recv(4096)
        except ConnectionResetError:
            answer = b""
    return msgspec.msgpack.decode(answer, type=Exited).code if answer else None


class Zygote:
    def __init__(self, listener: socket.socket, liveness_fd: int, remains: Remains) -> None:
        self._listener = listener
        self._liveness_fd = liveness_fd
        self._remains = remains
        self._pid = os.getpid()
        self._children: dict[int, socket.socket | None] = {}  # who wants to know of their end
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)

    def serve(self) -> None:
        """Until the liveness pipe closes."""
        poller = select.poll()
        for fd in (self._listener.fileno(), self._liveness_fd, self._wake_read):
            poller.register(fd, select.POLLIN)
        while True:
            for fd, _ in poller.poll():
                if fd == self._liveness_fd:
                    self._end()
                    return
                if fd == self._wake_read:
                    os.read(self._wake_read, 4096)
                    self._reap()
                else:
                    self._answer()

    def _answer(self) -> None:
        connection, _ = self._listener.accept()
        fds: list[int] = []
        watched = False
        connection.settimeout(ASK_S)  # Z4
        try:
            message, fds, _, _ = socket.recv_fds(connection, REQUEST_BYTES_MAX, FDS_MAX)
            request = msgspec.msgpack.decode(message, type=Fork)
            pid = self._fork(request, fds, connection)
            watched = request.watch
            self._children[pid] = connection if watched else None
            connection.send(msgspec.msgpack.encode(Forked(pid)))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OSError) as error:
            print(f"zygote: a request was not served: {error}", file=sys.stderr, flush=True)
        finally:
            for fd in fds:
                os.close(fd)
            if not watched:
                connection.close()

    def _fork(self, request: Fork, fds: list[int], connection: socket.socket) -> int:
        pid = os.fork()  # Z1
        if pid:
            return pid
        status = 1
        try:
            _die_with_parent(self._pid)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.close(self._wake_read)
            os.close(self._wake_write)
            self._listener.close()
            connection.close()
            for other in self._children.values():
                if other is not None:
                    other.close()
            module, _, function = request.entry.partition(":")
            entry: Entry = getattr(sys.modules[module], function)
            entry(request.payload, fds, self._liveness_fd)
            status = 0
        except SystemExit as leaving:
            status = leaving.code if isinstance(leaving.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _reap(self) -> None:
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            self._kill_what_it_started(ended.si_pid)
            pid, status = os.waitpid(ended.si_pid, 0)
            self._reaped(pid, status)

    def _kill_what_it_started(self, pid: int) -> None:
        """Of a watched child that led a group. It is not reaped yet: its number is its own."""
        if self._children.get(pid) is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.getpgid(pid) == pid:
                    os.killpg(pid, signal.SIGKILL)

    def _reaped(self, pid: int, status: int) -> None:
        watcher = self._children.pop(pid, None)
        if watcher is None:
            return
        code = os.waitstatus_to_exitcode(status)
        with watcher, contextlib.suppress(OSError):  # whoever asked is gone
            watcher.send(msgspec.msgpack.encode(Exited(code)))

    def _end(self) -> None:
        """Z2: see every child gone, then take away what the cluster has here."""
        deadline = time.monotonic() + GRACE_S
        while self._children and time.monotonic() < deadline:
            woken, _, _ = select.select(
                [self._wake_read], [], [], max(0.0, deadline - time.monotonic())
            )
            if woken:
                os.read(self._wake_read, 4096)
            self._reap()
        for pid in sorted(self._children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while self._children:
            pid, status = os.waitpid(-1, 0)
            self._reaped(pid, status)
        clear(self._remains)


def _die_with_parent(parent: int) -> None:
    """Z3: be killed when the zygote is."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was killed before we asked
        os._exit(1)


def main(arguments: list[str]) -> None:
    """`RUNTIME_DIR LISTENER_FD LIVENESS_FD REMAINS MODULE…`; the directory is there for `ps`."""
    _, listener_fd, liveness_fd, remains, *modules = arguments
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's
    listener = socket.socket(fileno=int(listener_fd))
    for module in modules:
        importlib.import_module(module)
    speed.gas_per_ms()  # measured once: the children inherit it
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = DESCRIPTORS_MAX if hard == resource.RLIM_INFINITY else min(DESCRIPTORS_MAX, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    gc.collect()
    gc.freeze()  # the children share these pages: a collection must not write to them
    listener.listen(64)
    Zygote(listener, int(liveness_fd), msgspec.json.decode(remains, type=Remains)).serve()


if __name__ == "__main__":
    main(sys.argv[1:])
