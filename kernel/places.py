"""Where a cluster keeps its things: durable state, and the sockets of one host.

Interface: `state_dir` and `runtime_dir` are functions of the environment, so that a command finds
what the supervisor made. State of a node: `$MANIFOLD_STATE_HOME/<cluster>/<alias>`, else
`$XDG_STATE_HOME/manifold/…`, else `~/.local/state/manifold/…`. Sockets: `manifold-<hash>` in
`$MANIFOLD_RUNTIME_DIR` or `$XDG_RUNTIME_DIR`, else `<tmp>/manifold-<uid>-<hash>`; the hash covers
cluster and state home, so that two clusters, or two users' clusters of one name, never meet.
Invariants: P1 a runtime folder that `runtime_dir` returns is ours and has mode 0700. P2 every
path of `ipc_path` is at most `IPC_PATH_BYTES_MAX` bytes. P3 no name leads out of its folder.
"""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Mapping
from pathlib import Path

from manifold.kernel.errors import ConfigError, Refused
from manifold.kernel.limits import (
    ALIAS_CHARS_MAX,
    CLUSTER_NAME_CHARS_MAX,
    NAME,
    NAME_WORDS,
    RUNTIME_DIR_BYTES_MAX,
    SOCKET_NAME_BYTES_MAX,
)
from manifold.vm.kid import kid_of

NETNS = "netns"  # in the runtime folder of a cluster whose nodes are in network namespaces
SPOOL = "spool"  # the folder of parcels, beside those of nodes
HASH_DIGITS = 12  # 48 bits: a million clusters on one host meet with chance 0.2 %


def state_home(environ: Mapping[str, str]) -> Path:
    """The folder above all clusters of this user."""
    own = environ.get("MANIFOLD_STATE_HOME", "")
    if own:
        if not os.path.isabs(own):
            raise ConfigError(
                f"variable MANIFOLD_STATE_HOME: {own!r} is not an absolute path.",
                "Write a path that begins with /.",
            )
        return Path(own)
    xdg = environ.get("XDG_STATE_HOME", "")
    if os.path.isabs(xdg):  # the XDG specification: relative paths are ignored
        return Path(xdg) / "manifold"
    home = environ.get("HOME", "")
    home = home if os.path.isabs(home) else pwd.getpwuid(os.geteuid()).pw_dir
    return Path(home) / ".local" / "state" / "manifold"


def cluster_dir(cluster: str, environ: Mapping[str, str]) -> Path:
    """The folder above the nodes of a cluster; nothing is made."""
    return state_home(environ) / _name(cluster, "cluster", CLUSTER_NAME_CHARS_MAX)


def state_dir(cluster: str, alias: str, environ: Mapping[str, str]) -> Path:
    """The folder of one node's durable records; nothing is made."""
    return cluster_dir(cluster, environ) / _name(alias, "node", ALIAS_CHARS_MAX)


def spool_dir(cluster: str, environ: Mapping[str, str]) -> Path:
    """The folder above those in which clients keep large parcels; nothing is made."""
    return cluster_dir(cluster, environ) / SPOOL


def environ_of(cluster: str, folder: Path, runtime: Path) -> dict[str, str]:
    """The variables by which a process finds the cluster in `folder`, whose sockets are in
    `runtime`."""
    found = {"MANIFOLD_CLUSTER": cluster, "MANIFOLD_STATE_HOME": str(folder.parent)}
    if runtime_path(cluster, found) != runtime:
        found["MANIFOLD_RUNTIME_DIR"] = str(runtime.parent)
    return found


def runtime_path(cluster: str, environ: Mapping[str, str]) -> Path:
    """Where `runtime_dir` is or would be; nothing is made and nothing is checked."""
    uid = os.geteuid()
    digest = kid_of(f"{cluster_dir(cluster, environ)}".encode())[2 : 2 + HASH_DIGITS]
    own = environ.get("MANIFOLD_RUNTIME_DIR", "")
    if own:
        if not os.path.isabs(own):
            raise ConfigError(
                f"variable MANIFOLD_RUNTIME_DIR: {own!r} is not an absolute path.",
                "Write a path that begins with /.",
            )
        return _short(Path(own) / f"manifold-{digest}", "MANIFOLD_RUNTIME_DIR")
    xdg = Path(environ.get("XDG_RUNTIME_DIR", "") or "-")
    if xdg.is_absolute() and xdg.is_dir() and xdg.stat().st_uid == uid:
        path = xdg / f"manifold-{digest}"
        if len(os.fsencode(path)) <= RUNTIME_DIR_BYTES_MAX:
            return path
    return Path("/tmp") / f"manifold-{uid}-{digest}"  # not $TMPDIR: it may be long, or differ


def runtime_dir(cluster: str, environ: Mapping[str, str]) -> Path:
    """The folder of the cluster's sockets on this host, made where it is missing."""
    path = runtime_path(cluster, environ)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as fault:
        raise Refused(
            f"{path} cannot be made: {fault.strerror}.", "Set MANIFOLD_RUNTIME_DIR to a folder."
        ) from fault
    check_private(path)
    return path


def check_private(path: Path) -> None:
    """Refuse a folder in which somebody else could put or read sockets."""
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode):  # a link somebody planted in /tmp is none
        raise Refused(f"{path} is not a folder.", "Remove it, or set MANIFOLD_RUNTIME_DIR.")
    if status.st_uid != os.geteuid():
        raise Refused(
            f"{path} belongs to user {status.st_uid}, not to us.",
            "Set MANIFOLD_RUNTIME_DIR to a folder of yours.",
        )
    if stat.S_IMODE(status.st_mode) != 0o700:
        raise Refused(
            f"{path} has mode {stat.S_IMODE(status.st_mode):04o}, not 0700.",
            f"If nobody else has used it: chmod 700 {path}",
        )


def ipc_path(runtime: Path, name: str) -> Path:
    """The path of the socket `name` (such as `rpi4-01.control`), short enough for the system."""
    if not name or "/" in name or len(os.fsencode(name)) > SOCKET_NAME_BYTES_MAX:
        raise Refused(f"{name!r} is no name for a socket.", f"At most {SOCKET_NAME_BYTES_MAX}.")
    return _short(runtime, "the runtime folder") / name


def _short(runtime: Path, what: str) -> Path:
    if len(os.fsencode(runtime)) > RUNTIME_DIR_BYTES_MAX:
        raise Refused(
            f"{what}: {runtime} is longer than {RUNTIME_DIR_BYTES_MAX} bytes, so that paths of "
            f"sockets in it would be too long for the system.",
            "Set MANIFOLD_RUNTIME_DIR to a shorter path.",
        )
    return runtime


def _name(name: str, what: str, chars_max: int) -> str:
    if not NAME.match(name) or len(name) > chars_max:
        raise Refused(
            f"{name[:80]!r} is no name of a {what}.", f"1 to {chars_max} characters, {NAME_WORDS}."
        )
    return name
