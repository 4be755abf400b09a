"""What is outside the subset is refused at decoration: where, why, and what to write instead."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from manifold.vm.errors import InvalidProgram

HEAD = """\
import math, random, os
import manifold

NAMES = {"a": 1}
BIG = 1 << 64

def plain(x):
    return x

@manifold.kernel
def two(n: int):
    return n, 1.5

@manifold.kernel
def half(x: float) -> float:
    return x / 2.0

"""

# What stands in the body of `def f(n: int, x: float)`, the place of the mark under it in the last
# line but one, words of the reason, and words of what to write instead.
BODIES = [
    ("print(n); return n", "print", "do not print", "Return the value"),
    ("return [n]", "[n]", "a list stands only", "[0.0] * 64"),
    ("return {1: n}", "{1: n}", "no dicts", "array"),
    ("return {n}", "{n}", "no sets", "flags"),
    ("return 'a'", "'a'", "only int, float and bool", "number"),
    ("return f'{n}'", "f'{n}'", "no strings", "outside"),
    ("return None", "None", "no values like None", "number"),
    ("return", "return", "returns a value", "return 0"),
    ("return 1j", "1j", "no values like 1j", "number"),
    ("return sum(i for i in range(n))", "sum", "no sum", "loop"),
    ("return max([i for i in range(n)])", "max", "two numbers or more", "docs/python.md"),
    ("a = [i for i in range(n)]\n    return 0", "[i for", "no comprehensions", "loop"),
    ("return (lambda a: a)(n)", "lambda", "call kernels", "64"),
    ("g = lambda a: a\n    return g", "lambda", "lambda", "kernel"),
    ("def g(): pass\n    return n", "def g", "inside a kernel", "before this one"),
    ("class A: pass\n    return n", "class A", "class", "outside"),
    ("try:\n        return n\n    except ValueError:\n        return 0", "try:", "catch", "Test"),
    ("raise ValueError(n)", "raise", "do not raise", "assert"),
    ("with open('a'):\n        return n", "with", "context managers", "outside"),
    ("import math\n    return n", "import", "does not import", "top of the file"),
    ("from math import sin\n    return n", "from", "does not import", "top of the file"),
    ("global n2\n    n2 = 1\n    return n", "global", "run on many machines", "Return"),
    ("del n\n    return 1", "del", "means nothing", "Leave it out"),
    ("match n:\n        case 1: return 1\n    return 2", "match", "no match", "elif"),
    ("yield n", "yield", "at once", "Return"),
    ("return (n := 2)", "n := 2", ":=", "line of its own"),
    ("return n in (1, 2)", "n in", "`in`", "=="),
    ("return n is 1", "n is", "`is`", "=="),
    ("return n @ n", "n @ n", "matrices", "loops"),
    ("return n.bit_length()", "n.bit_length", "no methods", "64"),
    ("return n.real", "n.real", "no objects", "outside"),
    ("return math.sin(x)", "math.sin", "differ from machine to machine", "series"),
    ("return math.pow(x, 2.0)", "math.pow", "last bits", "x * x"),
    ("return x ** 2", "x ** 2", "other last bits", "x * x"),
    ("return n ** -1", "n ** -1", "negative power", "1 / x"),
    ("return random.random()", "random.random", "not in the subset", "docs/python.md"),
    ("return plain(n)", "plain", "not a kernel", "@manifold.kernel"),
    ("return later(n)", "later", "not defined", "above"),
    ("return nowhere", "nowhere", "not defined", "above"),
    ("return NAMES", "NAMES", "a dict", "argument"),
    ("return math", "math", "a module", "argument"),
    ("return math.floor", "math.floor", "not a number", "Call"),
    ("return BIG", "BIG", "64 bits", "wrap=True"),
    ("return n + 9223372036854775808", "9223372036854775808", "64 bits", "wrap=True"),
    ("if n: y = 1\n    return y", "y", "may have no value", "every path"),
    ("for i in range(n): y = i\n    return y", "y", "may have no value", "every path"),
    ("for i in range(n): pass\n    return i", "i", "may have no value", "every path"),
    ("y = y + 1\n    return y", "y", "may have no value", "every path"),
    ("y = 0\n    y = x\n    return y", "y", "one type", "y = 0.0"),
    ("n = x\n    return n", "n", "one type", "convert"),
    ("return 1 if n else 2.0", "2.0", "one type", "point"),
    ("return n or x", "x", "one type", "Convert"),
    ("return min(n, x)", "x", "one type", "float"),
    ("if n: return 1\n    return 1.0", "return 1.0", "returns a float", "point"),
    ("if n: return 1", "if n", "without a return", "Add a return"),
    ("for i in range(n): return i", "for i", "without a return", "Add a return"),
    ("y, z = two(n), 1\n    return z", "two(n)", "several values", "a, b ="),
    ("return two(n) + 1", "two(n)", "several values", "a, b ="),
    ("y = two(n)\n    return y", "y", "2 values", "a, b ="),
    ("a, b, c = two(n)\n    return a", "a, b, c", "3 names for 2", "Name each"),
    ("return two(n, 1)", "two(n, 1)", "takes 1 arguments", "exactly"),
    ("return two(n=n)", "two(n=n)", "by position", "names"),
    ("return half(n)", "n", "is a float, but this is an int", "Convert"),
    ("a = [0] * n\n    return a[0]", "n", "constant", "as long as it can get"),
    ("a = [0] * 4\n    return a", "a", "not passed", "elements"),
    ("a = [0] * 4\n    b = a\n    return b[0]", "a", "not passed", "a[i]"),
    ("a = [0] * 4\n    a = 3\n    return 1", "a", "an array already", "another name"),
    ("a = [0] * 4\n    a[0] = 1.5\n    return 1", "a[0]", "type int", "Convert"),
    ("a = [0] * 4\n    return a[x]", "x", "index is an int", "int("),
    ("a = [0] * 4\n    return a[0:2]", "0:2", "slices", "loop"),
    ("a = [0] * 4\n    a.append(1)\n    return 1", "a.append", "no methods", "do not grow"),
    ("a = [1, 2.0]\n    return a[0]", "2.0", "one type", "point"),
    ("a = [0, 0] * 2\n    return a[0]", "[0, 0]", "one value is repeated", "64"),
    ("for a in (1, 2): pass\n    return 1", "(1, 2)", "range only", "range(len(a))"),
    ("for i, j in range(n): pass\n    return 1", "i, j", "one variable", "for i in"),
    ("for i in range(x): pass\n    return 1", "x", "takes ints", "int("),
    ("for i in range(1, 5, 0): pass\n    return 1", "0", "step of range", "another"),
    ("return x & 1", "x & 1", "take ints", "int("),
    ("return ~x", "~x", "takes an int", "int("),
    ("return round(x, 2)", "round(x, 2)", "one number", "docs/python.md"),
    ("return pow(n, 2, 7)", "pow(n, 2, 7)", "2 numbers", "docs/python.md"),
    ("return len(n)", "len(n)", "local array", "64"),
    ("y: int = x\n    return y", "y: int", "not int", "Convert"),
    ("y: int\n    return 1", "y: int", "does nothing", "value"),
    ("n == 1\n    return n", "n == 1", "not used", "Assign"),
    ("assert n, x\n    return n", "x", "constant", "text"),
    ("return f(n)", "f(n)", "takes 2 arguments", "exactly"),
    ("return f(n, x)", "", "type of the result cannot be found", "-> int"),
]

HEADS = [
    ("def f(n):\n    return n", "n", "needs its type", "n: int"),
    ("def f(n: str):\n    return n", "n: str", "needs its type", "n: int"),
    ("def f(n: int = 3):\n    return n", "3", "no defaults", "Pass"),
    ("def f(*n: int):\n    return 1", "n: int", "fixed number", "Name"),
    ("def f(*, n: int):\n    return n", "n: int", "fixed number", "Name"),
    ("def f(**n: int):\n    return 1", "n: int", "fixed number", "Name"),
    ("def f(n: int) -> str:\n    return n", "str", "does not return str", "tuple[int, float]"),
    ("def f(n: int) -> float:\n    return n", "return n", "declared a float", "Convert"),
    ("def f(n: int) -> int:\n    a = [0]\n    return f(a[0])", "def f", "no arrays", "loop"),
]


@pytest.fixture
def decorate(tmp_path: Path) -> Iterator[object]:
    def decorate(text: str) -> InvalidProgram:
        path = tmp_path / "wrong.py"
        path.write_text(HEAD + "@manifold.kernel\n" + text + "\n")
        spec = importlib.util.spec_from_file_location("wrong", path)
        assert spec is not None and spec.loader is not None
        with pytest.raises(InvalidProgram) as refused:
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        return refused.value

    yield decorate


def check(error: InvalidProgram, text: str, marked: str, reason: str, instead: str) -> None:
    said, shown, marks, _ = error.message.split("\n")
    assert re.match(r"/.*wrong\.py, line \d+, column \d+: ", said)
    assert reason in said and instead in error.next_step, str(error)
    lines = (HEAD + "@manifold.kernel\n" + text).splitlines()
    assert shown == "    " + lines[error.line - 1]
    at = marks.index("^")
    assert at == error.column - 1 + 4
    assert shown[at:].startswith(marked), (shown[at:], marked)


@pytest.mark.parametrize(("body", "marked", "reason", "instead"), BODIES)
@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_what_is_outside_the_subset_is_refused_with_its_place_and_a_way_out(
    decorate, body: str, marked: str, reason: str, instead: str
) -> None:
    text = f"def f(n: int, x: float):\n    {body}"
    check(decorate(text), text, marked, reason, instead)


@pytest.mark.parametrize(("text", "marked", "reason", "instead"), HEADS)
def test_a_signature_that_says_too_little_or_too_much_is_refused(
    decorate, text: str, marked: str, reason: str, instead: str
) -> None:
    check(decorate(text), text, marked, reason, instead)


def test_what_has_no_source_of_its_own_is_refused() -> None:
    from manifold.vm.python import kernel

    with pytest.raises(InvalidProgram, match="a lambda cannot be a kernel"):
        kernel(lambda n: n)
    with pytest.raises(InvalidProgram, match="plain function, not 'type'"):
        kernel(int.__class__)
    names: dict[str, object] = {}
    exec("def f(n: int): return n", names)
    with pytest.raises(InvalidProgram, match=r"cannot be read.*compiled from source"):
        kernel(names["f"])  # type: ignore[arg-type]

    async def later(n: int) -> int:
        return n

    with pytest.raises(InvalidProgram, match="an async function cannot be a kernel"):
        kernel(later)


def test_a_refusal_inside_an_indented_function_points_at_the_right_column() -> None:
    from manifold.vm.python import kernel

    with pytest.raises(InvalidProgram) as refused:

        @kernel
        def f(n: int) -> int:
            return n + "a"  # type: ignore[operator]

    shown, marks = refused.value.message.split("\n")[1:3]
    assert shown[marks.index("^") :].startswith('"a"')
    assert Path(__file__).read_text().splitlines()[refused.value.line - 1].strip() == shown.strip()


def test_what_becomes_too_large_by_copying_is_refused(decorate) -> None:
    double = "def g{0}(n: int) -> int:\n    return g{1}(n) ^ g{1}(n + 1)\n\n@manifold.kernel\n"
    text = "def g0(n: int) -> int:\n    return n * n\n\n@manifold.kernel\n"
    text += "".join(double.format(at, at - 1) for at in range(1, 16))
    error = decorate(text + "def f(n: int) -> int:\n    return g15(n)")
    assert "becomes too large" in error.message and "call it in a loop" in error.next_step
