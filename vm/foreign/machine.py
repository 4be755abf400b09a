"""A worker's machine for foreign programs, beside vm/runtime/machine.py for our own.

Interface: `ForeignMachine(memory_bytes)`; `load(foreign, reduce, entry) -> ForeignUnit` for
modules, with the `run` of machine.Unit; `command(foreign) -> Command` for WASI commands. One thread
at a time. Call `close()` when done: wasmtime objects are freed here, not by the garbage collector.
Invariants:
  R1  every run has a store of its own: nothing of a block or a command is left for the next;
  R2  compiled programs are kept by KID, at most PROGRAMS_MAX of COMPILED_BYTES_MAX in all; one
      that left is closed unless it runs, and a closed one does not run.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

import wasmtime

from manifold.vm.errors import Exhausted, InvalidProgram, Trap
from manifold.vm.foreign.block import (
    BUFFER_AT,
    LOOP,
    PROGRAM,
    Reduction,
    indices_per_crossing,
    loop_text,
)
from manifold.vm.foreign.engine import Exit, Meter, Session, make_engine
from manifold.vm.foreign.program import INITIALIZE, MEMORY, START, Export, Foreign
from manifold.vm.foreign.wasi import System, bare
from manifold.vm.kid import Kid
from manifold.vm.runtime.outcome import OnSleep, OnYield, Outcome
from manifold.vm.runtime.results import REDUCTIONS, Value
from manifold.vm.syntax.program import I64_MAX, I64_MIN

PROGRAMS_MAX = 32  # compiled programs kept
COMPILED_BYTES_MAX = 64 << 20  # of their binaries together; machine code takes 2 to 5 times that
WAIT_S = 0.1  # a node counts on hearing of its workers a few times a second
COMMAND_TAIL_CHARACTERS = 200  # of standard error in a trap's message
OnWait = Callable[[], None]
_INDEX_BOUNDS = {  # what an index must lie within: the integers its type holds
    "i64": (I64_MIN, I64_MAX),
    "i32": (-(1 << 31), (1 << 31) - 1),
    "f64": (-(1 << 53), 1 << 53),
}


class ForeignMachine:
    """Where foreign programs run."""

    def __init__(self, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes
        self._compiled: OrderedDict[Kid, _Compiled] = OrderedDict()
        self._engine: wasmtime.Engine | None = make_engine()

    def load(
        self, foreign: Foreign, reduce: str, entry: str = "", *, on_wait: OnWait | None = None
    ) -> ForeignUnit:
        """A module, compiled; `entry` is the function to call, else see Foreign.entry.

        `on_wait()` is called every WAIT_S while it compiles, which takes seconds a MiB.
        """
        if reduce not in REDUCTIONS:
            raise InvalidProgram(
                f"There is no reduction {reduce!r}.", f"There are {', '.join(REDUCTIONS)}."
            )
        export = foreign.entry(entry)
        return ForeignUnit(self._compile(foreign, on_wait), export, reduce)

    def command(self, foreign: Foreign, *, on_wait: OnWait | None = None) -> Command:
        """A command, compiled; `on_wait` as for `load`."""
        if foreign.kind != "command":
            raise InvalidProgram(
                f"{foreign.name} is a module: it has no {START}.",
                "Run it over a range of indices, or give it `main` and link it with wasi-libc.",
            )
        return Command(self._compile(foreign, on_wait))

    def _compile(self, foreign: Foreign, on_wait: OnWait | None) -> _Compiled:
        if self._engine is None:
            raise Exhausted("The machine has been closed.", "Make another one.")
        if foreign.memory_bytes > self.memory_bytes:
            raise Exhausted(
                f"{foreign.name} needs {foreign.memory_bytes} bytes of memory; "
                f"a worker here has {self.memory_bytes}.",
                "Make its arrays smaller, or give the node class more memory.",
            )
        found = self._compiled.get(foreign.kid)
        if found is None:
            module = compile_waiting(self._engine, foreign, on_wait)
            found = _Compiled(self._engine, foreign, module, self.memory_bytes)
            self._compiled[foreign.kid] = found
        self._compiled.move_to_end(foreign.kid)
        for kid, each in list(self._compiled.items()):  # R2
            size = sum(len(kept.foreign.data) for kept in self._compiled.values())
            if len(self._compiled) <= PROGRAMS_MAX and size <= COMPILED_BYTES_MAX:
                break
            if not each.running and each is not found:
                del self._compiled[kid]
                each.close()
        return found

    def close(self) -> None:
        """Frees everything."""
        for each in self._compiled.values():
            each.close()
        self._compiled.clear()
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def compile_waiting(
    engine: wasmtime.Engine, foreign: Foreign, on_wait: OnWait | None
) -> wasmtime.Module:
    """The machine code. With `on_wait` a thread compiles, which needs no interpreter lock.

    Compiling cannot be cut short: what `on_wait` raises is raised when it has ended.
    """
    try:
        if on_wait is None:
            return wasmtime.Module(engine, foreign.data)
        with ThreadPoolExecutor(1, "compile") as thread:  # leaving waits for it
            compiling = thread.submit(wasmtime.Module, engine, foreign.data)
            while not wait((compiling,), WAIT_S).done:
                on_wait()
            return compiling.result()
    except wasmtime.WasmtimeError as refusal:  # valid, but beyond a limit of the compiler
        raise InvalidProgram(
            f"{foreign.name} cannot be compiled: {refusal}.", "Split its largest functions."
        ) from None


class _Compiled:
    """Machine code of one program, and of the loops over its functions."""

    def __init__(
        self,
        engine: wasmtime.Engine,
        foreign: Foreign,
        module: wasmtime.Module,
        memory_bytes: int,
    ) -> None:
        self.foreign, self.module, self.memory_bytes = foreign, module, memory_bytes
        self.running = self.closed = False
        self.engine = engine
        self._loops: dict[str, wasmtime.Module] = {}

    def loop(self, export: Export) -> wasmtime.Module:
        found = self._loops.get(export.name)
        if found is None:
            text = loop_text(export)
            found = wasmtime.Module(self.engine, bytes(wasmtime.wat2wasm(text)))
            self._loops[export.name] = found
        return found

    def open(self, gas: int, on_yield: OnYield) -> Session:
        """R1; until `shut` it is running."""
        if not 0 <= gas <= I64_MAX:
            raise InvalidProgram(f"The gas {gas} is out of bounds.")
        if self.closed:
            raise Exhausted("The program has left the machine's cache.", "Load it again.")
        assert not self.running, "a program runs one block at a time"
        meter = Meter(gas, on_yield)
        session = Session(self.engine, self.memory_bytes, meter, self.foreign.name)
        self.running = True
        return session

    def shut(self, session: Session) -> None:
        self.running = False
        session.close()

    def close(self) -> None:
        assert not self.running, "R2"
        self.closed = True
        for each in self._loops.values():
            each.close()
        self._loops.clear()
        self.module.close()


class ForeignUnit:
    """One function of a module, ready to run over blocks of indices."""

    note = ""  # as machine.Unit's: nothing here is slower than it could be

    def __init__(self, compiled: _Compiled, export: Export, reduce: str) -> None:
        self._compiled, self.export, self.reduce = compiled, export, reduce

    @property
    def foreign(self) -> Foreign:
        return self._compiled.foreign

    @property
    def running(self) -> bool:
        return self._compiled.running

    @property
    def closed(self) -> bool:
        return self._compiled.closed

    def run(
        self,
        lo: int,
        hi: int,
        *,
        gas: int,
        on_yield: OnYield,
        on_sleep: OnSleep,
        arguments: Sequence[Value] = (),
    ) -> Outcome:
        """Calls the function for every index of `[lo, hi)`, in order, in a new instance.

        `on_yield(gas_used_so_far)` is called when gas runs out; it returns more, or 0 to stop.
        Raises Trap, Exhausted, Stopped, or what a callback raised.
        """
        self._check_range(lo, hi)
        values = check_arguments(self.foreign.name, self.export, arguments)
        compiled = self._compiled
        session = compiled.open(gas, on_yield)
        try:
            partial = self._block(session, lo, hi, values, on_sleep)
        except Exit as ended:
            index = session.meter.index
            at = "before the first index" if index is None else f"at index {index}"
            raise Trap(
                f"{self.foreign.name}: the module called exit({ended.status}) {at}.",
                "A module's function returns its result; only a command may exit.",
                index=index,
            ) from None
        finally:
            compiled.shut(session)
        return Outcome(partial.partial(), session.meter.used)

    def _check_range(self, lo: int, hi: int) -> None:
        kind = self.export.signature.parameters[0]
        least, greatest = _INDEX_BOUNDS[kind]
        if not I64_MIN <= lo <= hi <= I64_MAX:
            raise InvalidProgram(f"The range {lo}:{hi} is out of bounds.")
        if lo < hi and not (least <= lo and hi - 1 <= greatest):
            raise InvalidProgram(
                f"{self.foreign.name}: {self.export.name} takes the index as an {kind}, which does "
                f"not hold all of {lo}:{hi}.",
                "Declare its first parameter as a 64-bit integer.",
            )

    def _block(
        self, session: Session, lo: int, hi: int, values: tuple[Value, ...], on_sleep: OnSleep
    ) -> Reduction:
        foreign, signature = self.foreign, self.export.signature
        bare(on_sleep).offer(session, foreign.imports)
        exports = session.instantiate(self._compiled.module)
        if foreign.initializes:
            session.call(exports.function(INITIALIZE), (), ())
        session.define(PROGRAM, "entry", exports.function(self.export.name))
        instance = session.instantiate(self._compiled.loop(self.export))
        loop, address = instance.function(LOOP), instance.memory_address(MEMORY)
        reduction = Reduction(self.reduce, signature.results)
        kinds = ("i64", "i64", *signature.parameters[1:])
        step = indices_per_crossing(self.export)
        row_bytes = 8 * len(signature.results)
        at_index = ctypes.c_int64.from_address(address)  # the loop keeps it
        session.meter.locate = lambda: at_index.value
        for start in range(lo, hi, step):
            end = min(hi, start + step)
            at_index.value = start
            session.call(loop, kinds, (start, end, *values))
            data = ctypes.string_at(address + BUFFER_AT, row_bytes * (end - start))
            reduction.add(data, end - start)
        return reduction


def check_arguments(name: str, export: Export, arguments: Sequence[Value]) -> tuple[Value, ...]:
    """The arguments as the parameters after the index hold them; InvalidProgram if not."""
    kinds = export.signature.parameters[1:]
    if len(arguments) != len(kinds):
        raise InvalidProgram(
            f"{name}: {export} takes {len(kinds)} arguments after the index, not {len(arguments)}."
        )
    found: list[Value] = []
    for number, (value, kind) in enumerate(zip(arguments, kinds, strict=True), 1):
        if kind in ("f32", "f64"):
            found.append(_as_float(value, number))
            continue
        bits = int(kind[1:])
        if isinstance(value, float):
            raise InvalidProgram(
                f"Argument {number}, {value}, is an f64, but the parameter is an {kind}.",
                "Pass a whole number.",
            )
        if not -(1 << (bits - 1)) <= value < 1 << (bits - 1):
            raise InvalidProgram(f"Argument {number}, {value}, does not fit in an {kind}.")
        found.append(int(value))
    return tuple(found)


def _as_float(value: Value, number: int) -> float:
    try:
        return float(value)
    except OverflowError:
        raise InvalidProgram(f"Argument {number} does not fit in an f64.") from None


@dataclass(frozen=True, slots=True)
class CommandOutcome:
    """How a command ended: its exit status (u32, as it gave it), what it wrote, its gas."""

    status: int
    stdout: bytes
    stderr: bytes
    gas_used: int


class CommandTrap(Trap):
    """A command that trapped, with what it had written."""

    def __init__(self, trap: Trap, outcome: CommandOutcome) -> None:
        last = outcome.stderr.decode(errors="replace").rstrip()[-COMMAND_TAIL_CHARACTERS:]
        said = f"Its last words: {last.splitlines()[-1]}" if last else ""
        super().__init__(trap.message, f"{said} {trap.next_step}".strip(), index=trap.index)
        self.stdout, self.stderr = outcome.stdout, outcome.stderr
        self.gas_used = outcome.gas_used


class Command:
    """A WASI preview 1 command, ready to run."""

    def __init__(self, compiled: _Compiled) -> None:
        self._compiled = compiled

    @property
    def foreign(self) -> Foreign:
        return self._compiled.foreign

    @property
    def running(self) -> bool:
        return self._compiled.running

    @property
    def closed(self) -> bool:
        return self._compiled.closed

    def run(
        self,
        argv: Sequence[str],
        *,
        environ: Mapping[str, str],
        stdin: bytes,
        gas: int,
        on_yield: OnYield,
        on_sleep: OnSleep,
    ) -> CommandOutcome:
        """Runs it to its end, in a new instance; `argv[0]` is the program's name for itself.

        Raises CommandTrap, Exhausted, Stopped, or what a callback raised.
        """
        system = System(argv, environ, stdin, on_sleep)
        compiled = self._compiled
        session = compiled.open(gas, on_yield)
        status = 0
        try:
            system.offer(session, self.foreign.imports)
            exports = session.instantiate(compiled.module)
            session.call(exports.function(START), (), ())
        except Exit as ended:
            status = ended.status
        except Trap as trap:
            raise CommandTrap(trap, _outcome(0, system, session)) from None
        finally:
            compiled.shut(session)
        return _outcome(status, system, session)


def _outcome(status: int, system: System, session: Session) -> CommandOutcome:
    return CommandOutcome(status, system.stdout, system.stderr, session.meter.used)
