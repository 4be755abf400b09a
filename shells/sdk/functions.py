"""Python functions as they travel: their code, and what of it can be used again.

Interface rules: `Functions.code` pickles a function in the thread that submits it, so that what it
captured is taken as it is then. Pickling by value takes a tenth of a millisecond; it is done again
only where something that the function reads may have changed.
Invariants: F1 the code of a function is used again only if every global, default and closed-over
value it reads is the same immutable one, or a function of which the same holds.
"""

from __future__ import annotations

import functools
import sys
import threading
import types
import weakref
from dataclasses import dataclass
from typing import Any

from manifold.kernel.tasks.parcel import by_value, encoded, pack
from manifold.vm.kid import Kid, kid_of

NAME_CHARS_MAX = 100
STAMPS_MAX = 64  # values one function may read and still be stamped
_SCALARS = (int, str, bytes, bool, type(None))


@dataclass(frozen=True, slots=True, eq=False)
class Code:
    """A function as a job's program."""

    kid: Kid
    data: bytes
    name: str


class _Same:
    """Equal to another only if it holds the same object."""

    __slots__ = ("held",)

    def __init__(self, held: Any) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.held is other.held

    __hash__ = None  # type: ignore[assignment]


class _Mutable(Exception):
    """Something the function reads may change without anybody's notice."""


class Functions:
    """See the module. `folder` is where large functions go."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._known: weakref.WeakKeyDictionary[Any, tuple[Any, Code]] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def code(self, function: Any) -> Code:
        """Its code; raises what pickling it raises."""
        if not isinstance(function, (types.FunctionType, types.BuiltinFunctionType)):
            return self._packed(function)
        stamp = stamp_of(function)
        if stamp is None:
            return self._packed(function)
        with self._lock:
            known = self._known.get(function)
        if known is not None and known[0] == stamp:
            return known[1]
        code = self._packed(function)
        with self._lock:
            self._known[function] = (stamp, code)
        return code

    def _packed(self, function: Any) -> Code:
        data = encoded(pack(function, self._folder))
        return Code(kid_of(data), data, name_of(function))


def name_of(function: Any) -> str:
    """What to call a function in tables."""
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    return str(name)[:NAME_CHARS_MAX].encode(errors="replace").decode()


def stamp_of(function: Any) -> Any:
    """What a function's pickle depends on, or None where that cannot be told."""
    try:
        return _stamp(function, [], [])
    except _Mutable:
        return None


def _stamp(value: Any, seen: list[Any], count: list[None]) -> Any:
    count.append(None)
    if len(count) > STAMPS_MAX:
        raise _Mutable
    if isinstance(value, (float, complex)):
        return repr(value)  # 0.0 and -0.0 are equal, and not the same
    if isinstance(value, _SCALARS):
        return (type(value), value)
    if isinstance(value, types.ModuleType):
        if value.__name__ not in sys.modules or by_value(value.__name__):
            raise _Mutable
        return _Same(value)
    if _importable(value):
        return (value.__module__, value.__qualname__)
    if isinstance(value, tuple):
        return tuple(_stamp(each, seen, count) for each in value)
    if not isinstance(value, types.FunctionType):
        raise _Mutable
    for place, each in enumerate(seen):
        if value is each:
            return place
    seen.append(value)
    if value.__dict__ or value.__kwdefaults__:
        raise _Mutable
    try:
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
    except ValueError:  # a cell that is not filled yet
        raise _Mutable from None
    read = [value.__globals__[n] for n in _names(value.__code__) if n in value.__globals__]
    held = [_stamp(each, seen, count) for each in (*(value.__defaults__ or ()), *cells, *read)]
    return (_Same(value.__code__), held)


def _importable(value: Any) -> bool:
    """Whether it is pickled by its name alone."""
    if not isinstance(value, (types.FunctionType, types.BuiltinFunctionType, type)):
        return False
    module = getattr(value, "__module__", None)
    name = getattr(value, "__qualname__", "")
    if not module or module == "__main__" or "<locals>" in name:
        return False
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is value and not by_value(module)


@functools.lru_cache(1024)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """Names that a function, or one within it, looks up among globals (or attributes)."""
    names = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.update(dict.fromkeys(_names(constant)))
    return tuple(names)
