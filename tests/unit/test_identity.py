"""Identity, boot numbers, durable records, and the folders they and the sockets live in."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from manifold.kernel import places
from manifold.kernel.durable import Damaged, NotDurable, read_record, write_record
from manifold.kernel.errors import ConfigError, Refused
from manifold.kernel.identity import (
    BOOT_FILE,
    KEY_FILE,
    load_identity,
    next_boot,
    runtime_dir,
    state_dir,
    verify,
)
from manifold.kernel.limits import IPC_PATH_BYTES_MAX, RUNTIME_DIR_BYTES_MAX
from manifold.vm.kid import is_kid, kid_of

# --- the key ----------------------------------------------------------------------------------


def test_the_first_start_makes_a_key_and_later_ones_keep_it(tmp_path: Path) -> None:
    folder = tmp_path / "default" / "rpi4-01"
    first = load_identity(folder)
    again = load_identity(folder)
    assert (again.kid, again.public) == (first.kid, first.public)
    assert is_kid(first.kid) and first.kid == kid_of(first.public)
    assert stat.S_IMODE((folder / KEY_FILE).stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert load_identity(tmp_path / "other").kid != first.kid


def test_a_signature_is_the_holders_and_of_that_text_alone(tmp_path: Path) -> None:
    one, other = load_identity(tmp_path / "a"), load_identity(tmp_path / "b")
    signature = one.sign(b"text")
    assert verify(one.public, signature, b"text")
    assert not verify(one.public, signature, b"tex")
    assert not verify(other.public, signature, b"text")
    assert not verify(b"short", signature, b"text")
    assert not verify(one.public, b"", b"text")


def test_the_private_key_is_not_in_what_is_printed(tmp_path: Path) -> None:
    identity = load_identity(tmp_path)
    assert "private" not in repr(identity)


def test_a_torn_foreign_or_altered_key_is_an_error_and_stays_as_it_is(tmp_path: Path) -> None:
    load_identity(tmp_path)
    path = tmp_path / KEY_FILE
    whole = path.read_bytes()
    altered = whole[:-1] + bytes([whole[-1] ^ 1])
    for content in (b"", whole[:10], whole[:-1], altered, whole + b"x", b"-----BEGIN PRIVATE KEY"):
        path.write_bytes(content)
        with pytest.raises(Damaged, match=r"identity\.key"):
            load_identity(tmp_path)
        assert path.read_bytes() == content
    write_record(path, b"a whole record, but no key")
    with pytest.raises(Damaged, match="does not hold a key"):
        load_identity(tmp_path)


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    load_identity(tmp_path)
    (tmp_path / KEY_FILE).chmod(0o640)
    with pytest.raises(Damaged, match=r"mode 0640.*chmod 600"):
        load_identity(tmp_path)


def test_a_key_behind_a_link_or_a_folder_in_its_place_is_refused(tmp_path: Path) -> None:
    load_identity(tmp_path / "real")
    (tmp_path / KEY_FILE).symlink_to(tmp_path / "real" / KEY_FILE)
    with pytest.raises(Damaged, match="cannot be opened"):
        load_identity(tmp_path)
    (tmp_path / "other" / KEY_FILE).mkdir(parents=True)
    with pytest.raises(Damaged, match="not a plain file"):
        load_identity(tmp_path / "other")


def test_starts_that_race_agree_on_one_key(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from manifold.kernel.identity import load_identity;"
        "print(load_identity(pathlib.Path(sys.argv[1])).kid)"
    )
    racing = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
        for _ in range(4)
    ]
    assert len({each.communicate(timeout=60)[0] for each in racing}) == 1
    assert all(each.returncode == 0 for each in racing)
    assert os.listdir(tmp_path) == [KEY_FILE]


# --- the boot number --------------------------------------------------------------------------


def test_boot_numbers_rise_from_one(tmp_path: Path) -> None:
    assert [next_boot(tmp_path / "node") for _ in range(3)] == [1, 2, 3]


def test_starts_that_race_get_different_numbers(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        boots = list(pool.map(next_boot, [tmp_path] * 20))
    assert sorted(boots) == list(range(1, 21))


def test_a_damaged_boot_number_is_an_error_and_never_starts_again_at_one(tmp_path: Path) -> None:
    next_boot(tmp_path)
    path = tmp_path / BOOT_FILE
    whole = path.read_bytes()
    for content in (b"", whole[:-1], b"7\n"):
        path.write_bytes(content)
        with pytest.raises(Damaged):
            next_boot(tmp_path)
        assert path.read_bytes() == content
    write_record(path, b"\x00\x07")
    with pytest.raises(Damaged, match="does not hold a boot number"):
        next_boot(tmp_path)
    write_record(path, ((1 << 63) - 1).to_bytes(8, "big"))
    with pytest.raises(Damaged, match="the last boot number"):
        next_boot(tmp_path)


# --- durable records --------------------------------------------------------------------------


def test_a_record_reads_back_and_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "record"
    assert read_record(path) is None
    for payload in (b"", b"one", bytes(100_000)):
        assert write_record(path, payload)
        assert read_record(path) == payload
    assert not write_record(path, b"other", replace=False)
    assert read_record(path) == bytes(100_000)
    assert os.listdir(tmp_path) == ["record"]


def test_the_data_is_synced_before_the_name_and_the_name_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        real_fsync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        steps.append("rename")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    write_record(tmp_path / "record", b"x")
    assert steps == ["file", "rename", "folder"]


def test_a_disk_that_refuses_leaves_the_old_record_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "record"
    write_record(path, b"old")

    def fsync(_descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        with pytest.raises(NotDurable, match="Input/output error"):
            write_record(path, b"new")
    assert read_record(path) == b"old"


def test_any_single_damaged_byte_of_a_record_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "record"
    write_record(path, b"payload")
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        with pytest.raises(Damaged):
            read_record(path)
        path.write_bytes(whole[:position])
        with pytest.raises(Damaged):
            read_record(path)


def test_a_pipe_in_place_of_a_record_does_not_block_the_reader(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "record", 0o600)
    with pytest.raises(Damaged, match="not a plain file"):
        read_record(tmp_path / "record")


def test_threads_that_write_one_record_at_once_leave_one_of_theirs(tmp_path: Path) -> None:
    payloads = [bytes([number]) * 50_000 for number in range(24)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda payload: write_record(tmp_path / "record", payload), payloads))
    assert read_record(tmp_path / "record") in payloads
    assert os.listdir(tmp_path) == ["record"]


def test_what_a_killed_writer_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    code = (
        "import os, sys, pathlib; from manifold.kernel import durable;"
        "durable._put = lambda *_: os._exit(9);"
        "durable.write_record(pathlib.Path(sys.argv[1]), b'x')"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "record")], timeout=60)
    assert killed.returncode == 9
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".record.") and read_record(tmp_path / "record") is None
    alive = tmp_path / f".record.{os.getpid()}.1"
    alive.write_text("")
    next_boot(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [alive.name, BOOT_FILE]


# --- folders ----------------------------------------------------------------------------------


def test_state_lives_where_the_environment_says() -> None:
    def at(**environ: str) -> str:
        return str(state_dir("lab", "rpi4-01", environ))

    assert at(MANIFOLD_STATE_HOME="/m", XDG_STATE_HOME="/x") == "/m/lab/rpi4-01"
    assert at(XDG_STATE_HOME="/x", HOME="/h") == "/x/manifold/lab/rpi4-01"
    assert at(XDG_STATE_HOME="x", HOME="/h") == "/h/.local/state/manifold/lab/rpi4-01"
    assert at().endswith("/.local/state/manifold/lab/rpi4-01")
    with pytest.raises(ConfigError, match="MANIFOLD_STATE_HOME"):
        at(MANIFOLD_STATE_HOME="m")


@pytest.mark.parametrize("name", ["", "..", "a/b", "/a", "A", "-a", "a\0", "a\n", "a" * 33])
def test_a_name_that_could_lead_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(Refused, match="is no name of a"):
        state_dir(name, "rpi4-01", {})
    with pytest.raises(Refused, match="is no name of a"):
        state_dir("lab", name, {})


def test_the_runtime_folder_is_private_and_differs_by_cluster_and_state_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "RUNTIME_DIR_BYTES_MAX", 4096)  # folders of tests are long
    environ = {"MANIFOLD_RUNTIME_DIR": str(tmp_path), "MANIFOLD_STATE_HOME": "/a"}
    one = runtime_dir("one", environ)
    assert runtime_dir("one", environ) == one and one.parent == tmp_path
    assert stat.S_IMODE(one.stat().st_mode) == 0o700
    assert runtime_dir("two", environ) != one
    assert runtime_dir("one", environ | {"MANIFOLD_STATE_HOME": "/b"}) != one


def test_a_runtime_folder_with_another_mode_owner_or_nature_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "RUNTIME_DIR_BYTES_MAX", 4096)
    environ = {"MANIFOLD_RUNTIME_DIR": str(tmp_path)}
    path = runtime_dir("lab", environ)
    path.chmod(0o750)
    with pytest.raises(Refused, match=r"mode 0750, not 0700\. .*chmod 700"):
        runtime_dir("lab", environ)
    path.chmod(0o700)
    with monkeypatch.context() as patched:
        patched.setattr(places.os, "geteuid", lambda: os.getuid() + 1)
        with pytest.raises(Refused, match="belongs to user"):
            runtime_dir("lab", environ)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Refused, match="is not a folder"):
        runtime_dir("lab", environ)
    path.unlink()
    path.write_text("")
    with pytest.raises(Refused, match="cannot be made"):
        runtime_dir("lab", environ)


def test_without_a_usable_xdg_folder_the_runtime_folder_is_a_short_one_in_tmp() -> None:
    for xdg in ("", "relative", "/does/not/exist", "/" + "x" * 90):
        path = places.runtime_path("lab", {"XDG_RUNTIME_DIR": xdg, "TMPDIR": "/" + "t" * 90})
        assert path.parent == Path("/tmp")
        assert path.name.startswith(f"manifold-{os.geteuid()}-")


def test_the_path_of_a_socket_is_under_a_hundred_bytes() -> None:
    longest = Path("/" + "r" * (RUNTIME_DIR_BYTES_MAX - 1))
    path = places.ipc_path(longest, "c" * 24 + "-4096.reverse-99")
    assert len(os.fsencode(path)) <= IPC_PATH_BYTES_MAX < 100
    with pytest.raises(Refused, match="longer than"):
        places.ipc_path(longest / "r", "a.control")
    for name in ("", "a/b", "c" * 60):
        with pytest.raises(Refused, match="no name for a socket"):
            places.ipc_path(Path("/r"), name)
    with pytest.raises(Refused, match="Set MANIFOLD_RUNTIME_DIR to a shorter path"):
        places.runtime_path("lab", {"MANIFOLD_RUNTIME_DIR": str(longest)})
