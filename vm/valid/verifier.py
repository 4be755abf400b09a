"""The verifier: abstract interpretation over the control-flow graph.

Interface: `verify(program) -> Verified`.
What holds of a `Verified` program, and what the compiler relies on:
  V1  control never leaves the instructions; RET stands only in functions, and each instruction
      belongs to at most one function;
  V2  at every instruction the depth of the stack and the type of every entry are known; no path
      underflows, none exceeds STACK_MAX; a function takes and leaves what it declares;
  V3  every cell has one type, i64 or f64; every cell, array and function named exists;
  V4  what needs an i64 (bit operations, array indices, i64 globals) gets one.
A JSON program whose depth differs at a join, or whose stack can underflow or outgrow the bound, is
legal there: it comes back with `dynamic` saying why, and runs in the interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from manifold.vm.errors import InvalidProgram
from manifold.vm.syntax.isa import Immediate
from manifold.vm.syntax.program import Instruction, Program, Type
from manifold.vm.valid.gas import Plan, plan
from manifold.vm.valid.graph import Graph, explore, shape
from manifold.vm.valid.types import Types, names

STACK_MAX = 256  # values in one function: with spills at most 4 KiB of native frame
CALL_DEPTH_MAX = 1024  # calls inside each other: 4 MiB of native stack at most
JOIN_ENTRIES_MAX = 1 << 17  # stack entries at joins, summed: under a second of the verifier
BLOCKS_MAX = 4096  # straight pieces of code, summed: the WebAssembly engine's time grows faster


@dataclass(frozen=True, slots=True)
class Flow:
    """One function, checked. The main program is a function that takes and leaves nothing."""

    graph: Graph
    plan: Plan
    takes: str  # letters of types, `i` or `f`
    leaves: str


@dataclass(frozen=True, slots=True)
class Verified:
    """A program that cannot go wrong other than by its documented faults."""

    program: Program
    main: Flow | None  # None exactly if `dynamic`
    functions: dict[int, Flow]  # by number; only those that can be called
    cells: str  # a letter for each cell
    emits: str = "if"  # the types of what it emits
    dynamic: str = ""

    @property
    def flows(self) -> tuple[Flow, ...]:
        """The main program and its functions; empty if `dynamic`."""
        return (self.main, *self.functions.values()) if self.main else ()


def first_argument(program: Program) -> int:
    """Cells before it hold the index, or start and end."""
    return 1 if program.kind == "index" and program.dialect == "ent" else 2


def verify(program: Program) -> Verified:
    """Checks `program`; see the module's V1 to V4."""
    _check_instructions(program)
    checker = _Checker(program)
    try:
        return checker.check()
    except _DynamicError as reason:
        return Verified(program, None, {}, "f" * program.cells, "f", str(reason))


class _DynamicError(Exception):
    """The JSON program needs a stack whose depth is only known when it runs."""


def _refuse(program: Program, at: int, reason: str, next_step: str = "") -> InvalidProgram:
    each = program.instructions[at]
    text = program.text_of(at)
    return InvalidProgram(
        f"{program.filename or 'program'}, line {each.line}, {text}: {reason}",
        next_step,
        line=each.line,
        instruction=text,
    )


def _check_instructions(program: Program) -> None:
    """V3's ranges, and what the dialect and this release have."""
    needed = first_argument(program) + len(program.arguments)
    if program.cells < needed:
        raise InvalidProgram(
            f"{program.filename or 'program'}: {program.cells} cells; the index and the arguments "
            f"need {needed}.",
            f"Write .cells {needed}.",
        )
    for at, each in enumerate(program.instructions):
        spec = each.spec
        if spec.reserved:
            later = "channels" if spec.immediate is Immediate.CHANNEL else "shared arrays"
            raise _refuse(program, at, f"this release does not have {later}.")
        if program.dialect == "json" and not (spec.seed or spec.name == "UNKNOWN"):
            raise _refuse(program, at, f"the JSON dialect has no {spec.name}.")
        if program.dialect == "ent" and spec.name == "UNKNOWN":
            raise _refuse(program, at, "only the JSON dialect has unknown instructions.")
        if spec.immediate is Immediate.CELL and int(each.operand or 0) >= program.cells:
            raise _refuse(
                program, at, f"there are {program.cells} cells, 0 to {program.cells - 1}."
            )


