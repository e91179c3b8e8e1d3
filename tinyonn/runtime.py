"""What libraries and the C library keep for later, bounded: settings of every process that runs a model.

oneDNN and ideep keep what they have compiled for a shape, 1,024 shapes each, and every length of a sample brings about
twenty: without a bound a recorder grows by 12 to 17 MB with each new length, to gigabytes. `CACHE_ENTRIES` is more than
the shapes of one sample, so that its layers find what the first of them compiled, and little more. Values that the user
has set stay. They decide no bits.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from tinyonn.sizes import MiB

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
