"""Compiled CPU kernels of the sparse experts: Numba for what runs once per prompt, LLVM for what runs at every token.

The decode kernels are LLVM text, since their speed rests on instructions that a compiler does not find by itself: the
expansion of packed values to the places of a mask's bits (vpexpandw) and gathers over rows too short for its loops.
They run on Torch's own threads: a second pool would spin against the first.

Shape suffixes: ``B`` samples, ``G`` groups, ``O`` outputs, ``I`` inputs, ``K`` blocks of rows. This file is saved
beside exported models. Importing it without Numba raises ImportError, which its siblings expect.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

try:
    import llvmlite.binding as llvm
    from numba import njit
except ImportError as error:
    raise ImportError("the compiled CPU kernels need numba; pip install numba") from error

from .llvm_tinyonn import TEXTS, UNROLLED, WORD

__all__ = [
    "BLOCK_BYTES", "PADDING", "UNROLLED", "WORD", "Entries", "Gradients", "block_rows", "expands", "fill", "gather",
    "gathers", "in_bands", "join", "kernel", "launch", "of_bfloat16", "pack", "same", "scatter", "to_bfloat16",
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


class Entries(NamedTuple):
    """An `ExpertMatrix` as Numba's kernels take it; see there.

    Attributes
    ----------
    values : [entries]
        Floats, or their bits as unsigned integers where they are moved alone.
    columns : uint16 or uint32 [entries]
    pointer : int32 [groups * out + 1]
    out, inputs : int
    """

    values: np.ndarray[Any, Any]
    columns: np.ndarray[Any, Any]
    pointer: np.ndarray[Any, Any]
    out: int
    inputs: int


class Gradients(NamedTuple):
    """What `gather` fills in; an array without items is not asked for.

    Attributes
    ----------
    values : float [entries]
        Added to.
    gates : float [blocks of rows, samples, groups]
        Written.
    """

    values: np.ndarray[Any, Any]
    gates: np.ndarray[Any, Any]


# What runs once per prompt or step: bits are moved, nothing is computed. Not cached on disk: an exported model's folder
# may be read-only.
# Entries are counted unsigned, since a signed place might be one from the end, which Numba would ask at each of them.


@njit(nogil=True)
def scatter(first: int, last: int, entries: Entries, groups: Any, W: Any) -> None:
    """Rows first:last of the dense matrix from the given groups."""
    values, columns, pointer, out, _ = entries
    for row in range(first, last):
        W[row] = 0
        for group in groups:
            place = group * out + row
            for entry in range(np.uint32(pointer[place]), np.uint32(pointer[place + 1])):
                W[row, columns[entry]] = values[entry]


@njit(nogil=True)
def join(
    first: int, last: int, entries: Entries, groups: Any, starts: Any, joined_columns: Any, joined: Any
) -> None:
    """Rows first:last of the given groups one after another, by row; columns are not sorted."""
    values, columns, pointer, out, _ = entries
    for row in range(first, last):
        at = starts[row]
        for group in groups:
            place = group * out + row
            for entry in range(np.uint32(pointer[place]), np.uint32(pointer[place + 1])):
                joined[at] = values[entry]
                joined_columns[at] = columns[entry]
                at += 1


@njit(nogil=True)
def pack(first: int, last: int, entries: Entries, groups: Any, starts: Any, masks: Any, packed: Any) -> None:
    """Rows first:last of the given groups as masks of 32 columns and packed values."""
    values, columns, pointer, out, _ = entries
    words = masks.shape[1]
    whole = np.zeros(words * 32, values.dtype)
    for row in range(first, last):
        bits = masks[row]
        bits[:] = 0
        for group in groups:
            place = group * out + row
            for entry in range(np.uint32(pointer[place]), np.uint32(pointer[place + 1])):
                column = columns[entry]
                whole[column] = values[entry]
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


# What runs over the entries for a batch whose samples have gates of their own: a block of rows at a time, so small that
# its part of a dense weight stays in the cache. Within it the entries of a group lie one after another; their places in
# the block are found once for all samples.

SAMPLE_BYTES = 1 << 17  # of a sample's dense weight in a block
AHEAD = 4  # entries of a row that are read without asking: a branch that is foretold wrongly costs more


def block_rows(inputs: int, itemsize: int) -> int:
    """Rows of a block; results depend on it, so it is the shape's own, whatever the machine."""
    return max(8, SAMPLE_BYTES // max(1, inputs * itemsize))


# What goes between a float and an item of a dense weight; bfloat16 is held as its bits.


@njit(inline="always")
def same(item: Any) -> Any:
    """The float itself."""
    return item


@njit(inline="always")
def to_bfloat16(value: Any) -> Any:
    """Rounded to the nearest, ties to even, as Torch does; NaN stays NaN."""
    bits = np.float32(value).view(np.uint32)
    if bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000):
        return np.uint16(0x7FC0)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@njit(inline="always")
