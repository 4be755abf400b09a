"""Parcels: whatever Python can pickle arrives as it left; arrays are written once."""

from __future__ import annotations

import os
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold.kernel.errors import Exhausted, NotFound
from manifold.kernel.tasks import parcel as module
from manifold.kernel.tasks.messages import Parcel
from manifold.kernel.tasks.parcel import by_value, decoded, encoded, is_plain, pack, unpack

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(), inner, max_size=4)
        | st.frozensets(st.integers(), max_size=4)
    ),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(VALUES)
def test_what_is_packed_is_unpacked_as_it_was(value: Any) -> None:
    packed = pack(value, "/nowhere")  # small ones need no folder
    wire = msgspec.msgpack.decode(msgspec.msgpack.encode(packed), type=Parcel)
    assert unpack(wire, "/nowhere") == value
    if is_plain(value):
        assert pickle.loads(packed.data) == value


@pytest.mark.parametrize("dtype", ["<f8", "<i4", "u1", "?", "<c16"])
def test_large_arrays_lie_in_a_file_and_are_mapped_not_copied(tmp_path: Path, dtype: str) -> None:
    arrays = [np.ones((n, 1000), dtype) for n in (1000, 2000)]
    packed = pack({"a": arrays, "b": "small"}, str(tmp_path))
    assert len(packed.data) < 1000 and packed.sizes == tuple(a.nbytes for a in arrays)
    found = unpack(packed, str(tmp_path), remove=True)
    assert list(tmp_path.iterdir()) == []
    for left, right in zip(found["a"], arrays, strict=True):
        assert np.array_equal(left, right) and left.flags.writeable
        assert left.ctypes.data % module.ALIGN_BYTES == 0
    found["a"][0][:] = 0
    assert found["a"][1].all()


def test_a_receiver_changes_its_own_copy_only(tmp_path: Path) -> None:
    packed = pack(np.zeros(100_000), str(tmp_path))
    one = unpack(packed, str(tmp_path))
    one[:] = 7
    assert not unpack(packed, str(tmp_path)).any()


def test_large_things_without_arrays_go_to_a_file_too(tmp_path: Path) -> None:
    value = ["x" * 1000 + str(n) for n in range(1000)]
    packed = pack(value, str(tmp_path))
    assert packed.data == b"" and packed.nbytes < 200
    assert unpack(packed, str(tmp_path)) == value


def test_an_array_that_is_not_contiguous_arrives_all_the_same(tmp_path: Path) -> None:
    value = np.arange(1_000_000).reshape(1000, 1000)[::2, ::3]
    assert np.array_equal(unpack(pack(value, str(tmp_path)), str(tmp_path)), value)


def test_a_disk_without_room_is_an_error_that_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(Exhausted, match="no room for 8000000 bytes"):
        pack(np.zeros(1_000_000), str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_gone_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(Exhausted, match="could not be put into"):
        pack(np.zeros(1_000_000), str(tmp_path / "gone"))


def test_a_file_that_is_missing_or_cut_off_is_told(tmp_path: Path) -> None:
    packed = pack(np.zeros(1_000_000), str(tmp_path))
    path = tmp_path / packed.path
    os.truncate(path, 1000)
    with pytest.raises(NotFound, match="cut off"):
        unpack(packed, str(tmp_path))
    path.unlink()
    with pytest.raises(NotFound, match="is not there"):
        unpack(packed, str(tmp_path))


@pytest.mark.parametrize("path", ["../other", "a/b", "/etc/passwd", "p_1"])
def test_a_path_out_of_its_folder_does_not_decode(path: str) -> None:
    wire = msgspec.msgpack.encode([b"", path, [1]])
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(wire, type=Parcel)


def test_what_cannot_be_pickled_says_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="generator"):
        pack((each for each in ()), str(tmp_path))


def test_code_is_a_parcel_in_bytes(tmp_path: Path) -> None:
    large = np.zeros(100_000)

    def function() -> Any:
        return large.sum()

    assert unpack(decoded(encoded(pack(function, str(tmp_path)))), str(tmp_path))() == 0.0


def test_functions_of_a_module_that_nobody_could_find_again_go_by_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = types.ModuleType("made_here_and_nowhere_else")
    exec("class Held:\n    number = 5\ndef answer():\n    return Held.number\n", made.__dict__)
    monkeypatch.setitem(sys.modules, made.__name__, made)
    packed = pack(made.answer, "/nowhere")
    assert by_value(made.__name__)
    monkeypatch.delitem(sys.modules, made.__name__)
    assert unpack(packed, "/nowhere")() == 5


def test_functions_of_installed_modules_go_by_name() -> None:
    assert not by_value("json.decoder") and not by_value("numpy") and not by_value("math")
    assert len(pack(np.linalg.norm, "/nowhere").data) < 100
