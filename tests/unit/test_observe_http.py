"""The HTTP server of the metrics over real sockets, with friends and with those who are none."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest

from manifold.kernel.observe import http as served
from manifold.kernel.observe.http import CONNECTIONS_MAX, HEAD_BYTES_MAX, Server, listening

BODY = b"a 1\n" * 8192  # larger than a socket's buffer is at first
GET = b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


class Serving:
    """A server in a loop of its own thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.bugs: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda _, context: self.bugs.append(context))
        self.server = Server(0, {"/metrics": lambda accept: (f"text/{accept}", BODY)}, self.loop)
        host, _, port = self.server.address.partition(":")
        self.where = (host, int(port))
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()

    def run(self, function: Callable[[], Any]) -> Any:
        async def call() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(10)

    def open(self) -> socket.socket:
        return socket.create_connection(self.where, timeout=10)

    def raw(self, data: bytes) -> bytes:
        """Everything that comes back."""
        with self.open() as connection:
            connection.sendall(data)
            return read_all(connection)

    def status(self, data: bytes) -> int:
        return int(self.raw(data).split(b" ", 2)[1])

    def wait_for_no_connection(self) -> None:
        deadline_s = time.monotonic() + 10
        while self.run(lambda: len(self.server.connections)):
            assert time.monotonic() < deadline_s

    def close(self) -> None:
        self.run(self.server.close)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


def read_all(connection: socket.socket) -> bytes:
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


@pytest.fixture
def serving() -> Iterator[Serving]:
    serving = Serving()
    yield serving
    serving.close()
    assert not serving.bugs


def test_get_gives_the_page_and_head_its_length_alone(serving: Serving) -> None:
    for method, body in (("GET", BODY), ("HEAD", b"")):
        connection = http.client.HTTPConnection(*serving.where, timeout=10)
        connection.request(method, "/metrics?x=1", headers={"Accept": "spam"})
        answer = connection.getresponse()
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "text/spam"
        assert answer.headers["Content-Length"] == str(len(BODY))
        assert answer.headers["Connection"] == "close"
        assert answer.read() == body
        connection.close()


def test_what_is_refused_to_head_has_no_body_either(serving: Serving) -> None:
    said = serving.raw(b"HEAD /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 404 ")
    assert said.endswith(b"\r\n\r\n")


def test_a_request_may_come_byte_by_byte(serving: Serving) -> None:
    with serving.open() as connection:
        for at in range(len(GET)):
            connection.sendall(GET[at : at + 1])
        assert read_all(connection).endswith(BODY)


