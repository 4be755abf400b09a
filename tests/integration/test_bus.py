"""Buses that talk over real sockets: batches, bounds, requests, chunks, reverse channels, cuts."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from manifold.kernel.effects import Plane
from manifold.kernel.errors import Maybe, NoCluster, NotFound, PeerError, Refused, Unavailable
from manifold.kernel.hyperbus import driver
from manifold.kernel.hyperbus.door import Door, knock
from manifold.kernel.hyperbus.driver import Bus, Incoming
from manifold.kernel.hyperbus.faults import to_failure
from manifold.kernel.hyperbus.filter import Link
from manifold.kernel.hyperbus.messages import VERSION, Hello
from manifold.kernel.limits import DIALERS_MAX, PEER_QUEUE_ENVELOPES_MAX, REVERSE_CHANNELS_MAX
from manifold.kernel.messages import DECODER, Done, GetNode, LogLines

PATIENCE_S = 20.0


class Net:
    """Buses in one folder, on one loop; each keeps what it was sent. Their lines are Unix sockets
    in that folder, or TCP at an address that no other process of these tests takes."""

    def __init__(self, folder: Path, kind: str = "unix") -> None:
        self.folder = folder
        self.tcp = kind == "tcp"
        self._ports: dict[str, int] = {}
        self.buses: dict[str, Bus] = {}
        self.got: dict[str, list[Incoming]] = {}
        self.answer: Callable[[Bus, Incoming], None] = lambda bus, incoming: None

    def address(self, name: str) -> str:
        return f"ipc://{self.folder}/{name}"

    def line(self, name: str) -> str:
        """Where its peers reach it."""
        if not self.tcp:
            return self.address(name)
        port = self._ports.setdefault(name, 20_000 + 2 * len(self._ports))
        pid = os.getpid()
        return f"tcp://127.{pid >> 14 & 127}.{pid >> 7 & 127}.{1 + (pid & 127)}:{port}/{name}"

    def bus(self, name: str, *, listen: bool = True, boot: int = 1, **options: Any) -> Bus:
        got = self.got.setdefault(name, [])

        def arrived(incoming: Incoming) -> None:
            got.append(incoming)
            self.answer(bus, incoming)

        bus = Bus(name, boot, "c", DECODER, arrived, tcp=self.tcp, **options)
        if listen:
            bus.listen(self.address(name), self.line(name) if self.tcp else "")
        self.buses[name] = bus
        return bus

    def pair(self) -> tuple[Bus, Bus]:
        one, two = self.bus("K-1"), self.bus("K-2")
        one.learn("K-2", self.line("K-2"))
        two.learn("K-1", self.line("K-1"))
        return one, two

    async def until(self, condition: Callable[[], object], seconds: float = PATIENCE_S) -> None:
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.002)

    async def until_answered(self, bus: Bus, expected: str, what: str) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    answer = await bus.request("K-2", Done(what), 200)
                except Maybe:
                    continue
                assert answer == Done(expected)
                return

    async def knocked(self, name: str, hello: Hello) -> Any:
        return await asyncio.to_thread(knock, self.address(name), hello, 2000)


Run = Callable[[Callable[[Net], Coroutine[Any, Any, None]]], None]


@pytest.fixture(params=["unix", "tcp"])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Runs a test's coroutine with a `Net` of either kind of lines; every bus is closed, and no
    socket may be left."""
    yield from _run(request.param)


@pytest.fixture
def run_unix() -> Iterator[Run]:
    """For what is about the door, and files of sockets."""
    yield from _run("unix")


def _run(kind: str) -> Iterator[Run]:
    folder = Path(tempfile.mkdtemp(prefix="mf-"))
    net = Net(folder, kind)

    async def closing(test: Callable[[Net], Awaitable[None]]) -> None:
        try:
            await test(net)
        finally:
            for bus in net.buses.values():
                bus.close()

    yield lambda test: asyncio.run(closing(test))
    left = [path.name for path in folder.iterdir()]
    shutil.rmtree(folder)
    assert left == []


def test_everything_sent_in_one_tick_leaves_as_one_message(run: Run) -> None:
    async def test(net: Net) -> None:
        one, two = net.pair()
        for number in range(500):
            one.send("K-2", Done(str(number)))
        await net.until(lambda: len(net.got["K-2"]) == 500)
        assert [incoming.body.what for incoming in net.got["K-2"]] == [str(n) for n in range(500)]
        assert one.counters["frames_sent"] == 1
        assert two.counters["frames_received"] == 1
        assert net.got["K-2"][0].source == "K-1"

    run(test)


