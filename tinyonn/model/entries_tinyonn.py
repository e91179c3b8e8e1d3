"""Compiled passes over the entries of a compressed matrix, for a batch whose samples have gates of their own.

A block of rows is taken at a time, so small that its part of a dense weight stays in the cache. Within it the entries
of a group lie one after another; their places in the block are found once for all samples.

Shape suffixes: ``B`` samples, ``G`` groups, ``O`` outputs, ``I`` inputs, ``K`` blocks of rows. This file is saved
beside exported models. Importing it without Numba raises ImportError, which its siblings expect.
"""

from __future__ import annotations

from typing import Any

import numpy as np

try:
    from numba import njit
except ImportError as error:
    raise ImportError("the compiled passes need numba; pip install numba") from error

__all__ = ["block_rows", "fill", "gather", "of_bfloat16", "same", "to_bfloat16"]

BLOCK_BYTES = 1 << 17  # of a sample's dense weight in a block
AHEAD = 4  # entries of a row that are read without asking: a branch that is foretold wrongly costs more


def block_rows(inputs: int, itemsize: int) -> int:
    """Rows of a block; results depend on it, so it is the shape's own, whatever the machine."""
    return max(8, BLOCK_BYTES // max(1, inputs * itemsize))


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


# Not cached on disk: an exported model's folder may be read-only.


@njit(nogil=True)
def _places(first: int, last: int, columns: Any, pointer: Any, out: int, inputs: int, starts: Any) -> Any:
    """Place within the block of each of its entries, group after group; `starts` [groups + 1] is filled."""
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
def fill(
    first: int, last: int, rows: int, values: Any, columns: Any, pointer: Any, gates: Any, out: int, inputs: int,
    store: Any, W: Any,
) -> None:  # fmt: skip
    """Blocks first:last of the dense weights [B, out * inputs] of gates [B, G]; groups with one gate for all once.

    `store` makes an item of `W` of a float.
    """
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
        places = _places(top, bottom, columns, pointer, out, inputs, starts)
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
    first: int, last: int, rows: int, values: Any, columns: Any, pointer: Any, value_gates: Any, out: int,
    inputs: int, load: Any, to_values: bool, to_gates: bool, W: Any, of_values: Any, of_gates: Any,
) -> None:  # fmt: skip
    """The other way, from gradients `W` of the dense weights.

    Adds to `of_values` [entries] gate times gradient of all samples, and writes to `of_gates` [K, B, G] for blocks
    first:last the sums of value times gradient over a group's entries. `load` makes a float of an item of `W`.
    """
    samples, groups = value_gates.shape
    starts = np.empty(groups + 1, np.int64)
    for block in range(first, last):
        top, bottom = block * rows, min(block * rows + rows, out)
        places = _places(top, bottom, columns, pointer, out, inputs, starts)
        for b in range(samples):
            here = W[b, top * inputs : bottom * inputs]
            for group in range(groups):
                gate = value_gates[b, group]
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
