"""The warm parent of verbs: a small process that has done every import and forks one per line.

Interface: started by `runner.py` with one end of a socket pair; it takes `Start` (with the
terminal as a file descriptor) and `Signal`, and tells of each line's end with `Ended`. Each line is
a session of its own with that terminal, so that Ctrl-C reaches all of its stages and nothing else.
Invariants: R1 it opens no connection and no thread: nothing does not survive a fork. R2 when the
console is gone, its end of the pair closes, and every line that still runs is told to hang up.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import os
import selectors
import signal
import socket
import sys
import termios
import traceback
from typing import NoReturn

import msgspec

from manifold.shells.cli.main import prepare_streams

MESSAGE_BYTES_MAX = 256 << 10  # a line of the prompt has at most 64 KiB; quoted JSON at most thrice
STAGES_MAX = 16
PRELOAD = (
    "manifold.shells.console.stages",
    "manifold.shells.verbs.tree",
    "manifold.shells.namespace",
    "manifold.shells.sdk.client",
    "manifold.shells.sdk.globals_calls",
    "manifold.shells.sdk.registers",
    "manifold.shells.verbs.cluster",
    "manifold.shells.verbs.work",
    "manifold.shells.verbs.globals",
    "manifold.shells.verbs.nexus",
    "manifold.shells.verbs.observe",
    "manifold.shells.verbs.run",
    "manifold.shells.sdk.programs",
    "manifold.tools.emulator.verbs",
)


class Start(msgspec.Struct, frozen=True, tag="r.start"):
    """Run the stages of a line, one piped into the next, on the terminal that comes with it."""

    number: int
    stages: tuple[tuple[str, ...], ...]
    environ: dict[str, str]  # on top of the parent's
    folder: str


class Signal(msgspec.Struct, frozen=True, tag="r.signal"):
    number: int
    signal: int


class Ended(msgspec.Struct, frozen=True, tag="r.ended"):
    """The line has ended; `code` is its last stage's, or 128 and the signal that ended it."""

    number: int
    code: int


REQUESTS = msgspec.json.Decoder(Start | Signal)


class Forker:
    """The loop of the warm parent."""

    def __init__(self, pair: socket.socket) -> None:
        self._pair = pair
        self._lines: dict[int, tuple[int, int]] = {}  # number -> pid, pidfd
        self._selector = selectors.DefaultSelector()
        self._selector.register(pair, selectors.EVENT_READ, 0)

    def serve(self) -> None:
        """Until the console is gone: R2."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is not self._pair:
                    self._reap(key.data)
                elif not self._take():
                    for number in list(self._lines):
                        self._signal(number, signal.SIGHUP)
                    return

    def _take(self) -> bool:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._pair, MESSAGE_BYTES_MAX, 1)
        except ConnectionResetError:
            return False
        if not data:
            return False
        match REQUESTS.decode(data):
            case Start() as start:
                self._start(start, descriptors[0])
            case Signal(number, number_of_signal):
                self._signal(number, number_of_signal)
        return True

    def _start(self, start: Start, terminal: int) -> None:
        pid = os.fork()
        if pid == 0:
            self._pair.close()
            self._selector.close()
            for _, pidfd in self._lines.values():
                os.close(pidfd)
            _line(start, terminal)
        os.close(terminal)
        pidfd = os.pidfd_open(pid)
        self._lines[start.number] = pid, pidfd
        self._selector.register(pidfd, selectors.EVENT_READ, start.number)

    def _signal(self, number: int, number_of_signal: int) -> None:
        entry = self._lines.get(number)
        if entry is not None:  # not reaped yet, so that the number is still its own
            with contextlib.suppress(ProcessLookupError):
                os.killpg(entry[0], number_of_signal)

    def _reap(self, number: int) -> None:
        pid, pidfd = self._lines.pop(number)
        self._selector.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        with contextlib.suppress(BrokenPipeError):  # the console is gone: the next read says so
            self._pair.send(msgspec.json.encode(Ended(number, _code(status))))


def _code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _line(start: Start, terminal: int) -> NoReturn:
    """In the child: a session with its terminal, and the stages in it."""
    os.setsid()
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    for standard in (0, 1, 2):
        os.dup2(terminal, standard)
    if terminal > 2:
        os.close(terminal)
    os.environ.update(start.environ)
    with contextlib.suppress(OSError):  # the folder has gone since: the verb says what it misses
        os.chdir(start.folder)
    if len(start.stages) == 1:
        _stage(start.stages[0])
    # Ctrl-C is for the stages: the leader waits for their ends and has the last one's code.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pids = []
    source = -1
    for at, stage in enumerate(start.stages[:STAGES_MAX]):
        last = at == len(start.stages) - 1
        read_end, write_end = (-1, -1) if last else os.pipe()
        pid = os.fork()
        if pid == 0:
            if source >= 0:
                os.dup2(source, 0)
                os.close(source)
            if not last:
                os.dup2(write_end, 1)
                os.close(write_end)
                os.close(read_end)
            _stage(stage, first=at == 0)
        pids.append(pid)
        if source >= 0:
            os.close(source)
        if not last:
            os.close(write_end)
        source = read_end
    codes = [_code(os.waitpid(pid, 0)[1]) for pid in pids]
    os._exit(codes[-1])


def _stage(arguments: tuple[str, ...], *, first: bool = True) -> NoReturn:
    """Run one verb or filter, and end with its code; nothing that Python does at exit happens."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from manifold.shells.console.stages import run_stage

    code = 1
    try:
        code = run_stage(list(arguments), first)
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except Exception as error:  # our bug: one line for the user, the rest for the log
        print(f"error: {arguments[0]} failed: {error!r}", file=sys.stderr)
        if os.environ.get("MANIFOLD_DEBUG"):
            traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """The process: imports, then the loop."""
    prepare_streams()
    pair = socket.socket(fileno=int(sys.argv[1]))
    pair.set_inheritable(False)
    for module in PRELOAD:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # what is shared with the children stays shared
    Forker(pair).serve()


if __name__ == "__main__":
    main()
