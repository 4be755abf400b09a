"""Trees whose names are data: registers of Nexus by their keys, and plain values such as a host's.

Interface: a mount lists and reads what lies beneath it, by the parts after its own path. `entries`
gives None where there is no such folder, `value` raises `KeyError` where there is no such file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from manifold.kernel.errors import Refused
from manifold.kernel.nexus.messages import KEY_CHARS_MAX
from manifold.shells.namespace.entries import Entry, Parts, path_of
from manifold.shells.namespace.source import Source
from manifold.shells.namespace.values import cell, shown, type_of
from manifold.shells.sdk.globals_calls import FOLDER, NAME_RULE, Reading


class RegisterTree:
    """Registers whose keys begin with `prefix`."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def key(self, rest: Parts) -> str:
        """Of the register at a path; what is too long for one is refused here."""
        key = self.prefix + "/".join(rest)
        if len(key) > KEY_CHARS_MAX:
            rule = f"The key of a register has at most {KEY_CHARS_MAX} characters."
            raise Refused(
                f"The name {path_of(rest)[1:81]}… is too long.",
                NAME_RULE if self.prefix == FOLDER else rule,
            )
        return key

    def entries(self, source: Source, outer: Parts, rest: Parts) -> list[Entry] | None:
        """Registers and folders of them."""
        prefix = self.key((*rest, ""))
        found: dict[str, Entry] = {}
        folders: dict[str, int] = {}
        for key, reading in source.readings(prefix):
            name, deeper, _ = key.removeprefix(prefix).partition("/")
            if deeper:
                folders[name] = folders.get(name, 0) + 1
            else:
                found[name] = Entry(name, "file", _said(reading))
        for name, count in folders.items():
            both = name in found  # a register may be called as a folder of others
            summary = f"{count} register{'s' * (count > 1)}"
            found[name + "/" * both] = Entry(name + "/" * both, "folder", summary)
        if not found and rest:
            return None
        return [found[name] for name in sorted(found)]

    def names(self, source: Source, outer: Parts, rest: Parts, begin: str) -> list[str]:
        """For completion: nothing is read; folders end in a slash."""
        prefix = self.key((*rest, ""))
        cut = [key.removeprefix(prefix) for key in source.keys(self.key((*rest, begin)))]
        return list(dict.fromkeys(k.partition("/")[0] + "/" * ("/" in k) for k in cut))

    def value(self, source: Source, outer: Parts, rest: Parts) -> Reading:
        """What a register holds."""
        reading = source.reading(self.key(rest))
        if reading.value is None:
            raise KeyError(self.key(rest))
        return reading


def _said(reading: Reading) -> str:
    return f"{cell(shown(reading.value))}  ({type_of(reading.value)}, version {reading.version})"


class ValueTree:
    """A plain value: its dicts and its lists of them are folders, the rest files."""

    def __init__(self, read: Callable[[Source, Parts], Any]) -> None:
        self._read = read

    def entries(self, source: Source, outer: Parts, rest: Parts) -> list[Entry] | None:
        """Keys, and numbers of what is in a list."""
        value = self._at(self._read(source, outer), rest)
        if not _is_folder(value):
            return None
        return [
            Entry(name, "folder", f"{len(each)} values")
            if _is_folder(each)
            else Entry(name, "file", cell(_text(each)))
            for name, each in _inside(value).items()
        ]

    def names(self, source: Source, outer: Parts, rest: Parts, begin: str) -> list[str]:
        """For completion."""
        found = self.entries(source, outer, rest) or []
        return [each.name + "/" * (each.kind == "folder") for each in found]

    def value(self, source: Source, outer: Parts, rest: Parts) -> Any:
        """What is there, and no folder."""
        value = self._at(self._read(source, outer), rest)
        if _is_folder(value):
            raise KeyError("/".join(rest))
        return value

    def _at(self, value: Any, rest: Parts) -> Any:
        for part in rest:
            value = _inside(value).get(part, _Nothing) if _is_folder(value) else _Nothing
        if value is _Nothing:
            raise KeyError("/".join(rest))
        return value


class _Nothing:
    """Stands for what is not there: null is a value."""


def _is_folder(value: Any) -> bool:
    return isinstance(value, dict) or (
        isinstance(value, list) and any(isinstance(each, dict) for each in value)
    )


def _inside(value: Any) -> dict[str, Any]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return {str(key): each for key, each in pairs}


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


Mount = RegisterTree | ValueTree
