"""The real file layer: an append is whole and synced, whatever the system can do at once."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from manifold.kernel.nexus.storage_files import Disk

DATA = bytes(range(256)) * 8


def appended(disk: Disk, path: Path) -> bytes:
    handle = disk.create(path)
    try:
        disk.append(handle, DATA, 0)
        disk.append(handle, DATA, len(DATA))
    finally:
        disk.close(handle)
    return path.read_bytes()


def test_an_append_is_there_and_is_one_sync(tmp_path: Path) -> None:
    disk = Disk()
    assert appended(disk, tmp_path / "file") == 2 * DATA
    assert disk.syncs == 2


@pytest.mark.parametrize("fault", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_where_it_cannot_be_done_at_once_it_is_done_in_two_steps(
    fault: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def refuses(*arguments: Any) -> int:
        tried.append(arguments)
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(os, "pwritev", refuses)
    disk = Disk()
    assert appended(disk, tmp_path / "file") == 2 * DATA
    assert disk.syncs == 2 and len(tried) == 1, "it is not tried again"


def test_what_was_written_in_part_is_completed_and_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.pwritev

    def part(handle: int, buffers: Any, offset: int, flags: int) -> int:
        return write(handle, [buffers[0][:100]], offset, flags)

    monkeypatch.setattr(os, "pwritev", part)
    disk = Disk()
    assert appended(disk, tmp_path / "file") == 2 * DATA
    assert disk.syncs == 4


def test_another_fault_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        appended(Disk(), tmp_path / "file")
