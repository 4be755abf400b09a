"""Compute shares: cgroups of both versions on trees of our own, and the arithmetic of pacing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifold.kernel.process import throttle
from manifold.kernel.process.throttle import CREDIT_S, PERIOD_US, QUOTA_US_MIN, Pacer


@pytest.fixture
def v1(tmp_path: Path) -> Path:
    root = tmp_path / "cpu"
    root.mkdir()
    (root / "cgroup.procs").touch()
    return root


@pytest.fixture
def v2(tmp_path: Path) -> Path:
    root = tmp_path / "cgroup"
    group = root / "manifold" / "run" / "rpi4-01"
    group.mkdir(parents=True)
    (root / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    (root / "cgroup.subtree_control").write_text("cpu memory\n")
    for parent in (group.parent.parent, group.parent):  # the kernel makes them with the folder
        (parent / "cgroup.subtree_control").write_text("\n")
    return root


def test_version_1_limits_by_period_and_quota(v1: Path) -> None:
    path = Path(throttle.prepare("run/rpi4-01", 0.25, [(v1, 1)]))
    assert path == v1 / "manifold" / "run" / "rpi4-01"
    assert (path / "cpu.cfs_period_us").read_text() == str(PERIOD_US)
    assert (path / "cpu.cfs_quota_us").read_text() == str(PERIOD_US // 4)


def test_version_2_delegates_the_controller_and_limits_by_cpu_max(v2: Path) -> None:
    path = Path(throttle.prepare("run/rpi4-01", 1.2, [(v2, 2)]))
    assert (path / "cpu.max").read_text() == f"{round(1.2 * PERIOD_US)} {PERIOD_US}"
    assert (v2 / "cgroup.subtree_control").read_text() == "cpu memory\n"  # it had it already
    for parent in (path.parent.parent, path.parent):
        assert (parent / "cgroup.subtree_control").read_text() == "+cpu"
    assert not (path / "cgroup.subtree_control").exists()  # a group of processes delegates nothing


def test_memory_is_limited_without_a_way_out_by_swap(v1: Path, v2: Path) -> None:
    path = Path(throttle.prepare_memory("run/rpi4-01", 64 << 20, [(v1, 1)]))
    assert (path / "memory.limit_in_bytes").read_text() == str(64 << 20)
    (path / "memory.memsw.limit_in_bytes").touch()  # where the kernel accounts for swap
    throttle.prepare_memory("run/rpi4-01", 32 << 20, [(v1, 1)])
    assert (path / "memory.memsw.limit_in_bytes").read_text() == str(32 << 20)
    new = v2 / "manifold" / "run" / "rpi4-01"
    (new / "memory.swap.max").touch()
    assert throttle.prepare_memory("run/rpi4-01", 64 << 20, [(v2, 2)]) == str(new)
    assert (new / "memory.max").read_text() == str(64 << 20)
    assert (new / "memory.swap.max").read_text() == "0"
    assert (new.parent / "cgroup.subtree_control").read_text() == "+memory"


def test_the_least_quota_is_what_the_kernel_takes(v1: Path) -> None:
    path = Path(throttle.prepare("run/tiny", 0.0001, [(v1, 1)]))
    assert (path / "cpu.cfs_quota_us").read_text() == str(QUOTA_US_MIN)


def test_the_first_root_that_works_is_taken(v1: Path, v2: Path, tmp_path: Path) -> None:
    roots = [(tmp_path / "missing", 1), (v1, 1), (v2, 2)]
    assert throttle.prepare("run/rpi4-01", 0.5, roots).startswith(str(v1))


def test_a_host_without_cgroups_gives_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert throttle.prepare("run/x", 0.5, []) == ""
    assert throttle.prepare("run/x", 0.5, [(tmp_path / "empty", 1), (tmp_path / "empty", 2)]) == ""
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_controller_that_is_not_granted_gives_none_and_leaves_nothing(v2: Path) -> None:
    control = v2 / "cgroup.subtree_control"
    control.unlink()
    control.mkdir()  # whatever is written there is refused
    assert throttle.prepare("run/x", 0.5, [(v2, 2)]) == ""
    assert not (v2 / "manifold" / "run" / "x").exists()


def test_joining_writes_our_pid_and_nothing_where_there_is_no_group(tmp_path: Path) -> None:
    assert not throttle.join(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "cgroup.procs").touch()
    assert throttle.join(str(tmp_path))
    assert (tmp_path / "cgroup.procs").read_text() == str(os.getpid())


def test_removing_goes_up_as_far_as_it_is_empty_and_never_above_ours(tmp_path: Path) -> None:
    one, two = (tmp_path / "manifold" / "run" / name for name in ("one", "two"))
    for path in (one, two):
        path.mkdir(parents=True)
    throttle.remove(str(one))
    assert not one.exists()
    assert two.exists()
    throttle.remove(str(one))  # twice is once
    throttle.remove(str(two))
    assert not (tmp_path / "manifold").exists()
    assert tmp_path.exists()


def test_all_groups_of_a_cluster_are_removed_and_no_other(tmp_path: Path) -> None:
    for name in ("run/one", "run/two", "other/one"):
        (tmp_path / "manifold" / name).mkdir(parents=True)
    throttle.remove_all("run", [(tmp_path, 1), (tmp_path / "missing", 2)])
    assert [path.name for path in (tmp_path / "manifold").iterdir()] == ["other"]


@pytest.mark.skipif(
    not os.access("/sys/fs/cgroup/memory/cgroup.procs", os.W_OK), reason="no cgroup v1"
)
def test_the_real_kernel_takes_a_limit_of_memory_and_another() -> None:
    group = f"test-{os.getpid()}"
    path = throttle.prepare_memory(f"{group}/x", 64 << 20)
    try:
        throttle.prepare_memory(f"{group}/x", 96 << 20)
        assert Path(path, "memory.limit_in_bytes").read_text().strip() == str(96 << 20)
        throttle.prepare_memory(f"{group}/x", 32 << 20)
        assert Path(path, "memory.limit_in_bytes").read_text().strip() == str(32 << 20)
        assert throttle.memory_kills(path) == 0
    finally:
        throttle.remove(path)
    assert throttle.memory_kills(path) == 0
    assert not Path(path).parent.exists()


@pytest.mark.skipif(
    not os.access("/sys/fs/cgroup/cpu/cgroup.procs", os.W_OK), reason="no cgroup v1"
)
def test_the_real_kernel_takes_what_is_written() -> None:
    group = f"test-{os.getpid()}"
    path = throttle.prepare(f"{group}/x", 0.25)
    try:
        assert Path(path, "cpu.cfs_quota_us").read_text().strip() == str(PERIOD_US // 4)
    finally:
        throttle.remove(path)
    assert not Path(path).parent.exists()


# -- pacing ---------------------------------------------------------------------------------------


def test_a_quarter_of_a_core_pauses_three_times_what_it_worked() -> None:
    assert Pacer(0.25).pause_s(0.010) == pytest.approx(0.030)
    assert Pacer(1.0).pause_s(10.0) == 0.0


def test_pauses_under_a_millisecond_are_saved_up() -> None:
    pacer = Pacer(0.5)
    assert [pacer.pause_s(0.0004) for _ in range(3)] == [0.0, 0.0, pytest.approx(0.0012)]


def test_a_pause_that_was_cut_short_is_still_owed() -> None:
    pacer = Pacer(0.5)
    pacer.pause_s(0.020)
    pacer.paused(0.005)
    assert pacer.pause_s(0.0) == pytest.approx(0.015)


def test_a_pause_that_came_too_long_is_credit_but_little() -> None:
    pacer = Pacer(0.5)
    pacer.pause_s(0.020)
    pacer.paused(60.0)
    assert pacer.pause_s(CREDIT_S) == 0.0
    assert pacer.pause_s(0.010) == pytest.approx(0.010)


@given(
    st.floats(0.01, 1.0),
    st.lists(st.tuples(st.floats(0, 0.05), st.floats(0, 0.02)), min_size=50, max_size=200),
)
def test_over_time_the_share_is_kept_however_late_the_pauses_end(
    share: float, said: list[tuple[float, float]]
) -> None:
    pacer, worked_s, paused_s = Pacer(share), 0.0, 0.0
    for cpu_s, late_s in said:
        worked_s += cpu_s
        pause_s = pacer.pause_s(cpu_s)
        if pause_s:
            paused_s += pause_s + late_s
            pacer.paused(pause_s + late_s)
    due_s = worked_s * (1 / share - 1)
    assert paused_s >= due_s - throttle.PAUSE_S_MIN - 1e-9  # T1: never more than its share
    assert paused_s <= due_s + 0.02 * len(said) + 1e-9
