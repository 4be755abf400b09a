"""What a program writes to a terminal, as lines of styled text; pure.

Understands what verbs print: colours and weights (SGR), carriage return, backspace, tab, erase in
line, erase the screen. Anything else that a terminal is told is left out, never shown: the
eight-bit control characters (C1) as well.
"""

from __future__ import annotations

import itertools
import operator
import re

from manifold.shells.console.theme import Line, Span

LINE_CELLS_MAX = 4_000  # of one line, as much as a log's line holds twice over
HELD_MAX = 64  # characters of an escape sequence that has not ended; then it is none
TAB = 8

_TOKENS = re.compile(
    r"\x1b\[([0-9;?]*)([@-~])|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[@-Z\\^_=>()][AB0]?"
    r"|[\x00-\x1f\x7f-\x9f]|[^\x00-\x1f\x7f-\x9f]+"
)
_UNFINISHED = re.compile(r"\x1b(?:\[[0-9;?]*|\][^\x07\x1b]*\x1b?)?$")
_COLOURS = ("text", "bad", "ok", "warn", "accent", "other", "accent", "text")


class Terminal:
    """`feed` returns the lines that have ended; `current` is the one that has not."""

    def __init__(self) -> None:
        self._spans: list[
            Span
        ] = []  # the line so far; of single characters once it is written over
        self._length = 0
        self._column = 0
        self._colour = ""
        self._weights: tuple[str, ...] = ()
        self._held = ""
        self.cleared = False  # the screen was erased since this was last looked at

    @property
    def current(self) -> Line:
        """The line that has not ended, as it stands."""
        return _joined(self._spans)

    @property
    def _style(self) -> str:
        return " ".join((self._colour, *self._weights)).strip()

    def feed(self, text: str) -> list[Line]:
        """Take what was written; the lines that it ended."""
        text = self._held + text
        unfinished = _UNFINISHED.search(text)
        cut = unfinished.start() if unfinished and len(unfinished[0]) < HELD_MAX else len(text)
        text, self._held = text[:cut], text[cut:]
        ended: list[Line] = []
        for token in _TOKENS.finditer(text):
            word = token[0]
            if word == "\n":
                ended.append(self.current)
                self._spans, self._length, self._column = [], 0, 0
            elif word == "\r":
                self._column = 0
            elif word == "\b":
                self._column = max(0, self._column - 1)
            elif word == "\t":
                self._write(" " * (TAB - self._column % TAB))
            elif token[2] is not None:
                self._control(token[1], token[2], ended)
            elif word >= " " and not "\x7f" <= word[0] <= "\x9f":
                self._write(word)
        return ended

    def _write(self, text: str) -> None:
        text = text[: LINE_CELLS_MAX - self._column]
        if self._column > self._length:
            self._spans.append((" " * (self._column - self._length), ""))
            self._length = self._column
        if self._column == self._length:  # as nearly always: nothing is written over
            self._spans.append((text, self._style))
        else:
            self._split()
            style = self._style
            self._spans[self._column : self._column + len(text)] = [(c, style) for c in text]
        self._column += len(text)
        self._length = max(self._length, self._column)

    def _split(self) -> None:
        self._spans = [(each, style) for text, style in self._spans for each in text]

    def _cut(self, length: int) -> None:
        self._split()
        del self._spans[length:]
        self._length = len(self._spans)

    def _control(self, arguments: str, what: str, ended: list[Line]) -> None:
        if what == "m":
            self._render(arguments)
        elif what == "K":
            if arguments in ("", "0"):
                self._cut(self._column)
            elif arguments == "2":
                self._cut(0)
        elif what == "J" and arguments in ("2", "3"):
            self._cut(0)
            self.cleared = True
            ended.clear()
        elif what in "CG" and (not arguments or arguments.isdigit()):
            count = min(int(arguments or 1), LINE_CELLS_MAX)
            self._column = self._column + count if what == "C" else count - 1

    def _render(self, arguments: str) -> None:
        codes = iter([int(code) for code in arguments.split(";") if code.isdigit()] or [0])
        for code in codes:
            if code == 0:
                self._colour, self._weights = "", ()
            elif code in (1, 3, 4, 7):
                word = {1: "bold", 3: "italic", 4: "underline", 7: "reverse"}[code]
                self._weights = (*(w for w in self._weights if w != word), word)
            elif code == 2:
                self._colour = "dim"
            elif code == 22:
                self._weights = tuple(w for w in self._weights if w != "bold")
                self._colour = "" if self._colour == "dim" else self._colour
            elif code in (23, 24, 27):
                word = {23: "italic", 24: "underline", 27: "reverse"}[code]
                self._weights = tuple(w for w in self._weights if w != word)
            elif 30 <= code <= 37 or 90 <= code <= 97:
                self._colour = "dim" if code == 90 else _COLOURS[code % 10]
            elif code in (38, 48):  # 256 colours and true colour are not of our palette
                for _ in range(1 if next(codes, 0) == 5 else 3):
                    next(codes, 0)
            elif code == 39:
                self._colour = ""


def _joined(spans: list[Span]) -> Line:
    """Neighbours of one style as one."""
    found: list[Span] = []
    for style, group in itertools.groupby(spans, key=operator.itemgetter(1)):
        text = "".join(text for text, _ in group)
        if text:
            found.append((text, style))
    return tuple(found)


def lines_of(text: str) -> list[Line]:
    """The lines of a whole text."""
    terminal = Terminal()
    found = terminal.feed(text)
    return [*found, terminal.current] if terminal.current else found
