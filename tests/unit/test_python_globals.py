"""`manifold.globals` in kernels: what it compiles to, which type it has, what is refused.

Plain Python, the interpreter and the compiled program do the same to the registers. The object
`manifold.globals` is a dict here: a cluster's is in tests/integration.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import manifold
from manifold.vm.errors import InvalidProgram, ManifoldError, Trap
from manifold.vm.interpret import run as interpret
from manifold.vm.python.registers import connected
from manifold.vm.syntax import disassemble
from manifold.vm.valid import verify

_names = itertools.count()


class Registers:
    """The SDK's object, as far as kernels use it: an absent global is None to `add`, `propose`."""

    def __init__(self, **held: Any) -> None:
        self.__dict__["held"] = held

    def __getitem__(self, name: str) -> Any:
        return self.held[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self.held[name] = value

    def __getattr__(self, name: str) -> Any:
        return self[name]

    def watch(self, name: str) -> None:
        raise AssertionError("no kernel can")

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def add(self, name: str, amount: Any) -> Any:
        before = self.held.get(name)
        self.held[name] = amount + (before or 0)
        return before

    def propose(self, name: str, expected: Any, new: Any) -> tuple[Any, bool]:
        found = self.held.get(name)
        if found == expected:
            self.held[name] = new
        return found, found == expected


@pytest.fixture
def registers(monkeypatch: pytest.MonkeyPatch) -> Registers:
    made = Registers()
    monkeypatch.setattr(manifold, "globals", made, raising=False)
    return made


HEAD = """\
import manifold
import manifold as m
from manifold import globals as g

NAME = "counter"
held = {"counter": 1}

@manifold.kernel
def whole(n: int) -> int:
    g.shared += n
    return n

"""


@pytest.fixture
def module(registers: Registers, tmp_path: Path) -> Iterator[Callable[[str], ModuleType]]:
    def made(text: str) -> ModuleType:
        path = tmp_path / f"kernels{next(_names)}.py"
        path.write_text(HEAD + text)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
        return found

    yield made


def kernel(module: Callable[[str], ModuleType], body: str) -> Any:
    lines = "\n".join("    " + line for line in body.splitlines())
    return module(f"@manifold.kernel\ndef f(n: int, x: float):\n{lines}\n").f


def instructions(made: Any) -> list[str]:
    lines = disassemble(made.program).splitlines()
    found = [line.partition(":")[2].strip() if line[:1] == "L" else line.strip() for line in lines]
    return [line for line in found if line and line[0] not in ".;"]


# -- what it becomes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["manifold.globals", "m.globals", "g"], ids=["package", "alias", "object"]
)
@pytest.mark.parametrize("place", [".counter", '["counter"]', '["/globals/counter"]'])
def test_a_global_is_found_whatever_its_object_is_called(module, text: str, place: str) -> None:
    body = f"{text}{place} = {text}{place} + n\nreturn 0"
    found = instructions(kernel(module, body))
    assert [each for each in found if "GLOBAL" in each] == [
        "LOAD_GLOBAL counter", "STORE_GLOBAL counter",
    ]  # fmt: skip


def test_adding_in_place_is_one_step(module) -> None:
    made = kernel(module, "g.a += n\ng.a -= n + 1\ng.a -= 3\ng['b'] += x\ng.b -= x\nreturn 0")
    found = instructions(made)
    assert found.count("ADD_GLOBAL a") == 3 and found.count("ADD_GLOBAL b") == 2
    assert not [each for each in found if each.startswith(("LOAD_GLOBAL", "STORE_GLOBAL"))]
    assert made.program.globals == (("a", "i64"), ("b", "f64"))
    assert made.program.written == ("a", "b")


def test_add_gives_what_was_there_before_and_propose_what_was_found(module, registers) -> None:
    made = kernel(
        module,
        'before = g.add("a", n)\nfound, ok = g.propose("a", n, 50)\n'
        'seen, no = g.propose("a", n, 60)\ng.add("a", 1)\n'
        "return before, found, ok, seen, no, g.a",
    )
    assert made.compiled(7, 0.0) == (0, 7, True, 50, False, 51)
    assert made.compiled(7, 0.0) == (51, 58, False, 58, False, 59)
    assert type(made.compiled(7, 0.0)[2]) is bool
    assert registers.held == {"a": 67}


