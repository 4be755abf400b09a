"""The root of every error Manifold raises, and the two a user's program can cause.

Interface: each class carries a stable `code` (what `--json` and other programs match on), one
sentence (`message`) and what to do next (`next_step`). `AssertionError` is never part of this
family: it means a bug of ours, and nothing catches it.
"""

from __future__ import annotations


class ManifoldError(Exception):
    """Base of all errors. `code` is stable across releases; `exit_code` is the shell's."""

    code = "error"
    exit_code = 1

    def __init__(self, message: str, next_step: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.next_step = next_step

    def __str__(self) -> str:
        return f"{self.message} {self.next_step}".rstrip()


class Trap(ManifoldError):
    """A user's program did something it must not: division by zero, a bad index, a refused type.

    `line` and `instruction` point into the program's source, `cells` are its memory cells at the
    fault, `index` the index of the job that was running (None where there is none yet), `results`
    what that index had emitted before the fault, where the back end knows.
    """

    code = "trap"

    def __init__(
        self,
        message: str,
        next_step: str = "",
        *,
        line: int = 0,
        instruction: str = "",
        cells: tuple[int | float, ...] = (),
        index: int | None = None,
        results: tuple[int | float, ...] = (),
    ) -> None:
        super().__init__(message, next_step)
        self.line = line
        self.instruction = instruction
        self.cells = cells
        self.index = index
        self.results = results


class Exhausted(ManifoldError):
    """A limit was reached: gas, memory, output, wall-clock time."""

    code = "exhausted"


class InvalidProgram(ManifoldError):
    """The assembler, the decoder or the verifier refused a program.

    `line` is 1-based in the source text (0: no source), `column` 1-based (0: the whole line).
    """

    code = "invalid_program"
    exit_code = 2

    def __init__(
        self,
        message: str,
        next_step: str = "",
        *,
        line: int = 0,
        column: int = 0,
        instruction: str = "",
    ) -> None:
        super().__init__(message, next_step)
        self.line = line
        self.column = column
        self.instruction = instruction
