"""How the console looks: two palettes and none, and the named styles that everything is drawn in.

Interface rules: text is kept as spans, (text, style name), and gets its colours only when it is
drawn, so that a change of theme changes what was printed before. A name may have several words,
such as "ok bold". Without colour, states differ by weight and by their glyphs.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.style import Style
from textual.theme import Theme

from manifold.shells.escapes import visible

TAB_CELLS = 8
Span = tuple[str, str]
Line = tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Palette:
    """Colours by what they mean."""

    name: str
    dark: bool
    ground: str
    panel: str  # bars and menus
    rule: str  # lines between regions
    select: str  # behind the selected row
    text: str
    dim: str
    faint: str
    accent: str
    ok: str
    warn: str
    bad: str
    other: str


DARK = Palette(
    "dark", True, "#10141b", "#181e28", "#2a3240", "#223350", "#cfd6e1", "#8490a2", "#4d586a",
    "#74b9ff", "#7bd99a", "#eac26b", "#ff7f78", "#c6a0f6",
)  # fmt: skip
LIGHT = Palette(
    "light", False, "#fcfcfa", "#eff0ec", "#d5d9d3", "#d8e6fa", "#1f252d", "#5f6a77", "#a4acb6",
    "#0b5fc0", "#14774a", "#8f5f00", "#bf2a2a", "#7438b8",
)  # fmt: skip
PALETTES = {palette.name: palette for palette in (DARK, LIGHT)}

_PLAIN = {
    "text": Style(), "dim": Style(dim=True), "faint": Style(dim=True), "accent": Style(bold=True),
    "ok": Style(), "warn": Style(bold=True), "bad": Style(bold=True, underline=True),
    "other": Style(), "select": Style(reverse=True), "match": Style(reverse=True),
    "tab": Style(reverse=True, bold=True), "key": Style(bold=True), "alarm": Style(reverse=True),
    "caution": Style(reverse=True), "head": Style(bold=True), "panel": Style(),
    "marked": Style(reverse=True),
}  # fmt: skip
_WEIGHTS = {
    "bold": Style(bold=True), "underline": Style(underline=True), "italic": Style(italic=True),
    "reverse": Style(reverse=True),
}  # fmt: skip


def _coloured(p: Palette) -> dict[str, Style]:
    found = {
        name: Style(color=getattr(p, name))
        for name in ("text", "dim", "faint", "accent", "ok", "warn", "bad", "other")
    }
    return found | {
        "select": Style(bgcolor=p.select), "panel": Style(bgcolor=p.panel),
        "match": Style(color=p.ground, bgcolor=p.warn), "marked": Style(bgcolor=p.rule),
        "tab": Style(color=p.ground, bgcolor=p.accent, bold=True),
        "key": Style(color=p.accent, bold=True), "head": Style(color=p.dim, bold=True),
        "alarm": Style(color=p.ground, bgcolor=p.bad, bold=True),
        "caution": Style(color=p.ground, bgcolor=p.warn, bold=True),
    }  # fmt: skip


class Look:
    """The named styles of one palette, or (None) of none."""

    def __init__(self, palette: Palette | None) -> None:
        self.palette = palette
        named = _coloured(palette) if palette is not None else dict(_PLAIN)
        self._styles = named | _WEIGHTS | {"": named["text"]}
        self.ground, self.panel = Style(), Style()
        if palette is not None:
            self.ground = Style(color=palette.text, bgcolor=palette.ground)
            self.panel = Style(color=palette.text, bgcolor=palette.panel)
        self._over: dict[tuple[Style, str], Style] = {}

    def style(self, name: str) -> Style:
        """A style by its name, or by several words of which the later ones win."""
        found = self._styles.get(name)
        if found is None:
            words = name.split()
            found = Style.combine([self._styles[word] for word in words])
            self._styles[name] = found
        return found

    def over(self, base: Style, name: str) -> Style:
        """A named style on a background; remembered, since every paint asks for few of them."""
        found = self._over.get((base, name))
        if found is None:
            found = self._over[base, name] = base + self.style(name)
        return found


def textual_theme(palette: Palette) -> Theme:
    """The palette for Textual's own widgets."""
    return Theme(
        name=f"manifold-{palette.name}", primary=palette.accent, secondary=palette.other,
        accent=palette.accent, warning=palette.warn, error=palette.bad, success=palette.ok,
        foreground=palette.text, background=palette.ground, surface=palette.ground,
        panel=palette.panel, dark=palette.dark,
        variables={
            "rule": palette.rule, "dim": palette.dim, "faint": palette.faint,
            "select": palette.select, "block-cursor-foreground": palette.ground,
            "block-cursor-background": palette.accent, "input-cursor-background": palette.accent,
            "input-cursor-foreground": palette.ground,
            "scrollbar": palette.rule, "scrollbar-hover": palette.faint,
            "scrollbar-active": palette.accent, "scrollbar-background": palette.ground,
            "scrollbar-background-hover": palette.ground,
            "scrollbar-background-active": palette.ground,
            "scrollbar-corner-color": palette.ground,
        },
    )  # fmt: skip


def plain(line: Line) -> str:
    """The text of a line."""
    return "".join(text for text, _ in line)


def harmless(line: Line) -> Line:
    """The line with nothing in it that a terminal obeys."""
    if all(text.isprintable() for text, _ in line):
        return line
    return tuple((visible(text.expandtabs(TAB_CELLS)), style) for text, style in line)


def wrapped(line: Line, width: int) -> list[Line]:
    """The line in rows of at most `width` characters, cut as a terminal does."""
    if width <= 0 or sum(len(text) for text, _ in line) <= width:
        return [line]
    rows: list[Line] = []
    row: list[Span] = []
    room = width
    for text, style in line:
        while text:
            row.append((text[:room], style))
            text, room = text[room:], room - min(room, len(text))
            if not room:
                rows.append(tuple(row))
                row, room = [], width
    return [*rows, tuple(row)] if row else rows
