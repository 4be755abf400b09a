"""The one table: every instruction of Entangle.

Interface: `BY_NAME` and `BY_OPCODE` find a `Spec`. The assembler, the verifier, the gas plan and
the interpreter read it; the compiler is tested against it; the table of docs/entangle.md is
`table_markdown()`.
Invariants:
  I1  opcodes and names are unique, and an opcode never changes its meaning (it is part of KIDs);
  I2  `types` and `effect` take and leave the same number of values.

`types` is what the verifier runs: the values taken, a colon, the values left. Taken: `n` a number,
`i` an i64. Left: `i` an i64, `f` an f64, `j` the join of what was taken (f64 if any was, else i64),
`1` `2` `3` the first, second, third value taken, `c` the constant, `m` the cell, `a` the array
element, `s` what the dialect counts indices in (i64 in .ent, f64 in JSON). Taken or left: `g` what
the global is declared as (taken, an i64 becomes an f64 where that is wanted).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Immediate(Enum):
    """What stands after an instruction's name."""

    NONE = ""
    NUMBER = "number"
    CELL = "cell"
    LABEL = "label"
    FUNCTION = "function"
    ARRAY = "array"
    SECONDS = "seconds"
    GLOBAL = "global"
    CHANNEL = "channel"
    SHARED = "shared array"
    TEXT = "name"


class Fault(Enum):
    """How a program can trap; the value is the code the compiled program reports."""

    DIVISION = 4
    BOUNDS = 5
    DEPTH = 6
    CONVERSION = 7
    ROOT = 8
    UNKNOWN = 9
    OVERFLOW = 10
    RAISED = 11
    GLOBAL = 12


FAULT_TEXT = {
    Fault.DIVISION: "division by zero",
    Fault.BOUNDS: "array index out of range",
    Fault.DEPTH: "calls nested too deep",
    Fault.CONVERSION: "no i64 is equal to the truncated value",
    Fault.ROOT: "square root of a negative number",
    Fault.UNKNOWN: "unknown instruction",
    Fault.OVERFLOW: "int overflow",
    Fault.RAISED: "the fault it names",
    Fault.GLOBAL: "what the cluster says",
}


@dataclass(frozen=True, slots=True)
class Spec:
    """One instruction."""

    name: str
    opcode: int
    immediate: Immediate
    effect: str
    types: str
    doc: str
    gas: int = 1
    faults: tuple[Fault, ...] = ()
    seed: bool = False  # the JSON dialect has it
    reserved: bool = False  # has its place here, but this release does not run it
    ends: bool = False  # control never goes on to the next instruction
    json_types: str = ""  # where they differ from `types` in the JSON dialect

    @property
    def taken(self) -> str:
        return self.types.split(":")[0]

    @property
    def left(self) -> str:
        return self.types.split(":")[1]

    def stack_of(self, *, json: bool) -> tuple[str, str]:
        """What it takes and leaves in one of the dialects."""
        taken, left = ((json and self.json_types) or self.types).split(":")
        return taken, left


_N, _DIV = Immediate.NONE, (Fault.DIVISION,)
_OVER = (Fault.OVERFLOW,)
_GLOBAL, _ASK = Immediate.GLOBAL, (Fault.GLOBAL,)
GLOBAL_GAS = 1000  # what asking costs this node; waiting for the others costs it nothing
# ruff: noqa: E501 (a table reads best as one row an instruction)

