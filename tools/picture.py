"""`make picture`: the README's pictures, taken from the running product and never drawn by hand.

Runs the demo, and writes what it printed as `docs/demo.svg`; then opens the console on a cluster of
sixteen nodes that runs a job, and writes two of its screens.
"""

from __future__ import annotations

import asyncio
import io
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console as Terminal
from rich.text import Text

from manifold.shells.console.app import Console
from manifold.tools.bench.scratch import COLLATZ, environment
from manifold.tools.emulator.testing import TestCluster

DOCS = Path(__file__).resolve().parents[1] / "docs"
TARGET = DOCS / "demo.svg"
COLUMNS = 100
LINES_MAX = 46
CONSOLE_NODES = 16
CONSOLE_SIZE = (100, 30)
CONSOLE_LOOKS = 12  # of history, so that sparklines show something
LOOK_S = 0.2


def picture(printed: str) -> str:
    """`printed` as an SVG of a terminal."""
    console = Terminal(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    for line in printed.splitlines()[:LINES_MAX]:
        text = Text(line[:COLUMNS])
        if line.startswith("$ "):
            text.stylize("bold green")
        elif "killed" in line:
            text.stylize("yellow")
        elif line.isdigit() or "the exact sum" in line:
            text.stylize("bold cyan")
        console.print(text)
    svg = console.export_svg(title="make demo")
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # no font of another host


async def console(environ: dict[str, str], name: str) -> None:
    """Screens of a console while the cluster computes."""
    app = Console(name, environ, pane="nodes")
    async with app.run_test(size=CONSOLE_SIZE) as pilot:
        while app.model.slots()[1] < CONSOLE_NODES:  # before it knows the cluster it asks whether
            await pilot.pause(LOOK_S)
        app.entering.enter(f"run {COLLATZ} --range 1:1000000000 --reduce sum")
        while app.model.slots()[0] < CONSOLE_NODES or len(app.model.total_busy()) < CONSOLE_LOOKS:
            assert app.entering.running is not None, "the job ended before there was a picture"
            await pilot.pause(LOOK_S)
        for pane, target in (("nodes", "console.svg"), ("map", "console-map.svg")):
            app.action_pane(pane)
            await pilot.pause(LOOK_S)
            (DOCS / target).write_text(bare(app.export_screenshot(title="manifold console")))
            print(f"wrote {DOCS / target}")
        app.entering.interrupt()
        while app.entering.running is not None:
            await pilot.pause(LOOK_S)


def bare(svg: str) -> str:
    """A picture without fonts of another host."""
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)


def main() -> int:
    """Take the pictures; fails where the demo does."""
    done = subprocess.run(
        [sys.executable, "-m", "manifold.tools.demo"], capture_output=True, text=True, check=True
    )
    TARGET.write_text(picture(done.stdout))
    print(f"wrote {TARGET}")
    with environment() as environ:
        cluster = TestCluster(CONSOLE_NODES, environ)
        try:
            asyncio.run(console(environ, cluster.name))
        finally:
            cluster.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
