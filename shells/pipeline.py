"""A line of the console in words: `ls /jobs | grep running | head -n 3`.

Interface: `parse(line)` gives the words of each stage. Quoting is that of POSIX shells: `'…'` as it
is, `"…"` with `\\` before `"`, `\\`, `$` and a backtick, `\\` before any character outside of both.
Nothing is expanded. Pure. Errors (`BadLine`) say what to write instead.
Invariant: P1 what `shlex.join` quotes, and stages of it with ` | ` between, reads back as it was.
Source: POSIX.1-2017, Shell Command Language, 2.2 Quoting.
"""

from __future__ import annotations

from manifold.kernel.errors import ManifoldError

LINE_CHARS_MAX = 64 << 10  # what a person pastes at most; a page of a terminal has 2 KiB
BLANKS = " \t\r\n"
ESCAPED = '"\\$`'  # what a backslash takes its meaning from within double quotes
INSTEAD = {
    ">": "Results are saved with `export TABLE -o FILE`.",
    "<": "Filters read what stands before a `|`.",
    "&": "Submit work that goes on by itself with `run --detach`.",
    ";": "Enter one line after the other.",
}


class BadLine(ManifoldError):
    """It cannot be read as a pipeline."""

    code = "usage"
    exit_code = 2


def parse(line: str) -> list[list[str]]:
    """Words of each stage; nothing of a blank line."""
    if len(line) > LINE_CHARS_MAX:
        raise BadLine(
            f"The line has {len(line):,} characters, of at most {LINE_CHARS_MAX:,}.",
            "Put long arguments in a file.",
        )
    stages = _Reader(line).stages()
    if stages == [[]]:
        return []
    for at, words in enumerate(stages):
        if not words:
            where = "before the first" if at == 0 else "after a"
            raise BadLine(f"There is no command {where} `|`.", "Write one, or leave the `|` out.")
    return stages


class _Reader:
    """One pass over a line."""

    def __init__(self, line: str) -> None:
        self._line = line
        self._at = 0

    def stages(self) -> list[list[str]]:
        """Empty ones included."""
        found: list[list[str]] = [[]]
        word: str | None = None  # None: between words; "" is a word, such as ''
        while self._at < len(self._line):
            char = self._line[self._at]
            self._at += 1
            if char in BLANKS or char == "|":
                if word is not None:
                    found[-1].append(word)
                word = None
                if char == "|":
                    found.append([])
            elif char in INSTEAD:
                raise BadLine(
                    f"`{char}` means nothing here (character {self._at}).",
                    f"{INSTEAD[char]} To mean the character, quote it: '{char}'.",
                )
            else:
                word = (word or "") + self._part(char)
        if word is not None:
            found[-1].append(word)
        return found

    def _part(self, char: str) -> str:
        """What a character, with what belongs to it, stands for."""
        if char == "'":
            end = self._line.find("'", self._at)
            if end < 0:
                raise _unfinished("'", self._at)
            part, self._at = self._line[self._at : end], end + 1
            return part
        if char == '"':
            return self._double()
        if char == "\\":
            if self._at == len(self._line):
                raise BadLine(
                    "The line ends with a backslash.", "Write `\\\\` to mean one, or leave it out."
                )
            self._at += 1
            return self._line[self._at - 1]
        return char

    def _double(self) -> str:
        begun, part = self._at, ""
        while self._at < len(self._line):
            char = self._line[self._at]
            self._at += 1
            if char == '"':
                return part
            if char == "\\" and self._line[self._at : self._at + 1] in tuple(ESCAPED):
                char = self._line[self._at]
                self._at += 1
            part += char
        raise _unfinished('"', begun)


def _unfinished(quote: str, position: int) -> BadLine:
    return BadLine(
        f"The {quote} at character {position} has no second one.",
        f"Close it, or write \\{quote} to mean the character.",
    )