TABLE: tuple[Spec, ...] = (
    # Stack.
    Spec("PUSH", 1, Immediate.NUMBER, "( -- number )", ":c",
         "Pushes a constant; one with a point, an exponent, `inf` or `nan` is an f64.", seed=True),
    Spec("POP", 2, _N, "( a -- )", "n:", "Drops the top.", seed=True),
    Spec("DUP", 3, _N, "( a -- a a )", "n:11", "Copies the top.", seed=True),
    Spec("SWAP", 4, _N, "( a b -- b a )", "nn:21", "Exchanges the two on top.", seed=True),
    Spec("OVER", 5, _N, "( a b -- a b a )", "nn:121", "Copies the second to the top."),
    Spec("ROT3", 6, _N, "( a b c -- b c a )", "nnn:231", "Brings the third to the top.", seed=True),
    # Arithmetic.
    Spec("ADD", 16, _N, "( a b -- a+b )", "nn:j", "Adds; i64 wraps.", seed=True),
    Spec("SUB", 17, _N, "( a b -- a-b )", "nn:j", "Subtracts; i64 wraps.", seed=True),
    Spec("MUL", 18, _N, "( a b -- a*b )", "nn:j", "Multiplies; i64 wraps.", seed=True),
    Spec("DIV", 19, _N, "( a b -- a//b )", "nn:j",
         "Divides, rounding down (JSON: true division); the least i64 by -1 wraps.",
         gas=4, faults=_DIV, seed=True),
    Spec("MOD", 20, _N, "( a b -- a%b )", "nn:j",
         "The remainder of DIV, with the sign of b, as Python's `%`.",
         gas=4, faults=_DIV, seed=True),
    Spec("FDIV", 21, _N, "( a b -- a/b )", "nn:f", "True division.", gas=4, faults=_DIV),
    Spec("NEG", 22, _N, "( a -- -a )", "n:j", "Negates; the least i64 wraps."),
    Spec("ABS", 23, _N, "( a -- |a| )", "n:j", "The magnitude; the least i64 wraps."),
    Spec("MIN", 24, _N, "( a b -- min )", "nn:j", "The smaller; NaN if either is; -0.0 < 0.0."),
    Spec("MAX", 25, _N, "( a b -- max )", "nn:j", "The larger; NaN if either is; -0.0 < 0.0."),
    Spec("FLOOR", 26, _N, "( a -- floor )", "n:j", "Rounds down; stays an f64; i64 unchanged."),
    Spec("SQRT", 27, _N, "( a -- root )", "n:f",
         "The square root; NaN of a negative number (JSON: a fault).",
         gas=4, faults=(Fault.ROOT,), seed=True),
    Spec("ADDO", 28, _N, "( a b -- a+b )", "ii:i", "Adds; a sum that is no i64 is a fault.", faults=_OVER),
    Spec("SUBO", 29, _N, "( a b -- a-b )", "ii:i", "Subtracts; a difference that is no i64 is a fault.",
         faults=_OVER),
    Spec("MULO", 30, _N, "( a b -- a*b )", "ii:i", "Multiplies; a product that is no i64 is a fault.",
         faults=_OVER),
    # Comparison, bits, conversion.
    Spec("EQ", 32, _N, "( a b -- flag )", "nn:i", "1 if equal, else 0."),
    Spec("NE", 33, _N, "( a b -- flag )", "nn:i", "1 if not equal, else 0."),
    Spec("LT", 34, _N, "( a b -- flag )", "nn:i", "1 if a < b, else 0."),
    Spec("LE", 35, _N, "( a b -- flag )", "nn:i", "1 if a <= b, else 0."),
    Spec("GT", 36, _N, "( a b -- flag )", "nn:i", "1 if a > b, else 0."),
    Spec("GE", 37, _N, "( a b -- flag )", "nn:i", "1 if a >= b, else 0."),
    Spec("AND", 38, _N, "( a b -- a&b )", "ii:i", "Bitwise and."),
    Spec("OR", 39, _N, "( a b -- a|b )", "ii:i", "Bitwise or."),
    Spec("XOR", 40, _N, "( a b -- a^b )", "ii:i", "Bitwise exclusive or."),
    Spec("NOT", 41, _N, "( a -- ~a )", "i:i", "Inverts every bit."),
    Spec("SHL", 42, _N, "( a b -- a<<b )", "ii:i", "Shifts left by b modulo 64."),
    Spec("SHR", 43, _N, "( a b -- a>>b )", "ii:i", "Shifts right by b modulo 64, keeping the sign."),
    Spec("SHRU", 44, _N, "( a b -- a>>>b )", "ii:i", "Shifts right by b modulo 64, zeros coming in."),
    Spec("FLOAT", 45, _N, "( a -- f64 )", "n:f", "Converts to f64, rounding to the nearest even."),
    Spec("INT", 46, _N, "( a -- i64 )", "n:i", "Converts to i64, dropping the fraction.",
         faults=(Fault.CONVERSION,)),
    # Cells and arrays.
    Spec("LOAD", 64, Immediate.CELL, "( -- value )", ":m", "Pushes a cell.", seed=True),
    Spec("STORE", 65, Immediate.CELL, "( value -- )", "n:", "Writes a cell.", seed=True),
    Spec("LOADI", 66, Immediate.ARRAY, "( index -- value )", "i:a", "Pushes an array element.",
         gas=2, faults=(Fault.BOUNDS,)),
    Spec("STOREI", 67, Immediate.ARRAY, "( value index -- )", "ni:", "Writes an array element.",
         gas=2, faults=(Fault.BOUNDS,)),
    Spec("LEN", 68, Immediate.ARRAY, "( -- length )", ":i", "Pushes how many elements it has."),
    # Control.
    Spec("JMP", 80, Immediate.LABEL, "( -- )", ":", "Goes to the label.", seed=True, ends=True),
    Spec("JZ", 81, Immediate.LABEL, "( a -- )", "n:", "Goes to the label if a is zero.", seed=True),
    Spec("JNZ", 82, Immediate.LABEL, "( a -- )", "n:", "Goes to the label if a is not zero (NaN is not).",
         seed=True),
    Spec("LOOP", 83, Immediate.LABEL, "( -- )", ":",
         "Adds 1 to cell 0 and goes to the label while that is below the end.", gas=2, seed=True),
    Spec("CALL", 84, Immediate.FUNCTION, "( arguments -- results )", ":",
         "Calls a function; it takes and leaves what its `.function` line says.",
         gas=4, faults=(Fault.DEPTH,)),
    Spec("RET", 85, _N, "( results -- )", ":", "Returns from a function.", ends=True),
    Spec("HALT", 86, _N, "( -- )", ":", "Ends this index (in a function too).", seed=True, ends=True),
    Spec("RAISE", 87, Immediate.TEXT, "( -- )", ":",
         "A fault of the program's own; the name, `_` read as a space, is its text.",
         faults=(Fault.RAISED,), ends=True),
    # Results and the world.
    Spec("EMIT", 96, _N, "( value -- )", "n:", "Appends a value to the result of this index.", gas=2),
    Spec("PRINT", 97, _N, "( value -- )", "n:", "The seed's name of EMIT.", gas=2, seed=True),
    Spec("SLEEP", 98, Immediate.SECONDS, "( -- )", ":", "Waits that many seconds.",
         gas=1000, seed=True),
    Spec("GET_START", 99, _N, "( -- start )", ":s", "Pushes the first index of this run.", seed=True),
    Spec("GET_END", 100, _N, "( -- end )", ":s", "Pushes the end of this run (exclusive).", seed=True),
    # Globals: what the whole cluster agrees on. Each write is an effect of its index, done once.
    Spec("LOAD_GLOBAL", 112, _GLOBAL, "( -- value )", ":g", "Reads a global.",
         gas=GLOBAL_GAS, faults=_ASK, seed=True),
    Spec("STORE_GLOBAL", 113, _GLOBAL, "( value -- )", "g:", "Writes a global.",
         gas=GLOBAL_GAS, faults=_ASK, seed=True),
    Spec("PROPOSE_GLOBAL", 114, _GLOBAL, "( expected new -- found flag )", "gg:gi",
         "Writes a global if it holds what is expected; what it held, and 1 or 0 (JSON: `( new -- flag )`).",
         gas=GLOBAL_GAS, faults=_ASK, seed=True, json_types="g:s"),
    Spec("ADD_GLOBAL", 115, _GLOBAL, "( value -- before )", "g:g",
         "Adds to a global and pushes what it held before.", gas=GLOBAL_GAS, faults=_ASK),
    # Places of what comes later: they assemble and disassemble, the verifier refuses them.
    Spec("SEND", 116, Immediate.CHANNEL, "( value -- )", "n:", "Sends on a channel.", reserved=True),
    Spec("RECV", 117, Immediate.CHANNEL, "( -- value )", ":j", "Receives from a channel.",
         reserved=True),
    Spec("ARRAY_LOAD", 118, Immediate.SHARED, "( index -- value )", "i:j",
         "Reads an element of a shared array.", reserved=True),
    Spec("ARRAY_STORE", 119, Immediate.SHARED, "( value index -- )", "ni:",
         "Writes an element of a shared array.", reserved=True),
    # What the JSON dialect makes of an opcode nobody knows: a fault when it is reached.
    Spec("UNKNOWN", 127, Immediate.TEXT, "( -- )", ":",
         "JSON only: an unknown instruction; a fault when it is reached.",
         faults=(Fault.UNKNOWN,), ends=True),
)  # fmt: skip

