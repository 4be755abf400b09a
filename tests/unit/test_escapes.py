"""Text of others, as a terminal may show it."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.style import Style

from manifold.shells.console.terminal import lines_of
from manifold.shells.console.theme import Look, plain
from manifold.shells.console.view import Column, _row_line, strip_of
from manifold.shells.escapes import visible, visible_json, visible_text
from manifold.shells.namespace.following import log_line
from manifold.shells.namespace.table import text_of
from manifold.shells.namespace.values import shown

CLIPBOARD = "\x1b]52;c;aGk=\x07"
ANYTHING = st.text(st.characters())  # surrogates included
OVERRIDES = {*"\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"}


def obeyed(text: str) -> set[str]:
    """What a terminal would do something at."""
    return {c for c in text if unicodedata.category(c) in ("Cc", "Cs") or c in OVERRIDES}


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("plain, größer 統計", "plain, größer 統計"),
        (f"a{CLIPBOARD}b", r"a\x1b]52;c;aGk=\x07b"),
        ("a\x9b31m\x7f", r"a\x9b31m\x7f"),
        ("txt\u202egpj", r"txt\u202egpj"),
        ("\udcff", r"\udcff"),
        ("two\nlines\t.", r"two\x0alines\x09."),
    ],
)
def test_what_a_terminal_obeys_becomes_visible(text: str, seen: str) -> None:
    assert visible(text) == seen


@given(ANYTHING)
def test_nothing_is_left_that_a_terminal_obeys(text: str) -> None:
    assert not obeyed(visible(text))  # E1
    assert obeyed(visible_text(text)) <= {"\n", "\t"}
    assert not obeyed(text_of({text: [text]})) - {"\n", "\t"}
    assert not obeyed(log_line(("node", text))) - {"\n", "\t"}


@given(ANYTHING)
def test_text_without_such_characters_is_as_it_was(text: str) -> None:
    if not obeyed(text):
        assert visible(text) == visible_text(text) == text


@given(st.recursive(st.text(), lambda inner: st.dictionaries(st.text(), inner)))
def test_json_says_the_same(value: object) -> None:
    text = visible_json(json.dumps(value, ensure_ascii=False))
    assert not obeyed(text)
    assert json.loads(text) == value


def test_a_value_that_is_quoted_reads_back() -> None:
    value = f"a\x9b\u202e\x7f{CLIPBOARD}"
    assert not obeyed(shown(value))
    assert json.loads(shown(value)) == value


@given(ANYTHING)
def test_no_strip_and_no_cell_has_a_control_character(text: str) -> None:
    strip = strip_of(((text, "ok"),), 40, Look(None), Style())
    assert not obeyed("".join(segment.text for segment in strip))
    row = _row_line({"what": ((text, ""),)}, [(Column("what", "what", 10), 10)])
    assert len(plain(row)) == 13  # columns stay where they are


def test_eight_bit_controls_do_not_leave_the_consoles_terminal() -> None:
    assert [plain(line) for line in lines_of("a\x9b31mb\x9d52;c\x9cd")] == ["a31mb52;cd"]
