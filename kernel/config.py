"""The configuration of a cluster: frozen dataclasses, one per subsystem.

Interface: `load(path, environ, overrides) -> Config` reads `manifold.yaml` (the packaged one where
`path` is None); every key is a field here, with its unit, default and range in the field's
metadata, and nothing else is accepted. Later wins: defaults, the file, `MANIFOLD_…` variables,
overrides (flags). `Config.spread` names the nodes; `encode` and `decode` carry a `Config` to
another process. `runtime_dir` and `state_dir` are the places the environment configures.
`config_loader` says how values are written, docs/configuration.md lists them.
Invariants: C1 a `Config` that exists has passed every range check and every relation below.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from manifold.kernel import config_loader as loader
from manifold.kernel import config_reader as reader
from manifold.kernel import labels as labelling
from manifold.kernel.config_units import show
from manifold.kernel.errors import ConfigError
from manifold.kernel.limits import CLASS_NAME_CHARS_MAX, CLUSTER_NAME_CHARS_MAX, NODES_MAX
from manifold.kernel.places import check_private as check_private  # for shells: finding a cluster
from manifold.kernel.places import ipc_path as ipc_path
from manifold.kernel.places import runtime_dir as runtime_dir
from manifold.kernel.places import runtime_path as runtime_path
from manifold.kernel.places import state_dir as state_dir

SIDES_CHARS_MAX = 8192  # 256 aliases of 29 characters with their commas
DEFAULT_FILE = "manifold.yaml"
PACKAGED = Path(__file__).parents[1] / DEFAULT_FILE  # importlib.resources would cost 12 ms
PROFILES = ("edge", "lab", "datacenter")  # packaged files with classes and links of a kind
VARIABLE_PREFIX = "MANIFOLD_"
NO_OVERRIDES: Mapping[str, str] = MappingProxyType({})

# Variables that are read elsewhere and are no keys; a key may not take one of these names.
NOT_KEYS = frozenset(
    {
        "MANIFOLD_CLUSTER",  # which cluster a command talks to
        "MANIFOLD_RUNTIME_DIR",  # where sockets live
        "MANIFOLD_STATE_HOME",  # where identities and records live
    }
)


def _key(
    default: Any, unit: str, low: float | None, high: float | None, doc: str, **more: Any
) -> Any:
    return field(
        default=default, metadata={"unit": unit, "low": low, "high": high, "doc": doc, **more}
    )


@dataclass(frozen=True, slots=True)
class NodeClass:
    """A kind of machine. In the emulator these figures are enforced, on a board measured."""

    name: str = _key(
        "node",
        "",
        None,
        None,
        "name of the class; aliases are NAME-NN",
        name_chars_max=CLASS_NAME_CHARS_MAX,
    )
    count: int = _key(1, "nodes", 0, 4096, "nodes of this class; with --nodes N, its part of N")
    cores: int = _key(1, "cores", 1, 256, "workers, one process each")
    compute: float = _key(1.0, "core", 0.01, 1.0, "share of one host core that a worker gets")
    memory: int = _key(
        1 << 30,
        "bytes",
        1 << 26,
        1 << 44,
        "memory of the node; its tasks together may hold so much",
    )
    bandwidth: float = _key(1e9, "bit/s", 1e3, 1e12, "bandwidth of its network link")
    latency: float = _key(0.2, "ms", 0.0, 10_000.0, "one-way latency of its network link")
    gpu: bool = _key(False, "", None, None, "whether it has a GPU")
    labels: str = _key(
        "", "", None, None, "its labels; of several values `[a, b]` its nodes take turns",
        layout=True, chars_max=labelling.LAYOUT_CHARS_MAX,
    )  # fmt: skip

    def labels_of(self, number: int) -> tuple[str, ...]:
        """The labels of its node `number`, from 1 on."""
        return labelling.of_node(labelling.read_layout(self.labels), number)


@dataclass(frozen=True, slots=True)
class MembershipConfig:
    """SWIM + Lifeguard; defaults are memberlist's LAN profile (design page of membership)."""

    probe_ms: float = _key(1000.0, "ms", 20, 60_000, "probe interval")
    ack_ms: float = _key(500.0, "ms", 10, 30_000, "time a direct probe may take")
    indirect: int = _key(3, "nodes", 0, 16, "how many peers probe indirectly")
    suspicion_factor: float = _key(4.0, "", 1, 20, "min = factor * max(1, log10 N) * probe")
    suspicion_max_factor: float = _key(6.0, "", 1, 20, "max = this * min")
    confirmations: int = _key(2, "nodes", 0, 10, "independent suspicions that shorten it to min")
    gossip_ms: float = _key(200.0, "ms", 5, 10_000, "gossip interval while there is news")
    gossip_nodes: int = _key(3, "nodes", 1, 16, "peers gossiped to each interval")
    retransmit_factor: int = _key(4, "", 1, 10, "each update is sent factor*ceil(log10(N+1)) times")
    push_pull_ms: float = _key(30_000.0, "ms", 100, 600_000, "full state exchange interval")
    dead_gossip_ms: float = _key(30_000.0, "ms", 0, 600_000, "how long the dead are still told")
    lag_ms: float = _key(200.0, "ms", 10, 10_000, "own event-loop lag above which none is accused")


