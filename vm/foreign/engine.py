"""Running foreign code under a meter that can be asked for more and can be stopped anywhere.

Interface: `make_engine()`; `Meter(gas, on_yield)`; `Session(engine, memory_bytes, meter)` is one
store: `link`, `instantiate`, `call`, `close`, in that order.
Gas is wasmtime's fuel (about one unit an instruction, the same on every processor) plus what host
functions charge. Fuel that runs out would end a call for good, so calls are wasmtime's
asynchronous ones: they run on a stack of their own, return to us every SLICE_GAS units, and go on
where they were or are dropped. Plain calls cannot do that, epochs would tie gas to the clock.
Invariants:
  E1  between two yields a program consumes at most SLICE_GAS and what one host function charges
      or one bulk instruction costs, a unit a byte;
  E2  a call that ends well has used no more gas than the meter was granted;
  E3  no exception crosses WebAssembly frames: a host function keeps it in `failure`, and `call`
      raises it.
Source: wasmtime C API, wasmtime/async.h; wasmtime-py has no wrapper for it.
"""

from __future__ import annotations

import ctypes
import platform
import re
from collections.abc import Callable, Sequence
from typing import Any

import wasmtime
from wasmtime import _bindings as c_api

from manifold.vm.errors import Exhausted, Trap
from manifold.vm.foreign.binary import Signature
from manifold.vm.runtime.machine import BOARD_RESERVATION_BYTES, NATIVE_STACK_BYTES
from manifold.vm.runtime.outcome import OnYield, Stopped

SLICE_GAS = 1 << 18  # 0.1 to 0.3 ms; coming back costs some 2 us, under 2 percent
SLICE_GAS_MIN = 1 << 14  # for runs that are given less at first: coming back costs 10 percent
FUEL = 1 << 62  # what a store is given: 16 years at 9e9 a second; `granted` is what limits
INSTANCES_MAX, MEMORIES_MAX = 2, 2  # the program, and the loop over the indices with its buffer
TABLES_MAX = 4  # compilers make one, with references two
TABLE_ELEMENTS_MAX = 1 << 18  # of a table: 4 tables of 2 MiB, beside the memory
FRAMES_MAX = 4  # innermost functions that a trap names

_CAUSE = re.compile(r"wasm trap: (?:wasm )?(.*)")
_ADDRESS = re.compile(r"memory fault at wasm address (\S+) in linear memory of size (\S+)")

Host = Callable[..., int]  # takes the caller and the parameters, leaves an error number


def make_engine() -> wasmtime.Engine:
    """Deterministic WebAssembly 2.0 without SIMD, which not every board's processor has."""
    config = wasmtime.Config()
    config.consume_fuel = True
    config.cranelift_opt_level = "speed"
    config.cranelift_nan_canonicalization = True
    config.parallel_compilation = False
    config.wasm_threads = False
    config.wasm_simd = False
    config.wasm_relaxed_simd = False
    config.wasm_memory64 = False
    config.wasm_multi_memory = False
    config.wasm_exceptions = False
    config.wasm_function_references = False
    config.wasm_gc = False
    config.wasm_wide_arithmetic = False
    config.wasm_custom_page_sizes = False
    config.wasm_stack_switching = False
    # Host functions, which are Python, run on the upper half of the same stack.
    c_api.wasmtime_config_async_stack_size_set(config.ptr(), 2 * NATIVE_STACK_BYTES)
    config.max_wasm_stack = NATIVE_STACK_BYTES
    if platform.machine() not in ("x86_64", "AMD64"):
        config.memory_reservation = BOARD_RESERVATION_BYTES
    engine = wasmtime.Engine(config)
    config.close()
    return engine


