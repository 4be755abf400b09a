"""Lines over stream sockets, of one host and over TCP alike: frames stay whole, connections are few
and fair, breaks are healed."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import socket
import tempfile
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifold.kernel.errors import PeerError, Unavailable
from manifold.kernel.hyperbus import endpoints, streams
from manifold.kernel.hyperbus.endpoints import Tcp, Where
from manifold.kernel.hyperbus.splitter import LENGTH, SEALED_BYTES_MAX, Splitter, framed
from manifold.kernel.hyperbus.streams import Receiver, Sender
from manifold.kernel.limits import SOCKET_BUFFER_FRAMES

PATIENCE_S = 20.0
LARGE = SEALED_BYTES_MAX  # more than a socket takes at once, whatever the limits of the host

# -- bytes to frames ------------------------------------------------------------------------------


def split(splitter: Splitter, data: bytes) -> list[bytes]:
    splitter.feed(data)
    return list(iter(splitter.take, None))


@given(st.lists(st.binary(max_size=40), max_size=8), st.lists(st.integers(0, 400), max_size=12))
def test_frames_come_out_as_they_went_in_wherever_the_stream_is_cut(
    frames: list[bytes], cuts: list[int]
) -> None:
    data = b"".join(map(framed, frames))
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    splitter, found = Splitter(), []
    for low, high in pairwise(edges):
        found += split(splitter, data[low:high])
    assert found == frames
    assert splitter.held_bytes == 0


def test_a_cut_at_any_byte_and_bytes_one_by_one_make_no_difference() -> None:
    frames = [b"", b"a", b"x" * 300, b"", b"last"]
    data = b"".join(map(framed, frames))
    for cut in range(len(data) + 1):
        splitter = Splitter()
        assert split(splitter, data[:cut]) + split(splitter, data[cut:]) == frames
    splitter = Splitter()
    assert [frame for at in range(len(data)) for frame in split(splitter, data[at : at + 1])] == (
        frames
    )


@given(st.integers(SEALED_BYTES_MAX + 1, (1 << 32) - 1), st.integers(1, 4), st.binary(max_size=9))
def test_a_length_that_no_frame_has_is_refused_as_soon_as_it_is_known(
    length: int, cut: int, rest: bytes
) -> None:
    splitter, data = Splitter(), framed(b"good") + LENGTH.pack(length)
    at = len(data) - cut
    assert split(splitter, data[:at]) == [b"good"]
    splitter.feed(data[at:] + rest)
    with pytest.raises(PeerError, match=f"A frame of {length} bytes is larger"):
        splitter.take()


def test_no_more_is_held_than_has_come_and_the_largest_frame_passes() -> None:
    splitter, data = Splitter(), framed(b"x" * SEALED_BYTES_MAX)
    for at in range(0, len(data) - 9, 10_000):
        assert split(splitter, data[at : min(at + 10_000, len(data) - 9)]) == []
    assert splitter.held_bytes == len(data) - 9
    assert [len(frame) for frame in split(splitter, data[-9:] + framed(b"next"))] == [
        SEALED_BYTES_MAX, 4,
    ]  # fmt: skip
    assert splitter.held_bytes == 0


# -- over real sockets ----------------------------------------------------------------------------


class Bench:
    """A folder or a port with a receiver, and what it was given."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder
        self.path = str(folder / "line")
        self.where: Where = self.path if kind == "unix" else free_port()
        self.family = socket.AF_UNIX if kind == "unix" else socket.AF_INET
        self.loop = asyncio.get_running_loop()
        self.got: list[bytes] = []
        self.bad: list[PeerError] = []
        self.counters: Counter[str] = Counter()
        self.stack = ExitStack()

    def receiver(self) -> Receiver:
        receiver = Receiver(self.where, self.loop, self.got.append, self.bad.append, self.counters)
        self.stack.callback(receiver.close)
        return receiver

    def sender(self, on_ready: Callable[[], None] = lambda: None) -> Sender:
        sender = Sender(self.where, self.loop, on_ready, self.counters)
        self.stack.callback(sender.close)
        return sender

    def raw(self, data: bytes = b"") -> socket.socket:
        """Somebody who connects and says `data`."""
        made = self.stack.enter_context(socket.socket(self.family))
        made.connect(self.where)
        made.sendall(data)
        return made

    def listener(self, backlog: int = 8) -> socket.socket:
        """Somebody who listens, and accepts when the test says so."""
        made = self.stack.enter_context(socket.socket(self.family))
        made.settimeout(PATIENCE_S)
        if self.family == socket.AF_INET:  # what the test before has left in the kernel
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(self.where)
        made.listen(backlog)
        return made

    async def accept(self, listener: socket.socket) -> socket.socket:
        accepted, _ = await asyncio.to_thread(listener.accept)
        accepted.settimeout(PATIENCE_S)
        return self.stack.enter_context(accepted)

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await asyncio.sleep(0.001)


