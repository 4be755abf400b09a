"""An emulated cluster: from a configuration to the specifications of its nodes, and back down.

Interface rules: `up` is what `manifold up` and the test fixture call; it returns a supervisor that
is running. `down` ends whatever supervises a cluster and returns once nothing of it is left.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
from collections.abc import Callable, Mapping, Sequence

from manifold.kernel import places
from manifold.kernel.config import Config, NodeClass
from manifold.kernel.errors import Refused, Unavailable
from manifold.kernel.process import remains, throttle
from manifold.tools.emulator import control, record, room
from manifold.tools.emulator.changes import Changes
from manifold.tools.emulator.members import Members
from manifold.tools.emulator.network import Network
from manifold.tools.emulator.supervisor import Supervisor, refuse_taken

CONVERGE_S = 30.0  # for nodes to see each other, on a host that is busy with other things
CONVERGE_NODES = 40  # beyond which it takes longer: 128 took 40 s on two cores with other work


def converge_s(nodes: int) -> float:
    """How long so many nodes of this host may take to see each other."""
    return CONVERGE_S * max(1.0, nodes / CONVERGE_NODES)


def sharing_this_machine(config: Config, count: int) -> Config:
    """`count` nodes of one class that have this machine's cores and memory between them, unslowed:
    what a program wants that starts a cluster for its own work."""
    cores = max(1, len(os.sched_getaffinity(0)) // count)
    total_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    kind = NodeClass(
        "local", count, cores, 1.0, max(config.tasks.memory, total_bytes // count), latency=0.0
    )
    return dataclasses.replace(config, classes=(kind,))


async def up(
    config: Config,
    count: int,
    environ: Mapping[str, str],
    on_event: Callable[[str], None],
    roots: throttle.Roots = throttle.ROOTS,
    memory_roots: throttle.Roots = throttle.MEMORY_ROOTS,
    *,
    netns: bool = False,
) -> Supervisor:
    """Start `count` nodes spread over the classes. `Refused` where the cluster is up already.

    Agents of this cluster that run on this host already are joined. `roots` are where cgroups may
    be made; with none, compute shares are kept by pacing, and nodes keep the books of memory.
    `netns`: nodes are in network namespaces; `Unsupported` where that cannot be.
    """
    room.make(count)
    runtime = places.runtime_path(config.cluster, environ)
    lock = record.Lock(places.cluster_dir(config.cluster, environ))
    refuse_taken(lock, count, runtime)
    network: Network | None = None
    try:
        network = Network() if netns else None
        remains.clear_spool(places.spool_dir(config.cluster, environ), runtime)
        remains.clear_folder(runtime)  # who was killed may have left it
        runtime = places.runtime_dir(config.cluster, environ)
        agents = [f"ipc://{str(path)[:-2]}" for path in sorted(runtime.glob("*.d"))]
        if network is not None:
            refuse_agents(agents)
            (runtime / places.NETNS).touch()
        members = Members(config, runtime, environ, roots, agents, memory_roots, network)
        specs = members.first(count)
        if network is not None:
            await asyncio.to_thread(network.attach_all)
    except BaseException:
        if network is not None:
            network.close()
        above = throttle.above(runtime.name, tuple(dict.fromkeys((*roots, *memory_roots))))
        remains.clear(remains.Remains(str(runtime), True, (), (), above))
        lock.release()
        raise
    supervisor = Supervisor(specs, runtime, lock, on_event=on_event, members=members)
    supervisor.changes = Changes(supervisor)
    path = control.socket_path(config.cluster, environ)
    supervisor.control = control.Control(supervisor.changes, path)
    try:
        await supervisor.start()
        await supervisor.control.serve()
    except BaseException:
        await supervisor.stop()
        raise
    return supervisor


def refuse_agents(agents: Sequence[str]) -> None:
    """Who is in no namespace reaches nobody who is in one."""
    if agents:
        names = ", ".join(each.rpartition("/")[2] for each in agents)
        raise Refused(
            f"{names} of this cluster runs here already, and is in no namespace.",
            "End it (Ctrl-C), or leave out --netns.",
        )


def down(cluster: str, environ: Mapping[str, str]) -> bool:
    """End the cluster; False where none was up. What a killed supervisor left is removed."""
    folder = places.cluster_dir(cluster, environ)
    found = record.holder(folder)
    was_up = found is not None and record.signal_holder(found, signal.SIGTERM)
    if not record.wait_released(folder):
        # It was told to and did not: with it the liveness pipe closes, and everything ends.
        if found is not None:
            record.signal_holder(found, signal.SIGKILL)
        if not record.wait_released(folder):
            raise Unavailable(
                f"Processes of cluster {cluster!r} do not end.",
                f"See who holds {folder / 'supervisor.lock'}.",
            )
    runtime = places.runtime_path(cluster, environ)
    remains.clear_spool(places.spool_dir(cluster, environ), runtime)
    if os.path.isdir(runtime):
        remains.clear_folder(runtime)
    throttle.remove_all(runtime.name, (*throttle.ROOTS, *throttle.MEMORY_ROOTS))
    return was_up
