"""Foreign programs: WebAssembly modules and WASI preview 1 commands of other compilers.

    program     what is taken and what is refused: `load(data, name) -> Foreign`
    binary      the sections of a WebAssembly binary
    signatures  the functions of WASI preview 1
    engine      calls that are metered, yield and can be stopped
    wasi        the system a program finds: three streams, arguments, clocks, random numbers
    block       the loop over a block of indices, and its results
    machine     `ForeignMachine`, which compiles, keeps and runs them

wasmtime is imported only when a program is loaded or a ForeignMachine made. See docs/wasm.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from manifold.vm.foreign.binary import Signature
from manifold.vm.foreign.program import PROGRAM_BYTES_MAX, Export, Foreign, load

if TYPE_CHECKING:
    from manifold.vm.foreign.machine import (
        Command,
        CommandOutcome,
        CommandTrap,
        ForeignMachine,
        ForeignUnit,
    )

__all__ = [
    "PROGRAM_BYTES_MAX",
    "Command",
    "CommandOutcome",
    "CommandTrap",
    "Export",
    "Foreign",
    "ForeignMachine",
    "ForeignUnit",
    "Signature",
    "load",
]

_OF_MACHINE = ("Command", "CommandOutcome", "CommandTrap", "ForeignMachine", "ForeignUnit")


def __getattr__(name: str) -> Any:
    if name in _OF_MACHINE:
        from manifold.vm.foreign import machine

        return getattr(machine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
