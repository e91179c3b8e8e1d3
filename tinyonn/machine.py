"""What this machine has free: RAM, disk, CPUs, GPUs. Starts no CUDA context: that would cost GPU memory."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Device = Literal["cpu", "cuda"]

CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class Gpu:
    """One GPU: name, free and total bytes."""

    name: str
    free: int
    total: int


def free_ram(cgroup: Path = CGROUP, meminfo: Path = MEMINFO) -> int:
    """Bytes of RAM that can be had without swapping; within a container, of what it may have."""
    free = _available(meminfo)
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):  # no limit reads "max"
        return free
    cached = 0
    for line in (
        (cgroup / "memory.stat").read_text().splitlines() if (cgroup / "memory.stat").is_file() else []
    ):
        name, _, value = line.partition(" ")
        cached += int(value) if name == "inactive_file" else 0
    return max(0, min(free, limit - used + cached))


def _available(meminfo: Path) -> int:
    try:
        lines = meminfo.read_text("utf-8").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # no Linux, or one that is very old
        import psutil

        return int(psutil.virtual_memory().available)


def peak_rss() -> int:
    """Most bytes of RAM that this process has held.

    On Linux from ``VmHWM``: what ``getrusage`` says counts what the parent held when it started this process, too.
    """
    try:
        status = Path("/proc/self/status").read_text("utf-8").splitlines()
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_disk(folder: Path) -> int:
    """Free bytes where a folder is or would be made."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def usable_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> list[Gpu]:
    """The GPUs that Torch would see, by ``nvidia-smi``; empty without any."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        return []
    command = ["nvidia-smi", "--query-gpu=name,memory.free,memory.total", "--format=csv,noheader,nounits"]
    command += ["-i", visible] if visible else []
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_gpus(text)


def parse_gpus(text: str) -> list[Gpu]:
    """Read lines of ``name, free MiB, total MiB``; one without numbers (a GPU that is lost) is left out."""
    found = []
    for line in text.splitlines():
        name, *numbers = (part.strip() for part in line.rsplit(",", 2))
        if len(numbers) == 2 and all(number.isdigit() for number in numbers):
            found.append(Gpu(name, int(numbers[0]) << 20, int(numbers[1]) << 20))
    return found
