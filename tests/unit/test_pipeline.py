"""A line of the console is read as a POSIX shell would, or refused with what to write instead."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifold.shells.pipeline import INSTEAD, LINE_CHARS_MAX, BadLine, parse

words = st.text(max_size=12)
stages = st.lists(st.lists(words, min_size=1, max_size=4), min_size=1, max_size=4)
odd = st.text(st.sampled_from("ab |'\"\\$`><&;\t"), max_size=40)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("", []),
        ("  \t ", []),
        ("ls", [["ls"]]),
        ("ls -l /jobs|grep  run", [["ls", "-l", "/jobs"], ["grep", "run"]]),
        ("grep 'a | b' | wc -l", [["grep", "a | b"], ["wc", "-l"]]),
        (r'grep "say \"so\" \n"', [["grep", 'say "so" \\n']]),
        (r"grep a\ b\|c", [["grep", "a b|c"]]),
        ("set x ''", [["set", "x", ""]]),
        ("a'b'\"c\"d", [["abcd"]]),
        ("cat '/globals/ü'", [["cat", "/globals/ü"]]),
    ],
)
def test_a_line_is_words_in_stages(line: str, found: list[list[str]]) -> None:
    assert parse(line) == found


@pytest.mark.parametrize(
    ("line", "message", "next_step"),
    [
        ("ls 'x", r"The ' at character 4 has no second one", "Close it"),
        ('ls "x\\"', r'The " at character 4 has no second one', "Close it"),
        ("ls \\", "ends with a backslash", "leave it out"),
        ("| wc", "no command before the first", "leave the `|` out"),
        ("ls |", "no command after a", "leave the `|` out"),
        ("ls || wc", "no command after a", "leave the `|` out"),
        ("ls > f", "`>` means nothing here", "export TABLE -o FILE"),
        ("ls < f", "`<` means nothing here", "before a `|`"),
        ("run x &", "`&` means nothing here", "run --detach"),
        ("ls; ls", "`;` means nothing here", "one line after the other"),
        ("x" * (LINE_CHARS_MAX + 1), "of at most", "in a file"),
    ],
)
def test_what_means_nothing_is_refused_with_what_to_do(
    line: str, message: str, next_step: str
) -> None:
    with pytest.raises(BadLine, match=message.replace("|", r"\|")) as refused:
        parse(line)
    assert next_step in refused.value.next_step
    assert refused.value.exit_code == 2


@given(stages)
def test_what_is_quoted_reads_back_as_it_was(written: list[list[str]]) -> None:
    assert parse(" | ".join(map(shlex.join, written))) == written


@given(odd)
def test_every_line_is_read_or_refused(line: str) -> None:
    try:
        found = parse(line)
    except BadLine as refused:
        assert refused.message and refused.next_step
    else:
        assert all(found)


@given(odd)
def test_words_are_those_that_a_posix_shell_has(line: str) -> None:
    """Where it has no operators; newlines and comments are not for a line."""
    if any(each in line for each in "|" + "".join(INSTEAD)):
        return
    try:
        wanted = shlex.split(line.replace("\\$", "$").replace("\\`", "`"))
    except ValueError:
        with pytest.raises(BadLine):
            parse(line)
        return
    plain = line.replace("\\$", "$").replace("\\`", "`")
    assert parse(plain) == ([wanted] if wanted else [])
