"""Arrays of a kernel, when it runs as plain Python.

Interface: `array(float, 64)` is a list of 64 zeros; inside a kernel it is an array of the program.
"""

from __future__ import annotations

from typing import TypeVar

Number = TypeVar("Number", int, float, bool)


def array(kind: type[Number], length: int) -> list[Number]:
    """`length` zeros of type `kind`: int, float or bool."""
    return [kind(0)] * length
