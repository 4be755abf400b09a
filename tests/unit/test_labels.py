"""Labels of nodes: what is accepted, where it is refused, and what is met by which node."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifold.kernel import labels
from manifold.kernel.config import Config, NodeClass, decode, encode, load
from manifold.kernel.config_document import yaml_text
from manifold.kernel.errors import ConfigError, Refused
from manifold.kernel.limits import ALIAS_CHARS_MAX, CLASS_NAME_CHARS_MAX, IPC_PATH_BYTES_MAX
from manifold.kernel.membership.messages import META_BYTES_MAX, Me, Meta
from manifold.vm.kid import kid_of

Write = Callable[[str], Path]
keys = st.from_regex(r"[a-z0-9](?:[a-z0-9._-]{0,30}[a-z0-9])?", fullmatch=True).filter(
    lambda key: key not in labels.FACTS
)
values = st.from_regex(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,6}[A-Za-z0-9])?", fullmatch=True)
layouts = st.dictionaries(keys, st.lists(values, max_size=4), max_size=6).map(
    lambda rows: ",".join(f"{k}={'/'.join(v)}" if v else k for k, v in rows.items())
)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_file(text: str) -> Path:
        path = tmp_path / "cluster.yaml"
        path.write_text(text)
        return path

    return to_file


def test_a_class_has_labels_and_its_nodes_take_turns_at_several_values(write: Write) -> None:
    config = load(
        write("""\
classes:
  pi: {count: 4, labels: {site: lab, rack: [r1, r2, r3], ssd}}
  hub:
    labels:
      site: office
"""),
        {},
    )
    assert [config.labels_of(alias) for alias, _ in config.spread()] == [
        ("rack=r1", "site=lab", "ssd"),
        ("rack=r2", "site=lab", "ssd"),
        ("rack=r3", "site=lab", "ssd"),
        ("rack=r1", "site=lab", "ssd"),
        ("site=office",),
    ]
    assert config.labels_of("other-01") == config.labels_of("pi") == ()
    assert decode(encode(config)) == config


def test_a_flag_and_a_variable_give_them_as_one_text() -> None:
    text = "site=a/b,ssd"
    by_flag = load(None, {}, {"classes.rpi5.labels": text})
    by_variable = load(None, {"MANIFOLD_CLASSES_RPI5_LABELS": text})
    assert by_flag == by_variable
    assert by_flag.labels_of("rpi5-02") == ("site=b", "ssd")


@pytest.mark.parametrize(
    ("text", "place", "why"),
    [
        ("[site]", "2:16", "takes keys with values, such as `{site: lab, rack: [r1, r2]}`."),
        ("site=a", "2:16", "takes keys with values, such as"),
        ("{Site: a}", "2:17", "the label 'Site' has a wrong key"),
        ("{site: a b}", "2:23", "the label 'site=a b' has a wrong value"),
        ("{site: a/b}", "2:23", "the label 'site=a/b' has a wrong value"),
        ("{site: {a: b}}", "2:23", "has a word, or a list of words, as its value"),
        ("{site: [a, [b]]}", "2:27", "has a word, or a list of words, as its value"),
        ("{site: []}", "2:24", "the label site has no value"),
        ("{site: a, site: b}", "2:26", "the label site stands twice"),
        ("{gpu}", "2:17", "gpu is no label to give: every node tells it of itself."),
        ("{site: &x a}", "2:23", "anchors and aliases are not used here"),
        ("{" + ", ".join(f"k{n}" for n in range(17)) + "}", "2:87", "at most 16 labels"),
        ("{" + ", ".join(f"k{n}: {'v' * 32}" for n in range(8)) + "}", "2:16",
         "the labels of one node take 288 bytes, of at most 256."),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_where_it_stands(
    text: str, place: str, why: str, write: Write
) -> None:
    with pytest.raises(ConfigError) as refused:
        load(write(f"classes:\n  pi: {{labels: {text}}}\n"), {})
    assert f"cluster.yaml:{place}: " in str(refused.value)
    assert why in str(refused.value)


@given(layouts)
def test_labels_written_out_load_to_equal_ones(tmp_path_factory, layout: str) -> None:
    try:
        config = Config(classes=(NodeClass("pi", labels=layout),))
    except ConfigError as refused:
        assert "take" in str(refused)  # more bytes than a node may have
        return
    path = tmp_path_factory.mktemp("labels") / "cluster.yaml"
    path.write_text(yaml_text(config))
    assert load(path, {}).labels_of("pi-03") == config.labels_of("pi-03")


def test_the_most_labels_with_the_longest_names_fit_a_description() -> None:
    most = tuple(f"k{n:02}={'v' * 11}" for n in range(16))
    labels.check_size(most)
    assert sum(len(each) + 1 for each in most) == labels.BYTES_MAX
    address = "ipc://" + "x" * IPC_PATH_BYTES_MAX
    me = Me(
        kid_of(b"me"), 1, "a" * ALIAS_CHARS_MAX, "c" * CLASS_NAME_CHARS_MAX, (address,), 256, 0.25,
        1 << 44, 1e12, 0.2, True, "aarch64", most,
    )  # fmt: skip
    data = msgspec.msgpack.encode(me.meta)
    assert len(data) <= META_BYTES_MAX
    assert msgspec.msgpack.decode(data, type=Meta).labels == most


def test_of_two_labels_with_one_key_the_later_one_holds() -> None:
    assert labels.read(["site=a", "ssd", "site=b"]) == ("site=b", "ssd")
    assert labels.merged(["rack=r1", "site=a"], ["site=b", "cam"]) == ("cam", "rack=r1", "site=b")


@pytest.mark.parametrize(
    ("wish", "met"),
    [
        ("site=a", True), ("site=b", False), ("site", True), ("rack", False), ("ssd", True),
        ("ssd=yes", False), ("!site=b", True), ("!site", False), ("!rack", True),
        ("site!=a", False), ("site!=b", True), ("class=pi", True), ("class=hub", False),
        ("gpu", True), ("arch=aarch64", True), ("!arch=x86_64", True), ("!gpu", False),
    ],
)  # fmt: skip
def test_a_wish_is_equality_or_presence_or_not_that(wish: str, met: bool) -> None:
    has = ("site=a", "ssd", *labels.facts("pi", "aarch64", True))
    (read,) = labels.read_wishes([wish])
    assert labels.meets(has, read) is met


@pytest.mark.parametrize("wish", ["", "!", "site=", "=a", "!!ssd", "Site=a", "site=a=b", "a b"])
def test_what_is_no_wish_is_refused_with_what_to_write(wish: str) -> None:
    with pytest.raises(Refused, match=r"is no wish: .* Write KEY=VALUE, KEY, !KEY or KEY!=VALUE"):
        labels.read_wishes([wish])
