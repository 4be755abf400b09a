"""One process that was forked for a node, and the node's end of its channel.

Interface rules: used from the loop's thread. The zygote forks it; where it cannot at once it is
asked again. `on_messages` gets what the process says, `on_lost` is called once, when it has ended,
broke the protocol or could not be started; with `watch` the zygote tells how it ended.
Invariants: C1 after `on_lost` or `close` nothing is called any more; C2 a process is signalled by
its descriptor, not by its number, which may belong to another by now.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import signal
import socket
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import msgspec

from manifold.kernel.errors import ManifoldError, PeerError, Unavailable
from manifold.kernel.process.channel import Channel, Closed
from manifold.kernel.process.zygote import read_exited, read_forked, request_fork

log = logging.getLogger("manifold.process")

RETRY_S = 0.2  # after the zygote could not fork
RETRIES_MAX = 50  # 10 s: a zygote that is restarted is back in one
EXIT_S = 1.0  # from the end of a process until the zygote has told how; it reaps at once

ENDED = "its process ended"

T = TypeVar("T")


class Child(Generic[T]):
    """See the module. `spec` is what its entry point is given, `fds` go to it after the channel."""

    def __init__(
        self,
        zygote: str,
        entry: str,
        spec: bytes,
        arrives: Any,
        on_messages: Callable[[list[T]], None],
        on_lost: Callable[[str, int | None], None],
        *,
        fds: Sequence[int] = (),
        watch: bool = False,
    ) -> None:
        self.pid = 0  # until the zygote has answered
        self._pidfd = -1
        self._loop = asyncio.get_running_loop()
        self.heard_s = self._loop.time()
        self._zygote = zygote
        self._entry = entry
        self._spec = spec
        self._fds = list(fds)
        self._watch = watch
        self._on_messages = on_messages
        self._on_lost = on_lost
        self._retries = 0
        self._writing = False
        self._over = False
        self._owed = 0  # a signal for one that is being forked
        self._code: int | None = None  # how it ended, once that is known
        self._ending: asyncio.TimerHandle | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._forking: socket.socket | None = None  # where the zygote will answer
        self._exiting: socket.socket | None = None  # and where it will tell of the end
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self._theirs: socket.socket | None = theirs
        self._channel: Channel[T] = Channel(ours, arrives)
        self._loop.add_reader(ours, self._readable)
        self._ask()

    # -- its start ----------------------------------------------------------------------------

    def _ask(self) -> None:
        self._retry = None
        assert self._theirs is not None
        fds = [self._theirs.fileno(), *self._fds]
        try:
            self._forking = request_fork(
                self._zygote, self._entry, self._spec, fds, watch=self._watch
            )
        except Unavailable as error:
            self._retries += 1
            if self._retries > RETRIES_MAX:
                self._lose(f"it could not be started: {error}", None)
            else:
                self._retry = self._loop.call_later(RETRY_S, self._ask)
            return
        self._loop.add_reader(self._forking, self._forked)

    def _forked(self) -> None:
        connection, self._forking = self._forking, None
        assert connection is not None and self._theirs is not None
        self._loop.remove_reader(connection)
        self._close_theirs()  # only the child has it now: its end closes this channel
        try:
            self.pid = read_forked(connection, watch=self._watch)
        except ManifoldError as error:
            self._lose(f"it was not started: {error}", None)
            return
        with contextlib.suppress(ProcessLookupError):  # gone already: the channel tells
            self._pidfd = os.pidfd_open(self.pid)
        if self._over:  # given up while it was forked
            self.signal(signal.SIGKILL)
            self._forget()
            connection.close()
        elif self._owed:
            self.signal(self._owed)
        if self._watch and not self._over:
            self._exiting = connection
            self._loop.add_reader(connection, self._exited)

    def _close_theirs(self) -> None:
        if self._theirs is not None:
            self._theirs.close()
            self._theirs = None
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    # -- the channel --------------------------------------------------------------------------

    def post(self, message: msgspec.Struct) -> None:
        """Queue one message to it."""
        if not self._over and self._channel.post(message) and not self._writing:
            self._writing = True
            self._loop.add_writer(self._channel.socket, self._writable)

    def _writable(self) -> None:
        if not self._channel.flush():
            self._writing = False
            self._loop.remove_writer(self._channel.socket)

    def _readable(self) -> None:
        try:
            messages = self._channel.take()
        except Closed:
            self._loop.remove_reader(self._channel.socket)
            if self._watch and (self._exiting or self._forking):  # how it ended is on its way
                self._ending = self._loop.call_later(EXIT_S, self._lose, ENDED, None)
            else:
                self._lose(ENDED, self._code)
            return
        except PeerError as error:
            self.signal(signal.SIGKILL)
            self._lose(f"it broke the protocol and was killed: {error.message}", None)
            return
        self.heard_s = self._loop.time()
        self._on_messages(messages)

    # -- its end ------------------------------------------------------------------------------

    def _exited(self) -> None:
        assert self._exiting is not None
        connection, self._exiting = self._exiting, None
        self._loop.remove_reader(connection)
        self._code = read_exited(connection)
        here = select.poll()
        here.register(self._channel.socket, select.POLLIN)
        # What it said before it ended; children of its own may hold the channel open.
        while not self._over and self._ending is None and here.poll(0):
            self._readable()
        self._lose(ENDED, self._code)

    def signal(self, number: int) -> None:
        """C2. One that is being forked gets it when it is there."""
        if not self.pid and not self._over:
            self._owed = number
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def kill_group(self) -> None:
        """Kill it and what it has started, if it leads a group of its own."""
        if self._pidfd < 0:
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, 0)  # it is not reaped: its number is its own
            if os.getpgid(self.pid) == self.pid:
                os.killpg(self.pid, signal.SIGKILL)
        self.signal(signal.SIGKILL)

    def _lose(self, reason: str, code: int | None) -> None:
        if not self._over:
            if self._watch:  # it may only have closed its channel
                self.kill_group()
            self.close()
            self._on_lost(reason, code)

    def close(self, *, final: bool = False) -> None:
        """Let go of it: a process whose channel closes ends by itself, unless it is busy.

        One that is being forked is killed when it is there, unless the loop ends now (`final`).
        """
        if self._over:
            return
        self._over = True
        for timer in (self._ending, self._retry):
            if timer is not None:
                timer.cancel()
        self._loop.remove_reader(self._channel.socket)
        if self._writing:
            self._loop.remove_writer(self._channel.socket)
        self._channel.socket.close()
        waiting = [self._exiting, self._forking if final else None]
        for connection in waiting:
            if connection is not None:
                self._loop.remove_reader(connection)
                connection.close()
        if final or self._forking is None:
            self._close_theirs()
        self._forget()

    def _forget(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
