"""Expressions of a kernel: what type each has, and which are refused.

Interface: `ExpressionChecker` is the base of checker.py's `Checker`. `number(node)` gives the
letter of one value, `values(node)` the letters of one or several, `truth(node)` checks a condition.
Invariants: E1 every node that the code writer will see has its type in `checked.types`;
E2 an int and a float never become one type by themselves: Python would not round the int.
"""

from __future__ import annotations

import ast
import builtins
import math
from collections.abc import Callable
from types import FunctionType
from typing import Any

from manifold.vm.errors import InvalidProgram
from manifold.vm.python.constants import Constants
from manifold.vm.python.kinds import SELF, Callee, Checked, KernelBase, an, fits, joined, letter_of
from manifold.vm.python.refusals import CALLS, EXPRESSIONS
from manifold.vm.python.registers import Registers
from manifold.vm.python.source import MISSING
from manifold.vm.syntax.program import GLOBALS_MAX, I64_MAX, I64_MIN

RING = (ast.Add, ast.Sub, ast.Mult, ast.BitAnd, ast.BitOr, ast.BitXor)  # exact modulo 2^64
BITS = (ast.BitAnd, ast.BitOr, ast.BitXor, ast.LShift, ast.RShift)
ORDER = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE)

_BUILTINS: dict[Any, str] = {
    **{getattr(builtins, name): name for name in ("abs", "min", "max", "int", "float", "bool")},
    **{getattr(builtins, name): name for name in ("round", "divmod", "pow", "len")},
    **{getattr(math, name): f"math.{name}" for name in ("sqrt", "fabs", "floor", "ceil", "trunc")},
    **{getattr(math, name): f"math.{name}" for name in ("isnan", "isinf", "isfinite")},
}


