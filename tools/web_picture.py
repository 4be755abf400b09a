"""`make picture`: the web console's picture, taken in a browser from the running product.

Starts a cluster and `manifold web`, types verbs as a user does, and writes what the browser shows
as `docs/web.png`.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from pathlib import Path

from manifold.shells.web.server import Served, WebServer
from manifold.shells.web.verbs import console
from manifold.tools.browser import SCREEN, Browser
from manifold.tools.emulator.testing import TestCluster

NODES = 8
NAME = "demo"
ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "web.png"
# What is typed, and what is waited for.
LINES = (
    ("status", "converged"),
    ("run examples/collatz.ent --range 1:1000000 --reduce sum", "131434272"),
    ("node ls", "server-01  K-"),
)
BYTES_MAX = 200_000
WIDTH_PX, HEIGHT_PX = 1180, 720


async def take(served: Served, target: Path) -> None:
    """Open the console, type verbs, and take the picture."""
    server = WebServer(served, "127.0.0.1", 0)
    await server.start()
    try:
        async with Browser(WIDTH_PX, HEIGHT_PX) as browser:
            await browser.open(server.address)
            await browser.wait_for(f"{NODES} of {NODES} ready")
            for line, answer in LINES:
                await browser.type(line)
                await browser.press("Enter")
                await browser.wait_for(answer)
                await browser.wait_until(f"/^ ?{NAME} ❯ *$/m.test({SCREEN})")
            await browser.picture(target)
    finally:
        await server.stop()


def main() -> int:
    """Take the picture; 1 where it is too large for the repository."""
    os.chdir(ROOT)  # the console finds the examples from here
    with tempfile.TemporaryDirectory(prefix="mf-web-") as folder:
        os.environ |= {
            "MANIFOLD_STATE_HOME": f"{folder}/state",
            "MANIFOLD_RUNTIME_DIR": f"{folder}/run",
            "MANIFOLD_CLUSTER": NAME,
        }
        cluster = TestCluster(NODES, os.environ)
        try:
            asyncio.run(take(Served(console(NAME, False, ()), f"Manifold — {NAME}"), TARGET))
        finally:
            cluster.close()
    size = TARGET.stat().st_size
    print(f"wrote {TARGET}, {size} bytes")
    return int(size > BYTES_MAX)


if __name__ == "__main__":
    sys.exit(main())
