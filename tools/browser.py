"""A headless Chromium, driven over its DevTools protocol: what a user of the web console sees.

Interface rules: `async with Browser() as browser` starts one with a profile of its own and one tab;
methods wait for events with a deadline and never for a time. Every request of the tab is kept in
`requests`, everything its scripts say in `console`. Invariants: B1 no browser process and no
profile are left. B2 the browser is asked for nothing of another host before the tab asks.
Source: https://chromedevtools.github.io/devtools-protocol/ (tot).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import re
import shutil
import signal
import tempfile
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

from manifold.kernel.errors import ManifoldError, Unsupported

LISTENS = re.compile(rb"^DevTools listening on (ws://\S+)", re.MULTILINE)
NAMES = ("chromium", "chromium-browser", "google-chrome")
START_S = 60.0  # of a browser on a machine that does other things
ANSWER_S = 60.0
END_S = 10.0
LOOK_S = 20.0  # the page looks for so long at what is waited for, before it is asked again
# What is said of an expression whose page has made way for another.
MOVED = ("context was destroyed", "navigated or closed", "Cannot find context")
MESSAGE_BYTES_MAX = 64 << 20  # a screenshot in base64
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--disable-extensions", "--disable-default-apps",
    "--metrics-recording-only", "--hide-scrollbars", "--remote-debugging-port=0",
)  # fmt: skip
KEYS: Mapping[str, tuple[str, int, str]] = {  # name: code, Windows' number, text
    "Enter": ("Enter", 13, "\r"),
    "Tab": ("Tab", 9, ""),
    "Escape": ("Escape", 27, ""),
    "Backspace": ("Backspace", 8, ""),
}
# The page's terminal as text, row by row, and what its page has put over it.
SCREEN = """(() => {
  const shown = [];
  const rows = window.terminal ? terminal.buffer.active : { length: 0 };
  for (let at = 0; at < rows.length; at++) shown.push(rows.getLine(at).translateToString(true));
  return shown.join("\\n");
})()"""


class BrowserError(ManifoldError):
    """The browser did not do what it was asked."""

    code = "browser"


def missing() -> str:
    """Why there is no browser here, or ""."""
    return "" if _found() else f"none of {', '.join(NAMES)} is installed"


def _found() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One browser with one tab of `width` x `height` pixels."""

    def __init__(self, width: int = 1200, height: int = 720) -> None:
        self._size = (width, height)
        self.requests: list[str] = []
        self.console: list[str] = []
        self._asked: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._waiting: list[tuple[str, asyncio.Future[dict[str, Any]]]] = []
        self._number = 0

    # -- life -----------------------------------------------------------------------------------

    async def __aenter__(self) -> Browser:
        program = _found()
        if program is None:
            raise Unsupported(f"There is no browser: {missing()}.", "apt-get install chromium")
        self._profile = tempfile.mkdtemp(prefix="mf-browser-")
        width, height = self._size
        self._process = await asyncio.create_subprocess_exec(
            program, *FLAGS, f"--window-size={width},{height}",
            f"--user-data-dir={self._profile}", "about:blank",
            stdin=DEVNULL, stdout=DEVNULL, stderr=PIPE, start_new_session=True,
        )  # fmt: skip
        self._session = aiohttp.ClientSession()
        try:
            async with asyncio.timeout(START_S):
                await self._attach()
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if hasattr(self, "_reader"):
            with contextlib.suppress(BrowserError, TimeoutError):
                await asyncio.wait_for(self._ask_whole("Browser.close"), END_S)
            await self._socket.close()
            await self._reader
        await self._session.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), END_S)
        with contextlib.suppress(ProcessLookupError):  # B1: its zygotes are in its group
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()
        if hasattr(self, "_drained"):
            await self._drained
        shutil.rmtree(self._profile)

    @staticmethod
    async def _drain(stream: asyncio.StreamReader) -> None:
        while await stream.read(1 << 16):
            continue

    async def _attach(self) -> None:
        assert self._process.stderr is not None, "it was started with a pipe"
        said = b""
        while not (found := LISTENS.search(said)):
            line = await self._process.stderr.readline()
            if not line:
                raise BrowserError(f"The browser has ended: {said.decode(errors='replace')}")
            said += line
        self._drained = asyncio.create_task(self._drain(self._process.stderr))
        self._socket = await self._session.ws_connect(
            found[1].decode(), max_msg_size=MESSAGE_BYTES_MAX
        )
        self._tab = ""
        self._reader = asyncio.create_task(self._read())
        targets = await self._ask_whole("Target.getTargets")
        page = next(each for each in targets["targetInfos"] if each["type"] == "page")
        attached = await self._ask_whole(
            "Target.attachToTarget", targetId=page["targetId"], flatten=True
        )
        self._tab = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            await self._ask(f"{domain}.enable")
        await self._ask("Emulation.setFocusEmulationEnabled", enabled=True)
        await self.resize(*self._size)

    # -- the protocol ---------------------------------------------------------------------------

    async def _read(self) -> None:
        async for message in self._socket:
            self._receive(json.loads(message.data))
        gone = BrowserError("The browser has closed its connection.")
        for waiting in [*self._asked.values(), *(each for _, each in self._waiting)]:
            if not waiting.done():
                waiting.set_exception(gone)

    def _receive(self, message: dict[str, Any]) -> None:
        asked = self._asked.pop(message.get("id", 0), None)
        if asked is not None and not asked.done():
            asked.set_result(message)
        method, values = message.get("method", ""), message.get("params", {})
        if method in ("Network.requestWillBeSent", "Network.webSocketCreated"):
            self.requests.append(values["request"]["url"] if "request" in values else values["url"])
        elif method == "Runtime.consoleAPICalled":
            said = " ".join(str(each.get("value", "")) for each in values["args"])
            self.console.append(f"{values['type']}: {said}")
        elif method == "Runtime.exceptionThrown":
            details = values["exceptionDetails"]
            text = details.get("exception", {}).get("description", details["text"])
            self.console.append(f"exception: {text}")
        elif method == "Log.entryAdded":
            self.console.append(f"{values['entry']['level']}: {values['entry']['text']}")
        for entry in [each for each in self._waiting if each[0] == method]:
            self._waiting.remove(entry)
            if not entry[1].done():
                entry[1].set_result(values)

    async def _ask(self, method: str, **values: Any) -> dict[str, Any]:
        """Ask the tab and wait for the answer."""
        return await self._call(method, values, {"sessionId": self._tab})

    async def _ask_whole(self, method: str, **values: Any) -> dict[str, Any]:
        """Ask the browser, of no tab in particular."""
        return await self._call(method, values, {})

    async def _call(
        self, method: str, values: dict[str, Any], whom: dict[str, str]
    ) -> dict[str, Any]:
        self._number += 1
        asked: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._asked[self._number] = asked
        await self._socket.send_json(
            {"id": self._number, "method": method, "params": values} | whom
        )
        answer = await asyncio.wait_for(asked, ANSWER_S)
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result

    # -- what a user does -----------------------------------------------------------------------

    async def open(self, url: str) -> None:
        """Go to `url`, and wait until the page has loaded."""
        loaded = self._expect("Page.loadEventFired")
        answer = await self._ask("Page.navigate", url=url)
        if answer.get("errorText"):
            loaded.cancel()
            raise BrowserError(f"The page did not open: {answer['errorText']}.")
        await asyncio.wait_for(loaded, ANSWER_S)

    async def follow(self, selector: str) -> None:
        """Click a link, and wait until what it leads to has loaded."""
        loaded = self._expect("Page.loadEventFired")
        await self.click(selector)
        await asyncio.wait_for(loaded, ANSWER_S)

    async def reload(self) -> None:
        """As F5 does."""
        loaded = self._expect("Page.loadEventFired")
        await self._ask("Page.reload")
        await asyncio.wait_for(loaded, ANSWER_S)

    def _expect(self, method: str) -> asyncio.Future[dict[str, Any]]:
        waiting: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting.append((method, waiting))
        return waiting

    async def resize(self, width: int, height: int) -> None:
        """The window's inner size in pixels."""
        await self._ask(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip

    async def type(self, text: str) -> None:
        """Press and release the key of each character."""
        for character in text:
            await self._ask("Input.dispatchKeyEvent", type="keyDown", text=character, key=character)
            await self._ask("Input.dispatchKeyEvent", type="keyUp", key=character)

    async def press(self, key: str) -> None:
        """A key by its name, such as `Enter`."""
        code, number, text = KEYS[key]
        values: dict[str, Any] = {"key": key, "code": code, "windowsVirtualKeyCode": number}
        kind = "keyDown" if text else "rawKeyDown"
        with_text = {"text": text} if text else {}
        await self._ask("Input.dispatchKeyEvent", type=kind, **values, **with_text)
        await self._ask("Input.dispatchKeyEvent", type="keyUp", **values)

    async def click(self, selector: str) -> None:
        """Click in the middle of the element."""
        box = await self.evaluate(
            f"(() => {{ const b = document.querySelector({json.dumps(selector)})"
            ".getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            await self._ask(
                "Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left",
                clickCount=1,
            )  # fmt: skip

    # -- what a user sees -------------------------------------------------------------------------

    async def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page."""
        answer = await self._ask(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise BrowserError(details.get("exception", {}).get("description", details["text"]))
        return answer["result"].get("value")

    async def screen(self) -> str:
        """The text of the page's terminal, row by row."""
        return str(await self.evaluate(SCREEN))

    async def wait_for(self, text: str, timeout_s: float = ANSWER_S) -> str:
        """The terminal's text, once it contains `text`."""
        try:
            await self.wait_until(f"{SCREEN}.includes({json.dumps(text)})", timeout_s)
        except BrowserError as fault:
            shown = await self.screen()
            raise BrowserError(f"{text!r} did not appear within {timeout_s} s:\n{shown}") from fault
        return await self.screen()

    async def wait_until(self, expression: str, timeout_s: float = ANSWER_S) -> None:
        """Until the expression is true, looked at each time that the page draws."""
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout_s
        while (left_s := until - loop.time()) > 0:
            try:
                true = await self.evaluate(f"""new Promise((resolve) => {{
                  const until = performance.now() + {min(left_s, LOOK_S) * 1000:.0f};
                  const look = () => {{
                    if ({expression}) resolve(true);
                    else if (performance.now() > until) resolve(false);
                    else requestAnimationFrame(look);
                  }};
                  look();
                }})""")
            except BrowserError as fault:
                if not any(each in fault.message for each in MOVED):
                    raise
            else:
                if true:
                    return
        raise BrowserError(f"{expression} did not come true within {timeout_s} s.")

    async def picture(self, path: Path) -> None:
        """A PNG of what the tab shows."""
        answer = await self._ask("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(answer["data"]))