BY_NAME: dict[str, Spec] = {spec.name: spec for spec in TABLE}
BY_OPCODE: dict[int, Spec] = {spec.opcode: spec for spec in TABLE}
NAMED = (Immediate.CHANNEL, Immediate.SHARED, Immediate.TEXT)
WRITES_GLOBALS = ("STORE_GLOBAL", "PROPOSE_GLOBAL", "ADD_GLOBAL")
USES_GLOBALS = ("LOAD_GLOBAL", *WRITES_GLOBALS)  # a compiled program tells its host which by number


def table_markdown() -> str:
    """The instruction table of docs/entangle.md."""
    rows = ["| instruction | stack | types | gas | faults | meaning |", "|---|---|---|---|---|---|"]
    for spec in TABLE:
        name = f"`{spec.name}`" + (f" *{spec.immediate.value}*" if spec.immediate.value else "")
        name += " †" if spec.seed else ""
        faults = ", ".join(FAULT_TEXT[fault] for fault in spec.faults)
        doc = spec.doc + (" Not in this release." if spec.reserved else "")
        doc = doc.replace("|", "\\|")
        effect = spec.effect.replace("|", "\\|")
        types = f"`{spec.types}`" if spec.types != ":" else ""
        rows.append(f"| {name} | `{effect}` | {types} | {spec.gas} | {faults} | {doc} |")
    return "\n".join(rows) + "\n"
