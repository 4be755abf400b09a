"""The smallest HTTP/1.1 server that serves metrics: GET and HEAD, one request per connection.

Interface rules: on 127.0.0.1 alone, in the node's event loop, no thread. `pages` maps a path to a
function of the `Accept` header that returns a content type and a body. Every answer closes its
connection. A request names this host in `Host`: a page of the web that had its name resolved to
127.0.0.1 reads nothing.
Invariants: H1 at most CONNECTIONS_MAX connections: the oldest makes room, so that who holds many
open keeps nobody out; H2 a connection holds at most HEAD_BYTES_MAX that came and one answer, and
lives DEADLINE_S at most; H3 whatever comes is answered by a status or by closing, never by an
exception. Why not the loop's own server: it takes a lack of descriptors for a bug of ours.
Source: RFC 9112 (message syntax), RFC 9110 (methods, negotiation).
"""

from __future__ import annotations

import asyncio
import errno
import re
import socket
from collections import Counter
from collections.abc import Callable, Mapping

HOST = "127.0.0.1"
HEAD_BYTES_MAX = 8 << 10  # what a request line and its headers take; Prometheus sends 300 bytes
CONNECTIONS_MAX = 16  # each 8 KiB of a head and an answer of NODE_TEXT_BYTES: 384 KiB
DEADLINE_S = 5.0  # from the first byte to the last of the answer; a scrape takes milliseconds
BACKLOG = 16  # as many as there may be connections
ACCEPT_PAUSE_S = 0.1  # without a descriptor left
THROWN_AWAY_BYTES_MAX = 256 << 10  # a body nobody asked for: four socket buffers
PORTS_TRIED_MAX = 256  # from the configured one on: as many nodes on one host

PHRASES = {
    200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed",
    413: "Content Too Large", 421: "Misdirected Request", 431: "Request Header Fields Too Large",
}  # fmt: skip

Page = Callable[[str], tuple[str, bytes]]

_REQUEST = re.compile(rb"([A-Z]{1,16}) (/[\x21-\x7e]{0,1023}) HTTP/1\.([01])")
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}):([\t\x20-\x7e\x80-\xff]*)")
_LOCAL = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)


def listening(first_port: int) -> socket.socket:
    """A socket that listens on a free port: any for 0, else the first free one from `first_port`.

    Raises `OSError` where there is none.
    """
    tried = range(first_port, min(first_port + PORTS_TRIED_MAX, 65_536)) if first_port else (0,)
    for port in tried:
        opened = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind((HOST, port))
            opened.listen(BACKLOG)
            opened.setblocking(False)
        except OSError as fault:
            opened.close()
            if fault.errno != errno.EADDRINUSE or port == tried[-1]:
                raise
        else:
            return opened
    raise AssertionError("the last port was taken or refused")


class Server:
    """See the module. `address` is HOST:PORT."""

    def __init__(
        self, first_port: int, pages: Mapping[str, Page], loop: asyncio.AbstractEventLoop
    ) -> None:
        self._socket = listening(first_port)
        self._loop = loop
        self.address = "{}:{}".format(*self._socket.getsockname())
        self.pages = pages
        self.answered: Counter[int] = Counter()  # by status
        self.connections: dict[_Connection, None] = {}  # the oldest first
        self._paused: asyncio.TimerHandle | None = None
        loop.add_reader(self._socket, self._acceptable)

    def _acceptable(self) -> None:
        for _ in range(BACKLOG):
            try:
                accepted, _ = self._socket.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError:  # no descriptor is left: the listener would wake us at once again
                self._loop.remove_reader(self._socket)
                self._paused = self._loop.call_later(ACCEPT_PAUSE_S, self._resume)
                return
            if len(self.connections) >= CONNECTIONS_MAX:
                next(iter(self.connections)).close()  # H1
            accepted.setblocking(False)
            self.connections[_Connection(self, accepted, self._loop)] = None

    def _resume(self) -> None:
        self._paused = None
        self._loop.add_reader(self._socket, self._acceptable)

    def close(self) -> None:
        if self._paused is not None:
            self._paused.cancel()
        self._loop.remove_reader(self._socket)
        self._socket.close()
        for connection in list(self.connections):
            connection.close()


