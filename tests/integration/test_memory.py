"""The memory of a class bounds what the tasks of a node hold together, by a cgroup and by books."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import wasmtime

import manifold
from manifold.kernel.geode.messages import Demand
from manifold.kernel.process import memory, throttle
from manifold.shells.sdk import Client
from manifold.tools.emulator.testing import TestCluster

PATIENCE_S = 60.0
MIB = 1 << 20
CLASS_BYTES = 96 * MIB
CLASSES = """\
classes:
  small: {count: 2, cores: 4, memory: 96MiB}
tasks: {memory: 24MiB}
"""
# Fills 95 MiB, which its worker may have, and goes on for ever: with the worker it is too much.
HOARD = """(module (memory 1520) (func (export "run") (param i64)
    (memory.fill (i32.const 0) (i32.const 7) (i32.const 99614720))
    (loop (br 0))))"""

Start = Callable[..., TestCluster]


@pytest.fixture(params=["cgroup", "books"])
def start(manifold_clusters: Start, tmp_path: Path, request: pytest.FixtureRequest) -> Start:
    """Clusters of one class of 96 MiB, held to it in either way."""
    roots = throttle.MEMORY_ROOTS if request.param == "cgroup" else ()

    def started(nodes: int = 1, **settings: str) -> TestCluster:
        config = tmp_path / "manifold.yaml"
        config.write_text(CLASSES)
        overrides = {key.replace("_", "."): value for key, value in settings.items()}
        cluster = manifold_clusters(nodes, config=config, memory_roots=roots, overrides=overrides)
        by_group = all(each.memory_cgroup for each in cluster.supervisor.specs)
        if request.param == "cgroup" and not by_group:
            pytest.skip("this host allows no cgroup with the memory controller")
        assert by_group == (request.param == "cgroup")
        return cluster

    return started


def have(mib: int) -> bytearray:
    """So much private memory, whatever the limit of the process says: it may lift that itself."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
    return bytearray(b"1") * (mib << 20)


def hoard(mib: int) -> int:
    """Have so much for a moment; too much for good."""
    whole = have(mib)
    time.sleep(PATIENCE_S if len(whole) > CLASS_BYTES else 0.0)
    return len(whole) >> 20


def hold(mib: int, gate: Path) -> int:
    """Have so much until the gate is there."""
    whole = have(mib)
    while not gate.exists():
        time.sleep(0.01)
    return len(whole) >> 20


def test_a_task_that_wants_300_mib_fails_alone_and_the_next_one_works(start: Start) -> None:
    cluster = start()
    client = cluster.client()
    node = cluster.pid(0)
    with pytest.raises(MemoryError):  # the limit of its process: Python says so
        client.submit(lambda: len(bytearray(300 * MIB))).result(PATIENCE_S)
    with pytest.raises(manifold.NoMemory, match=r"small-01 .* \(96 MiB\)") as caught:
        client.submit(hoard, 300).result(PATIENCE_S)
    assert "classes: memory" in str(caught.value)
    assert client.submit(hoard, 30).result(PATIENCE_S) == 30
    assert cluster.pid(0) == node, "the node is never the victim"
    assert client.nodes()[0].state == "ready"


def test_of_a_batch_only_the_call_that_was_at_fault_fails(start: Start) -> None:
    client = start().client()
    futures = [client.submit(hoard, mib) for mib in (1, 2, 300, 3, 4)]
    assert isinstance(futures[2].exception(PATIENCE_S), manifold.NoMemory)
    assert [f.result(PATIENCE_S) for f in futures if f is not futures[2]] == [1, 2, 3, 4]


def test_what_several_tasks_hold_together_is_bounded(start: Start, tmp_path: Path) -> None:
    cluster = start()
    client = cluster.client()
    gate = tmp_path / "gate"
    futures: list[Future[Any]] = [client.submit(hold, 36, gate) for _ in range(3)]
    deadline_s = time.monotonic() + PATIENCE_S
    while not any(future.done() for future in futures):
        assert time.monotonic() < deadline_s, "108 MiB are more than 96"
        time.sleep(0.01)
    families = {pid: memory.family(pid) for pid in client.nodes()[0].workers}
    zygote = int(Path(f"/proc/{cluster.pid(0)}/stat").read_text().split()[3])
    held = memory.own_bytes(families, zygote)
    assert sum(held.values()) < CLASS_BYTES * (1 + memory.OVER_PART), held
    gate.touch()
    outcomes = [future.exception(PATIENCE_S) for future in futures]
    assert None in outcomes, "whoever fits goes on"
    assert all(isinstance(each, manifold.NoMemory) for each in outcomes if each is not None)
    assert client.submit(hoard, 40).result(PATIENCE_S) == 40


def test_what_a_task_has_started_counts_as_well(start: Start) -> None:
    client = start().client()

    def start_one() -> int:
        import subprocess
        import sys

        code = (
            "import resource as r; r.setrlimit(r.RLIMIT_DATA, (-1, -1))\n"
            f"a = bytearray(b'1') * {300 * MIB}; import time; time.sleep({PATIENCE_S})"
        )
        return subprocess.run([sys.executable, "-c", code], check=False).returncode

    future = client.submit(start_one)
    # The kernel ends whoever is largest, and its parent sees that; the books end the whole task.
    with contextlib.suppress(manifold.NoMemory):
        assert future.result(PATIENCE_S) == -9
    assert client.submit(hoard, 40).result(PATIENCE_S) == 40


def test_a_wasm_instance_that_is_too_large_with_its_worker_fails_its_job(
    start: Start, tmp_path: Path
) -> None:
    client = start(1, tasks_memory="96MiB").client()
    path = tmp_path / "hoard.wasm"
    path.write_bytes(bytes(wasmtime.wat2wasm(HOARD)))
    with pytest.raises(manifold.NoMemory, match=r"small-01 .* \(96 MiB\)"):
        client.module(path, 0, 1).result(PATIENCE_S)
    assert client.parallel_for("LOAD 0\nEMIT\nHALT", 0, 100, reduce="sum") == sum(range(100))


def test_a_node_that_keeps_the_books_admits_what_fits_beside_what_runs(
    manifold_clusters: Start, tmp_path: Path
) -> None:
    config = tmp_path / "manifold.yaml"
    config.write_text(CLASSES)
    for task, slots in (("24MiB", 4), ("40MiB", 2), ("96MiB", 1)):
        cluster = manifold_clusters(
            1, config=config, memory_roots=(), overrides={"tasks.memory": task}
        )
        load = cluster.client().nodes()[0].load
        assert load is not None and load.slots == slots
        cluster.close()


def test_a_group_of_memory_is_gone_with_its_node(start: Start) -> None:
    cluster = start(2)
    groups = [Path(each.memory_cgroup) for each in cluster.supervisor.specs if each.memory_cgroup]
    client: Client = cluster.client("small-01")
    client.submit(hoard, 1).result(PATIENCE_S)
    job = client.job("LOAD 0\nEMIT\nHALT", 0, 9, reduce="sum", demand=Demand(node="small-02"))
    assert job.result(PATIENCE_S) == 36
    assert all(group.is_dir() for group in groups)
    cluster.remove("small-02")
    assert not any(group.exists() for group in groups if group.name == "small-02")
    cluster.close()
    assert not any(group.exists() for group in groups)
