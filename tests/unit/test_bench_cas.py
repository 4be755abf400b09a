"""The benchmark of swaps: its client of etcd, its loops, its fairness. No etcd is needed."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from manifold.kernel.errors import Maybe, Unavailable
from manifold.tools.bench import cas, etcd, etcd_client, swaps
from manifold.tools.bench.etcd_client import field, frame, number_field, unpack
from manifold.tools.bench.harness import Absent
from manifold.tools.bench.swaps import EtcdSession, Load


class Memory:
    """A store without a network; `lose` answers "done" to every fifth swap and does nothing."""

    def __init__(self, *, lose: bool = False) -> None:
        self.values: dict[str, int] = {}
        self._lose, self._swaps = lose, 0

    async def read(self, key: str) -> int | None:
        return self.values.get(key)

    async def swap(self, key: str, expected: int | None, new: int) -> tuple[bool, int | None]:
        await asyncio.sleep(0)
        self._swaps += 1
        if self._lose and self._swaps % 5 == 0:
            return True, None
        if self.values.get(key) != expected:
            return False, self.values.get(key)
        self.values[key] = new
        return True, None


# --- loops ------------------------------------------------------------------------------------


def test_loops_on_own_keys_count_every_swap_and_are_never_refused() -> None:
    store = Memory()
    load = asyncio.run(swaps.spread([store], 4, "k", 0.02, one=False))
    assert load.done == len(load.attempts_s) == sum(store.values.values())
    assert sorted(store.values) == ["k.0", "k.1", "k.2", "k.3"]


def test_loops_on_one_key_count_only_what_was_done() -> None:
    store = Memory()
    load = asyncio.run(swaps.spread([store, store], 4, "k", 0.02, one=True))
    assert 0 < load.done < len(load.attempts_s)
    assert store.values == {"k": load.done}


@pytest.mark.parametrize("one", [True, False])
def test_a_store_that_loses_swaps_is_not_measured(one: bool) -> None:
    with pytest.raises(AssertionError):
        asyncio.run(swaps.spread([Memory(lose=True)], 3, "k", 0.1, one=one))


def test_sides_take_turns_and_the_ratio_is_that_of_one_round() -> None:
    turns: list[str] = []

    def side(name: str, rates: list[int]) -> Callable[[], Awaitable[Load]]:
        async def measure() -> Load:
            turns.append(name)
            return Load([0.001], rates[turns.count(name) - 1], 1.0, 0.5)

        return measure

    pair = cas.Pair(side("ours", [1, 10, 200, 90]), side("etcd", [1, 20, 100, 30]))
    asyncio.run(pair.run(3))
    assert turns == ["etcd", "ours", "ours", "etcd", "etcd", "ours", "ours", "etcd"]
    found = pair.figure("rate", lambda load: load.per_s, "/s", lower=False, goal=1.0)
    assert found.value == 2.0  # of 0.5, 2 and 3: not the ratio of the medians, 90 to 30
    assert (found.raw["ratio lowest"], found.raw["ratio highest"]) == (0.5, 3.0)
    assert found.met


def test_the_file_system_is_that_of_the_nearest_mount() -> None:
    assert cas.file_system(Path("/proc/self")) == "proc"


# --- the client of etcd -----------------------------------------------------------------------


def test_a_swap_is_packed_as_etcds_protobuf_has_it() -> None:
    compare, put, get = (value for _, value in unpack(etcd_client.cas_request(b"k", b"1", b"2")))
    assert isinstance(compare, bytes) and isinstance(put, bytes) and isinstance(get, bytes)
    assert list(unpack(compare)) == [(2, 3), (3, b"k"), (7, b"1")]  # VALUE equals
    assert put == field(2, field(1, b"k") + field(2, b"2"))
    assert get == field(1, field(1, b"k"))


def test_a_swap_that_expects_nothing_asks_for_no_creation_revision() -> None:
    compare = next(value for _, value in unpack(etcd_client.cas_request(b"k", None, b"2")))
    assert isinstance(compare, bytes)
    assert list(unpack(compare)) == [(2, 1), (3, b"k"), (5, 0)]


@pytest.mark.parametrize("number", [0, 1, 127, 128, 300, (1 << 63) - 1])
def test_numbers_come_back_as_they_were_packed(number: int) -> None:
    assert list(unpack(number_field(9, number))) == [(9, number)]


def pair_of(key: bytes, value: bytes) -> bytes:
    return field(2, field(1, key) + number_field(2, 300) + field(5, value))


def test_a_refused_swap_tells_what_is_there() -> None:
    header = field(1, number_field(1, 77))
    refused = header + field(3, field(1, header + pair_of(b"k", b"41")))
    assert etcd_client.cas_answer(refused) == (False, b"41")
    assert etcd_client.cas_answer(header + field(3, field(1, header))) == (False, None)
    assert etcd_client.cas_answer(header + number_field(2, 1)) == (True, None)


Answer = Callable[[bytes, bytes], bytes | None]


@asynccontextmanager
async def server(answer: Answer, *, cut: int = 1 << 20) -> AsyncIterator[int]:
    """Speaks enough HTTP/2; what it sends leaves in pieces of `cut` bytes. None: no message."""

    serving: list[asyncio.Task[None] | None] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.append(asyncio.current_task())
        assert await reader.readexactly(len(etcd_client.PREFACE)) == etcd_client.PREFACE
        out = frame(etcd_client.SETTINGS, 0, 0, b"") + frame(etcd_client.PING, 0, 0, b"12345678")
        paths: dict[int, bytes] = {}
        pongs = 0
        while head := await reader.read(9):
            length, kind, flags = int.from_bytes(head[:3], "big"), head[3], head[4]
            stream = int.from_bytes(head[5:9], "big")
            payload = await reader.readexactly(length)
            pongs += kind == etcd_client.PING and payload == b"12345678" and flags == 1
            if kind == etcd_client.HEADERS:
                paths[stream] = payload
            elif kind == etcd_client.DATA:
                size = struct.unpack(">xI", payload[:5])[0]
                assert flags == etcd_client.END_STREAM
                message = answer(paths.pop(stream), payload[5 : 5 + size])
                if message is not None:
                    body = etcd_client.GRPC_PREFIX.pack(0, len(message)) + message
                    out += frame(etcd_client.HEADERS, 4, stream, b"\x88")
                    out += frame(etcd_client.DATA, 0, stream, body)
                out += frame(etcd_client.HEADERS, 5, stream, b"\x88")
            for at in range(0, len(out), cut):
                writer.write(out[at : at + cut])
                await writer.drain()
            out = b""
        writer.close()
        await writer.wait_closed()
        assert pongs == 1, "a server that gets no answer to its ping hangs up"

    listening = await asyncio.start_server(serve, etcd.HOST, 0)
    async with listening:
        try:
            yield listening.sockets[0].getsockname()[1]
        finally:
            await asyncio.gather(*(each for each in serving if each is not None))


@pytest.mark.parametrize("cut", [1, 7, 1 << 20])
def test_calls_share_a_connection_and_get_their_own_answers(cut: int) -> None:
    def answer(path: bytes, message: bytes) -> bytes:
        assert etcd_client.RANGE in path
        key = next(value for number, value in unpack(message) if number == 1)
        assert isinstance(key, bytes)
        return pair_of(key, key[1:])

    async def ask() -> list[int | None]:
        async with server(answer, cut=cut) as port:
            connection = await etcd_client.connect(etcd.HOST, port)
            session = EtcdSession(connection)
            found = await asyncio.gather(*(session.read(f"k{number}") for number in range(50)))
            connection.close()
            return found

    assert asyncio.run(ask()) == list(range(50))


def test_a_call_without_a_message_was_refused() -> None:
    async def ask() -> None:
        async with server(lambda _path, _message: None) as port:
            connection = await etcd_client.connect(etcd.HOST, port)
            try:
                await connection.read(b"k")
            finally:
                connection.close()

    with pytest.raises(Maybe):
        asyncio.run(ask())


def test_where_nobody_listens_nothing_was_done() -> None:
    with etcd.held_ports(1) as (port,), pytest.raises(Unavailable):
        asyncio.run(etcd_client.connect(etcd.HOST, port))


# --- the cluster of etcd ----------------------------------------------------------------------


def test_a_held_port_is_free_for_who_asks_for_it_by_number() -> None:
    with etcd.held_ports(6) as ports:
        assert len(set(ports)) == 6
        for port in ports:
            with socket.socket() as other:  # as Go listens
                other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                other.bind((etcd.HOST, port))
                other.listen()


def test_where_etcd_is_missing_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(Absent, match="apt-get install etcd-server"):
        etcd.program()


def test_a_cluster_that_does_not_come_up_says_why_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "bin" / "etcd"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho no disk today\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/bin:/usr/bin")
    with (
        pytest.raises(Absent, match="ended with 3: no disk today"),
        etcd.etcd_cluster(tmp_path / "cluster"),
    ):
        pytest.fail("there is no cluster")
