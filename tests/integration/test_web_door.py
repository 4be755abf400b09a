"""Who gets into the web console, and who does not: asked over HTTP, without a browser."""

from __future__ import annotations

import asyncio
import json
import os
import select
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from yarl import URL

from manifold.kernel.errors import Refused
from manifold.shells.web.server import HEADERS, SESSIONS_MAX, TOO_MANY, Served, WebServer

ECHO = [sys.executable, str(Path(__file__).parent / "echo_console.py")]
READS = "while read -r line; do :; done"
SILENT = ["/bin/sh", "-c", f"echo __GANGLION__; {READS}"]  # a console that only listens
OPEN_S = 60.0
ENDED_S = 30.0


class Visitor:
    """A server, and a client that keeps cookies as a browser does."""

    def __init__(self, server: WebServer, client: aiohttp.ClientSession) -> None:
        self.server = server
        self.client = client
        self.home = ""

    async def ask(
        self, path: str, method: str = "GET", **headers: str
    ) -> tuple[aiohttp.ClientResponse, str]:
        url = URL(self.server.origin + path, encoded=True)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.client.request(method, url, headers=named, allow_redirects=False) as answer:
            return answer, await answer.text()

    async def enter(self) -> None:
        answer, _ = await self.ask(self.server.address.removeprefix(self.server.origin))
        assert answer.status == 303
        self.home = answer.headers["Location"]

    def socket(self, **headers: str) -> Any:
        """A websocket as the page opens it."""
        return self.client.ws_connect(
            f"{self.server.origin}{self.home}socket?columns=80&rows=24",
            headers={"Origin": self.server.origin} | headers,
        )


@asynccontextmanager
async def visiting(
    command: list[str] = SILENT, host: str = "127.0.0.1", enter: bool = True
) -> AsyncIterator[Visitor]:
    server = WebServer(Served(command, "Manifold — test"), host, 0)
    await server.start()
    try:
        jar = aiohttp.CookieJar(unsafe=True)  # "unsafe": cookies of an address without a name
        async with aiohttp.ClientSession(cookie_jar=jar) as client:
            visitor = Visitor(server, client)
            if enter:
                await visitor.enter()
            yield visitor
    finally:
        await server.stop()
        assert server.sessions == 0


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 100))


async def ended(socket: Any) -> tuple[str, str]:
    """What the server says of the end of a session."""
    async with asyncio.timeout(ENDED_S):
        async for message in socket:
            if message.type is aiohttp.WSMsgType.TEXT:
                kind, *rest = json.loads(message.data)
                if kind == "web.ended":
                    return rest[0], rest[1]
    raise AssertionError("the session ended without a word")


async def drawn(socket: Any, text: str) -> None:
    """Until the console has drawn `text`."""
    seen = b""
    async with asyncio.timeout(OPEN_S):
        while text.encode() not in seen:
            message = await socket.receive()
            assert message.type in (aiohttp.WSMsgType.BINARY, aiohttp.WSMsgType.TEXT), message
            seen += message.data if isinstance(message.data, bytes) else b""


