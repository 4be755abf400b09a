"""Manifold: one operating system over unequal machines.

`import manifold` is light: the SDK is imported when one of its names is first used.

`manifold.kernel` is two things, because users and the import system each have a claim on the name:
the package of the node's kernel, and the decorator that makes a program of a Python function. It is
one object: the package, which can be called.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from manifold.vm.version import VERSION as __version__

_SDK = {
    "AsyncClient": "aio",
    "Client": "client",
    "Executor": "executor",
    "Future": "future",
    "JobFailed": "future",
    "Progress": "future",
    "RemoteError": "future",
    "RemoteTraceback": "future",
    "connect": "",
    "connect_async": "aio",
    "globals": "globals_default",
}
_ERRORS = (
    "Exhausted",
    "ManifoldError",
    "Maybe",
    "NoMemory",
    "ProcessDied",
    "Refused",
    "Trap",
    "Unavailable",
)
_LANGUAGE = ("Kernel", "array")

__all__ = [
    "AsyncClient",
    "Client",
    "Executor",
    "Exhausted",
    "Future",
    "JobFailed",
    "Kernel",
    "ManifoldError",
    "Maybe",
    "NoMemory",
    "ProcessDied",
    "Progress",
    "Refused",
    "RemoteError",
    "RemoteTraceback",
    "Trap",
    "Unavailable",
    "__version__",
    "array",
    "connect",
    "connect_async",
    "globals",
    "kernel",
]

if TYPE_CHECKING:
    from manifold.kernel.errors import (
        Exhausted,
        ManifoldError,
        Maybe,
        NoMemory,
        ProcessDied,
        Refused,
        Trap,
        Unavailable,
    )
    from manifold.shells.sdk import connect
    from manifold.shells.sdk.aio import AsyncClient, connect_async
    from manifold.shells.sdk.client import Client
    from manifold.shells.sdk.executor import Executor
    from manifold.shells.sdk.future import (
        Future,
        JobFailed,
        Progress,
        RemoteError,
        RemoteTraceback,
    )
    from manifold.shells.sdk.globals_default import globals
    from manifold.vm.python import Kernel, array, kernel


class _ByName(ModuleType):
    """A module is pickled by its name; a function that uses one may be sent to a cluster."""

    def __reduce__(self) -> tuple[Any, ...]:
        return importlib.import_module, (self.__name__,)


class _CallablePackage(_ByName):
    """The package `manifold.kernel`, called as `@manifold.kernel`."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        from manifold.vm.python import kernel

        return kernel(*args, **options)


class _Package(_ByName):
    """This package: whoever imports `manifold.kernel` first, it comes as a callable one."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "kernel" and type(value) is ModuleType:
            value.__class__ = _CallablePackage
        super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name in _SDK:
        module = importlib.import_module(f"manifold.shells.sdk.{_SDK[name]}".rstrip("."))
        return getattr(module, name)
    if name in _ERRORS:
        from manifold.kernel import errors

        return getattr(errors, name)
    if name in _LANGUAGE:
        from manifold.vm import python

        return getattr(python, name)
    if name == "kernel":
        return importlib.import_module("manifold.kernel")
    raise AttributeError(f"module 'manifold' has no attribute {name!r}")


sys.modules[__name__].__class__ = _Package
if "joblib.parallel" in sys.modules:  # who has joblib finds our backend there
    importlib.import_module("manifold.joblib")
