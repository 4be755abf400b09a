"""Globals without a cluster: names, values, how people write and read them."""

from __future__ import annotations

import math
import pickle
from typing import Any

import click
import cloudpickle
import pytest
from hypothesis import given
from hypothesis import strategies as st

import manifold
from manifold.kernel.errors import Refused
from manifold.kernel.nexus import values
from manifold.kernel.nexus.messages import Operate
from manifold.kernel.nexus.storage_frames import BATCH_BYTES_MAX
from manifold.shells.sdk import globals_calls
from manifold.shells.sdk.globals_calls import Reading, decode, encode, key_of
from manifold.shells.verbs.globals import Register, cas, line, parse, reading_dict, shown

INTS = st.integers(-(1 << 63), (1 << 63) - 1)
VALUES = st.one_of(INTS, st.floats(), st.text(max_size=200), st.binary(max_size=200))


def same(one: object, other: object) -> bool:
    both_nan = isinstance(one, float) and isinstance(other, float)
    return type(one) is type(other) and (
        one == other or (both_nan and math.isnan(one) and math.isnan(other))  # type: ignore[arg-type]
    )


# -- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x", "jobs/total", "A.b_c-9", "x" * 128, "a/b/c/d"])
def test_a_name_is_a_register_with_or_without_its_folder(name: str) -> None:
    assert key_of(name) == key_of(f"/globals/{name}") == f"globals/{name}"


@pytest.mark.parametrize(
    "name", ["", "a b", "/x", "x/", "a//b", "/globals/", "x" * 129, "ä", "x\n", "/jobs/x", "a\0"]
)
def test_what_is_no_name_is_refused_with_the_rule(name: str) -> None:
    with pytest.raises(ValueError, match="letters, digits"):
        key_of(name)


def test_a_name_is_text() -> None:
    with pytest.raises(TypeError, match="is a str"):
        key_of(3)  # type: ignore[arg-type]


def test_verbs_read_registers_that_are_no_globals_and_change_none_of_them() -> None:
    assert Register(anywhere=True).convert("/nexus/config", None, None) == "nexus/config"
    with pytest.raises(click.BadParameter, match="not under /globals"):
        Register().convert("/nexus/config", None, None)
    with pytest.raises(click.BadParameter, match="manifold ls /nexus"):
        Register(anywhere=True).convert("/nexus", None, None)


# -- values ---------------------------------------------------------------------------------------


@given(VALUES)
def test_a_value_is_read_as_it_was_written_in_type_as_well(value: Any) -> None:
    assert same(decode(encode(value)), value)


@given(st.binary(max_size=50), st.text(max_size=50))
def test_bytes_and_text_are_never_the_same_register(data: bytes, text: str) -> None:
    assert encode(data) != encode(text)


def test_what_no_global_holds_is_refused() -> None:
    for wrong in (None, [], {}, 1j, object()):
        with pytest.raises(TypeError, match="an int, a float, a str or bytes"):
            encode(wrong)
    for number in (1 << 63, -(1 << 63) - 1):
        with pytest.raises(OverflowError, match="64 bits"):
            encode(number)


def test_the_largest_value_fits_and_one_byte_more_does_not() -> None:
    assert globals_calls.DATA_BYTES_MAX == values.DATA_BYTES_MAX < BATCH_BYTES_MAX
    whole = "x" * values.DATA_BYTES_MAX
    Operate("C-1.1", "globals/x", values.Put(encode(whole)))
    with pytest.raises(Refused, match="65,537 bytes"):
        encode(whole + "x")
    with pytest.raises(Refused, match="65,537 bytes"):
        encode(b"x" * values.DATA_BYTES_MAX)


def test_true_is_one() -> None:
    assert same(encode(True), 1)


def test_bytes_of_others_that_are_no_text_are_bytes() -> None:
    assert decode(b"\x80abc") == b"\x80abc"


# -- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1), ("-1", -1), ("+7", 7), ("007", 7), ("1.5", 1.5), ("-.5", -0.5), ("1.", 1.0),
        ("1e3", 1000.0), ("-2.5E-3", -0.0025), ("", ""), ("one", "one"), ("1_000", "1_000"),
        ("nan", "nan"), ("0x10", "0x10"), ("1 2", "1 2"), ("e5", "e5"), (".", "."), ("१", "१"),
    ],
)  # fmt: skip
def test_numbers_are_known_by_their_syntax_and_all_else_is_text(text: str, value: Any) -> None:
    assert same(parse(text), value)


def test_a_type_that_is_named_decides() -> None:
    assert same(parse("5", "text"), "5")
    assert same(parse("5", "float"), 5.0)
    assert same(parse("nan", "float"), math.nan)
    assert same(parse("hex:00ff", "bytes"), b"\x00\xff")
    for text, kind in (("1.5", "int"), ("x", "float"), ("0g", "bytes")):
        with pytest.raises(click.BadParameter, match=f"no {kind}"):
            parse(text, kind)


@given(VALUES)
def test_what_is_shown_is_one_line_that_tells_the_type(value: Any) -> None:
    text = shown(value)
    assert "\n" not in text and text.strip() == text != ""
    if isinstance(value, str):
        assert text[0] == '"' or same(parse(text), value)
    elif isinstance(value, bytes):
        assert same(parse(text, "bytes"), value)
    elif math.isfinite(value):
        assert same(parse(text), value)


@pytest.mark.parametrize(
    ("reading", "text"),
    [
        (Reading(1, 3), "x = 1  (version 3, quorum)"),
        (Reading("1", 3, "stale"), 'x = "1"  (version 3, stale)'),
        (Reading(None, 0), "x is absent  (quorum)"),
    ],
)
def test_an_acknowledgement_says_how_strong_it_is(reading: Reading, text: str) -> None:
    assert line("x", reading) == text


def test_json_says_the_type() -> None:
    assert reading_dict("globals/x", Reading(b"\xff", 2)) == {
        "name": "x", "value": "ff", "type": "bytes", "version": 2, "strength": "quorum",
    }  # fmt: skip
    assert reading_dict("nexus/config", Reading(None, 0))["type"] is None


def test_negative_numbers_are_no_options() -> None:
    context = cas.make_context("cas", ["x", "-1", "-2.5", "--json"])
    assert context.params["values"] == ("-1", "-2.5")
    assert context.params["as_json"] is True
    with pytest.raises(click.UsageError, match="--jsno"):
        cas.make_context("cas", ["x", "1", "2", "--jsno"])


# -- the mapping ----------------------------------------------------------------------------------


def test_the_default_globals_are_sent_to_a_cluster_by_reference() -> None:
    assert pickle.loads(pickle.dumps(manifold.globals)) is manifold.globals
    assert cloudpickle.loads(cloudpickle.dumps(manifold.globals)) is manifold.globals


def test_attributes_of_the_interpreter_are_no_globals() -> None:
    assert not hasattr(manifold.globals, "__wrapped__")
    assert not hasattr(manifold.globals, "_repr_html_")


def test_a_method_is_not_set_as_a_global_by_accident() -> None:
    with pytest.raises(AttributeError, match=r"g\['add'\]"):
        manifold.globals.add = 1  # type: ignore[method-assign, assignment]
