"""KIDs: names of values. `K-` and 32 hex digits, the first 128 bits of a BLAKE3.

One type for everything that has a KID: nodes (the hash of their public key), programs (of their
canonical IR), jobs, processes. Source: the mission's rows C3 and design of Keg.
"""

from __future__ import annotations

import re
from typing import NewType

import blake3

Kid = NewType("Kid", str)

KID_HEX_DIGITS = 32
SHORT_HEX_DIGITS = 8
_PATTERN = re.compile(r"K-[0-9a-f]{32}\Z")


def kid_of(data: bytes) -> Kid:
    """The KID of `data`."""
    return Kid("K-" + blake3.blake3(data).hexdigest()[:KID_HEX_DIGITS])


def is_kid(text: str) -> bool:
    """Whether `text` is a whole, well-formed KID."""
    return _PATTERN.match(text) is not None


def short(kid: Kid) -> str:
    """The display form, `K-` and 8 digits; not a name to look things up by."""
    return kid[: 2 + SHORT_HEX_DIGITS]