@dataclass(frozen=True, slots=True)
class GeodeConfig:
    """Where work goes (design page of geode)."""

    metric: str = _key(
        "geode",
        "",
        None,
        None,
        "predicted finish, or the seed's formula",
        choices=("geode", "seed"),
    )
    beta: float = _key(1.0, "", 0, 20, "weight of geometric shortfall in predicted cost")
    sample: int = _key(3, "nodes", 1, 64, "candidates sampled for a single task (d)")
    weight_compute: float = _key(1.0, "", 0, 100, "weight of the compute axis")
    weight_memory: float = _key(0.5, "", 0, 100, "weight of the memory axis")
    weight_bandwidth: float = _key(0.5, "", 0, 100, "weight of the bandwidth axis")
    rate_alpha: float = _key(0.3, "", 0.01, 1, "EWMA weight of a newly observed rate")
    rate_samples: int = _key(5, "samples", 1, 1000, "observations before a learned rate is used")
    stale_ms: float = _key(2000.0, "ms", 10, 600_000, "age constant towards the class mean")
    full_view: int = _key(256, "nodes", 2, 100_000, "above this, route over links")
    near_links: int = _key(8, "links", 1, 64, "links to the geometrically nearest")
    far_links: int = _key(8, "links", 0, 64, "long links, probability 1/rank")
    hops: int = _key(6, "hops", 1, 64, "most forwardings of one task")
    hop_gain: float = _key(0.05, "", 0, 1, "part of the cost that a hop must save")
    decisions: int = _key(10_000, "decisions", 10, 1_000_000, "ring of decisions kept for `why`")


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """What runs next (design page of the scheduler)."""

    grain_ms: float = _key(20.0, "ms", 1, 10_000, "least work worth sending elsewhere")
    silence_ms: float = _key(2000.0, "ms", 100, 600_000, "an assignee silent this long loses it")
    progress_ms: float = _key(200.0, "ms", 10, 10_000, "how often an assignee reports")
    backlog_ms: float = _key(200.0, "ms", 1, 60_000, "work admitted beyond the free slots")
    queue: int = _key(1024, "shards", 1, 1_000_000, "shards waiting per job")
    jobs: int = _key(4096, "jobs", 1, 1_000_000, "jobs a node owns at once; more is BUSY")
    retain_ms: float = _key(600_000.0, "ms", 0, 86_400_000, "how long an ended job is remembered")
    attempts: int = _key(20, "attempts", 1, 1000, "attempts of a shard before the job fails")


