"""Manifold: one operating system over unequal machines.

`import manifold` is light: the SDK is imported when one of its names is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from manifold.vm.version import VERSION as __version__

__all__ = ["Client", "Future", "JobFailed", "Progress", "__version__", "connect"]

if TYPE_CHECKING:
    from manifold.shells.sdk import Client, Future, JobFailed, Progress, connect


def __getattr__(name: str) -> Any:
    if name in __all__:
        from manifold.shells import sdk

        return getattr(sdk, name)
    raise AttributeError(f"module 'manifold' has no attribute {name!r}")
