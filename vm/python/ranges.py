"""What ints can be: the least and the greatest value an expression can have.

Interface: `Ranges(checked)`; `of(node)`, `exact(node)`. Known are constants, loop counters,
remainders, masks, comparisons, and what is computed from them; anything else may be any i64. Where
a result is sure to be an i64, the code writer leaves the overflow check out.
"""

from __future__ import annotations

import ast
from collections.abc import Callable

from manifold.vm.python.kinds import Checked
from manifold.vm.syntax.program import I64_MAX, I64_MIN

Range = tuple[int, int]  # inclusive

ANY: Range = (I64_MIN, I64_MAX)
COUNTER: Range = (-(1 << 62), 1 << 62)  # see checker.COUNTER_STEP_MAX
EXACT = 1 << 53  # up to here every int is a float


def fits(found: Range) -> bool:
    return found[0] >= I64_MIN and found[1] <= I64_MAX


class Ranges:
    """Of one function; `loops` are the ranges of its loop variables, filled as loops are met."""

    def __init__(self, checked: Checked) -> None:
        self.checked = checked
        self.loops: dict[str, Range] = {}
        # First from constant bounds alone, which is sure; then once more from what that says.
        for bounds in (self.constant, self.of):
            found: dict[str, Range] = {}
            for node in ast.walk(checked.source.tree):
                if isinstance(node, ast.For) and isinstance(node.target, ast.Name):
                    name, (low, high) = node.target.id, self.counted(node, bounds)
                    before = found.get(name, (low, high))
                    found[name] = min(low, before[0]), max(high, before[1])
            self.loops = found

    def counted(self, node: ast.For, bounds: Callable[[ast.AST], Range]) -> Range:
        """What the variable of a loop can be."""
        assert isinstance(node.iter, ast.Call)
        ends = [bounds(each) for each in node.iter.args]
        start, stop = (ends[0], ends[1]) if len(ends) > 1 else ((0, 0), ends[0])
        step = ends[2] if len(ends) == 3 else (1, 1)
        if step[0] > 0:
            return start[0], max(start[0], stop[1] - 1)
        if step[1] < 0:
            return min(start[1], stop[0] + 1), start[1]
        return ANY

    def constant(self, node: ast.AST) -> Range:
        value = self.checked.constants.get(node)
        return (value, value) if isinstance(value, int) and fits((value, value)) else ANY

    def of(self, node: ast.AST) -> Range:
        """A range that lies within i64; ANY for what is not known."""
        if node in self.checked.constants:
            return self.constant(node)
        found = ANY
        if self.checked.types.get(node) == "b":
            found = (0, 1)
        elif isinstance(node, ast.Name):
            if node.id in self.checked.looped:
                found = self.loops[node.id]
            elif node.id in self.checked.counters and not self.checked.wrap:
                found = COUNTER
        elif isinstance(node, ast.BinOp):
            found = self.exact(node)
        elif isinstance(node, ast.IfExp):
            one, other = self.of(node.body), self.of(node.orelse)
            found = min(one[0], other[0]), max(one[1], other[1])
        elif isinstance(node, ast.Call) and self.checked.calls.get(node) == "len":
            assert isinstance(node.args[0], ast.Name)
            found = (self.checked.arrays[node.args[0].id].length,) * 2
        if fits(found):
            return found
        return ANY if self.checked.wrap else (max(found[0], I64_MIN), min(found[1], I64_MAX))

    def exact(self, node: ast.BinOp) -> Range:
        """What an operator gives in whole numbers, which may be beyond i64."""
        if self.checked.types.get(node) == "f":
            return ANY
        left, right = self.of(node.left), self.of(node.right)
        match node.op:
            case ast.Add():
                return left[0] + right[0], left[1] + right[1]
            case ast.Sub():
                return left[0] - right[1], left[1] - right[0]
            case ast.Mult():
                ends = [a * b for a in left for b in right]
                return min(ends), max(ends)
            case ast.Mod() if right[0] > 0:
                return 0, right[1] - 1
            case ast.FloorDiv() if right[0] > 0:
                ends = [a // b for a in left for b in right]
                return min(ends), max(ends)
            case ast.BitAnd() if right[0] >= 0 or left[0] >= 0:
                return 0, min(each[1] for each in (left, right) if each[0] >= 0)
            case ast.RShift() if right[0] >= 0:
                ends = [a >> min(b, 63) for a in left for b in right]
                return min(ends), max(ends)
        return ANY
