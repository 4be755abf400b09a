"""Generated kernels mean the same to CPython, to the interpreter and compiled.

A kernel is generated as text, twice: once as it is, once for CPython with every int result passed
through `_i`, which fails where the result is no i64. Both are written to files, since a kernel is
compiled from its source. Values must agree bit by bit, faults in what they are.
"""

from __future__ import annotations

import importlib.util
import math
import struct
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from manifold.vm.errors import Trap
from manifold.vm.interpret import run as interpret
from manifold.vm.runtime import Machine, finish
from manifold.vm.valid import verify

INTS = [0, 1, 2, 3, 5, 7, 10, 64, -1, -2, -7, 1 << 31, 1 << 40, (1 << 53) + 1]
INTS += [(1 << 62), (1 << 63) - 1, -(1 << 63)]
FLOATS = [0.0, -0.0, 1.0, -1.5, 0.5, 2.5, 3.0, 1e308, 5e-324, 1e16, 2.0**63, -(2.0**63), 0.1]
ANY_FLOATS = [*FLOATS, math.inf, -math.inf, math.nan]
GAS = 1 << 40

HEAD = """
import math
import manifold

LIMIT = 7
SCALE = 0.25

"""
HELPERS = """
@manifold.kernel
def pick(a: int, b: float, c: bool):
    if c:
        return a
    for i in range(3):
        if i * 1.0 > b:
            return i
    return -1

@manifold.kernel
def pair(a: int, b: float):
    t = [0.0] * 4
    t[a % 4] = b
    return a & 255, t[1] + t[2]

@manifold.kernel
def triangle(n: int) -> int:
    m = n % 6
    return 0 if m == 0 else m + triangle(m - 1)
"""
REFERENCE = """
class Overflow(Exception):
    pass
class Conversion(Exception):
    pass
class Inexact(Exception):
    pass
def _i(value):
    if not -(1 << 63) <= value < 1 << 63:
        raise Overflow
    return value
def _c(value):
    if not -(1 << 63) <= value < 1 << 63:
        raise Conversion
    return value
def _d(left, right):
    for each in (left, right):
        if not -(1 << 53) <= each < 1 << 53:
            raise Inexact
    return left / right
"""


