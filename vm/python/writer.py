"""Statements and calls of a kernel as instructions, and the program around them.

Interface: `write(checked, over_range=...) -> Program`. A program over a range takes its index in
cell 0 and the other parameters as arguments; one that is called takes all of them as arguments.
A kernel that is called is copied in where it is called, with cells of its own. One that calls
itself becomes a function; since cells are shared, a call of itself keeps what is in use on the
stack. A kernel can only call what was defined before it, so no longer circles exist.
"""

from __future__ import annotations

import ast
import math

from manifold.vm.python.code import Code, Label
from manifold.vm.python.kinds import SELF, ArrayType, Checked, KernelBase
from manifold.vm.python.numbers import Frame, NumberWriter, wrapped
from manifold.vm.syntax.program import I64_MAX, I64_MIN, Program

FIRST_ARGUMENT = 1  # cell 0 holds the index, wanted or not


def write(checked: Checked, *, over_range: bool) -> Program:
    """The program of a checked function."""
    letters = "".join(checked.parameters.values())
    assert not over_range or letters.startswith("i")
    first = 0 if over_range else FIRST_ARGUMENT
    code = Code(checked.source.filename, letters[1 - first :], FIRST_ARGUMENT, checked.globals)
    cells = {name: first + at for at, name in enumerate(checked.parameters)}
    writer = Writer(code, Frame(checked, cells, 0, is_main=True))
    writer.program()
    return code.build()


