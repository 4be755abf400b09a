"""Values of globals and other registers in words: on a line, in a cell, in JSON.

Interface: `shown` reads back as what it is (`1` is an int, `"1"` text, `hex:00ff` bytes); `bare` is
the value alone, as `cat` prints it. Names are those people use: `x` of `/globals/x`.
"""

from __future__ import annotations

import json
import re
from typing import Any

from manifold.shells.escapes import visible_json
from manifold.shells.sdk.globals_calls import FOLDER, Reading, Value

INT = re.compile(r"[+-]?[0-9]+\Z")
FLOAT = re.compile(r"[+-]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][+-]?[0-9]+)?\Z")
HEX = "hex:"  # before bytes, shown
CELL_CHARS_MAX = 60


def type_of(value: Value | None) -> str | None:
    """What `--json` and `--type` call it."""
    names = {int: "int", float: "float", str: "text", bytes: "bytes"}
    return None if value is None else names[type(value)]


def shown(value: Value | None) -> str:
    """On one line, so that it reads back as what it is: text that looks like a number is quoted."""
    if value is None:
        return "absent"
    if isinstance(value, bytes):
        return HEX + value.hex()
    if not isinstance(value, str):
        return str(value)
    plain = value.isprintable() and value.strip() == value and bool(value)
    number = INT.match(value) or FLOAT.match(value)
    odd = not plain or value[0] == '"' or value.startswith(HEX) or number
    return visible_json(json.dumps(value, ensure_ascii=False)) if odd else value


def reading_dict(key: str, reading: Reading) -> dict[str, Any]:
    """For `--json`: bytes in hexadecimal, null where there is nothing."""
    value = reading.value
    return {
        "name": short_name(key),
        "value": value.hex() if isinstance(value, bytes) else value,
        "type": type_of(value),
        "version": reading.version,
        "strength": reading.strength,
    }


def short_name(key: str) -> str:
    """As people name it: a global by its name, anything else by its path."""
    return key.removeprefix(FOLDER) if key.startswith(FOLDER) else f"/{key}"


def line(name: str, reading: Reading) -> str:
    """`x = 1  (version 3, quorum)`"""
    if reading.value is None:
        return f"{name} is absent  ({reading.strength})"
    return f"{name} = {shown(reading.value)}  (version {reading.version}, {reading.strength})"


def cell(text: str) -> str:
    """Cut to the width of a column."""
    return text if len(text) <= CELL_CHARS_MAX else text[: CELL_CHARS_MAX - 1] + "…"


def plain(value: Value | None) -> int | float | str | None:
    """For JSON: bytes in hexadecimal."""
    return value.hex() if isinstance(value, bytes) else value


def bare(value: Value | None) -> str:
    """The value alone."""
    return value if isinstance(value, str) else shown(value)