def test_an_absent_global_counts_as_zero_of_its_type(module, registers) -> None:
    made = kernel(
        module,
        'r: float = g.r\nfound, ok = g.propose("p", 0.0, x)\n'
        'return g.a, r, g.add("b", x), found, ok',
    )
    seen = made.compiled(1, 2.5)
    assert repr(seen) == "(0, 0.0, 0.0, 0.0, True)"
    assert registers.held == {"b": 2.5, "p": 2.5}


def test_a_store_goes_to_several_places_at_once_in_pythons_order(module, registers) -> None:
    made = kernel(
        module, "y = g.a = n\ng.b, z, g['c'] = n, y, x\ng.b, g.a = g.a, g.b + 1\nreturn z"
    )
    assert made.compiled(4, 0.5) == 4
    assert registers.held == {"a": 5, "b": 4, "c": 0.5}
    registers.held.clear()
    assert made(4, 0.5) == 4 and registers.held == {"a": 5, "b": 4, "c": 0.5}


def test_globals_of_a_kernel_that_is_called_belong_to_the_one_that_calls(module, registers) -> None:
    made = kernel(module, "return whole(n) + g.shared")
    assert made.program.written == ("shared",)
    assert made.compiled(6, 0.0) == 12


def test_what_is_called_in_a_function_has_globals_too(module, registers) -> None:
    text = "@manifold.kernel\ndef f(n: int) -> int:\n    g.calls += 1\n"
    made = module(text + "    return 0 if n == 0 else g.add('sum', n) * 0 + f(n - 1)\n").f
    assert made.compiled(5) == 0
    assert registers.held == {"calls": 6, "sum": 15}


def test_a_loop_proposes_until_it_is_accepted(module, registers) -> None:
    body = """\
tries = 0
while True:
    tries += 1
    now = g.best
    if now >= n:
        return tries
    found, ok = g.propose("best", now, n)
    if ok:
        return tries"""
    made = kernel(module, body)
    assert [made.compiled(n, 0.0) for n in (3, 9, 4)] == [1, 1, 1]
    assert registers.held == {"best": 9}


def test_an_overflow_is_what_the_registers_make_of_it_but_a_negated_least_int_is_a_fault(
    module, registers
) -> None:
    made = kernel(module, "g.a -= n\nreturn 0")
    with pytest.raises(Trap, match="int overflow"):
        made.compiled(-(1 << 63), 0.0)
    assert registers.held == {}


# -- types ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("return g.a", "i64"),
        ("return g.a / 2", "i64"),
        ("y: int = g.a\nreturn y", "i64"),
        ("g.a = n > 3\nreturn 0", "i64"),
        ("g.a += True\nreturn g.a", "i64"),
        ("y: float = g.a\nreturn y", "f64"),
        ("y = g.a\ng.a = 0.5\nreturn y", "f64"),
        ("y = g.a\nz = y\nwhile z > 1.0:\n    z = z - x\n    g.a = z\nreturn y", "f64"),
        ("g.a: float = x\nreturn 0", "f64"),
        ("k = g.a\nfor i in range(3):\n    g.a = k\n    k = 0.5\nreturn k", "f64"),
        ("g.a = g.a * 0.5\nreturn 0", "f64"),
        ("g.a = g.a / 2\nreturn 0", "f64"),
        ("g.a += x\nreturn g.a", "f64"),
        ("return g.add('a', 1.0)", "f64"),
        ("found, ok = g.propose('a', x, x + 1)\nreturn found", "f64"),
        ("g.shared = whole(n)\nreturn g.shared", "i64"),
    ],
)
def test_a_global_is_a_float_where_a_float_is_written_or_declared_else_an_int(
    module, body: str, kind: str
) -> None:
    made = kernel(module, body)
    assert [each.type for each in made.program.globals] == [kind]
    verify(made.program)


def test_a_register_of_another_type_is_a_trap_at_its_line(module, registers) -> None:
    registers.held["a"] = 1.5
    made = kernel(module, "y = 1\nreturn g.a + y")
    with pytest.raises(Trap, match=r"LOAD_GLOBAL a: the global a holds an f64.*i64") as caught:
        made.compiled(1, 0.0)
    assert caught.value.line == len(HEAD.splitlines()) + 4


# -- what is refused -----------------------------------------------------------------------------

