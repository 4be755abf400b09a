"""Rules of links made while a cluster runs: their record, and telling nodes of them.

Interface rules: the record is a file in the runtime directory, so that it ends with the cluster,
however that ends. `change` rewrites it under a lock and counts it on. `tell` gives nodes all of it,
each through its own door, since the links between them may be cut; one that stands still finds it
in its socket when it goes on. The supervisor gives it to a node that starts, and once more when
that is ready, since it may have changed meanwhile.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import permutations
from pathlib import Path
from typing import Any

import msgspec

from manifold.kernel import messages as m
from manifold.kernel import places
from manifold.kernel.effects import Plane
from manifold.kernel.errors import ManifoldError, NoCluster, Refused, Unavailable
from manifold.kernel.hyperbus.frames import Outbox, encode_envelope
from manifold.kernel.hyperbus.messages import CLIENT_PREFIX
from manifold.kernel.hyperbus.rules import (
    RULES_MAX,
    LabelsOf,
    LinkRule,
    fits,
    has,
    holding,
    unlabelled,
)
from manifold.kernel.hyperbus.seal import Plain
from manifold.kernel.hyperbus.sockets import path
from manifold.kernel.hyperbus.splitter import framed

FILE = "links.json"
ASKED_AT_ONCE = 8  # nodes; each is a client with a thread of its own, for some milliseconds
LEAVE_S = 0.2  # its buffer takes a megabyte at once; only a full queue of connections waits

Rules = tuple[LinkRule, ...]


def read(runtime: Path) -> m.LinkOrders:
    """The orders of a cluster; none where nobody has given any."""
    try:
        data = (runtime / FILE).read_bytes()
    except FileNotFoundError:
        return m.LinkOrders()
    return msgspec.json.decode(data, type=m.LinkOrders)


def change(runtime: Path, changed: Callable[[Rules], Rules]) -> tuple[m.LinkOrders, m.LinkOrders]:
    """Put `changed` of the rules in the place of them: what they were, what they are."""
    with _locked(runtime):
        before = read(runtime)
        rules = changed(before.rules)
        if len(rules) > RULES_MAX:
            raise Refused(
                f"A cluster has at most {RULES_MAX} rules made with `manifold net`.",
                "Lift some with `manifold net heal`, or name classes or several nodes in one rule.",
            )
        after = m.LinkOrders(before.number + 1, rules)
        fresh = runtime / f"{FILE}.new"
        fresh.write_bytes(msgspec.json.encode(after))
        os.replace(fresh, runtime / FILE)
    return before, after


@contextmanager
def _locked(runtime: Path) -> Iterator[None]:
    """Two who change the rules at once take turns."""
    try:
        fd = os.open(runtime, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NoCluster(
            "The cluster is not running here.",
            "Start it with `manifold up`, or name another with --cluster.",
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


# -- what changes ---------------------------------------------------------------------------------


def added(rules: Rules, new: Sequence[LinkRule]) -> Rules:
    """With `new` as the last word; of rules about the same ends the newest stays."""
    kept = tuple(each for each in rules if not any(each.same_ends(one) for one in new))
    return (*kept, *new)


def healed(
    rules: Rules, a: str, b: str, aliases: Sequence[str], labels_of: LabelsOf = unlabelled
) -> Rules:
    """Between two sides as the file says, whatever was ordered."""
    lifted = LinkRule(a, b, lifted=True)
    kept = tuple(each for each in rules if (each.a, each.b) not in ((a, b), (b, a)))
    left = any(
        (rule := holding(kept, *ends, labels_of)) is not None and not rule.lifted
        for ends in permutations(aliases, 2)
        if fits(lifted, *ends, labels_of)
    )
    return (*kept, lifted) if left else kept


def partition(groups: Sequence[str]) -> list[LinkRule]:
    """A cut between each two groups."""
    return [
        LinkRule(one, other, cut=True)
        for at, one in enumerate(groups)
        for other in groups[at + 1 :]
    ]


def concerned(before: Rules, after: Rules, aliases: Sequence[str]) -> list[str]:
    """The nodes at an end of a rule that came, went or changed its place; all of them where it
    names a label: who is cut off cannot be asked for its own."""
    same = 0
    while same < min(len(before), len(after)) and before[same] == after[same]:
        same += 1
    moved = (*before[same:], *after[same:])
    sides = [side for rule in moved for side in (rule.a, rule.b)]
    if any("=" in side for side in sides):
        return list(aliases)
    return [alias for alias in aliases if any(has(side, alias) for side in sides)]


# -- telling nodes --------------------------------------------------------------------------------


def tell(
    cluster: str, environ: Mapping[str, str], orders: m.LinkOrders, aliases: Sequence[str]
) -> list[str]:
    """Give each of the nodes the rules; those that did not say that they have them."""
    runtime = places.runtime_path(cluster, environ)
    answers = ask(cluster, environ, orders, aliases)
    silent = [alias for alias in aliases if isinstance(answers[alias], ManifoldError)]
    for alias in silent:
        _leave(runtime, cluster, alias, orders)
    return silent


def ask(
    cluster: str, environ: Mapping[str, str], question: msgspec.Struct, aliases: Sequence[str]
) -> dict[str, Any]:
    """What each of the nodes answers at its own door, or why it does not."""
    from manifold.shells.sdk.client import Client  # the supervisor does not need it

    def asked(alias: str) -> Any:
        try:
            with Client(cluster, node=alias, environ=environ) as client:
                if client.node != alias:  # it has no door at present
                    return Unavailable(f"{alias} is not up.")
                return client.ask(question)
        except ManifoldError as error:
            return error

    if not aliases:
        return {}
    with ThreadPoolExecutor(min(ASKED_AT_ONCE, len(aliases)), "links") as threads:
        return dict(zip(aliases, threads.map(asked, aliases), strict=True))


def _leave(runtime: Path, cluster: str, alias: str, orders: m.LinkOrders) -> None:
    """In the socket of a node that stands still; one that is down has none that takes it."""
    outbox = Outbox()
    outbox.put(encode_envelope(orders))
    frame, _ = outbox.take(cluster, CLIENT_PREFIX + os.urandom(8).hex(), os.getpid())
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(LEAVE_S)
        try:
            line.connect(path(f"ipc://{runtime / alias}", Plane.CONTROL))
            line.sendall(framed(Plain().seal("", Plane.CONTROL, frame)))
        except OSError:
            return  # it is given the record when it starts
