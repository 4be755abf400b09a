"""Figures as text: bars, sparklines, sizes, ages; pure, and each as wide as it is asked to be."""

from __future__ import annotations

from collections.abc import Sequence

SPARKS = "▁▂▂▃▄▅▆▇█"  # nothing is a ground line, the least rises from it
EIGHTHS = " ▏▎▍▌▋▊▉"
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
    """The full part of a bar, in eighths of a cell, and the blank rest."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    full, part = divmod(eighths, 8)
    text = "█" * full + (EIGHTHS[part] if part else "")
    return text, " " * (width - len(text))


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


def cut(text: str, width: int) -> str:
    """`text`, with an ellipsis where it is wider."""
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"


def coarse(milliseconds: float) -> str:
    """As `age`, but minutes change only once a minute: for what stands in a table for long."""
    text = age(milliseconds)
    return f"{text.partition('m')[0]}m" if "m" in text and not text.endswith("ms") else text


def plural(count: int, word: str) -> str:
    """`1 node`, `2 nodes`."""
    return f"{count} {word}{'' if count == 1 else 's'}"
