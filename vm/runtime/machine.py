"""A worker's machine: one WebAssembly engine, a bounded cache of compiled programs.

Interface: `Machine(memory_bytes)`; `load(program, reduce) -> Unit` verifies, compiles and keeps it;
`unit.run(lo, hi, gas=..., on_yield=..., on_sleep=..., arguments=(), on_global=None)`. One thread at
a time. Call `close()` when done: wasmtime objects are freed here and not by the garbage collector.
Invariants:
  M1  a unit evicted from the cache is closed, unless it is running; a closed unit does not run;
  M2  no WebAssembly trap carries a meaning: faults come back as control words. The one trap that
      can happen, the native stack's end, is Exhausted.
What a small block costs is the point of `_invoke`: the call goes straight to the C function with
arguments laid out once, and results are read from memory through one struct.
"""

from __future__ import annotations

import ctypes
import platform
import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import wasmtime
from wasmtime import _bindings as c_api

from manifold.vm.compile import compile_wat
from manifold.vm.compile.layout import (
    ARGUMENTS_AT,
    CELLS_AT,
    CONTROL,
    COUNTS_AT,
    KINDS_AT,
    OUTPUT_FULL,
    STOPPED,
    VALUES_AT,
    Control,
    array_offsets,
)
from manifold.vm.compile.module import imports, used_cells
from manifold.vm.errors import Exhausted, InvalidProgram, ManifoldError
from manifold.vm.interpret import run as interpret
from manifold.vm.kid import Kid
from manifold.vm.runtime.cells import Value, check_arguments, initial_cells, placed, trap
from manifold.vm.runtime.globals import Access, Globals, required
from manifold.vm.runtime.outcome import OUTPUT_BYTES_MAX, OnSleep, OnYield, Outcome, Stopped
from manifold.vm.runtime.results import (
    FLAT,
    JSON_NUMBERS,
    REDUCTIONS,
    Partial,
    _one_nan,
    values_of,
)
from manifold.vm.syntax import Program, assemble
from manifold.vm.syntax.isa import BY_NAME, USES_GLOBALS, Fault
from manifold.vm.syntax.program import ARGUMENTS_MAX, I64_MAX, I64_MIN
from manifold.vm.valid import Verified, verify

UNITS_MAX = 32  # compiled programs kept; each holds its memory, at most `memory_bytes`
NATIVE_STACK_BYTES = 4 << 20  # 1024 calls of at most 4 KiB, see vm/valid/verifier.py
BOARD_RESERVATION_BYTES = 128 << 20  # address space a memory reserves on 39-bit address spaces
_MASK = (1 << 64) - 1


