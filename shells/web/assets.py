"""The files of the page, read once: ours, and the terminal (xterm.js) out of textual-serve.

Interface rules: `load()` gives every file by its name; nothing else is ever served, so that no path
can lead elsewhere. textual-serve packs xterm.js and its own page's program in one file and keeps
the classes to itself; `terminal_script` takes its program out and hands the classes to our page.
Invariants: A1 no file names a resource of another host. A2 a textual-serve whose file looks
different is refused with a sentence, and never served half understood.
Source: textual_serve/static/js/textual.js (webpack; xterm.js 5 is under the MIT licence).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata, resources

from manifold.kernel.errors import Unsupported

CLASSES = ("Terminal", "FitAddon", "CanvasAddon", "Unicode11Addon")
STARTS = "window.onload="  # where its program begins to run
# Where it puts a copy of xterm.css into the page, inline, which our policy would refuse aloud.
INSERTS = re.compile(r"\.insert=\w+\(\)\.bind\(null,\"head\"\)")
INSTALL = "Install the extra: pip install 'manifold-os[web]'"


@dataclass(frozen=True, slots=True)
class Asset:
    """A file as it is served."""

    content: bytes
    kind: str


def load() -> Mapping[str, Asset]:
    """Every file that the page needs, by the name it is served under."""
    ours = resources.files("manifold.shells.web")
    theirs = resources.files("textual_serve") / "static"
    script = (theirs / "js" / "textual.js").read_text(encoding="utf-8")
    return {
        "xterm.js": Asset(terminal_script(script).encode(), "text/javascript"),
        "xterm.css": Asset((theirs / "css" / "xterm.css").read_bytes(), "text/css"),
        "page.js": Asset((ours / "page.js").read_bytes(), "text/javascript"),
        "page.css": Asset((ours / "page.css").read_bytes(), "text/css"),
        "icon.svg": Asset((ours / "icon.svg").read_bytes(), "image/svg+xml"),
    }


def page() -> str:
    """The page, with `{title}` to be filled in."""
    return (resources.files("manifold.shells.web") / "page.html").read_text(encoding="utf-8")


def terminal_script(script: str) -> str:
    """`script` with its program disabled and its classes in `window.Xterm` (A2)."""
    program = script[script.rfind("sessionWebsocketUrl") :]
    names = dict(re.findall(r"new ((?:\w|\$)+\.(\w+))\b", program))
    found = {kind: name for name, kind in names.items() if kind in CLASSES}
    if script.count(STARTS) != 1 or set(found) != set(CLASSES):
        raise Unsupported(
            f"textual-serve {metadata.version('textual-serve')} is not one that Manifold knows.",
            INSTALL,
        )
    handed = ",".join(f"{kind}:{found[kind]}" for kind in CLASSES)
    script = INSERTS.sub(".insert=()=>{}", script)
    return script.replace(STARTS, f"window.Xterm={{{handed}}};window.Xterm.unused=")