def test_a_request_is_answered_and_its_peers_error_is_raised(run: Run) -> None:
    async def test(net: Net) -> None:
        one, _ = net.pair()
        net.answer = lambda bus, incoming: bus.reply(
            incoming,
            Done("yes")
            if isinstance(incoming.body, GetNode)
            else to_failure(NotFound("No.", "Look.")),
        )
        assert await one.request("K-2", GetNode(), 5000) == Done("yes")
        with pytest.raises(NotFound, match=r"No\. Look\."):
            await one.request("K-2", Done(), 5000)
        assert one._requests == {}

    run(test)


def test_a_request_nobody_answers_is_maybe_at_its_deadline_and_a_late_reply_is_counted(
    run: Run,
) -> None:
    async def test(net: Net) -> None:
        one, two = net.pair()
        began = time.monotonic()
        with pytest.raises(Maybe, match="in time"):
            await one.request("K-2", GetNode(), 150)
        assert 0.14 < time.monotonic() - began < 3
        await net.until(lambda: net.got["K-2"])
        two.reply(net.got["K-2"][0], Done("late"))
        await net.until(lambda: one.counters["late_replies"])
        assert one._requests == {}

    run(test)


def test_a_request_that_is_not_understood_is_refused_at_once(run: Run) -> None:
    async def test(net: Net) -> None:
        one, two = net.pair()
        with pytest.raises(PeerError, match="not understood"):
            await one.request("K-2", LogLines("x", "no number", ()), 5000)  # type: ignore[arg-type]
        assert two.counters["bad"] == 1
        assert net.got["K-2"] == []

    run(test)


def test_closing_fails_what_is_asked_and_refuses_what_is_sent(run: Run) -> None:
    async def test(net: Net) -> None:
        one, _ = net.pair()
        asked = one.request("K-2", GetNode(), 60_000)
        one.close()
        with pytest.raises(Unavailable, match="closed"):
            await asked
        with pytest.raises(Unavailable, match="closed"):
            one.send("K-2", Done())

    run(test)


def test_who_is_not_known_is_unavailable(run: Run) -> None:
    async def test(net: Net) -> None:
        one = net.bus("K-1")
        with pytest.raises(Unavailable, match="No address"):
            one.send("K-9", Done())
        with pytest.raises(Unavailable, match="No address"):
            await one.request("K-9", Done(), 100)

    run(test)


def test_a_full_queue_is_unavailable_and_never_blocks(run: Run) -> None:
    async def test(net: Net) -> None:
        one = net.bus("K-1")
        one.learn("K-2", net.line("K-2"))  # where nobody listens
        sent, began = 0, time.monotonic()
        with pytest.raises(Unavailable, match="full"):
            for sent in range(200 * PEER_QUEUE_ENVELOPES_MAX):
                one.send("K-2", Done())
                if sent % 50 == 0:
                    await asyncio.sleep(0)
        assert sent > PEER_QUEUE_ENVELOPES_MAX
        assert time.monotonic() - began < 5
        net.bus("K-2")  # it appears: what waited arrives, in order, and there is room again
        await net.until(lambda: len(net.got["K-2"]) == sent)
        one.send("K-2", Done("room"))
        await net.until(lambda: net.got["K-2"][-1].body == Done("room"))

    run(test)


def test_a_message_of_tens_of_megabytes_arrives_whole_on_either_plane(run: Run) -> None:
    async def test(net: Net) -> None:
        one, two = net.pair()
        line = secrets.token_hex(1000)
        lines = (line,) * 20_000  # 40 MB
        for plane in Plane:
            one.send("K-2", LogLines(plane.value, 1, lines), plane)
        await net.until(lambda: len(net.got["K-2"]) == 2)
        for incoming in net.got["K-2"]:
            assert incoming.plane.value == incoming.body.alias
            assert incoming.body.lines == lines
        assert two._reassembly.held_bytes == 0

    run(test)


