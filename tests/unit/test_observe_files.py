"""The dashboard, the alert rules and the example configuration fit what nodes really tell."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from manifold.kernel.observe.families import DEFINITIONS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tools" / "observe"
ENDS = {
    "counter": ("_total",), "gauge": ("",), "info": ("_info",),
    "histogram": ("_bucket", "_sum", "_count"),
}  # fmt: skip
NAMES = {name + end for name, (kind, _, _) in DEFINITIONS.items() for end in ENDS[kind]}


def expressions(value: Any) -> Iterator[str]:
    """Every query of a dashboard or of rules, variables included."""
    if isinstance(value, dict):
        for key, each in value.items():
            if key in ("expr", "definition") and isinstance(each, str):
                yield each
            else:
                yield from expressions(each)
    elif isinstance(value, list):
        for each in value:
            yield from expressions(each)


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / "grafana-dashboard.json").read_text())
    return found


def rules() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / "alerts.yaml").read_text())
    return found


@pytest.mark.parametrize("document", [dashboard(), rules()], ids=["dashboard", "alerts"])
def test_every_metric_in_a_query_exists(document: dict[str, Any]) -> None:
    asked = [name for each in expressions(document) for name in re.findall(r"manifold_\w+", each)]
    assert len(asked) > 10
    assert set(asked) <= NAMES


def test_the_dashboard_can_be_imported() -> None:
    found = dashboard()
    ids = [panel["id"] for panel in found["panels"]]
    assert len(set(ids)) == len(ids)
    assert [v["name"] for v in found["templating"]["list"]] == [
        "datasource", "cluster", "class", "node",
    ]  # fmt: skip
    for panel in found["panels"]:
        assert panel["title"]
        for target in panel.get("targets", ()):
            assert target["datasource"]["uid"] == "${datasource}"
            assert panel["description"]
    places = [(p["gridPos"]["y"], p["gridPos"]["x"]) for p in found["panels"]]
    assert places == sorted(set(places))


def test_every_alert_says_what_to_do() -> None:
    for group in rules()["groups"]:
        for rule in group["rules"]:
            assert rule["annotations"]["summary"]
            assert rule["annotations"]["action"]
            assert rule["labels"]["severity"] in ("critical", "warning")


@pytest.mark.parametrize(
    ("what", "file"), [("rules", "alerts.yaml"), ("config", "prometheus.yaml")]
)
def test_promtool_accepts_the_files(what: str, file: str, tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is missing: apt-get install prometheus")
    for each in FOLDER.glob("*.yaml"):
        shutil.copy(each, tmp_path)
    (tmp_path / "targets.json").write_text("[]")
    done = subprocess.run(
        ["promtool", "check", what, file], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


# Three voters for 12 minutes, at 30 s a step. At minute 2 the loop of one begins to be late by up
# to half a second; at minute 4 the two others stop answering.
ALERTING = """
rule_files: [alerts.yaml]
evaluation_interval: 30s
tests:
  - interval: 30s
    input_series:
      - {series: 'up{job="manifold",instance="a",cluster="c",node="n-01"}', values: '1x24'}
      - {series: 'up{job="manifold",instance="b",cluster="c",node="n-02"}', values: '1x8 0x16'}
      - {series: 'up{job="manifold",instance="c",cluster="c",node="n-03"}', values: '1x8 0x16'}
      - {series: 'manifold_nexus_votes{instance="a",cluster="c",node="n-01"}', values: '1x24'}
      - {series: 'manifold_nexus_votes{instance="b",cluster="c",node="n-02"}', values: '1x8 stale'}
      - {series: 'manifold_nexus_votes{instance="c",cluster="c",node="n-03"}', values: '1x8 stale'}
      - {series: 'manifold_nexus_voters{instance="a",cluster="c",node="n-01"}', values: '3x24'}
      - {series: 'manifold_members{state="dead",instance="a",cluster="c"}', values: '0x9 2x15'}
      - {series: 'manifold_loop_lag_seconds_bucket{le="0.2",cluster="c",node="n-01"}',
         values: '0+30x4 120+0x20'}
      - {series: 'manifold_loop_lag_seconds_bucket{le="0.5",cluster="c",node="n-01"}',
         values: '0+30x24'}
      - {series: 'manifold_loop_lag_seconds_bucket{le="+Inf",cluster="c",node="n-01"}',
         values: '0+30x24'}
    promql_expr_test:
      - {expr: 'count(ALERTS{alertstate="firing"}) or vector(0)', eval_time: 3m,
         exp_samples: [{labels: '{}', value: 0}]}
      - {expr: 'count by (alertname) (ALERTS{alertstate="firing"})', eval_time: 11m, exp_samples: [
         {labels: '{alertname="ManifoldNodeDown"}', value: 2},
         {labels: '{alertname="ManifoldNoQuorum"}', value: 1},
         {labels: '{alertname="ManifoldMemberLost"}', value: 1},
         {labels: '{alertname="ManifoldLoopLate"}', value: 1}]}
"""


def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is missing: apt-get install prometheus")
    shutil.copy(FOLDER / "alerts.yaml", tmp_path)
    (tmp_path / "cases.yaml").write_text(ALERTING)
    done = subprocess.run(
        ["promtool", "test", "rules", "cases.yaml"], cwd=tmp_path, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_page_names_every_metric() -> None:
    text = (ROOT / "docs" / "observability.md").read_text()
    assert set(re.findall(r"manifold_\w+", text)) >= set(DEFINITIONS)
