"""The code of a function is used again exactly where nothing that it reads can have changed."""

from __future__ import annotations

import functools
import gc
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from manifold.kernel.tasks.parcel import decoded, unpack
from manifold.shells.sdk.functions import Functions, name_of, stamp_of


@pytest.fixture
def functions(tmp_path: Path) -> Functions:
    return Functions(str(tmp_path))


def run(functions: Functions, function: Callable[..., Any], *arguments: Any) -> Any:
    return unpack(decoded(functions.code(function).data), "/nowhere")(*arguments)


def scope(**names: Any) -> dict[str, Any]:
    """A namespace like that of a notebook, where everything may be given another value."""
    return {"__name__": "__main__", "__builtins__": __builtins__, **names}


def test_a_function_that_reads_nothing_is_pickled_once(functions: Functions) -> None:
    def square(n: int) -> int:
        return n * n

    assert functions.code(square) is functions.code(square)
    assert run(functions, square, 7) == 49


@pytest.mark.parametrize(
    ("before", "after"),
    [(2, 3), (2, 2.0), (0.0, -0.0), (1, True), ("a", b"a"), ((1, 2), (1, 3)), (None, 0)],
)
def test_a_global_that_is_given_another_value_is_seen(
    functions: Functions, before: Any, after: Any
) -> None:
    names = scope(held=before)
    exec("def read():\n    return held", names)
    assert repr(run(functions, names["read"])) == repr(before)
    names["held"] = after
    assert repr(run(functions, names["read"])) == repr(after)


def test_a_list_that_is_changed_in_place_is_seen(functions: Functions) -> None:
    held: list[int] = []

    def read() -> list[int]:
        return held

    assert stamp_of(read) is None
    assert run(functions, read) == []
    held.append(1)
    assert run(functions, read) == [1]


def test_a_function_that_another_one_calls_is_followed(functions: Functions) -> None:
    names = scope(factor=2)
    exec("def inner(n):\n    return n * factor\ndef outer(n):\n    return inner(n)", names)
    assert run(functions, names["outer"], 5) == 10
    names["factor"] = 3
    assert run(functions, names["outer"], 5) == 15
    exec("def inner(n):\n    return -n", names)
    assert run(functions, names["outer"], 5) == -5


def test_a_closed_over_variable_is_seen_and_so_is_a_default(functions: Functions) -> None:
    factor = 2

    def times(n: int) -> int:
        return n * factor

    assert run(functions, times, 5) == 10
    factor = 4
    assert run(functions, times, 5) == 20

    def plus(n: int, more: int = 1) -> int:
        return n + more

    assert run(functions, plus, 1) == 2
    plus.__defaults__ = (5,)
    assert run(functions, plus, 1) == 6


def test_functions_that_call_each_other_have_a_stamp() -> None:
    names = scope()
    exec(
        "def even(n):\n    return n == 0 or odd(n - 1)\n"
        "def odd(n):\n    return n != 0 and even(n - 1)",
        names,
    )
    assert stamp_of(names["even"]) is not None
    assert stamp_of(names["even"]) == stamp_of(names["even"])


def test_names_inside_of_inner_functions_count(functions: Functions) -> None:
    names = scope(factor=2)
    exec("def outer(n):\n    return (lambda: n * factor)()", names)
    assert run(functions, names["outer"], 5) == 10
    names["factor"] = 3
    assert run(functions, names["outer"], 5) == 15


def test_a_function_is_not_kept_alive_and_neither_is_what_it_reads(functions: Functions) -> None:
    def made() -> Callable[[], Any]:
        def inner() -> float:
            return math.pi

        return inner

    function = made()
    functions.code(function)
    seen = weakref.ref(function)
    del function
    gc.collect()
    assert seen() is None


def test_what_is_no_plain_function_is_pickled_each_time(functions: Functions) -> None:
    class Counter:
        def __init__(self) -> None:
            self.count = 0

        def read(self) -> int:
            return self.count

    counter = Counter()
    assert run(functions, counter.read) == 0
    counter.count = 5
    assert run(functions, counter.read) == 5
    assert run(functions, functools.partial(pow, 2), 10) == 1024


def test_importable_functions_have_the_same_code_everywhere(
    functions: Functions, tmp_path: Path
) -> None:
    assert functions.code(math.sqrt).kid == Functions(str(tmp_path)).code(math.sqrt).kid
    assert functions.code(math.sqrt) is functions.code(math.sqrt)


def test_names_are_those_that_a_user_would_know() -> None:
    assert name_of(functools.partial(functools.partial(pow, 2), 3)) == "pow"
    assert name_of(str.upper) == "str.upper"
    assert name_of(dict()) == "dict"
