"""What a machine says of itself: this one, a server with GPUs, a Jetson, and one that is mute."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import msgspec
import pytest

from manifold.kernel import inventory as module
from manifold.kernel.inventory import Disk, Gpu, Inventory, NumaNode, inventory, smi_lines


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def test_this_machine_is_described_and_the_description_travels() -> None:
    found = inventory()
    assert found.architecture == os.uname().machine
    assert found.cores == os.cpu_count() and 1 <= found.cores_usable <= found.cores
    assert 0 < found.memory_free_bytes <= found.memory_bytes
    assert {"python", "msgspec", "pynng"} <= set(found.software)
    assert all(isinstance(each, Disk) and each.total_bytes > 0 for each in found.disks)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(found), type=Inventory) == found


def test_it_starts_no_process_and_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_arguments: object, **_options: object) -> None:
        raise AssertionError("V1: a process was started")

    monkeypatch.setattr(subprocess, "Popen", forbidden)
    inventory()  # imports psutil, fills caches
    cpu = time.process_time()
    inventory()
    # Processor time, so that a busy machine does not fail the test; 20 ms is the budget.
    assert time.process_time() - cpu < 0.020 * 3


def test_a_machine_that_tells_nothing_has_an_inventory_all_the_same(tmp_path: Path) -> None:
    found = inventory(tmp_path)
    assert (found.gpus, found.numa, found.board, found.frequency_mhz) == ((), (), "", 0.0)
    assert found.cpu_model


def test_processor_and_numa_nodes_are_read(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {
            "proc/cpuinfo": "processor\t: 0\nmodel name\t: Fast CPU\ncpu MHz\t\t: 2400.5\n"
            "processor\t: 1\nmodel name\t: Other\ncpu MHz\t\t: 1.0\n",
            "sys/devices/system/node/node0/cpulist": "0-3\n",
            "sys/devices/system/node/node0/meminfo": "Node 0 MemTotal:       2048 kB\n",
            "sys/devices/system/node/node10/cpulist": "4-7\n",
            "sys/devices/system/node/node10/meminfo": "Node 10 MemTotal:\n",
            "sys/devices/system/node/online": "0,10\n",
        },
    )
    found = inventory(tmp_path)
    assert (found.cpu_model, found.frequency_mhz) == ("Fast CPU", 2400.5)
    assert found.numa == (NumaNode(0, "0-3", 2 << 20), NumaNode(10, "4-7", 0))


def test_the_most_a_core_can_do_is_preferred_to_what_it_does_now(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {
            "proc/cpuinfo": "Model\t\t: Raspberry Pi 5 Model B Rev 1.0\ncpu MHz : 600\n",
            "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "2400000\n",
        },
    )
    found = inventory(tmp_path)
    assert (found.cpu_model, found.frequency_mhz) == ("Raspberry Pi 5 Model B Rev 1.0", 2400.0)


def test_graphics_cards_are_found_by_the_driver_or_by_their_devices(tmp_path: Path) -> None:
    by_driver = plant(
        tmp_path / "a",
        {
            "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA A\nIRQ: 5\n",
            "proc/driver/nvidia/gpus/0000:02:00.0/information": "Model: \t\t NVIDIA B\n",
        },
    )
    assert inventory(by_driver).gpus == (Gpu("NVIDIA A"), Gpu("NVIDIA B"))
    by_device = plant(tmp_path / "b", {"dev/nvidia0": "", "dev/nvidiactl": "", "dev/nvidia1": ""})
    assert inventory(by_device).gpus == (Gpu("NVIDIA"), Gpu("NVIDIA"))


def test_a_jetson_shares_its_memory_with_its_gpu(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
            "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005\0nvidia,tegra234\0",
            "proc/meminfo": "MemTotal:        7802736 kB\nMemFree: 1 kB\n",
        },
    )
    found = inventory(tmp_path)
    assert found.board == "NVIDIA Jetson Orin Nano Developer Kit"
    assert found.gpus == (Gpu(found.board, 7802736 << 10, shared=True),)


def test_the_driver_tells_memory_in_mebibytes_and_nonsense_is_no_gpu() -> None:
    assert smi_lines("NVIDIA H100 80GB HBM3, 81559\nOrin (nvgpu), [N/A]\n") == (
        Gpu("NVIDIA H100 80GB HBM3", 81559 << 20),
        Gpu("Orin (nvgpu)", 0),
    )
    assert smi_lines("No devices were found\n") == ()


def test_a_driver_that_hangs_or_fails_tells_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SMI_TIMEOUT_S", 0.05)
    for script in ("#!/bin/sh\nexec sleep 60\n", "#!/bin/sh\nexit 9\n", "not a program"):
        program = tmp_path / "nvidia-smi"
        program.write_text(script)
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        assert module.gpus_by_driver() == ()
    program.write_text("#!/bin/sh\necho 'NVIDIA X, 16'\n")
    monkeypatch.setattr(module, "SMI_TIMEOUT_S", 30)
    assert module.gpus_by_driver() == (Gpu("NVIDIA X", 16 << 20),)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert module.gpus_by_driver() == ()