class Writer(NumberWriter):
    """See the module."""

    def __init__(self, code: Code, frame: Frame) -> None:
        super().__init__(code, frame)
        self.functions: dict[int, tuple[int, Label, Checked]] = {}  # by the identity of `Checked`
        self.arrays: dict[tuple[int, str], int] = {}

    def program(self) -> None:
        main = self.frame
        checked = main.checked
        self.code.line = checked.source.line(checked.source.tree)
        if checked.recursive:
            for cell in main.cells.values():
                self.code.op("LOAD", cell)
            self.code.op("CALL", self.function(checked))
            self.emit(checked.leaves)
            self.code.op("HALT")
        else:
            self.body(main)
        written = 0
        while written < len(self.functions):  # writing one may ask for another
            _, label, called = list(self.functions.values())[written]
            self.write_function(label, called)
            written += 1

    def body(self, frame: Frame) -> None:
        """A frame's statements, with cells for its variables."""
        around, self.frame = self.frame, frame
        own = [each for each in frame.checked.variables.items() if each[0] not in frame.cells]
        for name, letter in own:
            frame.cells[name] = self.code.cell(letter)
        self.block(frame.checked.source.tree.body)
        for name, letter in own:
            self.code.free(frame.cells[name], letter)
        self.frame = around

    def write_function(self, label: Label, called: Checked) -> None:
        """A recursive kernel; it has cells that nobody else has."""
        self.code.dead = False
        self.code.keep_cells()
        self.code.mark(label)
        cells = {name: self.code.cell(letter) for name, letter in called.variables.items()}
        frame = Frame(called, cells, self.frame.line)
        self.lent = []
        self.frame = frame
        self.touch(called.source.tree)
        for name in reversed(called.parameters):
            self.code.op("STORE", cells[name])
        self.block(called.source.tree.body)

    def function(self, called: Checked) -> int:
        """The number of the function of a recursive kernel."""
        known = self.functions.get(id(called))
        if known is None:
            number, label = self.code.function(len(called.parameters), len(called.leaves))
            known = self.functions[id(called)] = number, label, called
        return known[0]

    # -- calls -------------------------------------------------------------------------------

    def call(self, node: ast.Call) -> None:
        callee = self.frame.checked.calls[node]
        if callee == SELF:
            self.call_itself(node)
        elif isinstance(callee, KernelBase):
            self.touch(node)
            for each in node.args:
                self.expression(each)
            if callee.checked.recursive:
                self.code.op("CALL", self.function(callee.checked))
            else:
                self.copy(callee.checked)
        else:
            assert isinstance(callee, str)
            if callee.startswith("globals."):
                self.global_call(callee, node)
            else:
                self.builtin(callee, node)

    def global_call(self, callee: str, node: ast.Call) -> None:
        for each in node.args[1:]:
            self.expression(each)
        self.touch(node)
        name = "ADD_GLOBAL" if callee == "globals.add" else "PROPOSE_GLOBAL"
        self.code.of_global(name, self.frame.checked.touched[node])

    def copy(self, called: Checked) -> None:
        """The body of another kernel; its arguments are on the stack, its results come there."""
        cells = {name: self.code.cell(letter) for name, letter in called.parameters.items()}
        for name in reversed(called.parameters):
            self.code.op("STORE", cells[name])
        # Lines of another file would mislead: what is copied from there counts as this line.
        same = called.source.path == self.frame.checked.source.path and not self.frame.line
        line, end = self.code.line, self.code.label()
        self.body(Frame(called, cells, 0 if same else line, leave=end))
        self.code.mark(end)
        self.code.line = line
        for name, letter in called.parameters.items():
            self.code.free(cells[name], letter)

    def call_itself(self, node: ast.Call) -> None:
        """What is in use stays on the stack meanwhile, below the arguments."""
        checked = self.frame.checked
        used = [(self.frame.cells[name], letter) for name, letter in checked.variables.items()]
        used += self.lent
        for cell, _ in used:
            self.code.op("LOAD", cell)
        for each in node.args:
            self.expression(each)
        self.touch(node)
        self.code.op("CALL", self.function(checked))
        with self.cells(checked.leaves) as results:
            for cell in reversed(results):
                self.code.op("STORE", cell)
            for cell, _ in reversed(used):
                self.code.op("STORE", cell)
            for cell in results:
                self.code.op("LOAD", cell)

    def array(self, name: str) -> int:
        """One array for all copies of a kernel: two of them are never under way at once."""
        checked = self.frame.checked
        key = id(checked), name
        if key not in self.arrays:
            label = f"{checked.name}.{name}"
            label = "".join(c if c.isascii() and (c.isalnum() or c in "_.") else "_" for c in label)
            self.arrays[key] = self.code.array(label, checked.arrays[name])
        return self.arrays[key]

    # -- statements --------------------------------------------------------------------------

    def block(self, body: list[ast.stmt]) -> None:
        for each in body:
            self.touch(each)
            self.statement(each)

    def statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Assign():
                self.assignment(node.targets, node.value)
            case ast.AnnAssign():
                assert node.value is not None
                self.assignment([node.target], node.value)
            case ast.AugAssign():
                self.expression(node.value)
                self.code.of_global("ADD_GLOBAL", self.frame.checked.touched[node.target])
                self.code.op("POP")
            case ast.If():
                self.branch(node)
            case ast.While():
                self.while_loop(node)
            case ast.For():
                self.for_loop(node)
            case ast.Return():
                assert node.value is not None
                self.leave(node.value)
            case ast.Break():
                self.code.op("JMP", self.frame.loops[-1][1])
            case ast.Continue():
                self.code.op("JMP", self.frame.loops[-1][0])
            case ast.Assert():
                self.asserted(node)
            case ast.Expr(ast.Call() as call):
                self.expression(call)
                self.code.ops(*["POP"] * len(self.type(call)))

    def asserted(self, node: ast.Assert) -> None:
        fine = self.code.label()
        self.jump_if(node.test, fine, True)
        text = f", {node.msg.value!s}" if isinstance(node.msg, ast.Constant) else ""
        self.code.raise_fault(f"assertion failed{text}")
        self.code.mark(fine)

    def branch(self, node: ast.If) -> None:
        other, end = self.code.label(), self.code.label()
        self.jump_if(node.test, other, False)
        self.block(node.body)
        if node.orelse:
            self.code.op("JMP", end)
        self.code.mark(other)
        self.block(node.orelse)
        self.code.mark(end)

    def values(self, node: ast.AST) -> str:
        """One or several values; their letters."""
        if isinstance(node, ast.Tuple):
            for each in node.elts:
                self.expression(each)
        else:
            self.expression(node)
        return self.type(node)

    def leave(self, value: ast.AST) -> None:
        if self.frame.is_main and isinstance(value, ast.Tuple):
            for each in value.elts:
                self.expression(each)
                self.code.op("EMIT")
            self.code.op("HALT")
            return
        letters = self.values(value)
        if self.frame.is_main:
            self.emit(letters)
            self.code.op("HALT")
        elif self.frame.leave is not None:
            self.code.op("JMP", self.frame.leave)
        else:
            self.code.op("RET")

    def emit(self, letters: str) -> None:
        """The values on the stack, the lowest first."""
        if len(letters) == 1:
            self.code.op("EMIT")
            return
        with self.cells(letters) as kept:
            for cell in reversed(kept):
                self.code.op("STORE", cell)
            for cell in kept:
                self.ops(("LOAD", cell), "EMIT")

    # -- assignments -------------------------------------------------------------------------

    def assignment(self, targets: list[ast.expr], value: ast.AST) -> None:
        target = targets[0]
        if isinstance(target, ast.Name) and target.id in self.frame.checked.arrays:
            self.make_array(target.id, value)
            return
        letters = self.values(value)
        for _ in targets[1:]:
            if len(letters) == 1:
                self.code.op("DUP")
        if len(letters) == 1:
            for each in targets:
                self.store(each)
            return
        names = [each.id for each in _parts(target) if isinstance(each, ast.Name)]
        if len(targets) == 1 and len(set(names)) == len(letters):  # in any order, then
            for each in reversed(_parts(target)):
                self.store(each)
            return
        with self.cells(letters) as kept:  # Python stores from left to right
            for cell in reversed(kept):
                self.code.op("STORE", cell)
            for each in targets:
                for part, cell in zip(_parts(each), kept, strict=True):
                    self.code.op("LOAD", cell)
                    self.store(part)

    def store(self, target: ast.AST) -> None:
        """The value on top goes to a variable or an element."""
        if isinstance(target, ast.Name):
            self.code.op("STORE", self.frame.cells[target.id])
        elif target in self.frame.checked.touched:
            self.code.of_global("STORE_GLOBAL", self.frame.checked.touched[target])
        else:
            assert isinstance(target, ast.Subscript)
            self.code.op("STOREI", self.element(target))

    def make_array(self, name: str, value: ast.AST) -> None:
        """Every index starts with zeros: only what is not sure to be new and zero is written."""
        number = self.array(name)
        kind, frame = self.frame.checked.arrays[name], self.frame
        is_new = frame.is_main and not frame.loops and name not in frame.declared
        frame.declared.add(name)
        if isinstance(value, ast.List):
            for at, each in enumerate(value.elts):
                self.expression(each)
                self.ops(("PUSH", at), ("STOREI", number))
            return
        first: ast.AST | None = None
        if isinstance(value, ast.BinOp):
            one = value.left if isinstance(value.left, ast.List) else value.right
            assert isinstance(one, ast.List)
            first = one.elts[0]
        if not (is_new and (first is None or self.is_zero(first))):
            self.fill(number, kind, first)

    def is_zero(self, node: ast.AST) -> bool:
        value = self.constant(node)
        return value is not None and value == 0 and math.copysign(1.0, value) > 0

    def fill(self, number: int, kind: ArrayType, first: ast.AST | None) -> None:
        with self.cells(kind.letter + "i") as (kept, at):
            again = self.code.label()
            if first is None:
                self.code.push(0.0 if kind.letter == "f" else 0)
            else:
                self.expression(first)
            self.ops(("STORE", kept), ("PUSH", 0), ("STORE", at))
            self.code.mark(again)
            self.ops(("LOAD", kept), ("LOAD", at), ("STOREI", number))
            self.ops(("LOAD", at), ("PUSH", 1), "ADD", "DUP", ("STORE", at))
            self.ops(("PUSH", kind.length), "LT", ("JNZ", again))

    # -- loops -------------------------------------------------------------------------------

    def while_loop(self, node: ast.While) -> None:
        head, ended, end = self.code.label(), self.code.label(), self.code.label()
        self.code.mark(head)
        self.jump_if(node.test, ended, False)
        self.inside(node, head, end)
        self.code.op("JMP", head)
        self.code.mark(ended)
        self.block(node.orelse)
        self.code.mark(end)

    def inside(self, node: ast.While | ast.For, again: Label, end: Label) -> None:
        self.frame.loops.append((again, end))
        self.block(node.body)
        self.frame.loops.pop()

    def for_loop(self, node: ast.For) -> None:
        """Counts in a cell of its own, since the body may write the variable."""
        assert isinstance(node.iter, ast.Call)
        args = node.iter.args
        start, stop = (args[0], args[1]) if len(args) > 1 else (None, args[0])
        step = self.constant(args[2]) if len(args) == 3 else 1
        with self.cells("iii") as (at, last, stride):
            if start is None:
                self.code.push(0)
            else:
                self.expression(start)
            self.code.op("STORE", at)
            limit = self.constant(stop)
            end = ("LOAD", last) if limit is None else ("PUSH", wrapped(int(limit)))
            if limit is None or step is None:
                self.expression(stop)
                self.code.op("STORE", last)
            if step is None:
                self.expression(args[2])
                self.ops("DUP", ("STORE", stride))
                self.raise_unless("JNZ", "range step is zero")
                self.any_step(node, at, last, stride)
            else:
                bound = self.frame.ranges.of(stop)
                self.fixed_step(node, at, end, int(step), bound)

    def fixed_step(
        self, node: ast.For, at: int, last: tuple[str, int], step: int, bound: tuple[int, int]
    ) -> None:
        head, again = self.code.label(), self.code.label()
        ended, end = self.code.label(), self.code.label()
        self.code.mark(head)
        self.ops(("LOAD", at), last, "LT" if step > 0 else "GT", ("JZ", ended))
        self.code.op("LOAD", at)
        self.store(node.target)
        self.inside(node, again, end)
        self.code.mark(again)
        self.touch(node)
        # Below `last` a step of one is safe; a longer one could run past the greatest i64.
        if step > 0 and bound[1] + step - 1 > I64_MAX:
            self.ops(("LOAD", at), ("PUSH", I64_MAX - step), "GT", ("JNZ", ended))
        elif step < 0 and bound[0] + step + 1 < I64_MIN:
            self.ops(("LOAD", at), ("PUSH", I64_MIN - step), "LT", ("JNZ", ended))
        self.ops(("LOAD", at), ("PUSH", step), "ADD", ("STORE", at), ("JMP", head))
        self.code.mark(ended)
        self.block(node.orelse)
        self.code.mark(end)

    def any_step(self, node: ast.For, at: int, last: int, stride: int) -> None:
        head, again, down = self.code.label(), self.code.label(), self.code.label()
        go, ended, end = self.code.label(), self.code.label(), self.code.label()
        self.code.mark(head)
        self.ops(("LOAD", stride), ("PUSH", 0), "LT", ("JNZ", down))
        self.ops(("LOAD", at), ("LOAD", last), "LT", ("JZ", ended), ("JMP", go))
        self.code.mark(down)
        self.ops(("LOAD", at), ("LOAD", last), "GT", ("JZ", ended))
        self.code.mark(go)
        self.code.op("LOAD", at)
        self.store(node.target)
        self.inside(node, again, end)
        self.code.mark(again)
        self.touch(node)
        with self.cells("i") as (following,):
            self.ops(("LOAD", at), ("LOAD", stride), "ADD", "DUP", ("STORE", following))
            # It has run past the ends of i64 if it went the other way.
            self.ops(("LOAD", at), "LT", ("LOAD", stride), ("PUSH", 0), "LT", "EQ")
            self.ops(("JZ", ended), ("LOAD", following), ("STORE", at), ("JMP", head))
        self.code.mark(ended)
        self.block(node.orelse)
        self.code.mark(end)


def _parts(target: ast.expr) -> list[ast.expr]:
    assert isinstance(target, (ast.Tuple, ast.List))
    return target.elts
