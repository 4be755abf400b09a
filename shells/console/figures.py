"""Figures as text: bars, sparklines, sizes, ages; pure, and each as wide as it is asked to be."""

from __future__ import annotations

from collections.abc import Sequence

SPARKS = "▁▂▂▃▄▅▆▆▇"  # nothing is a ground line; the most leaves a gap to the row above
SIZES = ("B", "K", "M", "G", "T", "P")


def spark(history: Sequence[float], width: int, top: float = 1.0) -> str:
    """The newest `width` samples; the least that is not nothing is visible."""
    shown = list(history)[-width:] if width else []
    if top <= 0:
        return (SPARKS[0] * len(shown)).rjust(width)
    text = "".join(
        SPARKS[0] if value <= 0 else SPARKS[max(1, min(8, round(value / top * 8)))]
        for value in shown
    )
    return text.rjust(width)


def bar(share: float, width: int) -> tuple[str, str]:
    """The full part of a bar, in halves of a cell, and the rest."""
    full, half = divmod(round(max(0.0, min(1.0, share)) * width * 2), 2)
    text = "━" * full + "╸" * half
    return text, "─" * (width - len(text))


def size(count: float) -> str:
    """Bytes in at most five characters."""
    for unit in SIZES:
        if count < 1000 or unit == SIZES[-1]:
            number = f"{count:.1f}" if count < 10 and unit != "B" else f"{count:.0f}"
            return number.removesuffix(".0") + unit
        count /= 1024
    raise AssertionError("the last unit takes everything")


def amount(count: float) -> str:
    """A number in at most five characters: 999, 1.2k, 34M."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if count < 1000 or unit == "P":
            return f"{count:.1f}{unit}" if 0 < count < 10 and unit else f"{count:.0f}{unit}"
        count /= 1000
    raise AssertionError("the last unit takes everything")


def age(milliseconds: float) -> str:
    """A time in at most six characters: 850ms, 12s, 4m03, 2h15, 3d04h."""
    seconds = int(milliseconds // 1000)
    if milliseconds < 1000:
        return f"{max(0, milliseconds):.0f}ms"
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02}"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02}"
    return f"{seconds // 86400}d{seconds % 86400 // 3600:02}h"


def coarse(milliseconds: float) -> str:
    """As `age`, but minutes change only once a minute: for what stands in a table for long."""
    text = age(milliseconds)
    return f"{text.partition('m')[0]}m" if "m" in text and not text.endswith("ms") else text


def plural(count: int, word: str) -> str:
    """`1 node`, `2 nodes`."""
    return f"{count} {word}{'' if count == 1 else 's'}"


def area(history: Sequence[float], width: int, height: int) -> list[str]:
    """Shares from 0 to 1 as an area of `height` rows, the newest at the right."""
    shown = list(history)[-width:] if width > 0 else []
    eighths = [round(max(0.0, min(1.0, value)) * height * 8) for value in shown]
    rows = []
    for row in range(height - 1, -1, -1):
        cells = (max(0, min(8, each - row * 8)) for each in eighths)
        rows.append("".join(" ▁▂▃▄▅▆▇█"[each] for each in cells).rjust(width))
    if rows and shown:  # where nothing happened the ground line is seen
        rows[-1] = "".join(
            "▁" if cell == " " else cell for cell in rows[-1][width - len(shown) :]
        ).rjust(width)
    return rows