def test_a_peer_that_restarts_at_its_address_is_reached_again(run: Run) -> None:
    async def test(net: Net) -> None:
        one, two = net.pair()
        one.send("K-2", Done("first"))
        await net.until(lambda: len(net.got["K-2"]) == 1)
        two.close()
        net.bus("K-2", boot=2)

        async def reached() -> None:
            while len(net.got["K-2"]) < 2:  # what is in flight when a connection breaks may be lost
                one.send("K-2", Done("again"))
                await asyncio.sleep(0.02)

        await asyncio.wait_for(reached(), PATIENCE_S)
        assert net.got["K-2"][-1].body == Done("again")

    run(test)


OTHER = """
import asyncio, os, signal, sys
from manifold.kernel.hyperbus.driver import Bus
from manifold.kernel.messages import DECODER, Done

async def main(address, line, ours):
    tcp = line.startswith("tcp:")
    def arrived(incoming):
        bus.reply(incoming, Done(f"{os.getpid()} got {incoming.body.what}"))
    bus = Bus("K-2", os.getpid(), "c", DECODER, arrived, tcp=tcp)
    bus.learn("K-1", ours)
    bus.listen(address, line if tcp else "")
    print("up", flush=True)
    await asyncio.Event().wait()

asyncio.run(main(*sys.argv[1:]))
"""


def test_a_process_killed_without_goodbye_is_reached_again_when_it_is_back(run: Run) -> None:
    async def test(net: Net) -> None:
        one = net.bus("K-1")
        one.learn("K-2", net.line("K-2"))
        for life in range(3):
            process = subprocess.Popen(
                [sys.executable, "-c", OTHER, net.address("K-2"), net.line("K-2"), net.line("K-1")],
                stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            try:
                assert process.stdout is not None
                assert await asyncio.to_thread(process.stdout.readline) == "up\n"
                await net.until_answered(one, f"{process.pid} got {life}", str(life))
            finally:
                process.kill()
                process.communicate()
        for path in net.folder.glob("K-2.*"):
            path.unlink()  # of the last life, which was killed

    run(test)


def test_a_stopped_process_blocks_nobody_and_gets_what_waited_when_it_goes_on(run: Run) -> None:
    async def test(net: Net) -> None:
        one, three = net.bus("K-1"), net.bus("K-3")
        one.learn("K-2", net.line("K-2"))
        one.learn("K-3", net.line("K-3"))
        process = subprocess.Popen(
            [sys.executable, "-c", OTHER, net.address("K-2"), net.line("K-2"), net.line("K-1")],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            assert await asyncio.to_thread(process.stdout.readline) == "up\n"
            await net.until_answered(one, f"{process.pid} got x", "x")
            process.send_signal(signal.SIGSTOP)
            lines = LogLines("x", 1, (secrets.token_hex(1000),) * 6000)  # 12 MB: more than a socket
            began = time.monotonic()
            one.send("K-2", lines, Plane.DATA)
            with pytest.raises(Unavailable, match="full"):
                for _ in range(100):
                    one.send("K-2", lines, Plane.DATA)
            asked = one.request("K-2", Done("waited"), 60_000)
            one.send("K-3", Done("another"))
            await net.until(lambda: net.got["K-3"])
            assert time.monotonic() - began < 10
            assert not asked.done()
            process.send_signal(signal.SIGCONT)
            assert await asked == Done(f"{process.pid} got waited")
            assert three.counters["frames_received"] == 1
        finally:
            process.kill()
            process.communicate()
        for path in net.folder.glob("K-2.*"):
            path.unlink()

    run(test)


def test_what_is_sent_while_nobody_listens_yet_arrives_in_order(run: Run) -> None:
    async def test(net: Net) -> None:
        one = net.bus("K-1")
        one.learn("K-2", net.line("K-2"))
        for number in range(PEER_QUEUE_ENVELOPES_MAX):
            one.send("K-2", Done(str(number)))
            if number % 100 == 0:
                await asyncio.sleep(0)
        two = net.bus("K-2")
        await net.until(lambda: len(net.got["K-2"]) == PEER_QUEUE_ENVELOPES_MAX)
        assert [incoming.body.what for incoming in net.got["K-2"]] == [
            str(number) for number in range(PEER_QUEUE_ENVELOPES_MAX)
        ]
        assert two.counters["frames_received"] == 2  # what came meanwhile left together

    run(test)


# -- the dialers ----------------------------------------------------------------------------------


def test_dialers_are_few_and_the_one_unused_for_longest_goes(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "DIALER_LINGER_S", 0.0)

    async def test(net: Net) -> None:
        one = net.bus("K-1")
        names = [f"K-{n}" for n in range(100, 100 + DIALERS_MAX + 5)]
        for name in names:
            one.learn(name, net.line(name))
            one.send(name, Done())
            await asyncio.sleep(0.001)
            one.send(names[0], Done())  # in use all the time
        assert len(one._peers) == DIALERS_MAX
        assert names[0] in one._peers
        assert names[1] not in one._peers
        assert names[-1] in one._peers

    run(test)


def test_a_question_to_more_peers_than_are_dialed_reaches_them_all(run: Run) -> None:
    async def test(net: Net) -> None:
        one = net.bus("K-1")
        names = [f"K-{n}" for n in range(100, 100 + DIALERS_MAX + 16)]
        for name in names:
            net.bus(name)
            one.learn(name, net.line(name))
        for name in names:
            one.send(name, Done())
        await net.until(lambda: all(net.got[name] for name in names))
        await net.until(lambda: len(one._peers) <= DIALERS_MAX, 2 * driver.DIALER_LINGER_S + 5)

    run(test)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "ipc:///" + "x" * 200, "nonsense://"])
