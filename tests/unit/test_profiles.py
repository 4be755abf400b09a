"""Profiles: packaged classes and links, and what goes before what."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from manifold.kernel import labels
from manifold.kernel.config import PROFILES, Config, decode, encode, load, profile_path
from manifold.kernel.config_document import yaml_text
from manifold.kernel.errors import ConfigError
from manifold.kernel.hyperbus.rules import LinkRule, Plan
from manifold.kernel.link_rules import of_config
from manifold.tools.testing.wishes import count, wish, write

MINE = "cluster: mine\nclasses:\n  own: {count: 2}\nscheduler: {grain: 5ms}\n"


def names(config: Config) -> list[str]:
    return [each.name for each in config.classes]


def groups(config: Config, key: str) -> Counter[str]:
    return Counter(labels.value(config.labels_of(alias), key) for alias, _ in config.spread())


def link(config: Config, one: str, other: str) -> LinkRule:
    found = Plan(one, of_config(config), (), config.labels_of).outgoing(other)
    assert found is not None
    return found


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "manifold.yaml"
    path.write_text(MINE)
    return path


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_is_packaged_and_is_a_configuration(name: str, tmp_path: Path) -> None:
    config = load(None, {}, {"profile": name})
    by_path = load(profile_path(name), {})
    assert (config.profile, config.classes, config.links) == (name, by_path.classes, by_path.links)
    assert decode(encode(config)) == config
    written = tmp_path / "whole.yaml"
    written.write_text(yaml_text(config))
    assert load(written, {}) == config, "its own classes go before those of the profile it names"


def test_a_flag_or_a_variable_goes_before_the_classes_of_the_file_and_keeps_the_rest(
    mine: Path,
) -> None:
    for config in (
        load(mine, {}, {"profile": "lab"}),
        load(mine, {"MANIFOLD_PROFILE": "lab"}),
        load(mine, {"MANIFOLD_PROFILE": "edge"}, {"profile": "lab"}),
    ):
        assert names(config) == ["laptop", "jetson", "rpi5", "rpi4"]
        assert (config.cluster, config.scheduler.grain_ms) == ("mine", 5.0)
    assert names(load(mine, {"MANIFOLD_PROFILE": "lab"}, {"profile": "none"})) == ["own"]


def test_a_file_may_name_one_and_say_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "manifold.yaml"
    path.write_text("profile: edge\nscheduler: {grain: 5ms}\n")
    config = load(path, {}, {"classes.sensor.count": "40"})
    assert names(config) == ["gateway", "sensor"]
    assert (config.nodes, config.scheduler.grain_ms) == (44, 5.0)
    path.write_text("profile: edge\nlinks:\n  rules:\n    - {between: [sensor, '*'], cut: true}\n")
    assert [rule.cut for rule in load(path, {}).links.rules] == [True]


def test_a_wrong_name_lists_the_right_ones(tmp_path: Path) -> None:
    right = "it must be one of none, edge, lab, datacenter. Did you mean edge"
    with pytest.raises(ConfigError, match=f"override profile: profile is 'edgy'; {right}"):
        load(None, {}, {"profile": "edgy"})
    path = tmp_path / "manifold.yaml"
    path.write_text("profile: edgy\n")
    with pytest.raises(ConfigError, match=f"manifold.yaml:1:10: profile is 'edgy'; {right}"):
        load(path, {})


def test_at_the_edge_sites_are_far_apart_and_each_has_a_gateway() -> None:
    config = load(profile_path("edge"), {})
    assert set(groups(config, "site").values()) == {4}
    gateways = [alias for alias, kind in config.spread() if kind.name == "gateway"]
    assert len({labels.value(config.labels_of(each), "site") for each in gateways}) == 4
    near, far = link(config, "sensor-01", "sensor-05"), link(config, "sensor-01", "sensor-02")
    between = link(config, "gateway-01", "gateway-02")
    assert near.latency_ms < between.latency_ms < far.latency_ms
    assert near.rate_bps >= between.rate_bps > far.rate_bps


def test_in_a_datacenter_racks_are_equal_and_what_leads_out_of_them_is_oversubscribed() -> None:
    config = load(profile_path("datacenter"), {})
    assert set(groups(config, "rack").values()) == {4}
    inside, outside = link(config, "server-01", "gpu-01"), link(config, "server-01", "gpu-02")
    assert inside.latency_ms < outside.latency_ms
    assert inside.rate_bps == 4 * outside.rate_bps


def test_a_lab_has_a_laptop_on_wifi_and_a_board_with_a_gpu() -> None:
    config = load(profile_path("lab"), {})
    assert [each.name for each in config.classes if each.gpu] == ["jetson"]
    assert link(config, "rpi5-01", "laptop-01").loss > 0 == link(config, "rpi5-01", "rpi5-02").loss


def test_the_marker_of_a_test_may_ask_for_one(tmp_path: Path) -> None:
    asked = wish((), {"profile": "lab"})
    assert count(asked) == 9
    assert names(load(write(asked, tmp_path), {})) == ["laptop", "jetson", "rpi5", "rpi4"]
    with pytest.raises(ConfigError, match=r"no profile 'edgy'\. There are edge, lab, datacenter"):
        wish((), {"profile": "edgy"})
    with pytest.raises(ConfigError, match="Leave out one or the other"):
        wish((), {"profile": "lab", "classes": {"own": 2}})
