"""Every screen of the console as characters, from a recorded session, at two sizes.

`MANIFOLD_UPDATE_SNAPSHOTS=1 pytest tests/unit/test_console_snapshots.py` writes them anew; look at
the difference before it is committed. Where a screen differs, a picture of it lies in the test's
folder.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from rich.style import Style

from manifold.shells.console import messages as e
from manifold.shells.console.recording import Header, Player, read
from manifold.shells.console.replaying import ReplayConsole

FOLDER = Path(__file__).parents[1] / "snapshots" / "console"
PAUSE_S = 0.02
STANDS = 50  # so often the same: it is as it will be
AT_MS = 13_060  # the job runs, and a node has been silent for a while
SIZES = ((80, 24), (200, 60))
SCREENS: dict[str, tuple[str, ...]] = {
    "shell": ("f2",),
    "nodes": ("f3",),
    "node": ("f3", "j", "j", "enter"),
    "nodes-sorted": ("f3", "B", "B"),
    "jobs": ("f4",),
    "job": ("f4", "enter"),
    "map": ("f5",),
    "map-chosen": ("f5", "right", "right"),
    "log": ("f6",),
    "help": ("f3", "f1"),
}
EMPTY: dict[str, tuple[str, ...]] = {f"empty-{pane}": (key,) for pane, key in (
    ("shell", "f2"), ("nodes", "f3"), ("jobs", "f4"), ("map", "f5"), ("log", "f6"),
)}  # fmt: skip


def session() -> Player:
    player = Player(*read(FOLDER / "session.jsonl"))
    player.paused = True
    return player


def nothing() -> Player:
    """A console that has found no cluster."""
    lost = e.Lost(0, "Cluster 'default' is not running here.", "Start one: up --nodes 4 --detach")
    player = Player(Header("recording", 1, "default", 0), [lost])
    player.paused = True
    return player


def shown(
    player: Player,
    keys: tuple[str, ...],
    size: tuple[int, int],
    tmp_path: Path,
    wanted: str = "",
    **options: Any,
) -> tuple[str, str]:
    """The characters of the screen after some keys, and a picture of it.

    A screen is laid out in several steps: as `wanted`, or as it stays for a while.
    """

    async def run() -> tuple[str, str]:
        environ = {"HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path)}
        app = ReplayConsole(player, environ, pane="shell", **options)
        async with app.run_test(size=size) as pilot:
            await pilot.pause()
            app.action_seek_to(AT_MS)
            await pilot.press(*keys)
            text, stood = "", 0
            while text != wanted and stood < STANDS:
                await pilot.pause(PAUSE_S)
                rows = app.screen._compositor.render_strips()
                lines = ("".join(part.text for part in row).rstrip() for row in rows)
                before, text = text, "\n".join(lines) + "\n"
                stood = stood + 1 if text == before else 0
            return text, app.export_screenshot()

    return asyncio.run(run())


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("name", [*SCREENS, *EMPTY])
def test_the_screen_is_as_it_was(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    player = nothing() if name in EMPTY else session()
    keys = {**SCREENS, **EMPTY}[name]
    expected = FOLDER / f"{name}-{size[0]}x{size[1]}.txt"
    wanted = expected.read_text() if expected.exists() else ""
    text, picture = shown(player, keys, size, tmp_path, wanted)
    if os.environ.get("MANIFOLD_UPDATE_SNAPSHOTS"):
        expected.write_text(text)
    if not expected.exists() or expected.read_text() != text:
        (tmp_path / "screen.svg").write_text(picture)
    assert text == expected.read_text(), f"a picture of it: {tmp_path / 'screen.svg'}"


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_themes_differ_in_colours_and_not_in_characters(theme: str, tmp_path: Path) -> None:
    wanted = (FOLDER / "nodes-80x24.txt").read_text()
    text, picture = shown(session(), ("f3",), (80, 24), tmp_path, wanted, theme=theme)
    assert text == wanted
    assert {"dark": "#10141b", "light": "#fcfcfa"}[theme] in picture


def coloured(style: Style) -> bool:
    return any(each is not None and not each.is_default for each in (style.color, style.bgcolor))


def test_without_colour_nothing_is_coloured_and_states_still_differ(tmp_path: Path) -> None:
    async def run() -> None:
        environ = {"HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path), "NO_COLOR": "1"}
        app = ReplayConsole(session(), environ, pane="nodes")
        async with app.run_test(size=(80, 24)) as pilot:
            await pilot.pause()
            app.action_seek_to(AT_MS)
            await pilot.pause()
            for row in app.screen._compositor.render_strips():
                for part in row.apply_filter(app._filters[-1], app.screen.background_colors[1]):
                    assert part.style is None or not coloured(part.style), part

    asyncio.run(run())
