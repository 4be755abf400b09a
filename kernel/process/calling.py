"""What happens in a task process to one call: unpack, call, and pack what comes of it.

Interface rules: `Caller.call` returns a `Value` whatever the function does, short of ending its
process.
Invariants: K1 a value holds what its own call printed, and nothing else; K2 an exception is sent
only if it can be read again, otherwise its type, message and traceback are sent as text.
"""

from __future__ import annotations

import functools
import os
import pickle
import sys
import time
import traceback
from collections import OrderedDict
from types import TracebackType
from typing import Any

import msgspec

from manifold.kernel.errors import ManifoldError
from manifold.kernel.process.messages import Calls, Session, Value
from manifold.kernel.process.output import Printed
from manifold.kernel.tasks.messages import Parcel
from manifold.kernel.tasks.parcel import decoded, dumps, pack, unpack
from manifold.vm.kid import Kid

FUNCTIONS_MAX = 256  # kept by KID; the node remembers fewer
# Of an exception. Together they stay in a message, whatever the characters: 4 bytes each at most.
EXCEPTION_BYTES_MAX, MESSAGE_CHARS_MAX, TRACEBACK_CHARS_MAX = 64 << 10, 8 << 10, 32 << 10
FRAMES_OWN = 1  # of a traceback: ours


class Caller:
    """See the module. `spool` is the folder above those of clients."""

    def __init__(self, spool: str, printed: Printed) -> None:
        self._spool = spool
        self._printed = printed
        self._functions: OrderedDict[Kid, Any] = OrderedDict()
        self._codes: dict[Kid, bytes] = {}  # of functions that were not called yet, or not read
        self._broken: Value | None = None

    def prepare(self, session: Session) -> None:
        """Become a process of `session`: its folder, its paths, its initializer."""
        if os.path.isdir(session.folder):
            os.chdir(session.folder)
        own = [path for path in sys.path if path and path not in session.paths]
        sys.path[:] = [path for path in session.paths if os.path.exists(path)] + own
        if session.setup:
            self._broken = self._initialize(session.setup)

    def _initialize(self, setup: bytes) -> Value | None:
        try:
            function, arguments = pickle.loads(setup)
            function(*arguments)
        except BaseException as error:
            return msgspec.structs.replace(self._failed(error, "", 0.0), status=1)
        return None

    def folder(self, session: Session) -> str:
        return os.path.join(self._spool, session.client)

    def call(self, calls: Calls, parcel: Parcel) -> Value:
        """One call; its value, or its exception."""
        if self._broken is not None:
            return self._broken
        folder = self.folder(calls.session)
        began_s = time.perf_counter()
        try:
            function = self._function(calls, folder)
            arguments, keywords = unpack(parcel, folder)
            result = function(*arguments, **keywords)
            packed = self._packed(result, folder, calls)
            del function, arguments, keywords, result
        except BaseException as error:
            return self._failed(error, folder, began_s)
        busy_ms = 1000 * (time.perf_counter() - began_s)
        return Value(packed, True, busy_ms, *self._printed.take())

    def _packed(self, result: Any, folder: str, calls: Calls) -> Parcel:
        try:
            return pack(result, folder)
        except ManifoldError:
            raise
        except Exception as error:
            function = self._functions.get(calls.function)
            raise pickle.PicklingError(
                f"{_name(function)} returned a {type(result).__qualname__}, which cannot be "
                f"sent back: {error}"
            ) from error

    def _function(self, calls: Calls, folder: str) -> Any:
        function = self._functions.get(calls.function)
        if function is None:
            function = unpack(decoded(self._codes[calls.function]), folder)
            self._functions[calls.function] = function
            del self._codes[calls.function]
        return function

    def remember(self, calls: Calls) -> None:
        """The node sends the code of a function once: it is kept until the function is read."""
        if calls.function in self._functions:
            self._functions.move_to_end(calls.function)
        elif calls.code:
            self._codes.pop(calls.function, None)
            self._codes[calls.function] = calls.code
        while len(self._functions) > FUNCTIONS_MAX:
            self._functions.popitem(last=False)
        while len(self._codes) > FUNCTIONS_MAX:
            del self._codes[next(iter(self._codes))]

    def _failed(self, error: BaseException, folder: str, began_s: float) -> Value:
        busy_ms = 1000 * (time.perf_counter() - began_s) if began_s else 0.0
        record = described(error)
        return Value(pack(record, folder), False, busy_ms, *self._printed.take())


def described(error: BaseException) -> tuple[bytes, str, str, str]:
    """An exception for the client: its pickle (or nothing, K2), type, message, traceback."""
    text = "".join(traceback.format_exception(type(error), error, _users(error)))
    kind = type(error)
    name = (
        kind.__qualname__
        if kind.__module__ == "builtins"
        else f"{kind.__module__}.{kind.__qualname__}"
    )
    try:
        pickled = dumps(error)
        again = pickle.loads(pickled)
        if type(again) is not kind or len(pickled) > EXCEPTION_BYTES_MAX:
            pickled = b""
    except Exception:
        pickled = b""  # the text says what it was
    try:
        message = str(error)
    except Exception as unsaid:
        message = f"(its message raised {type(unsaid).__name__})"
    return pickled, name, message[:MESSAGE_CHARS_MAX], text[-TRACEBACK_CHARS_MAX:]


def _users(error: BaseException) -> TracebackType | None:
    """Its traceback from the user's function on."""
    trace = error.__traceback__
    for _ in range(FRAMES_OWN):
        if trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
    return trace


def _name(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__qualname__", type(function).__qualname__))
