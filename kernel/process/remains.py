"""What a cluster, or an agent, has on this host beside its processes, and how it is taken away.

Interface rules: `clear` is called once every process it speaks of has ended: by the supervisor, by
the zygote where the supervisor was killed, and by the next `up` or `down` where both were. It may
be called twice. Invariants: R1 a socket that somebody still listens at is not taken away, unless
it is one of ours or nobody has a door in the folder any more.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import stat
from pathlib import Path

import msgspec

from manifold.kernel.process import throttle

DOOR = ".d"
ANSWER_S = 0.05  # a connection on one host is taken by the kernel: it does not wait for a process


class Remains(msgspec.Struct, frozen=True):
    """`names` are our sockets' names without their endings; `whole` where the folder is ours.

    `above`: groups of which everything is ours as well, but what belongs to a node that answers.
    """

    runtime_dir: str
    whole: bool
    names: tuple[str, ...]
    cgroups: tuple[str, ...]
    above: tuple[str, ...] = ()


def clear(remains: Remains) -> None:
    """Take away sockets, the folder where nobody else uses it, and cgroups."""
    folder = Path(remains.runtime_dir)
    for name in remains.names:
        for path in (folder / name, *folder.glob(f"{name}.*")):
            path.unlink(missing_ok=True)
    if remains.whole:
        clear_folder(folder)
    else:
        with contextlib.suppress(OSError):  # others are in it, or it is gone
            folder.rmdir()
    for group in remains.cgroups:
        throttle.remove(group)
    for above in remains.above:
        for path in sorted(Path(above).glob("*/")):
            if not answers(folder / f"{path.name}{DOOR}"):
                throttle.remove(str(path))


def clear_folder(folder: Path) -> None:
    """R1: the whole folder where no door in it answers, else the sockets nobody listens at."""
    if not any(answers(path) for path in folder.glob(f"*{DOOR}")):
        shutil.rmtree(folder, ignore_errors=True)
        return
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.lstat(path).st_mode) and not answers(path):
                path.unlink()


def clear_spool(spool: Path, runtime: Path) -> None:
    """What clients have left that were killed together with the node that would have cleared it."""
    if not spool.is_dir():
        return
    for folder in spool.iterdir():
        if not answers(runtime / f"c{folder.name[2:]}.c"):
            shutil.rmtree(folder, ignore_errors=True)


def answers(path: Path) -> bool:
    """Whether somebody listens at a socket."""
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(ANSWER_S)
            probe.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        return False
    except OSError:  # of another kind, or its queue is full, or we cannot tell
        return True
    return True
