"""The checker: whether a function is in the subset, and the type of everything in it.

Interface: `check(source, wrap) -> Checked`, or InvalidProgram at the first thing that is not.
Types are found by going over the function until nothing changes: a variable has one type, a bool
may become an int, and an int never becomes a float. Each pass also follows control, so that a
variable is never read before it has a value and every path ends in a return.
"""

from __future__ import annotations

import ast
from typing import Any

from manifold.vm.python.arrays import array
from manifold.vm.python.constants import Constants
from manifold.vm.python.expressions import ExpressionChecker
from manifold.vm.python.kinds import LETTERS, ArrayType, Checked, an, fits, joined, word
from manifold.vm.python.refusals import EXPRESSIONS, STATEMENTS
from manifold.vm.python.registers import Registers
from manifold.vm.python.source import Source
from manifold.vm.syntax.program import ARGUMENTS_MAX, ARRAY_BYTES_MAX

# A variable that starts from a constant and only ever goes up or down by small constants cannot
# overflow: 2^62 / 16 steps of a nanosecond are nine years.
COUNTER_START_MAX = 1 << 61
COUNTER_STEP_MAX = 16


def check(source: Source, wrap: bool) -> Checked:
    """The function of `source`, checked."""
    checked = Checked(source, wrap, _parameters(source))
    local = set(checked.parameters) | {
        each.id
        for each in ast.walk(source.tree)
        if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)
    }
    constants = Constants(source, local)
    _Assignments(Registers(source, constants)).visit(source.tree)
    checker = Checker(checked, constants)
    checker.function()
    return checked


class _Assignments(ast.NodeTransformer):
    """`a += b` becomes `a = a + b`: nothing in the subset can tell, but for globals."""

    def __init__(self, registers: Registers) -> None:
        self.registers = registers

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        if self.registers.name_of(node.target) is not None:
            return self.of_global(node)
        if not isinstance(node.target, (ast.Name, ast.Subscript)):
            return node
        if isinstance(node.target, ast.Subscript) and self.registers.are_in(node.target.slice):
            raise self.registers.source.refuse(
                node.target.slice,
                "this index reads a global, and would do so twice: to read and to write.",
                "Give it a variable first: i = ...; a[i] += 1.",
            )
        read: ast.expr
        if isinstance(node.target, ast.Name):
            read = ast.copy_location(ast.Name(node.target.id, ast.Load()), node.target)
        else:
            at = node.target
            read = ast.copy_location(ast.Subscript(at.value, at.slice, ast.Load()), at)
        value = ast.copy_location(ast.BinOp(read, node.op, node.value), node)
        return ast.copy_location(ast.Assign([node.target], value), node)

    def of_global(self, node: ast.AugAssign) -> ast.AST:
        """`-=` adds the opposite. Nothing else is one step."""
        if isinstance(node.op, ast.Sub):
            value = ast.copy_location(ast.UnaryOp(ast.USub(), node.value), node.value)
            return ast.copy_location(ast.AugAssign(node.target, ast.Add(), value), node)
        if isinstance(node.op, ast.Add):
            return node
        raise self.registers.source.refuse(
            node,
            "only += and -= change a global in one step.",
            "Read it, compute, and propose(name, what was read, the new value) until that is ok.",
        )


def _parameters(source: Source) -> dict[str, str]:
    """Names and letters; refuses what is not annotated."""
    arguments = source.tree.args
    for other in (arguments.vararg, arguments.kwarg, *arguments.kwonlyargs):
        if other is not None:
            raise source.refuse(
                other, "a kernel takes a fixed number of parameters.", "Name each of them."
            )
    for default in arguments.defaults:
        raise source.refuse(default, "parameters have no defaults.", "Pass the value, or write it.")
    found = {}
    for each in (*arguments.posonlyargs, *arguments.args):
        letter = LETTERS.get(_annotated(each.annotation))
        if letter is None:
            raise source.refuse(
                each,
                f"the parameter {each.arg} needs its type.",
                f"Write {each.arg}: int, {each.arg}: float or {each.arg}: bool.",
            )
        found[each.arg] = letter
    if len(found) > ARGUMENTS_MAX:
        raise source.refuse(
            source.tree, f"a kernel takes at most {ARGUMENTS_MAX} parameters.", "Use an array."
        )
    return found