@pytest.mark.parametrize(
    ("status", "request_bytes"),
    [
        (404, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        (404, b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost:80\r\n\r\n"),
        (405, b"POST /metrics HTTP/1.1\r\nHost: [::1]:9\r\n\r\n"),
        (405, b"DELETE /metrics HTTP/1.0\r\n\r\n"),
        (413, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"),
        (413, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"),
        (421, b"GET /metrics HTTP/1.1\r\nHost: evil.example\r\n\r\n"),
        (421, b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1.evil.example\r\n\r\n"),
        (400, b"GET /metrics HTTP/1.1\r\n\r\n"),
        (400, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n"),
        (400, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n folded\r\n\r\n"),
        (400, b"GET /metrics HTTP/1.1\nHost: localhost\r\n\r\n"),
        (400, b"GET http://localhost/metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        (400, b"GET /metrics HTTP/2.0\r\nHost: localhost\r\n\r\n"),
        (400, b"get /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"),
        (400, b"\r\n\r\n"),
        (431, b"GET /metrics HTTP/1.1\r\nX: " + b"x" * (HEAD_BYTES_MAX + 1)),
        (431, b"x" * (1 << 20)),
    ],
)
def test_all_else_is_a_short_refusal(serving: Serving, status: int, request_bytes: bytes) -> None:
    said = serving.raw(request_bytes)
    assert int(said.split(b" ", 2)[1]) == status
    assert len(said) < 400


def test_a_pages_name_that_resolves_to_this_host_reads_nothing(serving: Serving) -> None:
    """DNS rebinding: a browser sends the name of the page it is on."""
    for host in (b"127.0.0.1:1", b"localhost", b"LOCALHOST:65535", b"[::1]"):
        assert serving.status(b"GET /metrics HTTP/1.1\r\nHost: " + host + b"\r\n\r\n") == 200
    for host in (b"example.org", b"10.0.0.1", b"localhost.example.org", b"127.0.0.1:1@x"):
        assert serving.status(b"GET /metrics HTTP/1.1\r\nHost: " + host + b"\r\n\r\n") == 421


def test_who_holds_every_connection_open_keeps_nobody_out(serving: Serving) -> None:
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(serving.open()) for _ in range(3 * CONNECTIONS_MAX)]
        for each in held:
            with contextlib.suppress(OSError):  # it was closed to make room
                each.sendall(b"GET /metrics HTTP/1.1\r\n")
        assert serving.status(GET) == 200
        assert serving.run(lambda: len(serving.server.connections)) <= CONNECTIONS_MAX


def test_who_says_nothing_or_reads_nothing_is_closed(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "DEADLINE_S", 0.2)
    with serving.open() as silent, serving.open() as deaf, serving.open() as slow:
        deaf.sendall(GET)
        slow.sendall(b"GET /me")
        assert read_all(silent) == read_all(slow) == b""
        serving.wait_for_no_connection()


def test_who_leaves_at_any_moment_leaves_nothing_behind(serving: Serving) -> None:
    for at in range(0, len(GET) + 1, 5):
        with serving.open() as connection:
            connection.sendall(GET[:at])
            reset = b"\x01\x00\x00\x00\x00\x00\x00\x00"  # linger for 0 s: closing is a reset
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
    serving.wait_for_no_connection()
    assert serving.status(GET) == 200


@pytest.mark.parametrize("blank", [b" ", b"\t", b" \t"])
def test_a_line_of_blanks_takes_no_longer_than_its_length(serving: Serving, blank: bytes) -> None:
    """A pattern that tries every way to share the blanks out takes ten minutes for this line."""
    head = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nX:"
    blanks = (blank * HEAD_BYTES_MAX)[: HEAD_BYTES_MAX - len(head) - len(b"x\r\n\r\n")]
    before_s = time.process_time()
    assert serving.status(head + blanks + b"\x01\r\n\r\n") == 400
    assert serving.status(head + blanks + b"x\r\n\r\n") == 200
    assert time.process_time() - before_s < 0.5


def test_blanks_around_a_value_are_not_of_it(serving: Serving) -> None:
    for host in (b"Host:localhost", b"Host: \t localhost\t \t"):
        assert serving.status(b"GET /metrics HTTP/1.1\r\n" + host + b"\r\n\r\n") == 200


def test_noise_is_answered_or_closed_and_nothing_else_happens(serving: Serving) -> None:
    random = Random(7)
    for _ in range(200):
        noise = bytearray(GET)
        for _ in range(random.randint(1, 12)):
            noise[random.randrange(len(noise))] = random.randrange(256)
        for _ in range(random.randint(0, 3)):
            at, blank = random.randrange(len(noise)), random.choice((b" ", b"\t", b"\r", b"\n"))
            noise[at:at] = blank * random.randrange(2000)
        with serving.open() as connection:
            connection.sendall(noise + b"\r\n\r\n")
            connection.shutdown(socket.SHUT_WR)
            said = read_all(connection)
            assert not said or said.startswith(b"HTTP/1.1 ")
    serving.wait_for_no_connection()
    assert serving.status(GET) == 200


def test_from_a_port_on_the_first_free_one_is_taken() -> None:
    with listening(0) as first:
        port = first.getsockname()[1]
        with listening(port) as second:
            assert port < second.getsockname()[1] < port + served.PORTS_TRIED_MAX


def test_where_no_port_is_free_that_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "PORTS_TRIED_MAX", 1)
    with listening(0) as first, pytest.raises(OSError, match="in use"):
        listening(first.getsockname()[1])
