"""Parcels: Python objects on their way between a client and a task process.

Interface rules: used by clients and task processes only; a node passes parcels on and never opens
one. `pack` takes functions and classes by value where the other end could not import them: those of
`__main__`, and of modules that no finder would find again (a test's, a notebook's).
What is large goes into a file of its own in the client's folder of the spool, arrays as parts of
their own (pickle protocol 5, out-of-band buffers); the receiver maps the file copy-on-write, so
an array is written once and never copied, and may be changed in place. Whoever receives a result
removes its file (the mapping keeps it); those of arguments go with the client.
Invariants: A1 a path never leads out of its folder; A2 a file that could not be written whole is
not left behind; A3 what does not pickle raises `TypeError` or `pickle.PicklingError` in `pack`.
Source: PEP 574 (pickle protocol 5 with out-of-band data).
"""

from __future__ import annotations

import errno
import io
import itertools
import mmap
import os
import pickle
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cloudpickle
import msgspec

from manifold.kernel.errors import Exhausted, NotFound
from manifold.kernel.tasks.messages import PARCEL_BYTES_MAX, PARTS_MAX, Parcel

INLINE_BYTES_MAX = 256 << 10  # copied four times on its way: at 5 GB/s 0.2 ms, as much as a file
PART_BYTES_MIN = 64 << 10  # smaller arrays are copied into the pickle: each part is a mapping
ALIGN_BYTES = 64  # a cache line; what numpy would choose
PLAIN_DEPTH_MAX = 4
PLAIN_ITEMS_MAX = 64

_PLAIN = {int, float, str, bytes, bool, type(None), complex}
assert INLINE_BYTES_MAX <= PARCEL_BYTES_MAX


def pack(value: Any, folder: str) -> Parcel:
    """Pickle `value`; large ones go to a new file in `folder`.

    `Exhausted` where the disk has no room; what the pickle raises where it cannot be pickled.
    """
    if is_plain(value):
        stream = pickle.dumps(value, protocol=5)
        if len(stream) <= INLINE_BYTES_MAX:
            return Parcel(stream)
    parts: list[memoryview] = []

    def keep(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < PART_BYTES_MIN or len(parts) >= PARTS_MAX - 1:
            return True  # in the pickle
        parts.append(raw)
        return False

    pickled = io.BytesIO()
    _Pickler(pickled, protocol=5, buffer_callback=keep).dump(value)
    with pickled.getbuffer() as stream_view:
        size = stream_view.nbytes + sum(part.nbytes for part in parts)
        if size <= INLINE_BYTES_MAX and not parts:
            return Parcel(bytes(stream_view))
        small = stream_view.nbytes <= INLINE_BYTES_MAX
        data = bytes(stream_view) if small else b""
        whole = parts if small else [stream_view, *parts]
        return Parcel(data, _write(Path(folder), whole), tuple(part.nbytes for part in whole))


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Cloudpickle's, which finds out for itself what has to go by value."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, (type, types.FunctionType)):
            by_value(obj.__module__)
        elif isinstance(obj, types.CodeType):  # from 3.1.3 on it leaves the file's name out
            make, parts = self.dispatch_table[types.CodeType](obj)
            return _code_of_file, (make, parts, obj.co_filename)
        return super().reducer_override(obj)


def _code_of_file(make: Any, parts: tuple[Any, ...], name: str) -> types.CodeType:
    """So that tracebacks of a call say where its function stands."""
    code: types.CodeType = make(*parts)
    return code.replace(co_filename=name)


def dumps(value: Any) -> bytes:
    """The pickle alone."""
    pickled = io.BytesIO()
    _Pickler(pickled, protocol=5).dump(value)
    return pickled.getvalue()


def by_value(module: str | None) -> bool:
    """Whether what a module defines is pickled by value; decided once for each module."""
    if not module or module == "__main__":
        return True
    known = _by_value.get(module)
    if known is None:
        loaded = sys.modules.get(module)
        known = loaded is not None and not _findable(module)
        if known:
            cloudpickle.register_pickle_by_value(loaded)
        _by_value[module] = known
    return known or module in cloudpickle.list_registry_pickle_by_value()


_by_value: dict[str, bool] = {}


def _findable(module: str) -> bool:
    """Whether another process with our `sys.path` would find the package that it is of."""
    top = module.partition(".")[0]
    loaded = sys.modules.get(top)
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        spec = find(top, None) if find is not None else None
        if spec is not None:
            origin = getattr(loaded, "__file__", None)
            return origin is None or spec.origin in (None, origin, "built-in", "frozen")
    return False


def is_plain(value: Any, depth: int = 0) -> bool:
    """Whether the plain pickle gives the same as cloudpickle's, which is ten times slower."""
    kind = type(value)
    if kind in _PLAIN:
        return True
    if depth >= PLAIN_DEPTH_MAX:
        return False
    if kind is tuple or kind is list:
        items = value
    elif kind is dict:
        items = [*value.keys(), *value.values()]
    else:
        return False
    if len(items) > PLAIN_ITEMS_MAX:
        return False
    kinds = set(map(type, items)) - _PLAIN  # usually none is left: this is done for every call
    return not kinds or all(is_plain(each, depth + 1) for each in items)


def _aligned(sizes: Iterable[int]) -> list[int]:
    """Where each part begins, and where the last one ends."""
    ends = itertools.accumulate(
        sizes, lambda at, size: -(-(at + size) // ALIGN_BYTES) * ALIGN_BYTES
    )
    return [0, *ends]


def _write(folder: Path, parts: list[memoryview]) -> str:
    name = f"p-{os.urandom(12).hex()}"
    path = folder / name
    starts = _aligned(part.nbytes for part in parts)
    try:
        with open(path, "xb", opener=_private) as file:
            os.posix_fallocate(file.fileno(), 0, max(1, starts[-1]))  # no room shows here
            for start, part in zip(starts, parts, strict=False):
                file.seek(start)
                file.write(part)
    except OSError as error:
        path.unlink(missing_ok=True)  # A2
        size = sum(part.nbytes for part in parts)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise Exhausted(
                f"There is no room for {size} bytes in {folder}.", "Free some, or send less."
            ) from error
        raise Exhausted(
            f"{size} bytes could not be put into {folder}: {error.strerror}.",
            "The client may be gone, or on another machine.",
        ) from error
    return name


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def unpack(parcel: Parcel, folder: str, *, remove: bool = False) -> Any:
    """The object; `remove` takes its file away. Raises whatever its pickle raises."""
    if not parcel.path:
        return pickle.loads(parcel.data)
    assert "/" not in parcel.path, "A1"
    path = os.path.join(folder, parcel.path)
    try:
        with open(path, "rb") as file:
            whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        if remove:
            os.unlink(path)
    except FileNotFoundError as error:
        raise NotFound(
            f"The file {path} of an object is not there.", "It was taken already, or removed."
        ) from error
    starts = _aligned(parcel.sizes)
    if starts[-1] > max(ALIGN_BYTES, whole.nbytes):
        raise NotFound(f"The file {path} of an object is cut off.", "Run the call again.")
    parts = [whole[at : at + size] for at, size in zip(starts, parcel.sizes, strict=False)]
    stream = parcel.data or parts.pop(0)
    return pickle.loads(stream, buffers=parts)


def encoded(parcel: Parcel) -> bytes:
    """A parcel as the code of a job, which nodes take for bytes."""
    return msgspec.msgpack.encode(parcel)


def decoded(code: bytes) -> Parcel:
    return msgspec.msgpack.decode(code, type=Parcel)