REFUSED = [
    ("return g[NAME]", "NAME", "must be known", '"counter"'),
    ("return g[n]", "n", "must be known", '"counter"'),
    ("return g['a b']", "'a b'", "not a name", "letters"),
    ("return g['']", "''", "not a name", "letters"),
    ("g.add(NAME, 1)\n    return 0", "NAME", "must be known", '"counter"'),
    ("g.é = 1\n    return 0", "g.é", "not a name", "letters"),
    ("return g", "g", "not a number", "manifold.globals.counter"),
    ("return manifold.globals", "manifold.globals", "not a number", "manifold.globals.counter"),
    ("h = g\n    return h.a", "g", "not a number", "manifold.globals.counter"),
    ("return g.add", "g.add", "something else", '["add"]'),
    ("g.propose = 1\n    return 0", "g.propose", "something else", '["propose"]'),
    ("return g.watch", "g.watch", "something else", '["watch"]'),
    ("return g._own", "g._own", "something else", '["_own"]'),
    ("return g.get('a')", "g.get", "no function get", "propose"),
    ("return g.a.b", "g.a.b", "no objects", "numbers"),
    ("g.a *= 2\n    return 0", "g.a *= 2", "in one step", "propose"),
    ("g['a'] //= 2\n    return 0", "g['a'] //= 2", "in one step", "propose"),
    ("g.add('a')\n    return 0", "g.add('a')", "takes 2 arguments", "amount"),
    ("g.propose('a', 1)\n    return 0", "g.propose('a', 1)", "takes 3", "expected"),
    ("g.add('a', amount=1)\n    return 0", "g.add('a', amount=1)", "by position", "names"),
    ("found = g.propose('a', 1, 2)\n    return found", "found", "2 values", "a, b ="),
    ("if g.propose('a', 1, 2): return 1\n    return 0", "g.propose", "several values", "a, b ="),
    ("g.a = n\n    g.a = x\n    return 0", "g.a", "an int elsewhere, but a float", "point"),
    ("g.a = x\n    g.a += 1\n    return 0", "g.a", "a float elsewhere, but an int", "point"),
    ("g.propose('a', n, x)\n    return 0", "x", "an int elsewhere", "Convert"),
    ("y: float = g.a\n    g.a = 1\n    return y", "g.a", "a float elsewhere", "Convert"),
    ("y: float = g.a\n    z: int = g.a\n    return y", "g.a", "a float elsewhere", "x: float"),
    ("y: bool = g.a\n    return y", "y: bool", "not bool", "Convert"),
    ("y = 0.5\n    y = g.a\n    return y", "y", "one type", "y = 0.0"),
    ("g.shared = 0.5\n    return whole(n)", "whole(n)", "a global has one type", "Convert"),
    ("g.a = 1, 2\n    return 0", "g.a", "one type", "Convert"),
    ("a = [0] * 4\n    a[g.i] += 1\n    return 0", "g.i", "twice", "i = "),
    ("a = [0] * 4\n    a[g.add('i', 1) % 4] += 1\n    return 0", "g.add", "twice", "i = "),
    ("a = [0] * 4\n    a[n + whole(n)] += 1\n    return 0", "n + whole(n)", "twice", "i = "),
    ("g.a\n    return 0", "g.a", "no objects", "outside"),
    ("del g.a\n    return 0", "del g.a", "means nothing", "Leave it out"),
    ("return held['counter']", "held['counter']", "only local arrays", "64"),
    ("globals()['a'] = 1\n    return 0", "globals()['a']", "only local arrays", "64"),
]


@pytest.mark.parametrize(("body", "marked", "reason", "instead"), REFUSED)
def test_what_cannot_be_is_refused_with_its_place_and_a_way_out(
    module, body: str, marked: str, reason: str, instead: str
) -> None:
    with pytest.raises(InvalidProgram) as caught:
        module(f"@manifold.kernel\ndef f(n: int, x: float):\n    {body}\n")
    said, shown, marks, _ = caught.value.message.split("\n")
    assert reason in said and instead in caught.value.next_step, str(caught.value)
    assert shown[marks.index("^") :].startswith(marked), (shown, marks)


def test_a_variable_of_that_name_is_not_the_globals(module) -> None:
    with pytest.raises(InvalidProgram, match="only local arrays"):
        module("@manifold.kernel\ndef f(g: int) -> int:\n    return g['a']\n")
    made = kernel(module, "g = [1, 2]\nm = 1\nreturn g[m]")
    assert made.program.globals == () and made.compiled(0, 0.0) == 2


# -- where it runs -------------------------------------------------------------------------------


