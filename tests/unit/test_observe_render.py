"""Metrics as text: what Prometheus and OpenMetrics say it looks like."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifold.kernel.observe.families import DEFINITIONS, Histogram, family
from manifold.kernel.observe.messages import Family, Sample
from manifold.kernel.observe.render import OPENMETRICS, PROMETHEUS, negotiate, number, render


def everything() -> list[Family]:
    """A family for each name of the table, with a sample that fits its kind."""
    histogram = Histogram((0.1, 1.0))
    histogram.observe(0.5)
    kinds = {"histogram": histogram.samples(), "info": (Sample(1.0, (("alias", "a"),)),)}
    return [
        family(name, kinds.get(kind, (Sample(2.0),))) for name, (kind, _, _) in DEFINITIONS.items()
    ]


def test_a_counter_has_total_in_its_samples_and_openmetrics_names_the_family_without() -> None:
    bytes_sent = Family("x_sent_bytes", "counter", "bytes", "Sent.", (Sample(3.0),))
    assert render([bytes_sent]) == (
        "# HELP x_sent_bytes_total Sent.\n# TYPE x_sent_bytes_total counter\nx_sent_bytes_total 3\n"
    )
    assert render([bytes_sent], OPENMETRICS) == (
        "# HELP x_sent_bytes Sent.\n"
        "# TYPE x_sent_bytes counter\n"
        "# UNIT x_sent_bytes bytes\n"
        "x_sent_bytes_total 3\n"
        "# EOF\n"
    )


def test_an_info_is_a_gauge_to_prometheus() -> None:
    info = Family("x", "info", "", "Who.", (Sample(1.0, (("a", "b"),)),))
    assert render([info]).splitlines()[1:] == ["# TYPE x_info gauge", 'x_info{a="b"} 1']
    openmetrics = render([info], OPENMETRICS).splitlines()
    assert openmetrics[1:] == ["# TYPE x info", 'x_info{a="b"} 1', "# EOF"]


def test_labels_and_help_are_escaped_as_each_format_wants_it() -> None:
    odd = Family("x", "gauge", "", 'a "b"\nc\\', (Sample(1.0, (("l", 'q"\n\\'),)),))
    prometheus, openmetrics = render([odd]), render([odd], OPENMETRICS)
    assert 'x{l="q\\"\\n\\\\"} 1' in prometheus.splitlines()
    assert '# HELP x a "b"\\nc\\\\' in prometheus.splitlines()
    assert '# HELP x a \\"b\\"\\nc\\\\' in openmetrics.splitlines()


@given(st.text(), st.text())
def test_whatever_a_label_or_a_help_holds_a_family_keeps_its_lines(label: str, text: str) -> None:
    found = render([Family("x", "gauge", "", text, (Sample(1.0, (("l", label),)),))])
    assert found.count("\n") == 3


def test_a_histogram_is_cumulative_and_ends_with_infinity() -> None:
    histogram = Histogram((0.1, 1.0))
    for seconds in (0.05, 0.1, 0.5, 7.0):
        histogram.observe(seconds)
    lines = render([family("manifold_loop_lag_seconds", histogram.samples())]).splitlines()[2:]
    assert lines == [
        'manifold_loop_lag_seconds_bucket{le="0.1"} 2',
        'manifold_loop_lag_seconds_bucket{le="1"} 3',
        'manifold_loop_lag_seconds_bucket{le="+Inf"} 4',
        "manifold_loop_lag_seconds_sum 7.65",
        "manifold_loop_lag_seconds_count 4",
    ]


def test_numbers_are_exact_and_whole_ones_have_no_point() -> None:
    values = (0.0, 1.0, -3.0, 0.1, 1e300, float(1 << 60), float("inf"), float("-inf"))
    assert [number(each) for each in values] == [
        "0", "1", "-3", "0.1", "1e+300", "1.152921504606847e+18", "+Inf", "-Inf",
    ]  # fmt: skip
    assert number(float("nan")) == "NaN"


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", PROMETHEUS),
        ("*/*", PROMETHEUS),
        ("text/html, */*;q=0.8", PROMETHEUS),
        ("text/plain;version=0.0.4;q=0.5", PROMETHEUS),
        ("application/openmetrics-text", OPENMETRICS),
        # What Debian's Prometheus 2.42 says:
        (
            "application/openmetrics-text;version=1.0.0,"
            "application/openmetrics-text;version=0.0.1;q=0.75,"
            "text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
            OPENMETRICS,
        ),
        ("application/openmetrics-text;q=0.2, text/plain;q=0.3", PROMETHEUS),
        ("application/openmetrics-text;version=2.0.0, text/plain", PROMETHEUS),
        ("application/openmetrics-text;q=0", PROMETHEUS),
        ("application/openmetrics-text;q=nan;q, ;;=,,", PROMETHEUS),
    ],
)
def test_the_format_is_the_one_that_is_wanted_more(accept: str, content_type: str) -> None:
    assert negotiate(accept) == content_type


@given(st.text(alphabet=st.characters(max_codepoint=255)))
def test_no_accept_header_is_too_odd(accept: str) -> None:
    assert negotiate(accept) in (PROMETHEUS, OPENMETRICS)


def test_every_name_has_its_unit_last_and_a_sentence_that_says_what_it_is() -> None:
    for name, (_, unit, text) in DEFINITIONS.items():
        assert name.startswith("manifold_")
        assert not name.endswith("_total")
        assert name.endswith(f"_{unit}") or not unit
        assert text.endswith(".")


def test_promtool_finds_nothing_wrong_with_any_name() -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is missing: apt-get install prometheus")
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=render(everything()), capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
