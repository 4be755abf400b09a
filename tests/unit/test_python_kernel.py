"""What a kernel is, and what its arithmetic means; docs/python.md says the same in prose."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import manifold
from manifold.kernel.errors import InvalidProgram
from manifold.shells.sdk.programs import program_of
from manifold.vm.errors import Trap
from manifold.vm.python import Kernel, array, kernel
from manifold.vm.python.slices import GAS_FIRST, GAS_MIN, GROWTH, Slices
from manifold.vm.syntax import disassemble

LEAST, GREATEST = -(1 << 63), (1 << 63) - 1
FACTOR = 3
ROOT = math.sqrt(2)
MASK = GREATEST


@kernel
def collatz(n: int) -> int:
    """Steps to one."""
    steps = 0
    while n != 1:
        n = n // 2 if n % 2 == 0 else FACTOR * n + 1
        steps += 1
    return steps


@kernel
def add(a: int, b: int) -> int:
    return a + b


@kernel(wrap=True)
def wrapping(a: int, b: int) -> tuple[int, int, int, int, int]:
    return a + b, a * b, -a, abs(a), a << (b & 63)


@kernel
def divide(a: int, b: int) -> tuple[int, int, float]:
    return a // b, a % b, a / b


@kernel
def exactly(a: int, b: float) -> tuple[bool, bool, bool, bool]:
    return a < b, a == b, b <= a, a != b


@kernel
def fibonacci(n: int) -> int:
    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)


@kernel
def forever(n: int) -> int:
    return forever(n + 1) + 1


@kernel
def random_below(state: int) -> int:
    return (state * 6364136223846793005 + 1442695040888963407) & MASK


@kernel
def ladder(a: int, step: int) -> tuple[int, int]:
    count, last = 0, 0
    for i in range(a, GREATEST, step):
        count, last = count + 1, i
        if count == 5:
            break
    return count, last


@kernel
def searched(n: int) -> int:
    for i in range(2, n):
        if n % i == 0:
            break
    else:
        return -1
    return i if n > 3 else 0


@kernel
def sieve(n: int) -> int:
    marked = array(bool, 100)
    found = 0
    for i in range(2, 100):
        if not marked[i]:
            found += 1 if i < n else 0
            for j in range(i * i, 100, i):
                marked[j] = True
    return found + marked[-1] * 1000


@kernel
def fresh(n: int) -> int:
    total = 0
    for _ in range(3):
        a = [0] * 4
        a[n % 4] += 1
        total += a[0] + a[1] + a[2] + a[3]
    return total


@kernel
def reached(i: int, j: int) -> int:
    a = [10, 20, 30]
    total = 0
    for _ in range(2):
        total += a[i]
        a[i] = 1
        i = j
    return total + a[i]


@kernel
def best(x: float, y: float) -> tuple[float, float]:
    return min(x, y), max(x, y)


@kernel
def checks(n: int, x: float) -> float:
    assert n >= 0, "n is negative"
    return math.sqrt(x) / n


@kernel
def everywhere(flag: bool) -> float:
    return ROOT if flag else math.inf


def outcome(call: Any, *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except Trap as trap:
        return trap.message.split(": ", 1)[1].rsplit(" at index", 1)[0]


def test_a_kernel_is_still_the_function() -> None:
    assert collatz(27) == 111 and collatz.__wrapped__(27) == 111
    assert collatz.__name__ == "collatz" and collatz.__doc__ == "Steps to one."
    assert repr(collatz) == "<kernel collatz(n: int) -> int>"
    assert repr(wrapping).endswith("-> tuple[int, int, int, int, int], wrap=True>")
    assert isinstance(collatz, Kernel)


def test_a_kernel_runs_compiled_in_this_process() -> None:
    assert collatz.compiled(27) == 111
    assert everywhere.compiled(True) == ROOT and everywhere.compiled(False) == math.inf
    assert exactly.compiled(1, 2.0) == (True, False, False, True)
    assert type(exactly.compiled(1, 2.0)[0]) is bool and type(divide.compiled(6, 3)[2]) is float


@pytest.mark.parametrize("first", ["", ", manifold.kernel.effects", ", manifold.kernel"])
def test_the_package_manifold_kernel_is_the_decorator_whoever_imports_it_first(first: str) -> None:
    script = f"import manifold{first}; print(callable(manifold.kernel), manifold.kernel.__name__)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30
    )
    assert done.stdout == "True manifold.kernel\n", done.stderr


def test_the_decorator_and_the_package_are_one_object() -> None:
    assert manifold.kernel.errors.InvalidProgram is InvalidProgram  # type: ignore[attr-defined]
    assert isinstance(manifold.kernel(wrap=True)(collatz.__wrapped__), Kernel)
    assert manifold.array is array and array(float, 3) == [0.0, 0.0, 0.0]


def test_arguments_are_checked_as_python_checks_them() -> None:
    with pytest.raises(TypeError, match="takes 2 arguments, not 1"):
        add.compiled(1)
    with pytest.raises(TypeError, match="a is an int, not float"):
        add.compiled(1.0, 2)
    with pytest.raises(TypeError, match="flag is a bool, not int"):
        everywhere.compiled(1)
    with pytest.raises(OverflowError, match="b does not fit in 64 bits"):
        add.compiled(1, 1 << 63)
    with pytest.raises(TypeError, match="by position"):
        add.compiled(1, b=2)


def test_kernels_are_pickled_by_reference() -> None:
    assert pickle.loads(pickle.dumps(collatz)) is collatz


def test_programs_are_accepted_wherever_a_kernel_is_and_plain_functions_are_not() -> None:
    assert program_of(collatz) is collatz.program
    with pytest.raises(InvalidProgram, match=r"collatz is not a program.*@manifold.kernel"):
        program_of(collatz.__wrapped__)  # type: ignore[arg-type]
    with pytest.raises(InvalidProgram, match="first parameter is not an int"):
        program_of(everywhere)


def test_a_fault_names_the_line_of_the_python_source() -> None:
    with pytest.raises(Trap) as caught:
        divide.compiled(1, 0)
    line = next(
        number
        for number, text in enumerate(Path(__file__).read_text().splitlines(), 1)
        if "return a // b" in text
    )
    assert caught.value.line == line
    assert caught.value.message.startswith(f"test_python_kernel.py, line {line}, DIV: division")


@pytest.mark.parametrize("a", [LEAST, LEAST + 1, -2, -1, 0, 1, GREATEST])
@pytest.mark.parametrize("b", [LEAST, -1, 0, 1, GREATEST])
def test_an_int_that_does_not_fit_is_a_fault_unless_the_kernel_wraps(a: int, b: int) -> None:
    whole = a + b
    fits = LEAST <= whole <= GREATEST
    assert outcome(add.compiled, a, b) == (whole if fits else "int overflow")
    expected = [a + b, a * b, -a, abs(a), a << (b & 63)]
    assert wrapping.compiled(a, b) == tuple(
        (value + (1 << 63)) % (1 << 64) - (1 << 63) for value in expected
    )


def test_only_the_least_int_by_minus_one_overflows_a_division() -> None:
    assert divide.compiled(-7, 2) == (-4, 1, -3.5) and divide.compiled(7, -2) == (-4, -1, -3.5)
    assert outcome(divide.compiled, LEAST, -1) == "int overflow"
    assert outcome(divide.compiled, 1, 0) == "division by zero"


@pytest.mark.parametrize("a", [-(1 << 53), (1 << 53) - 1, 1 << 53, -(1 << 53) - 1, 12345678901])
def test_true_division_is_exact_or_a_fault(a: int) -> None:
    exact = -(1 << 53) <= a < 1 << 53
    assert outcome(divide.compiled, a, 7) == (
        divide(a, 7) if exact else "int beyond 2**53 in a true division"
    )


@pytest.mark.parametrize("b", [2.0**63, -(2.0**63), 2.0**53, math.nan, math.inf, 9.5, 2.0**62])
@pytest.mark.parametrize("a", [GREATEST, LEAST, (1 << 53) + 1, (1 << 62) + 1, 1 << 62, 9])
def test_ints_and_floats_compare_exactly(a: int, b: float) -> None:
    assert exactly.compiled(a, b) == exactly(a, b)


def test_below_a_mask_nothing_overflows() -> None:
    for state in (0, 1, GREATEST, 0x123456789ABCDEF):
        assert random_below.compiled(state) == random_below(state)
    text = disassemble(random_below.program)
    assert "MULO" not in text and "MUL" in text


def test_a_loop_to_the_end_of_the_ints_ends_there() -> None:
    for a, step in ((GREATEST - 3, 2), (GREATEST - 1, 5), (0, 1 << 62), (5, 1)):
        assert ladder.compiled(a, step) == ladder(a, step)
    assert outcome(ladder.compiled, 0, 0) == "range step is zero"


def test_counting_is_not_checked() -> None:
    assert "ADDO" not in disassemble(fresh.program).split("STOREI")[0]
    assert disassemble(collatz.program).count("ADDO") == 1  # of 3 * n + 1, not of steps


def test_a_slice_of_gas_takes_5_ms_whatever_a_unit_of_gas_takes() -> None:
    """S1 of slices.py, too."""
    now = [0.0]
    slices = Slices(lambda: now[0])
    for gas_per_s in (3e10, 1e8, 3e5):
        used, gas, took = 0, slices.start(), []
        for _ in range(12):
            now[0] += gas / gas_per_s
            took.append(gas / gas_per_s)
            used += gas
            before, gas = gas, slices.more(used)
            assert GAS_MIN <= gas <= GROWTH * before
        assert took[-1] == pytest.approx(max(0.005, GAS_MIN / gas_per_s), rel=0.01)
    standing = Slices(lambda: 0.0)  # a clock that stands still
    assert standing.start() == GAS_FIRST and standing.more(GAS_FIRST) == GROWTH * GAS_FIRST


def test_recursion_keeps_the_variables_of_each_call() -> None:
    assert [fibonacci.compiled(n) for n in range(12)] == [fibonacci(n) for n in range(12)]
    assert outcome(forever.compiled, 0) == "calls nested too deep"


def test_loops_have_else_and_arrays_are_new_each_time() -> None:
    for n in range(12):
        assert searched.compiled(n) == searched(n)
        assert fresh.compiled(n) == fresh(n) == 3
        assert sieve.compiled(n * 9) == sieve(n * 9)


@pytest.mark.parametrize("i", [-4, -3, 0, 2, 3])
@pytest.mark.parametrize("j", [-4, -1, 1, 3, LEAST])
def test_an_index_is_checked_again_after_it_has_changed(i: int, j: int) -> None:
    is_in = -3 <= i < 3 and -3 <= j < 3
    expected = reached(i, j) if is_in else "array index out of range"
    assert outcome(reached.compiled, i, j) == expected


@pytest.mark.parametrize("x", [0.0, -0.0, 1.0, math.nan, -math.inf])
@pytest.mark.parametrize("y", [0.0, -0.0, 2.0, math.nan, math.inf])
def test_min_and_max_of_floats_take_the_first_of_equals(x: float, y: float) -> None:
    assert repr(best.compiled(x, y)) == repr(best(x, y))


def test_asserts_and_domains_are_faults_with_their_text() -> None:
    assert checks.compiled(2, 9.0) == 1.5
    assert outcome(checks.compiled, -1, 9.0) == "assertion failed, n is negative"
    assert outcome(checks.compiled, 1, -9.0) == "math domain error"


def test_constants_are_those_of_the_decoration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 5)
    assert collatz.compiled(27) == 111
