"""The interpreter and the compiled program agree: on results, gas, faults, sleeps and yields.

Programs are generated from a seed: segments of well-typed instructions that jump to one another at
random (so loops, irreducible graphs and endless ones come up), functions, arrays, both types, and
constants where arithmetic is delicate. A failure prints the program; the seed repeats it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from manifold.vm.compile import compile_wat
from manifold.vm.compile.structure import NESTING_MAX
from manifold.vm.errors import Exhausted, InvalidProgram, Trap
from manifold.vm.interpret import run as interpret
from manifold.vm.runtime import REDUCTIONS, Machine, Stopped, finish
from manifold.vm.syntax import Program, assemble, disassemble, load
from manifold.vm.syntax.isa import BY_NAME
from manifold.vm.valid import verify

INTS = [0, 1, 2, 3, 5, 7, 8, 9, 64, -1, -2, -3, -7, -8, 1 << 40, (1 << 63) - 1, -(1 << 63)]
FLOATS = [
    *(0.0, -0.0, 1.0, -1.0, 2.0, 0.5, -2.5, 3.0, 1e308, -1e308, 5e-324, -5e-324, 1e16, 2.0**60),
    *(math.inf, -math.inf, math.nan, 2.0**63, -(2.0**63), 1 / 3, 4.0, 8.0, 2.0**51 + 1),
    *(2.0**53 + 2, -(2.0**53) - 2, 3.5e-323, 2.5e-308, -1e-309),
]
BINARY = [
    "ADD",
    "SUB",
    "MUL",
    "DIV",
    "MOD",
    "FDIV",
    "MIN",
    "MAX",
    "EQ",
    "NE",
    "LT",
    "LE",
    "GT",
    "GE",
]
BITS = ["AND", "OR", "XOR", "SHL", "SHR", "SHRU", "ADDO", "SUBO", "MULO"]
UNARY = ["NEG", "ABS", "FLOOR", "SQRT", "FLOAT", "INT"]
SHUFFLES = ["POP", "DUP", "SWAP", "OVER", "ROT3"]


class Writer:
    """Writes one function: its instructions and the types on the stack."""

    def __init__(self, random: Random, cells: str, functions: list[tuple[str, str, str]]) -> None:
        self.random, self.cells, self.functions = random, cells, functions
        self.lines: list[str] = []
        self.stack = ""

    def push(self, kind: str) -> None:
        value = self.random.choice(INTS if kind == "i" else FLOATS)
        self.lines.append(f"PUSH {value!r}")
        self.stack += kind

    def become(self, wanted: str) -> None:
        """Makes the stack hold exactly `wanted`."""
        common = 0
        while common < min(len(wanted), len(self.stack)) and self.stack[common] == wanted[common]:
            common += 1
        self.lines += ["POP"] * (len(self.stack) - common)
        self.stack = self.stack[:common]
        for kind in wanted[common:]:
            self.push(kind)

    def cast(self, kind: str) -> None:
        """Makes the top a `kind`."""
        if self.stack[-1] != kind:
            self.lines.append("INT" if kind == "i" else "FLOAT")
            self.stack = self.stack[:-1] + kind

    def instruction(self) -> None:
        choice = self.random.random()
        if not self.stack or (choice < 0.25 and len(self.stack) < 12):
            self.leaf()
        elif choice < 0.55 and len(self.stack) >= 2:
            both = self.stack[-2:]
            name = self.random.choice(BITS + BINARY if both == "ii" else BINARY)
            self.lines.append(name)
            flag = name in ("EQ", "NE", "LT", "LE", "GT", "GE")
            kind = "f" if name == "FDIV" or ("f" in both and not flag) else "i"
            self.stack = self.stack[:-2] + kind
        elif choice < 0.7:
            name = self.random.choice([*UNARY, "NOT"] if self.stack[-1] == "i" else UNARY)
            self.lines.append(name)
            kind = {"SQRT": "f", "FLOAT": "f", "INT": "i"}.get(name, self.stack[-1])
            self.stack = self.stack[:-1] + kind
        elif choice < 0.8:
            spec = BY_NAME[self.random.choice(SHUFFLES)]
            count = len(spec.taken)
            if len(self.stack) >= count and len(self.stack) < 12:
                taken = self.stack[len(self.stack) - count :]
                self.lines.append(spec.name)
                left = "".join(taken[int(letter) - 1] for letter in spec.left)
                self.stack = self.stack[: len(self.stack) - count] + left
        else:
            self.effect()

    def leaf(self) -> None:
        what = self.random.choice(["push", "push", "load", "start", "end", "len", "call"])
        if what == "load":
            cell = self.random.randrange(len(self.cells))
            self.lines.append(f"LOAD {cell}")
            self.stack += self.cells[cell]
        elif what in ("start", "end"):
            self.lines.append(f"GET_{what.upper()}")
            self.stack += "i"
        elif what == "len":
            self.lines.append("LEN ints")
            self.stack += "i"
        elif what == "call" and self.functions:
            name, takes, leaves = self.random.choice(self.functions)
            for kind in takes:
                self.push(kind)
            self.lines.append(f"CALL {name}")
            self.stack = self.stack[: len(self.stack) - len(takes)] + leaves
        else:
            self.push(self.random.choice("if"))

    def effect(self) -> None:
        what = self.random.choice(
            ["store", "store", "emit", "emit", "print", "loadi", "storei", "sleep"]
        )
        if what == "store":
            cell = self.random.randrange(1, len(self.cells))
            self.cast(self.cells[cell])
            self.lines.append(f"STORE {cell}")
            self.stack = self.stack[:-1]
        elif what in ("emit", "print"):
            self.lines.append(what.upper())
            self.stack = self.stack[:-1]
        elif what == "sleep":
            self.lines.append("SLEEP 0.25")
        else:
            name, kind = self.random.choice([("ints", "i"), ("reals", "f")])
            if what == "storei":
                self.cast(kind)
                self.lines.append(self.index([0, 1, 2, 3, 4, -1]))
                self.lines.append(f"STOREI {name}")
                self.stack = self.stack[:-1]
            else:
                self.lines.append(self.index([0, 1, 2, 3, 4]))
                self.lines.append(f"LOADI {name}")
                self.stack += kind

    def index(self, constants: list[int]) -> str:
        """An index: a constant, or a cell, which may be known to be in range until written."""
        if self.random.random() < 0.6:
            if self.random.random() < 0.5:
                self.lines += [f"PUSH {self.random.choice(constants)}", "STORE 1"]
            return "LOAD 1"
        return f"PUSH {self.random.choice(constants)}"

    def diamond(self, label: str) -> None:
        """A condition with two short sides, which the compiler may turn into a choice."""
        kind = self.random.choice("if")
        self.push(kind)
        under = self.stack
        self.lines += [f"LOAD {self.random.choice([0, 1])}", "PUSH 1", "AND", f"JZ {label}_else"]
        sides = self.random.choice([1, 2, 2])
        for side in range(sides):
            self.stack = under
            for _ in range(self.random.randrange(3)):
                if kind == "i" and self.random.random() < 0.3:
                    self.lines += [
                        f"PUSH {self.random.choice([1, 2, 8])}",
                        self.random.choice(["DIV", "MOD"]),
                    ]
                elif kind == "i" and self.random.random() < 0.4:  # faults within a choice
                    self.lines += self.random.choice(
                        [
                            ["PUSH 3", "MULO", "PUSH 1", "ADDO"],
                            ["PUSH -7", "MULO", "PUSH 5", "SUBO"],
                            [f"PUSH {self.random.choice(INTS)}", self.random.choice(BITS[-3:])],
                        ]
                    )
                else:
                    self.push(kind)
                    self.lines.append(self.random.choice(["ADD", "SUB", "MUL", "MIN"]))
                    self.stack = self.stack[:-1]
            cell = self.random.randrange(1, len(self.cells))
            if self.cells[cell] == kind and self.random.random() < 0.7:
                self.lines += ["DUP", f"STORE {cell}"]
            if side == 0 and sides == 2:
                self.lines += [f"JMP {label}_end", f"{label}_else:"]
        self.lines.append(f"{label}_end:" if sides == 2 else f"{label}_else:")
        self.stack = under

    def segments(self, prefix: str, state: str, count: int, ending: str, leaves: str) -> None:
        """`count` segments that start with `state` on the stack and jump to one another."""
        for number in range(count):
            self.lines.append(f"{prefix}{number}:")
            self.stack = state
            for _ in range(self.random.randrange(8)):
                self.instruction()
            if self.random.random() < 0.4 and len(self.stack) < 12:
                self.diamond(f"{prefix}{number}")
            way = self.random.random()
            target = f"{prefix}{self.random.randrange(count)}"
            if way < 0.2 or number == count - 1:
                self.become(leaves)
                ways = [ending] * 18 + ["HALT", "RAISE a_fault_of_its_own"]
                self.lines.append(self.random.choice(ways))
            elif way < 0.35:
                self.become(state)
                self.lines.append(f"JMP {target}")
            elif way < 0.45:
                self.become(state)
                self.lines.append(f"LOOP {target}")
            else:
                self.become(state + self.random.choice("iif"))
                if self.random.random() < 0.7:  # a condition that changes as time goes by
                    self.lines += [
                        "POP",
                        "LOAD 1",
                        "PUSH 1",
                        "ADD",
                        "DUP",
                        "STORE 1",
                        "PUSH 3",
                        "AND",
                    ]
                self.lines.append(f"{self.random.choice(['JZ', 'JNZ'])} {target}")
                self.stack = state


def generate(seed: int, size: int) -> str:
    """The text of a program."""
    random = Random(seed)
    cells = "ii" + "".join(random.choice("if") for _ in range(3))
    functions = []
    for number in range(random.choice([0, 0, 1, 2])):
        takes, leaves = random.choice(["", "i", "if"]), random.choice(["", "i", "f", "fi"])
        functions.append((f"work{number}", takes, leaves))
    head = [".cells 5", ".array ints i64 4", ".array reals f64 3"]
    head += [".range"] if random.random() < 0.3 else []
    head += [
        f".function {name} ( {' '.join(takes)} -- {' '.join(leaves)} )"
        for name, takes, leaves in functions
    ]
    main = Writer(random, cells, functions)
    # Every cell is written with its type somewhere, or the verifier takes it for an i64.
    for cell in range(2, 5):
        main.lines.append(f"PUSH {'0.0' if cells[cell] == 'f' else '0'}")
        main.lines.append(f"STORE {cell}")
    state = random.choice(["", "", "i", "fi"])
    main.become(state)
    main.segments("m", state, size, "HALT", "")
    for name, takes, leaves in functions:
        inner = Writer(random, cells, functions if random.random() < 0.3 else [])
        inner.lines.append(f"{name}:")
        inner.segments(f"{name}_", takes, max(1, size // 2), "RET", leaves)
        main.lines += inner.lines
    return "\n".join([*head, *main.lines]) + "\n"


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    machine = Machine(1 << 24)
    yield machine
    machine.close()


def observe(
    run: Any, lo: int, hi: int, budget: int, gas: int = 500, more: int = 400
) -> tuple[Any, ...]:
    """Everything a caller can see of a run, in a form that tells NaNs and zeros apart."""
    sleeps: list[float] = []
    yields: list[int] = []

    def on_yield(used: int) -> int:
        yields.append(used)
        return more if used < budget else 0

    try:
        outcome = run(lo, hi, gas=gas, on_yield=on_yield, on_sleep=sleeps.append)
    except Stopped as stopped:
        return ("stopped", stopped.gas_used, stopped.index, sleeps, yields)
    except Trap as trap:
        place = (trap.line, trap.instruction, trap.index)
        return ("trap", trap.message, place, repr(trap.cells), repr(trap.results), sleeps, yields)
    return ("done", msgspec.msgpack.encode(outcome.partial), outcome.gas_used, sleeps, yields)


def both(
    machine: Machine, program: Program, reduce: str, budget: int = 3000, **gas: int
) -> tuple[Any, Any]:
    verified = verify(program)
    unit = machine.load(program, reduce)
    assert not unit.note
    compiled = observe(unit.run, 3, 8, budget, **gas)
    expected = observe(
        lambda lo, hi, **rest: interpret(verified, reduce, lo, hi, **rest), 3, 8, budget, **gas
    )
    if compiled[0] == "trap" and reduce != "collect":  # only `collect` knows the results so far
        compiled, expected = ((*each[:4], *each[5:]) for each in (compiled, expected))
    return compiled, expected


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 1 << 40), size=st.integers(1, 9), reduce=st.sampled_from(REDUCTIONS))
def test_a_generated_program_does_the_same_in_both_back_ends(
    machine: Machine, seed: int, size: int, reduce: str
) -> None:
    text = generate(seed, size)
    try:
        verify(assemble(text))
    except InvalidProgram as refusal:  # a function that never returns: its results count as i64
        assert "would be an i64 here" in refusal.message, text
        reject()
    compiled, expected = both(machine, assemble(text), reduce)
    assert compiled == expected, text


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 1 << 40),
    size=st.integers(1, 9),
    gas=st.integers(0, 600),
    more=st.integers(1, 300),
)
def test_gas_runs_out_at_the_same_points_whatever_the_slices(
    machine: Machine, seed: int, size: int, gas: int, more: int
) -> None:
    text = generate(seed, size)
    try:
        program = assemble(text)
        verify(program)
    except InvalidProgram:  # as above
        reject()
    compiled, expected = both(machine, program, "collect", 2000, gas=gas, more=more)
    assert compiled == expected, text


LOOPS = {
    "loops in each other": """
        PUSH 0\nSTORE 1
        outer: LOAD 1\nPUSH 4\nLT\nJZ done\nPUSH 0\nSTORE 2
        inner: LOAD 2\nLOAD 1\nLT\nJZ next\nLOAD 2\nLOADI a\nLOAD 1\nADD\nLOAD 2\nSTOREI a
        LOAD 2\nPUSH 1\nADD\nSTORE 2\nJMP inner
        next: LOAD 1\nPUSH 1\nADD\nSTORE 1\nJMP outer
        done: PUSH 0\nLOADI a\nEMIT\nHALT""",
    "a loop that faults": """
        again: LOAD 1\nLOADI a\nPOP\nLOAD 1\nPUSH 1\nADD\nSTORE 1\nLOAD 1\nSTORE 2\nJMP again""",
    "a loop that the end of the stack goes through": """
        PUSH 5
        again: PUSH 1\nSUB\nDUP\nEMIT\nDUP\nJNZ again\nPOP\nHALT""",
    "a loop in a function": """
        .function work ( n -- n )
        LOAD 0\nCALL work\nEMIT\nHALT
        work: again: PUSH 3\nSUB\nDUP\nPUSH -9\nGT\nJNZ again\nRET""",
    "a loop with two entries": """
        LOAD 0\nPUSH 1\nAND\nJZ second
        first: LOAD 1\nPUSH 1\nADD\nSTORE 1
        second: LOAD 1\nPUSH 2\nADD\nSTORE 1\nLOAD 1\nPUSH 20\nGE\nJZ first\nHALT""",
    "a range program": """
        .range
        LOAD 0\nSTORE 2
        again: LOAD 2\nEMIT\nLOAD 2\nPUSH 1\nADD\nSTORE 2\nLOAD 2\nLOAD 1\nLT\nJNZ again\nHALT""",
}


@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_pays_once_for_each_round_wherever_its_gas_ends(machine: Machine, loop: str) -> None:
    text = ".cells 3\n.array a i64 6\n" + LOOPS[loop].replace("work: again:", "work:\nagain:")
    program = assemble(text)
    for gas in range(60):
        for more in (1, 7, 1 << 40):
            compiled, expected = both(machine, program, "collect", 500, gas=gas, more=more)
            assert compiled == expected, (gas, more)


def test_a_loop_that_nests_too_deep_for_blocks_pays_too(machine: Machine) -> None:
    ways = range(NESTING_MAX + 50)
    lines = ["again:"]
    tests = ("EQ\nJNZ", "NE\nJZ")
    lines += [f"LOAD 1\nPUSH {way}\n{tests[way % 2]} way{way}" for way in ways]
    lines += [f"way{way}: LOAD 2\nPUSH 1\nADD\nSTORE 2" for way in ways]
    lines += ["LOAD 1\nPUSH 150\nADD\nDUP\nSTORE 1\nPUSH 500\nLT\nJNZ again"]
    lines += ["LOAD 2\nEMIT\nHALT"]
    program = assemble(".cells 3\n" + "\n".join(lines))
    assert "$dispatch" in compile_wat(verify(program), "collect")
    for gas in (0, 1000, 5000):
        compiled, expected = both(machine, program, "collect", 30_000, gas=gas, more=3000)
        assert compiled == expected and len(compiled[-1]) > 3


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 40), size=st.integers(1, 9))
def test_text_and_program_are_inverse(seed: int, size: int) -> None:
    program = assemble(generate(seed, size))
    assert assemble(disassemble(program)) == program


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from([*BINARY, *BITS]),
    left=st.sampled_from(INTS) | st.sampled_from(FLOATS) | st.floats() | st.integers(-100, 100),
    right=st.sampled_from(INTS) | st.sampled_from(FLOATS) | st.floats() | st.integers(-100, 100),
    constant=st.booleans(),
)
def test_every_operator_agrees_on_every_pair(
    machine: Machine, name: str, left: float, right: float, constant: bool
) -> None:
    if name in BITS:
        left, right = (int(x) if math.isfinite(x) else 0 for x in (left, right))
        left, right = ((x + (1 << 63)) % (1 << 64) - (1 << 63) for x in (left, right))
    hidden = f"PUSH {right!r}" if constant else f"PUSH {right!r}\nSTORE 2\nLOAD 2"
    text = f"PUSH {left!r}\nSTORE 1\nLOAD 1\n{hidden}\n{name}\nEMIT\nHALT\n"
    compiled, expected = both(machine, assemble(text), "collect")
    assert compiled == expected, text


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from([*UNARY, "NOT"]),
    value=st.sampled_from(INTS) | st.sampled_from(FLOATS) | st.floats(),
)
def test_every_unary_operator_agrees(machine: Machine, name: str, value: float) -> None:
    if name == "NOT":
        value = 12345 if isinstance(value, float) else value
    text = f"PUSH {value!r}\nSTORE 1\nLOAD 1\n{name}\nEMIT\nHALT\n"
    compiled, expected = both(machine, assemble(text), "collect")
    assert compiled == expected, text


def integer_pairs(name: str, constant: bool) -> str:
    """A program that emits one operator's result for every pair of delicate integers."""
    lines = []
    for right in INTS:
        for left in INTS:
            if right or name not in ("DIV", "MOD"):
                hidden = [f"PUSH {right}"] if constant else [f"PUSH {right}", "STORE 2", "LOAD 2"]
                lines += [f"PUSH {left}", "STORE 1", "LOAD 1", *hidden, name, "EMIT"]
    return "\n".join([*lines, "HALT"])


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("name", ["DIV", "MOD", "MUL", "SHRU", "MIN"])
def test_integer_operators_agree_on_all_delicate_pairs(
    machine: Machine, name: str, constant: bool
) -> None:
    compiled, expected = both(machine, assemble(integer_pairs(name, constant)), "collect", 1 << 40)
    assert compiled == expected and compiled[0] == "done"


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("name", ["MUL", "DIV", "MOD", "FDIV", "MIN", "MAX"])
def test_float_operators_agree_on_all_delicate_pairs(
    machine: Machine, name: str, constant: bool
) -> None:
    lines = []
    for right in (x for x in FLOATS if x != 0):
        for left in FLOATS:
            hidden = [f"PUSH {right}"] if constant else [f"PUSH {right}", "STORE 2", "LOAD 2"]
            lines += [f"PUSH {left}", "STORE 1", "LOAD 1", *hidden, name, "EMIT"]
    compiled, expected = both(machine, assemble("\n".join([*lines, "HALT"])), "collect", 1 << 40)
    assert compiled == expected and compiled[0] == "done"


