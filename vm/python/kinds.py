"""Types of a kernel's values, and what one kernel knows of another.

A type is a string with a letter for each value: `i` int, `f` float, `b` bool, `?` not known yet.
One letter is a number, several are a tuple. `Checked` is what the checker hands to the code writer.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from manifold.vm.python.constants import Number
from manifold.vm.python.source import Source
from manifold.vm.syntax.program import Program

NAMES = {"i": "int", "f": "float", "b": "bool"}
LETTERS = {name: letter for letter, name in NAMES.items()}


class ArrayType(NamedTuple):
    """A local array."""

    letter: str
    length: int


class KernelBase:
    """A kernel, as far as other kernels see it."""

    checked: Checked

    @property
    def program(self) -> Program:
        """What runs over a range."""
        raise AssertionError("a Kernel has its own")


Callee = str | KernelBase  # a built-in function by its name, or a kernel; SELF is recursion
SELF = "itself"


@dataclass(slots=True)
class Checked:
    """A function of the subset. Nodes are keys by identity."""

    source: Source
    wrap: bool
    parameters: dict[str, str]  # name -> letter
    leaves: str = "?"  # the letters of its result
    variables: dict[str, str] = field(default_factory=dict)  # parameters too
    arrays: dict[str, ArrayType] = field(default_factory=dict)
    types: dict[ast.AST, str] = field(default_factory=dict)
    constants: Mapping[ast.AST, Number] = field(default_factory=dict)
    calls: dict[ast.Call, Callee] = field(default_factory=dict)
    globals: dict[str, str] = field(default_factory=dict)  # name -> letter; of called kernels too
    touched: dict[ast.AST, str] = field(default_factory=dict)  # what is a global, and its name
    counters: frozenset[str] = frozenset()  # see writing.py
    looped: frozenset[str] = frozenset()  # assigned by nothing but `for`
    recursive: bool = False

    @property
    def name(self) -> str:
        return self.source.function.__name__


def word(letters: str) -> str:
    """A type as its reader writes it."""
    each = [NAMES.get(letter, "number") for letter in letters]
    return each[0] if len(each) == 1 else f"tuple[{', '.join(each)}]"


def an(letters: str) -> str:
    """The same with its article."""
    return f"an {word(letters)}" if letters == "i" else f"a {word(letters)}"


def joined(left: str, right: str) -> str | None:
    """The type of what is `left` in one place and `right` in another; None if there is none."""
    if "?" in (left, right):
        return left if right == "?" else right
    if len(left) != len(right):
        return None
    if len(left) > 1:
        each = [joined(a, b) for a, b in zip(left, right, strict=True)]
        return None if None in each else "".join(part or "" for part in each)
    if left == right:
        return left
    return "i" if {left, right} == {"i", "b"} else None


def fits(given: str, wanted: str) -> bool:
    """Whether a value of one type may stand where another is wanted: a bool is an int."""
    return "?" in given or given == wanted or (given, wanted) == ("b", "i")


def letter_of(value: Number) -> str:
    if isinstance(value, bool):
        return "b"
    return "i" if isinstance(value, int) else "f"
