"""Validity: the verifier, which stands between any bytes and the compiler.

Interface: `verify(program) -> Verified`, or InvalidProgram naming line, instruction and, where two
paths disagree, both states. Every node verifies for itself. Cost: linear in the instructions and
in the stack entries at joins, both bounded.
"""

from __future__ import annotations

from manifold.vm.valid.verifier import CALL_DEPTH_MAX, STACK_MAX, Flow, Verified, verify

__all__ = ["CALL_DEPTH_MAX", "STACK_MAX", "Flow", "Verified", "verify"]
