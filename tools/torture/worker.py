"""A process of clients: `python -m manifold.tools.torture.worker FILE SPEC`, until stdin ends.

SPEC is a `Spec` as JSON. What its clients saw is appended to FILE. It ends when its standard input
does, which is also when whoever started it has died.
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import sys
from functools import partial
from random import Random

import msgspec
import uvloop

from manifold.tools.torture import history
from manifold.tools.torture.callers import Caller
from manifold.tools.torture.links import Links, ask
from manifold.tools.torture.stdin import when_stdin_ends


class Spec(msgspec.Struct, frozen=True):
    """`clients`: the number of each, and of the node that it is attached to."""

    cluster: str
    seed: int
    aliases: list[str]
    clients: list[tuple[int, int]]
    begun_ms: float


async def serve(path: str, spec: Spec) -> None:
    loop = asyncio.get_running_loop()
    stopped = when_stdin_ends(loop)
    links = {number: Links(spec.cluster, os.environ, spec.aliases) for number, _ in spec.clients}
    with open(path, "ab", buffering=0) as file:  # whoever waits for us sees that we have begun
        callers = [
            Caller(
                f"c{number}", number, node, spec.aliases, Random(f"{spec.seed} client {number}"),
                partial(ask, links[number]), partial(history.write, file),
                lambda: loop.time() * 1000, spec.begun_ms,
            )
            for number, node in spec.clients
        ]  # fmt: skip
        async with asyncio.TaskGroup() as group:
            for caller in callers:
                group.create_task(caller.run(stopped))
    for each in links.values():
        await each.close()


def main() -> None:
    faulthandler.enable()  # a crash in a library of ours must not look like one of the cluster
    uvloop.run(serve(sys.argv[1], msgspec.json.decode(sys.argv[2], type=Spec)))
    os._exit(
        0
    )  # all is closed and written; threads of nng that still end may not meet an end of ours


if __name__ == "__main__":
    main()
