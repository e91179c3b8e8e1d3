"""A weight's group from its tensor's cuts."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from tinyonn.experts.cuts import NONE, OUT, tie_hash


@njit(nogil=True, cache=True)
def assign(
    keys: Any,
    ranks: Any,
    labels: Any,
    first: Any,
    seed: Any,
    cut: Any,
    core_cut: Any,
    cell_cut: Any,
    by_row: Any,
    by_column: Any,
    core: Any,
    out: Any,
) -> None:
    """Put a band's weights into groups.

    Parameters
    ----------
    keys : uint32 [rows, columns]
        Of the score.
    ranks : uint16 [rows, columns], or [1, 1] where there is no core
        Of standing high in every slice.
    labels : uint8 [rows, columns], or [1, 1]: that of all
    first : int
        Number of the band's first row.
    seed : uint64
    cut, core_cut : uint64 [1], [all rows] or [all columns]
        A weight that reaches both is in the core.
    cell_cut : uint64 [cells], or [0]
        What the others must reach; without it, `cut`.
    by_row, by_column : int
        1 if the cuts are of rows, of columns.
    core : int
        Number of its group.
    out : uint8 [rows, columns], written
    """
    width = keys.shape[1]
    cored = core_cut.size > 1 or core_cut[0] != NONE
    labelled = int(labels.size > 1)
    kept = np.empty(width, np.bool_)
    for i in range(keys.shape[0]):
        base = np.uint64((first + i) * width)
        row = (first + i) * by_row
        its = labels[i * labelled]
        if cell_cut.size > 0:
            for j in range(width):
                label = its[j * labelled]
                c = cell_cut[label] if label < cell_cut.size else NONE
                out[i, j] = label if _reaches(keys[i, j], c, base + np.uint64(j), seed) else OUT
            if not cored:
                continue
        if by_column:
            for j in range(width):
                kept[j] = _reaches(keys[i, j], cut[j], base + np.uint64(j), seed)
        else:
            c = cut[row]
            for j in range(width):
                kept[j] = _reaches(keys[i, j], c, base + np.uint64(j), seed)
        if cell_cut.size == 0:
            for j in range(width):
                out[i, j] = its[j * labelled] if kept[j] else OUT
        if not cored:
            continue
        if by_column:
            for j in range(width):
                kept[j] &= _reaches(_rank_key(ranks[i, j]), core_cut[j], base + np.uint64(j), seed)
        else:
            c = core_cut[row]
            for j in range(width):
                kept[j] &= _reaches(_rank_key(ranks[i, j]), c, base + np.uint64(j), seed)
        for j in range(width):
            out[i, j] = core if kept[j] else out[i, j]


@njit(inline="always")
def _reaches(key: Any, cut: Any, index: Any, seed: Any) -> Any:
    high = np.uint32(cut >> np.uint64(32))
    above = key > high
    if key == high:  # seldom; the rest goes without a branch
        above = tie_hash(index, seed) >= (cut & np.uint64(0xFFFFFFFF))
    return above


@njit(inline="always")
def _rank_key(rank: Any) -> Any:
    return np.uint32(rank) << np.uint32(16)
