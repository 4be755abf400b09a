"""The instructions of a program while they are written.

Interface: `Code(filename)`; `op(name, operand)` appends, `label()` and `mark(label)` make jumps,
`cell(letter)` and `free(cell)` lend memory cells, `array(...)` and `function(...)` declare;
`build(...)` is the program. What control cannot reach is not written.
Invariant: C1 a cell holds values of one type, i64 or f64, for good.
"""

from __future__ import annotations

from manifold.vm.errors import InvalidProgram
from manifold.vm.python.kinds import ArrayType
from manifold.vm.syntax.isa import BY_NAME, NAMED, Immediate
from manifold.vm.syntax.program import (
    ARRAYS_MAX,
    CELLS_MAX,
    FUNCTIONS_MAX,
    INSTRUCTIONS_MAX,
    NAME_LENGTH_MAX,
    Array,
    Function,
    Global,
    Instruction,
    Program,
    Type,
    build,
)

Label = int

TOO_LARGE = "Each call of a kernel copies it in: call it in a loop instead of many times."


class Code:
    """See the module."""

    def __init__(self, filename: str, parameters: str, first: int, globals: dict[str, str]) -> None:
        self.filename = filename
        self._globals = tuple(Global(n, "f64" if t == "f" else "i64") for n, t in globals.items())
        self._global_at = {name: at for at, name in enumerate(globals)}
        self.arguments: tuple[Type, ...] = tuple("f64" if p == "f" else "i64" for p in parameters)
        self.line = 0
        self.dead = False  # nothing leads here
        self._code: list[tuple[str, int | float | None, int]] = []
        self._at: list[int] = []  # where each label stands
        self._marked: dict[int, list[Label]] = {}  # the labels at each instruction
        self._wanted: set[Label] = set()  # labels that something jumps to
        self._cells = first + len(parameters)
        self._free: dict[str, list[int]] = {"i": [], "f": []}
        self._arrays: list[Array] = []
        self._functions: list[tuple[Label, int, int]] = []
        self._names: dict[str, int] = {}

    # -- instructions ------------------------------------------------------------------------

    def op(self, name: str, operand: int | float | None = None) -> None:
        spec = BY_NAME[name]
        if self.dead:
            return
        if len(self._code) >= INSTRUCTIONS_MAX:
            raise self.too_large(f"more than {INSTRUCTIONS_MAX} instructions")
        if spec.immediate is Immediate.LABEL:
            assert isinstance(operand, int)
            self._wanted.add(operand)
        self._code.append((name, operand, self.line))
        self.dead = spec.ends

    def ops(self, *names: str) -> None:
        for name in names:
            self.op(name)

    def raise_fault(self, text: str) -> None:
        """A fault with a text of its own."""
        kept = "".join(c if c.isprintable() and c not in ";: " else "_" for c in text)
        name = kept[:NAME_LENGTH_MAX]
        if not self.dead:
            self.op("RAISE", self._names.setdefault(name, len(self._names)))

    def push(self, value: int | float) -> None:
        self.op("PUSH", value)

    def label(self) -> Label:
        self._at.append(-1)
        return len(self._at) - 1

    def mark(self, label: Label) -> None:
        """The label stands here; a jump to it right before is none."""
        if self._code and self._code[-1][:2] == ("JMP", label):
            moved = self._marked.pop(len(self._code), [])
            self._code.pop()
            self.dead = False
            for each in moved:
                self._put(each)
        self._put(label)
        self.dead = self.dead and label not in self._wanted

    def _put(self, label: Label) -> None:
        self._at[label] = len(self._code)
        self._marked.setdefault(len(self._code), []).append(label)

    # -- what instructions name --------------------------------------------------------------

    def cell(self, letter: str) -> int:
        """A cell for values of this type; what it holds is not known."""
        free = self._free["f" if letter == "f" else "i"]
        if free:
            return free.pop()
        if self._cells >= CELLS_MAX:
            raise self.too_large(f"more than {CELLS_MAX} variables")
        self._cells += 1
        return self._cells - 1

    def free(self, cell: int, letter: str) -> None:
        self._free["f" if letter == "f" else "i"].append(cell)

    def keep_cells(self) -> None:
        """Whatever has been lent so far is never lent again."""
        self._free = {"i": [], "f": []}

    def array(self, name: str, kind: ArrayType) -> int:
        """The number of a new array."""
        name = name[: NAME_LENGTH_MAX - 4]  # room for a number behind it
        if any(each.name == name for each in self._arrays):
            name += f"_{len(self._arrays)}"
        if len(self._arrays) >= ARRAYS_MAX:
            raise self.too_large(f"more than {ARRAYS_MAX} arrays")
        self._arrays.append(Array(name, "f64" if kind.letter == "f" else "i64", kind.length))
        return len(self._arrays) - 1

    def of_global(self, name: str, register: str) -> None:
        """An instruction on a global."""
        self.op(name, self._global_at[register])

    def function(self, takes: int, leaves: int) -> tuple[int, Label]:
        """A function's number, and the label to mark where it starts."""
        if len(self._functions) >= FUNCTIONS_MAX:
            raise self.too_large(f"more than {FUNCTIONS_MAX} recursive kernels")
        self._functions.append((self.label(), takes, leaves))
        return len(self._functions) - 1, self._functions[-1][0]

    def too_large(self, what: str) -> InvalidProgram:
        return InvalidProgram(
            f"{self.filename}: the kernel becomes too large: {what}.",
            TOO_LARGE,
        )

    def build(self) -> Program:
        """The program; names in the order of their first use, as programs want them."""
        order: dict[int, int] = {}
        code = []
        for name, operand, line in self._code:
            spec = BY_NAME[name]
            if spec.immediate is Immediate.LABEL:
                operand = self._at[int(operand or 0)]
            elif spec.immediate in NAMED:
                operand = order.setdefault(int(operand or 0), len(order))
            code.append(Instruction(spec.opcode, operand, line))
        names = list(self._names)
        return build(
            kind="index",
            dialect="ent",
            entry=0,
            cells=self._cells,
            arguments=self.arguments,
            arrays=tuple(self._arrays),
            functions=tuple(Function(self._at[at], a, b) for at, a, b in self._functions),
            names=tuple(names[each] for each in order),
            globals=self._globals,
            instructions=tuple(code),
            filename=self.filename,
        )
