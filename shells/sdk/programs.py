"""Programs as users name them: a path, a source text, a kernel, or what is assembled already."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifold.kernel.errors import InvalidProgram
from manifold.vm.syntax import Program, load
from manifold.vm.valid import verify

if TYPE_CHECKING:
    from manifold.vm.python.kinds import KernelBase

    Source = str | Path | Program | KernelBase

SOURCE_BYTES_MAX = 16 << 20


def program_of(source: Source) -> Program:
    """Load, assemble and verify; `InvalidProgram` names file, line and what to do.

    A text with a line break, or one that ends neither in `.ent` nor `.json`, is source text of the
    `.ent` language; anything else is a path. A kernel has been verified when it was decorated.
    """
    if isinstance(source, Program):
        return source
    if not isinstance(source, (str, Path)):
        return _of_kernel(source)
    text = str(source)
    if isinstance(source, str) and ("\n" in text or not text.endswith((".ent", ".json"))):
        program = load(text, "program.ent")
    else:
        path = Path(source)
        try:
            if path.stat().st_size > SOURCE_BYTES_MAX:
                raise InvalidProgram(f"{path} is larger than {SOURCE_BYTES_MAX} bytes.")
            program = load(path.read_bytes(), name_of(path.name))
        except OSError as error:
            raise InvalidProgram(
                f"{path} cannot be read: {error.strerror}.", "Check the path."
            ) from error
    verify(program)
    return program


def name_of(file: str) -> str:
    """How a program is called after its file: text, also where that has a name of odd bytes."""
    return os.fsencode(file).decode(errors="backslashreplace")


def _of_kernel(source: Any) -> Program:
    """A kernel has a program; a function without its decorator has none."""
    program = getattr(source, "program", None)
    if isinstance(program, Program):
        return program
    name = getattr(source, "__name__", type(source).__name__)
    raise InvalidProgram(
        f"{name} is not a program.",
        "Write @manifold.kernel before its def, or pass a path or the text of a program.",
    )