def test_an_address_that_cannot_be_dialed_costs_the_message_and_nothing_else(
    run: Run, address: str
) -> None:
    async def test(net: Net) -> None:
        one, _ = net.pair()
        one.send(address, Done())
        one.learn("K-9", address)
        one.send("K-9", Done())
        one.send("K-2", Done())
        await net.until(lambda: net.got["K-2"])
        assert one.counters["frames_dropped"] == 2

    run(test)


# -- the door and reverse channels ----------------------------------------------------------------


def test_a_client_without_an_address_is_answered_over_a_reverse_channel(run_unix: Run) -> None:
    async def test(net: Net) -> None:
        node = net.bus("K-1", alias="server-01")
        client = net.bus("C-1", listen=False)
        net.answer = lambda bus, incoming: bus.reply(incoming, Done("over the reverse channel"))
        welcome = await net.knocked("K-1", Hello(VERSION, "c", "C-1", 1, ""))
        assert (welcome.source, welcome.alias) == ("K-1", "server-01")
        client.dial_reverse(welcome.reverse)
        client.learn(welcome.source, welcome.address)
        for plane in Plane:
            node.send("C-1", Done("pushed"), plane)
        assert await client.request("K-1", GetNode(), 5000) == Done("over the reverse channel")
        await net.until(lambda: len(net.got["C-1"]) == 2)
        assert node.clients() == []  # it does not listen for itself: nobody should try whether
        node.forget("C-1")
        with pytest.raises(Unavailable):
            node.send("C-1", Done())

    run_unix(test)


def test_reverse_channels_are_few_and_those_nobody_dials_are_closed(run_unix: Run) -> None:
    async def test(net: Net) -> None:
        node = net.bus("K-1", listen=False)
        node.listen_client(net.address("K-1"))
        door = node._door = Door(node, net.address("K-1"), asyncio.get_running_loop(), 50.0)
        used = net.bus("C-used", listen=False)
        for number in range(2 * REVERSE_CHANNELS_MAX):
            await net.knocked("K-1", Hello(VERSION, "c", f"C-{number}", 1, ""))
            assert len(door._reverse) <= REVERSE_CHANNELS_MAX
        welcome = await net.knocked("K-1", Hello(VERSION, "c", "C-used", 1, ""))
        used.dial_reverse(welcome.reverse)
        await net.until(lambda: list(door._reverse) == ["C-used"])
        node.send("C-used", Done())
        await net.until(lambda: net.got["C-used"])

    run_unix(test)


def test_a_knock_where_nobody_is_fails_at_once(run_unix: Run) -> None:
    async def test(net: Net) -> None:
        began = time.monotonic()
        with pytest.raises(NoCluster, match="manifold up"):
            await net.knocked("K-1", Hello(VERSION, "c", "C-1", 1, ""))
        assert time.monotonic() - began < 1

    run_unix(test)


def test_a_knock_at_another_clusters_door_is_refused(run_unix: Run) -> None:
    async def test(net: Net) -> None:
        net.bus("K-1")
        with pytest.raises(Refused, match="this is cluster 'c', not 'd'"):
            await net.knocked("K-1", Hello(VERSION, "d", "C-1", 1, ""))

    run_unix(test)


# -- the filter -----------------------------------------------------------------------------------


