"""Programs as users name them: a path, a source text, or one that is assembled already."""

from __future__ import annotations

from pathlib import Path

from manifold.kernel.errors import InvalidProgram
from manifold.vm.syntax import Program, load
from manifold.vm.valid import verify

Source = str | Path | Program
SOURCE_BYTES_MAX = 16 << 20


def program_of(source: Source) -> Program:
    """Load, assemble and verify; `InvalidProgram` names file, line and what to do.

    A text with a line break, or one that ends neither in `.ent` nor `.json`, is source text of the
    `.ent` language; anything else is a path.
    """
    if isinstance(source, Program):
        return source
    text = str(source)
    if isinstance(source, str) and ("\n" in text or not text.endswith((".ent", ".json"))):
        program = load(text, "program.ent")
    else:
        path = Path(source)
        try:
            if path.stat().st_size > SOURCE_BYTES_MAX:
                raise InvalidProgram(f"{path} is larger than {SOURCE_BYTES_MAX} bytes.")
            program = load(path.read_bytes(), path.name)
        except OSError as error:
            raise InvalidProgram(
                f"{path} cannot be read: {error.strerror}.", "Check the path."
            ) from error
    verify(program)
    return program
