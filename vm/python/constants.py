"""What is known when a kernel is decorated: numbers, names of the module, and their sums.

Interface: `Constants(source, local)`; `constant(node)` is the number that an expression always has,
or None. Names are looked up once, at decoration: a later assignment in the module has no effect.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from types import ModuleType
from typing import Any

from manifold.vm.python.source import MISSING, Source

Number = int | float  # a bool is an int

CONSTANT_BITS_MAX = 4096  # of an int while it is computed; what is left must fit in 64 bits

_FOLD: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
}
_FOLD_ONE: dict[type[ast.AST], Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Invert: operator.invert,
}


def plain(value: Any) -> Number | None:
    """A number as exactly a bool, an int or a float; None for anything else."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    return float(value) if isinstance(value, float) else None


class Constants:
    """The constants of one function; `local` are the names that it assigns."""

    def __init__(self, source: Source, local: set[str]) -> None:
        self.source, self.local = source, local
        self.known: dict[ast.AST, Number | None] = {}

    def constant(self, node: ast.AST) -> Number | None:
        if node not in self.known:
            self.known[node] = self._find(node)
        return self.known[node]

    def whole(self, node: ast.AST) -> int | None:
        """The same, if it is an int."""
        value = self.constant(node)
        return value if isinstance(value, int) else None

    def object_of(self, node: ast.AST) -> Any:
        """What a name, or an attribute of a module, stands for; MISSING if it is neither."""
        if isinstance(node, ast.Name):
            return MISSING if node.id in self.local else self.source.resolve(node.id)
        if isinstance(node, ast.Attribute):
            module = self.object_of(node.value)
            if isinstance(module, ModuleType):
                return getattr(module, node.attr, MISSING)
        return MISSING

    def _find(self, node: ast.AST) -> Number | None:
        match node:
            case ast.Constant():
                return plain(node.value)
            case ast.Name() | ast.Attribute():
                return plain(self.object_of(node))
            case ast.UnaryOp(op, operand):
                value, one = self.constant(operand), _FOLD_ONE.get(type(op))
                if value is None or one is None or (isinstance(value, float) and one is _INVERT):
                    return None
                return plain(one(value))
            case ast.BinOp(left, op, right):
                first, second = self.constant(left), self.constant(right)
                if first is None or second is None:
                    return None
                return _fold(type(op), first, second)
        return None


_INVERT = operator.invert


def _fold(kind: type[ast.AST], left: Number, right: Number) -> Number | None:
    """`left op right` as Python computes it; None where that fails or is not exact everywhere."""
    fold = _FOLD.get(kind)
    if fold is None:
        return None
    if kind is ast.Pow and not _is_small_power(left, right):
        return None
    if kind is ast.LShift and not (isinstance(right, int) and 0 <= right <= CONSTANT_BITS_MAX):
        return None
    try:
        value = plain(fold(left, right))
    except (ArithmeticError, TypeError, ValueError):
        return None  # it fails when it runs, or is refused for its types
    if isinstance(value, int) and value.bit_length() > CONSTANT_BITS_MAX:
        return None
    return value


def _is_small_power(base: Number, exponent: Number) -> bool:
    if not isinstance(base, int) or not isinstance(exponent, int) or exponent < 0:
        return False
    return base.bit_length() * exponent <= CONSTANT_BITS_MAX
