"""Network namespaces of Linux: make one, enter one, run a program in one.

Interface rules: a namespace is an open descriptor, and ends with the last descriptor and process
that has it, interfaces and all: nothing is to be cleaned up, whoever is killed. `enter` is for a
process that has one thread, before its loop; `make`, `within` and `run` leave the caller's own
namespace alone. `OSError` where this user may not (CAP_SYS_ADMIN), or the kernel has none.
Source: namespaces(7), setns(2). Python has these calls from 3.12 on.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

CLONE_NEWNET = 0x4000_0000
OWN = "/proc/thread-self/ns/net"
RUN_S = 30.0  # `ip` and `tc` take some ms, on a busy host some hundred

_libc = ctypes.CDLL(None, use_errno=True)

T = TypeVar("T")


def make() -> int:
    """A descriptor of a new namespace with nothing in it but a loopback that is down."""

    def unshare() -> int:
        _check(_libc.unshare(CLONE_NEWNET))
        return os.open(OWN, os.O_RDONLY | os.O_CLOEXEC)

    return _apart(unshare)


def enter(descriptor: int) -> None:
    """This thread, and whatever it starts from here on, is in that namespace."""
    _check(_libc.setns(descriptor, CLONE_NEWNET))


def within(descriptor: int, call: Callable[[], T]) -> T:
    """Call it in a namespace: what it starts and opens is there."""

    def inside() -> T:
        enter(descriptor)
        return call()

    return _apart(inside)


def run(descriptor: int, command: Sequence[str], text: str, fds: Sequence[int] = ()) -> str:
    """Run a program in a namespace with `text` as its input: what it says of its failure, or "".

    `fds` are inherited, under their numbers.
    """
    done = within(
        descriptor,
        lambda: subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=RUN_S, pass_fds=fds,
            check=False,
        ),
    )  # fmt: skip
    said = (done.stderr or done.stdout).strip()
    return (said or f"{command[0]} exited with {done.returncode}") if done.returncode else ""


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _apart(call: Callable[[], T]) -> T:
    """In a thread of its own: a namespace is a thread's, and this one ends with the call."""
    done: list[T] = []
    failed: list[BaseException] = []

    def body() -> None:
        try:
            done.append(call())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=body, name="netns")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return done[0]
