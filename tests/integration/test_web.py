"""The web console as its user meets it: in a browser, driven over its DevTools protocol."""

from __future__ import annotations

import asyncio
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import psutil
import pytest

from manifold.shells.web.server import Served, WebServer
from manifold.tools.browser import SCREEN, Browser, BrowserError, missing
from manifold.tools.emulator.testing import TestCluster

ECHO = [sys.executable, str(Path(__file__).parent / "echo_console.py")]
ENDED_S = 60.0
# What `manifold web` runs, with another console.
SERVE = (
    "import asyncio; from manifold.shells.web.server import Served, WebServer; "
    "from manifold.shells.web.verbs import _until_stopped; "
    f"asyncio.run(_until_stopped(WebServer(Served({ECHO!r}, 'x'), '127.0.0.1', 0), False, False))"
)

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"no browser: {missing()}")


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[WebServer, Browser]]:
    """A server of a small console, and a browser that shows it."""
    server = WebServer(Served(ECHO, "Manifold — echo"), "127.0.0.1", 0)
    await server.start()
    try:
        async with Browser() as browser:
            await browser.open(server.address)
            await browser.wait_for("is ready")
            yield server, browser
    finally:
        await server.stop()
        assert server.sessions == 0


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 110))


async def console_pid(browser: Browser) -> int:
    """The process that the tab shows."""
    found = re.search(r"process (\d+) is ready", await browser.wait_for("is ready"))
    assert found is not None
    return int(found[1])


async def say(browser: Browser, text: str) -> None:
    await browser.type(text)
    await browser.press("Enter")


def gone(descriptor: int) -> bool:
    """Whether the process behind a pidfd ends in time."""
    return bool(select.select([descriptor], [], [], ENDED_S)[0])


def test_what_is_typed_is_answered_and_no_request_leaves_loopback() -> None:
    async def test() -> None:
        async with serving() as (_, browser):
            await say(browser, "grüße, 世界")
            await browser.wait_for("heard grüße, 世界")
            assert await browser.evaluate("document.title") == "Manifold — echo"
            assert "token" not in await browser.evaluate("location.href")
            assert await browser.evaluate("history.length") <= 2, "about:blank and the console"
            assert {urlsplit(each).hostname for each in browser.requests} == {"127.0.0.1"}
            assert any(each.startswith("ws://") for each in browser.requests)
            assert browser.console == [], "no error, no violation of the policy"
            fonts = await browser.evaluate("[...document.fonts].length")
            assert fonts == 0, "the fonts are the system's"

    run(test)


def test_the_terminal_fills_the_window_and_follows_it() -> None:
    async def test() -> None:
        async with serving() as (_, browser):
            for width, height in ((900, 500), (1400, 800)):
                await browser.resize(width, height)
                await browser.wait_until(
                    "(({right, bottom}) => right <= innerWidth && innerWidth - right < 24"
                    " && bottom <= innerHeight && innerHeight - bottom < 36)"
                    "(document.querySelector('.xterm-screen').getBoundingClientRect())"
                )
                columns, rows = await browser.evaluate("[terminal.cols, terminal.rows]")
                await say(browser, "size")
                await browser.wait_for(f"{columns} x {rows} cells")

    run(test)


def test_what_is_pasted_arrives_whole() -> None:
    async def test() -> None:
        async with serving() as (_, browser):
            await browser.evaluate("terminal.paste('\\u{1f427}x'.repeat(15000))")
            await browser.press("Enter")
            await browser.wait_for("heard 30000 characters")

    run(test)


def test_a_console_ends_when_its_tab_goes_and_a_reload_starts_another() -> None:
    async def test() -> None:
        async with serving() as (server, browser):
            first = await console_pid(browser)
            descriptor = os.pidfd_open(first)
            await browser.reload()
            assert await console_pid(browser) != first
            assert await asyncio.to_thread(gone, descriptor)
            os.close(descriptor)
            await browser.open("about:blank")
            async with asyncio.timeout(ENDED_S):
                await server.wait_sessions(0)

    run(test)


def test_where_a_console_has_ended_the_page_says_so_and_offers_another() -> None:
    async def test() -> None:
        async with serving() as (_, browser):
            first = await console_pid(browser)
            await say(browser, "fail")
            await browser.wait_until("document.body.dataset.state === 'away'")
            notice = await browser.evaluate("document.getElementById('notice').innerText")
            assert "The console has ended." in notice
            assert "the cluster has gone home" in notice
            await browser.click("#again")
            assert await console_pid(browser) != first
            await say(browser, "here again")
            await browser.wait_for("heard here again")

    run(test)


def test_where_the_server_has_ended_the_page_says_what_to_do() -> None:
    async def test() -> None:
        async with serving() as (server, browser):
            await server.stop()
            await browser.wait_until("document.body.dataset.state === 'away'")
            notice = await browser.evaluate("document.getElementById('notice').innerText")
            assert "start `manifold web` again" in notice
            await browser.press("Enter")  # reconnect, in vain
            await browser.wait_until("document.body.innerText.includes('has broken')")

    run(test)


