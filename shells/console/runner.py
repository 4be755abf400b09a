"""Runs lines of the prompt, in children of the warm parent (`forker.py`), on a terminal of ours.

Interface: everything is called on one event loop. `Runner.begin` returns at once; what is printed
and the end come by callbacks, the end after everything printed. `close` hangs up on what runs.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import fcntl
import os
import pty
import signal
import socket
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Mapping, Sequence

import msgspec

from manifold.kernel.errors import Unavailable
from manifold.shells.console.forker import MESSAGE_BYTES_MAX, Ended, Signal, Start

READ_BYTES = 64 << 10  # at once, so that a verb that prints without end leaves time to paint
DRAIN_READS_MAX = 64  # after a line's end: 4 MiB, more than a terminal's buffer holds
NOT_IN_A_CHILD = ("COLUMNS", "LINES", "TEXTUAL_DRIVER", "MANIFOLD_DEBUG")

OnText = Callable[[str], None]
OnEnd = Callable[[int], None]


class Running:
    """A line that runs."""

    def __init__(
        self, runner: Runner, number: int, terminal: int, on_text: OnText, on_end: OnEnd
    ) -> None:
        self._runner = runner
        self.number = number
        self._terminal = terminal
        self._on_text = on_text
        self._on_end = on_end
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.ended = False

    def interrupt(self) -> None:
        """Ctrl-C: SIGINT to every stage."""
        self._runner.tell(Signal(self.number, signal.SIGINT))

    def kill(self) -> None:
        """For a line that does not heed Ctrl-C."""
        self._runner.tell(Signal(self.number, signal.SIGKILL))

    def write(self, text: str) -> None:
        """As if it was typed on its terminal."""
        if not self.ended:
            with contextlib.suppress(BlockingIOError):  # nobody reads there: it is full
                os.write(self._terminal, text.encode())

    def resize(self, columns: int, rows: int) -> None:
        if not self.ended:
            _set_size(self._terminal, columns, rows)

    # -- called by the loop -----------------------------------------------------------------------

    def readable(self) -> bool:
        """Take what was printed; whether there may be more."""
        try:
            data = os.read(self._terminal, READ_BYTES)
        except BlockingIOError:
            return False
        except OSError:  # EIO: nobody has the other end any more
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(self._terminal)
            return False
        text = self._decoder.decode(data)
        if text:
            self._on_text(text)
        return True

    def end(self, code: int) -> None:
        """The line has ended: what is left to read is read."""
        for _ in range(DRAIN_READS_MAX):
            if not self.readable():
                break
        self.close()
        self._on_end(code)

    def close(self) -> None:
        self.ended = True
        asyncio.get_running_loop().remove_reader(self._terminal)
        os.close(self._terminal)


class Runner:
    """See the module. `start` takes 0.2 s in the background; nobody has to wait for it."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = {k: v for k, v in environ.items() if k not in NOT_IN_A_CHILD}
        self._environ["TERM"] = "xterm-256color"
        self._pair: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._running: dict[int, Running] = {}
        self._number = 0

    def start(self) -> None:
        """Start the warm parent, or another one where it has ended."""
        if self._pair is not None:
            return
        pair, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "manifold.shells.console.forker", str(other.fileno())],
            pass_fds=(other.fileno(),), env=self._environ, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        other.close()
        pair.setblocking(False)
        self._pair = pair
        asyncio.get_running_loop().add_reader(pair, self._told)

    def begin(
        self,
        stages: Sequence[Sequence[str]],
        on_text: OnText,
        on_end: OnEnd,
        *,
        columns: int,
        rows: int,
        environ: Mapping[str, str] | None = None,
    ) -> Running:
        """Run a pipeline on a terminal of that size."""
        self.start()
        self._number += 1
        master, slave = pty.openpty()
        try:
            _set_size(slave, columns, rows)
            os.set_blocking(master, False)
            start = Start(self._number, tuple(map(tuple, stages)), dict(environ or {}), os.getcwd())
            self.tell(start, slave)
        except BaseException:
            os.close(master)
            raise
        finally:
            os.close(slave)
        running = Running(self, self._number, master, on_text, on_end)
        self._running[self._number] = running
        asyncio.get_running_loop().add_reader(master, running.readable)
        return running

    def tell(self, message: Start | Signal, descriptor: int = -1) -> None:
        """Send it to the warm parent."""
        data = msgspec.json.encode(message)
        if len(data) > MESSAGE_BYTES_MAX:
            raise Unavailable("This line is too long.", "Put it into a script: `run script.py`.")
        assert self._pair is not None, "it was started"
        try:
            socket.send_fds(self._pair, [data], [descriptor] if descriptor >= 0 else [])
        except OSError as error:
            raise Unavailable(
                f"The process that runs verbs does not answer ({error.strerror}).", "Try again."
            ) from error

    def _told(self) -> None:
        assert self._pair is not None
        try:
            data = self._pair.recv(MESSAGE_BYTES_MAX)
        except (BlockingIOError, InterruptedError):
            return
        except ConnectionResetError:
            data = b""
        if not data:
            self._gone()
            return
        ended = msgspec.json.decode(data, type=Ended)
        running = self._running.pop(ended.number, None)
        if running is not None:
            running.end(ended.code)

    def _gone(self) -> None:
        """The warm parent has ended, and every line with it; the next line starts another."""
        self._forget()
        for running in list(self._running.values()):
            running.end(128 + signal.SIGKILL)
        self._running.clear()

    def _forget(self) -> None:
        if self._pair is None or self._process is None:
            return
        asyncio.get_running_loop().remove_reader(self._pair)
        self._pair.close()
        self._process.wait()
        self._pair = self._process = None

    def close(self) -> None:
        """Hang up on what runs, and end the warm parent."""
        for running in self._running.values():
            running.close()
        self._running.clear()
        self._forget()


def _set_size(terminal: int, columns: int, rows: int) -> None:
    size = struct.pack("HHHH", max(1, rows), max(20, columns), 0, 0)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, size)
