"""A node's log: bounded on disk and in memory, and followed without loss across restarts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from manifold.kernel import logbook as module
from manifold.kernel.logbook import LINE_CHARACTERS_MAX, LINES_MAX, Logbook

Open = Callable[[], tuple[logging.Logger, Logbook]]
ALL = 1_000_000


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Opens the log as one start of a node does."""
    books: list[Logbook] = []
    logger = logging.Logger("manifold.test", logging.INFO)

    def start() -> tuple[logging.Logger, Logbook]:
        for book in books:
            logger.removeHandler(book)
            book.close()
        books.append(Logbook(tmp_path / "state" / "node.log"))
        logger.addHandler(books[-1])
        return logger, books[-1]

    yield start
    for book in books:
        book.close()


def words(lines: list[str]) -> list[str]:
    return [line.rpartition(": ")[2] for line in lines]


def test_lines_have_time_level_and_name(opened: Open, tmp_path: Path) -> None:
    log, book = opened()
    log.warning("it rains")
    (line,) = book.read(0, "", ALL)[1]
    assert line[23:] == "Z WARNING  manifold.test: it rains"
    assert (tmp_path / "state" / "node.log").read_text() == line + "\n"


def test_a_follower_misses_nothing_and_sees_nothing_twice(opened: Open) -> None:
    log, book = opened()
    seen: list[str] = []
    number = 0
    for at in range(200):
        log.info("%d", at)
        if at % 7 == 0:
            number, lines = book.read(number, "", ALL)
            seen += lines
    seen += book.read(number, "", ALL)[1]
    assert words(seen) == [str(at) for at in range(200)]
    assert book.read(book.newest, "", ALL) == (book.newest, [])


def test_a_follower_goes_on_where_it_was_after_a_restart(opened: Open) -> None:
    log, book = opened()
    for at in range(50):
        log.info("%d", at)
    number, _ = book.read(0, "", ALL)
    log.info("last words\nof two lines")  # written after the last look, before the end
    log, book = opened()
    log.info("first words")
    number, lines = book.read(number, "", ALL)
    assert words(lines) == ["last words", "    of two lines", "first words"]
    assert book.read(number, "", ALL)[1] == []


def test_only_lines_with_the_text_are_read_and_of_too_many_the_newest(opened: Open) -> None:
    log, book = opened()
    for at in range(20):
        log.info("%s %d", "odd" if at % 2 else "even", at)
    assert words(book.read(0, "odd", 3)[1]) == ["odd 15", "odd 17", "odd 19"]


def test_the_ring_is_bounded_in_lines_and_each_line_in_length(opened: Open) -> None:
    log, book = opened()
    log.info("x" * 10_000)
    assert len(book.read(0, "", ALL)[1][0]) == LINE_CHARACTERS_MAX
    for at in range(LINES_MAX + 10):
        log.info("%d", at)
    assert len(book.lines) == LINES_MAX


def test_the_file_is_bounded(opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FILE_BYTES_MAX", 10_000)
    log, _ = opened()
    for at in range(1000):
        log.info("%d %s", at, "x" * 50)
    sizes = [path.stat().st_size for path in (tmp_path / "state").iterdir()]
    assert len(sizes) == 2
    assert max(sizes) <= 10_000


def test_the_end_of_a_long_file_is_read_from_a_whole_line_on(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, _ = opened()
    for at in range(100):
        log.info("%d", at)
    monkeypatch.setattr(module, "TAIL_BYTES", 333)
    _, book = opened()
    found = words(book.read(0, "", ALL)[1])
    assert found == [str(at) for at in range(100 - len(found), 100)]
    assert 0 < len(found) < 10


def test_bytes_that_are_no_text_do_not_keep_a_node_from_starting(
    opened: Open, tmp_path: Path
) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "node.log").write_bytes(
        b"\xff\xfe\0 torn\n2026-99-99T99:99:99.999Z bad\n"
    )
    log, book = opened()
    log.info("up")
    assert len(book.read(0, "", ALL)[1]) == 3
    assert words(book.read(0, "up", ALL)[1]) == ["up"]