def test_a_link_on_a_page_of_another_site_leads_in() -> None:
    async def test() -> None:
        server = WebServer(Served(ECHO, "Manifold — echo"), "127.0.0.1", 0)
        await server.start()
        try:
            async with Browser() as browser:
                link = f'<a id="go" href="{server.address}">the console</a>'
                await browser.open("data:text/html," + quote(link))
                await browser.follow("#go")
                await browser.wait_for("is ready")
                assert "token" not in await browser.evaluate("location.href")
        finally:
            await server.stop()

    run(test)


def test_a_page_of_another_site_cannot_use_the_console_of_its_visitor() -> None:
    async def test() -> None:
        async with serving() as (server, browser):
            home = await browser.evaluate("location.href")
            await browser.open("data:text/html,elsewhere")
            async with asyncio.timeout(ENDED_S):
                await server.wait_sessions(0)
            opened = await browser.evaluate(f"""new Promise((resolve) => {{
              const socket = new WebSocket("{home.replace("http", "ws")}socket?columns=80&rows=24");
              socket.onopen = () => resolve(true);
              socket.onerror = () => resolve(false);
            }})""")
            assert opened is False
            read = await browser.evaluate(
                f"fetch('{home}', {{credentials: 'include'}}).then(() => true, () => false)"
            )
            assert read is False
            framed = await browser.evaluate(f"""new Promise((resolve) => {{
              const frame = document.createElement("iframe");
              frame.src = "{home}";
              frame.onload = () => resolve(frame.contentDocument === null);
              document.body.append(frame);
            }})""")
            assert framed is True, "what is shown is the browser's own error"
            assert server.sessions == 0

    run(test)


# --- the end of the server -----------------------------------------------------------------------