def test_where_nothing_is_connected_a_compiled_kernel_says_so(
    module, registers, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = kernel(module, "g.a += 1\nreturn 1")

    class Away(Registers):
        def add(self, name: str, amount: Any) -> Any:
            raise ManifoldError("No cluster is running here.", "manifold up")

    monkeypatch.setattr(manifold, "globals", Away())
    with pytest.raises(Trap, match=r"line 15, ADD_GLOBAL a: No cluster is running.*manifold up"):
        made.compiled(1, 0.0)


def test_where_the_sdk_has_no_globals_a_compiled_kernel_is_refused(
    module, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = kernel(module, "g.a += 1\nreturn 1")
    monkeypatch.setattr(sys.modules["manifold.vm.python.kernel"], "connected", lambda: None)
    with pytest.raises(InvalidProgram, match="uses globals, and here are none"):
        made.compiled(1, 0.0)
    assert kernel(module, "return n").compiled(1, 0.0) == 1


def test_an_absent_global_may_be_told_in_any_of_the_ways_an_sdk_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class NotFound(ManifoldError):
        code = "not_found"

    class Answers:
        def __init__(self, answer: Any) -> None:
            self.answer = answer

        def __getitem__(self, name: str) -> Any:
            if isinstance(self.answer, Exception):
                raise self.answer
            return self.answer

    for answer in (KeyError("a"), NotFound("There is no a."), None, 0):
        monkeypatch.setattr(manifold, "globals", Answers(answer), raising=False)
        provider = connected()
        assert provider is not None and provider.load(1, "a", "i64") == 0
    monkeypatch.setattr(manifold, "globals", Answers(ManifoldError("Away.")))
    provider = connected()
    assert provider is not None
    with pytest.raises(ManifoldError, match="Away"):
        provider.load(1, "a", "i64")


@pytest.mark.parametrize("error", [TypeError("a is text"), OverflowError("a is full")])
def test_what_cannot_be_added_to_is_a_fault_of_the_kernel(
    module, registers, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def add(*_: Any) -> Any:
        raise error

    made = kernel(module, "g.a += 1\nreturn 1")
    monkeypatch.setattr(Registers, "add", add)
    with pytest.raises(Trap, match=f"ADD_GLOBAL a: {error} at index 0"):
        made.compiled(1, 0.0)


# -- generated kernels ---------------------------------------------------------------------------


def statements(random: Random, depth: int = 0) -> list[str]:
    """Statements on two globals, an int and a float, and on two variables."""
    found: list[str] = []
    for _ in range(random.randrange(1, 5)):
        kind = random.choice("if")
        name, variable = {"i": ("whole", "k"), "f": ("real", "y")}[kind]
        value = random.choice(
            {"i": ["k % 7", "3", "n % 5", "whole_of()"], "f": ["y / 3", "0.5", "x", "2.0"]}[kind]
        )
        value = value.replace("whole_of()", "g.whole % 9")
        found += random.choice(
            [
                [f"g.{name} = {value}"],
                [f"g['{name}'] {random.choice('+-')}= {value}"],
                [f"{variable} = g.{name}"],
                [f"{variable} = g.add('{name}', {value})"],
                [f"{variable}, ok = g.propose('{name}', {variable}, {value})", "k += ok"],
                [f"if g.{name} > {value}:", *indented(statements(random, depth + 1))]
                if depth < 2
                else ["k = (k + g.whole) % 1000"],
                [f"for i{depth} in range(3):", *indented(statements(random, depth + 1))]
                if depth < 2
                else [f"g.add('{name}', {value})"],
                ["a[k % 4] += g.whole % 10", "k += a[1]", "k = k % 1000"],
            ]
        )
    return found


def indented(lines: list[str]) -> list[str]:
    return ["    " + line for line in lines]


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 1 << 40))
def test_a_generated_kernel_does_to_the_registers_what_python_does(
    module, registers: Registers, seed: int
) -> None:
    body = ["k = 0", "y = 0.0", "ok = False", "a = [0] * 4", *statements(Random(seed))]
    body += ["g.whole = g.whole % 1000", "g.real += 0.0", "return k, y, ok, a[1]"]
    outcomes: list[tuple[Any, str]] = []
    made = kernel(module, "\n".join(body))
    for way in ("python", "compiled", "interpreted"):
        registers.held.clear()
        registers.held.update(whole=5, real=1.5)
        if way == "python":
            result = made(11, 0.25)
        elif way == "compiled":
            result = made.compiled(11, 0.25)
        else:
            done = interpret(
                verify(made.program), "count", 11, 12, gas=1 << 50, on_yield=lambda _: 0,
                on_sleep=print, arguments=(0.25,), on_global=connected(),
            )  # fmt: skip
            assert done.partial.emitted == 4
            result = outcomes[0][0]
        outcomes.append((result, repr(registers.held)))
    assert outcomes[0] == outcomes[1] == outcomes[2], "\n".join(body)
