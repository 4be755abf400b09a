"""Folded stacks as a flame graph: one SVG file that needs nothing else. Pure.

Interface: `flame_graph(title, subtitle, stacks, samples)` returns the SVG; `busy(stacks)` leaves
out what only waits, which else takes the whole width; `hot(stacks, samples)` are the functions in
which the time went. A frame's width is its share of what is drawn, the outermost is at the bottom;
what a name has no room for is in the title that a browser shows when the pointer rests on it.
Colours say whose code it is.
Source: Brendan Gregg, "The Flame Graph", CACM 59(6), 2016.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape

from manifold.kernel.observe.messages import LOOP, MAIN, WAITS

WIDTH_PX = 1200
MARGIN_PX = 16
ROW_PX = 19
HEADER_PX = 78
CHARACTER_PX = 6.7  # of the monospaced font at 11 px
NARROW_PX = 0.15  # narrower frames are not drawn: nobody can see or touch them
NAMED_PX = 26.0  # a frame of this width has room for a name

Stacks = Sequence[tuple[str, int]]

STYLE = """
svg { background: var(--paper); color-scheme: light dark;
  --paper: #ffffff; --ink: #1f2328; --soft: #59636e; --edge: #ffffff; }
@media (prefers-color-scheme: dark) { svg {
  --paper: #0d1117; --ink: #e6edf3; --soft: #9198a1; --edge: #0d1117; } }
text { font: 11px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; fill: #1b1f24; }
.title { font: 600 17px system-ui, "DejaVu Sans", sans-serif; fill: var(--ink); }
.note { font: 12px system-ui, "DejaVu Sans", sans-serif; fill: var(--soft); }
rect { stroke: var(--edge); stroke-width: 0.6; }
g:hover > rect { stroke: var(--ink); stroke-width: 1.2; }
"""

# Whose code it is: hue, saturation, lightness, and what the legend says.
KINDS = {
    "ours": (28, 92, 66, "Manifold"),
    "library": (205, 58, 72, "Python and libraries"),
    "waits": (220, 9, 80, "holds up the loop"),
    "thread": (96, 34, 68, "thread"),
}
OURS = ("kernel.", "vm.", "shells.", "tools.", "images.")


@dataclass(slots=True)
class _Frame:
    name: str
    count: int = 0
    inner: dict[str, _Frame] = field(default_factory=dict)

    def add(self, names: Sequence[str], count: int) -> None:
        frame = self
        frame.count += count
        for name in names:
            frame = frame.inner.setdefault(name, _Frame(name))
            frame.count += count

    @property
    def depth(self) -> int:
        deepest, level = 0, [self]
        while level := [each for frame in level for each in frame.inner.values()]:
            deepest += 1
        return deepest


def busy(stacks: Stacks) -> Stacks:
    """Without the polling of the event loop, and without the waits of other threads.

    A wait of the main thread beneath a function stays: it holds up the node.
    """
    return [
        (folded, count)
        for folded, count in stacks
        if not folded.endswith(f";{LOOP}")
        and not (folded.endswith(f";{WAITS}") and not folded.startswith(f"{MAIN};"))
    ]


def hot(stacks: Stacks, samples: int) -> list[tuple[str, float, float]]:
    """Functions by the share of samples in which they were innermost, then in which they were."""
    inner: Counter[str] = Counter()
    whole: Counter[str] = Counter()
    for folded, count in stacks:
        thread, *names = folded.split(";")
        if names and names[-1] == WAITS:
            names[-2:] = [" ".join(names[-2:])]
        inner[names[-1] if names else thread] += count
        for name in set(names or [thread]):
            whole[name] += count
    most = max(1, samples)
    return [(name, count / most, whole[name] / most) for name, count in inner.most_common()]


def flame_graph(title: str, subtitle: str, stacks: Stacks, samples: int) -> str:
    """The SVG; each thread is a tower of its own, side by side. Shares are of `samples`."""
    root = _Frame("all that was done")
    for folded, count in stacks:
        root.add(folded.split(";"), count)
    rows = root.depth + 1
    height = HEADER_PX + rows * ROW_PX + MARGIN_PX
    scale = (WIDTH_PX - 2 * MARGIN_PX) / max(1, root.count)
    body = "\n".join(_draw(root, scale, height - MARGIN_PX - ROW_PX, max(1, samples)))
    return f"""<?xml version="1.0" encoding="UTF-8"?>
<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH_PX}" height="{height}" \
viewBox="0 0 {WIDTH_PX} {height}" role="img" aria-label="{escape(title)}">
<style>{STYLE}</style>
<text class="title" x="{MARGIN_PX}" y="30">{escape(title)}</text>
<text class="note" x="{MARGIN_PX}" y="50">{escape(subtitle)}</text>
{"".join(_legend())}
{body}
</svg>
"""


def _legend() -> Iterator[str]:
    at = float(MARGIN_PX)
    for hue, saturation, lightness, text in KINDS.values():
        fill = f"hsl({hue},{saturation}%,{lightness}%)"
        yield f'<rect x="{at:.0f}" y="58" width="12" height="12" rx="2" fill="{fill}"/>'
        yield f'<text class="note" x="{at + 18:.0f}" y="68">{text}</text>\n'
        at += 40 + 6.6 * len(text)


def _draw(root: _Frame, scale: float, bottom: int, samples: int) -> Iterator[str]:
    """Every frame that can be seen, the outermost first; no recursion, however deep."""
    todo = [(root, float(MARGIN_PX), 0)]
    while todo:
        frame, x, depth = todo.pop()
        width = frame.count * scale
        if width < NARROW_PX:
            continue
        yield _box(frame, x, bottom - depth * ROW_PX, width, _kind(frame.name, depth), samples)
        for each in _ordered(frame.inner.values()):
            todo.append((each, x, depth + 1))
            x += each.count * scale


def _ordered(frames: Iterable[_Frame]) -> list[_Frame]:
    return sorted(frames, key=lambda frame: frame.name)


def _box(frame: _Frame, x: float, y: int, width: float, kind: str, samples: int) -> str:
    share = (
        f"{frame.count:,} of {samples:,} samples, {100 * frame.count / samples:.1f} % of the time"
    )
    room = int((width - 8) / CHARACTER_PX)
    text = ""
    if width >= NAMED_PX:
        name = frame.name if len(frame.name) <= room else _shortened(frame.name, room)
        text = f'<text x="{x + 4:.1f}" y="{y + 13}">{escape(name)}</text>'
    return (
        f"<g><title>{escape(frame.name)}\n{share}</title>"
        f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{ROW_PX - 1}" rx="1.5" '
        f'fill="{_fill(frame.name, kind)}"/>{text}</g>'
    )


def _shortened(name: str, room: int) -> str:
    """The end of a name says most: the function, then its class, then its module."""
    words = name.split(".")
    while len(words) > 1 and len(".".join(words)) > room:
        del words[0]
    short = ".".join(words)
    return short if len(short) <= room else short[: max(1, room - 1)] + "…"


def _kind(name: str, depth: int) -> str:
    if depth < 2:
        return "thread"
    if name.startswith("("):
        return "waits"
    return "ours" if name.startswith(OURS) else "library"


def _fill(name: str, kind: str) -> str:
    """Neighbours differ a little, and a function has one colour in every graph."""
    hue, saturation, lightness, _ = KINDS[kind]
    shift = zlib.crc32(name.encode()) % 17 - 8
    module = zlib.crc32(name.rpartition(".")[0].encode()) % 25 - 12 if kind == "ours" else 0
    return f"hsl({hue + module},{saturation}%,{lightness + shift // 2}%)"