@dataclass(slots=True)
class _Function:
    """A function while it is checked."""

    graph: Graph
    takes: list[int]
    leaves: list[int]
    is_main: bool
    entry_nodes: dict[int, list[int]] = field(default_factory=dict)  # block -> stack on entry
    came_from: dict[int, int] = field(default_factory=dict)  # block -> instruction that led there


class _Checker:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.json = program.dialect == "json"
        self.types = Types()
        self.cells = [self.types.fixed(self.json) for _ in range(program.cells)]
        self.integers: list[tuple[int, int]] = []  # node, instruction: must be an i64
        self.emitted: list[int] = []  # nodes
        self.join_entries = 0

    def check(self) -> Verified:
        program = self.program
        self.declare_cells()
        signatures = [
            (
                [self.types.fixed(False) for _ in range(each.takes)],
                [self.types.fixed(False) for _ in range(each.leaves)],
            )
            for each in program.functions
        ]
        main = _Function(explore(program, program.entry), [], [], is_main=True)
        self.find_functions(main, signatures)
        everything = [main, *self.functions.values()]
        self.check_size(everything)
        self.check_ownership(everything)
        for function in everything:
            self.walk(function)
        self.types.solve()
        self.check_types()
        return Verified(
            program,
            self.finish(main),
            {number: self.finish(each) for number, each in self.functions.items()},
            "".join(self.types.letter(node) for node in self.cells),
            "".join(sorted({self.types.letter(node) for node in self.emitted})),
        )

    def find_functions(
        self, main: _Function, signatures: list[tuple[list[int], list[int]]]
    ) -> None:
        """The functions that can be called, from the main program or from one another."""
        program = self.program
        work = [main]
        found: dict[int, _Function] = {}
        while work:
            for block in work.pop().graph.blocks:
                for each in program.instructions[block.start : block.end]:
                    if each.spec.name != "CALL":
                        continue
                    number = int(each.operand or 0)
                    if number not in found:
                        graph = explore(program, program.functions[number].entry)
                        found[number] = _Function(graph, *signatures[number], is_main=False)
                        work.append(found[number])
        self.functions = dict(sorted(found.items()))

    def declare_cells(self) -> None:
        """The runtime writes the index and the arguments."""
        first = first_argument(self.program)
        for at, kind in enumerate(self.program.arguments):
            self.cells[first + at] = self.types.fixed(kind == "f64" or self.json)

    def check_size(self, functions: list[_Function]) -> None:
        """BLOCKS_MAX: compiling must not take longer than a few seconds."""
        count = sum(len(each.graph.blocks) for each in functions)
        if count > BLOCKS_MAX:
            raise InvalidProgram(
                f"{self.program.filename or 'program'}: jumps and labels cut it into {count} "
                f"pieces; the limit is {BLOCKS_MAX}.",
                "Write loops, or an array that says what to do.",
            )

    def check_ownership(self, functions: list[_Function]) -> None:
        """V1: no instruction in two functions."""
        owner: dict[int, int] = {}
        for which, function in enumerate(functions):
            for block in function.graph.blocks:
                for at in range(block.start, block.end):
                    if owner.setdefault(at, which) != which:
                        raise _refuse(
                            self.program,
                            at,
                            "two functions (or the main program and one) run into each other here.",
                            "End each with RET, HALT or JMP.",
                        )

    # -- the stack ---------------------------------------------------------------------------

    def walk(self, function: _Function) -> None:
        """V2's depths, and the nodes whose types V2 to V4 speak of."""
        graph = function.graph
        start = list(function.takes)
        if graph.blocks[0].predecessors:  # the entry is a join: its slots may get other values
            start = self.join_slots(start, graph.entry, self.line(0, function))
        function.entry_nodes[0] = start
        function.came_from[0] = graph.entry
        for at, block in enumerate(graph.blocks):
            stack = list(function.entry_nodes[at])
            for here in range(block.start, block.end):
                self.step(function, here, stack)
            for to in block.successors:
                self.arrive(function, to, stack, block.end - 1)

    def join_slots(self, stack: list[int], at: int, line: int) -> list[int]:
        """Fresh nodes for a stack on entry to a block that several paths reach."""
        self.join_entries += len(stack)
        if self.join_entries > JOIN_ENTRIES_MAX:
            raise _refuse(self.program, at, f"more than {JOIN_ENTRIES_MAX} stack entries at joins.")
        slots = [self.types.fixed(False) for _ in stack]
        for number, (source, slot) in enumerate(zip(stack, slots, strict=True)):
            self.types.flows(source, slot, at, f"stack entry {number + 1} at line {line}")
        return slots

    def arrive(self, function: _Function, to: int, stack: list[int], source: int) -> None:
        """The stack at the end of one block flows into the next."""
        block = function.graph.blocks[to]
        known = function.entry_nodes.get(to)
        if known is None:
            function.came_from[to] = source
            line = self.line(to, function)
            is_join = len(block.predecessors) > 1
            known = self.join_slots(stack, source, line) if is_join else list(stack)
            function.entry_nodes[to] = known
            return
        if len(known) != len(stack):
            self.disagree(function, to, known, stack, source)
        for slot, (value, into) in enumerate(zip(stack, known, strict=True)):
            self.types.flows(
                value, into, source, f"stack entry {slot + 1} at line {self.line(to, function)}"
            )

    def line(self, block: int, function: _Function) -> int:
        return self.program.instructions[function.graph.blocks[block].start].line

    def disagree(
        self, function: _Function, to: int, known: list[int], stack: list[int], source: int
    ) -> None:
        """V2: two depths meet."""
        start = function.graph.blocks[to].start
        self.types.solve()
        before = names("".join(map(self.types.letter, known)))
        now = names("".join(map(self.types.letter, stack)))
        lines = [self.program.instructions[e].line for e in (function.came_from[to], source)]
        reason = (
            f"the stack is {before} coming from line {lines[0]} but {now} from line {lines[1]}."
        )
        if self.json:
            line = self.program.instructions[start].line
            raise _DynamicError(f"instruction {start}, line {line}: {reason}")
        raise _refuse(self.program, start, reason, "Leave the same on the stack on every path.")

    def take(self, function: _Function, at: int, stack: list[int], count: int) -> list[int]:
        if len(stack) < count:
            reason = f"takes {count} values, but the stack is {self.state(stack)}."
            self.escape(at, reason)
        taken = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return taken

    def state(self, stack: list[int]) -> str:
        self.types.solve()
        return names("".join(map(self.types.letter, stack)))

    def escape(self, at: int, reason: str) -> None:
        """A static stack cannot hold this: JSON programs become dynamic, others are refused."""
        if self.json:
            line = self.program.instructions[at].line
            text = self.program.text_of(at)
            raise _DynamicError(f"instruction {at}, line {line}, {text}: {reason}")
        raise _refuse(self.program, at, reason)

    def step(self, function: _Function, at: int, stack: list[int]) -> None:
        """One instruction on the abstract stack."""
        each = self.program.instructions[at]
        spec = each.spec
        if spec.name == "CALL":
            called = self.functions[int(each.operand or 0)]
            for number, (value, slot) in enumerate(
                zip(self.take(function, at, stack, len(called.takes)), called.takes, strict=True)
            ):
                self.types.flows(value, slot, at, f"value {number + 1} that the function takes")
            stack += called.leaves
        elif spec.name == "RET":
            self.leave(function, at, stack)
        else:
            takes, leaves = spec.stack_of(json=self.json)
            taken = self.take(function, at, stack, len(takes))
            for value, wanted in zip(taken, takes, strict=True):
                if wanted == "i" or (wanted == "g" and self.global_type(each) == "i64"):
                    self.integers.append((value, at))
            self.effects(each, at, taken)
            stack += [self.left(each, letter, taken) for letter in leaves]
        if len(stack) > STACK_MAX:
            self.escape(at, f"the stack grows beyond {STACK_MAX} values.")

    def leave(self, function: _Function, at: int, stack: list[int]) -> None:
        if function.is_main:
            raise _refuse(
                self.program, at, "the main program has nowhere to return to.", "Use HALT."
            )
        if len(stack) != len(function.leaves):
            raise _refuse(
                self.program,
                at,
                f"the function leaves {len(function.leaves)} values, but the stack is "
                f"{self.state(stack)}.",
            )
        for number, (value, slot) in enumerate(zip(stack, function.leaves, strict=True)):
            self.types.flows(value, slot, at, f"value {number + 1} that the function leaves")

    def effects(self, each: Instruction, at: int, taken: list[int]) -> None:
        """What an instruction writes elsewhere."""
        name = each.spec.name
        if name == "STORE":
            cell = int(each.operand or 0)
            self.types.flows(taken[0], self.cells[cell], at, f"cell {cell}")
        elif name in ("EMIT", "PRINT"):
            self.emitted.append(taken[0])
        elif name == "STOREI":
            array = self.program.arrays[int(each.operand or 0)]
            if array.type == "i64":
                self.integers.append((taken[0], at))

    def global_type(self, each: Instruction) -> Type:
        return self.program.globals[int(each.operand or 0)].type

    def left(self, each: Instruction, letter: str, taken: list[int]) -> int:
        """The node of a value that an instruction leaves (letters: see vm/syntax/isa.py)."""
        if letter in "123":
            return taken[int(letter) - 1]
        if letter == "m":
            return self.cells[int(each.operand or 0)]
        if self.json or letter == "f":
            return self.types.fixed(True)
        if letter == "j":
            return self.types.join(*taken)
        if letter == "c":
            return self.types.fixed(isinstance(each.operand, float))
        if letter == "a":
            return self.types.fixed(self.program.arrays[int(each.operand or 0)].type == "f64")
        if letter == "g":
            return self.types.fixed(self.global_type(each) == "f64")
        assert letter in "is"
        return self.types.fixed(False)

    # -- the types ---------------------------------------------------------------------------

    def check_types(self) -> None:
        wrong = self.types.disagreement()
        if wrong is not None:
            flowing, other = wrong
            line = ""
            if other is not None:
                line = f" (line {self.program.instructions[other.at].line})"
            raise _refuse(
                self.program,
                flowing.at,
                f"{flowing.what} would be an i64 here but is an f64 elsewhere{line}.",
                "Convert with FLOAT or INT, or write the constant with a point.",
            )
        for node, at in self.integers:
            if self.types.letter(node) == "f":
                raise _refuse(
                    self.program, at, "needs an i64, but the value is an f64.", "Convert with INT."
                )
        first = first_argument(self.program)
        index: Type = "i64"
        given = [index] * first + list(self.program.arguments)
        for cell, kind in enumerate(() if self.json else given):
            if self.types.letter(self.cells[cell]) != type_letter(kind):
                what = "the index" if cell < first else "an argument"
                raise InvalidProgram(
                    f"{self.program.filename or 'program'}: cell {cell} holds {what}, an {kind}, "
                    "and is also given an f64.",
                    "Use another cell.",
                )

    def finish(self, function: _Function) -> Flow:
        graph = function.graph
        for at, block in enumerate(graph.blocks):
            block.types = "".join(self.types.letter(node) for node in function.entry_nodes[at])
        shape(graph)
        return Flow(
            graph,
            plan(self.program, graph),
            "".join(self.types.letter(node) for node in function.takes),
            "".join(self.types.letter(node) for node in function.leaves),
        )


def type_letter(kind: Type) -> str:
    """`i` or `f`."""
    return "f" if kind == "f64" else "i"
