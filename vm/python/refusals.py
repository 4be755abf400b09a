"""What kernels do not have, why, and what to write instead.

Interface: `STATEMENTS` and `EXPRESSIONS` by class of node, `CALLS` by the object that is called:
each a pair of reason and next step. docs/python.md says the same in prose.
"""

from __future__ import annotations

import ast
import builtins
import math
from typing import Any

Refusal = tuple[str, str]

_KERNEL = "Keep it outside and pass numbers into the kernel."
_LOOP = "Write a loop: for i in range(len(a))."

STATEMENTS: dict[type[ast.AST], Refusal] = {
    ast.FunctionDef: (
        "a function cannot be defined inside a kernel.",
        "Define it before this one, with @manifold.kernel, and call it.",
    ),
    ast.AsyncFunctionDef: ("a kernel defines no functions.", "Define a kernel before this one."),
    ast.ClassDef: ("a class cannot be defined inside a kernel.", _KERNEL),
    ast.Delete: ("`del` means nothing here: variables cost nothing.", "Leave it out."),
    ast.With: ("kernels have no context managers.", _KERNEL),
    ast.AsyncWith: ("kernels have no context managers.", _KERNEL),
    ast.AsyncFor: ("kernels are not asynchronous.", "Write a plain for."),
    ast.Raise: ("kernels do not raise.", 'Write assert condition, "text", or return a number.'),
    ast.Try: (
        "kernels catch nothing: a fault ends the job.",
        "Test before: if b != 0: q = a // b.",
    ),
    ast.TryStar: ("kernels catch nothing: a fault ends the job.", "Test before."),
    ast.Import: ("a kernel does not import.", "Import at the top of the file; math is known."),
    ast.ImportFrom: ("a kernel does not import.", "Import at the top of the file; math is known."),
    ast.Global: (
        "kernels do not write to the module: they run on many machines.",
        "Return the value, or write what the whole cluster has: manifold.globals.name = ...",
    ),
    ast.Nonlocal: ("kernels do not write to enclosing functions.", "Return the value."),
    ast.Match: ("kernels have no match.", "Write if, elif, else."),
}

EXPRESSIONS: dict[type[ast.AST], Refusal] = {
    ast.Lambda: ("a lambda cannot stand inside a kernel.", "Define a kernel before this one."),
    ast.ListComp: ("kernels have no comprehensions.", _LOOP),
    ast.SetComp: ("kernels have no sets.", "Use an array of flags: [False] * 64."),
    ast.DictComp: ("kernels have no dicts.", "Use an array, indexed by number."),
    ast.GeneratorExp: ("kernels have no generators.", _LOOP),
    ast.Dict: ("kernels have no dicts.", "Use an array, indexed by number."),
    ast.Set: ("kernels have no sets.", "Use an array of flags: [False] * 64."),
    ast.List: (
        "a list stands only where a variable gets its array.",
        "Write a = [0.0] * 64 on a line of its own.",
    ),
    ast.Tuple: (
        "several values stand only in return and in assignments.",
        "Give each a variable.",
    ),
    ast.Await: ("kernels are not asynchronous.", "Leave the await out."),
    ast.Yield: ("a kernel gives its result at once.", "Return it, or run one index per value."),
    ast.YieldFrom: ("a kernel gives its result at once.", "Return it."),
    ast.JoinedStr: ("kernels have no strings.", _KERNEL),
    ast.NamedExpr: ("`:=` cannot stand inside a kernel.", "Assign on a line of its own."),
    ast.Starred: ("`*` cannot unpack here.", "Name each value."),
    ast.Slice: ("arrays have no slices.", _LOOP),
    ast.Attribute: (
        "kernels have no objects: only numbers of modules and functions of math.",
        _KERNEL,
    ),
}

_TRANSCENDENTAL = (
    "its last bits differ from machine to machine, and kernels give the same everywhere."
)
_SERIES = "Write the series you need, or use math.sqrt, which is exact."

CALLS: dict[Any, Refusal] = {
    builtins.print: ("kernels do not print.", "Return the value; several values: return a, b."),
    builtins.input: ("kernels do not read.", "Pass it as an argument."),
    builtins.open: ("kernels have no files.", _KERNEL),
    builtins.range: ("range stands only in `for i in range(...)`.", "Write such a loop."),
    builtins.sum: ("kernels have no sum.", "Add in a loop."),
    builtins.sorted: ("kernels have no sorted.", "Sort an array in a loop."),
    builtins.enumerate: ("kernels loop over range only.", _LOOP),
    builtins.zip: ("kernels loop over range only.", _LOOP),
    builtins.map: ("kernels have no map.", _LOOP),
    builtins.filter: ("kernels have no filter.", _LOOP),
    builtins.any: ("kernels have no any.", "Write a loop with break."),
    builtins.all: ("kernels have no all.", "Write a loop with break."),
    builtins.reversed: ("kernels loop over range only.", "Write range(n - 1, -1, -1)."),
    builtins.str: ("kernels have no strings.", _KERNEL),
    builtins.list: ("kernels have no lists that grow.", "Write a = [0.0] * 64."),
    builtins.dict: ("kernels have no dicts.", "Use an array, indexed by number."),
    builtins.set: ("kernels have no sets.", "Use an array of flags: [False] * 64."),
    builtins.tuple: ("kernels have no tuples but results.", "Give each value a variable."),
    builtins.complex: ("kernels have no complex numbers.", "Use two floats."),
    builtins.isinstance: ("types are known before a kernel runs.", "Leave the test out."),
    **{
        function: (f"math.{function.__name__}: {_TRANSCENDENTAL}", _SERIES)
        for function in (
            *(math.sin, math.cos, math.tan, math.asin, math.acos, math.atan, math.atan2),
            *(math.sinh, math.cosh, math.tanh, math.asinh, math.acosh, math.atanh),
            *(math.exp, math.expm1, math.log, math.log2, math.log10, math.log1p),
            *(math.hypot, math.gamma, math.lgamma, math.erf, math.erfc, math.dist),
        )
    },
    math.pow: (
        f"math.pow: {_TRANSCENDENTAL}",
        "Multiply: x * x; math.sqrt(x) is x to the power 0.5.",
    ),
}
