"""One pass of k-means over the distinct rows of a place, compiled; see `tinyonn.cluster.kmeans` for the arithmetic."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from tinyonn.cluster.features import CODE_AXES

NUMBER_BITS = 8
NUMBERS = (1 << NUMBER_BITS) - 1
ROUND_UP, ROUND_DOWN = 1 + 2.0**-20, 1 - 2.0**-20  # bounds are kept in float32


class PlaceRows(NamedTuple):
    """Keys, scores and counts of all rows, and the place's range of them."""

    keys: Any
    scores: Any
    counts: Any
    begin: int
    end: int


class Distances(NamedTuple):
    """Comparable squared distances by score, act, grad, freq [16, k], by affinity [256, k] and of the place [k].

    The lowest bits of the place's are the cells' numbers; a squared distance of 1 has `unit` units.
    """

    score: Any
    act: Any
    grad: Any
    freq: Any
    affinity: Any
    near: Any
    unit: float


class Sums(NamedTuple):
    """Labels of all rows, weights of every cell [k] and sums of their features [k, axes], changed by the passes.

    `place` are the features of the place, the axes from `layer_axis` on.
    """

    labels: Any
    sizes: Any
    sums: Any
    place: Any
    layer_axis: int


class Bounds(NamedTuple):
    """Of the distances to a row's own centre and to any other, changed by `advance_place`; how far these have moved."""

    upper: Any
    lower: Any
    moved: Any
    others: Any


@njit(inline="always")
def _code_distances(code: Any, score: Any, distances: Any, base: Any) -> None:
    act, grad, freq = code >> 8, code >> 4 & 15, code & 15
    for c in range(base.size):
        base[c] = (
            distances.score[score, c]
            + distances.act[act, c]
            + distances.grad[grad, c]
            + distances.freq[freq, c]
            + distances.near[c]
        )


@njit(inline="always")
def _least(base: Any, affinity_row: Any) -> Any:
    least = np.int64(0x7FFFFFFFFFFFFFFF)
    for c in range(base.size):
        least = min(least, base[c] + affinity_row[c])
    return least


@njit(inline="always")
def _add_row(sizes: Any, sums: Any, label: Any, count: Any, score: Any, key: Any) -> None:
    sizes[label] += count
    sums[label, 0] += count * score
    sums[label, 1] += count * (key >> 16 & 15)
    sums[label, 2] += count * (key >> 12 & 15)
    sums[label, 3] += count * (key >> 8 & 15)
    sums[label, CODE_AXES + (key >> 4 & 15)] += count * (key & 15)


@njit(nogil=True, cache=True)
def assign_place(rows: Any, distances: Any, price: Any, first: int, step: int, found: Any) -> Any:
    """Find the nearest cell of every `step`-th row; inertia, the farthest row and its squared distance."""
    keys, scores, counts, begin, end = rows
    labels, sizes, sums, place, layer_axis = found
    base = np.empty(sizes.size, np.int64)
    own = np.zeros(sizes.size, np.int64)
    inertia, far, far_row, code = 0.0, -1.0, begin, np.int64(-1)
    for row in range(begin + (first - begin) % step, end, step):
        key = np.int64(keys[row])
        if key >> 8 != code:
            code = key >> 8
            _code_distances(code, scores[row], distances, base)
        least = _least(base, distances.affinity[key & 255])
        label = least & NUMBERS
        distance = max((least >> NUMBER_BITS) / distances.unit - price[label], 0.0)
        count = np.int64(counts[row])
        inertia += count * distance
        labels[row] = label
        if distance > far:
            far, far_row = distance, row
        _add_row(own, sums, label, count, np.int64(scores[row]), key)
    for c in range(sizes.size):
        sizes[c] += own[c]
        for axis in range(place.size):
            sums[c, layer_axis + axis] += own[c] * place[axis]
    return inertia, far_row, far


@njit(nogil=True, cache=True)
def advance_place(rows: Any, distances: Any, bounds: Any, found: Any) -> int:
    """Look again at the rows whose bounds allow it; how many weights changed cell."""
    keys, scores, counts, begin, end = rows
    upper, lower, moved, others = bounds
    labels, sizes, sums, place, layer_axis = found
    base = np.empty(sizes.size, np.int64)
    own = np.zeros(sizes.size, np.int64)
    changed, code = 0, np.int64(-1)
    for row in range(begin, end):
        label = np.int64(labels[row])
        above = (upper[row] + moved[label]) * ROUND_UP
        below = (lower[row] - others[label]) * ROUND_DOWN
        if above < below:
            upper[row], lower[row] = above, below
            continue
        key = np.int64(keys[row])
        if key >> 8 != code:
            code = key >> 8
            _code_distances(code, scores[row], distances, base)
        affinity_row = distances.affinity[key & 255]
        least = _least(base, affinity_row)
        nearest = least & NUMBERS
        kept = base[nearest]
        base[nearest] = np.int64(0x3FFFFFFFFFFFFFFF)
        second = _least(base, affinity_row)
        base[nearest] = kept
        upper[row] = math.sqrt((least >> NUMBER_BITS) / distances.unit) * ROUND_UP
        lower[row] = math.sqrt((second >> NUMBER_BITS) / distances.unit) * ROUND_DOWN
        if nearest != label:
            count, score = np.int64(counts[row]), np.int64(scores[row])
            changed += int(count)
            labels[row] = nearest
            _add_row(own, sums, nearest, count, score, key)
            _add_row(own, sums, label, -count, score, key)
    for c in range(sizes.size):
        sizes[c] += own[c]
        for axis in range(place.size):
            sums[c, layer_axis + axis] += own[c] * place[axis]
    return changed