class Exit(Exception):
    """A program ended itself: a host function raises it, and it counts as ending well."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Meter:
    """How much gas a run may use, has used, and whom to ask for more."""

    def __init__(self, gas: int, on_yield: OnYield) -> None:
        self.granted, self.used = gas, 0
        self._on_yield = on_yield
        self.locate: Callable[[], int] | None = None

    @property
    def index(self) -> int | None:
        """The index that runs, once one does."""
        return None if self.locate is None else self.locate()

    def reach(self, used: int) -> None:
        """`used` so far: where that is more than was granted, asks, and stops if nothing comes."""
        self.used = max(used, self.used)
        while self.used > self.granted:
            grant = self._on_yield(self.used)
            if grant <= 0:
                raise Stopped(self.used, self.index)
            self.granted += grant


class Exports:
    """Looked up by name, one by one: wasmtime-py would wrap all of them for each instance."""

    def __init__(self, context: Any, instance: c_api.wasmtime_instance_t) -> None:
        self._context, self._instance = context, instance

    def function(self, name: str) -> wasmtime.Func:
        return wasmtime.Func._from_raw(self._find(name).func)

    def memory_address(self, name: str) -> int:
        """Where it starts; holds while it does not grow."""
        memory = self._find(name).memory
        data = c_api.wasmtime_memory_data(self._context, ctypes.byref(memory))
        return ctypes.cast(data, ctypes.c_void_p).value or 0

    def _find(self, name: str) -> Any:
        found, spelled = c_api.wasmtime_extern_t(), name.encode()
        exists = c_api.wasmtime_instance_export_get(
            self._context,
            ctypes.byref(self._instance),
            ctypes.create_string_buffer(spelled),
            len(spelled),
            ctypes.byref(found),
        )
        assert exists, name
        return found.of


class Session:
    """One store, its instances and the call that runs in it."""

    def __init__(self, engine: wasmtime.Engine, memory_bytes: int, meter: Meter, name: str) -> None:
        self.meter, self.name = meter, name
        self.failure: BaseException | None = None
        self._charged = 0
        self._fuel = ctypes.c_uint64()
        self._fuel_at = ctypes.byref(self._fuel)
        self._keep: list[Any] = []
        self._trap = ctypes.POINTER(c_api.wasm_trap_t)()
        self._error = ctypes.POINTER(c_api.wasmtime_error_t)()
        self._linker = wasmtime.Linker(engine)
        self.store = wasmtime.Store(engine)
        self.store.set_limits(
            memory_size=memory_bytes,
            table_elements=TABLE_ELEMENTS_MAX,
            instances=INSTANCES_MAX,
            tables=TABLES_MAX,
            memories=MEMORIES_MAX,
        )
        self.store.set_fuel(FUEL)
        self._context = self.store._context()
        self._slice_gas = max(SLICE_GAS_MIN, min(meter.granted, SLICE_GAS))
        _check(c_api.wasmtime_context_fuel_async_yield_interval(self._context, self._slice_gas))

    def close(self) -> None:
        self.meter.locate = None  # it reads the store's memory
        self._linker.close()
        self.store.close()
        self._keep.clear()

    # -- linking ------------------------------------------------------------------------------

    def link(self, module: str, name: str, signature: Signature, host: Host) -> None:
        """Offers `host` to what is instantiated afterwards."""
        kinds = signature.parameters  # the names of the fields, too
        with_result = bool(signature.results)

        def enter(_env: Any, caller: Any, raw: Any, _count: int) -> int:
            try:
                values = [getattr(raw[at], kind) for at, kind in enumerate(kinds)]
                result = host(caller, *values)
                if with_result:
                    raw[0].i64 = result
                return 0
            except BaseException as failure:  # E3
                self.failure = failure
                return _new_trap()

        callback = c_api.wasmtime_func_unchecked_callback_t(enter)
        function = c_api.wasmtime_func_t()
        type_ = wasmtime.FuncType(
            [_TYPES[each]() for each in signature.parameters],
            [_TYPES[each]() for each in signature.results],
        )
        c_api.wasmtime_func_new_unchecked(
            self._context, type_.ptr(), callback, None, _NO_FINALIZER, ctypes.byref(function)
        )
        self._keep.append(callback)
        self.define(module, name, wasmtime.Func._from_raw(function))

    def define(self, module: str, name: str, function: wasmtime.Func) -> None:
        """Offers a function of an instance to what is instantiated afterwards."""
        self._linker.define(self.store, module, name, function)

    def instantiate(self, module: wasmtime.Module) -> Exports:
        """A new instance; its start function has run."""
        instance = c_api.wasmtime_instance_t()
        self._finish(
            c_api.wasmtime_linker_instantiate_async(
                self._linker.ptr(),
                self._context,
                module.ptr(),
                ctypes.byref(instance),
                ctypes.byref(self._trap),
                ctypes.byref(self._error),
            )
        )
        return Exports(self._context, instance)

    # -- running ------------------------------------------------------------------------------

    def call(self, function: wasmtime.Func, kinds: Sequence[str], values: Sequence[float]) -> None:
        """Calls what leaves nothing. Raises Trap, Exhausted, Stopped or a host's failure."""
        arguments = (c_api.wasmtime_val_t * max(1, len(values)))()
        for argument, kind, value in zip(arguments, kinds, values, strict=False):
            argument.kind = _TAGS[kind]
            setattr(argument.of, kind, value)
        self._finish(
            c_api.wasmtime_func_call_async(
                self._context,
                ctypes.byref(function._func),
                arguments,
                len(values),
                None,
                0,
                ctypes.byref(self._trap),
                ctypes.byref(self._error),
            )
        )

    def charge(self, caller: Any, gas: int) -> None:
        """A host function's cost, charged before its work."""
        self._charged += gas
        self.meter.reach(self._spent(c_api.wasmtime_caller_context(caller)))

    def _finish(self, future: Any) -> None:
        """Polls a call to its end, asking for gas at each slice."""
        spent = self._spent(self._context) - self._charged
        # Setting the fuel starts a whole slice: the one before may have been begun.
        _check(c_api.wasmtime_context_set_fuel(self._context, FUEL - spent))
        try:
            slices = 0
            while not c_api.wasmtime_call_future_poll(future):
                slices += 1
                # The store belongs to the call now: what it used is known by its yields.
                self.meter.reach(spent + slices * self._slice_gas + self._charged)
        finally:
            c_api.wasmtime_call_future_delete(future)
        failure, self.failure = self.failure, None
        trap, error = self._outcome()
        if failure is not None and trap is not None:
            trap.close()  # ours, of `link`
        if failure is not None and not isinstance(failure, Exit):
            raise failure
        self.meter.reach(self._spent(self._context))  # E2
        if failure is not None:
            raise failure
        if trap is not None:
            raise self._trapped(trap)
        if error:
            assert "import" not in error, error  # F1: all of them have been checked
            raise Exhausted(
                f"{self.name}: {error}.",
                "Make its memory or tables smaller, or give the node class more memory.",
            )

    def _spent(self, context: Any) -> int:
        _check(c_api.wasmtime_context_get_fuel(context, self._fuel_at))
        return FUEL - self._fuel.value + self._charged

    def _outcome(self) -> tuple[wasmtime.Trap | None, str]:
        """What the call left in the two pointers, which are empty again."""
        trap, error = None, ""
        if self._trap:
            trap = wasmtime.Trap._from_ptr(self._trap)
            self._trap = ctypes.POINTER(c_api.wasm_trap_t)()
        if self._error:
            error = str(wasmtime.WasmtimeError._from_ptr(self._error))
            self._error = ctypes.POINTER(c_api.wasmtime_error_t)()
        return trap, error

    def _trapped(self, raised: wasmtime.Trap) -> Exception:
        message, code = raised.message, raised.trap_code
        frames = [_frame(each) for each in raised.frames]
        raised.close()
        if self.meter.index is not None:
            del frames[-1:]  # the loop over the indices
        if code is wasmtime.TrapCode.STACK_OVERFLOW:
            return Exhausted(
                f"{self.name}: its calls need more than {NATIVE_STACK_BYTES} bytes of stack.",
                "Recurse less deep.",
            )
        cause, address = _CAUSE.search(message), _ADDRESS.search(message)
        what = cause.group(1).strip() if cause else message.strip()
        if address is not None:
            what += f" (address {address.group(1)} of {address.group(2)})"
        where = f" in {' < '.join(frames[:FRAMES_MAX])}" if frames else ""
        index = self.meter.index
        at = "" if index is None else f" at index {index}"
        advice = "" if any("byte" not in each for each in frames) else _NAMELESS
        return Trap(f"{self.name}: {what}{where}{at}.", advice, index=index)


_NAMELESS = "Compile it with -g, or without -Wl,--strip-all, to see the names of functions."
_TYPES: dict[str, Callable[[], wasmtime.ValType]] = {
    "i32": wasmtime.ValType.i32,
    "i64": wasmtime.ValType.i64,
    "f32": wasmtime.ValType.f32,
    "f64": wasmtime.ValType.f64,
}
_TAGS = {"i32": 0, "i64": 1, "f32": 2, "f64": 3}  # WASMTIME_I32 and so on, wasmtime/val.h
_NO_FINALIZER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)()  # a null pointer
_HOST_FAILED = ctypes.create_string_buffer(b"host function failed")


def _new_trap() -> int:
    """A trap's address, which wasmtime owns from here on."""
    trap = c_api.wasmtime_trap_new(_HOST_FAILED, len(_HOST_FAILED) - 1)
    return ctypes.cast(trap, ctypes.c_void_p).value or 0


def _frame(frame: wasmtime.Frame) -> str:
    name = frame.func_name
    return name if name else f"function {frame.func_index} (byte 0x{frame.module_offset:x})"


def _check(error: Any) -> None:
    if error:
        raise AssertionError(str(wasmtime.WasmtimeError._from_ptr(error)))
