"""What this machine has free: RAM, disk, CPUs, GPUs; and what libraries may keep of it.

Starts no CUDA context: that would cost GPU memory. oneDNN and ideep keep what they have compiled for a shape, 1,024
shapes each, and every length of a sample brings about twenty: without a bound a recorder grows by 12 to 17 MB with each
new length, to gigabytes. `CACHE_ENTRIES` is more than the shapes of one sample, so that its layers find what the first
of them compiled, and little more. Values that the user has set stay. They decide no bits.
"""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from tinyonn.show.sizes import MiB

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


CACHE_ENTRIES = 64
CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
HEAP_VARIABLES = {  # of the C library, that say what `mallopt` would
    M_TRIM_THRESHOLD: ("MALLOC_TRIM_THRESHOLD_", "glibc.malloc.trim_threshold"),
    M_MMAP_THRESHOLD: ("MALLOC_MMAP_THRESHOLD_", "glibc.malloc.mmap_threshold"),
}
KEEPING = {M_MMAP_THRESHOLD: 32 * MiB, M_TRIM_THRESHOLD: 256 * MiB}
RETURNING = {M_MMAP_THRESHOLD: 1 * MiB, M_TRIM_THRESHOLD: 1 * MiB}


def bound_memory() -> None:
    """Of this process, before it runs its first model; called wherever one is loaded."""
    bound_caches()
    return_freed_memory()


def bound_caches() -> None:
    """Of this process and of those that it starts; before the first product of a model."""
    for name in CACHES:
        os.environ.setdefault(name, str(CACHE_ENTRIES))


def worker_environment(threads: int) -> dict[str, str]:
    """Variables of a process on Ray that runs a model with so many threads.

    Parameters
    ----------
    threads : int
    """
    own = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return own | {name: os.environ.get(name, str(CACHE_ENTRIES)) for name in CACHES}


def return_freed_memory() -> None:
    """Let the C library give large chunks back as they are freed (glibc alone): a model's are of ever new sizes."""
    _set_heap(RETURNING)


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Let the C library keep freed chunks for the next ones of the same size, instead of zeroing each anew; until then.

    What is kept goes back at the end.
    """
    _set_heap(KEEPING)
    try:
        yield
    finally:
        _set_heap(RETURNING)
        if (libc := _libc()) is not None:
            libc.malloc_trim(0)


def _set_heap(options: dict[int, int]) -> None:
    libc = _libc()
    for option, size in options.items():
        variable, tunable = HEAP_VARIABLES[option]
        given = variable in os.environ or tunable in os.environ.get("GLIBC_TUNABLES", "")
        if libc is not None and not given:
            libc.mallopt(option, size)


@cache
def _libc() -> Any:
    """glibc, or None."""
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
