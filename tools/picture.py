"""`make picture`: the README's picture, taken from the running product and never drawn by hand.

Runs the demo, and writes what it printed as `docs/demo.svg`.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

TARGET = Path(__file__).resolve().parents[1] / "docs" / "demo.svg"
COLUMNS = 100
LINES_MAX = 46


def picture(printed: str) -> str:
    """`printed` as an SVG of a terminal."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
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


def main() -> int:
    """Take the picture; fails where the demo does."""
    done = subprocess.run(
        [sys.executable, "-m", "manifold.tools.demo"], capture_output=True, text=True, check=True
    )
    TARGET.write_text(picture(done.stdout))
    print(f"wrote {TARGET}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
