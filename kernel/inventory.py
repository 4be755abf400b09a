"""What this machine is: processor, memory, disks, NUMA nodes, GPUs, software.

Interface: `inventory()` reads what the system tells without waiting: files of /proc and /sys, and
psutil. Nothing here measures (calibration is the node's) and nothing here fails: what a machine
does not tell is left empty. The one program it may run, nvidia-smi, is run by `gpus_by_driver`,
which only a caller that may wait (a second at most) asks for.
Invariants: V1 `inventory()` starts no process and opens no socket. V2 every list is bounded.
Source: mission rows B2 and D1; Linux's Documentation/ABI (devices/system/node, proc).
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import msgspec

T = TypeVar("T")

DISKS_MAX = 32
NUMA_NODES_MAX = 64
GPUS_MAX = 32
SMI_TIMEOUT_S = 1.0  # nvidia-smi answers in 20-600 ms; a hung driver must not hold a boot up
FILE_BYTES_MAX = 1 << 18  # /proc/cpuinfo of 256 cores is 400 KiB, its first part is enough

# Packages whose versions decide what a node can run, or how it talks.
PACKAGES = ("wasmtime", "pynng", "numpy", "msgspec", "cryptography")
# Programs that isolation and tasks may use.
PROGRAMS = ("runc", "bwrap", "nvidia-smi")


class Disk(msgspec.Struct, frozen=True):
    mount: str
    file_system: str
    total_bytes: int
    free_bytes: int


class NumaNode(msgspec.Struct, frozen=True):
    number: int
    cpus: str  # the kernel's own notation, `0-3,8`
    memory_bytes: int


class Gpu(msgspec.Struct, frozen=True):
    """`memory_bytes` is 0 where only the driver could tell (see `gpus_by_driver`)."""

    model: str
    memory_bytes: int = 0
    shared: bool = False  # it shares the processor's memory, as on a Jetson


class Inventory(msgspec.Struct, frozen=True):
    architecture: str
    system: str
    cpu_model: str
    board: str  # the device tree's model, on boards
    cores: int
    cores_usable: int  # by this process's affinity
    frequency_mhz: float
    memory_bytes: int
    memory_free_bytes: int
    disks: tuple[Disk, ...]
    numa: tuple[NumaNode, ...]
    gpus: tuple[Gpu, ...]
    software: dict[str, str]


def inventory(root: Path = Path("/")) -> Inventory:
    """This machine; `root` is where its /proc, /sys and /dev are."""
    import psutil

    memory = psutil.virtual_memory()
    uname = os.uname()
    return Inventory(
        architecture=uname.machine,
        system=f"{uname.sysname} {uname.release}",
        cpu_model=_cpu_model(root),
        board=_device_tree(root, "model"),
        cores=os.cpu_count() or 1,
        cores_usable=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1,
        frequency_mhz=_frequency_mhz(root),
        memory_bytes=memory.total,
        memory_free_bytes=memory.available,
        disks=_told(lambda: _disks(psutil.disk_partitions()), ()),
        numa=_numa(root),
        gpus=_gpus(root),
        software=_software(),
    )


def gpus_by_driver() -> tuple[Gpu, ...]:
    """GPUs with their memory as nvidia-smi tells; waits up to `SMI_TIMEOUT_S`."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    command = [program, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return ()  # a driver that does not answer tells nothing
    return smi_lines(done.stdout) if done.returncode == 0 else ()


def smi_lines(text: str) -> tuple[Gpu, ...]:
    """What nvidia-smi printed: `NVIDIA H100, 81559` a line, in MiB."""
    found = []
    for line in text.splitlines()[:GPUS_MAX]:
        model, _, mebibytes = line.rpartition(",")
        number = mebibytes.strip()
        if model:  # a Jetson's driver prints `[N/A]` for memory that is shared
            found.append(Gpu(model.strip(), int(number) << 20 if number.isdigit() else 0))
    return tuple(found)


