"""The cluster as a tree of names that can be listed, read, followed and completed."""

from manifold.shells.namespace.entries import Entry
from manifold.shells.namespace.tree import Namespace

__all__ = ["Entry", "Namespace"]
