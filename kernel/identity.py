"""Who a node is: an Ed25519 key made at its first start, and a number for each start since.

Interface: `load_identity(state_dir)` reads the key, or makes it where there is none;
`next_boot(state_dir)` returns a number that no earlier start has had. Both return only when what
they return is on the disk. `state_dir` and `runtime_dir` come from `places`.
Invariants: I1 a key that exists is never replaced, and a file that is not a key is an error (the
KID would change, and peers that pinned it would refuse the node). I2 boot numbers of one state
folder strictly rise, also across crashes and between processes that race.
Source: design page of the hyperbus (identity), Ed25519 (RFC 8032).
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from manifold.kernel.durable import LOOK, Damaged, make_folder, read_record, sweep, write_record
from manifold.kernel.places import check_private, ipc_path, runtime_dir, state_dir
from manifold.vm.kid import Kid, kid_of

__all__ = [
    "Identity",
    "check_private",
    "ipc_path",
    "load_identity",
    "next_boot",
    "runtime_dir",
    "state_dir",
    "verify",
]

KEY_FILE = "identity.key"
BOOT_FILE = "boot"
KEY_BYTES = 32
BOOT_BYTES = 8
BOOT_MAX = (1 << 63) - 1  # it travels as a signed 64-bit integer


@dataclass(frozen=True, slots=True)
class Identity:
    """A node's key. `public` is the raw 32 bytes that travel, `kid` their hash."""

    kid: Kid
    public: bytes
    private: Ed25519PrivateKey = field(repr=False, compare=False)

    def sign(self, data: bytes) -> bytes:
        """The 64-byte signature of `data`."""
        return self.private.sign(data)


def verify(public: bytes, signature: bytes, data: bytes) -> bool:
    """Whether `signature` is one of `data` by the holder of `public`."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, data)
    except (InvalidSignature, ValueError):  # ValueError: not 32 bytes
        return False
    return True


def load_identity(folder: Path) -> Identity:
    """The identity kept in `folder`, made there at the first start."""
    path = folder / KEY_FILE
    raw = read_record(path)
    if raw is None:
        make_folder(folder)
        # Two processes may come here at once; the first one's key stays, and both read it.
        write_record(path, Ed25519PrivateKey.generate().private_bytes_raw(), replace=False)
        raw = read_record(path)
    if raw is None or len(raw) != KEY_BYTES:
        raise Damaged(f"{path} does not hold a key of {KEY_BYTES} bytes.", LOOK)
    private = Ed25519PrivateKey.from_private_bytes(raw)
    public = private.public_key().public_bytes_raw()
    return Identity(kid_of(public), public, private)


def next_boot(folder: Path) -> int:
    """The number of this start: 1 at the first, durable before it is returned."""
    make_folder(folder)
    path = folder / BOOT_FILE
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # nobody holds it longer than two fsyncs
        sweep(folder)
        raw = read_record(path)
        if raw is not None and len(raw) != BOOT_BYTES:
            raise Damaged(f"{path} does not hold a boot number.", LOOK)
        boot = int.from_bytes(raw, "big") + 1 if raw is not None else 1
        if boot > BOOT_MAX:
            raise Damaged(f"{path} holds {boot - 1}, the last boot number there is.", LOOK)
        write_record(path, boot.to_bytes(BOOT_BYTES, "big"))
        return boot
    finally:
        os.close(descriptor)
