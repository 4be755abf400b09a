"""The compiler: verified programs to WebAssembly text.

Interface: `compile_wat(verified, reduce) -> str`. The text is the same on every machine; what runs
it is in vm/runtime.
"""

from __future__ import annotations

from manifold.vm.compile.module import COMPILER_VERSION, compile_wat

__all__ = ["COMPILER_VERSION", "compile_wat"]