def _annotated(node: ast.AST | None) -> str:
    """The annotation as text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    return ast.unparse(node) if node is not None else ""


class Checker(ExpressionChecker):
    """Statements; see the module."""

    def __init__(self, checked: Checked, constants: Constants) -> None:
        super().__init__(checked, constants)
        self.breaks: list[list[set[str] | None]] = []  # of the loops around: states at each break
        self.stores: dict[str, list[ast.AST]] = {}  # what each variable is given

    def function(self) -> None:
        checked, tree = self.checked, self.source.tree
        checked.leaves = self.declared()
        for name, letter in checked.parameters.items():
            checked.variables[name] = letter
        self.changed = True
        while self.changed:
            self.changed = False
            self.stores = {}
            self.assigned = set(checked.parameters)
            self.block(tree.body)
            if self.assigned is not None:
                raise self.refuse(
                    tree.body[-1],
                    "the function can end here without a return, but a kernel has a result.",
                    "Add a return at the end.",
                )
            if not self.changed:
                self.settle_globals()
        if "?" in checked.leaves:
            raise self.refuse(
                tree, "the type of the result cannot be found.", "Write -> int or -> float."
            )
        known = self.constants.known.items()
        checked.constants = {node: value for node, value in known if value is not None}
        self.find_counters()

    def settle_globals(self) -> None:
        """What nothing says to be a float is an int."""
        for name, letter in self.checked.globals.items():
            if letter == "?":
                self.checked.globals[name] = "i"
                self.changed = True

    def declared(self) -> str:
        """The letters of the annotated result; `?` where nothing is annotated."""
        node = self.source.tree.returns
        text = _annotated(node)
        if node is None:
            return "?"
        if text in LETTERS:
            return LETTERS[text]
        inside = text.removeprefix("tuple[").removesuffix("]")
        letters = [LETTERS.get(each.strip(), "") for each in inside.split(",")]
        if not text.startswith("tuple[") or "" in letters or len(letters) < 2:
            raise self.refuse(
                node,
                f"a kernel does not return {text}.",
                "Return int, float, bool, or several: -> tuple[int, float].",
            )
        return "".join(letters)

    def find_counters(self) -> None:
        """Variables of which the code writer knows bounds; see COUNTER_STEP_MAX."""
        counters, looped = set(), set()
        for name, given in self.stores.items():
            if name in self.checked.parameters or self.checked.variables.get(name) != "i":
                continue
            if all(isinstance(each, ast.For) for each in given):
                looped.add(name)
            elif all(self.counts(name, each) for each in given):
                counters.add(name)
        self.checked.counters, self.checked.looped = frozenset(counters), frozenset(looped)

    def counts(self, name: str, given: ast.AST) -> bool:
        start = self.constants.whole(given)
        if start is not None:
            return abs(start) <= COUNTER_START_MAX
        if not isinstance(given, ast.BinOp) or not isinstance(given.op, (ast.Add, ast.Sub)):
            return False
        step = self.constants.whole(given.right)
        is_name = isinstance(given.left, ast.Name) and given.left.id == name
        return is_name and step is not None and abs(step) <= COUNTER_STEP_MAX

    # -- statements --------------------------------------------------------------------------

    def block(self, body: list[ast.stmt]) -> None:
        for each in body:
            self.statement(each)

    def statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Assign():
                self.assignment(node)
            case ast.AnnAssign():
                self.annotated_assignment(node)
            case ast.AugAssign() if self.registers.name_of(node.target) is not None:
                self.give(node.target, self.number(node.value), node)
            case ast.If():
                self.branch(node)
            case ast.While():
                self.while_loop(node)
            case ast.For():
                self.for_loop(node)
            case ast.Return():
                self.leave(node)
            case ast.Break():
                self.breaks[-1].append(self.assigned)
                self.assigned = None
            case ast.Continue():
                self.assigned = None
            case ast.Assert():
                self.asserted(node)
            case ast.Pass():
                pass
            case ast.Expr():
                self.alone(node)
            case _:
                name = type(node).__name__
                default = (f"kernels have no {name}.", "See docs/python.md.")
                raise self.refuse(node, *STATEMENTS.get(type(node), default))

    def alone(self, node: ast.Expr) -> None:
        """An expression as a statement: a docstring, or a call for its faults."""
        value = node.value
        if isinstance(value, ast.Constant) and (value.value is ... or isinstance(value.value, str)):
            return
        if isinstance(value, ast.Call):
            self.expression(value, ring=False)
        elif type(value) in EXPRESSIONS:
            raise self.unknown(value)
        else:
            raise self.refuse(node, "the value is not used.", "Assign it, or leave it out.")

    def asserted(self, node: ast.Assert) -> None:
        self.truth(node.test)
        if node.msg is not None and not (
            isinstance(node.msg, ast.Constant) and isinstance(node.msg.value, str)
        ):
            raise self.refuse(node.msg, "the text of an assert is a constant.", 'Write "text".')

    def leave(self, node: ast.Return) -> None:
        if node.value is None:
            raise self.refuse(
                node, "a kernel returns a value.", "Write return 0, or what it found."
            )
        found = self.values(node.value)
        before = self.checked.leaves
        declared = self.source.tree.returns is not None
        both = joined(before, found)
        if both is None or (declared and both != before):
            where = "is declared" if declared else "is elsewhere"
            raise self.refuse(
                node,
                f"this returns {an(found)}, but the result {where} {an(before)}.",
                "Convert it, or write the constant with a point.",
            )
        self.changed |= both != before
        self.checked.leaves = both
        self.assigned = None

    # -- assignments -------------------------------------------------------------------------

    def assignment(self, node: ast.Assign) -> None:
        wanted = self.array_type(node.value)
        if wanted is not None:
            self.declare(node, wanted)
            return
        letters = self.values(node.value)
        for target in node.targets:
            if not isinstance(target, (ast.Tuple, ast.List)):
                self.give(target, letters, node.value)
                continue
            if letters != "?" and len(letters) != len(target.elts):
                raise self.refuse(
                    node, f"{len(target.elts)} names for {len(letters)} values.", "Name each."
                )
            parts = node.value.elts if isinstance(node.value, ast.Tuple) else []
            for at, each in enumerate(target.elts):
                letter = "?" if letters == "?" else letters[at]
                self.give(each, letter, parts[at] if parts else node)

    def annotated_assignment(self, node: ast.AnnAssign) -> None:
        if node.value is None:
            raise self.refuse(node, "a declaration alone does nothing.", "Give it a value: x = 0.0")
        wanted = self.array_type(node.value)
        if wanted is not None:
            self.declare(node, wanted)
            return
        letter, text = self.number(node.value), _annotated(node.annotation)
        if text in LETTERS and not isinstance(node.value, ast.Call):
            name = self.checked.touched.get(node.value)
            if name is not None:  # a global, which gets its type here
                letter = self.global_given(node.value, name, LETTERS[text])
        if text not in LETTERS or not fits(letter, LETTERS[text]):
            raise self.refuse(
                node, f"this is {an(letter)}, not {text}.", "Convert it, or write it so."
            )
        given = node.value if LETTERS[text] == letter else node
        self.give(node.target, LETTERS[text], given)

    def give(self, target: ast.AST, letters: str, given: ast.AST) -> None:
        """`target = ` something of type `letters`."""
        register = self.registers.name_of(target)
        if register is not None:
            self.checked.touched[target] = register
            self.global_given(target, register, letters)
        elif isinstance(target, ast.Subscript):
            letter = self.array_at(target)
            if not fits(letters, letter):
                raise self.refuse(
                    target,
                    f"the array holds values of type {word(letter)}, this is {an(letters)}.",
                    "Convert it, or write the constant with a point.",
                )
        elif isinstance(target, ast.Name):
            self.give_name(target, letters, given)
        elif isinstance(target, ast.Starred):
            raise self.unknown(target)
        else:
            raise self.refuse(
                target,
                "values go to variables, elements of arrays and flat tuples of them.",
                "Name each of them.",
            )

    def give_name(self, target: ast.Name, letters: str, given: ast.AST) -> None:
        name, variables = target.id, self.checked.variables
        if len(letters) > 1:
            raise self.refuse(
                target, f"{name} would hold {len(letters)} values.", "Name each: a, b = ..."
            )
        if name in self.checked.arrays:
            raise self.refuse(target, f"{name} is an array already.", "Use another name.")
        before = variables.get(name, "?")
        both = joined(before, letters)
        if both is None or (name in self.checked.parameters and both != before):
            raise self.refuse(
                target,
                f"{name} is {an(before)} elsewhere, but {an(letters)} here: a variable has one "
                "type.",
                f"Write {name} = 0.0 where it starts, convert, or use another name.",
            )
        self.changed |= both != before
        variables[name] = both
        self.stores.setdefault(name, []).append(given)
        if self.assigned is not None:
            self.assigned.add(name)

    def declare(self, node: ast.Assign | ast.AnnAssign, wanted: ArrayType) -> None:
        targets: list[Any] = node.targets if isinstance(node, ast.Assign) else [node.target]
        name = targets[0].id if isinstance(targets[0], ast.Name) else ""
        if len(targets) != 1 or not name:
            raise self.refuse(node, "an array is given to one variable.", "a = [0.0] * 64")
        if name in self.checked.variables:
            raise self.refuse(node, f"{name} is a number elsewhere.", "Use another name.")
        before = self.checked.arrays.get(name)
        if before is not None and before.length != wanted.length:
            raise self.refuse(
                node, f"{name} has {before.length} elements elsewhere.", "Use another name."
            )
        letter = joined(before.letter if before else "?", wanted.letter)
        if letter is None:
            raise self.refuse(node, f"{name} has other elements elsewhere.", "Use another name.")
        self.changed |= before is None or letter != before.letter
        self.checked.arrays[name] = ArrayType(letter, wanted.length)
        if self.assigned is not None:
            self.assigned.add(name)

    def array_type(self, node: ast.AST | None) -> ArrayType | None:
        """The array that `[0.0] * 64`, `[1, 2, 3]` or `manifold.array(float, 64)` makes."""
        match node:
            case ast.List(elts) if elts:
                return ArrayType(self.one_type(elts, "the elements of an array"), len(elts))
            case ast.BinOp(ast.List() as one, ast.Mult(), times) | ast.BinOp(
                times, ast.Mult(), ast.List() as one
            ):
                if len(one.elts) != 1:
                    raise self.refuse(one, "one value is repeated.", "Write [0.0] * 64.")
                return ArrayType(self.number(one.elts[0]), self.length(times))
            case ast.Call() if self.constants.object_of(node.func) is array:
                kind = node.args[0] if node.args else node
                name = kind.id if isinstance(kind, ast.Name) else ""
                if len(node.args) != 2 or node.keywords or name not in LETTERS:
                    raise self.refuse(
                        node, "array takes a type and a length.", "manifold.array(float, 64)"
                    )
                return ArrayType(LETTERS[name], self.length(node.args[1]))
        return None

    def length(self, node: ast.AST) -> int:
        value = self.constants.whole(node)
        if value is None or not 1 <= value <= ARRAY_BYTES_MAX // 8:
            raise self.refuse(
                node,
                "an array's length is a constant, from 1 to "
                f"{ARRAY_BYTES_MAX // 8}, when the kernel is decorated.",
                "Make it as long as it can get, and count what is used.",
            )
        return value

    # -- control -----------------------------------------------------------------------------

    def branch(self, node: ast.If) -> None:
        self.truth(node.test)
        before = _copy(self.assigned)
        self.block(node.body)
        after, self.assigned = self.assigned, before
        self.block(node.orelse)
        self.assigned = _both(after, self.assigned)

    def while_loop(self, node: ast.While) -> None:
        self.truth(node.test)
        endless = bool(self.constants.constant(node.test))
        self.loop(node, None if endless else _copy(self.assigned))

    def for_loop(self, node: ast.For) -> None:
        call = node.iter
        is_range = isinstance(call, ast.Call) and self.constants.object_of(call.func) is range
        if not is_range or not isinstance(call, ast.Call):
            raise self.refuse(
                call, "kernels loop over range only.", "for i in range(len(a)): ... a[i] ..."
            )
        if not 1 <= len(call.args) <= 3 or call.keywords:
            raise self.refuse(call, "range takes one to three ints.", "range(start, stop, step)")
        for each in call.args:
            if self.number(each) == "f":
                raise self.refuse(each, "range takes ints.", "Write int(...).")
        if len(call.args) == 3 and self.constants.whole(call.args[2]) == 0:
            raise self.refuse(call.args[2], "the step of range is zero.", "Use another step.")
        if not isinstance(node.target, ast.Name):
            raise self.refuse(node.target, "a loop counts in one variable.", "for i in range(n):")
        before = _copy(self.assigned)
        self.give_name(node.target, "i", node)
        self.loop(node, before)

    def loop(self, node: ast.While | ast.For, after: set[str] | None) -> None:
        """The body, `else`, and what holds behind: `after` where the loop ends by itself."""
        self.breaks.append([])
        self.block(node.body)
        self.assigned = after
        breaks = self.breaks.pop()
        self.block(node.orelse)
        for each in breaks:
            self.assigned = _both(self.assigned, each)


def _copy(assigned: set[str] | None) -> set[str] | None:
    return None if assigned is None else set(assigned)


def _both(left: set[str] | None, right: set[str] | None) -> set[str] | None:
    """What has a value whichever way control came."""
    if left is None or right is None:
        return left if right is None else right
    return left & right