class Writer:
    """Writes one function, as a kernel (`text`) and for CPython (`checked`)."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.lines: list[tuple[str, str]] = []
        self.depth = 1
        self.loops = 0
        self.limit = 60

    def choice(self, *options: Any) -> Any:
        return self.random.choice(options)

    # An expression is a pair: the kernel's text and CPython's.

    def join(self, form: str, *parts: tuple[str, str]) -> tuple[str, str]:
        return form.format(*(p[0] for p in parts)), form.format(*(p[1] for p in parts))

    def checked(self, form: str, *parts: tuple[str, str], by: str = "_i") -> tuple[str, str]:
        text, reference = self.join(form, *parts)
        return text, f"{by}({reference})"

    def same(self, text: str) -> tuple[str, str]:
        return text, text

    def int(self, depth: int) -> tuple[str, str]:
        if depth <= 0 or self.random.random() < 0.2:
            name = self.choice("n", "i0", "i1", "k", "LIMIT", None, None)
            constant = str(self.random.choice(INTS))
            return self.same(name or (f"({constant})" if constant[0] == "-" else constant))
        name = self.choice("n", "i0", "i1", "k")
        a, b = self.int(depth - 1), self.int(depth - 1)
        small = self.int(depth - 2)
        variable = self.same(name)
        what = self.random.randrange(22)
        if what < 5:
            return self.checked(f"({{}} {self.choice('+', '-', '*')} {{}})", variable, b)
        if what < 7:
            return self.checked(f"({{}} {self.choice('//', '%')} {{}})", variable, b)
        if what == 7:
            return self.join(f"({{}} {self.choice('&', '|', '^')} {{}})", variable, b)
        if what == 8:
            count = self.join(self.choice("({} & 63)", "({} % 70)", "({} % 5 - 1)"), small)
            return self.checked("({} << {})", variable, count)
        if what == 9:
            count = self.join(self.choice("({} & 63)", "({} % 70)", "({} % 5 - 1)"), small)
            return self.join("({} >> {})", variable, count)
        if what == 10:
            return self.checked(self.choice("(-{})", "abs({})", "(+{})"), variable)
        if what == 11:
            return self.join(f"{self.choice('min', 'max')}({{}}, {{}})", a, b)
        if what == 12:
            form = self.choice("int({})", "round({})", "math.floor({})", "math.ceil({})")
            return self.checked(form, self.float(depth - 1), by="_c")
        if what == 13:
            return self.join("({} if {} else {})", a, self.bool(depth - 1), b)
        if what == 14:
            return self.join(f"({{}} {self.choice('and', 'or')} {{}})", variable, b)
        if what == 15:
            form = self.choice("({} ** 2)", "({} ** 3)", "({} ** (k & 7))", "({} ** 0)")
            return self.checked(form, variable)
        if what == 16:
            return self.join("ints[{}]", self.index(depth))
        if what == 17:  # below a mask nothing overflows
            mask = self.choice("& 0xFFFF", "% 1024", "& 0x7FFFFFFFFFFFFFFF")
            op = self.choice("+", "-", "*", "^")
            return self.same(
                f"(({name} * 6364136223846793005 {op} {self.random.choice(INTS)}) {mask})"
            )
        if what == 18:
            args = self.int(depth - 2), self.float(depth - 2), self.bool(depth - 2)
            return self.join("pick({}, {}, {})", *args)
        if what == 19:
            return self.join("triangle({})", small)
        if what == 20:
            return self.join("({} + 1)", self.bool(depth - 1))
        return self.join("(~{})", a)

    def index(self, depth: int) -> tuple[str, str]:
        form = self.choice(
            "{} % 4", "{} & 3", "{} % 4 - 4", "k", "k", "i1", "{} % 6 - 5", "0", "-1"
        )
        return self.join(form, self.same(self.choice("n", "i0", "i1")))

    def float(self, depth: int) -> tuple[str, str]:
        if depth <= 0 or self.random.random() < 0.2:
            name = self.choice("x", "f0", "f1", "SCALE", None)
            return self.same(name or f"({self.random.choice(FLOATS)!r})")
        a, b = self.float(depth - 1), self.float(depth - 1)
        variable = self.same(self.choice("x", "f0", "f1"))
        what = self.random.randrange(14)
        if what < 5:
            return self.join(f"({{}} {self.choice('+', '-', '*', '/')} {{}})", variable, b)
        if what == 5:
            return self.join(f"({{}} {self.choice('//', '%')} {{}})", variable, b)
        if what == 6:
            whole = self.same(self.choice("n", "i0", "k"))
            return self.join(f"({{}} {self.choice('+', '-', '*', '/', '//', '%')} {{}})", a, whole)
        if what == 7:
            text = self.choice(("n", "i0"), ("i1", "k"), ("k", "3"))
            return f"({text[0]} / {text[1]})", f"_d({text[0]}, {text[1]})"
        if what == 8:
            return self.join(self.choice("(-{})", "abs({})", "math.fabs({})", "float({})"), a)
        if what == 9:
            return self.join(f"{self.choice('min', 'max')}({{}}, {{}})", a, b)
        if what == 10:
            return self.join("({} if {} else {})", a, self.bool(depth - 1), b)
        if what == 11:
            return self.join(self.choice("math.sqrt({})", "math.sqrt(abs({}))"), a)
        if what == 12:
            return self.join("reals[{}]", self.index(depth))
        return self.join("float({})", self.int(depth - 1))

    def bool(self, depth: int) -> tuple[str, str]:
        order = "<", "<=", ">", ">=", "==", "!="
        if depth <= 0:
            return self.same(self.choice("b0", "flag", "True", "n > k"))
        a, b = self.bool(depth - 1), self.bool(depth - 1)
        what = self.random.randrange(8)
        first, second = self.choice(*order), self.choice(*order)
        number = self.choice(self.int, self.float)
        if what < 2:
            return self.join(f"({{}} {first} {{}})", number(depth - 1), self.float(depth - 1))
        if what < 4:
            return self.join(f"({{}} {first} {{}})", self.int(depth - 1), self.int(depth - 1))
        if what == 4:
            parts = [self.choice(self.int, self.float)(depth - 1) for _ in range(3)]
            return self.join(f"({{}} {first} {{}} {second} {{}})", *parts)
        if what == 5:
            return self.join("(not {})", a)
        if what == 6:
            return self.join(f"({{}} {self.choice('and', 'or', '&', '|', '^')} {{}})", a, b)
        return self.join("math.isnan({})", self.float(depth - 1))

    # Statements.

    def put(self, form: str, *parts: tuple[str, str]) -> None:
        text, reference = self.join(form, *parts)
        self.lines.append(("    " * self.depth + text, "    " * self.depth + reference))

    def block(self, size: int) -> None:
        self.depth += 1
        for _ in range(size):
            self.statement()
        self.put("pass")
        self.depth -= 1

    def statement(self) -> None:
        self.limit -= 1
        what = self.random.randrange(16) if self.depth < 4 and self.limit > 0 else 0
        i, f = self.choice("i0", "i1"), self.choice("f0", "f1")
        if what < 3:
            self.put(f"{i} = {{}}", self.int(3))
        elif what == 3:
            op, value = self.choice("+", "-", "*"), self.int(2)
            text = f"{i} {op}= {value[0]}", f"{i} = _i({i} {op} {value[1]})"
            self.put("{}", text)
        elif what < 6:
            self.put(f"{f} = {{}}", self.float(3))
        elif what == 6:
            self.put(f"{f} {self.choice('+', '-', '*')}= {{}}", self.float(2))
        elif what == 7:
            self.put("b0 = {}", self.bool(2))
        elif what == 8:
            self.put("i0, i1 = {}, {}", self.same("i1"), self.int(2))
        elif what == 9:
            self.put("i0, f0 = pair({}, {})", self.int(1), self.float(1))
        elif what == 10:
            self.put(
                f"{self.choice('ints[{}] = {}', 'ints[{}] = i1 = {}')}", self.index(1), self.int(2)
            )
        elif what == 11:
            self.put("reals[{}] = {}", self.index(1), self.float(2))
        elif what == 12:
            self.put("if {}:", self.bool(2))
            self.block(2)
            if self.random.random() < 0.5:
                self.put("elif {}:", self.bool(1))
                self.block(1)
            if self.random.random() < 0.6:
                self.put("else:")
                self.block(1)
        elif what == 13:
            self.for_loop()
        elif what == 14:
            self.while_loop()
        else:
            self.put(f"i1, k = divmod({i}, {self.choice(3, -7, 10)})")

    def for_loop(self) -> None:
        self.loops += 1
        name = self.choice("k", f"j{self.loops}")
        bounds = self.choice(
            "4", "n % 5", "-2, 3", "1, 9, 3", "5, -2, -2", "k % 3, 4", "0, 6, k % 3 + 1"
        )
        self.put(f"for {name} in range({bounds}):")
        self.depth += 1
        self.put(f"i0 = i0 ^ {name}")
        self.depth -= 1
        self.block(2)
        self.stop_or_else()

    def while_loop(self) -> None:
        self.loops += 1
        count = f"w{self.loops}"
        self.put(f"{count} = 0")
        self.put(f"while {count} < 4 and {{}}:", self.bool(1))
        self.depth += 1
        self.put(f"{count} += 1")
        if self.random.random() < 0.4:
            self.put("if {}:", self.bool(1))
            self.put(f"    {self.choice('break', 'continue')}")
        self.depth -= 1
        self.block(2)
        self.stop_or_else()

    def stop_or_else(self) -> None:
        if self.random.random() < 0.3:
            self.put("else:")
            self.block(1)


def generate(seed: int, size: int) -> tuple[str, str]:
    """The file with the kernel, and the one for CPython."""
    writer = Writer(Random(seed))
    writer.put("i0, i1, f0, f1, b0, k = 0, n, 0.0, x, flag, 1")
    writer.put("ints = [0] * 4")
    writer.put("reals = [x, 1.0, 0.5, -2.0]")
    for _ in range(size):
        writer.statement()
    writer.put("return i0, i1, f0, f1, b0, k, ints[0], ints[3], reals[1]")
    head = "def work(n: int, x: float, flag: bool):"
    text = HEAD + HELPERS + "\n@manifold.kernel\n" + head + "\n"
    text += "\n".join(line for line, _ in writer.lines) + "\n"
    plain = HEAD + REFERENCE + HELPERS.replace("@manifold.kernel\n", "") + "\n" + head + "\n"
    return text, plain + "\n".join(line for _, line in writer.lines) + "\n"


def load(folder: Path, name: str, text: str) -> ModuleType:
    """A module from a file of its own."""
    path = folder / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    machine = Machine(1 << 24)
    yield machine
    machine.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    yield tmp_path_factory.mktemp("kernels")
    sys.dont_write_bytecode = before


KINDS = {
    "ZeroDivisionError": "division by zero",
    "Overflow": "int overflow",
    "Conversion": "no i64 is equal to the truncated value",
    "Inexact": "int beyond 2**53 in a true division",
    "IndexError": "array index out of range",
}


def of_cpython(call: Callable[[], tuple[Any, ...]]) -> list[Any]:
    """The bits of the values, or what went wrong."""
    try:
        return bits(call())
    except (ValueError, OverflowError) as error:
        said = str(error)
        known = ("math domain error", "negative shift count")
        return [next((each for each in known if each in said), KINDS["Conversion"])]
    except Exception as error:
        return [KINDS[type(error).__name__]]


def bits(values: Any) -> list[Any]:
    """A form that tells zeros apart, but neither NaNs nor True from 1."""
    return [
        "nan" if v != v else struct.pack("<d", v) if isinstance(v, float) else int(v)
        for v in values
    ]


def of_program(run: Callable[..., Any], index: int, arguments: tuple[Any, ...]) -> list[Any]:
    try:
        partial = run(
            index, index + 1, gas=GAS, on_yield=lambda _: 0, on_sleep=None, arguments=arguments
        ).partial
    except Trap as trap:
        return [trap.message.split(": ", 1)[1].rsplit(" at index", 1)[0]]
    (values,) = finish("collect", partial, index, index + 1)  # type: ignore[misc]
    return bits(values)


inputs = st.tuples(st.sampled_from(INTS[:-2]) | st.integers(-100, 100), st.sampled_from(ANY_FLOATS))


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 2**32),
    size=st.integers(1, 8),
    given_inputs=st.lists(st.tuples(inputs, st.booleans()), min_size=2, max_size=5),
)
@example(seed=5310, size=7, given_inputs=[((3, 1.0), True)])  # jumps to jumps to one place
def test_a_generated_kernel_does_the_same_in_cpython_the_interpreter_and_compiled(
    machine: Machine, folder: Path, seed: int, size: int, given_inputs: list[Any]
) -> None:
    text, reference = generate(seed, size)
    name = f"k{abs(hash((seed, size)))}"
    kernel = load(folder, name, text).work
    plain = load(folder, f"{name}_plain", reference).work
    unit, verified = machine.load(kernel.program, "collect"), verify(kernel.program)
    for (n, x), flag in given_inputs:
        expected = of_cpython(lambda n=n, x=x, flag=flag: plain(n, x, flag))
        compiled = of_program(unit.run, n, (x, int(flag)))
        assert compiled == expected, f"{text}\n# work({n!r}, {x!r}, {flag!r})"

        def reference_run(*args: Any, **options: Any) -> Any:
            return interpret(verified, "collect", *args, **options)

        assert of_program(reference_run, n, (x, int(flag))) == expected, text


def test_the_generator_reaches_what_it_should() -> None:
    """A generator that writes nothing interesting would agree always."""
    text = "".join(generate(seed, 6)[0] for seed in range(150))
    for word in (
        *("while ", "for ", " else:", "break", "continue", "elif ", "**", "//", " % ", "<<", ">>"),
        *("divmod", "pick(", "pair(", "triangle(", "math.sqrt", "round(", "ints[", " and ", "not "),
        *("min(", "if ", "+=", "~", "math.isnan", "i0, i1 =", "0x7FFFFFFFFFFFFFFF"),
    ):
        assert word in text, word


# -- arrays in nested ranges ---------------------------------------------------------------------

LENGTH = 5


class Grid:
    """Writes a kernel whose nested ranges read and write two arrays at every kind of index."""

    BOUNDS = ("5", "0", "n", "n, 5", "4, -1, -1", "1, 5", "-2, 2", "n, 6, 2", "3, 3", "-5, n, 3")
    STEPS = ("a[{}] += b[{}] * 0.5", "b[{}] = a[{}] - x", "a[{}], b[{}] = b[0], a[-1]")
    STEPS += ("a[{}] = 2.0 * a[{}] + b[-1]", "if a[{}] > b[{}]: x = x + 1.0", "c[{}] ^= c[{}] + 1")

    def __init__(self, random: Random) -> None:
        self.random = random
        self.loops: list[str] = []
        self.lines: list[str] = []
        self.count = 0

    def put(self, text: str) -> None:
        self.lines.append("    " * (len(self.loops) + 1) + text)

    def index(self) -> str:
        """Mostly in range, or one or two beyond either end."""
        names = [*self.loops, *self.loops, "n", "k"]
        name, other = self.random.choice(names), self.random.choice(names)
        forms = [name] * 6 + [f"{name} + 1", f"{name} - 1", f"-{name}", f"{name} % 5"]
        return self.random.choice([*forms, f"{name} - {other}", f"{other} % 5 - 5", "0", "-5", "4"])

    def steps(self) -> None:
        for _ in range(self.random.randrange(1, 4)):
            if self.random.random() < 0.15:
                self.put(f"k = {self.index()}")
            first = self.index()
            second = first if self.random.random() < 0.4 else self.index()
            self.put(self.random.choice(self.STEPS).format(first, second))

    def loop(self) -> None:
        self.count += 1
        name = f"i{self.count}"
        bounds = [*self.BOUNDS, *(f"{each} + 1, 5" for each in self.loops), *self.loops]
        self.put(f"for {name} in range({self.random.choice(bounds)}):")
        self.loops.append(name)
        if self.random.random() < 0.2:
            self.put(f"{self.random.choice(self.loops)} += 1")  # the loop counts elsewhere
        self.steps()
        if len(self.loops) < 3 and self.random.random() < 0.7:
            self.loop()
            self.steps()
        self.loops.pop()

    def text(self) -> tuple[str, str]:
        """The file with the kernel, and the one for CPython."""
        self.put("a = [x, 1.0, 0.5, -2.0, 3.0]")
        self.put("b = [0.25] * 5")
        self.put("c = [0] * 5")
        self.put("k = 1")
        for _ in range(self.random.randrange(1, 4)):
            self.loop()
        self.put("return a[0], a[1], a[4], b[0], b[3], c[1], c[4], x, k")
        body = "def work(n: int, x: float):\n" + "\n".join(self.lines) + "\n"
        return HEAD + "@manifold.kernel\n" + body, body


def place_of(error: BaseException, path: Path) -> int:
    """The line of a file that an exception left."""
    lines = [each.lineno for each in traceback.extract_tb(error.__traceback__)
             if each.filename == str(path)]  # fmt: skip
    return lines[-1] or 0


def all_of(run: Callable[..., Any], n: int, x: float, gas: int) -> tuple[Any, ...]:
    """Values or the fault with its line and cells, the gas, and where it ran out."""
    yields: list[int] = []

    def more(used: int) -> int:
        yields.append(used)
        return 1000

    try:
        found = run(n, n + 1, gas=gas, on_yield=more, on_sleep=None, arguments=(x,))
    except Trap as trap:
        return trap.message, trap.line, repr(trap.cells), yields
    (values,) = finish("collect", found.partial, n, n + 1)
    return *bits(values), found.gas_used, yields


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 2**32),
    inputs=st.lists(st.integers(-6, 7), min_size=3, max_size=6, unique=True),
    gas=st.integers(0, 2000),
)
def test_arrays_in_nested_ranges_are_those_of_cpython_to_the_index_that_is_out_of_range(
    machine: Machine, folder: Path, seed: int, inputs: list[int], gas: int
) -> None:
    text, reference = Grid(Random(seed)).text()
    name = f"g{seed}"
    kernel = load(folder, name, text).work
    plain = load(folder, f"{name}_plain", reference)
    unit, verified = machine.load(kernel.program, "collect"), verify(kernel.program)
    for n in inputs:
        compiled = all_of(unit.run, n, 1.5, gas)

        def reference_run(*args: Any, **options: Any) -> Any:
            return interpret(verified, "collect", *args, **options)

        assert compiled == all_of(reference_run, n, 1.5, gas), f"{text}\n# work({n})"
        try:
            expected = bits(plain.work(n, 1.5))
        except IndexError as error:
            line = place_of(error, folder / f"{name}_plain.py") + text.count(
                "\n", 0, text.index("def")
            )
            assert "array index out of range" in compiled[0], f"{text}\n# work({n})"
            assert compiled[1] == line, f"{text}\n# work({n})"
        else:
            assert list(compiled[:-2]) == expected, f"{text}\n# work({n})"


def test_the_grids_fault_and_do_not_in_fair_shares(folder: Path) -> None:
    """Grids that always fault, or never do, would show little."""
    faulty = 0
    for seed in range(60):
        plain = load(folder, f"s{seed}", Grid(Random(seed)).text()[1])
        try:
            plain.work(seed % 6, 1.5)
        except IndexError:
            faulty += 1
    assert 15 <= faulty <= 45, faulty
