"""`@kernel`: a Python function that is also a program.

Interface: see `Kernel`. Checking, writing and verifying happen at decoration, so that whatever is
refused is refused there; WebAssembly is made at the first `compiled` call.
Invariants: K1 calling a kernel is calling the function; K2 what a kernel knows of its module it
learned when it was decorated.
"""

from __future__ import annotations

import atexit
import functools
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, cast, overload

from manifold.vm.errors import InvalidProgram
from manifold.vm.python.checker import check
from manifold.vm.python.code import TOO_LARGE
from manifold.vm.python.kinds import KernelBase, an, word
from manifold.vm.python.registers import connected
from manifold.vm.python.slices import Slices
from manifold.vm.python.source import read
from manifold.vm.python.writer import write
from manifold.vm.syntax.program import ARRAY_BYTES_MAX, I64_MAX, I64_MIN, Program
from manifold.vm.valid import verify

if TYPE_CHECKING:
    from manifold.vm.runtime import Machine

P = ParamSpec("P")
R = TypeVar("R")

MEMORY_BYTES_MAX = ARRAY_BYTES_MAX + (16 << 20)  # all arrays a program may have, and the buffers


@overload
def kernel(function: Callable[P, R]) -> Kernel[P, R]: ...


@overload
def kernel(*, wrap: bool = False) -> Callable[[Callable[P, R]], Kernel[P, R]]: ...


def kernel(function: Any = None, *, wrap: bool = False) -> Any:
    """Compile a function of numbers; with `wrap`, ints wrap modulo 2^64 instead of faulting."""
    if function is None:
        return lambda inner: Kernel(inner, wrap)
    return Kernel(function, wrap)


class Kernel(KernelBase, Generic[P, R]):
    """A function that runs as Python when it is called, and as a program elsewhere.

    >>> collatz(27)                                              # plain Python
    >>> collatz.compiled(27)                                     # compiled, in this process
    >>> client.parallel_for(collatz, 1, 1_000_000, reduce="sum")  # on the cluster
    """

    __wrapped__: Callable[P, R]
    __name__: str
    __qualname__: str

    def __init__(self, function: Callable[P, R], wrap: bool) -> None:
        self.checked = check(read(function), wrap)
        functools.update_wrapper(self, function)
        self._programs: dict[bool, Program] = {}
        if self.checked.recursive and self.checked.arrays:
            source = self.checked.source
            raise source.refuse(
                source.tree,
                "a kernel that calls itself has no arrays: one call would write another's.",
                "Use a loop, with the array as its stack.",
            )
        self._program(self._takes_index)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.__wrapped__(*args, **kwargs)

    def __repr__(self) -> str:
        each = [f"{name}: {word(kind)}" for name, kind in self.checked.parameters.items()]
        wraps = ", wrap=True" if self.checked.wrap else ""
        result = word(self.checked.leaves)
        return f"<kernel {self.__qualname__}({', '.join(each)}) -> {result}{wraps}>"

    def __reduce__(self) -> str:
        return self.__qualname__  # by reference, as functions are pickled

    @property
    def program(self) -> Program:
        """What runs over a range: the first parameter is the index, the others are arguments."""
        if not self._takes_index:
            source = self.checked.source
            raise source.refuse(
                source.tree,
                f"{self.__name__} cannot run over a range: its first parameter is not an int.",
                "Make the index the first parameter: def f(i: int, ...).",
            )
        return self._program(True)

    def compiled(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The result of the compiled program, computed in this process.

        Globals are those of `manifold.globals`, which must be connected to a cluster.
        """
        if kwargs:
            raise TypeError(f"{self.__name__} takes its arguments by position.")
        wanted = self.checked.parameters
        if len(args) != len(wanted):
            raise TypeError(f"{self.__name__} takes {len(wanted)} arguments, not {len(args)}.")
        given = [
            _argument(name, letter, value)
            for (name, letter), value in zip(wanted.items(), args, strict=True)
        ]
        values = _run(self._program(False), given)
        leaves = self.checked.leaves
        made = tuple(bool(v) if kind == "b" else v for v, kind in zip(values, leaves, strict=True))
        return cast(R, made if len(leaves) > 1 else made[0])

    @property
    def _takes_index(self) -> bool:
        return next(iter(self.checked.parameters.values()), "") == "i"

    def _program(self, over_range: bool) -> Program:
        if over_range not in self._programs:
            program = write(self.checked, over_range=over_range)
            try:
                verify(program)
            except InvalidProgram as error:
                reason = error.message.split(": ", 1)[-1]
                is_size = any(each in reason for each in ("the limit is", "more than", "beyond"))
                assert is_size, f"a checked function is refused for its size alone: {error}"
                source = self.checked.source
                raise source.refuse(source.tree, reason, TOO_LARGE) from None
            self._programs[over_range] = program
        return self._programs[over_range]


def _argument(name: str, letter: str, value: Any) -> int | float:
    """A value for a parameter; an int may stand for a float, as everywhere in Python."""
    if letter == "f" and isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, int) or (letter == "b" and not isinstance(value, bool)):
        raise TypeError(f"{name} is {an(letter)}, not {type(value).__name__}.")
    if not I64_MIN <= value <= I64_MAX:
        raise OverflowError(f"{name} does not fit in 64 bits.")
    return int(value)


_lock = threading.Lock()
_machine: Machine | None = None


def _run(program: Program, arguments: list[int | float]) -> list[int | float]:
    """One run of a program in this process's machine, which one thread uses at a time."""
    global _machine
    from manifold.vm.runtime import Machine, finish  # wasmtime: only who runs something needs it

    with _lock:
        if _machine is None:
            _machine = Machine(MEMORY_BYTES_MAX)
            atexit.register(_machine.close)
        unit = _machine.load(program, "collect")
        slices = Slices(time.perf_counter)
        partial = unit.run(
            0, 1, gas=slices.start(), on_yield=slices.more, on_sleep=time.sleep,
            arguments=arguments, on_global=connected() if program.globals else None,
        ).partial  # fmt: skip
    entries = finish("collect", partial, 0, 1)
    assert isinstance(entries, list)
    found = entries[0]
    if isinstance(found, list):
        return found
    assert found is not None, "every kernel returns a value"
    return [found]
