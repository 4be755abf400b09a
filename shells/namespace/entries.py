"""Paths of the namespace and what a folder lists.

A path begins with `/`; parts are separated by `/`, and one at the end changes nothing. There is no
`.` and no `..`: a global may have such a name. What is a file and a folder at once (the globals `a`
and `a/b`) is listed as `a` and as `a/`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from manifold.kernel.errors import NotFound, Refused

Kind = Literal["folder", "file", "log"]
Parts = tuple[str, ...]

NEAR = 0.5  # how alike two names are, of 1, for one to be offered for the other


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in a folder; `summary` is a short line for people."""

    name: str
    kind: Kind
    summary: str


def parts_of(path: str) -> Parts:
    """`/nodes/rpi4-01/` is `("nodes", "rpi4-01")`."""
    if not path.startswith("/"):
        raise Refused(f"{path!r} is no path.", "Paths begin with a slash: `manifold ls /`.")
    return tuple(part for part in path.split("/") if part)


def path_of(parts: Iterable[str]) -> str:
    """The other way round; `/` of nothing."""
    return "/" + "/".join(parts)


def missing(parts: Parts, depth: int, names: Iterable[str]) -> NotFound:
    """Nothing is called `parts[depth]` in its folder, where `names` are."""
    folder = path_of(parts[:depth])
    listed = sorted({name.rstrip("/") for name in names})
    near = difflib.get_close_matches(parts[depth], listed, n=1, cutoff=NEAR)
    hint = f"Did you mean {path_of((*parts[:depth], near[0]))}? " if near else ""
    return NotFound(
        f"There is no {path_of(parts[: depth + 1])}.", f"{hint}`manifold ls {folder}` lists it."
    )


def is_folder(parts: Parts) -> Refused:
    """It was to be read."""
    where = path_of(parts)
    return Refused(f"{where} is a folder.", f"`manifold ls {where}` lists it.")


def is_file(parts: Parts) -> NotFound:
    """There is nothing beneath it."""
    where = path_of(parts)
    return NotFound(f"{where} is a file, not a folder.", f"`manifold cat {where}` prints it.")
