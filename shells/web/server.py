"""The door of `manifold web`: who may come in, and what they are given.

Interface rules: `WebServer.start` listens on a loopback address; `address` is what to open. The
token in it is exchanged for a cookie at the first visit; every page, file and websocket lives under
a random path and needs that cookie.
Invariants: D1 nothing is served without the cookie, and the token buys nothing but the cookie.
D2 secrets are compared in constant time, are never logged, and are in no argument or environment.
D3 the Host header names the loopback address we are bound to, which a name that was rebound to it
does not; the Origin of a websocket is that very host and port. D4 at most `SESSIONS_MAX` consoles
run, and all have ended when `stop` returns. D5 every answer to what is a request carries `HEADERS`;
what is no HTTP is answered by aiohttp itself, with 400 and plain text that quotes what came.
Source: RFC 6265bis (SameSite), RFC 6455 10.2 (Origin), CSP level 3.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import html
import ipaddress
import logging
import secrets
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from urllib.parse import quote

import msgspec
from aiohttp import WSCloseCode, web
from aiohttp.http_exceptions import HttpProcessingError
from textual_serve.download_manager import DownloadManager

from manifold.kernel.errors import Refused
from manifold.shells.web import assets
from manifold.shells.web import messages as m
from manifold.shells.web.session import Session

TOKEN_BYTES = 24  # 192 bits: nobody guesses it, at any rate
SESSIONS_MAX = 8  # consoles at a time, of 60 MB each: half a gigabyte
MESSAGE_BYTES_MAX = 128 << 10  # KEYS_CHARS_MAX characters of 6 bytes when escaped, and its frame
HEARTBEAT_S = 15.0  # a tab whose machine has gone away is noticed after 1.5 of these
IDLE_S = 30.0  # a connection without a request
GRACE_S = 1.0  # for answers that are under way when the server stops
REFUSED = 4003  # close codes of our own, 4000-4999: RFC 6455 7.4.2
ENDED = 4000

# Scripts, styles and connections: ours alone; nothing else, and nobody may frame or post.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=(), display-capture=()",
    "Cache-Control": "no-store",
    "Server": "manifold",
}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

WHERE = "The address with the token is printed by `manifold web`, in the terminal where it runs."
TOO_MANY = f"There are {SESSIONS_MAX} sessions already: close a tab first."
BYE = "The server has ended: start `manifold web` again, and open the address that it prints."


@dataclass(frozen=True, slots=True)
class Served:
    """What is served: a command that shows a Textual application, and the page's title."""

    command: Sequence[str]
    title: str


def loopback(host: str) -> str:
    """The address of `host`, which has to be one of loopback."""
    named = "127.0.0.1" if host == "localhost" else host
    try:
        address = ipaddress.ip_address(named)
    except ValueError:
        address = None
    if address is None or not address.is_loopback or "%" in named:
        raise Refused(
            f"{host!r} is no loopback address: what is typed into the console would cross the "
            "network in the clear.",
            "Leave --host out, and reach it from afar with `ssh -L`: see docs/web.md.",
        )
    return str(address)


