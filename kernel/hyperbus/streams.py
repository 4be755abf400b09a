"""Lines: frames over stream sockets of our own, of one host or over TCP (endpoints.py).

Interface rules: used from the thread of the loop only, made after the last fork. `Receiver` serves
a place and gives each frame to `on_frame`, which may close it. `Sender.send` never blocks: it
connects at its first use and again after a break, and keeps what does not leave at once.
Invariants: S1 a frame arrives whole, once, or not at all: one that was partly written when its
connection broke is given up, one of which nothing was written leaves by the next connection.
S2 a connection holds at most one frame and one read, and one that breaks the rules is closed.
S3 at most `CONNECTIONS_MAX` connections; to make room, the one silent for longest is read once
more and closed: its sender connects again when it has something to say. S4 at most one attempt to
connect per interval, which doubles, and none while nothing waits. S5 one read and
`DRAIN_FRAMES_MAX` frames of a connection in a turn of the loop: none starves another. S6 over TCP a
frame is not begun on a connection whose other end is known to be gone, and such a one is closed.
"""

from __future__ import annotations

import asyncio
import socket
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from manifold.kernel.errors import PeerError
from manifold.kernel.hyperbus import endpoints
from manifold.kernel.hyperbus.endpoints import Tcp, Where
from manifold.kernel.hyperbus.splitter import Splitter, framed
from manifold.kernel.limits import DRAIN_FRAMES_MAX, SOCKET_BUFFER_FRAMES

READ_BYTES = 64 << 10  # hundreds of small frames; larger blocks are mapped and unmapped each time
CONNECTIONS_MAX = 512  # 256 nodes and as many clients; two listeners are 1024 descriptors
ACCEPTS_MAX = 64  # in one turn of the loop: about 1 ms
ACCEPT_PAUSE_S = 0.1  # without a descriptor left; `listen` queues who comes meanwhile

RECONNECT_S_MIN = 0.02
RECONNECT_S_MAX = 1.0
CONNECT_S = 1.0  # over TCP: then another attempt, as after a SYN that the kernel repeats


@dataclass(slots=True, eq=False)
class _Connection:
    socket: socket.socket
    heard: int  # when it last said something, in reads
    splitter: Splitter = field(default_factory=Splitter)
    more: bool = False  # frames were left over: their turn comes, and then the next read


class Receiver:
    """Listens at `where`; `on_bad` is told why a connection was closed that broke the rules."""

    def __init__(
        self,
        where: Where,
        loop: asyncio.AbstractEventLoop,
        on_frame: Callable[[bytes], None],
        on_bad: Callable[[PeerError], None],
        counters: Counter[str],
    ) -> None:
        self._where = endpoints.checked(where)
        self._loop = loop
        self._on_frame = on_frame
        self._on_bad = on_bad
        self._counters = counters
        self._connections: dict[int, _Connection] = {}  # by descriptor
        self._reads = 0
        self._paused: asyncio.TimerHandle | None = None
        self._closed = False
        self._listener = endpoints.listening(self._where)
        self._file = endpoints.file_of(self._where)
        loop.add_reader(self._listener.fileno(), self._acceptable)

    def __len__(self) -> int:
        return len(self._connections)

    def _acceptable(self) -> None:
        for _ in range(ACCEPTS_MAX):
            try:
                accepted, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError:  # no descriptor is left: the listener would wake us at once again
                self._counters["accepts_failed"] += 1
                self._loop.remove_reader(self._listener.fileno())
                self._paused = self._loop.call_later(ACCEPT_PAUSE_S, self._accept_again)
                return
            endpoints.accepted(accepted, self._where)
            if len(self._connections) >= CONNECTIONS_MAX:
                self._make_room()
            if self._closed:  # by what was read to make room
                accepted.close()
                return
            connection = _Connection(accepted, self._reads)
            self._connections[accepted.fileno()] = connection
            self._loop.add_reader(accepted.fileno(), self._readable, connection)

    def _accept_again(self) -> None:
        self._paused = None
        self._loop.add_reader(self._listener.fileno(), self._acceptable)

    def _make_room(self) -> None:
        """S3."""
        silent = min(self._connections.values(), key=lambda each: (each.more, each.heard))
        self._readable(silent)
        if silent.socket.fileno() >= 0:
            self._counters["connections_closed"] += 1
            self._drop(silent)

    def _readable(self, connection: _Connection) -> None:
        if connection.more:
            return
        try:
            data = connection.socket.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:  # reset: its end has gone
            data = b""
        if not data:
            self._counters["frames_torn"] += connection.splitter.held_bytes > 0
            self._drop(connection)
            return
        self._reads += 1
        connection.heard = self._reads
        connection.splitter.feed(data)
        self._deliver(connection)

    def _deliver(self, connection: _Connection) -> None:
        """S5."""
        connection.more = False
        for _ in range(DRAIN_FRAMES_MAX):
            if connection.socket.fileno() < 0:
                return
            try:
                frame = connection.splitter.take()
            except PeerError as error:
                self._drop(connection)
                self._on_bad(error)
                return
            if frame is None:
                return
            self._on_frame(frame)
        connection.more = True
        self._loop.call_soon(self._deliver, connection)

    def _drop(self, connection: _Connection) -> None:
        descriptor = connection.socket.fileno()
        self._loop.remove_reader(descriptor)
        del self._connections[descriptor]
        connection.socket.close()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._paused is not None:
            self._paused.cancel()
        self._loop.remove_reader(self._listener.fileno())
        endpoints.release(self._where, self._file)
        self._listener.close()
        for connection in list(self._connections.values()):
            self._drop(connection)


