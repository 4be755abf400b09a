"""The reference interpreter: what every instruction means. Short, obvious, slow.

Interface: `run(verified, reduce, lo, hi, gas=..., on_yield=..., on_sleep=..., arguments=())`, the
same contract as `Unit.run` of the runtime. It also runs the JSON programs whose stack depth is only
known at run time. A Python int is an i64, a Python float an f64.
"""

from __future__ import annotations

from manifold.vm.interpret.interpreter import run

__all__ = ["run"]
