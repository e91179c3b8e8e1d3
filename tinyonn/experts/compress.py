"""A matrix and the groups of its weights, into values, columns and row pointers; and back.

With G groups, entries lie in the order of (group, row, column); group g has in row o the entries
``row_pointer[g * out + o] : row_pointer[g * out + o + 1]``. A value takes 2 bytes (BF16), a column 2, a pointer 4.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit

from tinyonn.experts.source import DROPPED
from tinyonn.store.records import Float64, UInt8

WIDE = 1 << 16  # inputs, above which a column takes 4 bytes


class Compressed(NamedTuple):
    """One linear layer.

    Attributes
    ----------
    values : bfloat16 or float32 [entries]
    columns : uint16 or int32 [entries]
    row_pointer : int32 [groups * out + 1]
    sizes : int64 [groups]
        Entries of each group.
    """

    values: torch.Tensor
    columns: torch.Tensor
    row_pointer: torch.Tensor
    sizes: np.ndarray


def compress(W_OI: torch.Tensor, group_OI: UInt8, groups: int) -> Compressed:
    """Compress a matrix.

    Parameters
    ----------
    W_OI : bfloat16 or float32 [out, in]
    group_OI : uint8 [out, in]
        Number of each weight's group; those from `groups` on are left out.
    groups : int

    Returns
    -------
    Compressed
    """
    out, inputs = W_OI.shape
    bits = W_OI.contiguous().view(torch.uint16 if W_OI.dtype == torch.bfloat16 else torch.int32).numpy()
    counts = np.zeros((groups, out), np.int64)
    _count(group_OI, counts)
    pointer = np.zeros(groups * out + 1, np.int64)
    np.cumsum(counts.reshape(-1), out=pointer[1:])
    if pointer[-1] > np.iinfo(np.int32).max:
        raise ValueError(
            f"{pointer[-1]:,} entries in one matrix; row pointers of 32 bits reach to 2,147,483,647"
        )
    values = np.empty(pointer[-1], bits.dtype)
    columns = np.empty(pointer[-1], np.uint16 if inputs <= WIDE else np.int32)
    _fill(bits, group_OI, pointer, values, columns)
    return Compressed(
        torch.from_numpy(values).view(W_OI.dtype),
        torch.from_numpy(columns),
        torch.from_numpy(pointer.astype(np.int32)),
        counts.sum(1),
    )


def expand(matrix: Compressed, out: int, inputs: int, chosen: np.ndarray) -> tuple[torch.Tensor, UInt8]:
    """The dense matrix of chosen groups, [out, in] with zeros elsewhere, and every weight's group, uint8 [out, in].

    Parameters
    ----------
    matrix : Compressed
    out, inputs : int
    chosen : bool [groups]
    """
    wide = torch.uint16 if matrix.values.dtype == torch.bfloat16 else torch.int32
    bits = matrix.values.view(wide).numpy()
    dense = np.zeros((out, inputs), bits.dtype)
    groups = np.full((out, inputs), DROPPED, np.uint8)
    _expand(bits, matrix.columns.numpy(), matrix.row_pointer.numpy(), chosen, dense, groups)
    return torch.from_numpy(dense).view(matrix.values.dtype), groups


def stored_bytes(out: int, inputs: int, groups: int, entries: int, value_bytes: int = 2) -> int:
    """What a compressed matrix takes, in memory and in a file."""
    return entries * (value_bytes + (2 if inputs <= WIDE else 4)) + 4 * (groups * out + 1)


def sums_by_group(group: UInt8, codes: np.ndarray, worth: Float64, groups: int) -> Float64:
    """What the weights of each group are worth together, and those of no group last: float64 [groups + 1].

    Parameters
    ----------
    group : uint8 [...]
    codes : uint16 [...]
        Records; the act code decides the worth.
    worth : float64 [16]
    groups : int
    """
    counts = np.zeros((256, 16), np.int64)
    _count_codes(group.reshape(-1), codes.reshape(-1), counts)
    worths = counts @ worth
    return np.append(worths[:groups], worths[groups:].sum())


@njit(nogil=True, cache=True)
def _count(group: Any, counts: Any) -> None:
    row = np.empty((4, 256), np.int32)  # four, so that an increment need not wait for the one before
    whole = group.shape[1] // 4 * 4
    for i in range(group.shape[0]):
        row[:] = 0
        for j in range(0, whole, 4):
            for k in range(4):
                row[k, group[i, j + k]] += 1
        for j in range(whole, group.shape[1]):
            row[0, group[i, j]] += 1
        for g in range(counts.shape[0]):
            counts[g, i] = row[0, g] + row[1, g] + row[2, g] + row[3, g]


@njit(nogil=True, cache=True)
def _fill(bits: Any, group: Any, pointer: Any, values: Any, columns: Any) -> None:
    out = group.shape[0]
    groups = (pointer.size - 1) // out
    cursor = np.empty(groups, np.int64)
    for i in range(out):
        for g in range(groups):
            cursor[g] = pointer[g * out + i]
        for j in range(group.shape[1]):
            number = group[i, j]
            if number < groups:
                place = cursor[number]
                values[place] = bits[i, j]
                columns[place] = j
                cursor[number] = place + 1


@njit(nogil=True, cache=True)
def _expand(values: Any, columns: Any, pointer: Any, chosen: Any, dense: Any, groups: Any) -> None:
    out = dense.shape[0]
    for g in range(chosen.size):
        for i in range(out):
            for place in range(pointer[g * out + i], pointer[g * out + i + 1]):
                groups[i, columns[place]] = g
                if chosen[g]:
                    dense[i, columns[place]] = values[place]


@njit(nogil=True, cache=True)
def _count_codes(group: Any, records: Any, counts: Any) -> None:
    for i in range(group.size):
        counts[group[i], records[i] >> 12] += 1