def free_port() -> Tcp:
    """On an address of this host that no other process of these tests takes."""
    host = f"127.{os.getpid() >> 14 & 127}.{os.getpid() >> 7 & 127}.{1 + (os.getpid() & 127)}"
    with socket.socket() as probe:
        probe.bind((host, 0))
        return Tcp(*probe.getsockname())


def refused(raw: socket.socket) -> None:
    """What is sent from here on is not taken: TCP says so once its answer has come."""
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        for _ in range(1 if raw.family == socket.AF_UNIX else 2):
            raw.sendall(b"more")


def everything(raw: socket.socket, count: int) -> list[bytes]:
    """`count` frames from a socket, or as many as there are."""
    splitter, frames = Splitter(), []
    while len(frames) < count and (data := raw.recv(1 << 16)):
        frames += split(splitter, data)
    return frames


Run = Callable[[Callable[[Bench], Coroutine[Any, Any, None]]], None]


@pytest.fixture(params=["unix", "tcp"])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Tests of the streams, over both kinds."""
    yield from _run(request.param)


@pytest.fixture
def run_unix() -> Iterator[Run]:
    """Tests of the file that a socket of one host has."""
    yield from _run("unix")


def _run(kind: str) -> Iterator[Run]:
    folder = Path(tempfile.mkdtemp(prefix="mf-"))

    async def closing(test: Callable[[Bench], Coroutine[Any, Any, None]]) -> None:
        bench = Bench(folder, kind)
        with bench.stack:
            await test(bench)

    yield lambda test: asyncio.run(closing(test))
    shutil.rmtree(folder)


def test_a_connection_that_ends_at_any_byte_costs_the_frame_it_was_in(run: Run) -> None:
    async def test(bench: Bench) -> None:
        bench.receiver()
        data = framed(b"one") + framed(b"two")
        for cut in range(len(data) + 1):
            bench.raw(data[:cut]).close()
        whole = sum((cut >= 7) + (cut >= 14) for cut in range(len(data) + 1))
        await bench.until(lambda: len(bench.got) == whole)
        await bench.until(lambda: bench.counters["frames_torn"] == len(data) + 1 - 3)
        assert bench.bad == []
        bench.raw(framed(b"and on"))
        await bench.until(lambda: bench.got[-1] == b"and on")

    run(test)


def test_a_hostile_length_closes_its_connection_and_no_other(run: Run) -> None:
    async def test(bench: Bench) -> None:
        receiver = bench.receiver()
        good = bench.raw(framed(b"before"))
        await bench.until(lambda: bench.got)
        hostile = bench.raw(framed(b"still good") + LENGTH.pack(SEALED_BYTES_MAX + 1) + b"x" * 99)
        await bench.until(lambda: bench.bad)
        assert "larger" in str(bench.bad[0])
        refused(hostile)
        assert len(receiver) == 1
        good.sendall(framed(b"after"))
        await bench.until(lambda: len(bench.got) == 3)
        assert bench.got == [b"before", b"still good", b"after"]

    run(test)


def test_connections_are_few_and_the_one_silent_for_longest_goes_when_it_was_read(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "CONNECTIONS_MAX", 8)

    async def test(bench: Bench) -> None:
        receiver = bench.receiver()
        first = [bench.raw(framed(b"%d" % number)) for number in range(8)]
        await bench.until(lambda: len(bench.got) == 8)
        first[0].sendall(framed(b"in use"))
        await bench.until(lambda: b"in use" in bench.got)
        bench.raw()
        first[1].sendall(framed(b"a last word"))
        await bench.until(lambda: bench.counters["connections_closed"] == 1)
        await bench.until(lambda: len(receiver) == 8)
        assert b"a last word" in bench.got
        refused(first[1])
        for number in (0, *range(2, 8)):
            first[number].sendall(framed(b"still here"))
        await bench.until(lambda: bench.got.count(b"still here") == 7)
        for _ in range(100):
            bench.raw()
        bench.raw(framed(b"heard"))
        await bench.until(lambda: bench.got[-1] == b"heard")
        assert len(receiver) == 8

    run(test)


def test_who_sends_much_keeps_nobody_waiting(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "DRAIN_FRAMES_MAX", 4)

    async def test(bench: Bench) -> None:
        bench.receiver()
        much, little = bench.raw(), bench.raw()
        much.sendall(framed(b"much") * 2000)
        little.sendall(framed(b"little") * 3)
        await bench.until(lambda: len(bench.got) == 2003)
        assert bench.got.index(b"little") < 20

    run(test)


def test_what_has_come_is_handed_on_before_more_is_read(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "DRAIN_FRAMES_MAX", 4)
    monkeypatch.setattr(streams, "READ_BYTES", 100)

    async def test(bench: Bench) -> None:
        def arrived(frame: bytes) -> None:
            bench.got.append(frame)
            held.append(max(each.splitter.held_bytes for each in receiver._connections.values()))

        held: list[int] = []
        receiver = Receiver(bench.where, bench.loop, arrived, bench.bad.append, bench.counters)
        bench.stack.callback(receiver.close)
        bench.raw(framed(b"") * 5000)
        await bench.until(lambda: len(bench.got) == 5000)
        assert max(held) < 104

    run(test)


def test_without_descriptors_accepting_pauses_and_goes_on_by_itself(run: Run) -> None:
    async def test(bench: Bench) -> None:
        receiver = bench.receiver()
        bench.raw(framed(b"early"))
        await bench.until(lambda: bench.got)
        late = [bench.raw(framed(b"late")) for _ in range(3)]
        spare = os.dup(0)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        os.close(spare)  # the least that is free: `accept` would take it
        resource.setrlimit(resource.RLIMIT_NOFILE, (spare, hard))
        try:
            began = bench.loop.time()
            await bench.until(lambda: bench.counters["accepts_failed"] == 3)
            assert bench.loop.time() - began > 1.9 * streams.ACCEPT_PAUSE_S  # it does not spin
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await bench.until(lambda: bench.got.count(b"late") == 3)
        assert len(receiver) == 1 + len(late)

    run(test)


def test_a_receiver_may_be_closed_by_the_frame_it_gives(run: Run) -> None:
    async def test(bench: Bench) -> None:
        def closes(frame: bytes) -> None:
            bench.got.append(frame)
            receiver.close()

        receiver = Receiver(bench.where, bench.loop, closes, bench.bad.append, bench.counters)
        bench.raw(framed(b"one") + framed(b"two"))
        await bench.until(lambda: bench.got)
        assert bench.got == [b"one"]
        assert not os.path.exists(bench.path)

    run(test)


# -- the path -------------------------------------------------------------------------------------


def test_what_a_killed_process_left_is_replaced_and_whoever_listens_is_not(run_unix: Run) -> None:
    async def test(bench: Bench) -> None:
        left = bench.listener()
        with pytest.raises(Unavailable, match="run already"):
            bench.receiver()
        left.close()  # as a killed process: the file stays
        assert os.path.exists(bench.path)
        bench.receiver()
        bench.raw(framed(b"here"))
        await bench.until(lambda: bench.got)

    run_unix(test)


def test_a_file_that_is_no_socket_is_not_taken_away(run_unix: Run) -> None:
    async def test(bench: Bench) -> None:
        Path(bench.path).write_text("mine")
        with pytest.raises(Unavailable):
            bench.receiver()
        assert Path(bench.path).read_text() == "mine"

    run_unix(test)


def test_closing_takes_away_its_own_file_and_no_other(run_unix: Run) -> None:
    async def test(bench: Bench) -> None:
        mine = bench.receiver()
        os.unlink(bench.path)
        other = bench.listener()
        mine.close()
        assert os.path.exists(bench.path)
        other.close()
        os.unlink(bench.path)
        bench.receiver().close()
        assert not os.path.exists(bench.path)

    run_unix(test)


@pytest.mark.parametrize("path", ["/tmp/" + "x" * 103, "/tmp/a\0b", "/tmp/\ud800"])
def test_a_path_that_no_socket_has_is_refused(run_unix: Run, path: str) -> None:
    async def test(bench: Bench) -> None:
        with pytest.raises(PeerError, match="path"):
            Sender(path, bench.loop, lambda: None, bench.counters)

    run_unix(test)


# -- sending --------------------------------------------------------------------------------------


def test_what_is_sent_before_somebody_listens_waits_in_order_within_its_bound(run: Run) -> None:
    async def test(bench: Bench) -> None:
        sender = bench.sender()
        frames = [b"%d" % number for number in range(SOCKET_BUFFER_FRAMES)]
        assert all(sender.send(frame) for frame in frames)
        assert not sender.ready
        assert not sender.send(b"too many")
        bench.receiver()
        await bench.until(lambda: sender.ready)
        sender.send(b"then")
        await bench.until(lambda: len(bench.got) > SOCKET_BUFFER_FRAMES)
        assert bench.got == [*frames, b"then"]

    run(test)


def test_a_peer_that_restarts_gets_every_frame_sent_while_it_was_away_once(run: Run) -> None:
    async def test(bench: Bench) -> None:
        sender = bench.sender()
        for life in range(5):
            receiver = bench.receiver()
            sender.send(b"first of %d" % life)
            await bench.until(lambda: sender.ready)
            sender.send(b"second of %d" % life)
            await bench.until(lambda life=life: bench.got[-1:] == [b"second of %d" % life])
            receiver.close()
            sender.send(b"between")
        assert bench.got == [
            frame
            for life in range(5)
            for frame in ([b"between"] if life else [])
            + [b"first of %d" % life, b"second of %d" % life]
        ]
        assert bench.counters["frames_lost"] == 0

    run(test)


def test_who_does_not_read_blocks_nobody_and_gets_everything_in_the_end(run: Run) -> None:
    async def test(bench: Bench) -> None:
        called: list[bool] = []
        listener, sender = bench.listener(), bench.sender(lambda: called.append(sender.ready))
        sent, began = 0, bench.loop.time()
        while sender.send(b"%08d" % sent + b"x" * (1 << 20)):
            sent += 1
        assert SOCKET_BUFFER_FRAMES <= sent < SOCKET_BUFFER_FRAMES + 8
        assert bench.loop.time() - began < 5
        accepted = await bench.accept(listener)
        frames = await asyncio.to_thread(everything, accepted, sent)
        assert [int(frame[:8]) for frame in frames] == list(range(sent))
        assert {len(frame) for frame in frames} == {8 + (1 << 20)}
        await bench.until(lambda: called)
        assert called == [True]

    run(test)


def test_a_frame_that_was_partly_written_when_its_connection_broke_is_never_sent_again(
    run: Run,
) -> None:
    async def test(bench: Bench) -> None:
        listener, sender = bench.listener(), bench.sender()
        while sender.ready:
            sender.send(b"a" * LARGE)
        for number in range(5):
            sender.send(b"%d" % number)
        broken = await bench.accept(listener)
        broken.recv(100_000)
        broken.close()
        again = await bench.accept(listener)
        frames = await asyncio.to_thread(everything, again, 5)
        assert frames == [b"%d" % number for number in range(5)]
        assert bench.counters["frames_lost"] == 1

    run(test)


def test_who_waited_is_told_when_the_only_frame_was_lost_with_its_connection(run: Run) -> None:
    async def test(bench: Bench) -> None:
        called: list[bool] = []
        listener, sender = bench.listener(), bench.sender(lambda: called.append(sender.ready))
        while sender.ready:
            sender.send(b"a" * LARGE)
        (await bench.accept(listener)).close()
        await bench.until(lambda: called)
        assert called == [True]
        assert bench.counters["frames_lost"] == 1

    run(test)


def test_a_connection_that_broke_while_idle_costs_nothing(run: Run) -> None:
    async def test(bench: Bench) -> None:
        listener, sender = bench.listener(), bench.sender()
        sender.send(b"one")
        broken = await bench.accept(listener)
        assert everything(broken, 1) == [b"one"]
        broken.close()
        sender.send(b"two")
        again = await bench.accept(listener)
        assert everything(again, 1) == [b"two"]

    run(test)


def test_a_full_queue_of_connections_is_tried_again_later(run: Run) -> None:
    async def test(bench: Bench) -> None:
        listener = bench.listener(0)
        bench.raw()  # takes the one place: the process behind it is stopped
        sender = bench.sender()
        began = bench.loop.time()
        assert sender.send(b"patient")
        assert bench.loop.time() - began < 1
        assert not sender.ready
        await bench.accept(listener)
        accepted = await bench.accept(listener)
        assert everything(accepted, 1) == [b"patient"]

    run(test)


def sockets_open() -> set[tuple[int, str]]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the folder's own
            found.add((int(name), os.readlink(f"/proc/self/fd/{name}")))
    return {each for each in found if each[1].startswith("socket:")}


def test_nothing_is_inherited_by_a_program_that_is_started(run: Run) -> None:
    async def test(bench: Bench) -> None:
        before = sockets_open()
        bench.receiver()
        bench.sender().send(b"x")
        await bench.until(lambda: bench.got)
        made = sockets_open() - before
        assert len(made) == 3  # the listener, and both ends
        assert not any(os.get_inheritable(descriptor) for descriptor, _ in made)

    run(test)


class Clock:
    """A loop whose time is set: for `Sender`, which asks it for nothing else."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now_s

    def call_at(self, when_s: float, call: Callable[[], None]) -> asyncio.TimerHandle:
        self.timers.append((when_s, call))
        return None  # type: ignore[return-value]

    def run(self) -> None:
        """To the next timer."""
        (self.now_s, call) = self.timers.pop()
        assert not self.timers
        call()