@pytest.mark.parametrize("two", ["2", "2.0"])
@pytest.mark.parametrize("first", [False, True])
def test_twice_a_number_agrees(machine: Machine, two: str, first: bool) -> None:
    lines = []
    for value in [*FLOATS, *INTS]:
        cell = 1 if isinstance(value, int) else 2
        factors = [f"PUSH {two}", f"LOAD {cell}"]
        factors = factors if first else factors[::-1]
        lines += [f"PUSH {value!r}", f"STORE {cell}", *factors, "MUL", "EMIT"]
    compiled, expected = both(machine, assemble("\n".join([*lines, "HALT"])), "collect", 1 << 40)
    assert compiled == expected and compiled[0] == "done"


@pytest.mark.parametrize("value", FLOATS, ids=str)
def test_conversion_to_an_integer_agrees(machine: Machine, value: float) -> None:
    text = f"PUSH {value!r}\nSTORE 1\nLOAD 1\nINT\nEMIT\nHALT\n"
    compiled, expected = both(machine, assemble(text), "collect")
    assert compiled == expected
    assert (compiled[0] == "trap") == (not -(2.0**63) <= value < 2.0**63)


SEED_OPERATORS = ["ADD", "SUB", "MUL", "DIV", "MOD"]


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from([*SEED_OPERATORS, "SQRT"]),
    left=st.sampled_from(FLOATS[:14]) | st.floats(allow_nan=False, allow_infinity=False),
    right=st.sampled_from(FLOATS[:14]) | st.floats(allow_nan=False, allow_infinity=False),
)
def test_json_arithmetic_agrees(machine: Machine, name: str, left: float, right: float) -> None:
    text = f'[["PUSH", {left!r}], ["PUSH", {right!r}], ["{name}"], ["PRINT"]]'
    compiled, expected = both(machine, load(text, "x.json"), "collect")
    assert compiled == expected, text


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_merging_blocks_is_the_same_as_one_block_for_integers(
    machine: Machine, reduce: str
) -> None:
    text = "LOAD 0\nPUSH 7\nMOD\nJZ end\nLOAD 0\nPUSH 0x7FFFFFFFFFFFFFF\nMUL\nEMIT\nend: HALT\n"
    unit = machine.load(assemble(text), reduce)

    def part(lo: int, hi: int) -> Any:
        return unit.run(lo, hi, gas=1 << 40, on_yield=lambda _: 0, on_sleep=print).partial

    from manifold.vm.runtime import merge

    whole = finish(reduce, part(0, 90), 0, 90)
    pieces = [part(lo, lo + 10) for lo in range(0, 90, 10)]
    assert finish(reduce, merge(reduce, pieces), 0, 90) == whole
    nested = merge(reduce, [merge(reduce, pieces[:4]), merge(reduce, pieces[4:])])
    assert finish(reduce, nested, 0, 90) == whole


