"""`-o FILE`: what is there decides how it is written, and nothing is left beside it.

Never on a real device: a FIFO and a pseudo-terminal behave as one.
"""

from __future__ import annotations

import os
import pty
import stat
import tempfile
import threading
import tty
from pathlib import Path
from unittest.mock import patch

import pytest

from manifold.shells.verbs import export, metrics, profile
from manifold.shells.verbs.output import CannotWrite, Output


def test_a_new_file_has_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    target = tmp_path / "new.csv"
    Output(str(target)).write("größer\n")
    assert target.read_text() == "größer\n"
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~mask
    assert os.listdir(tmp_path) == ["new.csv"]


def test_a_file_is_replaced_whole_and_keeps_its_mode(tmp_path: Path) -> None:
    target = tmp_path / "old.csv"
    target.write_text("old")
    target.chmod(0o640)
    with target.open() as reader:
        Output(str(target)).write("new")
        assert reader.read() == "old"  # O1
    assert target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640  # O2


@pytest.mark.parametrize("exists", [True, False])
def test_a_symlink_stays_one(tmp_path: Path, exists: bool) -> None:
    target, link = tmp_path / "inner" / "target", tmp_path / "link"
    target.parent.mkdir()
    link.symlink_to("inner/target")
    if exists:
        target.write_text("old")
    Output(str(link)).write("new")
    assert link.is_symlink()
    assert target.read_text() == "new"


@pytest.mark.parametrize("through", ["itself", "a link"])
def test_a_fifo_is_written_to_and_stays(tmp_path: Path, through: str) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    name = fifo
    if through == "a link":
        name = tmp_path / "link"
        name.symlink_to(fifo)
    writer = threading.Thread(target=Output(str(name)).write, args=("through it",))
    writer.start()
    assert fifo.read_text() == "through it"
    writer.join()
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    assert set(os.listdir(tmp_path)) <= {"fifo", "link"}  # O3


def test_a_terminal_is_written_to_and_stays(tmp_path: Path) -> None:
    reader, terminal = pty.openpty()
    try:
        tty.setraw(terminal)
        link = tmp_path / "terminal"
        link.symlink_to(os.ttyname(terminal))
        Output(str(link)).write("shown")
        assert os.read(reader, 100) == b"shown"
        assert stat.S_ISCHR(link.stat().st_mode)
    finally:
        os.close(reader)
        os.close(terminal)


def test_what_is_open_and_has_no_path_is_written_to() -> None:
    read_end, write_end = os.pipe()
    with tempfile.TemporaryFile() as deleted, open(read_end, "rb") as reader:
        for descriptor in (write_end, deleted.fileno()):
            Output(f"/proc/self/fd/{descriptor}").write("into it")
        os.close(write_end)
        assert reader.read() == b"into it"
        assert deleted.read() == b"into it"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "no name"),
        ("folder/", "no name"),
        ("a\0b", "no name"),
        ("folder", "is a folder"),
        ("missing/file", "no folder"),
        ("file/beneath", "Not a directory"),
        ("loop", "symbolic links"),
        ("x" * 300, "too long"),
    ],
)
def test_a_name_that_cannot_be_written_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").touch()
    Path("loop").symlink_to("loop")
    before = sorted(os.listdir())
    with pytest.raises(CannotWrite, match=said) as refused:
        Output(name)
    assert refused.value.next_step
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_where_writing_fails(tmp_path: Path, fault: BaseException) -> None:
    target = tmp_path / "kept"
    target.write_text("old")
    output = Output(str(target))
    expected = CannotWrite if isinstance(fault, OSError) else KeyboardInterrupt
    with patch("os.replace", side_effect=fault), pytest.raises(expected):
        output.write("new")
    assert os.listdir(tmp_path) == ["kept"]
    assert target.read_text() == "old"


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [(export.export, ["nodes"]), (metrics.metrics, []), (profile.profile, ["server-01"])],
)
def test_every_verb_with_a_file_refuses_it_before_it_asks_anybody(
    verb: object, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANIFOLD_CLUSTER", "nobody-has-this-one")
    with pytest.raises(CannotWrite):
        verb.main([*arguments, "-o", ""], standalone_mode=False)  # type: ignore[attr-defined]