class ExpressionChecker:
    """Types of expressions."""

    def __init__(self, checked: Checked, constants: Constants) -> None:
        self.checked, self.constants = checked, constants
        self.source = checked.source
        self.registers = Registers(checked.source, constants)
        self.changed = False  # in this pass: there must be another
        self.assigned: set[str] | None = set(checked.parameters)  # None: control is never here

    def refuse(self, node: ast.AST, reason: str, next_step: str = "") -> InvalidProgram:
        return self.source.refuse(node, reason, next_step)

    # -- the three ways to look at an expression ---------------------------------------------

    def values(self, node: ast.AST) -> str:
        """One or several values: what stands right of return and `=`."""
        if isinstance(node, ast.Tuple):
            if len(node.elts) < 2:
                raise self.refuse(node, "a tuple has at least two values here.", "Write the value.")
            found = "".join(self.number(each) for each in node.elts)
            self.checked.types[node] = found
            return found
        return self.expression(node, ring=False)

    def number(self, node: ast.AST, *, ring: bool = False) -> str:
        """One value."""
        found = self.expression(node, ring=ring)
        if len(found) > 1:
            raise self.refuse(
                node, "this gives several values, but one is needed.", "Write a, b = ... first."
            )
        return found

    def truth(self, node: ast.AST) -> None:
        """A condition: any number will do, and `and`, `or` may join any types."""
        if isinstance(node, ast.BoolOp):
            for each in node.values:
                self.truth(each)
            self.checked.types[node] = "b"
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            self.truth(node.operand)
            self.checked.types[node] = "b"
        else:
            self.number(node)

    def expression(self, node: ast.AST, *, ring: bool) -> str:
        """`ring`: only the value modulo 2^64 is wanted, so ints of any size may stand here."""
        value = self.constants.constant(node)
        if value is not None:
            found = letter_of(value)
            fits_in = not isinstance(value, int) or I64_MIN <= value <= I64_MAX
            if not (fits_in or ring or self.checked.wrap):
                raise self.refuse(
                    node,
                    f"{value} does not fit in 64 bits.",
                    "Write a float, a smaller int, or decorate with @kernel(wrap=True).",
                )
        else:
            rule = _RULES.get(type(node))
            if rule is None:
                raise self.unknown(node)
            found = rule(self, node, ring)
        self.checked.types[node] = found
        return found

    def unknown(self, node: ast.AST) -> InvalidProgram:
        if isinstance(node, ast.Constant):
            return self.refuse(
                node,
                f"kernels have no values like {node.value!r}: only int, float and bool.",
                "Use a number.",
            )
        name = type(node).__name__
        return self.refuse(node, *EXPRESSIONS.get(type(node), (f"kernels have no {name}.", "")))

    def one_type(self, nodes: list[ast.expr], what: str) -> str:
        """The common type of several values."""
        found = "?"
        for node in nodes:
            letter = self.number(node)
            both = joined(found, letter)
            if both is None:
                raise self.refuse(
                    node,
                    f"{what} must have one type: this is {an(letter)}, before it stands "
                    f"{an(found)}.",
                    "Convert: float(...), or write the constant with a point.",
                )
            found = both
        return found

    # -- names -------------------------------------------------------------------------------

    def name(self, node: ast.Name, ring: bool) -> str:
        name, checked = node.id, self.checked
        if name in checked.arrays:
            raise self.refuse(
                node,
                f"{name} is an array; arrays are not passed, copied or returned.",
                f"Use its elements, {name}[i], or len({name}).",
            )
        if name in self.constants.local:
            self.must_be_assigned(node, name)
            return checked.variables.get(name, "?")
        value = self.source.resolve(name)
        if value is MISSING:
            raise self.refuse(
                node,
                f"{name} is not defined when the kernel is decorated.",
                "Define it above the kernel.",
            )
        self.refuse_all_globals(node)
        raise self.refuse(
            node,
            f"{name} is {_described(value)}; kernels know numbers of the module and kernels.",
            "Use an int, a float or a bool, or pass the value as an argument.",
        )

    def must_be_assigned(self, node: ast.AST, name: str) -> None:
        if self.assigned is not None and name not in self.assigned:
            raise self.refuse(
                node,
                f"{name} may have no value here.",
                f"Give {name} a value before, on every path.",
            )

    def attribute(self, node: ast.Attribute, ring: bool) -> str:
        register = self.registers.name_of(node)
        if register is not None:
            return self.global_read(node, register)
        self.refuse_all_globals(node)
        found = self.constants.object_of(node)
        if found is not MISSING:
            raise self.refuse(
                node,
                f"{ast.unparse(node)} is {_described(found)}, not a number.",
                "Call it, if it is a function of math; numbers of modules are known.",
            )
        raise self.unknown(node)

    def subscript(self, node: ast.Subscript, ring: bool) -> str:
        register = self.registers.name_of(node)
        if register is not None:
            return self.global_read(node, register)
        return self.array_at(node)

    def array_at(self, node: ast.Subscript) -> str:
        """`a[i]`: the letter of its elements."""
        name = node.value.id if isinstance(node.value, ast.Name) else ""
        if name not in self.checked.arrays:
            raise self.refuse(
                node,
                "only local arrays of numbers can be indexed, with one index.",
                "Make one: a = [0.0] * 64; two dimensions: a[row * columns + column].",
            )
        self.must_be_assigned(node, name)
        if isinstance(node.slice, ast.Slice):
            raise self.unknown(node.slice)
        if self.number(node.slice) == "f":
            raise self.refuse(node.slice, "an index is an int.", "Write int(...).")
        return self.checked.arrays[name].letter

    # -- globals -----------------------------------------------------------------------------

    def global_read(self, node: ast.AST, name: str) -> str:
        self.checked.touched[node] = name
        return self.global_given(node, name, "?")

    def refuse_all_globals(self, node: ast.AST) -> None:
        if self.registers.is_globals(node):
            raise self.refuse(
                node,
                "manifold.globals is not a number.",
                "Name one of them: manifold.globals.counter.",
            )

    def global_given(self, node: ast.AST, name: str, letter: str) -> str:
        """The letter of a global that is given a value of type `letter`, or declared to have it."""
        known = self.checked.globals
        before = known.get(name, "?")
        both = joined(before, "i" if letter == "b" else letter)
        if both is None or len(both) > 1:
            raise self.refuse(
                node,
                f"{name} is {an(before)} elsewhere, but {an(letter)} here: a global has one type.",
                f"Convert it, or write the constant with a point; where it is read only, the type: "
                f"x: float = manifold.globals.{name}.",
            )
        if len(known) >= GLOBALS_MAX and name not in known:
            raise self.refuse(node, f"more than {GLOBALS_MAX} globals.", "Use an array.")
        self.changed |= both != before
        known[name] = both
        return both

    def global_call(self, node: ast.Call, callee: str) -> str:
        count = {"globals.add": 2, "globals.propose": 3}[callee]
        if len(node.args) != count:
            raise self.refuse(
                node,
                f"{callee} takes {count} arguments.",
                'Write add("name", amount) or propose("name", expected, new).',
            )
        name = self.checked.touched[node] = self.registers.named(node.args[0])
        for each in node.args[1:]:
            self.global_given(each, name, self.number(each))
        return self.checked.globals[name] + "b" * (callee == "globals.propose")

    # -- operators ---------------------------------------------------------------------------

    def binary(self, node: ast.BinOp, ring: bool) -> str:
        op = node.op
        if isinstance(op, ast.Pow):
            return self.power(node, node.left, node.right)
        if isinstance(op, ast.MatMult):
            raise self.refuse(node, "kernels have no matrices.", "Write the loops.")
        inner = isinstance(op, RING) and ring
        left = self.number(node.left, ring=inner or self.masks(node, node.right))
        right = self.number(node.right, ring=inner or self.masks(node, node.left))
        both = left + right
        if "f" in both and isinstance(op, BITS):
            raise self.refuse(node, "bit operations and shifts take ints.", "Write int(...).")
        if "f" in both:  # a float is no residue: the ints must be what they are
            self.number(node.left), self.number(node.right)
        if isinstance(op, ast.Div):
            return "f"
        if "?" in both:
            return "f" if "f" in both else "?"
        if both == "bb" and isinstance(op, (ast.BitAnd, ast.BitOr, ast.BitXor)):
            return "b"
        return "f" if "f" in both else "i"

    def masks(self, node: ast.BinOp, other: ast.expr) -> bool:
        """Whether only the low bits of the operand beside `other` count."""
        value = self.constants.whole(other)
        if value is None or other is (node.left if isinstance(node.op, ast.Mod) else None):
            return False
        if isinstance(node.op, ast.BitAnd):
            return 0 <= value <= I64_MAX
        return isinstance(node.op, ast.Mod) and 0 < value <= 1 << 62 and value & (value - 1) == 0

    def power(self, node: ast.AST, base: ast.expr, exponent: ast.expr) -> str:
        both = self.number(base) + self.number(exponent)
        if "f" in both:
            raise self.refuse(
                node,
                "a power of floats has other last bits on other machines.",
                "Multiply: x * x; math.sqrt(x) is x ** 0.5; of ints: float(n ** 2).",
            )
        value = self.constants.whole(exponent)
        if value is not None and value < 0:
            raise self.refuse(node, "a negative power is a float.", "Write 1 / x ** n.")
        return "?" if "?" in both else "i"

    def unary(self, node: ast.UnaryOp, ring: bool) -> str:
        if isinstance(node.op, ast.Not):
            self.truth(node.operand)
            return "b"
        letter = self.number(node.operand, ring=ring)
        if letter == "f" and ring:
            self.number(node.operand)
        if letter == "f" and isinstance(node.op, ast.Invert):
            raise self.refuse(node, "~ takes an int.", "Write int(...).")
        return "i" if letter == "b" else letter

    def either(self, node: ast.BoolOp, ring: bool) -> str:
        return self.one_type(
            node.values, "both sides of `and` and `or`, where their value is used,"
        )

    def choice(self, node: ast.IfExp, ring: bool) -> str:
        self.truth(node.test)
        return self.one_type([node.body, node.orelse], "both sides of a conditional expression")

    def compare(self, node: ast.Compare, ring: bool) -> str:
        for op in node.ops:
            if not isinstance(op, ORDER):
                word = "`in`" if isinstance(op, (ast.In, ast.NotIn)) else "`is`"
                raise self.refuse(node, f"kernels have no {word}.", "Compare with == or in a loop.")
        for each in (node.left, *node.comparators):
            self.number(each)
        return "b"

    # -- calls -------------------------------------------------------------------------------

    def call(self, node: ast.Call, ring: bool) -> str:
        callee = self.callee(node)
        if node.keywords:
            raise self.refuse(node, "arguments are passed by position.", "Leave the names out.")
        self.checked.calls[node] = callee
        if isinstance(callee, KernelBase):
            self.arguments(node, callee.checked)
            for name, letter in callee.checked.globals.items():
                self.global_given(node, name, letter)
            return callee.checked.leaves
        if callee == SELF:
            self.checked.recursive = True
            self.arguments(node, self.checked)
            return self.checked.leaves
        if callee.startswith("globals."):
            return self.global_call(node, callee)
        return self.builtin(node, callee)

    def callee(self, node: ast.Call) -> Callee:
        func = node.func
        if isinstance(func, ast.Name) and func.id in self.constants.local:
            raise self.refuse(func, f"{func.id} is a variable, not a kernel.", "Rename it.")
        if isinstance(func, ast.Name) and func.id == self.checked.name:
            return SELF
        of_globals = self.registers.call_of(func)
        if of_globals is not None:
            return of_globals
        found = self.constants.object_of(func)
        if isinstance(found, KernelBase):
            return found
        if found is MISSING:
            if isinstance(func, ast.Name):
                raise self.refuse(
                    func,
                    f"{func.id} is not defined when this kernel is decorated.",
                    "Define it above, with @manifold.kernel.",
                )
            raise self.refuse(
                func,
                "kernels call kernels and functions of math, no methods.",
                "Arrays do not grow: a = [0.0] * 64.",
            )
        try:
            if found in _BUILTINS:
                return _BUILTINS[found]
            refusal = CALLS.get(found)
        except TypeError:  # not hashable, so in neither
            refusal = None
        if refusal is None and isinstance(found, FunctionType):
            refusal = (
                f"{found.__name__} is not a kernel.",
                "Write @manifold.kernel before its def.",
            )
        what = ast.unparse(func)
        default = (f"{what} is not in the subset that kernels have.", "See docs/python.md.")
        raise self.refuse(func, *(refusal or default))

    def arguments(self, node: ast.Call, called: Checked) -> None:
        if len(node.args) != len(called.parameters):
            raise self.refuse(
                node,
                f"{called.name} takes {len(called.parameters)} arguments, not {len(node.args)}.",
                "Pass exactly those.",
            )
        for given, (name, wanted) in zip(node.args, called.parameters.items(), strict=True):
            letter = self.number(given)
            if not fits(letter, wanted):
                raise self.refuse(
                    given,
                    f"{name} of {called.name} is {an(wanted)}, but this is {an(letter)}.",
                    "Convert it, or write the constant with a point.",
                )

    def builtin(self, node: ast.Call, name: str) -> str:
        if name == "len":
            array = node.args[0].id if node.args and isinstance(node.args[0], ast.Name) else ""
            if len(node.args) != 1 or array not in self.checked.arrays:
                raise self.refuse(node, "len takes a local array.", "a = [0.0] * 64; len(a)")
            return "i"
        counts = {"divmod": (2, 2), "pow": (2, 2), "min": (2, 255), "max": (2, 255)}
        low, high = counts.get(name, (1, 1))
        if not low <= len(node.args) <= high:
            wanted = f"{low} numbers" if low == high and low > 1 else "one number"
            wanted = "two numbers or more" if high > 2 else wanted
            raise self.refuse(node, f"{name} takes {wanted} here.", "See docs/python.md.")
        if name in ("min", "max"):
            return self.one_type(node.args, f"the arguments of {name}")
        if name == "pow":
            return self.power(node, *node.args)
        letters = [self.number(each) for each in node.args]
        if name == "divmod":
            kind = "f" if "f" in letters else "i"
            return "?" if "?" in letters else kind * 2
        fixed = {"int": "i", "round": "i", "float": "f", "bool": "b", "math.sqrt": "f"}
        fixed |= {"math.floor": "i", "math.ceil": "i", "math.trunc": "i", "math.fabs": "f"}
        fixed |= {"math.isnan": "b", "math.isinf": "b", "math.isfinite": "b"}
        if name in fixed:
            return fixed[name]
        assert name == "abs"
        return "i" if letters[0] == "b" else letters[0]


def _described(value: Any) -> str:
    name = type(value).__name__
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


_RULES: dict[type[ast.AST], Callable[..., str]] = {
    ast.Name: ExpressionChecker.name,
    ast.Attribute: ExpressionChecker.attribute,
    ast.Subscript: ExpressionChecker.subscript,
    ast.BinOp: ExpressionChecker.binary,
    ast.UnaryOp: ExpressionChecker.unary,
    ast.BoolOp: ExpressionChecker.either,
    ast.IfExp: ExpressionChecker.choice,
    ast.Compare: ExpressionChecker.compare,
    ast.Call: ExpressionChecker.call,
}
