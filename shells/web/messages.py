"""What the page and the server say to each other over the websocket, beside the terminal's bytes.

Interface rules: the page sends JSON text that is one of `FromPage`; the server sends the bytes of
the terminal as binary messages and one of `ToPage` as JSON text. Each is an array whose first
element is the tag. Invariants: what does not decode ends the session.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

COLUMNS_MAX = 1000  # a 4K display holds 548 columns of 7 px
ROWS_MAX = 500  # and 180 rows of 12 px
KEYS_CHARS_MAX = 16_384  # of one message; the page sends what is pasted in such pieces

Columns = Annotated[int, msgspec.Meta(ge=1, le=COLUMNS_MAX)]
Rows = Annotated[int, msgspec.Meta(ge=1, le=ROWS_MAX)]


class Keys(msgspec.Struct, frozen=True, array_like=True, tag="web.keys"):
    """What was typed, pasted or done with the mouse, as a terminal says it."""

    text: Annotated[str, msgspec.Meta(max_length=KEYS_CHARS_MAX)]


class Resize(msgspec.Struct, frozen=True, array_like=True, tag="web.resize"):
    """The window holds this many cells."""

    columns: Columns
    rows: Rows


class Focus(msgspec.Struct, frozen=True, array_like=True, tag="web.focus"):
    """The window has got the keyboard, or lost it."""

    here: bool


class OpenUrl(msgspec.Struct, frozen=True, array_like=True, tag="web.open"):
    """The console wants an address opened; the page asks its user first."""

    url: str


class Download(msgspec.Struct, frozen=True, array_like=True, tag="web.download"):
    """A file is ready under `download/KEY`."""

    key: str


class Ended(msgspec.Struct, frozen=True, array_like=True, tag="web.ended"):
    """The session is over: a sentence, and the last words of the console where there are any."""

    reason: str
    last_words: str


FromPage = Keys | Resize | Focus
ToPage = OpenUrl | Download | Ended