def test_recursion_ends_in_a_trap_and_not_in_the_native_stack(machine: Machine) -> None:
    text = ".function deep ( n -- n )\nPUSH 0\nCALL deep\nEMIT\nHALT\ndeep: PUSH 1\nADD\n"
    program = assemble(text + "DUP\n" * 100 + "CALL deep\n" + "ADD\n" * 100 + "RET\n")
    compiled, expected = both(machine, program, "sum", budget=10_000_000)
    assert compiled == expected
    assert compiled[0] == "trap" and "nested too deep" in compiled[1]


def test_a_halt_inside_a_function_ends_the_index_only(machine: Machine) -> None:
    text = ".function stop ( n -- )\nLOAD 0\nEMIT\nLOAD 0\nCALL stop\nPUSH 99\nEMIT\nHALT\n"
    text += "stop: PUSH 5\nGT\nJNZ end\nRET\nend: HALT\n"
    program = assemble(text)
    compiled, expected = both(machine, program, "collect")
    assert compiled == expected
    outcome = machine.load(program, "collect").run(
        4, 8, gas=1 << 30, on_yield=lambda _: 0, on_sleep=print
    )
    assert finish("collect", outcome.partial, 4, 8) == [[4, 99], [5, 99], 6, 7]
    many = machine.load(program, "count")  # the depth of calls starts again at every index
    done = many.run(10, 3000, gas=1 << 30, on_yield=lambda _: 0, on_sleep=print)
    assert done.partial.emitted == 2990


