"""System calls of a node: what clients and the supervisor ask it. Each is answered by the type
named in its docstring, or by a `Failure`.

Interface rules: a client may name another node as the destination; the node it is attached to
relays. `All…` calls gather from every live node and say who did not answer.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from manifold.kernel import labels
from manifold.kernel.clock import JUMP_MS_MAX, RATE_MAX, RATE_MIN
from manifold.kernel.geode.messages import LoadReport
from manifold.kernel.hyperbus import messages as hyperbus
from manifold.kernel.hyperbus.rules import RULES_MAX, LinkRule, Probability, Rate, Time
from manifold.kernel.membership import messages as membership
from manifold.kernel.nexus import messages as nexus
from manifold.kernel.observe import messages as observe
from manifold.kernel.scheduler import messages as scheduler
from manifold.kernel.scheduler.messages import JobStatus
from manifold.vm.kid import Kid

LOG_LINES_MAX = 2000
Text = Annotated[str, Meta(max_length=4096)]
LABEL_CHARS_MAX = labels.KEY_CHARS_MAX + 1 + labels.VALUE_CHARS_MAX
Label = Annotated[str, Meta(min_length=1, max_length=LABEL_CHARS_MAX)]


class GetNode(msgspec.Struct, frozen=True, array_like=True, tag="n.node"):
    """Answered by `NodeInfo`."""


class NodeInfo(msgspec.Struct, frozen=True, array_like=True, tag="n.info"):
    """A node as it sees itself, or (pid 0, no load) as another sees one that did not answer."""

    kid: Kid
    alias: str
    node_class: str
    state: str  # ready | suspect | dead | left
    pid: int
    boot: int
    address: str
    cores: int
    compute: float
    memory_bytes: int
    gpu: bool
    alive: int  # members it holds for alive, itself included
    uptime_ms: float
    throttle: str  # "cgroup" | "pacing" | "none"
    workers: tuple[int, ...] = ()  # process ids
    load: LoadReport | None = None
    bad_messages: int = 0
    metrics: str = ""  # HOST:PORT that serves /metrics, "" where nothing does
    labels: tuple[str, ...] = ()
    line: str = ""  # where other nodes reach it, if it is in a network namespace


class AllNodes(msgspec.Struct, frozen=True, array_like=True, tag="n.nodes"):
    """Answered by `NodeList`."""


class NodeList(msgspec.Struct, frozen=True, array_like=True, tag="n.nodelist"):
    nodes: tuple[NodeInfo, ...]


class GetInventory(msgspec.Struct, frozen=True, array_like=True, tag="n.inventory"):
    """Answered by `InventoryText`: what the host is, measured."""


class InventoryText(msgspec.Struct, frozen=True, array_like=True, tag="n.inventoryis"):
    json: str


class AllJobs(msgspec.Struct, frozen=True, array_like=True, tag="n.jobs"):
    """Answered by `JobsList`."""


class JobsList(msgspec.Struct, frozen=True, array_like=True, tag="n.joblist"):
    jobs: tuple[JobStatus, ...]
    silent: tuple[str, ...]  # aliases that did not answer


class GetProcesses(msgspec.Struct, frozen=True, array_like=True, tag="n.ps"):
    """Answered by `Processes`: what this node's workers compute."""


class AllProcesses(msgspec.Struct, frozen=True, array_like=True, tag="n.allps"):
    """Answered by `Processes`."""


class Process(msgspec.Struct, frozen=True, array_like=True):
    node: str
    slot: int
    pid: int
    job: str
    shard: int
    attempt: int
    first: int
    last: int
    running_ms: float
    program: str
    state: str  # running | waiting


class Processes(msgspec.Struct, frozen=True, array_like=True, tag="n.processes"):
    processes: tuple[Process, ...]
    silent: tuple[str, ...] = ()


class ReadLog(msgspec.Struct, frozen=True, array_like=True, tag="n.log"):
    """Answered by `LogLines`: lines after number `after`, the newest where they are too many."""

    after: int = 0
    contains: Text = ""
    limit: Annotated[int, Meta(ge=1, le=LOG_LINES_MAX)] = LOG_LINES_MAX


class LogLines(msgspec.Struct, frozen=True, array_like=True, tag="n.loglines"):
    alias: str
    next: int
    lines: tuple[str, ...]


class SetLink(msgspec.Struct, frozen=True, array_like=True, tag="n.link"):
    """Answered by `Done`: what happens to messages between this node and `peer` ("*": all)."""

    peer: str
    latency_ms: Time = 0.0
    jitter_ms: Time = 0.0
    rate_bps: Rate = 0.0
    loss: Probability = 0.0
    reorder: Probability = 0.0
    cut_to: bool = False
    cut_from: bool = False


class ClearLinks(msgspec.Struct, frozen=True, array_like=True, tag="n.heal"):
    """Answered by `Done`: every rule of `SetLink` is lifted, at this node."""


class LinkOrders(msgspec.Struct, frozen=True, array_like=True, tag="n.orders"):
    """Answered by `Done`: rules of links made while the cluster runs, all there are. Those of a
    lower `number` than are known already are not taken."""

    number: Annotated[int, Meta(ge=0)] = 0
    rules: Annotated[tuple[LinkRule, ...], Meta(max_length=RULES_MAX)] = ()


