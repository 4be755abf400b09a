"""WASI preview 1, as much of it as a program without files or a network can see.

Interface: `System(argv, environ, stdin, on_sleep)`; `offer(session, names)` links the functions;
afterwards `stdout` and `stderr` hold what was written. `bare()` is the system of a module: no
arguments, no environment, no open descriptor.
There are descriptors 0, 1 and 2 and no way to get another, so everything on paths and sockets is
answered with an error number. Clocks and random numbers are real.
Invariants:
  W1  a guest's pointer is used by `Memory` only, which checks it against the memory's present size;
      what is out of range is EFAULT and touches nothing of ours;
  W2  stdout and stderr together hold at most OUTPUT_BYTES_MAX;
  W3  each call charges gas for our work before doing it, in pieces of at most PIECE_BYTES.
Sources: WASI preview 1 (WASI/phases/snapshot/docs.md and witx); numbers, layouts and flags of the
structures below are from there. Differences: ESPIPE for all positions of the three streams, EINVAL
for the processor-time clocks (wasi-libc maps clock() to the monotonic one).
"""

from __future__ import annotations

import ctypes
import os
import struct
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from wasmtime import _bindings as c_api

from manifold.vm.errors import Exhausted, InvalidProgram
from manifold.vm.foreign.engine import Exit, Session
from manifold.vm.foreign.signatures import WASI_MODULE, WASI_SIGNATURES
from manifold.vm.runtime.outcome import OnSleep

OUTPUT_BYTES_MAX = 16 << 20  # of stdout and stderr together
STRINGS_BYTES_MAX = 1 << 20  # of arguments and environment together, as Linux's ARG_MAX / 2
STRINGS_MAX = 1 << 14  # arguments and variables
VECTORS_MAX = 1024  # of one read or write, and subscriptions of a poll: Linux's IOV_MAX
CALL_GAS = 1 << 14  # a call of a host function: 5 to 10 us, in which 16384 instructions run
VECTOR_GAS = 1 << 11  # each of its buffers, strings or subscriptions: 1 us
RANDOM_GAS = 8  # a byte: the system's generator gives some 300 MB/s
PIECE_BYTES = 1 << 20  # copied or filled between two looks at the meter; a byte costs 1

SUCCESS, BADF, FAULT, INVAL, NOTSOCK, NOTSUP, SPIPE, NOTCAPABLE = 0, 8, 21, 28, 57, 58, 70, 76
_STDIN, _STDOUT, _STDERR = 0, 1, 2
_READ, _WRITE, _POLL = 1 << 1, 1 << 6, 1 << 27  # rights
_REALTIME, _MONOTONIC = 0, 1
_CLOCK, _FD_READ, _FD_WRITE = 0, 1, 2  # event types
_ABSOLUTE = 1  # subclockflags
_MASKS = {"i32": (1 << 32) - 1, "i64": (1 << 64) - 1}  # numbers are unsigned in all of WASI
_EXPORT = ctypes.create_string_buffer(b"memory")
_VECTOR = struct.Struct("<II")  # iovec: pointer, length
_SUBSCRIPTION = struct.Struct("<QB7xI4xQQH6x")  # 48 bytes; a clock's, or the descriptor first
_EVENT = struct.Struct("<QHB5xQH6x")  # 32 bytes
_FDSTAT = struct.Struct("<BxH4xQQ")  # 24 bytes
_FILESTAT_BYTES = 64  # all zero: a stream of unknown type


class _Bad(Exception):
    """An error number on its way to the guest."""

    def __init__(self, errno: int) -> None:
        super().__init__(errno)
        self.errno = errno