class WebServer:
    """A console in a browser, for whoever holds the token."""

    def __init__(self, served: Served, host: str, port: int) -> None:
        self._served = served
        self._host = loopback(host)
        self._wanted_port = port
        self._token = secrets.token_urlsafe(TOKEN_BYTES)
        self._ticket = secrets.token_urlsafe(TOKEN_BYTES)  # the cookie's value
        # Cookies do not tell ports apart, but paths: a server on another port of this host, which
        # may be another user's, is not sent a cookie of a path that it cannot guess.
        self._home = f"/{secrets.token_urlsafe(TOKEN_BYTES)}/"
        self._files = assets.load()
        self._page = assets.page()
        self._downloads = DownloadManager()
        self._sockets: list[web.WebSocketResponse] = []
        self._left = asyncio.Event()  # a session has ended
        self._stopping = False
        self.port = 0

    # -- life -----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen; `Refused` where the port is taken."""
        app = web.Application(middlewares=[self._guard])
        app.on_response_prepare.append(_add_headers)
        app.add_routes([
            web.get("/", self._enter),
            web.get(self._home, self._show_page),
            web.get(self._home + "socket", self._socket, allow_head=False),
            web.get(self._home + "download/{key}", self._download, allow_head=False),
            web.get(self._home + "{name}", self._file),
        ])  # fmt: skip
        log = logging.Logger("manifold.web")
        log.addHandler(_Faults())
        self._runner = web.AppRunner(
            app, access_log=None, logger=log, shutdown_timeout=GRACE_S, keepalive_timeout=IDLE_S
        )
        await self._runner.setup()
        try:
            site = web.TCPSite(self._runner, self._host, self._wanted_port)
            await site.start()
        except OSError as fault:
            await self._runner.cleanup()
            raise Refused(
                f"Port {self._wanted_port} of {self._host} cannot be had: {fault.strerror}.",
                "Choose another one, or --port 0 for any that is free.",
            ) from fault
        self.port = int(self._runner.addresses[0][1])
        # Named with the port, as servers on other ports of this host share the browser's cookies.
        self._cookie = f"manifold-web-{self.port}"

    async def stop(self) -> None:
        """End every session and stop listening (D4)."""
        self._stopping = True
        bye = m.Ended(BYE, "")
        await asyncio.gather(
            *(_say_ended(each, bye, WSCloseCode.GOING_AWAY) for each in self._sockets)
        )
        await self.wait_sessions(0)
        await self._runner.cleanup()

    async def wait_sessions(self, at_most: int) -> None:
        """Until no more consoles than that run."""
        while len(self._sockets) > at_most:
            self._left.clear()
            await self._left.wait()

    @property
    def origin(self) -> str:
        """Where the server is, without the token."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self.port}"

    @property
    def address(self) -> str:
        """What to open in a browser. It holds the token: print it, and pass it to nobody."""
        return f"{self.origin}/?token={self._token}"

    @property
    def sessions(self) -> int:
        """How many consoles run."""
        return len(self._sockets)

    # -- who may come in --------------------------------------------------------------------------

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """D1 and D3, before anything is looked up."""
        if not self._names_us(request.headers.get("Host", "")):
            return _refuse("This server answers to its loopback address only.")
        if request.method not in ("GET", "HEAD"):
            raise web.HTTPMethodNotAllowed(request.method, ["GET", "HEAD"])
        if request.path == "/" and _same(request.query.get("token", ""), self._token):
            return await handler(request)
        if not _same(request.cookies.get(self._cookie, ""), self._ticket):
            return _refuse("This console needs its token, and that is missing or wrong.")
        return await handler(request)

    def _names_us(self, host: str) -> bool:
        """Whether a Host header says loopback. The port is left open: `ssh -L` may change it."""
        name, colon, port = host.rpartition(":")
        if not colon or host.endswith("]"):
            name, port = host, "80"
        own = f"[{self._host}]" if ":" in self._host else self._host
        return name.lower() in (own, "localhost") and port.isascii() and port.isdigit()

    # -- what they are given ----------------------------------------------------------------------

    async def _enter(self, request: web.Request) -> web.StreamResponse:
        """The token for a cookie, and away from the address that holds it."""
        if request.headers.get("Sec-Fetch-Site") == "cross-site":
            # Reached by a link of another page: the browser would withhold a strict cookie from
            # the redirect, and sends it when a page of ours asks.
            home = html.escape(self._home)
            answer = web.Response(
                text=f'<!DOCTYPE html><meta http-equiv="refresh" content="0;url={home}">',
                content_type="text/html",
            )
        else:
            answer = web.Response(status=303, headers={"Location": self._home})
        answer.set_cookie(
            self._cookie, self._ticket, path=self._home, httponly=True, samesite="Strict"
        )
        return answer

    async def _show_page(self, _request: web.Request) -> web.StreamResponse:
        text = self._page.replace("{title}", html.escape(self._served.title))
        return web.Response(text=text, content_type="text/html")

    async def _file(self, request: web.Request) -> web.StreamResponse:
        found = self._files.get(request.match_info["name"])
        if found is None:
            raise web.HTTPNotFound
        return web.Response(body=found.content, content_type=found.kind, charset="utf-8")

    async def _download(self, request: web.Request) -> web.StreamResponse:
        """A file that the console delivers: always saved, never shown."""
        key = request.match_info["key"]
        try:
            found = await self._downloads.get_download_metadata(key)
        except KeyError as fault:
            raise web.HTTPNotFound from fault
        name = quote(found.file_name, safe="")
        answer = web.StreamResponse(
            headers={
                "Content-Type": "application/octet-stream",
                "Content-Disposition": f"attachment; filename*=UTF-8''{name}",
            }
        )
        await answer.prepare(request)
        async for chunk in self._downloads.download(key):
            await answer.write(chunk)
        await answer.write_eof()
        return answer

    async def _socket(self, request: web.Request) -> web.StreamResponse:
        """A session, as long as its tab is there."""
        if request.headers.get("Origin") != f"http://{request.headers['Host']}":
            return _refuse("A page of another origin may not open this console.")
        try:
            size = msgspec.convert(dict(request.query), _Size, strict=False)
        except msgspec.ValidationError as fault:
            raise web.HTTPBadRequest(text=f"{fault}\n") from fault
        socket = web.WebSocketResponse(
            timeout=GRACE_S, heartbeat=HEARTBEAT_S, max_msg_size=MESSAGE_BYTES_MAX, compress=False
        )
        if self._stopping or len(self._sockets) >= SESSIONS_MAX:
            await socket.prepare(request)
            await _say_ended(socket, m.Ended(BYE if self._stopping else TOO_MANY, ""), REFUSED)
            return socket
        self._sockets.append(socket)  # before anything is awaited: it counts from here (D4)
        try:
            await socket.prepare(request)
            if self._stopping:
                await _say_ended(socket, m.Ended(BYE, ""), WSCloseCode.GOING_AWAY)
                return socket
            session = Session(self._served.command, socket, self._downloads)
            await _say_ended(socket, await session.talk(size.columns, size.rows), ENDED)
        finally:
            self._sockets.remove(socket)
            self._left.set()
        return socket


class _Faults(logging.Handler):
    """A fault of ours in one line. What a visitor did wrong has been answered, and is not ours."""

    def emit(self, record: logging.LogRecord) -> None:
        fault = record.exc_info[1] if record.exc_info else None
        if record.levelno >= logging.WARNING and not isinstance(
            fault, HttpProcessingError | ConnectionError
        ):
            print(f"error: {record.getMessage()}: {fault!r}", file=sys.stderr)


class _Size(msgspec.Struct, frozen=True):
    columns: m.Columns
    rows: m.Rows


async def _say_ended(socket: web.WebSocketResponse, ended: m.Ended, code: int) -> None:
    if socket.prepared and not socket.closed:
        with contextlib.suppress(ConnectionResetError):  # the tab has gone in this moment
            await socket.send_str(msgspec.json.encode(ended).decode())
            await socket.close(code=code)


async def _add_headers(_request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(HEADERS)


def _refuse(why: str) -> web.Response:
    text = (
        '<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Manifold</title>'
        f"<h1>403: not let in</h1><p>{html.escape(why)}</p><p>{html.escape(WHERE)}</p></html>\n"
    )
    return web.Response(status=403, text=text, content_type="text/html")


def _same(given: str, secret: str) -> bool:
    return hmac.compare_digest(given.encode(errors="replace"), secret.encode())