def test_a_callback_that_fails_ends_the_run_with_its_error(machine: Machine) -> None:
    unit = machine.load(assemble("again: JMP again\n"), "sum")

    def cancel(used: int) -> int:
        raise Exhausted("enough")

    with pytest.raises(Exhausted, match="enough"):
        unit.run(0, 1, gas=100, on_yield=cancel, on_sleep=print)


WRITES = {
    "STORE": "PUSH 9\nSTORE 0",
    "LOOP": "LOOP away",
    "CALL": "CALL change",
    "a choice": "LOAD 0\nPUSH 1\nEQ\nJZ on\nPUSH 9\nSTORE 0\non:",
}


@pytest.mark.parametrize("write", WRITES)
def test_an_index_is_checked_again_after_its_cell_was_written(machine: Machine, write: str) -> None:
    text = (
        ".array a i64 2\n.function change ( -- )\n"
        f"LOAD 0\nLOADI a\nEMIT\n{WRITES[write]}\nLOAD 0\nLOADI a\nEMIT\nHALT\n"
        "change: PUSH -1\nSTORE 0\nRET\naway: HALT\n"
    )
    program = assemble(text)
    verified, unit = verify(program), machine.load(program, "collect")
    for run in (unit.run, lambda *a, **o: interpret(verified, "collect", *a, **o)):
        with pytest.raises(Trap, match="array index out of range at index 1"):
            run(1, 2, gas=10_000, on_yield=lambda _: 0, on_sleep=lambda _: None)
