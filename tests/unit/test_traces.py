"""When traces are wanted, and the context that travels with a job."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifold.kernel import traces
from manifold.kernel.traces import Parent, parse, span_id, traceparent, wanted

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
KNOWN = 0x526AAA7A37A86BA0  # what nodes of any two versions agree on


@pytest.mark.parametrize(
    ("environ", "answer"),
    [
        ({}, False),
        ({"OTEL_SERVICE_NAME": "x"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://h:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://h:4318/v1/traces"}, True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://h"}, False),
        ({"OTEL_SDK_DISABLED": "true", "OTEL_TRACES_EXPORTER": "otlp"}, False),
    ],
)
def test_the_environment_says_whether_traces_are_wanted(
    environ: dict[str, str], answer: bool
) -> None:
    assert wanted(environ) is answer


@pytest.mark.parametrize(
    "text",
    [
        "", "x", f"00-{TRACE}-{SPAN}", f"00-{TRACE}-{SPAN}-00", f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more", f"00-{TRACE}-{SPAN}-01\n",
    ],
)  # fmt: skip
def test_what_is_no_parent_or_not_sampled_is_none(text: str) -> None:
    assert parse(text) is None


def test_a_later_version_may_say_more() -> None:
    assert parse(f"01-{TRACE}-{SPAN}-03-more") == Parent(int(TRACE, 16), int(SPAN, 16))


@given(st.integers(1, (1 << 128) - 1), st.integers(1, (1 << 64) - 1))
def test_what_travels_is_read_as_it_was_written(trace: int, span: int) -> None:
    assert parse(traceparent(trace, span)) == Parent(trace, span)


@given(st.text(max_size=64))
def test_no_text_is_too_odd(text: str) -> None:
    parse(text)


def test_an_id_is_the_same_in_every_process_and_another_for_every_name() -> None:
    assert span_id(1, "K-a", 7) == KNOWN
    assert span_id(1, "K-a", 7) == traces.Parent(1, 99).child_of("K-a", 7).span
    ids = {span_id(t, *names) for t in (1, 2) for names in (("a", 1), ("a", 2), ("a1",), ("b", 1))}
    assert len(ids) == 8
    assert all(0 < each < 1 << 64 for each in ids)
