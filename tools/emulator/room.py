"""Descriptors for a supervisor: raised where that is allowed, else refused before anything starts.

Interface: `make(nodes)` in the process that is going to supervise so many more nodes. The limits of
the nodes themselves are the zygote's business (kernel/process/zygote.py).
"""

from __future__ import annotations

import os
import resource

from manifold.kernel.errors import Refused

PER_NODE = 4  # a channel, a pidfd, a namespace, and for a moment the channel's other end
SPARE = 128  # the zygote's, and those of whoever shares the process: clients, logs, tests


def make(nodes: int) -> None:
    """See the module."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = len(os.listdir("/proc/self/fd")) + PER_NODE * nodes + SPARE
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        most = max(0, nodes - (wanted - hard + PER_NODE - 1) // PER_NODE)
        raise Refused(
            f"{nodes} nodes take {wanted} descriptors of the process that supervises them, which "
            f"may have {hard}.",
            f"Raise its limit (`ulimit -Hn {wanted}`, as root), or start at most {most} nodes.",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