class Memory:
    """The guest's memory during one call. It may move or grow between calls, not within one."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._caller: Any = None
        self._memory: Any = None
        self._base = self._size = -1  # -1: not asked for in this call

    def enter(self, caller: Any) -> None:
        """A call begins; it costs what a call costs."""
        self._caller, self._size = caller, -1
        self.charge(CALL_GAS)

    def charge(self, gas: int) -> None:
        self._session.charge(self._caller, gas)

    def _address(self, pointer: int, size: int) -> int:
        """W1."""
        if self._size < 0:
            self._find()
        assert pointer >= 0 and size >= 0, "W1: pointers and sizes are unsigned here"
        if pointer + size > self._size:
            raise _Bad(FAULT)
        return self._base + pointer

    def _find(self) -> None:
        if self._memory is None:
            found = c_api.wasmtime_extern_t()
            known = c_api.wasmtime_caller_export_get(self._caller, _EXPORT, 6, ctypes.byref(found))
            assert known, "F1: a program that imports WASI exports its memory"
            self._memory = found.of.memory
        context, memory = c_api.wasmtime_caller_context(self._caller), ctypes.byref(self._memory)
        self._size = c_api.wasmtime_memory_data_size(context, memory)
        data = c_api.wasmtime_memory_data(context, memory)
        self._base = ctypes.cast(data, ctypes.c_void_p).value or 0

    def check(self, pointer: int, size: int) -> None:
        self._address(pointer, size)

    def read(self, pointer: int, size: int) -> bytes:
        return ctypes.string_at(self._address(pointer, size), size)

    def write(self, pointer: int, data: bytes) -> None:
        ctypes.memmove(self._address(pointer, len(data)), data, len(data))

    def write_u32(self, pointer: int, value: int) -> None:
        self.write(pointer, value.to_bytes(4, "little"))

    def write_u64(self, pointer: int, value: int) -> None:
        self.write(pointer, value.to_bytes(8, "little"))

    def vectors(self, pointer: int, count: int) -> list[tuple[int, int]]:
        """The buffers of a read or write, each checked."""
        if count > VECTORS_MAX:
            raise _Bad(INVAL)
        self.charge(VECTOR_GAS * count)
        found = list(_VECTOR.iter_unpack(self.read(pointer, _VECTOR.size * count)))
        for at, size in found:
            self.check(at, size)
        return found


class System:
    """What a program finds around it."""

    def __init__(
        self,
        argv: Sequence[str],
        environ: Mapping[str, str],
        stdin: bytes,
        on_sleep: OnSleep,
        open_descriptors: Iterable[int] = (_STDIN, _STDOUT, _STDERR),
    ) -> None:
        self._argv = [_string(each) for each in argv]
        self._environ = [_variable(name, value) for name, value in environ.items()]
        strings = self._argv + self._environ
        if len(strings) > STRINGS_MAX or sum(map(len, strings)) > STRINGS_BYTES_MAX:
            raise InvalidProgram(
                f"The arguments and the environment take more than {STRINGS_BYTES_MAX} bytes "
                f"or are more than {STRINGS_MAX}.",
                "Pass the data on standard input.",
            )
        self._stdin, self._stdin_at = stdin, 0
        self._on_sleep = on_sleep
        self._written = {_STDOUT: bytearray(), _STDERR: bytearray()}
        self._output_bytes = 0
        self._open = {number: number for number in open_descriptors}  # descriptor: stream

    @property
    def stdout(self) -> bytes:
        return bytes(self._written[_STDOUT])

    @property
    def stderr(self) -> bytes:
        return bytes(self._written[_STDERR])

    def offer(self, session: Session, names: Iterable[str]) -> None:
        """Links these functions, all of preview 1's, into `session`."""
        memory = Memory(session)
        for name in dict.fromkeys(names):
            function = self._entry(memory, name)
            session.link(WASI_MODULE, name, WASI_SIGNATURES[name], function)

    def _entry(self, memory: Memory, name: str) -> Callable[..., int]:
        body: Callable[..., None] | None = getattr(self, f"_{name}", None)
        refuse = _REFUSED.get(name)
        masks = [_MASKS[each] for each in WASI_SIGNATURES[name].parameters]

        def enter(caller: Any, *values: int) -> int:
            memory.enter(caller)
            whole = [value & mask for value, mask in zip(values, masks, strict=True)]
            try:
                if body is None:
                    return self._refuse(whole, refuse)
                body(memory, *whole)
            except _Bad as bad:
                return bad.errno
            return SUCCESS

        return enter

    def _refuse(self, values: Sequence[int], errno: int | None) -> int:
        """What nothing here can do: the first parameter is a descriptor, but for proc_raise."""
        if errno is None:
            return NOTSUP
        self._stream(values[0])
        return errno

    def _stream(self, descriptor: int) -> int:
        if descriptor not in self._open:
            raise _Bad(BADF)
        return self._open[descriptor]

    # -- arguments and environment ------------------------------------------------------------

    def _args_get(self, memory: Memory, pointers: int, strings: int) -> None:
        _put_strings(memory, self._argv, pointers, strings)

    def _args_sizes_get(self, memory: Memory, count: int, size: int) -> None:
        memory.write_u32(count, len(self._argv))
        memory.write_u32(size, sum(map(len, self._argv)))

    def _environ_get(self, memory: Memory, pointers: int, strings: int) -> None:
        _put_strings(memory, self._environ, pointers, strings)

    def _environ_sizes_get(self, memory: Memory, count: int, size: int) -> None:
        memory.write_u32(count, len(self._environ))
        memory.write_u32(size, sum(map(len, self._environ)))

    # -- clocks, random, the process ----------------------------------------------------------

    def _clock_res_get(self, memory: Memory, clock: int, resolution: int) -> None:
        _now_ns(clock)
        memory.write_u64(resolution, 1)

    def _clock_time_get(self, memory: Memory, clock: int, _precision: int, at: int) -> None:
        memory.write_u64(at, _now_ns(clock))

    def _random_get(self, memory: Memory, pointer: int, size: int) -> None:
        memory.check(pointer, size)
        for start in range(0, size, PIECE_BYTES):
            piece = min(PIECE_BYTES, size - start)
            memory.charge(RANDOM_GAS * piece)
            memory.write(pointer + start, os.urandom(piece))

    def _proc_exit(self, _memory: Memory, status: int) -> None:
        raise Exit(status)

    def _sched_yield(self, _memory: Memory) -> None:
        """Nobody else runs in this machine."""

    # -- the three streams --------------------------------------------------------------------

    def _fd_close(self, _memory: Memory, descriptor: int) -> None:
        self._stream(descriptor)
        del self._open[descriptor]

    def _fd_renumber(self, _memory: Memory, old: int, new: int) -> None:
        self._stream(new)
        self._open[new] = self._stream(old)
        if old != new:
            del self._open[old]

    def _fd_fdstat_get(self, memory: Memory, descriptor: int, at: int) -> None:
        rights = _POLL | (_READ if self._stream(descriptor) == _STDIN else _WRITE)
        memory.write(at, _FDSTAT.pack(0, 0, rights, 0))

    def _fd_fdstat_set_flags(self, _memory: Memory, descriptor: int, _flags: int) -> None:
        """Appending and not blocking are what the streams do anyway."""
        self._stream(descriptor)

    def _fd_filestat_get(self, memory: Memory, descriptor: int, at: int) -> None:
        self._stream(descriptor)
        memory.write(at, bytes(_FILESTAT_BYTES))

    def _fd_read(self, memory: Memory, descriptor: int, at: int, count: int, size: int) -> None:
        if self._stream(descriptor) != _STDIN:
            raise _Bad(BADF)
        memory.check(size, 4)
        start = self._stdin_at
        for pointer, room in memory.vectors(at, count):
            while room and self._stdin_at < len(self._stdin):
                data = self._stdin[self._stdin_at : self._stdin_at + min(room, PIECE_BYTES)]
                memory.charge(len(data))
                memory.write(pointer, data)
                self._stdin_at += len(data)
                pointer, room = pointer + len(data), room - len(data)
        memory.write_u32(size, self._stdin_at - start)

    def _fd_write(self, memory: Memory, descriptor: int, at: int, count: int, size: int) -> None:
        stream = self._stream(descriptor)
        if stream == _STDIN:
            raise _Bad(BADF)
        memory.check(size, 4)
        vectors = memory.vectors(at, count)
        total = sum(length for _, length in vectors)
        self._output_bytes += total
        if self._output_bytes > OUTPUT_BYTES_MAX:  # W2
            raise Exhausted(
                f"More than {OUTPUT_BYTES_MAX} bytes on standard output and error.",
                "Print less.",
            )
        memory.charge(total)
        for each in vectors:
            self._written[stream] += memory.read(*each)
        memory.write_u32(size, total)

    # -- waiting ------------------------------------------------------------------------------

    def _poll_oneoff(self, memory: Memory, at: int, out: int, count: int, events: int) -> None:
        if not 0 < count <= VECTORS_MAX:
            raise _Bad(INVAL)
        memory.charge(VECTOR_GAS * count)
        memory.check(out, _EVENT.size * count)
        memory.check(events, 4)
        asked = list(_SUBSCRIPTION.iter_unpack(memory.read(at, _SUBSCRIPTION.size * count)))
        waits = [self._wait_ns(*each[1:]) for each in asked]
        least_ns = min(wait_ns for wait_ns, _ in waits)
        if least_ns > 0:
            self._on_sleep(least_ns / 1e9)
        happened = b"".join(
            _EVENT.pack(each[0], errno, each[1], left, 0)
            for each, (wait_ns, errno) in zip(asked, waits, strict=True)
            if wait_ns <= least_ns
            for left in (self._readable(each[1]) if errno == SUCCESS else 0,)
        )
        memory.write(out, happened)
        memory.write_u32(events, len(happened) // _EVENT.size)

    def _wait_ns(
        self, kind: int, number: int, timeout_ns: int, _precision: int, flags: int
    ) -> tuple[int, int]:
        """How long until a subscription is due, and its error number."""
        try:
            if kind == _CLOCK:
                now_ns = _now_ns(number)
                return max(0, timeout_ns - now_ns if flags & _ABSOLUTE else timeout_ns), SUCCESS
            if kind not in (_FD_READ, _FD_WRITE):
                return 0, INVAL
            is_stdin = self._stream(number) == _STDIN
            return 0, SUCCESS if is_stdin == (kind == _FD_READ) else BADF
        except _Bad as bad:
            return 0, bad.errno

    def _readable(self, kind: int) -> int:
        return len(self._stdin) - self._stdin_at if kind == _FD_READ else 0


def bare(on_sleep: OnSleep) -> System:
    """The system of a module: its results are what its functions return."""
    return System((), {}, b"", on_sleep, ())


# Functions on an open descriptor that never succeed here. The rest are methods above.
_REFUSED = {
    **dict.fromkeys(("fd_advise", "fd_seek", "fd_tell", "fd_pread", "fd_pwrite"), SPIPE),
    **dict.fromkeys(("fd_sync", "fd_datasync", "fd_filestat_set_size"), INVAL),
    **dict.fromkeys(
        (
            "fd_allocate",
            "fd_fdstat_set_rights",
            "fd_filestat_set_times",
            "fd_readdir",
        ),
        NOTSUP,
    ),
    # No descriptor is of a directory opened beforehand: wasi-libc asks from 3 on until EBADF.
    **dict.fromkeys(("fd_prestat_get", "fd_prestat_dir_name"), BADF),
    **{name: NOTCAPABLE for name in WASI_SIGNATURES if name.startswith("path_")},
    **{name: NOTSOCK for name in WASI_SIGNATURES if name.startswith("sock_")},
}


def _now_ns(clock: int) -> int:
    if clock == _REALTIME:
        return time.time_ns()
    if clock == _MONOTONIC:
        return time.monotonic_ns()
    raise _Bad(INVAL)


def _put_strings(memory: Memory, texts: list[bytes], pointers: int, strings: int) -> None:
    whole = b"".join(texts)
    memory.charge(len(whole) + VECTOR_GAS * len(texts))
    memory.check(strings, len(whole))
    at, addresses = strings, []
    for text in texts:
        addresses.append(at)
        at += len(text)
    memory.write(pointers, struct.pack(f"<{len(addresses)}I", *addresses))
    memory.write(strings, whole)


def _string(text: str) -> bytes:
    if "\0" in text:
        raise InvalidProgram("An argument or variable holds a NUL.", "Strings end there in WASI.")
    return os.fsencode(text) + b"\0"


def _variable(name: str, value: str) -> bytes:
    if not name or "=" in name:
        raise InvalidProgram(f"{name!r} is no name of a variable.", "Leave out '='.")
    return _string(f"{name}={value}")