class Machine:
    """Where programs run."""

    def __init__(self, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes
        self._units: OrderedDict[tuple[Kid, str], Unit] = OrderedDict()
        config = wasmtime.Config()
        config.cranelift_opt_level = "speed"
        config.wasm_threads = False
        config.wasm_simd = False
        config.wasm_relaxed_simd = False
        config.parallel_compilation = False
        # wasmtime wants the (unused) asynchronous stack to be the larger one, and wasmtime-py has
        # no setter for it.
        c_api.wasmtime_config_async_stack_size_set(config.ptr(), 2 * NATIVE_STACK_BYTES)
        config.max_wasm_stack = NATIVE_STACK_BYTES
        if platform.machine() not in ("x86_64", "AMD64"):
            config.memory_reservation = BOARD_RESERVATION_BYTES
        self._engine: wasmtime.Engine | None = wasmtime.Engine(config)
        config.close()

    def load(self, program: Program, reduce: str) -> Unit:
        """The program, verified and compiled for one reduction; from the cache if it is there."""
        key = (program.kid, reduce)
        unit = self._units.get(key)
        if unit is not None:
            self._units.move_to_end(key)
            return unit
        if self._engine is None:
            raise Exhausted("The machine has been closed.", "Make another one.")
        if reduce not in REDUCTIONS:
            raise InvalidProgram(
                f"There is no reduction {reduce!r}.", f"There are {', '.join(REDUCTIONS)}."
            )
        unit = Unit(self._engine, verify(program), reduce, self.memory_bytes)
        self._units[key] = unit
        for old, each in list(self._units.items()):
            if len(self._units) <= UNITS_MAX:
                break
            if not each.running and each is not unit:
                del self._units[old]
                each.close()
        return unit

    def close(self) -> None:
        """Frees everything."""
        for unit in self._units.values():
            unit.close()
        self._units.clear()
        if self._engine is not None:
            self._engine.close()
            self._engine = None


class Unit:
    """One program ready to run. `note` says when and why it runs in the interpreter."""

    def __init__(
        self, engine: wasmtime.Engine, verified: Verified, reduce: str, memory_bytes: int
    ) -> None:
        self.verified, self.reduce = verified, reduce
        self.running = self.closed = False
        self.note = ""
        self._compiled: _Compiled | None = None
        if verified.dynamic:
            self.note = f"runs in the interpreter: {verified.dynamic}"
        else:
            self._compiled = _Compiled(engine, verified, reduce, memory_bytes)

    @property
    def program(self) -> Program:
        return self.verified.program

    def run(
        self,
        lo: int,
        hi: int,
        *,
        gas: int,
        on_yield: OnYield,
        on_sleep: OnSleep,
        arguments: Sequence[Value] = (),
        on_global: Globals | None = None,
    ) -> Outcome:
        """Runs every index of `[lo, hi)`, or the range program once.

        `on_yield(gas_used_so_far)` is called when gas runs out; it returns more, or 0 to stop.
        `on_global` reads and writes globals; a program that has some is refused without it.
        Raises Trap, Exhausted, Stopped, or what a callback raised.
        """
        if not I64_MIN <= lo <= hi <= I64_MAX or not 0 <= gas <= I64_MAX:
            raise InvalidProgram(f"The range {lo}:{hi} or the gas {gas} is out of bounds.")
        if self.closed:
            raise Exhausted("The unit has left the machine's cache.", "Load the program again.")
        assert not self.running, "a unit runs one block at a time"
        access = required(self.program, on_global)
        self.running = True
        try:
            if self._compiled is not None:
                return self._compiled.run(lo, hi, gas, on_yield, on_sleep, arguments, access)
            return interpret(
                self.verified,
                self.reduce,
                lo,
                hi,
                gas=gas,
                on_yield=on_yield,
                on_sleep=on_sleep,
                arguments=arguments,
                on_global=on_global,
            )
        finally:
            self.running = False

    def close(self) -> None:
        """Frees the compiled code and its memory."""
        assert not self.running, "M1"
        self.closed = True
        if self._compiled is not None:
            self._compiled.close()
            self._compiled = None


class _Compiled:
    """A module with its instance, and everything a call needs, laid out once."""

    def __init__(
        self, engine: wasmtime.Engine, verified: Verified, reduce: str, memory_bytes: int
    ) -> None:
        _, self.memory_needed = array_offsets(verified.program, reduce)
        if self.memory_needed > memory_bytes:
            raise Exhausted(
                f"The program needs {self.memory_needed} bytes of memory; "
                f"a worker here has {memory_bytes}.",
                "Make its arrays smaller, or give the node class more memory.",
            )
        self.verified, self.reduce, self.program = verified, reduce, verified.program
        self._spilled = sorted(used_cells(verified, verified.flows))
        self.flags = JSON_NUMBERS if self.program.dialect == "json" else 0
        self.flags |= FLAT if self.program.kind == "range" else 0
        binary = bytes(wasmtime.wat2wasm(compile_wat(verified, reduce)))
        self.module = wasmtime.Module(engine, binary)
        self.store = wasmtime.Store(engine)
        self.store.set_limits(memory_size=self.memory_needed)
        self._link()
        self._arguments: tuple[Value, ...] = ()
        self._forget()

    def _link(self) -> None:
        i64, f64, i32 = wasmtime.ValType.i64(), wasmtime.ValType.f64(), wasmtime.ValType.i32()
        hosts: dict[str, tuple[wasmtime.FuncType, Callable[..., Any]]] = {
            "yield": (wasmtime.FuncType([i64], [i64]), self._yield),
            "sleep": (wasmtime.FuncType([f64], [i32]), self._sleep),
            "global": (wasmtime.FuncType([i32, i32, i64, i64, i64], [i64, i32]), self._reach),
            "flush": (wasmtime.FuncType([i64, i64], [i32]), self._flush),
        }
        functions = [
            wasmtime.Func(self.store, *hosts[name]) for name in imports(self.verified, self.reduce)
        ]
        instance = wasmtime.Instance(self.store, self.module, functions)
        exports = instance.exports(self.store)
        memory, function = exports["memory"], exports["run"]
        assert isinstance(memory, wasmtime.Memory) and isinstance(function, wasmtime.Func)
        # The memory never grows, so its address holds for the life of the instance.
        self._memory = memoryview(memory.get_buffer_ptr(self.store)).cast("B")
        self._keep = (instance, memory, function, functions)
        self._raw = (c_api.wasmtime_val_raw_t * 3)()
        self._trap = ctypes.POINTER(c_api.wasm_trap_t)()
        self._call = c_api._wasmtime_func_call_unchecked
        self._call_arguments = (
            self.store._context(),
            ctypes.byref(function._func),
            self._raw,
            3,
            ctypes.byref(self._trap),
        )

    def _forget(self) -> None:
        """What belongs to one run only."""
        self._values: list[bytes] = []
        self._kinds: list[bytes] = []
        self._counts: list[bytes] = []
        self._output_bytes = 0
        self._failure: BaseException | None = None
        self._on_yield: OnYield | None = None
        self._on_sleep: OnSleep | None = None
        self._access: Access | None = None
        self._refused: ManifoldError | None = None

    def close(self) -> None:
        self._memory.release()
        self.store.close()
        self.module.close()

    # -- what the program calls --------------------------------------------------------------

    def _yield(self, left: int) -> int:
        """More gas: the new balance, or -1 to stop."""
        try:
            assert self._on_yield is not None
            while left < 0:
                more = self._on_yield(self._granted - left)
                if more <= 0:
                    self._granted -= left  # the debt was used too
                    return -1
                self._granted += more
                left += more
        except BaseException as failure:  # carried over the WebAssembly frames, raised by run()
            self._failure = failure
            return -1
        return left

    def _sleep(self, seconds: float) -> int:
        try:
            assert self._on_sleep is not None
            self._on_sleep(seconds)
        except BaseException as failure:  # as above
            self._failure = failure
            return 1
        return 0

    def _reach(
        self, operation: int, number: int, index: int, first: int, second: int
    ) -> tuple[int, int]:
        """A global: its value and a flag; 2 says that it could not be done."""
        try:
            assert self._access is not None
            name = USES_GLOBALS[operation]
            takes, leaves = BY_NAME[name].stack_of(json=self.program.dialect == "json")
            is_float = self.program.globals[number].type == "f64"
            taken = [_value_of(bits, is_float) for bits in (first, second)[: len(takes)]]
            found = self._access.carry_out(name, index, number, taken)
            flag = int(found.pop()) if leaves[-1:] in ("i", "s") else 0
            return (_bits_of(found[0]) if found else 0), flag
        except Stopped as failure:
            self._failure = failure
        except ManifoldError as error:
            self._refused = error
        except BaseException as failure:  # as above
            self._failure = failure
        return 0, 2

    def _flush(self, values: int, indices: int) -> int:
        """Empties the buffers; 1 if that is too much."""
        self._output_bytes += 8 * values + 4 * indices
        if self._output_bytes > OUTPUT_BYTES_MAX:
            return 1
        memory = self._memory
        self._values.append(bytes(memory[VALUES_AT : VALUES_AT + 8 * values]))
        if len(self.verified.emits) > 1:
            self._kinds.append(bytes(memory[KINDS_AT : KINDS_AT + values]))
        self._counts.append(bytes(memory[COUNTS_AT : COUNTS_AT + 4 * indices]))
        return 0

    # -- running -----------------------------------------------------------------------------

    def run(
        self,
        lo: int,
        hi: int,
        gas: int,
        on_yield: OnYield,
        on_sleep: OnSleep,
        arguments: Sequence[Value],
        access: Access | None,
    ) -> Outcome:
        if arguments or self._arguments:
            self._give(check_arguments(self.verified, arguments))
        self._on_yield, self._on_sleep, self._granted = on_yield, on_sleep, gas
        self._access = access
        try:
            raw = self._raw
            raw[0].i64, raw[1].i64, raw[2].i64 = lo, hi, gas
            error = self._call(*self._call_arguments)
            if error or self._trap:
                self._explain(error)
            control = Control._make(CONTROL.unpack_from(self._memory))
            if self._failure is not None:
                raise self._failure
            if control.fault:
                self._fail(control, lo, hi)
            return Outcome(self._partial(control), self._granted - control.gas)
        finally:
            self._forget()

    def _give(self, arguments: tuple[Value, ...]) -> None:
        """Writes the arguments where every index loads them from."""
        for number in range(ARGUMENTS_MAX):
            value = arguments[number] if number < len(arguments) else 0
            form = "<d" if isinstance(value, float) else "<q"
            struct.pack_into(form, self._memory, ARGUMENTS_AT + 8 * number, value)
        self._arguments = arguments

    def _explain(self, error: Any) -> None:
        """M2: what wasmtime itself refused."""
        if error:
            raise AssertionError(str(wasmtime.WasmtimeError._from_ptr(error)))
        kind = ctypes.POINTER(c_api.wasm_trap_t)
        raised = wasmtime.Trap._from_ptr(ctypes.cast(self._trap, kind))
        ctypes.memset(ctypes.addressof(self._trap), 0, ctypes.sizeof(kind))  # it is `raised` now
        is_overflow = raised.trap_code is wasmtime.TrapCode.STACK_OVERFLOW
        message = raised.message
        raised.close()
        assert is_overflow, message
        raise Exhausted(
            f"{self.program.filename or self.program.kid}: its calls need more than "
            f"{NATIVE_STACK_BYTES} bytes of stack.",
            "Keep fewer values on the stack across calls.",
        )

    def _fail(self, control: Control, lo: int, hi: int) -> None:
        """The control words of a run that did not end well, as an error."""
        at, code = control.fault >> 4, control.fault & 15
        index = lo if self.program.kind == "range" else control.at_index
        if code == STOPPED:
            raise Stopped(self._granted, index)
        if code == OUTPUT_FULL:
            raise Exhausted(
                f"More than {OUTPUT_BYTES_MAX} bytes of results in one run.",
                "Reduce with sum, min, max or count, or emit less.",
            )
        end = hi if self.program.kind == "range" else index + 1
        cells = initial_cells(self.verified, index, end, self._arguments)
        for cell in self._spilled:
            form = "<d" if self.verified.cells[cell] == "f" else "<q"
            (cells[cell],) = struct.unpack_from(form, self._memory, CELLS_AT + 8 * cell)
        results = self._results_so_far(control)
        if self._refused is not None:
            raise placed(self._refused, self.program, at, cells, index, results)
        raise trap(self.program, at, Fault(code), cells, index, results)

    def _results_so_far(self, control: Control) -> list[Value]:
        """What the faulting index had emitted; known where values are collected."""
        if self.reduce != "collect":
            return []
        self._flush(control.buffered, 0)
        whole = self._collected(control)
        values = values_of(whole)
        return values[len(values) - control.here :]

    def _partial(self, control: Control) -> Partial:
        if self.reduce == "collect":
            if self._flush(control.buffered, control.ended):
                raise Exhausted(f"More than {OUTPUT_BYTES_MAX} bytes of results in one run.")
            return self._collected(control)
        return Partial(
            control.emitted,
            control.floats,
            control.sum_high,
            control.sum_low & _MASK,
            _one_nan(control.sum_float),
            control.int_best if control.emitted > control.floats else 0,
            _one_nan(control.float_best) if control.floats else 0.0,
            flags=self.flags,
        )

    def _collected(self, control: Control) -> Partial:
        counts = b"".join(self._counts)
        if counts == _ONE * (len(counts) // 4):
            counts = b""
        mixed = 0 < control.floats < control.emitted
        return Partial(
            control.emitted,
            control.floats,
            values=b"".join(self._values),
            kinds=b"".join(self._kinds) if mixed else b"",
            counts=counts,
            flags=self.flags,
        )


_ONE = (1).to_bytes(4, "little")


def _value_of(bits: int, is_float: bool) -> Value:
    """64 bits, as WebAssembly hands them over, as a number."""
    if not is_float:
        return bits
    (value,) = struct.unpack("<d", struct.pack("<q", bits))
    return float(value)


def _bits_of(value: Value) -> int:
    if isinstance(value, int):
        return value
    (bits,) = struct.unpack("<q", struct.pack("<d", value))
    return int(bits)


_CALIBRATION = """
again:
    LOAD 1
    LOAD 0
    MUL
    PUSH 12345
    ADD
    STORE 1
    LOAD 2
    PUSH 1
    ADD
    DUP
    STORE 2
    PUSH 10000
    LT
    JNZ again
    LOAD 1
    EMIT
    HALT
"""
_CALIBRATION_GAS = 1_000_000  # a slice of under a millisecond: the clock is read that often


def calibrate(seconds: float = 0.2) -> float:
    """Gas per second of this host."""
    machine = Machine(1 << 20)
    try:
        unit = machine.load(assemble(_CALIBRATION, "calibration.ent"), "sum")
        start = time.perf_counter()
        used = 0
        while (spent := time.perf_counter() - start) < seconds or not used:
            used += unit.run(
                0, 8, gas=_CALIBRATION_GAS, on_yield=lambda _: _CALIBRATION_GAS, on_sleep=_nothing
            ).gas_used
        return used / spent
    finally:
        machine.close()


def _nothing(seconds: float) -> None:
    """Calibration does not sleep."""
