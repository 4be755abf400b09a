"""From a function object to its syntax tree, and from a node of it to a refusal that shows it.

Interface: `read(function) -> Source`. `source.refuse(node, reason, next_step)` makes the error;
`source.resolve(name)` is the object that a name means where the function was defined.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

from manifold.vm.errors import InvalidProgram

MISSING = object()  # what `resolve` answers for a name that nothing has


@dataclass(frozen=True, slots=True)
class Source:
    """A function's tree, and where it stands."""

    function: FunctionType
    tree: ast.FunctionDef
    path: str
    lines: tuple[str, ...]  # of the function, as they stand in the file
    first_line: int
    indent: int
    outer: Mapping[str, Any]  # what the enclosing functions hold

    @property
    def filename(self) -> str:
        return Path(self.path).name

    def line(self, node: ast.AST) -> int:
        """The line in the file."""
        return self.first_line + getattr(node, "lineno", 1) - 1

    def refuse(self, node: ast.AST, reason: str, next_step: str = "") -> InvalidProgram:
        """The error that points at `node`."""
        at = getattr(node, "lineno", 1)
        column = getattr(node, "col_offset", 0) + self.indent
        end = getattr(node, "end_col_offset", column) + self.indent
        text = self.lines[at - 1].rstrip() if at <= len(self.lines) else ""
        if getattr(node, "end_lineno", at) != at:
            end = len(text)
        marks = " " * column + "^" * max(1, min(end, len(text)) - column)
        return InvalidProgram(
            f"{self.path}, line {self.line(node)}, column {column + 1}: {reason}\n"
            f"    {text}\n    {marks}\n",
            next_step,
            line=self.line(node),
            column=column + 1,
        )

    def resolve(self, name: str) -> Any:
        """What `name` means, now that the function is decorated; MISSING if nothing."""
        for place in (self.outer, self.function.__globals__, vars(builtins)):
            if name in place:
                return place[name]
        return MISSING


def read(function: Callable[..., Any]) -> Source:
    """The source of a plain function; InvalidProgram where it has none that can be compiled."""
    if not isinstance(function, FunctionType):
        raise InvalidProgram(
            f"@kernel stands before a plain function, not {type(function).__name__!r}.",
            "Write @manifold.kernel before def, below any other decorator.",
        )
    name, path = function.__name__, function.__code__.co_filename
    if name == "<lambda>":
        raise InvalidProgram(
            f"{path}, line {function.__code__.co_firstlineno}: a lambda cannot be a kernel.",
            "Write a def with annotated parameters.",
        )
    try:
        lines, first_line = inspect.getsourcelines(function)
        text = textwrap.dedent("".join(lines))
        tree = ast.parse(text).body[0]
    except (OSError, SyntaxError, IndexError) as error:
        raise InvalidProgram(
            f"The source of {name!r} cannot be read ({path}): kernels are compiled from source.",
            "Put the function into a file and import it or run that file.",
        ) from error
    indent = len(lines[0]) - len(text.splitlines(keepends=True)[0])
    shown = tuple("".join(lines).splitlines())
    if not isinstance(tree, ast.FunctionDef):
        what = "an async function" if isinstance(tree, ast.AsyncFunctionDef) else "this"
        raise InvalidProgram(
            f"{path}, line {first_line}: {what} cannot be a kernel.", "Write a plain def."
        )
    return Source(function, tree, path, shown, first_line, indent, _outer(function))


def _outer(function: FunctionType) -> dict[str, Any]:
    """The variables of enclosing functions, as far as they have values."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not assigned yet: the function's own name, most often
            continue
    return found