def wait_gone(pid: int) -> None:
    """Until the process has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([descriptor], [], [], ENDED_S)[0], f"process {pid} still runs"
    finally:
        os.close(descriptor)


def children() -> list[int]:
    """Processes that this one has started."""
    tasks = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return [int(pid) for task in tasks for pid in task.read_text().split()]


# --- the token and the cookie ------------------------------------------------------------------


def test_nothing_is_served_without_the_token() -> None:
    async def test() -> None:
        async with visiting() as visitor:
            home = visitor.home
            paths = [
                "/",
                home,
                home + "page.js",
                home + "socket?columns=80&rows=24",
                "/favicon.ico",
            ]
            for path in [*paths, home + "download/x", "/no/such/thing", "/?token="]:
                visitor.client.cookie_jar.clear()
                answer, text = await visitor.ask(path, Origin=visitor.server.origin)
                assert answer.status == 403, path
                assert "printed by `manifold web`" in text
                assert "Set-Cookie" not in answer.headers

    run(test)


def test_a_wrong_token_is_refused() -> None:
    async def test() -> None:
        async with visiting(enter=False) as visitor:
            right = visitor.server.address.split("=")[1]
            for wrong in (right[:-1], right + "x", right.swapcase(), "%00", "%C3%A9", "x" * 4000):
                answer, _ = await visitor.ask(f"/?token={wrong}")
                assert answer.status == 403, wrong

    run(test)


def test_the_token_is_exchanged_for_a_strict_cookie_and_leaves_the_address() -> None:
    async def test() -> None:
        async with visiting(enter=False) as visitor:
            token = visitor.server.address.split("=")[1]
            assert len(token) * 6 >= 128, "bits"
            answer, _ = await visitor.ask(f"/?token={token}")
            home = answer.headers["Location"]
            cookie = answer.headers["Set-Cookie"]
            assert answer.status == 303
            assert token not in home + cookie
            assert {"HttpOnly", "SameSite=Strict", f"Path={home}"} <= set(cookie.split("; "))
            page, text = await visitor.ask(home)
            assert page.status == 200
            assert "<title>Manifold — test</title>" in text

    run(test)


def test_a_link_on_another_page_enters_by_way_of_a_page_of_ours() -> None:
    async def test() -> None:
        async with visiting(enter=False) as visitor:
            path = visitor.server.address.removeprefix(visitor.server.origin)
            answer, text = await visitor.ask(path, Sec_Fetch_Site="cross-site")
            assert answer.status == 200
            assert 'http-equiv="refresh"' in text
            assert path not in text

    run(test)


def test_the_token_opens_nothing_but_the_door() -> None:
    async def test() -> None:
        async with visiting() as visitor:
            visitor.client.cookie_jar.clear()
            token = visitor.server.address.split("?")[1]
            for name in ("", "page.js", "socket"):
                answer, _ = await visitor.ask(f"{visitor.home}{name}?{token}")
                assert answer.status == 403, name

    run(test)


# --- what a request must say -------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:{port}", "127.0.0.1.evil.example:{port}", "127.0.0.2:{port}",
     "localhost.:{port}", "localhost@evil.example:{port}", "127.0.0.1:x", "[::1]:{port}", 
     "0:{port}", "127.1:{port}", ":{port}"],
)  # fmt: skip
def test_a_name_that_was_rebound_to_loopback_is_refused(host: str) -> None:
    async def test() -> None:
        async with visiting() as visitor:
            name = host.format(port=visitor.server.port)
            for path in (visitor.home, visitor.server.address.removeprefix(visitor.server.origin)):
                answer, text = await visitor.ask(path, Host=name)
                assert (answer.status, "loopback" in text) == (403, True), path

    run(test)


def test_the_port_of_a_tunnel_may_differ() -> None:
    async def test() -> None:
        async with visiting() as visitor:
            for host in ("127.0.0.1:9", "localhost:9", "LOCALHOST", "127.0.0.1"):
                answer, _ = await visitor.ask(visitor.home, Host=host)
                assert answer.status == 200, host

    run(test)


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "null", "", "http://127.0.0.1:9", "https://127.0.0.1:{port}",
     "http://localhost:{port}", "http://127.0.0.1:{port}.evil.example", "http://127.0.0.1"],
)  # fmt: skip
def test_a_page_of_another_origin_opens_no_websocket(origin: str) -> None:
    async def test() -> None:
        async with visiting() as visitor:
            named = origin.format(port=visitor.server.port)
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await visitor.socket(Origin=named)
            assert refused.value.status == 403
            assert visitor.server.sessions == 0

    run(test)


def test_a_websocket_without_an_origin_is_refused() -> None:
    async def test() -> None:
        async with visiting() as visitor:
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await visitor.client.ws_connect(
                    f"{visitor.server.origin}{visitor.home}socket?columns=80&rows=24"
                )
            assert refused.value.status == 403

    run(test)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_other_methods_are_refused(method: str) -> None:
    async def test() -> None:
        async with visiting() as visitor:
            for path in ("/", visitor.home, visitor.home + "socket"):
                answer, _ = await visitor.ask(path, method)
                assert answer.status == 405, path

    run(test)


@pytest.mark.parametrize(
    "path",
    ["../server.py", "..%2fserver.py", "%2e%2e/server.py", "server.py", "page.html", "/etc/passwd",
     "..%5cserver.py", "page.js/..%2f..%2fverbs.py", "%2fetc%2fpasswd", "page.js%00", "download/..",
     "static/", "."],
)  # fmt: skip
def test_no_path_leads_to_another_file(path: str) -> None:
    async def test() -> None:
        async with visiting() as visitor:
            answer, text = await visitor.ask(visitor.home + path)
            assert answer.status in (400, 403, 404)
            assert "import" not in text and "root:" not in text

    run(test)


@pytest.mark.parametrize("query", ["", "?columns=80", "?columns=0&rows=9", "?columns=9&rows=99999",
                                   "?columns=a&rows=9"])  # fmt: skip
def test_a_session_needs_a_size_that_makes_sense(query: str) -> None:
    async def test() -> None:
        async with visiting() as visitor:
            answer, _ = await visitor.ask(
                f"{visitor.home}socket{query}", Origin=visitor.server.origin
            )
            assert answer.status == 400

    run(test)


@pytest.mark.parametrize(
    "sent",
    [b"garbage\r\n\r\n", b"\x16\x03\x01\0\0", b"GET / HTTP/1.1\r\n\r\n",
     b"GET / HTTP/1.1\r\nHost: a\r\nHost: 127.0.0.1\r\n\r\n", b"GET http://[ HTTP/1.1\r\n\r\n",
     b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n",
     b"FLURB / HTTP/1.1\r\nHost: localhost\r\n\r\n"],
    ids=str,
)  # fmt: skip
def test_what_is_not_http_is_answered_and_leaves_no_traceback(
    sent: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    async def test() -> None:
        async with visiting() as visitor:
            reader, writer = await asyncio.open_connection("127.0.0.1", visitor.server.port)
            writer.write(sent)
            async with asyncio.timeout(OPEN_S):
                answer = await reader.readuntil(b"\r\n\r\n")
            assert answer.split()[1] in (b"400", b"405")
            plain = b"\r\nContent-Type: text/plain;" in answer and b"Set-Cookie" not in answer
            assert plain or HEADERS["Content-Security-Policy"].encode() in answer
            writer.close()
            await writer.wait_closed()

    run(test)
    assert capfd.readouterr() == ("", "")


def test_tabs_that_vanish_while_they_open_leave_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    async def test() -> None:
        async with visiting() as visitor:
            server = visitor.server
            cookie = next(iter(visitor.client.cookie_jar))
            ask = (
                f"GET {visitor.home}socket?columns=80&rows=24 HTTP/1.1\r\nHost: localhost\r\n"
                f"Origin: http://localhost\r\nCookie: {cookie.key}={cookie.value}\r\n"
                "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
            )
            for more in (b"", b"\xff\xff\xff\xff"):
                for _ in range(SESSIONS_MAX * 2):
                    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
                    writer.write(ask.encode() + more)
                    await writer.drain()
                    writer.transport.abort()
            async with asyncio.timeout(ENDED_S):
                await server.wait_sessions(0)
            async with visitor.socket() as socket:
                await socket.close()

    run(test)
    assert capfd.readouterr() == ("", "")
    assert children() == []


def test_every_answer_carries_the_policies() -> None:
    async def test() -> None:
        async with visiting() as visitor:
            home = visitor.home
            asked: list[Awaitable[Any]] = [
                visitor.ask("/"),
                visitor.ask(home),
                visitor.ask(home + "xterm.js"),
                visitor.ask(home + "nothing"),
                visitor.ask(home, "POST"),
                visitor.ask("/", Host="evil.example"),
                visitor.ask(visitor.server.address.removeprefix(visitor.server.origin)),
            ]
            for answer, _ in await asyncio.gather(*asked):
                assert HEADERS.items() <= dict(answer.headers).items()
            async with visitor.socket() as socket:
                assert HEADERS.items() <= dict(socket._response.headers).items()

    run(test)
    policy = HEADERS["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert HEADERS["X-Frame-Options"] == "DENY"


def test_a_name_that_is_no_clusters_is_refused_before_anything_is_served() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "manifold", "web"], env=os.environ | {"MANIFOLD_CLUSTER": "../x"},
        capture_output=True, text=True, timeout=OPEN_S,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (4, "")
    assert "error: '../x' is no name of a cluster." in done.stderr


# --- sessions ----------------------------------------------------------------------------------


def test_there_is_a_bound_to_the_sessions_and_a_closed_one_makes_room() -> None:
    async def test() -> None:
        async with visiting() as visitor:
            sockets = [await visitor.socket() for _ in range(SESSIONS_MAX)]
            async with visitor.socket() as one_more:
                assert await ended(one_more) == (TOO_MANY, "")
            assert visitor.server.sessions == SESSIONS_MAX
            await sockets[0].close()
            async with asyncio.timeout(ENDED_S):
                await visitor.server.wait_sessions(SESSIONS_MAX - 1)
            async with visitor.socket() as another:
                assert visitor.server.sessions == SESSIONS_MAX
                await another.close()
            for socket in sockets:
                await socket.close()

    run(test)
    assert children() == []


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ("", "not JSON"),
        ('["web.focus", true', "not JSON"),
        ('["web.keys"]', "nobody understands"),
        ('["web.keys", 7]', "nobody understands"),
        ('["web.resize", 80, 100000]', "nobody understands"),
        ('["web.exec", "ls"]', "nobody understands"),
        ("[" * 100_000, "not JSON"),
        (json.dumps(["web.keys", "x" * 20_000]), "nobody understands"),
        (b"bytes", "not text"),
    ],
)
def test_a_page_that_breaks_the_protocol_ends_its_session(message: str | bytes, says: str) -> None:
    async def test() -> None:
        async with visiting() as visitor, visitor.socket() as socket:
            if isinstance(message, bytes):
                await socket.send_bytes(message)
            else:
                await socket.send_str(message)
            reason, _ = await ended(socket)
            assert says in reason

    run(test)


def test_a_message_that_is_too_large_closes_the_websocket() -> None:
    async def test() -> None:
        async with visiting() as visitor, visitor.socket() as socket:
            await socket.send_str("x" * 1_000_000)
            async with asyncio.timeout(ENDED_S):
                message = await socket.receive()
            assert message.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.ERROR)
            assert socket.close_code == aiohttp.WSCloseCode.MESSAGE_TOO_BIG

    run(test)


@pytest.mark.parametrize(
    ("script", "reason", "last_words"),
    [
        ("echo error: there is no cluster >&2; exit 3", "did not start", "there is no cluster"),
        ("echo __GANGLION__; echo oh no >&2", "has ended", "oh no"),
        ("echo __GANGLION__; printf 'D\\377\\377\\377\\377'; cat", "4294967295 bytes", ""),
        ("echo __GANGLION__; printf 'Z\\0\\0\\0\\0'; cat", "kind b'Z'", ""),
        ("echo __GANGLION__; printf 'M\\0\\0\\0\\2{}'; cat", "does not decode", ""),
        ("echo __GANGLION__; printf 'M\\0\\0\\0\\1x'; cat", "does not decode", ""),
        ("echo __GANGLION__; printf 'P\\0\\0\\0\\1x'; cat", "does not decode", ""),
        (
            "echo __GANGLION__; printf 'M\\0\\001\\206\\240';"
            "yes '[' | tr -d '\\n' | head -c 100000",
            "does not decode",
            "",
        ),
        ("yes", "did not start", ""),
        ("head -c 1000000 /dev/zero", "did not start", ""),
        ("seq 100000 >&2", "did not start", "100000"),
    ],
)
def test_the_page_is_told_why_a_console_ended(script: str, reason: str, last_words: str) -> None:
    async def test() -> None:
        async with visiting(["/bin/sh", "-c", script]) as visitor, visitor.socket() as socket:
            why, words = await ended(socket)
            assert reason in why
            assert last_words in words
            assert len(words) <= 2048

    run(test)
    assert children() == []


def test_a_console_is_told_no_secret_and_started_by_no_shell(tmp_path: Path) -> None:
    trap = tmp_path / "a shell was here"
    command = [*SILENT, f"; touch '{trap}'; $(touch '{trap}')"]

    async def test() -> None:
        async with visiting(command) as visitor, visitor.socket() as socket:
            await socket.send_str('["web.focus", true]')
            while not (found := children()):
                await visitor.ask(visitor.home)
            cookies = [each.value for each in visitor.client.cookie_jar]
            secrets = [visitor.server.address.split("=")[1], visitor.home, *cookies]
            for part in ("environ", "cmdline"):
                told = Path(f"/proc/{found[0]}/{part}").read_text()
                assert not [secret for secret in secrets if secret in told]

    run(test)
    assert not trap.exists()


def test_a_console_that_hangs_is_ended_with_its_tab() -> None:
    deaf = "trap '' TERM; echo __GANGLION__; while :; do read line; done"

    async def test() -> None:
        async with visiting(["/bin/sh", "-c", deaf]) as visitor:
            async with visitor.socket() as socket:
                await socket.send_str('["web.focus", true]')
            async with asyncio.timeout(ENDED_S):
                await visitor.server.wait_sessions(0)
            assert children() == []

    run(test)


def test_what_a_console_starts_ends_with_it() -> None:
    script = f"echo __GANGLION__; cat /dev/zero >/dev/null & {READS}"

    async def test() -> None:
        async with visiting(["/bin/sh", "-c", script]) as visitor, visitor.socket():
            while not (found := [each for pid in children() for each in _below(pid)]):
                await visitor.ask(visitor.home)
            started.extend(found)

    started: list[int] = []
    run(test)
    wait_gone(started[0])


@pytest.mark.parametrize("and_then", ["exit 3", READS], ids=["it ends", "its tab goes"])
def test_what_a_console_leaves_behind_with_its_pipes_keeps_no_session(
    and_then: str, tmp_path: Path
) -> None:
    fifo, told = tmp_path / "fifo", tmp_path / "pid"
    os.mkfifo(fifo)
    script = (
        f"setsid sh -c 'echo $$ > {told}.new; mv {told}.new {told}; read line < {fifo}' &"
        f"while [ ! -e {told} ]; do :; done; echo __GANGLION__; printf 'D\\0\\0\\0\\2on';"
        f"{and_then}"
    )
    release = os.open(fifo, os.O_RDWR)

    async def test() -> None:
        async with visiting(["/bin/sh", "-c", script]) as visitor:
            try:
                async with visitor.socket() as socket:
                    await drawn(socket, "on")
                    if and_then != READS:
                        assert (await ended(socket))[0] == "The console has ended."
                async with asyncio.timeout(ENDED_S):
                    await visitor.server.wait_sessions(0)
                assert Path(f"/proc/{told.read_text().strip()}").exists(), "it has its pipes still"
            finally:
                os.write(release, b"\n")

    try:
        run(test)
        wait_gone(int(told.read_text()))
    finally:
        os.close(release)


def _below(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_file_that_the_console_saves_is_downloaded() -> None:
    async def test() -> None:
        async with visiting(ECHO) as visitor, visitor.socket() as socket:
            await drawn(socket, "is ready")
            await socket.send_str('["web.keys", "save\\r"]')
            async with asyncio.timeout(OPEN_S):
                async for message in socket:
                    if message.type is aiohttp.WSMsgType.TEXT:
                        kind, key = json.loads(message.data)
                        break
            assert kind == "web.download"
            answer, text = await visitor.ask(f"{visitor.home}download/{key}")
            assert text == "what was saved"
            assert answer.headers["Content-Disposition"] == (
                "attachment; filename*=UTF-8''a%20file.txt"
            )
            again, _ = await visitor.ask(f"{visitor.home}download/{key}")
            assert again.status == 404

    run(test)


# --- where it listens -------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "::1"])
def test_any_loopback_address_serves(host: str) -> None:
    if host == "::1" and not Path("/proc/net/if_inet6").exists():
        pytest.skip("this machine has no IPv6")

    async def test() -> None:
        async with visiting(host=host) as visitor:
            answer, _ = await visitor.ask(visitor.home)
            assert answer.status == 200

    run(test)


def test_a_port_that_is_taken_is_refused_with_a_sentence() -> None:
    async def test() -> None:
        async with visiting() as visitor:
            second = WebServer(Served(SILENT, "x"), "127.0.0.1", visitor.server.port)
            with pytest.raises(Refused, match=r"cannot be had: .*in use"):
                await second.start()

    run(test)


def test_cookies_of_two_servers_on_one_host_do_not_meet() -> None:
    async def test() -> None:
        async with visiting() as one, visiting(enter=False) as other:
            client = one.client  # a browser's cookies are for a host, whatever the port
            async with client.get(other.server.address) as answer:
                homes = [f"{one.server.origin}{one.home}", str(answer.url)]
            for home in homes:
                async with client.get(home) as answer:
                    assert answer.status == 200
            sent = client.cookie_jar.filter_cookies(URL(f"{one.server.origin}/"))
            assert not sent, "a third server on this host is sent no cookie of ours"

    run(test)
