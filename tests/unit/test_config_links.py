"""The rules of links in manifold.yaml: what is accepted, and what is refused where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from manifold.kernel.config import Config, LinkRow, LinksConfig, decode, encode, load
from manifold.kernel.config_document import yaml_text
from manifold.kernel.config_loader import LIST_ROWS_MAX
from manifold.kernel.errors import ConfigError

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_file(text: str) -> Path:
        path = tmp_path / "cluster.yaml"
        path.write_text(text)
        return path

    return to_file


def test_rules_are_a_list_and_each_has_two_sides(write: Write) -> None:
    config = load(
        write("""\
links:
  rules:
    - {between: [rpi4, server-01], latency: 10ms, jitter: 1ms, rate: 10Mbit/s}
    - between: ["rpi4-01,rpi4-02", "*"]
      loss: 0.01
      reorder: 0.02
    - {from: rpi5, to: "*", cut: true}
"""),
        {},
    )
    assert config.links.rules == (
        LinkRow("rpi4 server-01", latency_ms=10, jitter_ms=1, rate=1e7),
        LinkRow("rpi4-01,rpi4-02 *", loss=0.01, reorder=0.02),
        LinkRow(source="rpi5", target="*", cut=True),
    )
    assert [rule.sides for rule in config.links.rules] == [
        ("rpi4", "server-01"), ("rpi4-01,rpi4-02", "*"), ("rpi5", "*")
    ]  # fmt: skip
    assert [rule.one_way for rule in config.links.rules] == [False, False, True]
    assert decode(encode(config)) == config


def test_a_side_may_be_a_label_that_a_class_has(write: Write) -> None:
    text = """\
classes:
  pi: {{count: 4, labels: {{site: [a, b], ssd}}}}
links:
  rules:
    - {{between: [{}, site=b], latency: 10ms}}
"""
    assert load(write(text.format("site=a")), {}).links.rules == (
        LinkRow("site=a site=b", latency_ms=10),
    )
    for wrong, why in {
        "site=c": r"cluster\.yaml:5:7: links\.rules\.0 names 'site=c', a label that no class has\. "
        r"Did you mean site=",
        "ssd": r"names 'ssd', which is no node, no class and not `\*`",
    }.items():
        with pytest.raises(ConfigError, match=why):
            load(write(text.format(wrong)), {})


@pytest.mark.parametrize("text", ["links:\n", "links:\n  rules:\n", "links:\n  rules: []\n"])
def test_no_rules_are_fine(text: str, write: Write) -> None:
    assert load(write(text), {}).links == LinksConfig()


def test_rules_written_out_load_to_equal_ones(write: Write) -> None:
    rules = (
        LinkRow("rpi4 server"),
        LinkRow("rpi4-01,rpi4-02 *", latency_ms=0.5, loss=0.25, reorder=0.125),
        LinkRow(source="rpi5", target="jetson,rpi4", rate=1e6, cut=True),
    )
    config = Config(links=LinksConfig("on", rules))
    assert load(write(yaml_text(config)), {}) == config


def test_whether_classes_count_is_a_key_like_others() -> None:
    assert load(None, {"MANIFOLD_LINKS_CLASSES": "on"}).links.classes == "on"
    assert load(None, {}, {"links.classes": "on"}).links.classes == "on"


REFUSED = {
    "unknown key": (
        "- {between: [rpi4, rpi5], delay: 5ms}",
        "FILE:3:31: there is no key links.rules.0.delay. Known here:",
    ),
    "bad unit": (
        "- {between: [rpi4, rpi5], latency: 5}",
        "FILE:3:40: links.rules.0.latency is '5' without a unit; a time such as 20ms or 1s",
    ),
    "bad rate": ("- {between: [rpi4, rpi5], rate: 5Mbps}", "did you mean Mbit/s?"),
    "too much loss": (
        "- {between: [rpi4, rpi5], loss: 2}",
        "FILE:3:37: links.rules.0.loss is 2; it must be 0 to 1, by default 0. Write at most 1.",
    ),
    "unknown node": (
        "- {between: [rpi4, rpi6]}",
        "FILE:3:7: links.rules.0 names 'rpi6', which is no node, no class and not `*`. "
        "Did you mean rpi5?",
    ),
    "a number that no node has": (
        "- {between: [rpi4, rpi5-05]}",
        "names 'rpi5-05', which is no node, no class and not `*`. Did you mean rpi5-04?",
    ),
    "another way to write a number": ("- {between: [rpi4-1, rpi5]}", "names 'rpi4-1'"),
    "no sides": ("- {latency: 5ms}", "FILE:3:7: links.rules.0 wants two sides: `between: "),
    "half a way": ("- {from: rpi4}", "links.rules.0 wants two sides"),
    "an empty side": ('- {between: ["rpi4,", rpi5]}', "names '', which is no node"),
    "both ways and one way": (
        "- {between: [rpi4, rpi5], to: rpi4}",
        "links.rules.0 has `between` and `from` or `to`: it is either both ways or one way",
    ),
    "one side": ("- {between: [rpi4]}", "takes two sides, `[one, other]`."),
    "three sides": ("- {between: [rpi4, rpi5, server]}", "takes two sides, `[one, other]`."),
    "a side alone": ("- {between: rpi4}", "links.rules.0.between takes two sides"),
    "a list in a side": ("- {between: [[rpi4], rpi5]}", "takes two sides"),
    "keys in a side": ("- {between: [{a: b}, rpi5]}", "takes two sides"),
    "a word": ("- rpi4", "links.rules takes a list of keys in braces"),
    "a list of lists": ("- [rpi4, rpi5]", "links.rules takes a list of keys in braces"),
    "twice": ("- {cut: true, cut: true}", "the key 'cut' stands twice."),
    "a list for a value": (
        "- {between: [rpi4, rpi5], latency: [1ms]}",
        "links.rules.0.latency takes no list",
    ),
    "too many": (
        "\n".join("    - {between: [rpi4, rpi5]}" for _ in range(LIST_ROWS_MAX + 1)).lstrip(),
        f"links.rules has more than {LIST_ROWS_MAX} entries.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_rule_is_refused_with_its_place_and_reason(case: str, write: Write) -> None:
    text, wanted = REFUSED[case]
    path = write(f"links:\n  rules:\n    {text}\n")
    with pytest.raises(ConfigError) as caught:
        load(path, {})
    assert wanted in str(caught.value).replace(str(path), "FILE")


@pytest.mark.parametrize("text", ["rules: rpi4", "rules: {between: [rpi4, rpi5]}"])
def test_rules_that_are_no_list_are_refused(text: str, write: Write) -> None:
    with pytest.raises(ConfigError, match=r"links\.rules takes a list of keys in braces"):
        load(write(f"links:\n  {text}\n"), {})
