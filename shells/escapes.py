"""Text of others as a terminal may show it: nothing in it moves, colours, writes or reorders.

Names of jobs and files, values, log lines and messages come from other people. A terminal obeys
the control characters in them (OSC 52 writes its clipboard), and overrides of direction make a
name look like another one. They become visible: `\\x1b`, `\\u202e`.

Interface: `visible` is for one line, `visible_text` keeps newlines and tabs, `visible_json` keeps
JSON what it is. Text without such characters is returned as it is. Pure.
Invariant: E1 what is returned has no character of Unicode's classes Cc and Cs (but, of text and
JSON, newlines and tabs), and no override, embedding or isolate of direction.
Source: ECMA-48 (control functions, C1 included); UAX #9, section 2 (directional formatting).
"""

from __future__ import annotations

import re

_OBEYED = "\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff"  # beside C0
_OF_A_LINE = re.compile(f"[\x00-\x1f{_OBEYED}]")
_OF_TEXT = re.compile(f"[\x00-\x08\x0b-\x1f{_OBEYED}]")


def visible(text: str) -> str:
    """On one line."""
    return text if text.isprintable() else _OF_A_LINE.sub(_escaped, text)


def visible_text(text: str) -> str:
    """Of several lines."""
    return text if text.isprintable() else _OF_TEXT.sub(_escaped, text)


def visible_json(text: str) -> str:
    """JSON that says the same: within its strings, the only place for them, `\\u001b`."""
    return text if text.isprintable() else _OF_TEXT.sub(lambda c: f"\\u{ord(c[0]):04x}", text)


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