class GetLinks(msgspec.Struct, frozen=True, array_like=True, tag="n.links"):
    """Answered by `Links`."""


class LinkTally(msgspec.Struct, frozen=True):
    """What became of frames that this node sent, or did not take, under one rule."""

    rule: LinkRule
    ordered: bool  # while the cluster runs; else of its file
    place: int  # among the rules of its kind
    sent: int = 0
    delayed: int = 0
    lost: int = 0
    reordered: int = 0
    cut: int = 0


class Links(msgspec.Struct, frozen=True, array_like=True, tag="n.linkinfo"):
    alias: str
    number: int  # of the orders it has
    tallies: tuple[LinkTally, ...]


class SkewClock(msgspec.Struct, frozen=True, array_like=True, tag="n.clock"):
    """Answered by `Done`: the node's clock goes ahead by `jump_ms` and then at `rate`."""

    jump_ms: Annotated[float, Meta(ge=0, le=JUMP_MS_MAX)] = 0.0
    rate: Annotated[float, Meta(ge=RATE_MIN, le=RATE_MAX)] = 1.0


class SetLabels(msgspec.Struct, frozen=True, array_like=True, tag="n.label"):
    """Answered by `NodeInfo`: the node has these labels as well, and none with a key of `taken`.
    It remembers that when it starts again."""

    given: Annotated[tuple[Label, ...], Meta(max_length=labels.LABELS_MAX)] = ()
    taken: Annotated[tuple[Label, ...], Meta(max_length=labels.LABELS_MAX)] = ()


class Done(msgspec.Struct, frozen=True, array_like=True, tag="n.done"):
    """It was done; `what` says what, for people."""

    what: str = ""


class Bye(msgspec.Struct, frozen=True, array_like=True, tag="n.bye"):
    """A client leaves; no answer."""


class Leaves(msgspec.Struct, frozen=True, array_like=True, tag="n.leaves"):
    """To each client of a node that leaves, unasked: it ends within a second, look for another."""


Message = (
    GetNode
    | NodeInfo
    | AllNodes
    | NodeList
    | GetInventory
    | InventoryText
    | AllJobs
    | JobsList
    | GetProcesses
    | AllProcesses
    | Processes
    | ReadLog
    | LogLines
    | SetLink
    | ClearLinks
    | SkewClock
    | SetLabels
    | LinkOrders
    | GetLinks
    | Links
    | Done
    | Bye
    | Leaves
)

# Every message type that may arrive at a node or a client: the one vocabulary of the bus.
VOCABULARY: Any = (
    hyperbus.Message
    | membership.Message
    | scheduler.Message
    | nexus.Message
    | nexus.Request
    | nexus.Answer
    | nexus.Changed
    | nexus.Listing
    | nexus.NexusInfo
    | observe.Message
    | Message
)
# Made once, in the zygote: 5 ms and half a megabyte that its children share.
DECODER: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(VOCABULARY)


# -- the supervisor and its nodes, over a socket pair ---------------------------------------------


class Ready(msgspec.Struct, frozen=True, array_like=True, tag="u.ready"):
    """The node serves; who it is, and the labels that it has."""

    kid: Kid
    boot: int
    alias: str
    labels: tuple[str, ...] = ()


class Alive(msgspec.Struct, frozen=True, array_like=True, tag="u.alive"):
    """How many members the node holds for alive, itself included."""

    count: int


class Agreed(msgspec.Struct, frozen=True, array_like=True, tag="u.agreed"):
    """The node knows who votes: the answer to `FirstVoters`."""


class ProcessEnded(msgspec.Struct, frozen=True, array_like=True, tag="u.ended"):
    """The supervisor saw that node's process end."""

    kid: Kid
    boot: int


class FirstVoters(msgspec.Struct, frozen=True, array_like=True, tag="u.voters"):
    """See to it that there are voters: these, where nobody has made any yet. `Agreed` follows."""

    voters: tuple[Kid, ...]


class Stop(msgspec.Struct, frozen=True, array_like=True, tag="u.stop"):
    """Leave the cluster in good order and end."""


class Drain(msgspec.Struct, frozen=True, array_like=True, tag="u.drain"):
    """Take on nothing more, hand over what is here, then leave and end; after `deadline_ms` leave
    in any case."""

    deadline_ms: Annotated[float, Meta(ge=0, le=3_600_000)]


class SettleVoters(msgspec.Struct, frozen=True, array_like=True, tag="u.settle"):
    """See to it that none of `leaving` votes, within `timeout_ms`. Answered by `VotersSettled`."""

    number: int
    leaving: tuple[Kid, ...]
    timeout_ms: float = 30_000.0


class VotersSettled(msgspec.Struct, frozen=True, array_like=True, tag="u.settled"):
    """`voters` vote; where not `ok`, `why` says what stands in the way."""

    number: int
    ok: bool
    voters: tuple[Kid, ...] = ()
    why: str = ""


class SetPace(msgspec.Struct, frozen=True, array_like=True, tag="u.pace"):
    """From now on workers have this share of a core, where no cgroup says it."""

    share: Annotated[float, Meta(gt=0, le=1)]


ToSupervisor = Ready | Alive | Agreed | VotersSettled
FromSupervisor = ProcessEnded | FirstVoters | LinkOrders | Stop | Drain | SettleVoters | SetPace
