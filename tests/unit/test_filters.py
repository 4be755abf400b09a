"""Filters of the console do what those of a shell do, line by line."""

from __future__ import annotations

import io
import subprocess
from collections.abc import Iterator
from unittest.mock import patch

import click
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold.kernel.errors import Exhausted
from manifold.shells.verbs import filters
from manifold.shells.verbs.filters import FILTERS

texts = st.lists(
    st.text(st.characters(min_codepoint=33, max_codepoint=126) | st.just(" "), max_size=8),
    max_size=12,
).map(lambda lines: "".join(f"{line}\n" for line in lines))


def filtered(command: str, given_text: str) -> str:
    name, *arguments = command.split()
    output = io.StringIO()
    with patch("sys.stdin", io.StringIO(given_text)), patch("sys.stdout", output):
        FILTERS[name].main(arguments, prog_name=name, standalone_mode=False)
    return output.getvalue()


@pytest.mark.parametrize(
    ("command", "text", "wanted"),
    [
        ("grep b", "abc\nd\nB\n", "abc\n"),
        ("grep -i b", "abc\nd\nB\n", "abc\nB\n"),
        ("grep -v b", "abc\nd\nB\n", "d\nB\n"),
        ("grep -c b|d", "abc\nd\nB\n", "2\n"),
        ("grep ^J-[0-9]+$", "J-12\nJ-x\n", "J-12\n"),
        ("head -n 2", "1\n2\n3\n", "1\n2\n"),
        ("head -n 0", "1\n", ""),
        ("tail -n 2", "1\n2\n3\n", "2\n3\n"),
        ("tail -n 0", "1\n", ""),
        ("sort", "b\na\nc\n", "a\nb\nc\n"),
        ("sort -n", "10 ms\n9 ms\n-1\nnone\n1,000\n", "none\n-1\n9 ms\n10 ms\n1,000\n"),
        ("sort -n -r -k 2", "a 1\nb 20\nc 3\n", "b 20\nc 3\na 1\n"),
        ("uniq", "a\na\nb\na\n", "a\nb\na\n"),
        ("uniq -c", "a\na\nb\n", "      2 a\n      1 b\n"),
        ("wc", "a b\nc\n", "2 3 6\n"),
        ("wc -l", "", "0\n"),
        ("cut -f 2", "a  b c\nd\n", "b\n\n"),
        ("cut -f 3,1", "a b c\n", "c a\n"),
        ("grep a", "a", "a\n"),
    ],
)
def test_filters_print(command: str, text: str, wanted: str) -> None:
    assert filtered(command, text) == wanted


@pytest.mark.parametrize(
    "command",
    ["sort", "sort -r", "uniq", "head -n 3", "tail -n 3", "wc -l", "grep -c a", "grep -v a"],
)
@settings(max_examples=15, deadline=None)
@given(text=texts)
def test_filters_agree_with_those_of_this_machine(command: str, text: str) -> None:
    done = subprocess.run(
        command.split(), input=text, capture_output=True, text=True, env={"LC_ALL": "C"},
        timeout=60,
    )  # fmt: skip
    assert filtered(command, text) == done.stdout


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("grep (", "is no regular expression"),
        ("grep", "Missing argument"),
        ("head -n x", "not a valid integer"),
        ("head -n -1", "not in the range"),
        ("cut -f 0", "is no field"),
        ("cut -f 1,", "is no field"),
        ("cut -f ²", "is no field"),
        ("cut", "Missing option"),
        ("sort -k 0", "not in the range"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(command: str, message: str) -> None:
    with pytest.raises(click.ClickException) as refused:
        filtered(command, "a\n")
    assert message in refused.value.format_message()


def test_sort_refuses_more_lines_than_it_may_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "KEPT_LINES_MAX", 2)
    assert filtered("sort", "b\na\n") == "a\nb\n"
    with pytest.raises(Exhausted, match="at most 2 lines"):
        filtered("sort", "c\nb\na\n")


@pytest.mark.parametrize("command", ["grep .", "head", "uniq", "cut -f 1"])
def test_a_line_is_passed_on_before_the_next_one_is_there(command: str) -> None:
    """What is followed has no end."""
    output = io.StringIO()

    def endless() -> Iterator[str]:
        for number in range(5):
            yield f"{number}\n"
            assert output.getvalue() == "".join(f"{each}\n" for each in range(number + 1))

    name, *arguments = command.split()
    with patch("sys.stdin", endless()), patch("sys.stdout", output):
        FILTERS[name].main(arguments, prog_name=name, standalone_mode=False)
    assert output.getvalue() == "0\n1\n2\n3\n4\n"


def test_head_does_not_wait_for_what_it_will_not_print() -> None:
    def two() -> Iterator[str]:
        yield "1\n"
        yield "2\n"
        raise AssertionError("a third line was asked for")

    output = io.StringIO()
    with patch("sys.stdin", two()), patch("sys.stdout", output):
        FILTERS["head"].main(["-n", "2"], standalone_mode=False)
    assert output.getvalue() == "1\n2\n"
