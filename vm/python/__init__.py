"""The Python front end: functions of numbers become programs.

Interface: `@kernel` and `@kernel(wrap=True)` make a `Kernel`; `array(float, 64)` makes a local
array. What is outside the subset is refused at decoration by InvalidProgram, with file, line,
column, the reason and what to write instead. The subset is in docs/python.md.
The way down: source.py (text to tree) -> checker.py (types, refusals) -> writer.py (instructions).
"""

from __future__ import annotations

from manifold.vm.python.arrays import array
from manifold.vm.python.kernel import Kernel, kernel

__all__ = ["Kernel", "array", "kernel"]