def of_bfloat16(bits: Any) -> Any:
    """Exact."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@njit(nogil=True)
def _places(first: int, last: int, entries: Entries, starts: Any) -> Any:
    """Place within the block of each of its entries, group after group; `starts` [groups + 1] is filled."""
    _, columns, pointer, out, inputs = entries
    groups = starts.size - 1
    count = 0
    for group in range(groups):
        starts[group] = count
        count += pointer[group * out + last] - pointer[group * out + first]
    starts[groups] = count
    places = np.empty(count + AHEAD, np.int32)
    at = 0
    for group in range(groups):
        if starts[group] == starts[group + 1]:
            continue
        for row in range(first, last):
            before = (row - first) * inputs
            begin, end = pointer[group * out + row], pointer[group * out + row + 1]
            if begin + AHEAD <= columns.size:
                for n in range(AHEAD):  # most rows have fewer: what is too much is written over
                    places[at + n] = before + columns[begin + n]
                for n in range(AHEAD, end - begin):
                    places[at + n] = before + columns[begin + n]
            else:
                for n in range(end - begin):
                    places[at + n] = before + columns[begin + n]
            at += end - begin
    return places


@njit(nogil=True)
def fill(first: int, last: int, rows: int, entries: Entries, gates: Any, store: Any, W: Any) -> None:
    """Blocks first:last of the dense weights [B, out * inputs] of gates [B, G]; groups with one gate for all once.

    `store` makes an item of `W` of a float.
    """
    values, _, pointer, out, inputs = entries
    samples, groups = gates.shape
    starts = np.empty(groups + 1, np.int64)
    shared = np.empty(groups, np.bool_)
    for group in range(groups):
        shared[group] = True
        for b in range(1, samples):
            if gates[b, group] != gates[0, group]:
                shared[group] = False
    for block in range(first, last):
        top, bottom = block * rows, min(block * rows + rows, out)
        places = _places(top, bottom, entries, starts)
        left, right = top * inputs, bottom * inputs
        W[0, left:right] = 0
        for b in range(-1, samples):  # -1: what all share, in the first sample's place
            here = W[max(b, 0), left:right]
            if b == 0:
                for other in range(1, samples):
                    W[other, left:right] = here
            for group in range(groups):
                gate = gates[max(b, 0), group]
                if gate == 0 or shared[group] != (b < 0):
                    continue
                begin, count = starts[group], starts[group + 1] - starts[group]
                part = values[pointer[group * out + top] :]
                for n in range(count):
                    here[places[begin + n]] = store(part[n] * gate)


@njit(nogil=True, fastmath={"reassoc", "contract", "nsz"})
def gather(
    first: int, last: int, rows: int, entries: Entries, gates: Any, load: Any, W: Any, gradients: Gradients
) -> None:
    """The other way, from gradients `W` of the dense weights.

    Adds to those of values gate times gradient of all samples, and writes to those of gates for blocks first:last the
    sums of value times gradient over a group's entries. `load` makes a float of an item of `W`.
    """
    values, _, pointer, out, inputs = entries
    of_values, of_gates = gradients
    to_values, to_gates = of_values.size > 0, of_gates.size > 0
    samples, groups = gates.shape
    starts = np.empty(groups + 1, np.int64)
    for block in range(first, last):
        top, bottom = block * rows, min(block * rows + rows, out)
        places = _places(top, bottom, entries, starts)
        for b in range(samples):
            here = W[b, top * inputs : bottom * inputs]
            for group in range(groups):
                gate = gates[b, group]
                begin, count = starts[group], starts[group + 1] - starts[group]
                entry = pointer[group * out + top]
                old, new = values[entry : entry + count], of_values[entry : entry + count]
                at = places[begin : begin + count]
                if to_gates:
                    total = values.dtype.type(0)
                    if to_values and gate != 0:
                        for n in range(count):
                            found = load(here[at[n]])
                            total += old[n] * found
                            new[n] += gate * found
                    else:
                        for n in range(count):
                            total += old[n] * load(here[at[n]])
                    of_gates[block, b, group] = total
                elif gate != 0:
                    for n in range(count):
                        new[n] += gate * load(here[at[n]])
