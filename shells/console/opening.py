"""What has to hold before a screen is opened."""

from __future__ import annotations

import os
import sys

from manifold.kernel.errors import Unsupported


def need_terminal() -> None:
    """Refuse where there is no terminal, or one that cannot move its cursor."""
    if os.environ.get("TEXTUAL_DRIVER"):
        return  # served to a browser
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise Unsupported(
            "The console needs a terminal.", "Run verbs in pipes: `manifold node ls --json`."
        )
    if os.environ.get("TERM", "") in ("", "dumb"):
        raise Unsupported(
            "This terminal cannot show the console (TERM is not set, or dumb).",
            "Run verbs one by one: `manifold status`.",
        )