def test_attempts_are_rarer_and_rarer_and_none_is_made_while_nothing_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, attempts = Clock(), []

    def refused(self: Sender) -> bool:
        attempts.append(clock.now_s)
        return False

    monkeypatch.setattr(Sender, "_connected", refused)
    sender = Sender("/nowhere", clock, lambda: None, Counter())  # type: ignore[arg-type]
    assert (attempts, clock.timers) == ([], [])
    for _ in range(5):
        sender.send(b"x")
    for _ in range(9):
        clock.run()
    gaps = [round(late - early, 6) for early, late in pairwise(attempts)]
    assert gaps == [0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0, 1.0, 1.0]


# -- over TCP -------------------------------------------------------------------------------------


def test_a_port_at_which_somebody_listens_is_not_taken(run: Run) -> None:
    async def test(bench: Bench) -> None:
        bench.receiver()
        with pytest.raises(Unavailable, match="run already"):
            bench.receiver()

    run(test)


def test_a_connection_that_ends_while_nothing_is_sent_is_let_go(run: Run) -> None:
    async def test(bench: Bench) -> None:
        listener, sender = bench.listener(), bench.sender()
        sender.send(b"one")
        before = sockets_open()
        (await bench.accept(listener)).close()
        if bench.family == socket.AF_INET:  # of one host it is seen with the next frame
            await bench.until(lambda: len(before - sockets_open()) == 1)
        sender.send(b"two")
        again = await bench.accept(listener)
        assert everything(again, 1) == [b"two"]

    run(test)


def test_an_attempt_that_nobody_answers_is_given_up_and_made_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streams, "CONNECT_S", 0.05)

    async def test(bench: Bench) -> None:
        attempts: list[socket.socket] = []
        real = endpoints.attempt

        def silent(where: Where) -> tuple[socket.socket, bool]:
            """As a network that has lost the SYN: the first three never become writable."""
            if len(attempts) >= 3:
                return real(where)
            ours, theirs = socket.socketpair()
            ours.setblocking(False)
            with suppress(BlockingIOError):
                while True:
                    ours.send(b"x" * 65536)
            attempts.append(bench.stack.enter_context(theirs))
            return ours, False

        monkeypatch.setattr(endpoints, "attempt", silent)
        bench.receiver()
        sender = bench.sender()
        sender.send(b"in the end")
        await bench.until(lambda: bench.got)
        assert (bench.got, len(attempts)) == ([b"in the end"], 3)

    for run in _run("tcp"):
        run(test)
