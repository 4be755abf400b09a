"""What the shell completes of a running cluster: paths, aliases, job ids, names of globals.

Each is a `shell_complete` of click. Silent where no cluster answers within `ANSWER_S`: a shell that
hangs on a key is worse than one that completes nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import click

from manifold.kernel.errors import ManifoldError
from manifold.shells.verbs.common import connect, not_text

ANSWER_S = 2.0
Completed = list[str]


def _asked(context: click.Context, prefix: str) -> Completed:
    """Paths that begin with `prefix`, in time or not at all."""
    found: Completed = []
    if not_text(prefix):
        return found  # nothing of a cluster begins so

    def ask() -> None:
        from manifold.shells.namespace import Namespace

        try:
            with connect(context) as client:
                found.extend(Namespace(client).complete(prefix))
        except ManifoldError:
            found.clear()  # no cluster, or one that is in trouble: nothing to offer

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    return list(found)


def paths(context: click.Context, parameter: click.Parameter, incomplete: str) -> Completed:
    """Of the namespace; a bare word is the name of a global."""
    if incomplete.startswith("/"):
        return _asked(context, incomplete)
    return names(context, parameter, incomplete) + ([] if incomplete else _asked(context, "/"))


def names(context: click.Context, parameter: click.Parameter, incomplete: str) -> Completed:
    """Of globals, with /globals/ before them or without."""
    folder = "/globals/"
    if incomplete.startswith("/"):
        return [each for each in _asked(context, incomplete) if each.startswith(folder)] or (
            [folder] if folder.startswith(incomplete) else []
        )
    return [each.removeprefix(folder) for each in _asked(context, folder + incomplete)]


def _inside(folder: str) -> Callable[[click.Context, click.Parameter, str], Completed]:
    def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> Completed:
        found = _asked(context, f"{folder}/{incomplete}")
        return [each.removeprefix(f"{folder}/").rstrip("/") for each in found]

    return complete


aliases = _inside("/nodes")
jobs = _inside("/jobs")
