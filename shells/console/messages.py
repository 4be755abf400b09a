"""What the console knows of a cluster, and the events by which it learns and recordings are made.

Interface rules: an event says only what has changed; `at_ms` is the wall clock of whoever observed.
Unknown fields of a later version are ignored, missing ones take their defaults.
"""

from __future__ import annotations

import msgspec


class Node(msgspec.Struct, frozen=True, omit_defaults=True):
    """A node: what it is, and how it is. `started_ms` is 0 where it did not answer."""

    kid: str
    alias: str
    node_class: str
    state: str  # ready | suspect | dead | left
    pid: int = 0
    boot: int = 0
    cores: int = 0
    compute: float = 1.0
    memory_bytes: int = 0
    gpu: bool = False
    alive: int = 0  # members that it holds for alive
    started_ms: int = 0
    throttle: str = ""
    bad_messages: int = 0
    labels: tuple[str, ...] = ()


class Load(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a node does: busy slots, gas that waits and runs, processes, free memory or -1."""

    busy: int = 0
    queued_gas: float = 0.0
    gas_per_s: float = 0.0
    workers: int = 0
    free_memory_bytes: int = -1


class Job(msgspec.Struct, frozen=True, omit_defaults=True):
    """A job, without its progress."""

    job: str
    state: str  # queued | running | done | failed | cancelled
    program: str = ""
    name: str = ""
    owner: str = ""
    total: int = 0
    reduce: str = ""
    started_ms: int = 0
    error: str = ""


class Progress(msgspec.Struct, frozen=True, omit_defaults=True):
    """How far a job is."""

    done: int = 0
    shards: int = 0
    retries: int = 0
    elapsed_ms: int = 0


class Run(msgspec.Struct, frozen=True, omit_defaults=True):
    """A shard on a node: computed in a slot, or (slot -1) waiting for one."""

    job: str
    shard: int
    attempt: int = 1
    slot: int = -1
    pid: int = 0
    first: int = 0
    last: int = 0
    since_ms: int = 0
    what: str = ""


class Attached(msgspec.Struct, frozen=True, tag="k.attached"):
    """The console has found the cluster and is attached to `node`."""

    at_ms: int
    cluster: str
    node: str
    version: str = ""


class Lost(msgspec.Struct, frozen=True, tag="k.lost"):
    """Nobody answers; `why` in one sentence. What is known stays, with its age."""

    at_ms: int
    why: str
    next: str = ""
    cluster: str = ""


class Agreement(msgspec.Struct, frozen=True, tag="k.agreement"):
    """Who votes on what the cluster agrees on."""

    at_ms: int
    epoch: int
    voters: tuple[str, ...] = ()


class NodeIs(msgspec.Struct, frozen=True, tag="k.node"):
    """A node that is new, or that has changed in more than its load."""

    at_ms: int
    node: Node


class NodeDoes(msgspec.Struct, frozen=True, tag="k.load"):
    """A node's load has changed."""

    at_ms: int
    kid: str
    load: Load


class NodeGone(msgspec.Struct, frozen=True, tag="k.gone"):
    """Nobody knows the node any more."""

    at_ms: int
    kid: str


class JobIs(msgspec.Struct, frozen=True, tag="k.job"):
    """A job that is new, or whose state or owner has changed."""

    at_ms: int
    job: Job


class JobDoes(msgspec.Struct, frozen=True, tag="k.progress"):
    """A job has moved on."""

    at_ms: int
    job: str
    progress: Progress


class JobGone(msgspec.Struct, frozen=True, tag="k.forgotten"):
    """No node remembers the job."""

    at_ms: int
    job: str


class NodeRuns(msgspec.Struct, frozen=True, tag="k.runs"):
    """The shards that are on a node now: all of them."""

    at_ms: int
    node: str  # alias
    runs: tuple[Run, ...] = ()


class Moved(msgspec.Struct, frozen=True, tag="k.moved"):
    """A shard has come to node `to` (from its owner, where `source` is empty)."""

    at_ms: int
    job: str
    shard: int
    source: str
    to: str


class Logged(msgspec.Struct, frozen=True, tag="k.log"):
    """Lines of nodes' logs as (alias, line), in order of time; the number each node has come to."""

    at_ms: int
    numbers: dict[str, int]
    lines: tuple[tuple[str, str], ...]


class Looked(msgspec.Struct, frozen=True, tag="k.looked"):
    """Everything was looked at; `silent` did not answer. Closes the events of one look."""

    at_ms: int
    silent: tuple[str, ...] = ()


Event = (
    Attached
    | Lost
    | Agreement
    | NodeIs
    | NodeDoes
    | NodeGone
    | JobIs
    | JobDoes
    | JobGone
    | NodeRuns
    | Moved
    | Logged
    | Looked
)