def test_a_cut_holds_one_way_also_for_what_is_sent_by_address(run: Run) -> None:
    async def test(net: Net) -> None:
        one, two = net.pair()
        one.filter.set("K-2", Link(cut_to=True))
        one.send("K-2", Done())
        one.send(net.line("K-2"), Done())
        two.send("K-1", Done())
        await net.until(lambda: net.got["K-1"] and one.counters["frames_cut"] == 2)
        one.forget("K-2")  # a peer that is held for dead is still who lives there
        one.send(net.line("K-2"), Done())
        await net.until(lambda: one.counters["frames_cut"] == 3)
        one.filter.clear()
        one.send(net.line("K-2"), Done("healed"))
        await net.until(lambda: net.got["K-2"])
        assert [incoming.body for incoming in net.got["K-2"]] == [Done("healed")]

    run(test)


def test_what_comes_from_a_cut_peer_is_dropped(run: Run) -> None:
    async def test(net: Net) -> None:
        one, two = net.pair()
        two.filter.set("*", Link(cut_from=True))
        one.send("K-2", Done())
        await net.until(lambda: two.counters["frames_cut"])
        assert net.got["K-2"] == []

    run(test)


def test_a_delay_holds_each_frame_so_long(run: Run) -> None:
    async def test(net: Net) -> None:
        one, _ = net.pair()
        one.send("K-2", Done())
        await net.until(lambda: net.got["K-2"])  # connected
        one.filter.set("K-2", Link(latency_ms=150))
        began = time.monotonic()
        one.send("K-2", Done())
        await net.until(lambda: len(net.got["K-2"]) == 2)
        assert 0.14 < time.monotonic() - began < 3

    run(test)


def test_a_lossy_link_loses_that_share(run: Run) -> None:
    async def test(net: Net) -> None:
        one, two = net.pair()
        one.send("K-2", Done("first"))
        await net.until(lambda: net.got["K-2"])  # connected: each tick is a frame of its own
        one.filter.set("K-2", Link(loss=0.5))
        for _ in range(300):
            one.send("K-2", Done())
            await asyncio.sleep(0.001)
        one.filter.clear()
        one.send("K-2", Done("last"))
        await net.until(lambda: net.got["K-2"][-1].body == Done("last"))
        lost, arrived = one.counters["frames_lost"], two.counters["frames_received"]
        assert lost + arrived == one.counters["frames_sent"] + lost == 302
        assert 90 < lost < 210

    run(test)


# -- the seal's place -----------------------------------------------------------------------------


class Spoken:
    """A seal that can be seen: frames are turned round, and everything else is refused."""

    def __init__(self) -> None:
        self.sealed: list[tuple[str, Plane]] = []
        self.opened: list[Plane] = []

    def seal(self, peer: str, plane: Plane, frame: bytes) -> bytes:
        self.sealed.append((peer, plane))
        return b"sealed" + frame[::-1]

    def open(self, plane: Plane, sealed: bytes) -> bytes:
        self.opened.append(plane)
        if not sealed.startswith(b"sealed"):
            raise PeerError("That is not authentic.")
        return sealed[len(b"sealed") :][::-1]


def test_every_frame_passes_the_seal_and_what_is_not_sealed_is_dropped(run: Run) -> None:
    async def test(net: Net) -> None:
        seals = Spoken(), Spoken()
        one, two = net.bus("K-1", seal=seals[0]), net.bus("K-2", seal=seals[1])
        stranger = net.bus("K-3")
        for bus in (one, stranger):
            bus.learn("K-2", net.line("K-2"))
        one.send("K-2", Done("on control"))
        one.send("K-2", LogLines("on data", 0, ("x" * 1000,) * 3000), Plane.DATA)
        stranger.send("K-2", Done("not sealed"))
        await net.until(lambda: len(net.got["K-2"]) == 2 and two.counters["bad"])
        assert {incoming.source for incoming in net.got["K-2"]} == {"K-1"}
        assert len(seals[0].sealed) == one.counters["frames_sent"] == 4  # one, and three of chunks
        assert set(seals[0].sealed) == {("K-2", Plane.CONTROL), ("K-2", Plane.DATA)}
        assert len(seals[1].opened) == 5

    run(test)


def test_sockets_are_only_where_they_were_asked_for(run_unix: Run) -> None:
    async def test(net: Net) -> None:
        net.bus("K-1")
        assert sorted(os.listdir(net.folder)) == ["K-1.a", "K-1.c", "K-1.d"]

    run_unix(test)
