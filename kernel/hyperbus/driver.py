"""The bus: sealed, batched messages between nodes and clients.

Interface rules:
  - one `Bus` per process, used from the thread of its event loop only, made after the last fork;
  - `send` never blocks and never buffers without bound: a full queue is `Unavailable`;
  - delivery is at most once: what was in flight when a connection broke may be lost, and the
    protocol that owns a message retries it; `request` fails with `Maybe` at its deadline;
  - everything queued to a peer within one tick of the loop leaves as one frame.
Invariants: B1 at most `DIALERS_MAX` peers are dialed for longer than `DIALER_LINGER_S` after they
were last sent to, and never more than `DIALERS_BURST_MAX`; B2 no input raises out of the receive
path, and no address out of the send path: what does not decode or belong is counted and dropped.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any

import msgspec

from manifold.kernel.effects import Plane
from manifold.kernel.errors import Maybe, PeerError, Unavailable
from manifold.kernel.hyperbus import endpoints, faults
from manifold.kernel.hyperbus.door import Door
from manifold.kernel.hyperbus.emulation import Emulation, Wired
from manifold.kernel.hyperbus.filter import Filter
from manifold.kernel.hyperbus.frames import (
    Outbox,
    Reassembly,
    decode_envelope,
    decode_frame,
    encode_envelope,
)
from manifold.kernel.hyperbus.messages import (
    CLIENT_PREFIX,
    REQUESTS_MAX,
    UNDECODABLE,
    Chunk,
    Envelope,
    Failure,
    Frame,
)
from manifold.kernel.hyperbus.seal import Plain, Seal
from manifold.kernel.hyperbus.sockets import ReverseReceiver, ReverseSender
from manifold.kernel.hyperbus.streams import Receiver, Sender
from manifold.kernel.limits import (
    DIALERS_MAX,
    FRAME_BYTES_MAX,
    PEERS_MAX,
    SOCKET_BUFFER_FRAMES,
)

log = logging.getLogger("manifold.hyperbus")

SOURCES_COUNTED_MAX = 4096  # distinct bad sources remembered
# A line that is closed loses what it still holds, so one that was just used stays for this long:
# 20 ms to connect and 48 ms for 16 frames of 1 MiB at 400 MB/s, ten times over.
DIALER_LINGER_S = 1.0
DIALERS_BURST_MAX = 4 * DIALERS_MAX  # a question to 256 nodes at once: half of 1024 descriptors


class Incoming(msgspec.Struct, frozen=True, gc=False):
    """A message as it arrived; `request` not 0 wants a reply, through `Bus.reply`."""

    source: str
    boot: int
    body: Any
    request: int
    destination: str
    plane: Plane


@dataclass(slots=True)
class _Line:
    """One plane to one peer: its queue and, once needed, its socket."""

    outbox: Outbox = field(default_factory=Outbox)
    socket: Sender | ReverseSender | None = None


@dataclass(slots=True)
class _Peer:
    lines: dict[Plane, _Line] = field(
        default_factory=lambda: {Plane.CONTROL: _Line(), Plane.DATA: _Line()}
    )
    reverse: bool = False  # it dials us: its socket cannot be opened again from here
    used_s: float = 0.0


class Bus:
    """See the module. `decoder` knows every body that is understood. `tcp`: this process is in a
    network that nobody else reaches, in which lines may be TCP though they are not sealed."""

    def __init__(
        self,
        identity: str,
        boot: int,
        cluster: str,
        decoder: msgspec.msgpack.Decoder[Any],
        on_message: Callable[[Incoming], None],
        *,
        alias: str = "",
        seal: Seal | None = None,
        tcp: bool = False,
    ) -> None:
        self.identity = identity
        self.boot = boot
        self.cluster = cluster
        self.alias = alias
        self.filter = Filter()
        self.counters: Counter[str] = Counter()
        self._decoder = decoder
        self._on_message = on_message
        self._seal: Seal = seal or Plain()
        self._tcp = tcp
        self._loop = asyncio.get_running_loop()
        self.emulation = Emulation(
            self.filter, Random(identity), self._loop, self._names, self._land, self._mark,
            self.counters,
        )  # fmt: skip
        self._addresses: dict[str, str] = {}
        self._known_at: OrderedDict[str, str] = OrderedDict()  # address to peer, for its link
        self._trim: asyncio.TimerHandle | None = None
        self._peers: OrderedDict[str, _Peer] = OrderedDict()
        self._dirty: dict[tuple[str, Plane], None] = {}
        self._flush_wanted = False
        self._encoded: tuple[Any, Any] = (None, None)
        self._requests: dict[int, tuple[asyncio.Future[Any], asyncio.TimerHandle, str]] = {}
        self._next_request = 1
        self._reassembly = Reassembly()
        self._receivers: list[Receiver | ReverseReceiver] = []
        self._door: Door | None = None
        self._closed = False

    # -- where others are ---------------------------------------------------------------------

    def listen(self, address: str, line: str = "") -> None:
        """Serve the door and both planes at `address`, and for peers both planes at `line`."""
        for each in (address, line) if line else (address,):
            self._receive(each, Plane.CONTROL)
            self._receive(each, Plane.DATA)
        self._door = Door(self, address, self._loop)

    def listen_client(self, address: str) -> None:
        """Receive at `address` alone: what a client on the same host does."""
        self._receive(address, Plane.CONTROL)

    def dial_reverse(self, reverse: str) -> None:
        """Receive by dialing `reverse`: what a client that cannot be dialed does."""
        arrived = partial(self._arrived, Plane.CONTROL)
        self._receivers.append(ReverseReceiver(reverse, self._loop, arrived))

    def learn(self, peer: str, address: str) -> None:
        """`peer` is reached at `address` from now on."""
        if self._addresses.get(peer) == address or not address:
            return
        if peer not in self._addresses and len(self._addresses) >= PEERS_MAX:
            raise Unavailable("Too many peers are known.", "Raise PEERS_MAX.")
        self._addresses[peer] = address
        self._known_at[address] = peer
        self._known_at.move_to_end(address)
        if len(self._known_at) > PEERS_MAX:
            self._known_at.popitem(last=False)
        self.emulation.learned(peer, address)
        self._hang_up(peer)

    def learn_reverse(self, peer: str, listen: str) -> None:
        """`peer` will dial us at `listen` and take both planes there."""
        socket = ReverseSender(listen, self._loop)
        self._hang_up(peer)
        self._make_room()
        entry = _Peer(reverse=True)
        line = entry.lines[Plane.CONTROL]
        line.socket = socket
        socket.on_ready = partial(self._drain, peer, Plane.CONTROL, line)
        entry.lines[Plane.DATA] = line
        self._peers[peer] = entry
        self._addresses[peer] = listen

    def dialed_by(self, peer: str) -> bool:
        """Whether `peer` has dialed its reverse channel and still holds it."""
        entry = self._peers.get(peer)
        socket = entry.lines[Plane.CONTROL].socket if entry is not None else None
        return isinstance(socket, ReverseSender) and socket.dialed

    def forget(self, peer: str) -> None:
        """Drop what is queued to `peer` and everything known of it."""
        self._addresses.pop(peer, None)
        self._reassembly.forget(peer)
        self._hang_up(peer)

    def clients(self) -> list[tuple[str, str]]:
        """Clients that listen for themselves, and where."""
        return [
            (peer, address)
            for peer, address in self._addresses.items()
            if peer.startswith(CLIENT_PREFIX) and not self._is_reverse(peer)
        ]

    def _is_reverse(self, peer: str) -> bool:
        entry = self._peers.get(peer)
        return entry is not None and entry.reverse

    @property
    def dialed(self) -> int:
        """Peers that have a queue and a socket here."""
        return len(self._peers)

    @property
    def in_flight(self) -> int:
        """Requests that wait for their answers."""
        return len(self._requests)

    @property
    def queued_bytes(self) -> int:
        """What waits for a socket, of all peers."""
        total = 0
        for peer in self._peers.values():
            total += peer.lines[Plane.CONTROL].outbox.queued_bytes
            if not peer.reverse:  # else both planes are one line
                total += peer.lines[Plane.DATA].outbox.queued_bytes
        return total + self.emulation.held_bytes

    def address_of(self, peer: str) -> str:
        """Where `peer` is reached, or "" where that is not known."""
        return self._addresses.get(peer, "")

    def _names(self, to: str) -> tuple[str, str]:
        """Identity and alias of whom `to` means, where they are known: an address ends in the alias
        of its node, and may be that of somebody who was never heard of, or was forgotten."""
        if "://" in to:
            return self._known_at.get(to, ""), to.rpartition("/")[2]
        address = self._addresses.get(to)
        if address is None:
            address = next((at for at, peer in self._known_at.items() if peer == to), "")
        return to, address.rpartition("/")[2]

    def knows(self, peer: str) -> bool:
        return "://" in peer or peer in self._addresses

    # -- sending ------------------------------------------------------------------------------

    def send(
        self,
        to: str,
        body: msgspec.Struct,
        plane: Plane = Plane.CONTROL,
        *,
        request: int = 0,
        reply_to: int = 0,
        deadline_ms: float = 0.0,
        destination: str = "",
    ) -> None:
        """Queue one message to a peer or an address; `Unavailable` where it cannot be queued."""
        if self._closed:
            raise Unavailable("The bus is closed.")
        if not self.knows(to):
            raise Unavailable(f"No address of {to} is known.", "It may not have joined yet.")
        if request or reply_to or destination:
            envelope = Envelope(msgspec.Raw(b""), request, reply_to, deadline_ms, destination)
            encoded = encode_envelope(body, envelope)
        elif body is self._encoded[0]:  # the same for several peers: encoded once
            encoded = self._encoded[1]
        else:
            encoded = encode_envelope(body, Envelope(msgspec.Raw(b""), 0, 0, deadline_ms, ""))
            self._encoded = (body, encoded)
        self._line(to, plane).outbox.put(encoded)
        self._mark(to, plane)

    def _mark(self, to: str, plane: Plane) -> None:
        self._dirty[(to, plane)] = None
        if not self._flush_wanted:
            self._flush_wanted = True
            self._loop.call_soon(self._flush)

    def request(
        self, to: str, body: msgspec.Struct, timeout_ms: float, *, destination: str = ""
    ) -> asyncio.Future[Any]:
        """Send and await the answer. Raises the peer's error, or `Maybe` at the deadline."""
        if len(self._requests) >= REQUESTS_MAX:
            raise Unavailable("Too many requests are in flight.", "Wait for some to end.")
        number = self._next_request
        self._next_request += 1
        self.send(to, body, request=number, deadline_ms=timeout_ms, destination=destination)
        future: asyncio.Future[Any] = self._loop.create_future()
        timer = self._loop.call_later(timeout_ms / 1000, self._expire, number, to)
        self._requests[number] = (future, timer, to)
        future.add_done_callback(lambda _: self._settle(number))
        return future

    def reply(self, incoming: Incoming, body: msgspec.Struct) -> None:
        """Answer a request; an answer that cannot be queued is counted: the asker will time out."""
        if not incoming.request:
            return
        try:
            self.send(incoming.source, body, incoming.plane, reply_to=incoming.request)
        except Unavailable:
            self.counters["replies_dropped"] += 1

    def _settle(self, number: int) -> None:
        entry = self._requests.pop(number, None)
        if entry is not None:
            entry[1].cancel()

    def _expire(self, number: int, to: str) -> None:
        future = self._requests[number][0]
        if not future.done():
            future.set_exception(
                Maybe(f"No answer from {to} in time.", "It may or may not have been done: ask.")
            )

    def _line(self, to: str, plane: Plane) -> _Line:
        peer = self._peers.get(to)
        if peer is None:
            self._make_room()
            peer = self._peers[to] = _Peer()
        else:
            self._peers.move_to_end(to)
        peer.used_s = self._loop.time()
        return peer.lines[plane]

    def _make_room(self) -> None:
        """B1, before a peer is added: the one that was not used for longest goes."""
        quiet_since_s = self._loop.time() - DIALER_LINGER_S
        while len(self._peers) >= DIALERS_MAX:
            oldest = next(name for name, peer in self._peers.items() if not peer.reverse)
            if self._peers[oldest].used_s > quiet_since_s and len(self._peers) < DIALERS_BURST_MAX:
                if self._trim is None:
                    self._trim = self._loop.call_later(DIALER_LINGER_S, self._trim_burst)
                return
            self._hang_up(oldest)

    def _trim_burst(self) -> None:
        self._trim = None
        self._make_room()

    def flush(self) -> None:
        """Send what is queued now, not at the end of this tick: for who has nothing to add."""
        self._flush()

    def _flush(self) -> None:
        self._flush_wanted = False
        dirty, self._dirty = self._dirty, {}
        for to, plane in dirty:
            peer = self._peers.get(to)
            if peer is not None:
                self._drain(to, plane, peer.lines[plane])

    def _drain(self, to: str, plane: Plane, line: _Line) -> None:
        if line.socket is None and not self._dial(to, plane, line):
            return
        if self.emulation.engaged and (wired := self.emulation.wire(to)) is not None:
            self._drain_emulated(wired, to, plane, line)
            return
        socket = line.socket
        assert socket is not None
        for _ in range(SOCKET_BUFFER_FRAMES):
            if not line.outbox.queue or not socket.ready:
                return
            frame, count = line.outbox.take(self.cluster, self.identity, self.boot)
            if not self._send_now(to, plane, socket, frame):
                return
            line.outbox.drop(count)
        self._mark(to, plane)  # others first: it may take them as fast as we write

    def _drain_emulated(self, wired: Wired, to: str, plane: Plane, line: _Line) -> None:
        self.emulation.resume(to)  # perhaps it is the socket that has room again
        for _ in range(SOCKET_BUFFER_FRAMES):
            if not line.outbox.queue or not self.emulation.room(wired, to, plane):
                return
            most = min(wired.wire.pace_bytes, FRAME_BYTES_MAX)
            frame, count = line.outbox.take(self.cluster, self.identity, self.boot, most)
            line.outbox.drop(count)
            self.emulation.offer(wired, to, plane, frame)
        self._mark(to, plane)

    def _dial(self, to: str, plane: Plane, line: _Line) -> bool:
        address = to if "://" in to else self._addresses[to]
        try:
            where = endpoints.of(address, plane, tcp=self._tcp)
            ready = partial(self._drain, to, plane, line)
            line.socket = Sender(where, self._loop, ready, self.counters)
        except PeerError as error:  # no address at all, whoever gave it
            log.warning("%s cannot be dialed at %r: %s", to, address, error)
            self.counters["frames_dropped"] += 1
            line.outbox.drop(len(line.outbox.queue))
            return False
        return True

    def _send_now(
        self, to: str, plane: Plane, socket: Sender | ReverseSender, frame: bytes
    ) -> bool:
        if not socket.send(self._seal.seal(to, plane, frame)):
            return False
        self.counters["frames_sent"] += 1
        self.counters["bytes_sent"] += len(frame)
        return True

    def _land(self, to: str, plane: Plane, frame: bytes) -> bool:
        """An emulated link has carried a frame: whether its socket takes it."""
        if not self.knows(to):
            self.counters["frames_dropped"] += 1  # it was forgotten meanwhile
            return True
        line = self._line(to, plane)
        if line.socket is None and not self._dial(to, plane, line):
            return True
        assert line.socket is not None
        return self._send_now(to, plane, line.socket, frame)

    def _hang_up(self, peer: str) -> None:
        entry = self._peers.pop(peer, None)
        if entry is None:
            return
        control, data = entry.lines[Plane.CONTROL], entry.lines[Plane.DATA]
        for line in (control,) if data is control else (control, data):  # one where it is reverse
            if line.socket is not None:
                line.socket.close()
        if self.emulation.engaged:  # another socket is opened for what is on its way
            self._loop.call_soon(self._resume, peer)

    def _resume(self, peer: str) -> None:
        if not self._closed:
            self.emulation.resume(peer)

    # -- receiving ----------------------------------------------------------------------------

    def _receive(self, address: str, plane: Plane) -> None:
        where = endpoints.of(address, plane, tcp=self._tcp)
        arrived, bad = partial(self._arrived, plane), partial(self._bad, "")
        self._receivers.append(Receiver(where, self._loop, arrived, bad, self.counters))

    def _arrived(self, plane: Plane, sealed: bytes) -> None:
        try:
            frame = decode_frame(self._seal.open(plane, sealed), self.cluster)
        except PeerError as error:
            self._bad("", error)
            return
        if self.emulation.engaged and not self.emulation.hears(frame.source):
            return
        self.counters["frames_received"] += 1
        self.counters["bytes_received"] += len(sealed)
        for envelope in frame.envelopes:
            self._dispatch(frame, envelope, plane)

    def _dispatch(self, frame: Frame, envelope: Envelope, plane: Plane) -> None:
        try:
            body = self._decoder.decode(envelope.body)
            if isinstance(body, Chunk):
                whole = self._reassembly.add((frame.source, frame.boot, plane.value), body)
                if whole is None:
                    return
                envelope = decode_envelope(whole)
                body = self._decoder.decode(envelope.body)
                if isinstance(body, Chunk):
                    raise PeerError("A chunk inside a chunk.")
        except (*UNDECODABLE, PeerError) as error:
            self._bad(frame.source, error)
            if envelope.request:  # so that who asks learns it now and not at its deadline
                self._refuse(frame, envelope, plane, error)
            return
        if envelope.reply_to:
            self._answered(envelope.reply_to, body)
            return
        self._on_message(
            Incoming(frame.source, frame.boot, body, envelope.request, envelope.destination, plane)
        )

    def _refuse(self, frame: Frame, envelope: Envelope, plane: Plane, error: Exception) -> None:
        asked = Incoming(frame.source, frame.boot, None, envelope.request, "", plane)
        refusal = PeerError(f"The request was not understood: {error}.", "Are both of one version?")
        self.reply(asked, faults.to_failure(refusal))

    def _answered(self, number: int, body: Any) -> None:
        entry = self._requests.get(number)
        if entry is None or entry[0].done():
            self.counters["late_replies"] += 1
        elif isinstance(body, Failure):
            entry[0].set_exception(faults.to_error(body))
        else:
            entry[0].set_result(body)

    def _bad(self, source: str, error: Exception) -> None:
        """B2: count it; say it once per source."""
        name = f"bad:{source}" if len(self.counters) < SOURCES_COUNTED_MAX else "bad:others"
        if not self.counters[name]:
            log.warning("dropped a malformed message from %r: %s", source, error)
        self.counters[name] += 1
        self.counters["bad"] += 1

    def close(self) -> None:
        """Close every socket; requests in flight fail with `Unavailable`."""
        if self._closed:
            return
        self._closed = True
        if self._trim is not None:
            self._trim.cancel()
        if self._door is not None:
            self._door.close()
        for receiver in self._receivers:
            receiver.close()
        self.emulation.close()
        for peer in list(self._peers):
            self._hang_up(peer)
        for future, timer, to in list(self._requests.values()):
            timer.cancel()
            if not future.done():
                future.set_exception(Unavailable(f"The connection to {to} was closed."))
        self._requests.clear()
