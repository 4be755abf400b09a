"""What every writer of a function needs: variables, the symbolic stack, gas, faults.

Interface: `StackWriter` is the base of function.py's `FunctionWriter`; `lines` is what it has
written, `locals` the local variables that takes.
How values lie: entry k of the stack is the local `$i<k>` or `$f<k>`, by its type; cell n is
`$c<n>`, a WebAssembly global if a function uses it, else a local. Constants stay symbolic within a
block until something needs them; a comparison whose flag is tested at once stays an i32. The
register allocator of the WebAssembly engine does the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from manifold.vm.compile.layout import OUTPUT_FULL, STOPPED
from manifold.vm.syntax.isa import Fault
from manifold.vm.valid import Flow, Verified

WASM = {"i": "i64", "f": "f64"}


@dataclass
class Context:
    """What the functions of one module share."""

    verified: Verified
    reduce: str
    arrays: list[int]  # where each starts in memory
    shared: frozenset[str]  # variables that are WebAssembly globals
    mixed: bool  # both i64 and f64 are emitted
    helpers: set[str] = field(default_factory=set)  # names of library functions needed

    @property
    def json(self) -> bool:
        return self.verified.program.dialect == "json"

    @property
    def is_range(self) -> bool:
        return self.verified.program.kind == "range"


@dataclass(slots=True)
class Entry:
    """A stack entry within a block: in its local, a constant, or an i32 flag in `$b<k>`."""

    type: str
    constant: int | float | None = None
    flag: bool = False


class StackWriter:
    """Variables, the stack, gas and faults."""

    def __init__(self, context: Context, flow: Flow, *, is_main: bool) -> None:
        self.context = context
        self.program = context.verified.program
        self.flow = flow
        self.is_main = is_main
        self.lines: list[str] = []
        self.locals: dict[str, str] = {}
        self.stack: list[Entry] = []
        self.at = 0
        # While a side of a choice is written, what it writes goes to variables of its own.
        self.side = ""
        self.renamed: dict[str, str] = {}

    # -- writing -----------------------------------------------------------------------------

    def line(self, text: str) -> None:
        self.lines.append(text)

    def local(self, name: str, kind: str) -> str:
        self.locals.setdefault(name, kind)
        return name

    def get(self, name: str) -> None:
        """Reads a variable."""
        if name in self.renamed:
            self.line(f"local.get ${self.renamed[name]}")
        else:
            self.line(f"{'global' if name in self.context.shared else 'local'}.get ${name}")

    def set(self, name: str) -> None:
        """Writes a variable."""
        if self.side and name not in self.renamed:
            kind = self.kind_of(name)
            self.renamed[name] = self.local(f"{name}_{self.side}", kind)
        if name in self.renamed:
            self.line(f"local.set ${self.renamed[name]}")
        else:
            self.line(f"{'global' if name in self.context.shared else 'local'}.set ${name}")

    def kind_of(self, name: str) -> str:
        """The type of a cell or a stack entry's local."""
        if name[0] == "c":
            return WASM[self.context.verified.cells[int(name[1:])]]
        return WASM[name[0]]

    def place(self, depth: int, kind: str) -> str:
        """The local of stack entry `depth`."""
        return self.local(f"{kind}{depth}", WASM[kind])

    def charge(self, cost: int, short: str = "") -> None:
        """Pays `cost` of gas; with none left branches to `short`, or asks the host if it is ""."""
        if not cost:
            return
        self.get("gas")
        self.line(f"i64.const {cost} i64.sub")
        if "gas" in self.context.shared:
            self.line("global.set $gas global.get $gas")
        else:
            self.line("local.tee $gas")
        self.line("i64.const 0 i64.lt_s")
        if short:
            self.line(f"br_if {short}")
            return
        self.line("if")
        self.ask()
        self.line("end")

    def ask(self) -> None:
        """The host gives more gas, or has this index left for good."""
        self.get("gas")
        self.line("call $yield")
        self.set("gas")
        self.get("gas")
        self.line("i64.const 0 i64.lt_s if")
        self.fail(STOPPED)
        self.line("end")

    def ask_again(self, cost: int, start: str) -> None:
        """Where `charge(cost, short)` branches to: asks, and from `start` it is charged again."""
        self.ask()
        self.get("gas")
        self.line(f"i64.const {cost} i64.add")
        self.set("gas")
        self.line(f"br {start}")

    def fail(self, code: int) -> None:
        """Leaves this index for good.

        Only a program's own faults show the cells: what ends otherwise, as every loop may when it
        asks for gas, goes where no cell is wanted, so that a cell needs no place to be kept in
        only for that.
        """
        place = "global" if "fault" in self.context.shared else "local"  # the same on every side
        self.line(f"i64.const {self.at << 4 | code} {place}.set $fault")
        self.line("br $done" if self.is_main and code in (STOPPED, OUTPUT_FULL) else "br $trap")

    def fault_if(self, kind: Fault) -> None:
        """Traps if the i32 on the WebAssembly stack is not zero."""
        self.line(self.if_wanted() + " if")
        self.fail(kind.value)
        self.line("end")

    def if_wanted(self) -> str:
        """Within a side of a choice: the flag on the stack counts only if the side is chosen."""
        chosen = {"": "", "yes": "local.get $chosen", "no": "local.get $chosen i32.eqz"}[self.side]
        return f"{chosen} i32.and" if chosen else ""

    # -- the stack ---------------------------------------------------------------------------

    def take(self) -> tuple[Entry, int]:
        """Pops the top: what it is, and which place it has."""
        entry = self.stack.pop()
        return entry, len(self.stack)

    def load(self, entry: Entry, depth: int, kind: str) -> None:
        """Puts an entry on the WebAssembly stack as `kind`."""
        if entry.constant is not None:
            value = entry.constant
            self.line(
                f"f64.const {float_text(float(value))}" if kind == "f" else f"i64.const {value}"
            )
            return
        if entry.flag:
            self.line(f"local.get $b{depth} i64.extend_i32_u")
        else:
            self.get(self.place(depth, entry.type))
        if kind == "f" and entry.type == "i":
            self.line("f64.convert_i64_s")

    def push(self, kind: str) -> None:
        """What is on the WebAssembly stack becomes the top entry."""
        self.set(self.place(len(self.stack), kind))
        self.stack.append(Entry(kind))

    def push_flag(self) -> None:
        """The i32 on the WebAssembly stack becomes the top entry, an i64 that is 0 or 1."""
        self.line(f"local.set ${self.local(f'b{len(self.stack)}', 'i32')}")
        self.stack.append(Entry("i", flag=True))

    def settle(self) -> None:
        """Before control leaves the block, every entry goes to its local."""
        for depth, entry in enumerate(self.stack):
            if entry.constant is not None or entry.flag:
                self.load(entry, depth, entry.type)
                self.set(self.place(depth, entry.type))
                self.stack[depth] = Entry(entry.type)

    def pair(self, kind: str | None = None) -> str:
        """Puts the two on top on the WebAssembly stack with their common type (or `kind`)."""
        right, left = self.take(), self.take()
        if kind is None:
            kind = "f" if "f" in (right[0].type, left[0].type) else "i"
        self.load(*left, kind)
        self.load(*right, kind)
        return kind


def float_text(value: float) -> str:
    """An f64 as WebAssembly text, exactly."""
    if value != value:
        return "nan"
    return ("-inf" if value < 0 else "inf") if math.isinf(value) else value.hex()