@dataclass(frozen=True, slots=True)
class TaskConfig:
    """Limits of user programs."""

    memory: int = _key(1 << 28, "bytes", 1 << 20, 1 << 40, "linear memory of one program")
    slice_ms: float = _key(5.0, "ms", 1, 1000, "gas between two looks at cancel and shrink")
    grace_ms: float = _key(500.0, "ms", 10, 60_000, "a worker that ignores cancel is killed after")
    timeout: float = _key(0.0, "ms", 0, 3.1536e10, "wall-clock limit of a job; 0 is none")
    python: str = _key(
        "on", "", None, None, "whether clients may run Python functions", choices=("on", "off")
    )


@dataclass(frozen=True, slots=True)
class NexusConfig:
    """Agreement (design page of nexus)."""

    voters: str = _key(
        "auto",
        "",
        None,
        None,
        "first voters of an emulated cluster; auto: 3 of up to 8 nodes, 5 of more",
        choices=("auto", "off", "1", "3", "5", "7"),
    )
    disk: str = _key(
        "plain",
        "",
        None,
        None,
        "losing: for tests, a killed node forgets what it had not synced",
        choices=("plain", "losing"),
    )


@dataclass(frozen=True, slots=True)
class MetricsConfig:
    """What a node tells of itself (docs/observability.md)."""

    http: str = _key(
        "on", "", None, None, "whether each node serves /metrics on 127.0.0.1",
        choices=("on", "off"),
    )  # fmt: skip
    port: int = _key(0, "", 0, 65_535, "0: any free port; else the first free one from it on")


@dataclass(frozen=True, slots=True)
class LinkRow:
    """A link between nodes, slower or worse than the host's own (docs/links.md).

    A side is an alias, a class, a label such as `site=a`, or `*`; or several with commas between.
    """

    between: str = _key(
        "",
        "",
        None,
        None,
        "two sides, `[one, other]`: both ways",
        pair=True,
        chars_max=SIDES_CHARS_MAX,
    )
    source: str = _key(
        "",
        "",
        None,
        None,
        "or the side that sends: one way",
        name="from",
        chars_max=SIDES_CHARS_MAX,
    )
    target: str = _key(
        "", "", None, None, "and the side that receives", name="to", chars_max=SIDES_CHARS_MAX
    )
    latency_ms: float = _key(0.0, "ms", 0.0, 60_000.0, "one way")
    jitter_ms: float = _key(0.0, "ms", 0.0, 60_000.0, "up to so much more or less")
    rate: float = _key(0.0, "bit/s", 0.0, 1e12, "of each direction; 0bit/s: no limit")
    loss: float = _key(0.0, "", 0.0, 1.0, "probability that a frame is lost")
    reorder: float = _key(0.0, "", 0.0, 1.0, "probability that a frame overtakes others")
    cut: bool = _key(False, "", None, None, "nothing passes")

    @property
    def one_way(self) -> bool:
        return not self.between

    @property
    def sides(self) -> tuple[str, str]:
        if not self.between:
            return self.source, self.target
        one, _, other = self.between.partition(" ")
        return one, other


@dataclass(frozen=True, slots=True)
class LinksConfig:
    """Links between emulated nodes (docs/links.md); of several rules that fit, the last holds."""

    classes: str = _key(
        "off", "", None, None, "whether links have the latency and bandwidth of their classes",
        choices=("on", "off"),
    )  # fmt: skip
    rules: tuple[LinkRow, ...] = ()


# Sixteen nodes in four classes. A worker's share of a host core follows the boards' single-core
# speed against a small server's (Geekbench 6, rounded); bandwidths and latencies are those of
# a wired switch, and of wifi-class links for the Pi 4. Emulated memory is not taken until used.
DEFAULT_CLASSES = (
    NodeClass("server", 2, 2, 1.0, 2 << 30, 1e9, 0.2, False),
    NodeClass("jetson", 2, 2, 0.6, 1 << 30, 1e9, 0.3, True),
    NodeClass("rpi5", 4, 1, 0.5, 1 << 30, 1e9, 0.3, False),
    NodeClass("rpi4", 8, 1, 0.25, 512 << 20, 1e8, 1.0, False),
)


