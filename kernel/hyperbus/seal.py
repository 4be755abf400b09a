"""Where frames are sealed: bytes in, bytes out, per peer and plane.

Interface rules: `seal` is called on every frame that leaves, `open` on every one that arrives,
before anything of it is decoded. `Plain` changes nothing and is served only on ipc sockets inside
a 0700 directory, where the kernel has already proved that both ends are the same user.
"""

from __future__ import annotations

from typing import Protocol

from manifold.kernel.effects import Plane


class Seal(Protocol):
    """Authenticated encryption of frames. `open` raises `PeerError` for what is not authentic."""

    def seal(self, peer: str, plane: Plane, frame: bytes) -> bytes: ...

    def open(self, plane: Plane, sealed: bytes) -> bytes: ...


class Plain:
    """No sealing."""

    def seal(self, peer: str, plane: Plane, frame: bytes) -> bytes:
        return frame

    def open(self, plane: Plane, sealed: bytes) -> bytes:
        return sealed
