"""One session: a console process and the websocket of the tab that shows it.

Interface rules: `Session.talk` starts the process, carries bytes both ways until either side ends,
and returns once the process is gone. Textual's packets are read and written by textual-serve's
`AppService`; how the process is started, bounded and ended is ours.
Invariants: S1 the process is gone when `talk` returns or raises. S2 no shell sees the command, and
neither its arguments nor its environment hold a secret of the server. S3 what it prints as errors
is kept to its last `LAST_WORDS_BYTES_MAX` and never reaches the server's output.
S4 what a console has started and left in a session of its own, with its pipes, keeps nobody.
Source: textual_serve/app_service.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import signal
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence

import msgspec
from aiohttp import WSMsgType, web
from textual_serve._binary_encode import DecodeError
from textual_serve.app_service import AppService
from textual_serve.download_manager import DownloadManager

from manifold.shells.web import messages as m

DRIVER = "manifold.shells.web.driver:ConsoleDriver"
READY = b"__GANGLION__\n"  # what Textual's web driver prints before its first packet
PRELUDE_LINES_MAX = 10  # what a console may print before it draws
PACKET_BYTES_MAX = 8 << 20  # a screen of 500 x 1000 cells with 16 bytes of colours each
LAST_WORDS_BYTES_MAX = 2048  # 25 lines of 80 characters
STUCK_S = 30.0  # a console that has not read its input for so long is ended
QUIT_S = 3.0  # asked to end; then terminated; then killed
TERMINATE_S = 2.0
DRAIN_S = 1.0  # for what is in the pipes of a console that is gone, 64 KiB each
DOWNLOADS_MAX = 32  # that wait to be fetched, in one session

FROM_PAGE = msgspec.json.Decoder(m.FromPage)


HAS_ENDED = "The console has ended."


class BadPacket(Exception):
    """The process, or the page, does not keep to the protocol."""


class Session(AppService):
    """A console process of one tab."""

    def __init__(
        self, command: Sequence[str], socket: web.WebSocketResponse, downloads: DownloadManager
    ) -> None:
        super().__init__(
            shlex.join(command),
            write_bytes=socket.send_bytes,
            write_str=socket.send_str,
            close=self._nothing,  # the end of its output says that a console has ended
            download_manager=downloads,
        )
        self._argv = list(command)
        self._socket = socket
        self._last_words = b""
        self._downloads = 0

    async def _nothing(self) -> None:
        return None

    # -- the process ----------------------------------------------------------------------------

    def _build_environment(self, width: int = 80, height: int = 24) -> dict[str, str]:
        environment = super()._build_environment(width, height)
        environment["TEXTUAL_DRIVER"] = DRIVER
        environment["TERM_PROGRAM"] = "manifold-web"
        environment.pop("NO_COLOR", None)
        return environment

    async def _open_app_process(self, width: int = 80, height: int = 24) -> Process:
        """A session of its own: Ctrl-C at the server's terminal is for the server."""
        process = await asyncio.create_subprocess_exec(
            *self._argv, stdin=PIPE, stdout=PIPE, stderr=PIPE,
            env=self._build_environment(width, height), start_new_session=True,
        )  # fmt: skip
        self._process, self._stdin = process, process.stdin
        return process

    async def talk(self, columns: int, rows: int) -> m.Ended:
        """Run the console until it ends, or its tab does; why it ended."""
        process = await self._open_app_process(columns, rows)
        parts = [asyncio.create_task(self._show()), asyncio.create_task(self._hear())]
        errors = asyncio.create_task(self._listen_to_errors())
        gone = asyncio.create_task(_gone(process))
        try:
            await asyncio.wait([*parts, gone], return_when=asyncio.FIRST_COMPLETED)
            if gone.done():  # what it has drawn last is still to be shown
                await asyncio.wait(parts, timeout=DRAIN_S, return_when=asyncio.FIRST_COMPLETED)
            reason = next((part.result() for part in parts if part.done()), HAS_ENDED)
        except BadPacket as fault:
            reason = f"The session was ended: {fault}."
        finally:
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)
            await self._end(process, gone, errors)
        return m.Ended(reason, self._last_words.decode(errors="replace").strip())

    async def _end(
        self, process: Process, gone: asyncio.Task[None], errors: asyncio.Task[None]
    ) -> None:
        """Ask, then insist (S1). Its output is drained: a console blocked on it could not end."""
        await self._download_manager.cancel_app_downloads(app_service_id=self.app_service_id)
        drained = asyncio.create_task(self._drain(process))
        quit_packet = self.encode_packet(b"M", json.dumps({"type": "quit"}).encode())
        self.stdin.write(quit_packet)
        self.stdin.close()
        for wait_s, number in ((QUIT_S, signal.SIGTERM), (TERMINATE_S, signal.SIGKILL)):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(gone), wait_s)
                break
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        await gone
        with contextlib.suppress(ProcessLookupError):  # what it started and left, with its pipes
            os.killpg(process.pid, signal.SIGKILL)
        reaped = asyncio.create_task(process.wait())
        await asyncio.wait([drained, errors, reaped], timeout=DRAIN_S)
        process._transport.close()  # type: ignore[attr-defined]  # S4; there is no public way
        await asyncio.gather(drained, errors, reaped)

    @staticmethod
    async def _drain(process: Process) -> None:
        assert process.stdout is not None, "it was started with a pipe"
        while await process.stdout.read(1 << 16):
            continue

    async def _listen_to_errors(self) -> None:
        assert self._process is not None and self._process.stderr is not None, "started with pipes"
        while data := await self._process.stderr.read(4096):
            self._last_words = (self._last_words + data)[-LAST_WORDS_BYTES_MAX:]

    # -- from the process to the page -------------------------------------------------------------

    async def _show(self) -> str:
        """Packets of the process, until there are no more."""
        assert self._process is not None and self._process.stdout is not None, "started with pipes"
        output = self._process.stdout
        try:
            if not await self._ready(output):
                return "The console did not start."
            while True:
                kind = await output.readexactly(1)
                size = int.from_bytes(await output.readexactly(4), "big")
                if size > PACKET_BYTES_MAX:
                    raise BadPacket(f"the console sent a packet of {size} bytes")
                await self._packet(kind, await output.readexactly(size))
        except asyncio.IncompleteReadError:
            return HAS_ENDED
        except ConnectionResetError:
            return "The page has gone."

    @staticmethod
    async def _ready(output: asyncio.StreamReader) -> bool:
        for _ in range(PRELUDE_LINES_MAX):
            try:
                line = await output.readline()
            except ValueError:  # longer than a StreamReader holds
                return False
            if line == READY:
                return True
        return False

    async def _packet(self, kind: bytes, payload: bytes) -> None:
        try:
            if kind == b"D":
                await self.on_data(payload)
            elif kind == b"M":
                await self.on_meta(payload)
            elif kind == b"P":
                await self.on_packed(payload)
            else:
                raise BadPacket(f"the console sent a packet of kind {kind!r}")
        except (ValueError, LookupError, DecodeError, RecursionError) as fault:
            raise BadPacket(f"the console sent a packet that does not decode ({fault})") from fault

    async def on_meta(self, data: bytes) -> None:
        """An address to open, or a file to fetch."""
        meta = json.loads(data)
        if meta["type"] == "open_url":
            await self._say(m.OpenUrl(str(meta["url"])))
        elif meta["type"] == "deliver_file_start" and self._downloads < DOWNLOADS_MAX:
            self._downloads += 1
            await self._download_manager.create_download(
                app_service=self,
                delivery_key=str(meta["key"]),
                file_name=os.path.basename(str(meta["path"])),
                open_method="download",
                mime_type="application/octet-stream",
                encoding=str(meta["encoding"]) or None,
                name=meta.get("name"),
            )
            await self._say(m.Download(str(meta["key"])))

    async def _say(self, message: m.ToPage) -> None:
        await self._socket.send_str(msgspec.json.encode(message).decode())

    # -- from the page to the process -------------------------------------------------------------

    async def _hear(self) -> str:
        """Messages of the page, until it closes its websocket."""
        async for received in self._socket:
            if received.type is not WSMsgType.TEXT:
                raise BadPacket("the page sent something that is not text")
            try:
                message = FROM_PAGE.decode(received.data)
            except msgspec.ValidationError as fault:
                raise BadPacket(f"the page sent what nobody understands ({fault})") from fault
            except (msgspec.DecodeError, RecursionError) as fault:
                raise BadPacket("the page sent what is not JSON") from fault
            try:
                await asyncio.wait_for(self._pass_on(message), STUCK_S)
            except TimeoutError:
                return f"The console has not read a key for {STUCK_S:.0f} s; it was ended."
        return "The page has gone."

    async def _pass_on(self, message: m.FromPage) -> None:
        if isinstance(message, m.Keys):
            await self.send_bytes(message.text.encode(errors="replace"))
        elif isinstance(message, m.Resize):
            await self.set_terminal_size(message.columns, message.rows)
        elif message.here:
            await self.focus()
        else:
            await self.blur()


async def _gone(process: Process) -> None:
    """Until the process has ended. Its own `wait` waits for its pipes as well in some Pythons."""
    if process.returncode is not None:
        return
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
