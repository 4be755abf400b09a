"""`manifold.globals` in a kernel, and in this process where a kernel runs compiled.

Interface: `Registers(source, constants)` tells globals from everything else in a syntax tree:
`name_of(node)` is the global that `manifold.globals.counter` or `manifold.globals["counter"]` is,
`call_of(node)` which of `CALLS` a function is. `connected()` is the provider of a compiled kernel:
the SDK's object `manifold.globals`, which plain Python calls too.
How it is recognized: as the attribute `globals` of the module `manifold`, or as the object that is
there, whatever it is called here. This package imports nothing of the SDK.
"""

from __future__ import annotations

import ast
import sys
from types import ModuleType
from typing import Any

from manifold.vm.errors import ManifoldError, Trap
from manifold.vm.python.constants import Constants
from manifold.vm.python.kinds import KernelBase
from manifold.vm.python.source import MISSING, Source
from manifold.vm.runtime.globals import Globals
from manifold.vm.syntax.program import GLOBAL_LENGTH_MAX, GLOBAL_NAME, GLOBALS_FOLDER, Type

CALLS = {"add": "globals.add", "propose": "globals.propose"}
PACKAGE = "manifold"
Value = int | float


class Registers:
    """See the module."""

    def __init__(self, source: Source, constants: Constants) -> None:
        self.source, self.constants = source, constants

    def is_globals(self, node: ast.AST) -> bool:
        """Whether it is `manifold.globals`."""
        if isinstance(node, ast.Attribute) and node.attr == "globals":
            module = self.constants.object_of(node.value)
            return isinstance(module, ModuleType) and module.__name__ == PACKAGE
        if not isinstance(node, ast.Name):
            return False
        found = self.constants.object_of(node)
        if found is MISSING or isinstance(found, (int, float, ModuleType, KernelBase)):
            return False
        return found is _object()

    def name_of(self, node: ast.AST) -> str | None:
        """The global that is read or written here, if one is."""
        if isinstance(node, ast.Attribute) and self.is_globals(node.value):
            if node.attr in CALLS or node.attr[0] == "_" or hasattr(type(_object()), node.attr):
                raise self.source.refuse(
                    node,
                    f"manifold.globals.{node.attr} is something else in plain Python.",
                    f'A global of that name is manifold.globals["{node.attr}"].',
                )
            return self.spelled(node, node.attr)
        if isinstance(node, ast.Subscript) and self.is_globals(node.value):
            return self.named(node.slice)
        return None

    def named(self, node: ast.AST) -> str:
        """The name in quotes."""
        value = node.value if isinstance(node, ast.Constant) else None
        if not isinstance(value, str):
            raise self.source.refuse(
                node,
                "which global it is must be known when the kernel is decorated.",
                'Write its name: manifold.globals["counter"].',
            )
        return self.spelled(node, value)

    def spelled(self, node: ast.AST, value: str) -> str:
        name = value.removeprefix(GLOBALS_FOLDER)
        if not GLOBAL_NAME.match(name) or len(name) > GLOBAL_LENGTH_MAX:
            raise self.source.refuse(
                node,
                f"{value!r} is not a name for a global.",
                f"Use letters, digits, _ . - and / between them, at most {GLOBAL_LENGTH_MAX}.",
            )
        return name

    def call_of(self, node: ast.AST) -> str | None:
        """Which of `CALLS` the function of a call is."""
        if not isinstance(node, ast.Attribute) or not self.is_globals(node.value):
            return None
        if node.attr not in CALLS:
            raise self.source.refuse(
                node,
                f"globals have no function {node.attr} in a kernel.",
                'Call add("name", amount) or propose("name", expected, new).',
            )
        return CALLS[node.attr]

    def are_in(self, node: ast.AST) -> bool:
        """Whether computing it touches a global, so that twice is not once."""
        for each in ast.walk(node):
            if isinstance(each, (ast.Attribute, ast.Subscript)) and self.is_globals(each.value):
                return True
            if isinstance(each, ast.Call):
                callee = self.constants.object_of(each.func)
                if isinstance(callee, KernelBase) and callee.checked.globals:
                    return True
        return False


def _object() -> Any:
    """The SDK's `manifold.globals`; MISSING where there is none."""
    return getattr(sys.modules.get(PACKAGE), "globals", MISSING)


def connected() -> Globals | None:
    """The globals of the cluster that this process is connected to."""
    found = _object()
    return None if found is MISSING else _Connected(found)


class _Connected:
    """The SDK's object as a program's provider: an absent global is 0."""

    def __init__(self, found: Any) -> None:
        self._object = found

    def load(self, index: int, name: str, type: Type) -> Value:
        zero = 0.0 if type == "f64" else 0
        try:
            found = self._object[name]
        except KeyError:
            return zero
        except ManifoldError as error:
            if error.code != "not_found":
                raise
            return zero
        value: Value = zero if found is None else found  # `Access` looks whether it is a number
        return value

    def store(self, index: int, k: int, name: str, value: Value) -> None:
        self._object[name] = value

    def propose(
        self, index: int, k: int, name: str, expected: Value, new: Value
    ) -> tuple[Value, bool]:
        found, done = self._object.propose(name, expected, new)
        if found is None and not done and expected == 0:  # it is absent
            found, done = self._object.propose(name, None, new)
        return (type(new)(0) if found is None else found), bool(done)

    def add(self, index: int, k: int, name: str, value: Value) -> Value:
        try:
            before = self._object.add(name, value)
        except (TypeError, OverflowError) as error:  # another type; a sum that is no i64
            raise Trap(str(error)) from error
        return type(value)(0) if before is None else before