@pytest.fixture
def server_process() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of its own process, and the address that it prints."""
    started = subprocess.Popen(
        [sys.executable, "-c", SERVE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert started.stdout is not None
    line = started.stdout.readline()
    assert line.startswith("open  http://127.0.0.1:"), line
    yield started, line.split()[1]
    started.kill()
    started.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_with_the_server_every_console_ends(
    number: signal.Signals, server_process: tuple[subprocess.Popen[str], str]
) -> None:
    server, address = server_process

    async def test() -> None:
        async with Browser() as browser:
            await browser.open(address)
            descriptor = os.pidfd_open(await console_pid(browser))
            server.send_signal(number)
            assert await asyncio.to_thread(gone, descriptor)
            os.close(descriptor)
            await browser.wait_until("document.body.dataset.state === 'away'")

    run(test)
    _, errors = server.communicate(timeout=ENDED_S)
    assert errors == ""
    assert server.returncode == (-number if number == signal.SIGKILL else 0)


def test_the_address_reaches_a_browser_in_a_file_and_never_in_an_argument(tmp_path: Path) -> None:
    opener = tmp_path / "opener"
    opener.write_text(
        '#!/bin/sh\nfile=${1#file://}\nstat -c %a "$file"; echo "$@"; cat "$file"; echo\n'
    )
    opener.chmod(0o700)
    started = subprocess.Popen(
        [sys.executable, "-m", "manifold", "web", "--open"], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"BROWSER": str(opener), "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert started.stdout is not None
    said = [started.stdout.readline() for _ in range(5)]
    started.send_signal(signal.SIGTERM)
    started.stdout.close()
    started.wait(ENDED_S)
    token = said[0].split("token=")[1].strip()
    assert said[2] == "600\n"
    assert said[3].startswith("file://") and token not in said[3]
    assert f"token={token}" in said[4]
    assert started.returncode == 0
    assert [each.name for each in tmp_path.iterdir()] == ["opener"], "the file is gone"


def test_a_browser_that_runs_in_the_foreground_does_not_keep_the_server(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    opener = tmp_path / "opener"
    opener.write_text(f"#!/bin/sh\necho $$\nread line < {fifo}\n")
    opener.chmod(0o700)
    release = os.open(fifo, os.O_RDWR)
    started = subprocess.Popen(
        [sys.executable, "-m", "manifold", "web", "--open"], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"BROWSER": str(opener)},
    )  # fmt: skip
    assert started.stdout is not None
    *_, pid = [started.stdout.readline() for _ in range(3)]
    descriptor = os.pidfd_open(int(pid))
    try:
        started.send_signal(signal.SIGTERM)
        assert started.wait(ENDED_S) == 0
        assert not select.select([descriptor], [], [], 0)[0], "the browser goes on"
    finally:
        os.write(release, b"\n")
        assert gone(descriptor)
        started.kill()
        started.wait()
        started.stdout.close()
        os.close(descriptor)
        os.close(release)


def test_a_console_that_hangs_ends_with_a_server_that_is_killed(
    server_process: tuple[subprocess.Popen[str], str],
) -> None:
    server, address = server_process

    async def test() -> None:
        async with Browser() as browser:
            await browser.open(address)
            descriptor = os.pidfd_open(await console_pid(browser))
            await say(browser, "hang")
            server.kill()
            assert await asyncio.to_thread(gone, descriptor)
            os.close(descriptor)

    run(test)


# --- the console itself --------------------------------------------------------------------------


def start_web(cluster: TestCluster, *arguments: str) -> tuple[subprocess.Popen[str], str]:
    """`manifold web` on the cluster, and the address that it prints."""
    started = subprocess.Popen(
        [sys.executable, "-m", "manifold", "web", "--json", *arguments],
        env=dict(cluster.environ), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert started.stdout is not None
    return started, json.loads(started.stdout.readline())["address"]


async def answered(browser: Browser, cluster: TestCluster, text: str) -> None:
    """Once the verb has printed `text` and ended: what is typed before that is for the verb."""
    await browser.wait_for(text)
    await browser.wait_until(f"/^ ?{cluster.name}( .looks only.)? ❯ *$/m.test({SCREEN})")


def test_a_verb_that_is_typed_in_the_browser_is_answered_by_the_cluster(
    manifold_clusters: Callable[..., TestCluster],
) -> None:
    cluster = manifold_clusters(3)
    server, address = start_web(cluster)

    async def test() -> None:
        async with Browser() as browser:
            await browser.open(address)
            await answered(browser, cluster, f"{cluster.name} is yours")
            assert await browser.evaluate("document.title") == f"Manifold — {cluster.name}"
            await say(browser, "status")
            await answered(browser, cluster, "of 3 nodes ready, ")
            await browser.reload()
            await answered(browser, cluster, f"{cluster.name} is yours")
            assert "nodes ready, " not in await browser.screen(), "a console of its own"
            await say(browser, "add counter 41")
            await answered(browser, cluster, "version 1")
            await say(browser, "get counter --json")
            await answered(browser, cluster, '"value":41')
            assert {urlsplit(each).hostname for each in browser.requests} == {"127.0.0.1"}
            assert browser.console == []
            consoles = psutil.Process(server.pid).children(recursive=True)
            assert consoles
            await browser.open("about:blank")
            _, alive = await asyncio.to_thread(psutil.wait_procs, consoles, ENDED_S)
            assert alive == []

    try:
        run(test)
    finally:
        server.send_signal(signal.SIGTERM)
        _, errors = server.communicate(timeout=ENDED_S)
    assert (server.returncode, errors) == (0, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_console_in_the_midst_of_work_leaves_nothing_when_the_server_ends(
    number: signal.Signals, manifold_clusters: Callable[..., TestCluster]
) -> None:
    cluster = manifold_clusters(2)
    server, address = start_web(cluster)

    async def test() -> None:
        async with Browser() as browser:
            await browser.open(address)
            await answered(browser, cluster, f"{cluster.name} is yours")
            await say(browser, "logs -f")
            await browser.wait_for("rpi4-01      20")  # a line of a node begins with its year
            consoles = psutil.Process(server.pid).children(recursive=True)
            assert len(consoles) >= 2, "a console, and what runs for it"
            server.send_signal(number)
            _, alive = await asyncio.to_thread(psutil.wait_procs, consoles, ENDED_S)
            assert alive == []

    try:
        run(test)
    finally:
        server.kill()
        server.communicate(timeout=ENDED_S)


def test_a_read_only_console_refuses_what_would_change_anything(
    manifold_clusters: Callable[..., TestCluster],
) -> None:
    cluster = manifold_clusters(1)
    server, address = start_web(cluster, "--read-only", "--", "--pane", "shell")

    async def test() -> None:
        async with Browser() as browser:
            await browser.open(address)
            await answered(browser, cluster, f"{cluster.name} is yours")
            await say(browser, "set greeting hello")
            await answered(browser, cluster, "and this console only looks")
            await say(browser, "status")
            await answered(browser, cluster, "1 of 1 nodes ready")

    try:
        run(test)
    finally:
        server.send_signal(signal.SIGTERM)
        _, errors = server.communicate(timeout=ENDED_S)
    assert (server.returncode, errors) == (0, "")


def test_the_browser_says_what_it_could_not_do() -> None:
    async def test() -> None:
        async with serving() as (_, browser):
            with pytest.raises(BrowserError, match="'never' did not appear"):
                await browser.wait_for("never", timeout_s=0.1)
            with pytest.raises(BrowserError, match="ReferenceError"):
                await browser.evaluate("nothing.here")
            with socket.socket() as nobody:
                nobody.bind(("127.0.0.1", 0))  # and does not listen
                address = f"http://127.0.0.1:{nobody.getsockname()[1]}/"
                with pytest.raises(BrowserError, match="net::ERR_CONNECTION_REFUSED"):
                    await browser.open(address)

    run(test)
