"""How a value of the configuration is written: a number and its unit, once.

Interface: `parse` reads one value as text and raises `WrongValue` with the reason; `show` writes a
value the way `parse` reads it. Values of time, size and rate always carry a unit (`20ms`,
`512MiB`, `1Gbit/s`); a count, a weight or a share is a plain number.
Invariants: U1 `parse(show(value)) == value` for every value that has a written form of at most
`VALUE_CHARS_MAX` characters. U2 nothing but `WrongValue` leaves `parse`.
"""

from __future__ import annotations

import re

Value = int | float | bool | str

VALUE_CHARS_MAX = 64  # a cluster name has 32, a number with its unit fewer than 30

# Units of each dimension, in terms of the base unit that the dataclasses hold.
SCALES: dict[str, dict[str, float]] = {
    "ms": {"us": 1e-3, "ms": 1, "s": 1e3, "min": 6e4, "h": 3.6e6, "d": 8.64e7},
    "bytes": {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40},
    "bit/s": {"bit/s": 1, "kbit/s": 1e3, "Mbit/s": 1e6, "Gbit/s": 1e9, "Tbit/s": 1e12},
}
DIMENSIONS = {"ms": "time", "bytes": "size", "bit/s": "rate"}
EXAMPLES = {"ms": "20ms or 1s", "bytes": "512MiB or 2GiB", "bit/s": "100Mbit/s or 1Gbit/s"}

# Leading zeros are refused: YAML 1.1 reads 010 as eight, people as ten.
_NUMBER = r"[+-]?(?:0|[1-9][0-9]*(?:_[0-9]{3})*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,3})?"
_PLAIN = re.compile(_NUMBER + r"\Z")
_WITH_UNIT = re.compile(rf"({_NUMBER}) ?([A-Za-z][A-Za-z/]*)\Z")


class WrongValue(ValueError):
    """The text is not a value of the kind that is wanted; the argument says why."""


def parse(text: str, kind: str, unit: str, chars_max: int = VALUE_CHARS_MAX) -> Value:
    """The value of `text`; `kind` is int, float, bool or str, `unit` a key of `SCALES` or other."""
    if len(text) > chars_max:
        raise WrongValue(f"is longer than {chars_max} characters")
    if kind == "str":
        return text
    if kind == "bool":
        return _boolean(text)
    number = _scaled(text, unit) if unit in SCALES else _plain(text)
    if kind == "float":
        return float(number)
    if number != number or abs(number) == float("inf") or number != int(number):
        raise WrongValue(f"is {text!r}; a whole number{_of(unit)} is wanted")
    return int(number)


def show(value: Value, unit: str) -> str:
    """`value` as it is written in manifold.yaml, in the largest unit that keeps it whole."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return value
    if unit not in SCALES:
        return _digits(value)
    base = next(name for name, scale in SCALES[unit].items() if scale == 1)
    best = _digits(value) + base
    for name, scale in SCALES[unit].items():
        count = value / scale
        if 1 <= count < 1e15 and count == int(count) and _times(count, scale) == value:
            best = f"{int(count)}{name}"
    return best


def unit_name(unit: str) -> str:
    """What to call the unit in a table: the dimension where values carry a unit."""
    return DIMENSIONS.get(unit, unit)


def _boolean(text: str) -> bool:
    if text not in ("true", "false"):
        raise WrongValue(f"is {text!r}; true or false is wanted")
    return text == "true"


def _plain(text: str) -> int | float:
    if not _PLAIN.match(text):
        raise WrongValue(f"is {text!r}; a plain number is wanted")
    return int(text) if text.lstrip("+-").replace("_", "").isdigit() else float(text)


def _scaled(text: str, unit: str) -> float:
    scales = SCALES[unit]
    wanted = f"a {DIMENSIONS[unit]} such as {EXAMPLES[unit]} is wanted"
    if _PLAIN.match(text):
        raise WrongValue(f"is {text!r} without a unit; {wanted}")
    match = _WITH_UNIT.match(text)
    if not match:
        raise WrongValue(f"is {text!r}; {wanted}")
    number, name = match.groups()
    if name not in scales:
        near = _nearest_unit(name, unit)
        raise WrongValue(f"has the unit {name!r}; {wanted} (units: {', '.join(scales)}){near}")
    return _times(float(number.replace("_", "")), scales[name])


def _nearest_unit(name: str, unit: str) -> str:
    """`MB` and `gb` are what people write for MiB and GiB; the rest is for the list to tell."""
    folded = {known.lower(): known for known in SCALES[unit]}
    if unit == "bytes":
        folded |= {known.lower().replace("ib", "b"): known for known in SCALES[unit]}
    if unit == "bit/s":
        folded |= {known.lower().replace("it/s", "ps"): known for known in SCALES[unit]}
    if unit == "ms":
        folded |= {"sec": "s", "secs": "s", "second": "s", "seconds": "s", "m": "min", "usec": "us"}
    near = folded.get(name.lower())
    return f"; did you mean {near}?" if near else ""


def _times(number: float, scale: float) -> float:
    # Dividing by 1000 rounds once, multiplying by 0.001 twice: 3us must be the 0.003 of the field.
    return number * scale if scale >= 1 else number / round(1 / scale)


def _digits(value: int | float) -> str:
    if isinstance(value, float) and abs(value) < 1e15 and value == int(value):
        value = int(value)
    return repr(value)


def _of(unit: str) -> str:
    return f" of {unit}" if unit else ""
