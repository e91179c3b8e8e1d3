"""Compiled CPU kernels of the sparse experts: Numba for what runs once per prompt, LLVM for what runs at every token.

The decode kernels are LLVM text, since their speed rests on instructions that a compiler does not find by itself: the
expansion of packed values to the places of a mask's bits (vpexpandw) and gathers over rows too short for its loops.
They run on Torch's own threads: a second pool would spin against the first.

This file is saved beside exported models. Importing it without Numba raises ImportError, which its siblings expect.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

try:
    import llvmlite.binding as llvm
    from numba import njit
except ImportError as error:
    raise ImportError("the compiled CPU kernels need numba; pip install numba") from error

from .llvm_tinyonn import TEXTS, UNROLLED, WORD

__all__ = [
    "BLOCK_BYTES", "PADDING", "UNROLLED", "WORD", "expands", "gathers", "in_bands", "join", "kernel",
    "launch", "pack", "scatter",
]  # fmt: skip

PADDING = 32  # values that a vector load may read beyond the last
BLOCK_BYTES = 1 << 16  # of what a thread reads between two looks at the counter


@cache
def features() -> frozenset[str]:
    """What this CPU can do, in LLVM's names."""
    return frozenset(name for name, has in llvm.get_host_cpu_features().items() if has)


def expands() -> bool:
    """Whether the kernels of masks run here: AVX-512 with VBMI2."""
    return {"avx512f", "avx512bw", "avx512vbmi2"} <= features() and _compiles("expand", 0)


def gathers() -> bool:
    """Whether the kernels of rows run here: AVX2 or better."""
    return "avx2" in features() and _compiles("rows16", 1)


@cache
def _compiles(kind: str, tokens: int) -> bool:
    try:
        kernel(kind, tokens)
    except RuntimeError:  # an older LLVM reads its text otherwise
        return False
    return True


# What runs once per prompt or step: bits are moved, nothing is computed. Not cached on disk: an exported model's folder
# may be read-only.


@njit(nogil=True)
def scatter(
    first: int, last: int, items: Any, columns: Any, pointer: Any, groups: Any, out: int, W: Any
) -> None:
    """Rows first:last of the dense matrix from the given groups; `pointer` as in ExpertMatrix."""
    for row in range(first, last):
        W[row] = 0
        for group in groups:
            place = group * out + row
            for entry in range(pointer[place], pointer[place + 1]):
                W[row, columns[entry]] = items[entry]


@njit(nogil=True)
def join(
    first: int, last: int, items: Any, columns: Any, pointer: Any, groups: Any, out: int,
    starts: Any, joined_items: Any, joined_columns: Any,
) -> None:  # fmt: skip
    """Rows first:last of the given groups one after another, by row; columns are not sorted."""
    for row in range(first, last):
        at = starts[row]
        for group in groups:
            place = group * out + row
            for entry in range(pointer[place], pointer[place + 1]):
                joined_items[at] = items[entry]
                joined_columns[at] = columns[entry]
                at += 1


@njit(nogil=True)
def pack(
    first: int, last: int, items: Any, columns: Any, pointer: Any, groups: Any, out: int,
    starts: Any, masks: Any, packed: Any,
) -> None:  # fmt: skip
    """Rows first:last of the given groups as masks of 32 columns and packed values."""
    words = masks.shape[1]
    whole = np.zeros(words * 32, items.dtype)
    for row in range(first, last):
        bits = masks[row]
        bits[:] = 0
        for group in groups:
            place = group * out + row
            for entry in range(pointer[place], pointer[place + 1]):
                column = columns[entry]
                whole[column] = items[entry]
                bits[column >> 5] |= np.uint32(1) << np.uint32(column & 31)
        at = starts[row]
        for word in range(words):
            mask = bits[word]
            column = word * 32
            while mask:
                if mask & np.uint32(1):
                    packed[at] = whole[column]
                    at += 1
                mask >>= np.uint32(1)
                column += 1


def in_bands(work: Callable[..., None], rows: int, *arguments: Any) -> None:
    """Run `work(first, last, *arguments)` over bands of rows, on as many threads as Torch uses."""
    threads = min(torch.get_num_threads(), rows)
    if threads < 2:
        work(0, rows, *arguments)
        return
    edges = [rows * number // threads for number in range(threads + 1)]
    pool = _pool(os.getpid(), threads - 1)
    others = [pool.submit(work, edges[n], edges[n + 1], *arguments) for n in range(1, threads)]
    work(edges[0], edges[1], *arguments)
    for other in others:
        other.result()


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process: those of a parent do not survive a fork."""
    return ThreadPoolExecutor(threads, f"tinyonn-{process}")


# What runs at every token.

Kernel = Callable[[Any], None]
_SIGNATURE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def _parallel() -> Any:
    """`GOMP_parallel` of the OpenMP that Torch itself runs on, or None."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        start = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    start.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    start.restype = None
    return start


def launch(kind: str, tokens: int, arguments: Sequence[int]) -> None:
    """Run a kernel on Torch's threads; they deal themselves blocks of rows.

    Parameters
    ----------
    kind : str
        See `kernel`.
    tokens : int
    arguments : sequence of int
        0 (the next row), rows, rows of a block, then what the kernel takes.
    """
    run, address = kernel(kind, tokens)
    threads = torch.get_num_threads()
    at = (ctypes.c_int64 * len(arguments))(*arguments)
    if threads == 1:
        run(at)
    elif (start := _parallel()) is not None:
        start(address, at, threads, 0)
    else:
        others = [_pool(os.getpid(), threads - 1).submit(run, at) for _ in range(threads - 1)]
        run(at)
        for other in others:
            other.result()


_ENGINES: list[Any] = []  # own the code


@cache
def kernel(kind: str, tokens: int) -> tuple[Kernel, int]:
    """Compile a kernel: callable with the address of its arguments, and its own address.

    Parameters
    ----------
    kind : str
        "masks": masks and bfloat16 values, the input's even columns before the odd ones in each 32; "rows16",
        "rows32": bfloat16 or float32 values beside uint16 columns; "expand": masks to dense rows, for no tokens.
    tokens : int
        Of the input, 1 to 8.

    Raises
    ------
    RuntimeError
        This LLVM does not read the text.
    """
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple()
    machine = target.create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3, jit=True
    )
    text = TEXTS[kind](tokens)
    module = llvm.parse_assembly(text)
    module.triple = machine.triple
    module.verify()
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(module, builder)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    _ENGINES.append(engine)
    address = engine.get_function_address("kernel")
    return _SIGNATURE(address), address