def _cpu_model(root: Path) -> str:
    """`model name` of x86; the Pi's kernels say `Model`, other arm64 kernels nothing."""
    lines = _text(root / "proc/cpuinfo").splitlines()
    pairs = [line.partition(":") for line in lines]
    named = {key.strip(): value.strip() for key, _, value in reversed(pairs)}
    return named.get("model name") or named.get("Model") or platform.processor() or "unknown"


def _frequency_mhz(root: Path) -> float:
    """The most the first core can do; where only /proc tells, what it does now."""
    most = _text(root / "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq").strip()
    if most.isdigit():
        return int(most) / 1000
    for line in _text(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "cpu MHz":
            return _told(partial(float, value), 0.0)
    return 0.0


def _disks(partitions: Iterable[object]) -> tuple[Disk, ...]:
    """Each device once, under the first place it is mounted at."""
    import psutil

    found: dict[str, Disk] = {}
    for each in partitions:
        device, mount = str(getattr(each, "device", "")), str(getattr(each, "mountpoint", ""))
        usage = _told(partial(psutil.disk_usage, mount), None)
        if device in found or usage is None or len(found) >= DISKS_MAX:
            continue
        found[device] = Disk(mount, str(getattr(each, "fstype", "")), usage.total, usage.free)
    return tuple(found.values())


def _numa(root: Path) -> tuple[NumaNode, ...]:
    folders = _children(root / "sys/devices/system/node", "node")
    found = []
    for number, folder in folders[:NUMA_NODES_MAX]:
        words = _text(folder / "meminfo").replace("MemTotal:", "MemTotal: ").split()
        kibibytes = words[words.index("MemTotal:") + 1] if "MemTotal:" in words[:-1] else "0"
        cpus = _text(folder / "cpulist").strip()
        found.append(NumaNode(number, cpus, int(kibibytes) << 10 if kibibytes.isdigit() else 0))
    return tuple(found)


def _gpus(root: Path) -> tuple[Gpu, ...]:
    """NVIDIA's cards from /proc, a Jetson's GPU from the device tree, else its device files."""
    if "tegra" in _device_tree(root, "compatible"):
        model = _device_tree(root, "model") or "NVIDIA Jetson"
        return (Gpu(model, _memory_bytes(root), shared=True),)
    cards = sorted(_list(root / "proc/driver/nvidia/gpus"))[:GPUS_MAX]
    models = []
    for card in cards:
        for line in _text(card / "information").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "Model":
                models.append(Gpu(value.strip()))
    if models:
        return tuple(models)
    # In a container the driver's folder may be hidden while the devices are there.
    return tuple(Gpu("NVIDIA") for _ in _children(root / "dev", "nvidia")[:GPUS_MAX])


def _memory_bytes(root: Path) -> int:
    words = _text(root / "proc/meminfo").split()
    return int(words[1]) << 10 if words[:1] == ["MemTotal:"] and words[1:2][0].isdigit() else 0


def _software() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        version = _told(partial(metadata.version, package), "")
        if version:
            found[package] = version
    for program in PROGRAMS:
        path = shutil.which(program)
        if path:
            found[program] = path  # running it for its version would take 20 ms and more
    return found


def _device_tree(root: Path, name: str) -> str:
    """Strings there end in NUL; `compatible` is a list of them."""
    return _text(root / "proc/device-tree" / name).replace("\0", " ").strip()


def _children(folder: Path, prefix: str) -> list[tuple[int, Path]]:
    """`node0`, `node1`, … by number."""
    found = [(each.name.removeprefix(prefix), each) for each in _list(folder)]
    return sorted((int(number), each) for number, each in found if number.isdigit())


def _list(folder: Path) -> list[Path]:
    return _told(lambda: list(folder.iterdir()), [])


def _text(path: Path) -> str:
    def read() -> str:
        with path.open("rb") as file:
            return file.read(FILE_BYTES_MAX).decode("utf-8", "replace")

    return _told(read, "")


def _told(ask: Callable[[], T], otherwise: T) -> T:
    """What the system tells, or `otherwise` where it does not (no such file, no right, no data)."""
    try:
        return ask()
    except (OSError, ValueError, metadata.PackageNotFoundError):
        return otherwise