class _Connection:
    """One request and its answer; then what still comes is thrown away until the other closes."""

    def __init__(
        self, server: Server, accepted: socket.socket, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._server, self._socket, self._loop = server, accepted, loop
        self._head = bytearray()
        self._left = memoryview(b"")  # of the answer
        self._answered = False
        self._bodyless = False  # HEAD
        self._thrown_away = 0
        self._deadline = loop.call_later(DEADLINE_S, self.close)  # H2
        loop.add_reader(accepted, self._readable)

    def close(self) -> None:
        self._deadline.cancel()
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        self._server.connections.pop(self, None)

    def _readable(self) -> None:
        try:
            data = self._socket.recv(HEAD_BYTES_MAX)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if self._answered:  # closing with something unread would take the answer back
            self._thrown_away += len(data)
            if not data or self._thrown_away > THROWN_AWAY_BYTES_MAX:
                self.close()
            return
        if not data:
            self.close()
            return
        self._head += data[: HEAD_BYTES_MAX + 1 - len(self._head)]
        end = self._head.find(b"\r\n\r\n")
        if end >= 0:
            self._request(bytes(self._head[:end]))
        elif len(self._head) > HEAD_BYTES_MAX:
            self._answer(431)

    def _request(self, head: bytes) -> None:
        first, *lines = head.split(b"\r\n")
        request = _REQUEST.fullmatch(first)
        headers = _headers(lines)
        if request is None or headers is None:
            self._answer(400)
            return
        method, path = request[1].decode(), request[2].decode().partition("?")[0]
        self._bodyless = method == "HEAD"
        host = headers.get("host", "localhost" if request[3] == b"0" else "")
        page = self._server.pages.get(path)
        if not _LOCAL.fullmatch(host):
            self._answer(421 if host else 400)
        elif headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
            self._answer(413)
        elif page is None:
            self._answer(404)
        elif method not in ("GET", "HEAD"):
            self._answer(405)
        else:
            content_type, body = page(headers.get("accept", ""))
            self._answer(200, content_type, body)

    def _answer(self, status: int, content_type: str = "", body: bytes = b"") -> None:
        self._answered = True
        self._head.clear()
        self._server.answered[status] += 1
        if not content_type:
            content_type, body = "text/plain; charset=utf-8", f"{PHRASES[status]}\n".encode()
        lines = [
            f"HTTP/1.1 {status} {PHRASES[status]}", f"Content-Type: {content_type}",
            f"Content-Length: {len(body)}", "Connection: close", "Cache-Control: no-store",
            "X-Content-Type-Options: nosniff", "", "",
        ]  # fmt: skip
        if status == 405:
            lines.insert(1, "Allow: GET, HEAD")
        self._left = memoryview("\r\n".join(lines).encode() + (b"" if self._bodyless else body))
        self._writable()

    def _writable(self) -> None:
        try:
            while self._left:
                self._left = self._left[self._socket.send(self._left) :]
            self._socket.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            self._loop.add_writer(self._socket, self._writable)
        except OSError:  # the other is gone
            self.close()
        else:
            self._loop.remove_writer(self._socket)


def _headers(lines: list[bytes]) -> dict[str, str] | None:
    """By lower-case name; None where a line is no header, or `Host` stands there twice."""
    found: dict[str, str] = {}
    for line in lines:
        match = _HEADER.fullmatch(line)
        if match is None:
            return None
        name, value = match[1].decode().lower(), match[2].strip(b" \t").decode("latin-1")
        if name in found:
            if name == "host":
                return None
            value = f"{found[name]}, {value}"
        found[name] = value
    return found
