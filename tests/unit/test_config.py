"""The configuration: what is accepted, what is refused and where, and what overrides what."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from manifold.kernel import config as configuration
from manifold.kernel.config import Config, MembershipConfig, NodeClass, SchedulerConfig, load
from manifold.kernel.config_document import table_text, yaml_text
from manifold.kernel.config_units import parse, show
from manifold.kernel.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def write(tmp_path: Path):
    def to_file(text: str | bytes) -> Path:
        path = tmp_path / "cluster.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return to_file


def refusal(path: Path, environ: dict[str, str] | None = None, **overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, environ or {}, overrides)
    return str(caught.value).replace(str(path), "FILE")


# --- what is accepted -------------------------------------------------------------------------


def test_the_packaged_file_has_sixteen_nodes_in_four_classes_and_equals_the_defaults() -> None:
    config = load(None, {})
    assert config == Config()
    assert len(config.spread(16)) == 16
    assert [each.name for each in config.classes] == ["server", "jetson", "rpi5", "rpi4"]


def test_the_packaged_file_is_what_the_metadata_writes() -> None:
    assert (ROOT / "manifold.yaml").read_text() == yaml_text(Config()), (
        "run: python -m manifold.kernel.config_document > manifold.yaml"
    )


def test_the_table_in_the_documents_is_what_the_metadata_writes() -> None:
    assert table_text() in (ROOT / "docs" / "configuration.md").read_text(), (
        "paste the output of: python -m manifold.kernel.config_document --table"
    )


def test_a_configuration_written_out_loads_to_an_equal_one(write) -> None:
    config = Config(
        cluster="lab-2",
        classes=(NodeClass("big", 3, 4, 0.75, 3 << 30, 2.5e9, 0.05, True), NodeClass("tiny")),
        scheduler=SchedulerConfig(grain_ms=1.5, silence_ms=12_345),
    )
    assert load(write(yaml_text(config)), {}) == config


def test_values_carry_units_of_time_size_and_rate(write) -> None:
    config = load(
        write(
            "classes:\n  box: {memory: 1.5GiB, bandwidth: 100Mbit/s, latency: 0.25ms}\n"
            "scheduler: {grain: 0.01 s, silence: 1min}\ntasks: {timeout: 2h}\n"
        ),
        {},
    )
    assert config.classes == (NodeClass("box", memory=3 << 29, bandwidth=1e8, latency=0.25),)
    assert (config.scheduler.grain_ms, config.scheduler.silence_ms) == (10.0, 60_000.0)
    assert config.tasks.timeout == 7_200_000.0


@pytest.mark.parametrize(
    "text, unit, value",
    [
        *[
            (f"3{unit}B", "bytes", 3 * 1024**i)
            for i, unit in enumerate(["", "Ki", "Mi", "Gi", "Ti"])
        ],
        *[(f"3{unit}bit/s", "bit/s", 3 * 1000.0**i) for i, unit in enumerate(["", "k", "M"])],
        ("3Gbit/s", "bit/s", 3e9),
        ("3Tbit/s", "bit/s", 3e12),
        ("3us", "ms", 0.003),
        ("3ms", "ms", 3.0),
        ("3s", "ms", 3e3),
        ("3min", "ms", 180e3),
        ("3h", "ms", 10.8e6),
        ("3d", "ms", 259.2e6),
    ],
)
def test_every_unit_is_worth_what_it_says(text: str, unit: str, value: float) -> None:
    assert parse(text, "float", unit) == value
    assert show(value, unit) == text


def test_a_section_whose_keys_are_commented_out_and_a_class_without_figures_are_fine(write) -> None:
    config = load(write("scheduler:\n  # grain: 1ms\nclasses:\n  box:\n  crate: {}\n"), {})
    assert config == Config(classes=(NodeClass("box"), NodeClass("crate")))


def test_a_quoted_value_with_a_unit_and_a_byte_order_mark_are_fine(write) -> None:
    assert load(write('\ufeffscheduler: {grain: "10ms"}'), {}).scheduler.grain_ms == 10


# --- what is refused, and where ---------------------------------------------------------------

REFUSED = {
    "an unknown key": (
        "scheduler:\n  graim: 20ms\n",
        "FILE:2:3: there is no key scheduler.graim. Did you mean grain?",
    ),
    "an unknown section": (
        "shceduler:\n  grain: 1ms\n",
        "FILE:1:1: there is no key shceduler. Did",
    ),
    "a key at the wrong level": (
        "grain: 20ms\n",
        "FILE:1:1: there is no key grain. Did you mean sc",
    ),
    "the field's name in the file": ("scheduler: {grain_ms: 20}", "FILE:1:13: there is no key"),
    "no unit": ("scheduler:\n  grain: 20\n", "FILE:2:10: scheduler.grain is '20' without a unit"),
    "a unit of another dimension": ("scheduler: {grain: 20MiB}", "has the unit 'MiB'; a time such"),
    "a decimal size": ("tasks: {memory: 512MB}", "did you mean MiB?"),
    "a byte rate": ("classes: {a: {bandwidth: 1gbps}}", "did you mean Gbit/s?"),
    "minutes as m": ("scheduler: {silence: 1m}", "did you mean min?"),
    "a unit on a count": ("geode: {sample: 3ms}", "geode.sample is '3ms'; a plain number"),
    "a fraction of a count": ("geode: {sample: 2.5}", "is '2.5'; a whole number of nodes"),
    "a fraction of a byte": ("tasks: {memory: 1000000.5B}", "a whole number of bytes"),
    "a quoted count": ('geode:\n  sample: "3"\n', "FILE:2:11: geode.sample is a text. Remove"),
    "a word for a number": ("geode: {sample: three}", "geode.sample is 'three'; a plain number"),
    "an octal-looking number": ("geode: {sample: 010}", "geode.sample is '010'"),
    "not a number": ("geode: {beta: .nan}", "geode.beta is '.nan'"),
    "infinity": ("geode: {beta: 1e400}", "geode.beta is inf; it must be 0 to 20"),
    "infinity for a count": ("geode: {sample: 1e400}", "a whole number"),
    "yes for true": ("classes: {a: {gpu: yes}}", "classes.a.gpu is 'yes'; true or false"),
    "below the range": (
        "scheduler:\n  grain: 0.5ms\n",
        "FILE:2:10: scheduler.grain is 500us; it must be 1ms to 10s, by default 20ms. Write at",
    ),
    "above the range": ("classes: {a: {cores: 1000}}", "classes.a.cores is 1000; it must be 1 to"),
    "negative": ("scheduler: {grain: -1ms}", "scheduler.grain is -1ms; it must be"),
    "another word": ("geode: {metric: seeds}", "must be one of geode, seed. Did you mean seed?"),
    "a bad name": ("cluster: My Cluster\n", "FILE:1:10: cluster is 'My Cluster'; a name has 1 to"),
    "a long name": (f"cluster: {'a' * 33}", "a name has 1 to 32 characters"),
    "a bad class name": ("classes:\n  Rpi_4: {}\n", "FILE:2:3: the name of a class is 'Rpi_4'"),
    "a class's name inside it": ("classes: {a: {name: b}}", "there is no key classes.a.name"),
    "the same key twice": (
        "scheduler: {grain: 1ms, grain: 2ms}",
        "FILE:1:25: the key 'grain' stands twice.",
    ),
    "the same section twice": ("geode: {}\ngeode: {}\n", "FILE:2:1: the key 'geode' stands twice."),
    "the same class twice": (
        "classes:\n  rpi4: {count: 1}\n  rpi4: {count: 2}\n",
        "FILE:3:3: the class 'rpi4' stands twice.",
    ),
    "no node at all": ("classes: {a: {count: 0}}", "FILE:1:14: classes: the counts add up to 0"),
    "too many nodes": ("classes: {a: {count: 4096}, b: {}}", "add up to 4097, not 1 to 4096"),
    "no value": ("scheduler:\n  grain:\n", "scheduler.grain has no value."),
    "a null": ("cluster: ~", "cluster has no value."),
    "no classes": ("classes:\n", "classes has no value"),
    "an empty table": ("classes: {}\n", "FILE:1:11: classes has no rows."),
    "a value for a section": ("scheduler: 20ms", "scheduler takes keys, not the value '20ms'."),
    "a value for a class": ("classes: {a: 4}", "classes.a takes keys, such as `count: 4`."),
    "keys for a value": ("scheduler: {grain: {ms: 20}}", "scheduler.grain takes one value"),
    "a list of classes": ("classes:\n- name: a\n", "classes takes no list"),
    "a list": ("- a\n", "FILE:1:1: the file takes no list"),
    "a bare word": ("hello", "FILE:1:1: keys are wanted here"),
    "a key that is no word": ("{a: b}: c", "FILE:1:1: a key must be a word."),
    "a key in a section that is no word": ("scheduler: {? {a: b} : c}", "a key must be a word."),
    "a list as a key": ("? [a]\n: b\n", "takes no list"),
    "an anchor": ("scheduler: &a {grain: 1ms}", "FILE:1:12: anchors and aliases are not used"),
    "an alias": ("cluster: *a", "FILE:1:10: anchors and aliases are not used here."),
    "a tag": ("cluster: !!python/object:os.system x", "FILE:1:10: the tag"),
    "a merge key": ("scheduler: {<<: {grain: 1ms}}", "there is no key scheduler.<<"),
    "a second document": ("cluster: a\n---\ncluster: b\n", "FILE:2:1: a second document begins."),
    "an empty file": ("", "FILE:1:1: the file is empty."),
    "only comments": ("# nothing\n", "the file is empty."),
    "an empty document": ("---\n...\n", "the file is empty."),
    "a tab": ("scheduler:\n\tgrain: 1ms\n", "FILE:2:1: a tab in the indentation. Use spaces."),
    "an open bracket": ("scheduler: {grain: 1ms\n", "not YAML:"),
    "bad indentation": ("cluster: a\n  b: c\n", "FILE:2:4: not YAML: mapping values"),
    "deep nesting": ("[" * 900, "FILE:1:1: the file takes no list"),
    # From 6.0.4 on PyYAML refuses this itself, where the nesting gets too deep.
    "nesting without end": ("[" * 100_000, "FILE:1:1"),
    "deep mappings": ("{a: " * 50_000, "FILE:1:2: there is no key a."),
    "a control character": ("cluster: a\x00b", "FILE:1:11: not YAML:"),
    "Latin-1": (b"cluster: a\ncluster: caf\xe9\n", "FILE:2:13: byte 0xe9 is not UTF-8."),
    "UTF-16": ("cluster: a".encode("utf-16"), "FILE:1:1: byte 0xff is not UTF-8."),
    "a huge file": (b"#" * (1 << 19), "FILE:1:1: the file is larger than"),
    "many classes": (
        "classes:\n" + "".join(f"  c{i}: {{count: 1}}\n" for i in range(65)),
        "FILE:66:3: there are more than 64 classes.",
    ),
    "a huge number": ("geode: {sample: " + "9" * 10_000 + "}", "is longer than 64 characters"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_document_is_refused_with_its_place_and_reason(case: str, write) -> None:
    text, expected = REFUSED[case]
    message = refusal(write(text))
    assert message.startswith("FILE:")
    assert expected in message


def test_a_file_that_is_not_there_or_is_a_folder_is_refused(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in refusal(tmp_path / "none.yaml")
    assert "cannot be read: Is a directory" in refusal(tmp_path)
    assert "cannot be read" in refusal(Path("a\0b"))


RELATIONS = [
    ("membership: {probe: 100ms}", "membership.ack is 500ms; it must be less than membership.pr"),
    ("membership: {push_pull: 200ms}", "membership.gossip is 200ms; it must be less than"),
    ("scheduler: {silence: 300ms}", "less than half of scheduler.silence, which makes 150ms"),
    ("scheduler: {grain: 5s}", "scheduler.grain is 5s; it must be less than scheduler.silence"),
    ("tasks: {slice: 200ms}", "tasks.slice is 200ms; it must be less than scheduler.progress"),
    ("tasks: {memory: 4GiB}", "tasks.memory is 4GiB; no class has more than 2GiB"),
    ("geode: {weight_compute: 0, weight_memory: 0, weight_bandwidth: 0}", "one of the three"),
]


@pytest.mark.parametrize("text, expected", RELATIONS)
def test_keys_that_do_not_fit_one_another_are_refused_where_one_was_written(
    text: str, expected: str, write
) -> None:
    message = refusal(write("cluster: a\n" + text))
    assert message.startswith("FILE:2:")
    assert expected in message


def test_two_reports_fit_exactly_into_the_silence(write) -> None:
    config = load(write("scheduler: {silence: 400ms, progress: 200ms}"), {})
    assert config.scheduler.silence_ms == 400


def test_a_config_cannot_be_made_by_hand_that_the_loader_would_refuse() -> None:
    with pytest.raises(ConfigError, match=r"membership\.ack"):
        Config(membership=MembershipConfig(probe_ms=100))
    with pytest.raises(ConfigError, match=r"classes\.a\.cores is 0"):
        Config(classes=(NodeClass("a", cores=0),))
    with pytest.raises(ConfigError, match="same name"):
        Config(classes=(NodeClass("a"), NodeClass("a")))


# --- variables and flags ----------------------------------------------------------------------


def test_flags_beat_variables_and_variables_beat_the_file(write) -> None:
    path = write("scheduler: {grain: 10ms, backlog: 10ms, jobs: 10}")
    environ = {"MANIFOLD_SCHEDULER_BACKLOG": "20ms", "MANIFOLD_SCHEDULER_JOBS": "20"}
    scheduler = load(path, environ, {"scheduler.jobs": "30"}).scheduler
    assert (scheduler.grain_ms, scheduler.backlog_ms, scheduler.jobs) == (10, 20, 30)


def test_the_name_with_the_unit_takes_a_plain_number(write) -> None:
    path = write("cluster: a")
    assert load(path, {"MANIFOLD_SCHEDULER_GRAIN_MS": "7"}).scheduler.grain_ms == 7
    assert load(path, {}, {"scheduler.grain_ms": "7.5"}).scheduler.grain_ms == 7.5
    assert "the unit is already in the name" in refusal(path, **{"scheduler.grain_ms": "7ms"})


def test_a_class_can_be_changed_by_a_flag_and_by_a_variable(write) -> None:
    path = write("classes: {rpi4: {count: 2}, gpu-box: {}}")
    config = load(path, {"MANIFOLD_CLASSES_GPU_BOX_CORES": "4"}, {"classes.rpi4.count": "3"})
    assert config.classes == (NodeClass("rpi4", count=3), NodeClass("gpu-box", cores=4))
    packaged = load(None, {"MANIFOLD_CLASSES_RPI4_COUNT": "1"})
    assert [each.count for each in packaged.classes] == [2, 2, 4, 1]
    without = load(write("cluster: a"), {}, {"classes.rpi4.count": "1"})
    assert [each.count for each in without.classes] == [2, 2, 4, 1]


def test_a_misspelt_variable_or_flag_is_refused_with_the_nearest() -> None:
    for name in ("MANIFOLD_SCHEDULER_GRIAN", "MANIFOLD_SHEDULER_GRAIN", "MANIFOLD_SCHEDULER_X"):
        with pytest.raises(ConfigError, match=f"variable {name}: there is no such key"):
            load(None, {name: "1ms"})
    with pytest.raises(ConfigError, match=r"Did you mean scheduler\.grain\?"):
        load(None, {}, {"scheduler.grian": "1ms"})
    with pytest.raises(ConfigError, match="given twice"):
        load(None, {}, {"scheduler.grain": "1ms", "scheduler.grain_ms": "1"})


def test_a_bad_value_of_a_variable_names_the_variable() -> None:
    with pytest.raises(ConfigError, match=r"variable MANIFOLD_SCHEDULER_GRAIN: scheduler\.grain"):
        load(None, {"MANIFOLD_SCHEDULER_GRAIN": "20"})
    with pytest.raises(ConfigError, match=r"^variable MANIFOLD_MEMBERSHIP_PROBE: membership\.ack"):
        load(None, {"MANIFOLD_MEMBERSHIP_PROBE": "100ms"})


def test_variables_that_are_no_keys_are_left_alone() -> None:
    others = dict.fromkeys(configuration.NOT_KEYS, "anything") | {"MANIFOLD_ZZZ": "1", "PATH": "x"}
    assert load(None, others) == Config()


# --- spreading and carrying -------------------------------------------------------------------


def test_nodes_spread_by_largest_remainder() -> None:
    config = Config(classes=(NodeClass("a", count=5), NodeClass("b", count=3), NodeClass("c")))
    # Quotas of 4: 2.22, 1.33, 0.44: the fourth node goes to the largest remainder, c.
    assert [alias for alias, _ in config.spread(4)] == ["a-01", "a-02", "b-01", "c-01"]
    assert [alias for alias, _ in config.spread(1)] == ["a-01"]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 100, 1000, 4096])
def test_every_spread_has_n_nodes_of_distinct_aliases_within_one_of_its_quota(n: int) -> None:
    config = Config()
    nodes = config.spread(n)
    assert len({alias for alias, _ in nodes}) == n
    for each in config.classes:
        got = sum(1 for _, kind in nodes if kind is each)
        assert abs(got - n * each.count / config.nodes) < 1


def test_a_class_without_nodes_gets_none_and_an_absurd_number_is_refused() -> None:
    config = Config(classes=(NodeClass("a", count=0), NodeClass("b", count=2)))
    assert {kind.name for _, kind in config.spread(7)} == {"b"}
    for n in (0, -1, 4097):
        with pytest.raises(ConfigError, match="nodes are wanted"):
            config.spread(n)


def test_a_config_travels_as_msgpack_and_damage_is_refused() -> None:
    config = Config(classes=(NodeClass("a", gpu=True),), cluster="x")
    assert configuration.decode(configuration.encode(config)) == config
    assert msgspec.convert(config.to_dict(), Config) == config
    for damaged in (b"", configuration.encode(config)[:-3], msgspec.msgpack.encode({"geode": 1})):
        with pytest.raises(ConfigError, match="damaged"):
            configuration.decode(damaged)
    bad = config.to_dict() | {"scheduler": {"grain_ms": -1}}
    with pytest.raises(ConfigError, match="damaged"):
        configuration.decode(msgspec.msgpack.encode(bad))


def test_importing_the_configuration_is_light() -> None:
    code = "import sys; import manifold.kernel.config; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()
    assert not {"numpy", "yaml", "psutil", "wasmtime", "cryptography", "asyncio"} & set(loaded)