@dataclass(frozen=True, slots=True)
class Config:
    """A whole cluster."""

    cluster: str = _key(
        "default", "", None, None, "name of the cluster", name_chars_max=CLUSTER_NAME_CHARS_MAX
    )
    profile: str = _key(
        "none", "", None, None, "classes and links of a kind, instead of those here",
        choices=("none", *PROFILES),
    )  # fmt: skip
    classes: tuple[NodeClass, ...] = DEFAULT_CLASSES
    membership: MembershipConfig = MembershipConfig()
    geode: GeodeConfig = GeodeConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    tasks: TaskConfig = TaskConfig()
    nexus: NexusConfig = NexusConfig()
    metrics: MetricsConfig = MetricsConfig()
    links: LinksConfig = LinksConfig()

    def __post_init__(self) -> None:
        _check_ranges(self, "")
        for row in self.classes:
            _check_ranges(row, f"classes.{row.name}.")
        for number, link in enumerate(self.links.rules):
            _check_ranges(link, f"links.rules.{number}.")
        for keys, reason in broken_relations(self):
            raise BrokenRelation(keys, reason)

    @property
    def nodes(self) -> int:
        """How many nodes there are when nobody says otherwise."""
        return sum(each.count for each in self.classes)

    def spread(self, n: int | None = None) -> list[tuple[str, NodeClass]]:
        """Alias and class of `n` nodes, by largest remainder of the classes' counts.

        Equal remainders go to the class that stands first, so `spread` is a function of `n`.
        """
        n = self.nodes if n is None else n
        if not 1 <= n <= NODES_MAX:
            raise ConfigError(f"{n} nodes are wanted; 1 to {NODES_MAX} are possible.")
        shares = [divmod(each.count * n, self.nodes) for each in self.classes]
        left = n - sum(whole for whole, _ in shares)
        by_remainder = sorted(range(len(shares)), key=lambda i: (-shares[i][1], i))
        extra = set(by_remainder[:left])
        return [
            (f"{each.name}-{number:02d}", each)
            for i, each in enumerate(self.classes)
            for number in range(1, shares[i][0] + (i in extra) + 1)
        ]

    def labels_of(self, alias: str) -> tuple[str, ...]:
        """The labels that a node of this name is given; none where it is of no class of ours."""
        name, _, number = alias.rpartition("-")
        kind = next((each for each in self.classes if each.name == name), None)
        if kind is None or not number.isdigit():
            return ()
        return kind.labels_of(int(number))

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and lists, in base units (ms, bytes, bit/s), for `--json`."""
        plain = asdict(self)
        return plain | {"classes": list(plain["classes"])}


SCHEMA = loader.Schema(
    root=Config,
    sections={
        "membership": MembershipConfig,
        "geode": GeodeConfig,
        "scheduler": SchedulerConfig,
        "tasks": TaskConfig,
        "nexus": NexusConfig,
        "metrics": MetricsConfig,
        "links": LinksConfig,
    },
    tables={"classes": NodeClass},
    lists={("links", "rules"): LinkRow},
)


class BrokenRelation(ConfigError):
    """Each key is in its range, but they do not fit one another; `keys` are the dotted names."""

    def __init__(self, keys: tuple[str, ...], reason: str) -> None:
        super().__init__(reason)
        self.keys = keys


def broken_relations(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """The keys and the reason of every relation that does not hold."""
    membership, scheduler, tasks = config.membership, config.scheduler, config.tasks
    relations = [
        _less("membership.ack", membership.ack_ms, "membership.probe", membership.probe_ms,
              "else a probe is overtaken by the next"),
        _less("membership.gossip", membership.gossip_ms, "membership.push_pull",
              membership.push_pull_ms, "else whole states travel where news would do"),
        _less("scheduler.progress", scheduler.progress_ms, "scheduler.silence",
              scheduler.silence_ms / 2, "of two reports one may be lost", "half of "),
        _less("scheduler.grain", scheduler.grain_ms, "scheduler.silence", scheduler.silence_ms,
              "else an assignee is given up within its first grain"),
        _less("tasks.slice", tasks.slice_ms, "scheduler.progress", scheduler.progress_ms,
              "progress is seen only between slices"),
    ]  # fmt: skip
    yield from (each for each in relations if each)
    names = [each.name for each in config.classes]
    given = [f"{k}={v}" for k, v in _label_values(config.classes)]
    if len(set(names)) < len(names):
        yield ("classes",), "classes: two have the same name."
    if not 1 <= config.nodes <= NODES_MAX:
        yield ("classes",), f"classes: the counts add up to {config.nodes}, not 1 to {NODES_MAX}."
        return
    if tasks.memory > (most := max(each.memory for each in config.classes if each.count)):
        yield (
            ("tasks.memory", "classes"),
            f"tasks.memory is {show(tasks.memory, 'bytes')}; no class has more than "
            f"{show(most, 'bytes')}, so that no program could run.",
        )
    counts = {each.name: each.count for each in config.classes}
    for at, row in enumerate(config.links.rules):
        if wrong := _broken_link(row, counts, given):
            yield (f"links.rules.{at}",), f"links.rules.{at} {wrong}"
    geode = config.geode
    if geode.weight_compute + geode.weight_memory + geode.weight_bandwidth == 0:
        yield ("geode.weight_compute",), "geode: one of the three weights must be above 0."


def _label_values(classes: tuple[NodeClass, ...]) -> Iterator[tuple[str, str]]:
    """Every label with a value that a node of the configuration may be given."""
    for each in classes:
        for key, values in labelling.read_layout(each.labels):
            yield from ((key, value) for value in values)


def _broken_link(row: LinkRow, counts: Mapping[str, int], given: Sequence[str]) -> str:
    """What is wrong with the sides of a rule, or ""."""
    if row.between and (row.source or row.target):
        return "has `between` and `from` or `to`: it is either both ways or one way."
    if not all(row.sides):
        return "wants two sides: `between: [one, other]`, or `from: one, to: other`."
    for name in ",".join(row.sides).split(","):
        kind = name.rpartition("-")[0]
        known = [f"{kind}-{each:02d}" for each in range(1, counts.get(kind, 0) + 1)]
        if "=" in name and name not in given:
            near = loader.nearest(name, given)
            return f"names {name[:60]!r}, a label that no class has. {near}".rstrip()
        if name not in ("*", *counts, *known, *given):
            near = loader.nearest(name, [*counts, *known])
            return f"names {name[:60]!r}, which is no node, no class and not `*`. {near}".rstrip()
    return ""


def _less(
    small: str, low_ms: float, large: str, high_ms: float, why: str, part: str = ""
) -> tuple[tuple[str, ...], str] | None:
    if low_ms < high_ms or (part and low_ms == high_ms):
        return None
    return (small, large), (
        f"{small} is {show(low_ms, 'ms')}; it must be less than {part}{large}, which makes "
        f"{show(high_ms, 'ms')}: {why}."
    )


def _check_ranges(table: Any, prefix: str) -> None:
    made_by: type = type(table)
    for key in loader.keys_of(made_by).values():
        loader.check(key, getattr(table, key.field), prefix + key.name)
    for each in fields(table):
        if is_dataclass(value := getattr(table, each.name)):
            _check_ranges(value, f"{each.name}.")


def load(
    path: Path | None, environ: Mapping[str, str], overrides: Mapping[str, str] = NO_OVERRIDES
) -> Config:
    """The configuration in `path`, or the packaged default; raises `ConfigError` alone."""
    file = DEFAULT_FILE if path is None else str(path)
    written = _profiled(reader.document(SCHEMA, _read(path), file), environ, overrides)
    names = {"classes": [key[1] for key in written if len(key) == 2]}
    if not names["classes"]:
        written |= _written_classes(file)
        names = {"classes": [each.name for each in DEFAULT_CLASSES]}
    written |= loader.from_environ(SCHEMA, environ, names, VARIABLE_PREFIX, NOT_KEYS)
    written |= loader.from_overrides(SCHEMA, overrides, names)
    arguments = loader.build(SCHEMA, written, file)
    try:
        return Config(**arguments)
    except BrokenRelation as broken:
        place = _place(broken.keys, written) or f"{file}:1:1"
        raise ConfigError(f"{place}: {broken.message}", broken.next_step) from None


def profile_path(name: str) -> Path:
    """The packaged file of a profile."""
    return PACKAGED.parent / "profiles" / f"{name}.yaml"


def _profiled(
    written: dict[loader.KeyPath, loader.Written],
    environ: Mapping[str, str],
    overrides: Mapping[str, str],
) -> dict[loader.KeyPath, loader.Written]:
    """With the classes and links of the profile that is named: before those of the file where a
    flag or a variable names it; where the file does, its own go before them."""
    named = overrides.get("profile") or environ.get(f"{VARIABLE_PREFIX}PROFILE", "")
    by_file = written.get(("profile",))
    name = named.strip() or (by_file.text if by_file is not None else "")
    if name not in PROFILES:
        return written  # "none", or what `build` refuses
    path = profile_path(name)
    packaged = reader.document(SCHEMA, _read(path), f"{path.parent.name}/{path.name}")
    return _laid_over(written, packaged) if named else _laid_over(packaged, written)


def _laid_over(
    low: dict[loader.KeyPath, loader.Written], high: dict[loader.KeyPath, loader.Written]
) -> dict[loader.KeyPath, loader.Written]:
    """A table or a list of `high` takes the whole place of that of `low`."""
    whole = {path[:1] for path in high if path[0] in SCHEMA.tables}
    whole |= {path[:2] for path in high if path[:2] in SCHEMA.lists}
    kept = {p: v for p, v in low.items() if p[:1] not in whole and p[:2] not in whole}
    return kept | high


def encode(config: Config) -> bytes:
    """`config` for another process of ours."""
    import msgspec

    return msgspec.msgpack.encode(config)


def decode(data: bytes) -> Config:
    """What `encode` made; a `ConfigError` where it is not."""
    import msgspec

    try:
        return msgspec.msgpack.decode(data, type=Config)
    except (msgspec.MsgspecError, ConfigError) as fault:
        raise ConfigError(f"An encoded configuration is damaged: {fault}.") from None


def _read(path: Path | None) -> bytes:
    most = loader.DOCUMENT_BYTES_MAX + 1
    try:
        with (path or PACKAGED).open("rb") as file:
            return file.read(most)
    except (OSError, ValueError) as fault:  # ValueError: a NUL in the path
        reason = getattr(fault, "strerror", None) or str(fault)
        raise ConfigError(
            f"{path}:1:1: cannot be read: {reason}.", "Check the path given with --config."
        ) from None


def _written_classes(file: str) -> dict[loader.KeyPath, loader.Written]:
    """The default classes as if the file had them, so that variables and flags can change them."""
    return {
        ("classes", row.name, name): loader.Written(
            show(getattr(row, key.field), key.unit), f"{file}:1:1"
        )
        for row in DEFAULT_CLASSES
        for name, key in loader.keys_of(NodeClass).items()
        if name != "name"
    }


def _place(keys: tuple[str, ...], written: Mapping[loader.KeyPath, loader.Written]) -> str:
    """Where the first of `keys` that somebody wrote stands, in the latest source."""
    found = [
        value
        for key in keys
        for path, value in written.items()
        if ".".join(path) == key or path[0] == key
    ]
    return max(found, key=lambda each: each.source).where if found else ""