class Sender:
    """One line to whoever listens at `where`. `on_ready` is called when all that waited has left
    (or was lost), except from within `send`."""

    def __init__(
        self,
        where: Where,
        loop: asyncio.AbstractEventLoop,
        on_ready: Callable[[], None],
        counters: Counter[str],
    ) -> None:
        self._where = endpoints.checked(where)
        self._tcp = isinstance(where, Tcp)
        self._loop = loop
        self._on_ready = on_ready
        self._counters = counters
        self._socket: socket.socket | None = None
        self._opening: socket.socket | None = None  # being connected
        self._watched = False  # by `add_writer`
        self._waiting: deque[bytes] = deque()  # with their lengths
        self._written = 0  # bytes of the first of them
        self._delay_s = RECONNECT_S_MIN
        self._attempt_s = float("-inf")  # when the next attempt may be made
        self._timer: asyncio.TimerHandle | None = None

    @property
    def ready(self) -> bool:
        """Whether nothing waits: what is sent now leaves at once, as far as is known."""
        return not self._waiting

    def send(self, frame: bytes) -> bool:
        """Send or keep it; False where `SOCKET_BUFFER_FRAMES` wait already."""
        if len(self._waiting) >= SOCKET_BUFFER_FRAMES:
            return False
        self._waiting.append(framed(frame))
        if len(self._waiting) == 1:
            self._write()
        return True

    def _write(self) -> None:
        """What waits, as far as it goes."""
        while self._waiting:
            if self._socket is None and not self._connect():
                return
            assert self._socket is not None
            if self._tcp and not self._written and endpoints.gone(self._socket):  # S6
                self._broken()
                continue
            first = self._waiting[0]
            rest = memoryview(first)[self._written :] if self._written else first
            try:
                self._written += self._socket.send(rest, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._watch()
                return
            except OSError:
                self._broken()
                continue
            if self._written == len(first):
                self._waiting.popleft()
                self._written = 0
        self._unwatch()

    def _go_on(self) -> None:
        self._write()
        if not self._waiting:
            self._on_ready()

    def _connect(self) -> bool:
        """S4. On one host it ends at once, either way; a full queue is one that refuses. Over TCP
        `_opened` goes on."""
        now_s = self._loop.time()
        if now_s >= self._attempt_s:
            if self._connected():
                self._settled(now_s)
                return True
            self._attempt_s = now_s + self._delay_s
            self._delay_s = min(2 * self._delay_s, RECONNECT_S_MAX)
        assert self._timer is None, "S4: while it runs something waits, and nobody comes here"
        until_s = self._attempt_s if self._opening is None else now_s + CONNECT_S
        self._timer = self._loop.call_at(until_s, self._again)
        return False

    def _settled(self, now_s: float) -> None:
        """Connected: if this one breaks, the next attempt is soon."""
        self._delay_s = RECONNECT_S_MIN
        self._attempt_s = now_s + RECONNECT_S_MIN

    def _connected(self) -> bool:
        """Whether an attempt has connected us at once."""
        try:
            attempt, done = endpoints.attempt(self._where)
        except OSError:  # nobody listens, or no descriptor is left
            return False
        if done:
            self._use(attempt)
        else:
            self._opening = attempt
            self._loop.add_writer(attempt.fileno(), self._opened)
        return done

    def _use(self, connected: socket.socket) -> None:
        self._socket = connected
        if self._tcp:
            self._loop.add_reader(connected.fileno(), self._left)

    def _opened(self) -> None:
        """The attempt has ended: well or not."""
        assert self._opening is not None and self._timer is not None
        self._timer.cancel()
        self._timer = None
        attempt, self._opening = self._opening, None
        self._loop.remove_writer(attempt.fileno())
        if attempt.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            attempt.close()
            self._timer = self._loop.call_at(self._attempt_s, self._again)
            return
        self._use(attempt)
        self._settled(self._loop.time())
        self._go_on()

    def _left(self) -> None:
        """S6: the other end of a TCP connection has something to say, which is that it is gone."""
        assert self._socket is not None
        if endpoints.gone(self._socket):
            waited = not self.ready
            self._broken()
            if waited:
                self._go_on()

    def _again(self) -> None:
        self._timer = None
        self._give_up()
        self._go_on()

    def _give_up(self) -> None:
        """An attempt that has not ended in time."""
        if self._opening is not None:
            self._loop.remove_writer(self._opening.fileno())
            self._opening.close()
            self._opening = None

    def _broken(self) -> None:
        """S1."""
        self._hang_up()
        if self._written:
            self._waiting.popleft()
            self._written = 0
            self._counters["frames_lost"] += 1

    def _watch(self) -> None:
        if not self._watched and self._socket is not None:
            self._watched = True
            self._loop.add_writer(self._socket.fileno(), self._go_on)

    def _unwatch(self) -> None:
        if self._watched and self._socket is not None:
            self._loop.remove_writer(self._socket.fileno())
        self._watched = False

    def _hang_up(self) -> None:
        self._unwatch()
        if self._socket is not None:
            if self._tcp:
                self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None

    def close(self) -> None:
        """What waits is lost."""
        if self._timer is not None:
            self._timer.cancel()
        self._waiting.clear()
        self._give_up()
        self._hang_up()
